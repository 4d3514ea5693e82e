"""Weights of the rows of a subset: factors of their losses, or how often they are drawn."""

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import InputError

if TYPE_CHECKING:
    from datasets import Dataset

WEIGHT_COLUMN = "dq_weight"
"""How many rows each row of a subset stands for, as a share of the mean."""
UseWeights = Literal["loss", "sample", "none"]
USE_HELP = (
    "loss: the loss of a row times its dq_weight; sample: rows of every epoch are drawn with "
    "replacement, in proportion to it; none: it is ignored, as by default."
)


def read_weights(dataset: "Dataset") -> Float[ndarray, " n"] | None:
    """Read the weights of all rows; None where there is no such column.

    Raises:
        InputError: If one is negative or no number, or all are 0.
    """
    if WEIGHT_COLUMN not in dataset.column_names:
        return None
    try:
        column = dataset.with_format("numpy")[WEIGHT_COLUMN][:]
        weights = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{WEIGHT_COLUMN} must hold numbers") from None
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise InputError(f"{WEIGHT_COLUMN} must be at least 0, not all of them 0, and finite")
    return weights


def find_use(asked: str | None, weights: Float[ndarray, " n"] | None) -> UseWeights:
    """Say how weights are used: as asked, else not at all; rows without weights are all equal."""
    if weights is None or asked not in ("loss", "sample"):
        return "none"
    return "loss" if asked == "loss" else "sample"


def draw_rows(
    weights: Float[ndarray, " n"], n_draws: int, seed: int, epoch: int
) -> Int[ndarray, " k"]:
    """Draw row numbers with replacement, with probabilities in proportion to the weights.

    The draws of an epoch follow from (seed, epoch) alone.
    """
    rng = np.random.default_rng((seed, epoch))
    return rng.choice(len(weights), n_draws, p=weights / weights.sum())
