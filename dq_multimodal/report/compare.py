"""Coverage: how near every row has a kept one, against random selections of the same size."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.core import one_bin, order_rows
from dq_multimodal.core.hashing import row_hash
from dq_multimodal.report.vectors import OnPairs, Vectors, nearest_in_sets

N_DRAWS = 20
INTERVAL = (0.025, 0.975)
MAX_PAIRS = 1e9
"""So many pairs of up to 384 numbers are compared, before fewer rows are asked."""
SAMPLE_SEED = 104_729
"""Set apart from the seed of the selection: kept rows may be those of the lowest hash."""
MEASURES = ("mean", "median", "p95", "max")
CURVE = np.linspace(0, 1, 201)


@dataclass(frozen=True)
class Coverage:
    """Distance of every row to its nearest kept row; kept rows count, at distance 0.

    Attributes:
        n_asked: Rows whose distance was measured, of those that are in the subset or not.
        n_readable: Rows that have an embedding.
        n_draws: Random subsets of the same size, to compare with.
        kept: mean, median, p95 (95th percentile) and max of the distances to the subset.
        random: For the same four: their mean over the random draws, and the ends of the interval
            that holds 95 % of the draws.
        shares: Shares of the rows, from 0 to 1, of the curves.
        kept_curve: Within which distance so many rows have a kept row.
        random_curve: The same as mean of the draws.
        random_low: Lower end of the interval of the draws.
        random_high: Upper end.
        verdict: A sentence on mean and 95th percentile.
    """

    n_asked: int
    n_readable: int
    n_draws: int
    kept: dict[str, float]
    random: dict[str, tuple[float, float, float]]
    shares: list[float]
    kept_curve: list[float]
    random_curve: list[float]
    random_low: list[float]
    random_high: list[float]
    verdict: str

    @property
    def is_sampled(self) -> bool:
        """Whether not all rows were asked."""
        return self.n_asked < self.n_readable


def sample_rows(rows: Int[ndarray, " n"], size: int, seed: int) -> Int[ndarray, " k"]:
    """Draw rows by a hash of their numbers that has nothing to do with the selection.

    Returns:
        The row numbers, ascending.
    """
    if len(rows) <= size:
        return rows
    keys = row_hash(seed + SAMPLE_SEED, int(rows.max()) + 1)[rows]
    return np.sort(rows[np.lexsort((rows, keys))[:size]])


def draw_random(
    strata: Int[ndarray, " n"], n_kept: int, seed: int, rows: Int[ndarray, " k"]
) -> list[Bool[ndarray, " n"]]:
    """Draw 20 random subsets as `--method random` does, of other seeds than that of the run.

    The draw within the bins of dq and that of random hash the same seed and row, so that the two
    keep mostly the same rows: another seed is a fair comparison.

    Args:
        strata: Stratum of every row.
        n_kept: Rows to draw.
        seed: Seed of the run.
        rows: Rows to draw from.
    """
    draws = []
    for number in range(1, N_DRAWS + 1):
        order = order_rows(one_bin(strata[rows]), seed=seed + number, rows=rows)
        draws.append(np.zeros(len(strata), dtype=bool))
        draws[-1][rows[order < n_kept]] = True
    return draws


def measure_coverage(
    vectors: Vectors,
    kept: Bool[ndarray, " n"],
    draws: list[Bool[ndarray, " n"]],
    asked: Int[ndarray, " q"],
    method: str,
    *,
    max_pairs: float = MAX_PAIRS,
    on_pairs: OnPairs | None = None,
) -> Coverage | None:
    """Measure how far some rows are from their nearest kept row, by the run and by random draws.

    Only rows outside a subset are compared with it; as many zeros as it holds of all rows stand
    for those inside. So a sample is as good as all rows in how many of them are kept.

    Args:
        vectors: The embeddings.
        kept: Which rows are kept.
        draws: Random subsets of the same size.
        asked: Row numbers to measure at, ascending; fewer of them where that is too many pairs.
        method: Name of the method, for the verdict.
        max_pairs: Most pairs of up to 384 numbers to compare.
        on_pairs: Called now and then with the number of pairs compared since.

    Returns:
        None where a subset has no row with an embedding.
    """
    sets = np.stack([kept, *draws]) & ~vectors.is_blank
    if not sets.any(axis=1).all() or not len(asked):
        return None
    n_readable = int((~vectors.is_blank).sum())
    targets = np.flatnonzero(sets.any(axis=0))
    size = int(max_pairs * min(1.0, 384 / vectors.dimension) / len(targets))
    asked = sample_rows(asked, max(256, size), 0)
    distances = nearest_in_sets(vectors, asked, sets, on_pairs=on_pairs)
    found = []
    for chosen, row in zip(sets, distances, strict=True):
        outside = row[~chosen[asked]]
        share = chosen.sum() / max(1, n_readable - chosen.sum())
        inside = np.zeros(round(share * len(outside)) or 1 - min(1, len(outside)))
        found.append(np.concatenate([inside, outside]))
    curves = np.array([np.quantile(part, CURVE) for part in found])
    numbers = np.array([_describe(part) for part in found])
    low, high = (np.quantile(numbers[1:], end, axis=0) for end in INTERVAL)
    mean = numbers[1:].mean(axis=0)
    random = {
        name: (float(mean[k]), float(low[k]), float(high[k])) for k, name in enumerate(MEASURES)
    }
    ours = dict(zip(MEASURES, numbers[0].tolist(), strict=True))
    return Coverage(
        n_asked=len(asked),
        n_readable=n_readable,
        n_draws=len(draws),
        kept=ours,
        random=random,
        shares=CURVE.tolist(),
        kept_curve=curves[0].tolist(),
        random_curve=curves[1:].mean(axis=0).tolist(),
        random_low=np.quantile(curves[1:], INTERVAL[0], axis=0).tolist(),
        random_high=np.quantile(curves[1:], INTERVAL[1], axis=0).tolist(),
        verdict=judge(ours, random, method),
    )


def _describe(distances: Float[ndarray, " q"]) -> list[float]:
    """Give the four measures."""
    return [distances.mean(), *np.quantile(distances, [0.5, 0.95]), distances.max()]


def judge(
    ours: dict[str, float], random: dict[str, tuple[float, float, float]], method: str
) -> str:
    """Say in words which covers better, random not spared and not wronged."""
    other = "other random draws" if method == "random" else "random selection"
    lines = []
    for where, name in (("On average", "mean"), ("At the 95th percentile", "p95")):
        value, (mean, low, high) = ours[name], random[name]
        numbers = (
            f"a distance of {value:.4f} against {mean:.4f} ({low:.4f} to {high:.4f} in 95 % of "
            "the random draws)"
        )
        if low <= value <= high:
            lines.append(f"{where}, {method} and {other} cover the data equally well: {numbers}.")
        elif value < low:
            lines.append(f"{where}, {method} covers the data better than {other}: {numbers}.")
        else:
            lines.append(f"{where}, {other} covers the data better than {method}: {numbers}.")
    signs = [np.sign(ours[name] - random[name][0]) for name in ("mean", "p95")]
    if signs[0] * signs[1] < 0 and not any("equally" in line for line in lines):
        lines.append("The two measures disagree.")
    return " ".join(lines)
