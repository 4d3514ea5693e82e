"""Bounds of the gains of many rows, so that few of them have to be looked at."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.held import HeldRows
from dq_multimodal.core.way import Way, lengths

if TYPE_CHECKING:
    from dq_multimodal.core.graph_cut import GraphCut

RING_ROWS, NEAR_ROWS = 16384, 3072
"""Rows drawn from all rows, and from these in turn; at least."""

RING_FACTOR = 64
"""Rows drawn from all rows, times the square root of their number; at least."""

RUN_PICKS = 128
"""Picks that are made in a row before the rows outside the front are looked at, at most."""

UNDERFLOW = 2.0**-100
"""More than what float32 loses of a term where numbers are too small for it."""

NEVER = -1e30
"""Gain of a row that is used up; finite in float32 too, so that nothing comes of it but itself."""


class Level:
    """Rows that were looked at together, and bounds of their gains since.

    From the rows with the highest bounds the next level is drawn. The others of this level are
    then bounded together, by the way W went; where that does not do, one by one, as W is now and as
    it would be after the picks that are tried; where that does not do either, the next level is
    spent, and drawn anew. The W of the last bounds may be one of picks that were not kept.

    Args:
        cut: The greedy run.
        rows: Places of the rows among the rows left; None is all of them.
        size: Rows of the next level.

    Attributes:
        terms: What the gains are bounded by, see `GraphCut.terms`.
        is_spent: Whether the next level has to be drawn anew.
    """

    def __init__(self, cut: "GraphCut", rows: Int[ndarray, " r"] | None, size: int) -> None:
        self.cut, self.size, self.is_spent, self.picks = cut, size, True, 0
        self.rows = np.arange(len(cut.numbers)) if rows is None else rows
        self.terms = cut.terms if rows is None else cut.terms.T[:, rows].T
        self.lengths = (cut.norms if rows is None else cut.norms[rows]) + cut.source.offset
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
        rest = cut.factor * (found + cut.rounding(self.across) * self.lengths)
        rest[~is_open] = 0.0
        self.most_rest = float(np.abs(rest).max())
        rest[~is_open] = NEVER
        self.terms[:, -1] = rest

    def bound(self, now: Float[ndarray, " d"], done: int) -> Float[ndarray, " r"]:
        """Bound the gains of all rows at some W."""
        cut = self.cut
        along = cut.along(now)
        drift = float(np.linalg.norm(cut.across(now) - self.across))
        tilt = cut.tilt(done)
        weights = [*along, drift] if cut.is_cosine else [*along, drift, tilt]
        bounds = self.terms @ np.array([*weights, 1.0], dtype=np.float32)
        most = float(np.linalg.norm(along)) + cut.factor * drift + abs(tilt) * cut.widest
        error = (len(weights) + 16) * 2.0**-23 * (most * cut.widest + self.most_rest)
        bounds += np.float32(error + UNDERFLOW * (1.0 + most))
        return bounds

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
            low = np.nextafter(np.float32(least), np.float32(-np.inf))
            is_drawn &= bounds >= min(low, np.partition(bounds, -self.size)[-self.size])
        high = bounds[is_drawn].astype(np.float64)
        self.terms[is_drawn, -1] = bounds[is_drawn] = NEVER
        self._refer(bounds, cut.sum, cut.done)
        self.is_spent, self.picks = False, 0
        return self.rows[is_drawn], high

    def _refer(self, bounds: Float[ndarray, " r"], now: Float[ndarray, " d"], done: int) -> None:
        self.most, self.then, self.done_then = float(bounds.max()), now, done

    def count_safe(self, way: Way) -> int:
        """Count the picks before the first at which a row left out of the next level might matter.

        Args:
            way: The picks, from W as it is now.
        """
        cut, n_picks = self.cut, len(way)
        if not n_picks or self.most <= NEVER / 2:
            return n_picks
        n_safe = self._count_safe(way)
        if n_safe < n_picks:
            if cut.done != self.done_then or (cut.sum != self.then).any():
                self._refer(self.bound(cut.sum, cut.done), cut.sum, cut.done)
            end, done = cut.sum + way.sums[-1], cut.done + n_picks
            bounds = self.bound(end, done)
            most = max(self.most - way.lines[0], float(bounds.max()) - way.lines[-1])
            longest, lowest = way.bend
            if most + cut.factor * cut.widest * longest < lowest:
                self._refer(bounds, end, done)
                return n_picks
            n_safe = self._count_safe(way)
        self.is_spent = n_safe < min(n_picks, max(1, RUN_PICKS // 2))
        return n_safe

    def _count_safe(self, way: Way) -> int:
        """Count them by the way that W went since the bounds were worked out."""
        cut, n_picks = self.cut, len(way)
        sums = way.sums[:n_picks] + (cut.sum - self.then)
        drift = cut.factor * cut.widest * lengths(sums)
        if not cut.is_cosine:
            n_since = cut.done - self.done_then + np.arange(n_picks)
            drift += 2 * np.maximum(n_since, 0) * cut.widest**2
        is_bad = self.most + drift >= way.lines
        return int(is_bad.argmax()) if is_bad.any() else n_picks
