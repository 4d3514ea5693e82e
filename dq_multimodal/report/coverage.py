"""Coverage: how near every row has a kept one, against random selection of the same size."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.core import one_bin, order_rows
from dq_multimodal.core.hashing import row_hash
from dq_multimodal.report.vectors import OnPairs, Vectors, nearest

MAX_PAIRS = 1e9
"""So many pairs of up to 384 numbers are compared, before rows are sampled."""
SAMPLE_SEED = 104_729
"""Set apart from the seed of the selection: kept rows may be those of the lowest hash."""
NEGLIGIBLE = 0.005
"""Distances that differ by less than this share are called equal."""


@dataclass(frozen=True)
class Coverage:
    """Distance of rows to their nearest kept row.

    Attributes:
        rows: The rows that were asked.
        kept: Distance to the nearest row of the subset.
        random: Distance to the nearest row of a random subset of the same size.
        n_readable: Rows that have an embedding.
    """

    rows: Int[ndarray, " q"]
    kept: Float[ndarray, " q"]
    random: Float[ndarray, " q"]
    n_readable: int

    @property
    def is_sampled(self) -> bool:
        """Whether not all rows were asked."""
        return len(self.rows) < self.n_readable


def sample_rows(rows: Int[ndarray, " n"], size: int, seed: int) -> Int[ndarray, " k"]:
    """Draw rows by a hash of their numbers that has nothing to do with the selection.

    Returns:
        The row numbers, ascending.
    """
    if len(rows) <= size:
        return rows
    keys = row_hash(seed + SAMPLE_SEED, int(rows.max()) + 1)[rows]
    return np.sort(rows[np.lexsort((rows, keys))[:size]])


def random_kept(
    strata: Int[ndarray, " n"],
    n_kept: int,
    seed: int,
    is_random_run: bool,
    rows: Int[ndarray, " k"] | None = None,
) -> Bool[ndarray, " n"]:
    """Draw the random subset to compare with; of a run that is random itself, another one.

    Args:
        strata: Stratum of every row.
        n_kept: Rows to draw.
        seed: Seed of the run.
        is_random_run: Whether the run is random selection.
        rows: Rows to draw from; None is all.
    """
    rows = np.arange(len(strata)) if rows is None else rows
    kept = np.zeros(len(strata), dtype=bool)
    order = order_rows(one_bin(strata[rows]), seed=seed + is_random_run, rows=rows)
    kept[rows[order < n_kept]] = True
    return kept


def measure_coverage(
    vectors: Vectors,
    kept: Bool[ndarray, " n"],
    random: Bool[ndarray, " n"],
    seed: int,
    *,
    max_pairs: float = MAX_PAIRS,
    on_pairs: OnPairs | None = None,
) -> Coverage | None:
    """Measure the distance of every row, or of a seeded sample, to its nearest kept row.

    Kept rows count, at distance 0, and rows without an embedding do not.

    Args:
        vectors: The embeddings.
        kept: Which rows are kept.
        random: Which rows random selection of the same size keeps.
        seed: Seed of the sample.
        max_pairs: More pairs than this mean a sample.
        on_pairs: Called now and then with the number of pairs compared since.

    Returns:
        None where no kept row has an embedding.
    """
    readable = np.flatnonzero(~vectors.is_blank)
    sets = [np.flatnonzero(chosen & ~vectors.is_blank) for chosen in (kept, random)]
    if not all(len(chosen) for chosen in sets):
        return None
    budget = max_pairs * min(1.0, 384 / vectors.dimension)
    size = max(256, int(budget // max(len(chosen) for chosen in sets)))
    rows = sample_rows(readable, size, seed)
    found = []
    for chosen in sets:
        distances = np.zeros(len(rows))
        is_asked = ~np.isin(rows, chosen)
        distances[is_asked] = nearest(vectors, rows[is_asked], chosen, on_pairs=on_pairs)[1]
        found.append(distances)
    return Coverage(rows, found[0], found[1], len(readable))


def describe(distances: Float[ndarray, " q"]) -> dict[str, float]:
    """Give mean, median, 95th percentile and maximum."""
    median, high = np.quantile(distances, [0.5, 0.95])
    return {
        "mean": float(distances.mean()),
        "median": float(median),
        "p95": float(high),
        "max": float(distances.max()),
    }


def judge(coverage: Coverage, method: str) -> str:
    """Say in words which of the two covers better, random not spared and not wronged."""
    ours, theirs = describe(coverage.kept), describe(coverage.random)
    other = "another random draw" if method == "random" else "random selection"
    lines = [
        _compare("On average", ours["mean"], theirs["mean"], method, other),
        _compare("At the 95th percentile", ours["p95"], theirs["p95"], method, other),
    ]
    if _lead(ours["mean"], theirs["mean"]) * _lead(ours["p95"], theirs["p95"]) < 0:
        lines.append("The two measures disagree.")
    return " ".join(lines)


def _compare(where: str, ours: float, theirs: float, method: str, other: str) -> str:
    lead = _lead(ours, theirs)
    numbers = f"a distance of {ours:.4f} against {theirs:.4f}"
    if not lead:
        return f"{where}, {method} and {other} cover the data equally well: {numbers}."
    if lead > 0:
        return f"{where}, {method} covers the data better than {other}: {numbers}."
    return f"{where}, {other} covers the data better than {method}: {numbers}."


def _lead(ours: float, theirs: float) -> int:
    """Say who is nearer: 1 is ours, -1 theirs, 0 neither."""
    if abs(ours - theirs) / max(theirs, ours, 1e-12) < NEGLIGIBLE:
        return 0
    return 1 if ours < theirs else -1


def as_facts(coverage: Coverage, method: str) -> dict[str, Any]:
    """Give what the page and the figure show: numbers, a verdict, and both distributions."""
    shares = np.linspace(0, 1, 201)
    return {
        "n_rows": len(coverage.rows),
        "n_readable": coverage.n_readable,
        "is_sampled": coverage.is_sampled,
        "kept": describe(coverage.kept),
        "random": describe(coverage.random),
        "verdict": judge(coverage, method),
        "shares": shares.tolist(),
        "kept_curve": np.quantile(coverage.kept, shares).tolist(),
        "random_curve": np.quantile(coverage.random, shares).tolist(),
    }
