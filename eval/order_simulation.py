"""The order of a billion rows in counts: are shares kept, and do quotients in float64 tell?

    python eval/order_simulation.py [--rows 1000000000] [--strata 20000] [--ratios 0.001 0.01 0.2]

Draws the sizes of strata (lognormal, seeded), and counts the rows of each that a subset keeps
(`kept_per_stratum`). The j-th row of a stratum of n has priority n / (2j + 1), a float64 in the
code. Here the last row kept of every stratum and the first one left are put in order by exact
fractions: all of the former have to come before all of the latter. That says it of all rows, since
priorities fall within a stratum.
"""

import argparse
import time
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from measure import fail, flags, save

SPREAD = 0.5
"""Standard deviation of the logarithm of a size."""
PLACED = 8
"""Strata, from the smallest to the largest, whose rows get their places among all."""


def main() -> None:
    """Simulate, and write the results file."""
    parser = flags(__doc__, "order_simulation")
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--strata", type=int, default=20_000)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.001, 0.01, 0.2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 1 <= args.strata <= args.rows:
        fail("--strata must be from 1 to the number of rows")
    save(args.output, simulate(args))


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """Count the rows that each size of subset keeps, and check them."""
    from dq_multimodal.core.order import kept_per_stratum, place_in_all

    sizes = draw_sizes(args.rows, args.strata, args.seed)
    some = np.argsort(sizes, kind="stable")[np.linspace(0, args.strata - 1, PLACED).astype(int)]
    place_in_all(sizes[:1], 0)  # compiles
    started = time.perf_counter()
    places = [place_in_all(sizes, stratum) for stratum in some.tolist()]
    place_seconds = time.perf_counter() - started
    lines, before = [], np.zeros_like(sizes)
    for ratio in sorted(args.ratios):
        n_kept = round(ratio * args.rows)
        started = time.perf_counter()
        kept = kept_per_stratum(sizes, n_kept)
        seconds = time.perf_counter() - started
        away = np.abs(kept - sizes * (n_kept / args.rows))
        lines.append(
            {
                "ratio": ratio,
                "kept": n_kept,
                "is_exact_number": int(kept.sum()) == n_kept,
                "greatest_deviation": float(away.max()),
                "holds_the_smaller": bool((before <= kept).all()),
                "seconds": round(seconds, 4),
                **compare_exactly(sizes, kept),
                "places_agree": [int((p < n_kept).sum()) for p in places] == kept[some].tolist(),
            }
        )
        before = kept
    return {
        "rows": args.rows,
        "strata": args.strata,
        "sizes": {"smallest": int(sizes.min()), "largest": int(sizes.max())},
        "least_gap": 1 / (int(sizes.max()) * (2 * int(sizes.max()) - 1)),
        "rounding": 2.0**-52,
        "placed": {"rows": sum(map(len, places)), "seconds": round(place_seconds, 2)},
        "lines": lines,
    }


def draw_sizes(n_rows: int, n_strata: int, seed: int) -> np.ndarray:
    """Draw the sizes of strata, at least 1, that sum to the number of rows."""
    drawn = np.random.default_rng(seed).lognormal(0, SPREAD, n_strata)
    ends = np.rint(np.cumsum(drawn) / drawn.sum() * (n_rows - n_strata)).astype(np.int64)
    return np.diff(ends, prepend=0) + 1


def compare_exactly(sizes: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Order the last row kept and the first one left of every stratum by whole numbers.

    Of equal fractions the lower stratum comes first. The nearest two that are not equal are given
    by their relative distance.
    """
    found = []
    for stratum, (size, k) in enumerate(zip(sizes.tolist(), kept.tolist(), strict=True)):
        found += [(Fraction(-size, 2 * k - 1), stratum, False)] if k else []
        found += [(Fraction(-size, 2 * k + 1), stratum, True)] if k < size else []
    found.sort()
    is_left = [left for *_, left in found]
    priorities = [-priority for priority, *_ in found]
    pairs = list(pairwise(priorities))
    gaps = [(a - b) / a for a, b in pairs if a != b]
    return {
        "is_exact_order": is_left == sorted(is_left),
        "compared": len(found),
        "equal_neighbours": len(pairs) - len(gaps),
        "nearest": float(min(gaps, default=1)),
    }


if __name__ == "__main__":
    main()
