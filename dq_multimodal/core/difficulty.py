r"""Difficulty of rows, from what a short run of a proxy says of each of them after every epoch.

Dynamics are a table (T, n, 3): after epoch t, for row i with label y and the proxy's probabilities
$p$: $p_y$, the largest other probability $\max_{j \ne y} p_j$, and EL2N
$\lVert p - \mathrm{onehot}(y) \rVert_2$. All scores follow from it without the proxy. Numbers are
read as they are and summed in float64. Scores raise InputError where dynamics have another shape, a
number is not finite or out of range, or a deviation is asked of one epoch.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import DifficultyName, InputError

ROUNDING = 2.0**-10
"""By so much numbers of half precision may lie outside their range."""
WINDOW = 10
"""Epochs in a row whose deviation is taken, the J of Dyn-Unc, DUAL and CAD."""
DUAL_EPOCHS = 30
"""Epochs that DUAL looks at, the first ones."""
BETA, POWER = 15, 4
"""C of DUAL's beta sampling (a + b = C + 1), and the power c of the share that is left out."""
N_STRATA = 50
"""Strata of CCS."""
CLIP_AT = 0.95


def aum(dynamics: Any) -> Float[ndarray, " n"]:
    r"""Area under the margin: the mean over the epochs of $p_y - \max_{j \ne y} p_j$, from -1 to 1.

    Low is hard or labelled wrong. Pleiss, Zhang, Elenberg and Weinberger 2020, "Identifying
    Mislabeled Data using the Area Under the Margin Ranking", Eq. 1-2; theirs are margins of logits,
    ours of probabilities, which are what dynamics hold.
    """
    own, other, _ = _columns(dynamics)
    return (own - other).mean(axis=0)


def confidence(dynamics: Any) -> Float[ndarray, " n"]:
    r"""Mean over the epochs of $p_y$, from 0 to 1. High is easy.

    Swayamdipta et al. 2020, "Dataset Cartography", section 2.
    """
    return _columns(dynamics)[0].mean(axis=0)


def el2n(dynamics: Any) -> Float[ndarray, " n"]:
    r"""$\lVert p - \mathrm{onehot}(y) \rVert_2$ after the last epoch. High is hard.

    Paul, Ganguli and Dziugaite 2021, "Deep Learning on a Data Diet", definition 2; they take the
    mean over ten proxies.
    """
    return _columns(dynamics)[2][-1]


def forgetting(dynamics: Any) -> Float[ndarray, " n"]:
    r"""Number of falls from right to wrong between two epochs. High is hard.

    Right is $p_y > \max_{j \ne y} p_j$, after an epoch; Toneva et al. 2019, "An Empirical Study of
    Example Forgetting", look whenever the row is in a batch. A row that is never right has no fall;
    there it counts as forgotten infinitely often, here T + 1 times: more than any other.
    """
    own, other, _ = _columns(dynamics)
    is_right = own > other
    falls = (is_right[:-1] & ~is_right[1:]).sum(axis=0)
    return np.where(is_right.any(axis=0), falls, len(own) + 1).astype(np.float64)


def dyn_unc(dynamics: Any, window: int = WINDOW) -> Float[ndarray, " n"]:
    r"""Dyn-Unc: mean over all windows of J epochs in a row of the deviation of $p_y$ in them.

    The standard deviation is that of a sample, with J - 1 below. If there are fewer epochs than J,
    there is one window. High is uncertain. He, Yang, Huang and Zhao 2024, "Large-scale Dataset
    Pruning with Dynamic Uncertainty".
    """
    windows = _windows(_columns(dynamics)[0], window)
    return np.mean([_deviation(some) for some in windows], axis=0)


def dual(dynamics: Any, window: int = WINDOW) -> Float[ndarray, " n"]:
    r"""DUAL: mean over the windows of 10 std($p_y$) (1 - mean $p_y$), of the first 30 epochs.

    Difficult as well as uncertain: high is hard. Cho, Shin, Baek and Yun 2025, "Lightweight
    Dataset Pruning without Full Training via Example Difficulty and Prediction Uncertainty". The
    factor of 10 changes no order.
    """
    windows = _windows(_columns(dynamics)[0][:DUAL_EPOCHS], window)
    return np.mean([10 * _deviation(some) * (1 - some.mean(axis=0)) for some in windows], axis=0)


def cad(dynamics: Any, window: int = WINDOW) -> Float[ndarray, " n"]:
    r"""Compute-aware difficulty: how much EL2N moves at the end of K epochs, here all of them.

    The mean of the standard deviations of EL2N over the last two windows of J epochs, one window
    if there are no more than J. High is hard for a run that can afford K epochs of all rows.
    """
    windows = _windows(_columns(dynamics)[2], window)
    return np.mean([_deviation(some) for some in windows[-2:]], axis=0)


def ifd(losses: Any) -> Float[ndarray, "*shape"]:
    """Instruction-following difficulty: loss of the response with its instruction, over without.

    High is hard: the instruction helps little. Li et al. 2024, "From Quantity to Quality", Eq. 4.
    Where the loss without is 0 nothing can help, and the score is 1. Losses are of a token, at
    least 0, in pairs (with the instruction, and without) along the last axis.
    """
    values = np.asarray(losses)
    if values.ndim < 2 or values.shape[-1] != 2 or values.dtype.kind != "f":
        raise InputError(
            f"losses must be floats of shape (..., 2), got {values.dtype} of shape {values.shape}"
        )
    values = values.astype(np.float64)
    _check_range("losses", values, 0, math.inf)
    with_it, without = values[..., 0], values[..., 1]
    return np.where(without > 0, with_it / np.where(without > 0, without, 1), 1.0)


