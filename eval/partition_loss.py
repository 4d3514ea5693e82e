"""What `--partition kmeans:K` loses against the exact bins, on real Alpaca embeddings.

    python eval/partition_loss.py [--parts 1 4 16 64] [--rows 52002] [--seeds 3]

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data). One part is the exact greedy.
For every K: seconds of the k-means and of the bins, the share of rows that get the bin number of
the exact run, how far the kept rows overlap with its own (Jaccard; the draw by rank, and by hash
with several seeds), and how near every row has a kept one (1 - cosine or euclidean distance, mean
and 95th percentile), beside random selection of the same size.
"""

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from measure import DATA, fail, flags, need, save


def main() -> None:
    """Measure, and write the results file."""
    parser = flags(__doc__, "partition_loss")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rows", type=int, help="The first so many rows.  [default: all]")
    parser.add_argument("--similarity", choices=("cosine", "euclidean"), default="cosine")
    parser.add_argument("--keep_ratio", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=3, help="Draws by hash.")
    args = parser.parse_args()
    need("alpaca_minilm_f16.npy")
    if args.parts[0] != 1:
        fail("the first of --parts must be 1, the exact bins, with which the others are compared")
    save(args.output, measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make the bins for every number of parts, and compare."""
    from dq_multimodal.config import count_kept
    from dq_multimodal.core import make_bins, one_bin, order_rows, partition_rows
    from dq_multimodal.report.compare import Vectors, nearest_in_sets

    rows = np.load(DATA / "alpaca_minilm_f16.npy")[: args.rows].astype(np.float32)
    n_kept, numbers = count_kept(len(rows), args.keep_ratio), np.arange(len(rows))
    vectors, exact = Vectors(rows, args.similarity), dict[str, Any]()

    def compare(subsets: list[np.ndarray], wanted: list[np.ndarray]) -> dict[str, Any]:
        shares = [(a & b).sum() / (a | b).sum() for a, b in zip(subsets, wanted, strict=True)]
        sets = np.array(subsets)
        away = np.where(sets, 0.0, nearest_in_sets(vectors, numbers, sets))
        far = float(np.mean([np.percentile(distances, 95) for distances in away]))
        coverage = {"mean": float(np.mean(away)), "p95": far}
        return {"jaccard": float(np.mean(shares)), "coverage": coverage}

    lines: list[dict[str, Any]] = []
    for n_parts in args.parts:
        started = time.perf_counter()
        codes = partition_rows(rows, n_parts, args.similarity)
        parted = time.perf_counter()
        bins = make_bins(rows, 10, args.similarity, codes)
        done = time.perf_counter()
        ranked = [order_rows(bins, draw="rank") < n_kept]
        drawn = [order_rows(bins, seed=seed) < n_kept for seed in range(args.seeds)]
        exact = exact or {"bin": bins.bin, "rank": ranked, "dq": drawn}
        sizes = np.bincount(codes)
        lines.append(
            {
                "asked": n_parts,
                "parts": len(sizes),
                "rows_a_part": [int(sizes.min()), int(sizes.max())],
                "seconds": {"partition": parted - started, "bins": done - parted},
                "same_bin": float((bins.bin == exact["bin"]).mean()),
                "rank": compare(ranked, exact["rank"]),
                "dq": compare(drawn, exact["dq"]),
            }
        )
        print(json.dumps(lines[-1]), file=sys.stderr)
    lone = one_bin(np.zeros(len(rows), dtype=np.int64))
    at_random = [order_rows(lone, seed=seed) < n_kept for seed in range(args.seeds)]
    lines.append({"asked": None, "dq": compare(at_random, exact["dq"])})
    asked = {"similarity": args.similarity, "seeds": args.seeds, "lines": lines}
    return {"rows": len(rows), "kept": n_kept, **asked}


if __name__ == "__main__":
    main()
