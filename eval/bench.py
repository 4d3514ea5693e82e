"""Compare selections: one suite file, three commands.

    python eval/bench.py prepare SUITE --bundle DIR     # where the data is
    python eval/bench.py run SUITE --bundle DIR         # where the device is
    python eval/bench.py table SUITE

SUITE is a name in eval/suites or the path of a .yaml file. `prepare` makes the selections and packs
all that training needs into files of at most 30 MB. `run` trains the cells that the results file
does not hold yet, in the order of the suite, and appends one JSON line for each; stopped at any
moment, it goes on. With --budget-minutes it begins no cell that would not end in time. It needs
torch, torchvision, timm, transformers, numpy, pyarrow, pillow, pyyaml and tqdm only (and gguf,
where a model is a .gguf file). `table` writes the means, their intervals and the differences to
random selection. Exit codes: 0 done, 1 a cell failed, 2 bad input, 130 interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

STARTED = time.time()
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # the package may not be installed where the device is


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of = {name: commands.add_parser(name) for name in ("prepare", "run", "table")}
    for command in of.values():
        command.add_argument("suite", help="Name in eval/suites, or a .yaml file.")
    for name in ("prepare", "run"):
        of[name].add_argument("--bundle", type=Path, required=True, help="Folder of the bundle.")
    for name in ("run", "table"):
        of[name].add_argument("--results", type=Path, help="[default: eval/results/SUITE.jsonl]")
    of["prepare"].add_argument("--work", type=Path, help="Runs between.  [default: runs/bench]")
    of["run"].add_argument("--budget-minutes", type=float, help="End after so many minutes.")
    of["run"].add_argument("--jobs", type=int, help="Cells at a time.  [default: what fits]")
    of["run"].add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    of["table"].add_argument("--figure", type=Path, help="[default: docs/figures/SUITE.png]")
    args = parser.parse_args()
    from dq_multimodal.config import InputError

    try:
        sys.exit(act(args))
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)


def act(args: argparse.Namespace) -> int:
    """Run one command, and give the exit code."""
    from dq_multimodal.config import InputError

    if args.command == "prepare":
        from harness.prepare import prepare

        prepare(args.suite, args.bundle, args.work or Path("runs") / "bench")
        return 0
    from harness.suite import read_suite, results_of

    results = args.results or results_of(args.suite)
    if args.command == "run":
        from harness.runner import run_suite

        for flag, value in (("budget-minutes", args.budget_minutes), ("jobs", args.jobs)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{flag} must be a number above 0, got {value:g}")
        options = {"budget_minutes": args.budget_minutes, "n_jobs": args.jobs, "started": STARTED}
        n_failed = run_suite(args.suite, args.bundle, results, device=args.device, **options)
        return 1 if n_failed else 0
    from harness.results import read_lines
    from harness.table import figure, markdown, summarise

    groups = summarise(read_lines(results))
    if not groups:
        raise InputError(f"{results} holds no finished cell: `bench.py run` makes them")
    suite = read_suite(args.suite)
    print(f"{suite.decides}\n\n{markdown(groups)}")
    figure(groups, args.figure or ROOT / "docs" / "figures" / f"{suite.name}.png")
    return 0


if __name__ == "__main__":
    main()
