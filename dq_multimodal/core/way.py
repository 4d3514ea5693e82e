"""How the sum W goes by some picks in a row."""

from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy import ndarray

STRIDE = 12
"""Steps that are added up side by side with others."""


class Way:
    """How the sum W goes by some picks in a row, and what other rows must not reach meanwhile.

    Args:
        sums: (t + 1, d), how far W went before each pick, and after the last.
        lines: (t,), of each pick, the gain below which a row does not matter.
    """

    def __init__(self, sums: Float[ndarray, "t1 d"], lines: Float[ndarray, " t"]) -> None:
        self.sums, self.lines = sums, lines

    def __len__(self) -> int:
        return len(self.lines)

    def first(self, n_picks: int) -> "Way":
        """Give the way of the first picks."""
        if n_picks == len(self):
            return self
        return Way(self.sums[: n_picks + 1], self.lines[:n_picks])

    @cached_property
    def bend(self) -> tuple[float, float]:
        """How far W and the lines leave the straight way between their ends.

        A bound of the longest distance of W from it, and the least that a line is above it (or,
        negative, below).
        """
        sums, part = self.sums, np.linspace(0, 1, len(self) + 1)
        squares = np.vecdot(sums, sums)
        straight = part**2 * squares[-1]
        aside = squares - 2 * part * (sums @ sums[-1]) + straight
        aside += (sums.shape[1] + 16) * 2.0**-50 * (squares + straight)  # more than rounding takes
        along = self.lines[0] + part[:-1] * (self.lines[-1] - self.lines[0])
        return float(np.sqrt(aside.max())), float((self.lines - along).min())


def lengths(vectors: Float[ndarray, "t d"]) -> Float[ndarray, " t"]:
    """Give the norms of some vectors."""
    return np.sqrt(np.vecdot(vectors, vectors))


def go_on(sums: Float[ndarray, "s d"], steps: Float[ndarray, "t d"]) -> Float[ndarray, "st d"]:
    """Go on from the last of some sums, a step at a time."""
    made = np.concatenate([sums, steps])
    rows = made[len(sums) - 1 :]
    for k in range(1, STRIDE):  # np.cumsum goes down the columns, far slower
        later = rows[k::STRIDE]
        later += rows[k - 1 :: STRIDE][: len(later)]
    for at in range(STRIDE, len(rows), STRIDE):
        rows[at : at + STRIDE] += rows[at - 1]
    return made
