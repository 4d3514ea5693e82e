"""The end of a greedy run's levels: the rows near the best, and those among which it picks."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.held import HeldRows
from dq_multimodal.core.levels import NEVER, RUN_PICKS, Level
from dq_multimodal.core.table import MARGIN, Table
from dq_multimodal.core.way import Way

if TYPE_CHECKING:
    from dq_multimodal.core.graph_cut import GraphCut

FRONT_SHARE, WIDE_SHARE = 1, 7.5
"""Rows among which picks are made, times the picks in a row: at first, and where others often
overtake them."""

MAX_FRONT_ROWS = 1024
"""Where more rows than this may tie, they are picked one by one."""

MAX_PLAIN_VALUES = 2**21
"""Where hardly a pick stands, or very many rows may tie, near rows of up to so many numbers are all
taken into the front; their pairs are not multiplied out beforehand."""

BLOCK_ROWS = 4096
"""Rows whose gains at many picks are worked out at once."""


class Near:
    """The rows near the best, whose gains are bounded anew after every run of picks.

    Args:
        cut: The greedy run.
        rows: Places of the rows among the rows left.
        high: No row's gain is higher than this, less the constant.
    """

    def __init__(
        self, cut: "GraphCut", rows: Int[ndarray, " r"], high: Float[ndarray, " r"]
    ) -> None:
        self.cut, self.rows, self.high = cut, rows, high
        self.held = HeldRows(cut.source, cut.numbers[rows])
        self.norms, self.squares = cut.norms[rows], cut.squares[rows]
        self.lengths = self.norms + cut.source.offset  # of the rows before they are moved

    def after(self, way: Float[ndarray, " d"], n_picks: int) -> Float[ndarray, " r"]:
        """Bound the gains when W has gone a way by so many picks."""
        cut = self.cut
        cut.n_multiplied += len(self.rows)
        rises = cut.factor * self.held.multiply(slice(None), way)
        rises += cut.factor * cut.rounding(way) * self.lengths
        if not cut.is_cosine:
            rises += 2.0 * n_picks * self.squares
        return self.high + rises

    def count_safe(self, way: Way, rows: Int[ndarray, " k"], start: Float[ndarray, " r"]) -> int:
        """Count the picks before the first at which some near row may reach the line.

        Args:
            way: The picks; the first of them is safe.
            rows: The near rows to look at; others may be looked at too.
            start: How far the gains of all near rows are above the first line before the first
                pick, low enough where a row is not to count.
        """
        cut, sums, n_safe = self.cut, way.sums[1:-1], len(way) - 1
        lines, rises = way.lines[1:] - way.lines[0], 2.0 * np.arange(1, len(way))
        is_all = 2 * len(rows) > len(self.rows)  # then reading in place is faster
        rounding = cut.factor * cut.rounding(sums)
        cut.n_multiplied += n_safe * (len(self.rows) if is_all else len(rows))
        for at in range(0, len(self.rows) if is_all else len(rows), BLOCK_ROWS):
            part = slice(at, at + BLOCK_ROWS) if is_all else rows[at : at + BLOCK_ROWS]
            gains = self.held.multiply(part, cut.factor * sums.T)
            gains += (start[part] + rounding * self.lengths[part])[:, None]
            if not cut.is_cosine:
                gains += np.outer(self.squares[part], rises)
            is_over = gains.max(axis=0) >= lines
            n_safe = min(n_safe, int(is_over.argmax()) if is_over.any() else n_safe)
        return 1 + n_safe


class Front:
    """The best of the near rows, exact in float64.

    Args:
        near: The rows near the best.

    Attributes:
        line: The gain below which no row matters for the next pick.
        is_used_up: Whether `run` found no row to pick, as all near rows were picked.
    """

    def __init__(self, near: Near) -> None:
        self.cut, self.near = near.cut, near
        n_values = len(near.rows) * near.cut.source.values.shape[1]
        may_be_plain = n_values <= MAX_PLAIN_VALUES
        self.is_single, self.is_plain = False, may_be_plain and near.cut.run_picks == 1
        n_rows = len(near.rows) if self.is_plain else near.cut.front_share * near.cut.run_picks
        places = highest(near.high, int(n_rows))
        while True:
            self._take(places)
            self.line = float(self.gains.max()) - MARGIN * self.cut.tie
            joined = join(places, np.flatnonzero(near.high >= max(self.line, NEVER / 2)))
            if len(joined) == len(places):
                return
            if len(joined) <= MAX_FRONT_ROWS:
                places = joined
            elif may_be_plain:
                self.is_plain, places = True, np.arange(len(near.rows))
            else:
                return self._take_one(np.flatnonzero(near.high >= self.line))

    def _take_one(self, places: Int[ndarray, " k"]) -> None:
        """Take only the row to be picked next, of many that may tie."""
        gains = np.empty(len(places))
        step = self.cut.source.block_rows
        for start in range(0, len(places), step):
            self._take(places[start : start + step])
            gains[start : start + step] = self.gains
        tied = np.flatnonzero(gains >= gains.max() - self.cut.tie)
        at = tied[np.argmin(self.cut.numbers[self.near.rows[places[tied]]])]
        self._take(places[at : at + 1])
        self.line, self.is_single = float(self.gains[0]) - MARGIN * self.cut.tie, True

    def _take(self, places: Int[ndarray, " b"]) -> None:
        """Widen some of the near rows, and work out their gains, less the constant."""
        cut, near = self.cut, self.near
        self.places, numbers = places, cut.numbers[near.rows[places]]
        self.table = Table(cut, numbers, near.squares[places], near.held.prepare(places))
        self.gains = self.table.work_out()
        cut.n_multiplied += len(places)

    def run(self, levels: list[Level]) -> int:
        """Pick until a row outside might win or tie.

        Args:
            levels: From all rows inwards, without the near rows.

        Returns:
            How many picks were made; 0 where a row left out by a level might be the first.
        """
        cut, near, table = self.cut, self.near, self.table
        n_tried = 1 if self.is_single else RUN_PICKS if self.is_plain else cut.run_picks
        n_closed = int(np.count_nonzero(table.numbers < 0))
        way = table.pick(min(n_tried, cut.n_picks - cut.done), self.gains, is_plain=self.is_plain)
        self.is_used_up = not len(way)
        if self.is_used_up:
            for level in reversed(levels):  # inwards of the first that left rows out, none is open
                level.is_spent = True
                if level.most > NEVER / 2:
                    break
        else:
            self.line = float(way.lines[0])
        for level in levels:
            way = way.first(level.count_safe(way))
        if not len(way):
            table.roll_back(0)
            return 0
        kept, high = self._count_kept(way)
        self._adapt(kept, is_overtaken=kept < len(way))
        table.roll_back(kept)
        near.high = high
        near.high[self.places[table.numbers < 0]] = NEVER
        cut.numbers[near.rows[self.places]] = table.numbers
        table.keep()
        cut.n_open -= int(np.count_nonzero(table.numbers < 0)) - n_closed
        cut.n_multiplied += 2 * kept * len(self.places) if self.is_plain else 0  # in float64
        cut.weigh(kept)
        for level in levels:
            level.picks += kept
        return kept

    def _adapt(self, kept: int, is_overtaken: bool) -> None:
        """Choose how many picks are tried next, and among how many rows."""
        cut = self.cut
        if self.is_single:
            return
        share = cut.front_share * (1.25 if is_overtaken else 0.97)
        cut.front_share = min(max(share, FRONT_SHARE), WIDE_SHARE)
        cut.pace += 0.2 * (kept - cut.pace) if is_overtaken else 0.03 * cut.pace
        cut.pace = min(cut.pace, float(RUN_PICKS))

    def _count_kept(self, way: Way) -> tuple[int, Float[ndarray, " r"]]:
        """Count the picks before the first at which another near row might have won or tied.

        The bounds of a row at both ends of the way bound it in between, but for what the way and
        the lines bend. Only rows that this does not exclude are looked at pick by pick.

        Returns:
            That number, at least 1, and the bounds of the near rows after so many picks.
        """
        cut, near, lines = self.cut, self.near, way.lines
        high = near.after(way.sums[-1], len(way))
        longest, lowest = way.bend
        start = near.high - lines[0]
        bounds = np.maximum(start, high - lines[-1])
        bounds += cut.factor * longest * near.norms
        bounds[self.places] = NEVER
        rows = np.flatnonzero(bounds >= lowest)
        if not len(rows) or len(way) == 1:
            return len(way), high
        start[self.places] = NEVER
        kept = near.count_safe(way, rows, start)
        return kept, high if kept == len(way) else near.after(way.sums[kept], kept)


def join(places: Int[ndarray, " k"], others: Int[ndarray, " m"]) -> Int[ndarray, " j"]:
    """Give the places that either holds, ascending; ascending ones come."""
    if not len(others):
        return places
    is_held = np.zeros(1 + max(places[-1], others[-1]), dtype=bool)
    is_held[places] = is_held[others] = True
    return np.flatnonzero(is_held)


def highest(values: Float[ndarray, " n"], size: int) -> Int[ndarray, " k"]:
    """Give the places of the largest values, ascending."""
    if len(values) <= size:
        return np.arange(len(values))
    return np.sort(np.argpartition(values, -size)[-size:])