def difficulty_weights(name: DifficultyName, scores: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Turn scores into weights of rows, larger for harder rows, at least 0.

    AUM becomes 1 - AUM, the others stay. Weights above the 95th percentile are lowered to it, so
    that a few rows do not rule.
    """
    weights = 1 - scores if name == "aum" else scores
    weights = weights.astype(np.float64)
    if not len(weights):
        return weights
    weights = np.where(weights > -ROUNDING, np.maximum(weights, 0), weights)
    _check_range(f"weights by {name}", weights, 0, math.inf)
    return clip_weights(weights)


def clip_weights(weights: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Lower weights above the 95th percentile to it, or to the least above 0 if it is 0."""
    top = np.quantile(weights, CLIP_AT, method="lower")
    if top == 0:
        top = weights.min(initial=np.inf, where=weights > 0)
    return np.minimum(weights, top)


def dual_propensity(
    dual: Float[ndarray, " n"], confidence: Float[ndarray, " n"], keep_ratio: float | int
) -> Float[ndarray, " n"]:
    r"""Chances of the rows in a draw without replacement, of sum 1: DUAL with beta sampling.

    They are in proportion to DUAL times the density of Beta(a, b) at the mean $p_y$, with
    $b = 15 (1 - \mu) (1 - r^4)$ and $a = 16 - b$, where r = 1 - keep_ratio and $\mu$ is the mean
    $p_y$ of the ten rows with the highest scores (Cho et al. 2025, section 4). So the fewer rows
    are kept, the easier they are. The chances depend on the ratio: subsets of two ratios need not
    nest. If all scores are 0 they count as equal. The mean $p_y$ is brought into
    [2^-12, 1 - 2^-12], since the density may be infinite at 1.

    Raises:
        InputError: If a score is negative or not finite, or a mean is out of range.
    """
    _check_range("DUAL scores", dual, 0, math.inf)
    _check_range("confidence", confidence, 0, 1)
    hardest = np.argsort(-dual, kind="stable")[:10]
    b = BETA * (1 - np.clip(confidence[hardest].mean(), 0, 1)) * (1 - (1 - keep_ratio) ** POWER)
    p = np.clip(confidence.astype(np.float64), 2.0**-12, 1 - 2.0**-12)
    density = (BETA - b) * np.log(p) + (b - 1) * np.log1p(-p)  # a - 1 = 15 - b
    scores = dual if dual.any() else np.ones(len(p))
    chances = np.exp(density - density[scores > 0].max()) * scores
    return chances / chances.sum()


def ccs_strata(aum: Float[ndarray, " n"]) -> Int[ndarray, " n"]:
    """Cut the rows into 50 strata of equal width of AUM, from the lowest to the highest.

    Zheng, Liu, Lai and Prakash 2023, "Coverage-centric Coreset Selection", algorithm 1, whose
    rows with the lowest AUM were taken out before. Some strata may be empty; there is one if all
    AUM are equal.

    Raises:
        InputError: If an AUM is out of range.
    """
    _check_range("AUM", aum, -1, 1)
    if not len(aum):
        return np.zeros(0, dtype=np.int64)
    low, width = aum.min(), np.ptp(aum)
    shares = (aum - low) / (width if width > 0 else 1)
    return np.minimum((shares * N_STRATA).astype(np.int64), N_STRATA - 1)


def _columns(dynamics: Any) -> tuple[ndarray, ndarray, ndarray]:
    """Check the dynamics; give the three columns in float64, (T, n) each."""
    values = np.asarray(dynamics)
    if values.ndim != 3 or values.shape[2] != 3 or not len(values) or values.dtype.kind != "f":
        raise InputError(
            f"dynamics must be floats of shape (epochs, n, 3), "
            f"got {values.dtype} of shape {values.shape}"
        )
    own, other, distance = (values[:, :, at].astype(np.float64) for at in range(3))
    for name, column, most in (
        ("the probability of the label", own, 1),
        ("the largest other probability", other, 1),
        ("EL2N", distance, math.sqrt(2)),
    ):
        _check_range(f"dynamics: {name}", column, 0, most)
    return own, other, distance


def _windows(column: Float[ndarray, "t n"], window: int) -> list[Float[ndarray, "j n"]]:
    """Give all windows of some epochs in a row; one of all epochs where these are fewer."""
    if len(column) < 2:
        raise InputError("a standard deviation needs dynamics of at least 2 epochs, got 1")
    size = min(window, len(column))
    return [column[start : start + size] for start in range(len(column) - size + 1)]


def _deviation(some: Float[ndarray, "j n"]) -> Float[ndarray, " n"]:
    return some.std(axis=0, ddof=1)


def _check_range(name: str, values: ndarray, least: float | int, most: float | int) -> None:
    """Raise if a number is not finite or out of range, but for the rounding of half precision."""
    is_bad = ~((values >= least - ROUNDING) & (values <= most + ROUNDING) & np.isfinite(values))
    if is_bad.any():
        upto = "be finite and at least 0" if most == math.inf else f"lie in [{least}, {most:.4g}]"
        raise InputError(f"{name} must {upto}, got {values[is_bad][0]}")
