"""Rows among which a greedy run picks, with what each pick does to all their gains."""

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.blocks import Rows
from dq_multimodal.core.greedy import Greedy
from dq_multimodal.core.losses import Losses
from dq_multimodal.core.way import Way, go_on

if TYPE_CHECKING:
    from dq_multimodal.core.held import SourceRows

FEW_ROWS, MANY_SHARE = 1024, 1 / 8
"""Contenders, or their share of all rows, above which all gains are worked out anew instead."""

RIVALS, FLAT_VALUES = 1024, 2**22
"""Rivals that are looked at after a race, and numbers of rows that are multiplied out; at most."""

UNDERFLOW = 2.0**-90
"""More than what float32 loses of a gain by one pick where numbers are too small for it."""

MARGIN = 1.01
"""A row more than so many tie widths below the best can neither win nor tie, however rounded."""


class Table:
    """Some rows among which picks are made.

    A pick costs the difference of two arrays and a search for the largest number. These gains are
    float32, in units of 2 f (a power of two), with a bound of their error; those of the picks, and
    of the rows that it leaves as their rivals, are worked out in float64.

    Args:
        cut: The greedy run.
        numbers: The rows.
        squares: Their squared norms.
        block: The rows themselves.

    Attributes:
        numbers: Row numbers; -1 where a row is used up.
        losses: See `Losses`; None before it is needed.
        taken: Places of the rows picked by the last `pick`, in order.
        picked: Their row numbers.
        made: Their gains, less the constant.
        behind: How far they are behind the best, with which they tie.
        sums: How far W went before each of them, and after the last.
    """

    def __init__(
        self,
        cut: Greedy,
        numbers: Int[ndarray, " n"],
        squares: Float[ndarray, " n"],
        block: "Rows | SourceRows",
    ) -> None:
        self.cut = weakref.proxy(cut)  # it may hold this table
        self.numbers, self.squares, self.norms = numbers, squares, np.sqrt(squares)
        self.block: Any = block
        self.unit, self.rise = 2.0 * cut.factor, 0.0 if cut.is_cosine else 2.0
        self.rounding = 1.1 * self.unit * (sum(block.widths) + 16) * 2.0**-24
        self.widest = float(self.norms.max(initial=0.0))
        self.losses: Any = None
        self.n_flat = max(1, FLAT_VALUES // block.shape[1])

    def __len__(self) -> int:
        return len(self.numbers)

    def work_out(self) -> Float[ndarray, " n"]:
        """Give gains in float64, less the constant; minus infinity for rows that are used up."""
        gains = self._at_first(slice(None))
        gains[self.numbers < 0] = -np.inf
        return gains

    def _at_first(self, places: slice | Int[ndarray, " k"]) -> Float[ndarray, " k"]:
        """Give gains of rows before the first pick."""
        cut = self.cut
        gains = cut.factor * (self.block[places] @ cut.sum)
        if self.rise:
            gains += cut.tilt(cut.done) * self.squares[places]
        return gains

    def pick(
        self, n_most: int, gains: Float[ndarray, " n"], error: float = 0.0, is_plain: bool = False
    ) -> Way:
        """Make picks among these rows alone, one at least where any is open.

        Args:
            n_most: Picks at most.
            gains: The gains of all rows, see `work_out`.
            error: How far these may be off; else they are exact.
            is_plain: Whether to multiply at every pick, in float64, instead of beforehand.
        """
        cut, top = self.cut, float(gains.max(initial=-np.inf))
        self.exact, self.error, self.is_plain = None if error else gains, error, is_plain
        self.taken: list[int] = []
        self.picked: list[int] = []
        self.behind: list[float] = []
        self.sums, self.moved = np.zeros((1, len(cut.sum))), np.zeros(len(cut.sum))
        self.n_summed, self.length = 0, 0.0
        if top > -np.inf:
            n_most = min(n_most, self.n_flat)
            gains = gains.copy() if is_plain else ((gains - top) / self.unit).astype(np.float32)
            if self.losses is None and not is_plain:
                self.losses = self._find_losses(self.block.narrow())
            is_race, cut.is_walking = not (is_plain or cut.is_walking), False
            if is_race:
                gains = self._race(gains, n_most)
            is_lost = is_race and 4 * len(self.taken) < n_most
            self._walk(gains, n_most)
            cut.is_walking |= is_lost
        places = np.array(self.taken, dtype=np.int64)
        self._go(places[len(self.sums) - 1 :])
        self.made = self._follow(places, np.arange(len(places)))
        return Way(self.sums, self.made + self.behind - MARGIN * cut.tie)

    def _find_losses(self, narrow: Rows, n_bytes: int = 2**28) -> Losses:
        """Find what picks take from the gains."""
        weight, is_last = self.rise / self.unit, self._are_last(self.numbers)
        return Losses(narrow, self.squares, weight, is_last, n_bytes)

    def _are_last(self, numbers: Any) -> Any:
        """Tell of numbers whether a pick uses their rows up, or they are used up."""
        next_equal = self.cut.next_equal
        return (numbers < 0) | (True if next_equal is None else next_equal[numbers] < 0)

    def roll_back(self, n_kept: int) -> None:
        """Forget the picks after the first few."""
        undone = zip(self.taken[n_kept:][::-1], self.picked[n_kept:][::-1], strict=True)
        for at, number in undone:
            self._stand_for(at, number)
        self.taken, self.picked = self.taken[:n_kept], self.picked[:n_kept]
        self.made = self.made[:n_kept]

    def keep(self) -> None:
        """Hand the picks to the greedy run."""
        way = self.sums[len(self.taken)]
        self.cut.keep(self.picked, self.made, self.squares[self.taken], way)

    def _follow(self, places: Int[ndarray, " k"], when: Int[ndarray, " k"]) -> Float[ndarray, " k"]:
        """Give the gain of each of some rows after so many of the picks."""
        rows = self.block[places].flat()
        at_first = self._at_first(places) if self.exact is None else self.exact[places]
        gains = at_first + self.cut.factor * np.vecdot(rows, self.sums[when])
        return gains + self.rise * when * self.squares[places]

    def _window(self, best: Any, n_made: Any, length: Any) -> Any:
        """Bound how far below the best a float32 gain may be of a row that may win or tie.

        Args:
            best: The highest gain, less that before the first pick, in units of 2 f.
            n_made: Picks made since.
            length: Their norms together.
        """
        moved = self.unit * self.widest * length + self.rise * n_made * self.widest**2
        moved += self.unit * np.abs(best)
        error = self.rounding * self.widest * length + 2.0**-23 * (n_made + 1) * moved
        error += self.unit * (n_made + 1) * UNDERFLOW + self.error
        return 1.001 / self.unit * (2 * error + MARGIN * self.cut.tie)

    def _race(self, start: Float[ndarray, " n"], n_most: int) -> Float[ndarray, " n"]:
        """Make picks by float32 gains, up to the first for which these do not do.

        Returns:
            The gains after them.
        """
        losses, fill, size = self.losses.rows, self.losses.fill, len(start)
        gains = np.empty((n_most + 1, size), dtype=np.float32)
        gains[0], now = start, start
        taken: list[int] = []
        for following in gains[1:]:
            at = int(now.argmax())
            taken.append(at)
            row = losses[at]
            np.subtract(now, fill(at, now) if row is None else row, following)
            now = following
        n_sure = self._count_open(taken)
        places, made = np.array(taken[:n_sure], dtype=np.int64), np.arange(n_sure)
        best = gains[made, places].astype(np.float64)
        if best.min(initial=0.0) == -np.inf:
            n_sure = int(best.argmin())
            places, made, best = places[:n_sure], made[:n_sure], best[:n_sure]
        lengths = np.cumsum(self.norms[places]) - self.norms[places]
        least = (best - self._window(best, made, lengths)).astype(np.float32)
        is_rival = gains[:n_sure] >= np.nextafter(least, np.float32(-np.inf))[:, None]
        is_rival[made, places] = False
        found, n_looked = np.flatnonzero(is_rival), min(RIVALS, self.n_flat)
        if len(found) > n_looked:
            n_sure, found = int(found[n_looked]) // size, found[:n_looked]
        if len(found) and n_sure:
            when, rivals = np.divmod(found, size)  # np.nonzero is far slower
            self._go(places)
            is_lost = self._follow(rivals, when) >= self._follow(places, made)[when] - self.cut.tie
            n_sure = min(n_sure, int(when[is_lost].min(initial=n_sure)))
        self.sums = self.sums[: n_sure + 1]
        self._note(taken[:n_sure])
        gains[n_sure, self.numbers < 0] = -np.inf
        return gains[n_sure]

    def _count_open(self, taken: list[int]) -> int:
        """Count the picks before the first of a row of which no equal one is left."""
        next_equal = self.cut.next_equal
        if next_equal is None:
            return len(taken)
        left: dict[int, int] = {}
        for n_made, at in enumerate(taken):
            number = left.get(at, int(self.numbers[at]))
            if number < 0:
                return n_made
            left[at] = int(next_equal[number])
        return len(taken)

    def _go(self, places: Int[ndarray, " t"]) -> None:
        """Go on with W by some picks."""
        self.sums = go_on(self.sums, -2.0 * self.block[places].flat())

    def _note(self, places: list[int]) -> None:
        """Note rows as picked."""
        next_equal = self.cut.next_equal
        if next_equal is None or (next_equal[self.numbers[places]] < 0).all():
            self.picked += self.numbers[places].tolist()
            self.numbers[places] = -1  # and none stands for another, so no place comes twice
        else:
            for at in places:
                number = int(self.numbers[at])
                self.picked.append(number)
                self._stand_for(at, int(next_equal[number]))
        self.length += float(self.norms[places].sum())
        self.taken += places
        self.behind += [0.0] * len(places)

    def _stand_for(self, at: int, number: int) -> None:
        """Let the row at a place stand for an equal one, -1 for none."""
        self.numbers[at] = number
        if self.losses is not None:
            self.losses.change_own(at, self._are_last(self.numbers[at]))

    def _walk(self, gains: Float[ndarray, " n"], n_most: int) -> None:
        """Make picks with a look at each."""
        cut, window = self.cut, MARGIN * self.cut.tie
        for n_made in range(len(self.taken), n_most):
            at = int(gains.argmax())
            best = gains[at]
            if best == -np.inf:
                break
            if not self.is_plain:
                window = self._window(float(best), n_made, self.length)
            gains[at], behind = -np.inf, 0.0
            is_contested, gains[at] = gains[gains.argmax()] >= best - window, best
            if is_contested:
                found = self._decide(np.flatnonzero(gains >= best - window), gains)
                if found is None:
                    cut.is_walking = True
                    break
                at, behind = found
            if self.is_plain:
                gains -= self.unit * self.block.products(at)
                if self.rise:
                    gains += self.rise * self.squares
            else:
                gains -= self.losses.of(at, gains)
            self._note([at])
            self.behind[-1] = behind
            if self.numbers[at] < 0:
                gains[at] = -np.inf

    def _decide(
        self, places: Int[ndarray, " k"], gains: Float[ndarray, " n"]
    ) -> tuple[int, float] | None:
        """Find the pick among some rows, the only ones that may win or tie.

        Args:
            places: The rows.
            gains: Gains of all rows, roughly.

        Returns:
            Its place, and how far its gain is behind the best that it ties with; None where all
            gains had better be worked out first.
        """
        cut = self.cut
        if self.is_plain:
            exact = gains[places]
        elif not self.taken:
            exact = self._at_first(places) if self.exact is None else self.exact[places]
        else:
            if len(places) > max(FEW_ROWS, MANY_SHARE * len(gains)):
                return None
            late = self.block[np.array(self.taken[self.n_summed :], dtype=np.int64)]
            self.moved, self.n_summed = self.moved - 2.0 * late.sum(), len(self.taken)
            exact = cut.factor * (self.block[places] @ (cut.sum + self.moved))
            exact += cut.tilt(cut.done + len(self.taken)) * self.squares[places]
        best = float(exact.max())
        tied = np.flatnonzero(exact >= best - cut.tie)
        cut.is_walking |= len(tied) > 1
        at = tied[np.argmin(self.numbers[places[tied]])]
        return int(places[at]), best - float(exact[at])
