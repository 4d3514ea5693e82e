"""Rows among which a greedy run picks, with what each pick does to all their gains."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.blocks import Rows
from dq_multimodal.core.greedy import Greedy
from dq_multimodal.core.losses import Losses
from dq_multimodal.core.picks import Picks
from dq_multimodal.core.way import Way

if TYPE_CHECKING:
    from dq_multimodal.core.held import SourceRows

FEW_ROWS, MANY_SHARE = 1024, 1 / 8
"""Contenders, or their share of all rows, above which all gains are worked out anew instead."""

RIVALS, FLAT_VALUES = 1024, 2**22
"""Rivals that are looked at after a race, and numbers of rows that are multiplied out; at most."""

LEAST_RACED = 8
"""Where a race makes fewer picks, or one of fewer is wrong, they are looked at one by one."""

UNDERFLOW = 2.0**-90
"""More than what float32 loses of a gain by one pick where numbers are too small for it."""

MARGIN = 1.01
"""A row more than so many tie widths below the best can neither win nor tie, however rounded."""


class Table(Picks):
    """Some rows among which picks are made.

    A pick costs the difference of two arrays and a search for the largest number. These gains are
    float32, in units of 2 f (a power of two), with a bound of their error. Picks are raced by them;
    where a rival comes within that error, float64 decides afterwards, of many picks at once. Behind
    the first pick that is wrong the race begins anew.

    Args:
        cut: The greedy run.
        numbers: The rows.
        squares: Their squared norms.
        block: The rows themselves.
    """

    def __init__(
        self,
        cut: Greedy,
        numbers: Int[ndarray, " n"],
        squares: Float[ndarray, " n"],
        block: "Rows | SourceRows",
    ) -> None:
        super().__init__(cut, numbers, squares, block)
        self.unit = 2.0 * cut.factor
        self.rounding = 1.1 * self.unit * (sum(block.widths) + 16) * 2.0**-24
        self.widest = float(self.norms.max(initial=0.0))
        self.n_flat = max(1, FLAT_VALUES // block.shape[1])

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
        self._begin(None if error else gains)
        self.error, self.is_plain, self.n_lost = error, is_plain, 0
        self.moved, self.n_summed = np.zeros(len(cut.sum)), 0
        if top > -np.inf:
            n_most = min(n_most, self.n_flat)
            gains = gains.copy() if is_plain else ((gains - top) / self.unit).astype(np.float32)
            if self.losses is None and not is_plain:
                self.losses = self._find_losses(self.block.narrow())
            is_racing, cut.is_walking = not (is_plain or cut.is_walking), False
            while (n_made := len(self.taken)) < n_most:
                if is_racing:
                    gains = self._race(gains, n_most - n_made)
                    is_racing = len(self.taken) >= min(n_most, n_made + LEAST_RACED)
                    cut.is_walking |= not is_racing
                end = min(len(self.taken) + 1, n_most) if is_racing else n_most
                if not self._walk(gains, end):
                    break
            cut.is_walking |= LEAST_RACED * self.n_lost > len(self.taken)
        places = np.array(self.taken, dtype=np.int64)
        self._go(places[:0])
        self.made = self._follow(places, np.arange(len(places)))
        return Way(self.sums, self.made - MARGIN * cut.tie)  # rows below them do not matter

    def _find_losses(self, narrow: Rows, n_bytes: int = 2**28) -> Losses:
        """Find what picks take from the gains."""
        weight, is_last = self.rise / self.unit, self._are_last(self.numbers)
        return Losses(narrow, self.squares, weight, is_last, n_bytes)

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
        """Make picks by float32 gains, up to the first that is wrong or cannot be looked into.

        Args:
            start: The gains now.
            n_most: Picks at most.

        Returns:
            The gains after them.
        """
        losses, fill, size = self.losses.rows, self.losses.fill, len(start)
        gains, n_made = np.empty((n_most + 1, size), dtype=np.float32), len(self.taken)
        gains[0], now = start, start
        taken: list[int] = []
        for following in gains[1:]:
            at = int(now.argmax())
            taken.append(at)
            row = losses[at]
            np.subtract(now, fill(at, now) if row is None else row, following)
            now = following
        numbers = self._find_numbers(taken)
        n_sure = len(numbers)
        places, made = np.array(taken[:n_sure], dtype=np.int64), np.arange(n_sure)
        best = gains[made, places].astype(np.float64)
        if best.min(initial=0.0) == -np.inf:
            n_sure = int(best.argmin())
            places, made, best = places[:n_sure], made[:n_sure], best[:n_sure]
        lengths = self.length + np.cumsum(self.norms[places]) - self.norms[places]
        least = (best - self._window(best, n_made + made, lengths)).astype(np.float32)
        is_rival = gains[:n_sure] >= np.nextafter(least, np.float32(-np.inf))[:, None]
        is_rival[made, places] = False
        found, n_looked = np.flatnonzero(is_rival), min(RIVALS, self.n_flat)
        if len(found) > n_looked:
            n_sure, found = int(found[n_looked]) // size, found[:n_looked]
        if len(found) and n_sure:
            when, rivals = np.divmod(found, size)  # np.nonzero is far slower
            self._go(places)
            theirs = self._follow(rivals, n_made + when)
            ours = self._follow(places, n_made + made)
            best = ours.copy()
            np.maximum.at(best, when, theirs)
            is_lost = (theirs >= best[when] - self.cut.tie) & (self.numbers[rivals] < numbers[when])
            is_lost |= ours[when] < best[when] - self.cut.tie
            if self.cut.next_equal is not None:  # a rival may be used up, or of a later number
                is_lost |= np.isin(rivals, places) & (theirs >= ours[when] - self.cut.tie)
            n_sure = min(n_sure, int(when[is_lost].min(initial=n_sure)))
        self.sums = self.sums[: n_made + n_sure + 1]
        self._note(taken[:n_sure])
        gains[n_sure, self.numbers < 0] = -np.inf
        return gains[n_sure].copy()  # or all are held during the next race

    def _walk(self, gains: Float[ndarray, " n"], n_most: int) -> bool:
        """Make picks with a look at each; tells whether more can be made."""
        cut, window = self.cut, MARGIN * self.cut.tie
        for n_made in range(len(self.taken), n_most):
            highest = int(gains.argmax())
            best, at = gains[highest], highest
            if best == -np.inf:
                return False
            if not self.is_plain:
                window = self._window(float(best), n_made, self.length)
            gains[at] = -np.inf
            is_contested, gains[at] = gains[gains.argmax()] >= best - window, best
            if is_contested:
                found = self._decide(np.flatnonzero(gains >= best - window), gains)
                if found is None:
                    cut.is_walking = True
                    return False
                at = found
                self.n_lost += at != highest
            if self.is_plain:
                gains -= self.unit * self.block.products(at)
                if self.rise:
                    gains += self.rise * self.squares
            else:
                gains -= self.losses.of(at, gains)
            self._note([at])
            if self.numbers[at] < 0:
                gains[at] = -np.inf
        return True

    def _decide(self, places: Int[ndarray, " k"], gains: Float[ndarray, " n"]) -> int | None:
        """Find the pick among some rows, the only ones that may win or tie.

        Args:
            places: The rows.
            gains: Gains of all rows, roughly.

        Returns:
            Its place; None where all gains had better be worked out first.
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
        tied = places[exact >= exact.max() - cut.tie]
        return int(tied[np.argmin(self.numbers[tied])])
