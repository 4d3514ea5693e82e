"""The pool of a greedy run: the rows that are exact, and whether their picks stand."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.levels import NEVER, RUN_PICKS, Level
from dq_multimodal.core.rows import Rows

if TYPE_CHECKING:
    from dq_multimodal.core.graph_cut import GraphCut

MARGIN = 1.01
"""A row more than this many tie widths below the best can neither win nor tie: the hundredth is
far above what rounding does to a gain."""

POOL_ROWS = 256
"""Rows among which picks are made; at least."""

MAX_POOL_ROWS = 4096
"""Where more rows than this may tie, they are picked one by one."""

MAX_ENDANGERED = 1024
"""With more rows than this to look at, the bounds have grown wide: a new pool is drawn."""


class Pool:
    """The best rows of the innermost level, exact in float64.

    Args:
        cut: The greedy run.
        levels: From all rows to those near the best; spent ones are drawn anew in this list.
    """

    def __init__(self, cut: "GraphCut", levels: list[Level]) -> None:
        self.cut, self.levels, self.sum, self.start = cut, levels, cut.sum, cut.done
        self.is_single = self.is_overtaken = False
        least = np.inf
        while True:
            depth = next((k for k, level in enumerate(levels[:-1]) if level.is_spent), None)
            if depth is not None or len(levels) == 1:
                del levels[(depth or 0) + 1 :]
                while len(levels) < cut.n_levels:
                    levels.append(levels[-1].draw(least))
            self.near = levels[-1]
            self.near.look()
            self.base = self.near.bound(cut.sum, cut.done)
            self._choose()
            line = float(self.gains.max()) - MARGIN * cut.tie
            limits = np.array([line])
            if all(level.count_safe(cut.sum[None], cut.done, limits) for level in levels[:-1]):
                break
            least = line
        self.base -= cut.tilt(cut.done) * self.near.squares
        self.near.rest[self.places] = self.base[self.places] = NEVER

    def _choose(self) -> None:
        """Take the rows of the highest bounds, and all others that might be the best or tie."""
        cut = self.cut
        places = highest(self.base, POOL_ROWS)
        while True:
            self._take(places)
            close = np.flatnonzero(self.base >= float(self.gains.max()) - MARGIN * cut.tie)
            joined = np.union1d(places, close)
            if len(joined) == len(places):
                return
            if len(joined) > MAX_POOL_ROWS:
                return self._choose_one(close)
            places = joined

    def _choose_one(self, places: Int[ndarray, " k"]) -> None:
        """Take only the row to be picked next, of many that may tie."""
        gains = np.empty(len(places))
        step = self.cut.source.block_rows
        for start in range(0, len(places), step):
            self._take(places[start : start + step])
            gains[start : start + step] = self.gains
        tied = np.flatnonzero(gains >= gains.max() - self.cut.tie)
        at = tied[np.argmin(self.cut.numbers[self.near.rows[places[tied]]])]
        self._take(places[at : at + 1])
        self.is_single = True

    def _take(self, places: Int[ndarray, " b"]) -> None:
        """Widen some rows of the level, and work out their gains."""
        near = self.near
        self.places = places
        self.numbers = self.cut.numbers[near.rows[places]]
        self.squares = near.squares[places]
        self.block: Rows = self.cut.source.prepare(near.given[places], near.numbers[places])
        self._weigh()

    def _weigh(self) -> None:
        """Work out the gains of the pool, less the constant, in float64."""
        cut = self.cut
        self.gains = cut.factor * (self.block @ cut.sum)
        if not cut.is_cosine:
            self.gains += cut.tilt(cut.done) * self.squares
        self.gains[self.numbers < 0] = NEVER

    def run(self) -> None:
        """Pick until a row outside might have won or tied."""
        cut, near = self.cut, self.near
        longest = max(1, min(RUN_PICKS, 2**22 // cut.source.n_columns))
        while True:
            n_most = 1 if self.is_single else min(longest, cut.n_picks - cut.done)
            taken, numbers, gains, lines = self._speculate(n_most)
            kept, n_endangered = (1, 0) if self.is_single else self._count_kept(taken, lines)
            for at, number in zip(taken[kept:][::-1], numbers[kept:][::-1], strict=True):
                self.numbers[at] = number
            cut.keep(numbers[:kept], gains[:kept], self.squares[taken[:kept]])
            cut.sum = cut.sum - 2 * self.block[taken[:kept]].sum()
            for level in self.levels:
                level.picks += kept
            is_over = self.is_single or self.is_overtaken
            is_over |= any(level.is_spent for level in self.levels[:-1])
            is_over |= cut.done == cut.n_picks or len(taken) < n_most
            if is_over or n_endangered > MAX_ENDANGERED:
                break
            if kept < len(taken):
                self._weigh()
        cut.numbers[near.rows[self.places]] = self.numbers

    def _speculate(self, n_most: int) -> tuple[list[int], list[int], list[float], list[float]]:
        """Make picks in the pool alone.

        Returns:
            Places in the pool, row numbers, gains (less the constant), and of each pick the line
            below which no row mattered.
        """
        cut, gains, numbers = self.cut, self.gains, self.numbers
        tie, margin, step, next_equal = cut.tie, MARGIN * cut.tie, -2 * cut.factor, cut.next_equal
        rise = None if cut.is_cosine else 2 * self.squares
        taken, picked, made, lines = [], [], [], []
        for _ in range(n_most):
            best = float(gains.max())
            if best <= NEVER / 2:
                break
            tied = (gains >= best - tie).nonzero()[0]
            at = int(tied[0]) if len(tied) == 1 else int(tied[numbers[tied].argmin()])
            number = int(numbers[at])
            taken.append(at)
            picked.append(number)
            made.append(float(gains[at]))
            lines.append(best - margin)
            change = self.block.products(at)
            change *= step
            gains += change
            if rise is not None:
                gains += rise
            numbers[at] = -1 if next_equal is None else next_equal[number]
            if numbers[at] < 0:
                gains[at] = NEVER
        return taken, picked, made, lines

    def _count_kept(self, taken: list[int], lines: list[float]) -> tuple[int, int]:
        """Count the picks before the first at which a row outside might have won or tied.

        Returns:
            That number, and how many rows of the level had to be looked at.
        """
        cut, near, limits = self.cut, self.near, np.array(lines)
        self.is_overtaken = False
        is_first = cut.done == self.start  # then the pool was drawn so that its first pick stands
        steps = self.block[taken].flat()
        gone = np.cumsum(steps, axis=0) - steps
        sums = cut.sum - 2 * gone
        kept = len(lines)
        for level in self.levels[:-1]:
            kept = level.count_safe(sums[:kept], cut.done, limits[:kept]) if kept else 0
        kept = max(kept, int(is_first))
        sums, limits = sums[:kept], limits[:kept]
        if not kept:
            return 0, 0
        tilts = cut.tilt(cut.done) + (0.0 if cut.is_cosine else 2.0) * np.arange(kept)
        places = self._find_endangered(sums, limits, tilts)
        if not len(places):
            return kept, 0
        n_endangered = len(places)
        part = slice(None) if 2 * n_endangered > len(near.rows) else places  # without a copy
        ways = sums - self.sum
        gains = cut.source.multiply(near.given[part], near.numbers[part], ways.T)
        error = cut.rounding(ways) * (near.norms[part] + cut.source.offset)
        start = self.base[part] + cut.factor * error
        if not cut.is_cosine:
            gains *= cut.factor
            gains += np.outer(near.squares[part], tilts)
        sizes = np.abs(start[start > NEVER / 2]).max(initial=0.0) + np.abs(gains).max()
        gains += np.maximum(start, -1e30)[:, None]
        is_bad = gains.max(axis=0) + 2.0**-21 * sizes >= limits
        is_bad[0] &= not is_first
        self.is_overtaken = bool(is_bad.any())
        return int(is_bad.argmax()) if self.is_overtaken else kept, n_endangered

    def _find_endangered(
        self, sums: Float[ndarray, "t d"], limits: Float[ndarray, " t"], tilts: Float[ndarray, " t"]
    ) -> Int[ndarray, " k"]:
        """Find the rows of the level whose bound reaches the line on the way of W.

        The bound of a row at both ends of the way bounds it in between, but for what the way and
        the lines bend.
        """
        cut, near = self.cut, self.near
        along, across = cut.along(sums), cut.across(sums)
        moved = float(np.linalg.norm(across - near.across, axis=1).max())
        part = np.linspace(0, 1, len(sums))
        straight = along[0] + part[:, None] * (along[-1] - along[0])
        bend = float(np.linalg.norm(along - straight, axis=1).max())
        bend += near.rounding(along)
        sag = float((limits[0] + part * (limits[-1] - limits[0]) - limits).max())
        ends = near.followed @ along[[0, -1]].T
        if not cut.is_cosine:
            ends += near.squares[:, None] * tilts[[0, -1]]
        ends -= limits[[0, -1]]
        bounds = ends.max(axis=1)
        bounds += near.rest
        bounds += moved * near.slack
        bounds += bend * near.norms
        return np.flatnonzero(bounds >= -sag)


def highest(values: Float[ndarray, " n"], size: int) -> Int[ndarray, " k"]:
    """Give the places of the largest values, ascending."""
    if len(values) <= size:
        return np.arange(len(values))
    return np.sort(np.argpartition(values, -size)[-size:])
