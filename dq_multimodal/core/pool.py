"""Which rows a greedy run has to look at: a pool that is exact, a ring around it, all others."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.rows import Rows

if TYPE_CHECKING:
    from dq_multimodal.core.graph_cut import GraphCut

MARGIN = 1.01
"""A row more than this many tie widths below the best can neither win nor tie: the hundredth is
far above what rounding does to a gain."""

POOL_ROWS, RING_ROWS = 256, 4096
"""Rows among which picks are made, and rows from which such pools are drawn; at least."""

MAX_POOL_ROWS = 4096
"""Where more rows than this may tie, they are picked one by one."""

RUN_PICKS = 32
"""Picks that are made in a pool before the rows outside are looked at."""

MAX_ENDANGERED = 1024
"""With more rows than this to look at, the bounds have grown wide: a new pool is drawn."""

NEVER = -1e300
"""Gain of a row that is used up; finite, so that nothing comes of it but itself."""


class Ring:
    """The rows with the highest gains when it was drawn, and a bound of all others.

    Args:
        cut: The greedy run.
        least: Rows with a bound of at least this are in the ring, however many there are.

    Attributes:
        rows: Places of the rows among the rows left.
        given: The rows as they were given, and `numbers` their row numbers.
        picks: Picks made since it was drawn.
        is_spent: Whether the others have come too near.
    """

    def __init__(self, cut: "GraphCut", least: float) -> None:
        self.cut, self.picks, self.is_spent = cut, 0, False
        self.across = cut.across(cut.sum)
        open_rows = np.flatnonzero(cut.numbers >= 0)
        found = cut.source.screen(cut.numbers[open_rows], self.across)
        found += cut.rounding(self.across) * (cut.norms[open_rows] + cut.source.offset)
        self.others = np.full(len(cut.numbers), NEVER)
        self.others[open_rows] = cut.factor * found
        bounds = self._bound(cut.sum, cut.done)
        self.rows = open_rows
        if len(open_rows) > cut.ring_size:
            least = min(least, np.partition(bounds, -cut.ring_size)[-cut.ring_size])
            self.rows = open_rows[bounds[open_rows] >= least]
        self.others[self.rows] = bounds[self.rows] = NEVER
        self._refer(bounds, cut.sum, cut.done)
        self.numbers = cut.numbers[self.rows]
        self.given = cut.source.read(self.numbers)
        self.followed = cut.followed[self.rows].astype(np.float64)
        self.slack, self.norms, self.squares = (
            values[self.rows] for values in (cut.slack, cut.norms, cut.squares)
        )

    def _bound(self, now: Float[ndarray, " d"], done: int) -> Float[ndarray, " n"]:
        """Bound the gains of all others at some W."""
        cut = self.cut
        along = cut.along(now)
        bounds = (cut.followed @ along.astype(np.float32)).astype(np.float64)
        bounds += self.others
        bounds += float(np.linalg.norm(cut.across(now) - self.across)) * cut.slack
        bounds += (len(along) + 8) * 2.0**-23 * float(np.linalg.norm(along)) * cut.widest
        if not cut.is_cosine:
            bounds += cut.tilt(done) * cut.squares
        return bounds

    def _refer(self, bounds: Float[ndarray, " n"], now: Float[ndarray, " d"], done: int) -> None:
        self.most, self.then, self.done_then = float(bounds.max()), now, done

    def count_safe(
        self, sums: Float[ndarray, "t d"], done: int, lines: Float[ndarray, " t"]
    ) -> int:
        """Count the picks before the first at which a row that is not in the ring might matter.

        Args:
            sums: W before each pick.
            done: Picks before the first of them.
            lines: Of each pick, the gain below which a row does not matter.
        """
        if self.most <= NEVER / 2:
            return len(lines)
        n_safe = self._count_safe(sums, done, lines)
        if n_safe < len(lines) and done > self.done_then:
            self._refer(self._bound(sums[0], done), sums[0], done)
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


class Pool:
    """The best rows of a ring, exact in float64, and what bounds the others of the ring.

    Args:
        cut: The greedy run.
        ring: The ring of the last pool; None draws a new one.
    """

    def __init__(self, cut: "GraphCut", ring: Ring | None) -> None:
        self.cut, self.sum, self.start = cut, cut.sum, cut.done
        self.across = cut.across(cut.sum)
        self.is_single = self.is_overtaken = False
        least = np.inf
        while True:
            if ring is None or ring.is_spent:
                if ring is not None and ring.picks < 4 * RUN_PICKS:
                    cut.ring_size = min(2 * cut.ring_size, len(cut.numbers))
                ring = Ring(cut, least)
            self.ring = ring
            self._bound()
            self._choose()
            line = float(self.gains.max()) - MARGIN * cut.tie
            if ring.count_safe(cut.sum[None], cut.done, np.array([line])):
                break
            ring.is_spent, least = True, line
        self.rest[self.places] = self.base[self.places] = NEVER

    def _bound(self) -> None:
        """Bound the gains of all rows of the ring: `rest` is what they owe to W across."""
        cut, ring = self.cut, self.ring
        along = cut.along(cut.sum)
        found = cut.source.multiply(ring.given, ring.numbers, self.across)
        rest = found + cut.rounding(self.across) * (ring.norms + cut.source.offset)
        rest += 2.0**-22 * float(np.linalg.norm(along)) * ring.norms  # float32 coordinates
        rest *= cut.factor
        rest[cut.numbers[ring.rows] < 0] = NEVER
        self.rest = rest
        self.base = ring.followed @ along + rest

    def _choose(self) -> None:
        """Take the rows of the highest bounds, and all others that might be the best or tie."""
        cut, ring = self.cut, self.ring
        bounds = self.base + cut.tilt(cut.done) * ring.squares
        places = highest(bounds, POOL_ROWS)
        while True:
            self._take(places)
            near = np.flatnonzero(bounds >= float(self.gains.max()) - MARGIN * cut.tie)
            joined = np.union1d(places, near)
            if len(joined) == len(places):
                return
            if len(joined) > MAX_POOL_ROWS:
                return self._choose_one(near)
            places = joined

    def _choose_one(self, places: Int[ndarray, " k"]) -> None:
        """Take only the row to be picked next, of many that may tie."""
        gains = np.empty(len(places))
        step = self.cut.source.block_rows
        for start in range(0, len(places), step):
            self._take(places[start : start + step])
            gains[start : start + step] = self.gains
        tied = np.flatnonzero(gains >= gains.max() - self.cut.tie)
        at = tied[np.argmin(self.cut.numbers[self.ring.rows[places[tied]]])]
        self._take(places[at : at + 1])
        self.is_single = True

    def _take(self, places: Int[ndarray, " b"]) -> None:
        """Widen some rows of the ring, and work out their gains."""
        ring = self.ring
        self.places = places
        self.numbers = self.cut.numbers[ring.rows[places]]
        self.squares = ring.squares[places]
        self.block: Rows = self.cut.source.prepare(ring.given[places], ring.numbers[places])
        self._weigh()

    def _weigh(self) -> None:
        """Work out the gains of the pool, less the constant, in float64."""
        cut = self.cut
        self.gains = cut.factor * (self.block @ cut.sum)
        if not cut.is_cosine:
            self.gains += cut.tilt(cut.done) * self.squares
        self.gains[self.numbers < 0] = NEVER

    def run(self) -> Ring:
        """Pick until a row outside might have won or tied; gives the ring for the next pool."""
        cut, ring = self.cut, self.ring
        longest = max(1, min(RUN_PICKS, 2**22 // cut.source.n_columns))
        while True:
            n_most = 1 if self.is_single else min(longest, cut.n_picks - cut.done)
            taken, numbers, gains, lines = self._speculate(n_most)
            kept, n_endangered = (1, 0) if self.is_single else self._count_kept(taken, lines)
            for at, number in zip(taken[kept:][::-1], numbers[kept:][::-1], strict=True):
                self.numbers[at] = number
            cut.keep(numbers[:kept], gains[:kept], self.squares[taken[:kept]])
            cut.sum = cut.sum - 2 * self.block[taken[:kept]].sum()
            ring.picks += kept
            is_over = self.is_single or self.is_overtaken or ring.is_spent
            is_over |= cut.done == cut.n_picks or len(taken) < n_most
            if is_over or n_endangered > MAX_ENDANGERED:
                break
            if kept < len(taken):
                self._weigh()
        cut.numbers[ring.rows[self.places]] = self.numbers
        return ring

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
            That number, and how many rows of the ring had to be looked at.
        """
        cut, ring, limits = self.cut, self.ring, np.array(lines)
        self.is_overtaken = False
        is_first = cut.done == self.start  # then the pool was drawn so that its first pick stands
        steps = self.block[taken].flat()
        gone = np.cumsum(steps, axis=0) - steps
        sums = cut.sum - 2 * gone
        kept = max(ring.count_safe(sums, cut.done, limits), int(is_first))
        sums, limits = sums[:kept], limits[:kept]
        if not kept:
            return 0, 0
        tilts = cut.tilt(cut.done) + (0.0 if cut.is_cosine else 2.0) * np.arange(kept)
        places = self._find_endangered(sums, limits, tilts)
        if not len(places):
            return kept, 0
        n_endangered, part = len(places), slice(None) if 2 * len(places) > len(ring.rows) else places
        ways = sums - self.sum
        moves = cut.source.multiply(ring.given[part], ring.numbers[part], ways.T)
        error = cut.rounding(ways) * (ring.norms[part] + cut.source.offset)
        missing = limits - (self.base[part] + cut.factor * error)[:, None]
        if not cut.is_cosine:
            missing -= tilts * ring.squares[part, None]
            moves *= cut.factor
        is_bad = (moves >= missing).any(axis=0)
        is_bad[0] &= not is_first
        self.is_overtaken = bool(is_bad.any())
        return int(is_bad.argmax()) if self.is_overtaken else kept, n_endangered

    def _find_endangered(
        self, sums: Float[ndarray, "t d"], limits: Float[ndarray, " t"], tilts: Float[ndarray, " t"]
    ) -> Int[ndarray, " k"]:
        """Find the rows of the ring whose bound reaches the line on the way of W.

        The bound of a row at both ends of the way bounds it in between, but for what the way and
        the lines bend.
        """
        cut, ring = self.cut, self.ring
        along, across = cut.along(sums), cut.across(sums)
        moved = float(np.linalg.norm(across - self.across, axis=1).max())
        part = np.linspace(0, 1, len(sums))
        straight = along[0] + part[:, None] * (along[-1] - along[0])
        bend = float(np.linalg.norm(along - straight, axis=1).max())
        bend += 2.0**-23 * float(np.linalg.norm(along, axis=1).max())  # float32 coordinates
        sag = float((limits[0] + part * (limits[-1] - limits[0]) - limits).max())
        ends = ring.followed @ along[[0, -1]].T
        if not cut.is_cosine:
            ends += ring.squares[:, None] * tilts[[0, -1]]
        ends -= limits[[0, -1]]
        bounds = ends.max(axis=1)
        bounds += self.rest
        bounds += moved * ring.slack
        bounds += bend * ring.norms
        return np.flatnonzero(bounds >= -sag)


def highest(values: Float[ndarray, " n"], size: int) -> Int[ndarray, " k"]:
    """Give the places of the largest values, ascending."""
    if len(values) <= size:
        return np.arange(len(values))
    return np.sort(np.argpartition(values, -size)[-size:])
