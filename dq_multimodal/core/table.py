"""The last rows of a greedy run: what each pick does to all gains, multiplied out beforehand."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.front import MARGIN
from dq_multimodal.core.rows import HELD_BYTES

if TYPE_CHECKING:
    from dq_multimodal.core.graph_cut import GraphCut

TABLE_BYTES = 2**28
"""Memory of the table: 8,192 rows, however many there were."""

TABLE_PICKS = 256
"""Picks before all gains are worked out anew, at most."""

TILE_ROWS = 256
"""Rows and columns of the table that are filled at once."""

FEW_ROWS, MANY_SHARE = 64, 1 / 8
"""Contenders whose gains are worked out without a closer look at their errors; and the share of all
rows from which on all gains are worked out instead."""

UNDERFLOW = 2.0**-90
"""More than what float32 loses of a gain by one pick where numbers are too small for it."""

SMALL_ROWS = 1024
"""So few rows are tabled at once: hardly any bound excludes a row of these for long."""


def suits_table(n_rows: int, n_columns: int, table_bytes: int, load: float) -> bool:
    """Tell whether the pairs of so many rows can be held, and are worth their work.

    Args:
        n_rows: Rows left.
        n_columns: Numbers a row.
        table_bytes: Memory for the table.
        load: Rows that were multiplied for a pick lately; with a table, half of all are.
    """
    if 4 * n_rows**2 > table_bytes or 8 * n_rows * n_columns > HELD_BYTES:
        return False
    return n_rows <= SMALL_ROWS or load >= n_rows / 2


class Table:
    """All rows that a greedy run has left, few enough for a float32 number for each pair.

    Near the end of a run W is almost zero, and every pick turns it: no bound tells the rows that
    matter from the others. Here a pick costs the sum of two arrays and two searches for the largest
    number. Gains are float32 with a bound of their error; where it leaves more than one row that
    might win or tie, the gains of these are worked out in float64. All are worked out anew, in
    float64, at every few hundred picks.

    Args:
        cut: The greedy run.
    """

    def __init__(self, cut: "GraphCut") -> None:
        rows = np.flatnonzero(cut.numbers >= 0)
        self.numbers, self.squares, self.norms = (
            values[rows] for values in (cut.numbers, cut.squares, cut.norms)
        )
        self.block = cut.source.take(self.numbers)
        self.step = -2.0 * cut.factor
        self.rise = 0.0 if cut.is_cosine else 2.0
        self.rounding = -self.step * (sum(self.block.widths) + 16) * 2.0**-23
        narrow: Any = self.block.narrow()
        size = len(rows)
        self.changes = np.empty((size, size), dtype=np.float32)
        for start in range(0, size, TILE_ROWS):
            span = slice(start, start + TILE_ROWS)
            pairs = narrow[span].pairs(narrow[start:])
            pairs *= np.float32(self.step)
            self.changes[span, start:] = pairs
            for at in range(start + TILE_ROWS, size, TILE_ROWS):
                tile = pairs[:, at - start : at - start + TILE_ROWS]
                self.changes[at : at + TILE_ROWS, span] = tile.T
        if self.rise:
            self.changes += (self.rise * self.squares).astype(np.float32)
        self.exact = np.empty(size)  # gains before the picks in `taken`
        self.taken: list[int] = []
        self.n_summed, self.length = 0, 0.0  # of these, in W; and their norms together

    def run(self, cut: "GraphCut") -> int:
        """Make some of the picks that the greedy run lacks; give how many, at least one."""
        self.taken, self.n_summed, self.length = [], 0, 0.0
        is_open = self.numbers >= 0
        self.exact = self._work_out(cut, slice(None))
        self.exact[~is_open] = -np.inf
        gains = self.exact.astype(np.float32)
        most = float(np.abs(self.exact[is_open]).max())
        widest = float(self.norms[is_open].max())
        numbers: list[int] = []
        for _ in range(min(cut.n_picks - cut.done, TABLE_PICKS)):
            at = int(gains.argmax())
            best = gains[at]
            window = 2 * self._error(most, widest) + MARGIN * cut.tie
            gains[at] = -np.inf
            is_contested = gains[gains.argmax()] >= best - window
            gains[at] = best
            if is_contested:
                found = self._decide(cut, np.flatnonzero(gains >= best - window), gains)
                if found is None:
                    break
                at = found
            number = int(self.numbers[at])
            self.taken.append(at)
            numbers.append(number)
            self.length += float(self.norms[at])
            gains += self.changes[at]
            following = -1 if cut.next_equal is None else int(cut.next_equal[number])
            self.numbers[at] = following
            if following < 0:
                gains[at] = -np.inf
        self._sum_up(cut)
        picked = self.block[np.array(self.taken)]
        made = self.exact[self.taken] + self.step * np.tril(picked.pairs(), -1).sum(axis=1)
        made += self.rise * np.arange(len(numbers)) * self.squares[self.taken]
        cut.keep(numbers, made.tolist(), self.squares[self.taken])
        return len(numbers)

    def _work_out(
        self, cut: "GraphCut", places: slice | Int[ndarray, " k"]
    ) -> Float[ndarray, " k"]:
        """Give gains in float64, less the constant."""
        gains = cut.factor * (self.block[places] @ cut.sum)
        if self.rise:
            gains += cut.tilt(cut.done + self.n_summed) * self.squares[places]
        return gains

    def _sum_up(self, cut: "GraphCut") -> None:
        """Take the picks from the sum W that are not taken from it yet."""
        picked = self.block[np.array(self.taken[self.n_summed :], dtype=np.int64)]
        cut.sum = cut.sum - 2.0 * picked.sum()
        self.n_summed = len(self.taken)

    def _error(self, gain: Any, norm: Any) -> Any:
        """Bound the error of float32 gains after the picks made since they were exact.

        Args:
            gain: What they were then, of one row or of several.
            norm: Norms of these rows.
        """
        n_taken = len(self.taken)
        moved = (-self.step) * norm * self.length + self.rise * n_taken * norm**2
        sums = 2.0**-23 * (n_taken + 1) * (np.abs(gain) + moved)
        return self.rounding * norm * self.length + sums + (n_taken + 1) * UNDERFLOW

    def _decide(
        self, cut: "GraphCut", places: Int[ndarray, " k"], gains: Float[ndarray, " n"]
    ) -> int | None:
        """Find the pick among some rows, the only ones that may win or tie.

        Args:
            cut: The greedy run.
            places: The rows.
            gains: Gains of all rows, roughly.

        Returns:
            Its place; None where all gains had better be worked out first.
        """
        exact = self.exact[places]
        if self.taken:
            if len(places) > FEW_ROWS:
                error = self._error(exact, self.norms[places])
                near = gains[places]
                least = float((near - error).max()) - MARGIN * cut.tie
                places = places[near + error >= least]
            if len(places) > max(FEW_ROWS, MANY_SHARE * len(gains)):
                return None
            self._sum_up(cut)
            exact = self._work_out(cut, places)
        tied = places[exact >= exact.max() - cut.tie]
        return int(tied[np.argmin(self.numbers[tied])])
