"""Bounds of the gains of many rows, so that few of them have to be looked at."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.rows import HeldRows

if TYPE_CHECKING:
    from dq_multimodal.core.graph_cut import GraphCut

RING_ROWS, NEAR_ROWS = 8192, 2048
"""Rows drawn from all rows, and from these in turn; at least."""

RUN_PICKS = 96
"""Picks that are made in a row before the rows outside the front are looked at, at most."""

NEVER = -1e300
"""Gain of a row that is used up; finite, so that nothing comes of it but itself."""


class Level:
    """Rows that were looked at together, and bounds of their gains since.

    From the rows with the highest bounds the next level is drawn. The others of this level are
    then bounded together, by the way W went; where that does not do, one by one; where that does
    not do either, the next level is spent, and drawn anew.

    Args:
        cut: The greedy run.
        rows: Places of the rows among the rows left; None is all of them.
        size: Rows of the next level.

    Attributes:
        rest: Bound of what each row owes to W across the directions.
        is_spent: Whether the next level has to be drawn anew.
    """

    def __init__(self, cut: "GraphCut", rows: Int[ndarray, " r"] | None, size: int) -> None:
        self.cut, self.size, self.is_spent, self.picks = cut, size, True, 0
        self.rows = np.arange(len(cut.numbers)) if rows is None else rows
        part = slice(None) if rows is None else rows
        self.followed, self.slack, self.norms, self.squares = (
            values[part] for values in (cut.followed, cut.slack, cut.norms, cut.squares)
        )
        self.held = None if rows is None else HeldRows(cut.source, cut.numbers[rows])

    def look(self) -> None:
        """Look at all rows: bound what they owe to W across the directions, as it is now."""
        cut = self.cut
        self.across = cut.across(cut.sum)
        is_open = cut.numbers[self.rows] >= 0
        if self.held is None:
            found = np.zeros(len(self.rows))
            found[is_open] = cut.source.screen(cut.numbers[is_open], self.across)
        else:
            found = self.held.multiply(slice(None), self.across)
        rest = found + cut.rounding(self.across) * (self.norms + cut.source.offset)
        rest *= cut.factor
        rest[~is_open] = NEVER
        self.rest = rest

    def bound(self, now: Float[ndarray, " d"], done: int) -> Float[ndarray, " r"]:
        """Bound the gains of all rows at some W."""
        cut = self.cut
        along = cut.along(now)
        bounds = (self.followed @ along.astype(np.float32)).astype(np.float64)
        bounds += self.rest
        bounds += float(np.linalg.norm(cut.across(now) - self.across)) * self.slack
        bounds += self.rounding(along) * cut.widest
        if not cut.is_cosine:
            bounds += cut.tilt(done) * self.squares
        return bounds

    def rounding(self, along: Float[ndarray, "*t k"]) -> float:
        """Bound the error of the followed part of a gain, for a row of norm 1."""
        return (along.shape[-1] + 8) * 2.0**-23 * float(np.max(np.linalg.norm(along, axis=-1)))

    def draw(self, least: float) -> tuple[Int[ndarray, " k"], Float[ndarray, " k"]]:
        """Look at the rows and draw the next level, with every row whose bound is `least`.

        Returns:
            The places of its rows among the rows left, and the bounds of their gains.
        """
        cut = self.cut
        if 0 < self.picks < 4 * RUN_PICKS:
            self.size = min(2 * self.size, len(self.rows))
        self.look()
        bounds = self.bound(cut.sum, cut.done)
        is_drawn = cut.numbers[self.rows] >= 0
        if int(is_drawn.sum()) > self.size:
            is_drawn &= bounds >= min(least, np.partition(bounds, -self.size)[-self.size])
        high = bounds[is_drawn]
        self.rest[is_drawn] = bounds[is_drawn] = NEVER
        self._refer(bounds, cut.sum, cut.done)
        self.is_spent, self.picks = False, 0
        return self.rows[is_drawn], high

    def _refer(self, bounds: Float[ndarray, " r"], now: Float[ndarray, " d"], done: int) -> None:
        self.most, self.then, self.done_then = float(bounds.max()), now, done

    def count_safe(
        self, sums: Float[ndarray, "t d"], done: int, lines: Float[ndarray, " t"]
    ) -> int:
        """Count the picks before the first at which a row left out of the next level might matter.

        Args:
            sums: W before each pick.
            done: Picks before the first of them.
            lines: Of each pick, the gain below which a row does not matter.
        """
        if self.most <= NEVER / 2:
            return len(lines)
        n_safe = self._count_safe(sums, done, lines)
        if n_safe < len(lines) and done > self.done_then:
            self._refer(self.bound(sums[0], done), sums[0], done)
            n_safe = self._count_safe(sums, done, lines)
        self.is_spent = n_safe < min(len(lines), RUN_PICKS // 2)
        return n_safe

    def _count_safe(
        self, sums: Float[ndarray, "t d"], done: int, lines: Float[ndarray, " t"]
    ) -> int:
        """Count them by the way that W went since the bounds were worked out."""
        cut = self.cut
        drift = cut.factor * cut.widest * np.linalg.norm(sums - self.then, axis=1)
        if not cut.is_cosine:
            drift += 2 * (done - self.done_then + np.arange(len(lines))) * cut.widest**2
        is_bad = self.most + drift >= lines
        return int(is_bad.argmax()) if is_bad.any() else len(lines)
