"""The comparison harness behind eval/bench.py: suites, bundles, trainers, results, tables."""
