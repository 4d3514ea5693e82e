"""The end of a greedy run's levels: the rows near the best, and those among which it picks."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.blocks import Rows
from dq_multimodal.core.levels import NEVER, RUN_PICKS, Level
from dq_multimodal.core.rows import HeldRows

if TYPE_CHECKING:
    from dq_multimodal.core.graph_cut import GraphCut

MARGIN = 1.01
"""A row more than this many tie widths below the best can neither win nor tie: the hundredth is
far above what rounding does to a gain."""

FRONT_SHARE, WIDE_SHARE = 1, 8
"""Rows among which picks are made, times the picks in a row: at first, and where others often
overtake them."""

MAX_FRONT_ROWS = 1024
"""Where more rows than this may tie, they are picked one by one."""

MAX_PLAIN_VALUES = 2**20
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

    def after(self, way: Float[ndarray, " d"], n_picks: int) -> Float[ndarray, " r"]:
        """Bound the gains when W has gone a way by so many picks."""
        cut = self.cut
        cut.n_multiplied += len(self.rows)
        rises = cut.factor * self.held.multiply(slice(None), way).astype(np.float64)
        rises += cut.factor * cut.rounding(way) * (self.norms + cut.source.offset)
        if not cut.is_cosine:
            rises += 2.0 * n_picks * self.squares
        return self.high + rises

    def highest_on(
        self,
        ways: Float[ndarray, "t d"],
        rows: Int[ndarray, " k"],
        start: Float[ndarray, " r"],
    ) -> Float[ndarray, " t"]:
        """Bound the highest gain of some near rows after 1, 2, ... picks.

        Args:
            ways: How far W went by so many picks.
            rows: Their places among the near rows; others may be looked at too.
            start: Gains of all near rows before, low enough where a row is not to count.
        """
        cut, rises = self.cut, 2.0 * np.arange(1, len(ways) + 1)
        start = start + cut.factor * cut.rounding(ways) * (self.norms + cut.source.offset)
        start = np.maximum(start, -1e30)  # in float32 too
        is_all = 2 * len(rows) > len(self.rows)  # then reading in place is faster
        most = np.full(len(ways), -np.inf)
        cut.n_multiplied += len(ways) * (len(self.rows) if is_all else len(rows))
        for at in range(0, len(self.rows) if is_all else len(rows), BLOCK_ROWS):
            part = slice(at, at + BLOCK_ROWS) if is_all else rows[at : at + BLOCK_ROWS]
            gains = self.held.multiply(part, cut.factor * ways.T)
            gains += start[part, None]
            if not cut.is_cosine:
                gains += np.outer(self.squares[part], rises)
            most = np.maximum(most, gains.max(axis=0))
        if cut.source.is_light:  # float32 sums of rows that might matter, which are not longer
            longest = float(np.linalg.norm(ways, axis=1).max())
            most += 2.0**-20 * (cut.factor * longest + rises[-1] * cut.widest) * cut.widest
        return most


class Front:
    """The best of the near rows, exact in float64.

    Args:
        near: The rows near the best.
    """

    def __init__(self, near: Near) -> None:
        self.cut, self.near, self.is_single = near.cut, near, False
        n_values = len(near.rows) * near.cut.source.values.shape[1]
        may_be_plain = n_values <= MAX_PLAIN_VALUES
        self.is_plain = may_be_plain and near.cut.run_picks == 1
        n_rows = len(near.rows) if self.is_plain else near.cut.front_share * near.cut.run_picks
        places = highest(near.high, int(n_rows))
        while True:
            self._take(places)
            self.line = float(self.gains.max()) - MARGIN * self.cut.tie
            close = np.flatnonzero(near.high >= self.line)
            joined = np.union1d(places, close) if len(close) else places
            if len(joined) == len(places):
                return
            if len(joined) <= MAX_FRONT_ROWS:
                places = joined
            elif may_be_plain:
                self.is_plain, places = True, np.arange(len(near.rows))
            else:
                return self._take_one(close)

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
        self.places, self.numbers = places, cut.numbers[near.rows[places]]
        self.squares = near.squares[places]
        self.block: Rows = near.held.prepare(places)
        self.gains = cut.factor * (self.block @ cut.sum)
        cut.n_multiplied += len(places)
        if not cut.is_cosine:
            self.gains += cut.tilt(cut.done) * self.squares
        self.gains[self.numbers < 0] = NEVER

    def run(self, levels: list[Level]) -> int:
        """Pick until a row outside might win or tie.

        Args:
            levels: From all rows inwards, without the near rows.

        Returns:
            How many picks were made; 0 where a row left out by a level might be the first.
        """
        cut, near = self.cut, self.near
        n_tried = 1 if self.is_single else RUN_PICKS if self.is_plain else cut.run_picks
        n_most = min(n_tried, cut.n_picks - cut.done)
        taken, numbers, gains, lines = self._speculate(n_most)
        picked = self.block[taken]
        steps = picked.flat()
        ways = np.tri(len(taken) + 1, len(taken), -1) @ (-2.0 * steps)
        kept, sums = len(taken), cut.sum + ways
        for level in levels:
            kept = level.count_safe(sums[:kept], cut.done, lines[:kept]) if kept else 0
        if not kept:
            levels[-1].is_spent |= not taken
            return 0
        lines = lines[:kept]
        kept, high = self._count_kept(ways[: kept + 1], lines)
        for at, number in zip(taken[kept:][::-1], numbers[kept:][::-1], strict=True):
            self.numbers[at] = number
        self._adapt(kept, is_overtaken=kept < len(lines))
        near.high = high
        near.high[self.places[self.numbers < 0]] = NEVER
        cut.numbers[near.rows[self.places]] = self.numbers
        cut.keep(numbers[:kept], gains[:kept], self.squares[taken[:kept]])
        cut.sum = sums[kept]
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

    def _speculate(
        self, n_most: int
    ) -> tuple[list[int], list[int], list[float], Float[ndarray, " t"]]:
        """Make picks among these rows alone.

        Returns:
            Their places, row numbers, gains (less the constant), and of each pick the line below
            which no row mattered.
        """
        cut, gains, numbers, next_equal = self.cut, self.gains, self.numbers, self.cut.next_equal
        tie = cut.tie
        step, rise = -2 * cut.factor, None if cut.is_cosine else 2 * self.squares
        pairs = None if self.is_plain else self.block.pairs()
        taken, picked, made, best_gains = [], [], [], []
        for _ in range(n_most):
            at = int(gains.argmax())
            gain = best = float(gains[at])
            if best <= NEVER / 2:
                break
            gains[at] = NEVER
            if gains[gains.argmax()] >= best - tie:
                gains[at] = best
                tied = (gains >= best - tie).nonzero()[0]
                at = int(tied[numbers[tied].argmin()])
                gain = float(gains[at])
            number = int(numbers[at])
            taken.append(at)
            picked.append(number)
            made.append(gain)
            best_gains.append(best)
            numbers[at] = -1 if next_equal is None else next_equal[number]
            gains[at] = NEVER if numbers[at] < 0 else gain
            gains += step * (self.block.products(at) if pairs is None else pairs[at])
            if rise is not None:
                gains += rise
        return taken, picked, made, np.array(best_gains) - MARGIN * tie

    def _count_kept(
        self, ways: Float[ndarray, "t1 d"], lines: Float[ndarray, " t"]
    ) -> tuple[int, Float[ndarray, " r"]]:
        """Count the picks before the first at which another near row might have won or tied.

        The bounds of a row at both ends of the way bound it in between, but for what the way and
        the lines bend. Only rows that this does not exclude are looked at pick by pick.

        Args:
            ways: How far W went before each pick, and after the last.
            lines: Of each pick, the gain below which a row does not matter.

        Returns:
            That number, at least 1, and the bounds of the near rows after so many picks.
        """
        cut, near = self.cut, self.near
        kept = len(lines)
        high = near.after(ways[-1], kept)
        part = np.linspace(0, 1, kept + 1)[:, None]
        bend = cut.factor * float(np.linalg.norm(ways - part * ways[-1], axis=1).max())
        chord = lines[0] + part[:-1, 0] * (lines[-1] - lines[0])
        start = near.high - lines[0]
        start[self.places] = NEVER
        bounds = np.maximum(start, high - lines[-1])
        bounds += bend * near.norms
        bounds[self.places] = NEVER
        rows = np.flatnonzero(bounds >= float((lines - chord).min()))
        if not len(rows) or kept == 1:
            return kept, high
        is_bad = near.highest_on(ways[1:kept], rows, start) >= lines[1:] - lines[0]
        if not is_bad.any():
            return kept, high
        kept = 1 + int(is_bad.argmax())
        return kept, near.after(ways[kept], kept)


def highest(values: Float[ndarray, " n"], size: int) -> Int[ndarray, " k"]:
    """Give the places of the largest values, ascending."""
    if len(values) <= size:
        return np.arange(len(values))
    return np.sort(np.argpartition(values, -size)[-size:])
