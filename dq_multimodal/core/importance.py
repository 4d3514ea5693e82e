"""Importance of the bins, and the weights that an adaptive sample gives them (ADQ)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import Importance, InputError, Norm
from dq_multimodal.core.bins import Bins


@dataclass(frozen=True)
class Scores:
    """Scores of the bins, pooled over the strata by bin number; NaN where a bin has none.

    Attributes:
        representativeness: Texture level (Eq. 3) or another measure, in its own unit.
        diversity: Div (Eq. 5), negative; higher is more diverse.
    """

    representativeness: Float[ndarray, " m"]
    diversity: Float[ndarray, " m"]


def normalise(values: Float[ndarray, " m"], norm: Norm = "minmax") -> Float[ndarray, " m"]:
    r"""Bring a score of the bins to one scale (ADQ, arXiv:2412.16895, Eq. 6-7).

    "minmax" is $(x - min) / (max - min)$, in [0, 1]; "softmax-z" is $m$ softmax of the z-scores,
    positive with mean 1. The paper says "normalize" and cites batch normalisation; plain z-scores
    can be negative, which no share of a sample can be.

    Args:
        values: Score of each bin. A bin without one (NaN) takes the mean of the others.
        norm: Which scale.

    Returns:
        Scores at least 0; all 1 where they differ by less than float32 can tell, or there are none.
    """
    known = np.isfinite(values)
    result = np.ones(len(values))
    found = values[known].astype(np.float64)
    if not len(found):
        return result
    spread = found.max() - found.min()
    if spread > 1e-6 * np.abs(found).max():
        if norm == "minmax":
            scaled = (found - found.min()) / spread
        else:
            weights = np.exp((found - found.mean()) / found.std())
            scaled = weights / weights.mean()
        result[known] = scaled
    result[~known] = result[known].mean()
    return result


def sum_scores(parts: list[Scores], norm: Norm = "minmax") -> Scores:
    """Add the scores of parts of the data (images, texts), whose units are not the same.

    Args:
        parts: Scores of each part. Those of a single part stay as they are.
        norm: The scale to which each is brought first, see `normalise`.
    """
    if len(parts) == 1:
        return parts[0]
    found = [
        np.sum([normalise(getattr(part, name), norm) for part in parts], axis=0)
        for name in ("representativeness", "diversity")
    ]
    return Scores(*found)


def bin_importance(
    scores: Scores, importance: Importance = "both", norm: Norm = "minmax"
) -> Float[ndarray, " m"]:
    r"""Give the importance of each bin, $I_b = norm(Rep_b) + norm(Div_b)$ (ADQ, Eq. 8).

    Args:
        scores: Representativeness and diversity of each bin.
        importance: Their sum, or one of the two alone (the rows "+ RS" and "+ DS" of the paper's
            ablation).
        norm: See `normalise`.
    """
    parts = []
    if importance in ("both", "representativeness"):
        parts.append(normalise(scores.representativeness, norm))
    if importance in ("both", "diversity"):
        parts.append(normalise(scores.diversity, norm))
    return np.sum(parts, axis=0)


def group_rows(
    bins: Bins,
) -> tuple[Int[ndarray, " groups"], Int[ndarray, " groups"], Int[ndarray, " groups"]]:
    """Give stratum, bin and size of each (stratum, bin) that holds rows, in that order."""
    width = int(bins.bin.max()) + 1
    groups, sizes = np.unique(bins.stratum * width + bins.bin, return_counts=True)
    return groups // width, groups % width, sizes


def adaptive_weights(
    bins: Bins, importance: Float[ndarray, " m"], alpha: float = 0.6
) -> Float[ndarray, " groups"]:
    """Give the shares of the bins in an adaptive sample, for `order_rows`; see `blend_weights`.

    Returns:
        Weight of each (stratum, bin) that holds rows, sorted by stratum and then bin.
    """
    return blend_weights(*group_rows(bins)[1:], importance, alpha)


def blend_weights(
    numbers: Int[ndarray, " groups"],
    sizes: Int[ndarray, " groups"],
    importance: Float[ndarray, " m"],
    alpha: float = 0.6,
) -> Float[ndarray, " groups"]:
    r"""Blend importance and size of the bins to their shares in an adaptive sample.

    $w_{cb} = |S_{cb}| (\alpha I_b / mean(I) + 1 - \alpha)$, the mean weighted by the sizes of the
    bins. ADQ's Eq. 9-10 take $\alpha I_b + (1 - \alpha) N(b) / \sum N$ rows of each row of the bin,
    which contains no keep ratio and gives 10 % only because there are ten bins; this keeps its
    blend of importance and size and its factor N, and any keep ratio can be asked for. With
    alpha 0 or a constant importance the weights are the sizes, which is DQ.

    Args:
        numbers: Bin number of each (stratum, bin) that holds rows; see `group_rows`.
        sizes: Its rows.
        importance: Importance of each bin number, at least 0.
        alpha: Weight of the importance, in [0, 1].

    Returns:
        Weight of each.

    Raises:
        ValueError: If alpha lies outside [0, 1], or an importance is negative, not finite, or
            missing for a bin.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in [0, 1], got {alpha}")
    if len(importance) <= numbers.max():
        raise InputError(
            f"importance must hold a number for each of the {numbers.max() + 1} bins, "
            f"got {len(importance)}"
        )
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise InputError(f"importance must be finite and at least 0, got {importance.tolist()}")
    if np.ptp(importance[numbers]) == 0:
        return sizes.astype(np.float64)
    relative = importance[numbers] / importance[numbers].max()  # their mean cannot underflow
    relative /= np.average(relative, weights=sizes)
    return sizes * (alpha * relative + (1 - alpha))
