"""Greedy runs over the rows of one stratum: what they have in common, wherever gains are found."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import Similarity

TIE_WIDTH = 1e-9
"""Gains closer than this times the scale are a tie."""


class Greedy:
    r"""Greedy runs over the rows of one stratum, each from the rows that those before it left.

    With R the rows when a run begins and S those picked so far, the gain of a row is

    - cosine: $\sum_{p \in R} \langle p, x \rangle - 2 \sum_{p \in S} \langle p, x \rangle$
    - euclidean: $\sum_{p \in S} \|p-x\|^2 - \sum_{p \in R \setminus S} \|p-x\|^2$
      (Dataset Quantization, arXiv:2308.10524, Eq. 1-2)

    Up to a constant that is $f \langle x, W \rangle + c \|x\|^2$ with $W = \sum_R p - 2 \sum_S p$,
    f = 1 and c = 0 (cosine) or f = 2 and c = 2|S| - |R| (euclidean). Gains within 1e-9 x scale of
    the best are a tie, which the lowest row number wins: two equal rows may leave a matrix product
    with different last bits. The scale is |R| (cosine) or the sum of the squared distances of R to
    its mean (euclidean).

    Args:
        similarity: Which gain.
        n_rows: Rows of the stratum.
        total: Their sum.
        square_total: The sum of their squared norms.

    Attributes:
        n_left: Rows that are not picked yet.
        sum: W.
        done: Picks made in this run, of `n_picks`.
        tie: How close to the best a gain ties with it.
        next_equal: Of each row the next one that is equal to it and that it stands for, -1 where
            there is none; None where every row stands for itself.
        is_walking: Whether rounded gains did not decide the picks lately.
    """

    def __init__(
        self, similarity: Similarity, n_rows: int, total: Float[ndarray, " d"], square_total: float
    ) -> None:
        self.is_cosine = similarity == "cosine"
        self.factor = 1.0 if self.is_cosine else 2.0
        self.n_left, self.total, self.square_total = n_rows, total, square_total
        self.next_equal: Int[ndarray, " n"] | None = None

    def pick(
        self, n_picks: int, on_picks: Callable[[int], object] | None = None
    ) -> tuple[Int[ndarray, " picks"], Float[ndarray, " picks"]]:
        """Make a greedy run over the rows that are left.

        Args:
            n_picks: How many to pick, at most `n_left`.
            on_picks: Called now and then with the number of rows picked since its last call.

        Returns:
            The row numbers in pick order, and the gain with which each was picked.
        """
        scale = float(self.n_left)
        if not self.is_cosine:
            scale = max(self.square_total - float(self.total @ self.total) / self.n_left, 0.0)
        self.tie = TIE_WIDTH * scale
        self.sum, self.n_start, self.n_picks = self.total.copy(), self.n_left, n_picks
        self.done, self.is_walking = 0, False
        self.picked, self.gains = np.empty(n_picks, dtype=np.int64), np.empty(n_picks)
        self.picked_squares = np.zeros(n_picks)
        self._run(on_picks)
        if not self.is_cosine:
            of_picks = np.cumsum(self.picked_squares) - self.picked_squares
            self.gains += 2 * of_picks - self.square_total
        self.total = (self.total + self.sum) / 2
        self.square_total -= float(self.picked_squares.sum())
        self.n_left -= n_picks
        return self.picked, self.gains

    def _run(self, on_picks: Callable[[int], object] | None) -> None:
        """Make `n_picks` picks, and tell `keep` of each."""
        raise NotImplementedError

    def keep(
        self,
        numbers: list[int],
        gains: Float[ndarray, " picks"],
        squares: Float[ndarray, " picks"],
        way: Float[ndarray, " d"],
    ) -> None:
        """Note picks that stand, by which W went a way."""
        span = slice(self.done, self.done + len(numbers))
        self.picked[span], self.gains[span], self.picked_squares[span] = numbers, gains, squares
        self.sum, self.done = self.sum + way, span.stop

    def tilt(self, done: int) -> float:
        """Give the weight c of the squared norm after so many picks."""
        return 0.0 if self.is_cosine else 2.0 * done - self.n_start
