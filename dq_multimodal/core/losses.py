"""What the pick of a row takes from the gains of all, worked out before its turn."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.core.blocks import Rows

FULL_ROWS = 1024
"""Pairs of so few rows are all multiplied out at once, which takes half the products."""

LOSS_BYTES = 2**27
FIRST_ROWS, MORE_ROWS = 128, 32
"""Of more rows, how many with the highest gains are multiplied with all: first, and each time that
none of them has its turn."""


class Losses:
    """Of some rows, what their picks take from the gains of all, in units of 2 f.

    That is <p, x> for the pick p and a row x (cosine), or <p, x> - |x|^2 / 2 (euclidean), rounded
    to float32; infinity for the row itself where no equal one is left. Where there are many rows,
    few of those with the highest gains are not picked soon. When the memory is full, the rows that
    were multiplied out first give way.

    Args:
        rows: All rows, float32.
        squares: Their squared norms.
        weight: Of the squared norm, 0 or 1/2.
        are_last: Tells of places whether the pick of that row uses it up.
        n_bytes: Memory for the products; at least `MORE_ROWS` rows are kept.
    """

    def __init__(
        self,
        rows: Rows,
        squares: Float[ndarray, " n"],
        weight: float,
        are_last: Callable[[Int[ndarray, " k"]], Bool[ndarray, " k"]],
        n_bytes: int,
    ) -> None:
        self.rows: Any = rows
        self.are_last = are_last
        self.lifts = (weight * squares).astype(np.float32) if weight else None
        self.own = ((1.0 - weight) * squares).astype(np.float32)
        n_rows = len(squares)
        self.slots, self.next_slot = np.full(n_rows, -1), 0
        if n_rows <= FULL_ROWS:
            self.made = self.rows.pairs()
            self._note(np.arange(n_rows), slice(0, n_rows))
        else:
            height = min(n_rows, max(MORE_ROWS, LOSS_BYTES // (4 * n_rows)))
            self.made = np.empty((height, n_rows), dtype=np.float32)
            self.owners = np.full(height, -1)

    def of(self, at: int, gains: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        """Give what the pick of the row with the highest gain takes.

        Args:
            at: Its place.
            gains: The gains of all rows.
        """
        slot = self.slots[at]
        return self.made[slot if slot >= 0 else self._fill(at, gains)]

    def change_own(self, at: int, is_last: bool) -> None:
        """Note whether the next pick of the row uses it up."""
        if self.slots[at] >= 0:
            self.made[self.slots[at], at] = np.inf if is_last else self.own[at]

    def _fill(self, at: int, gains: Float[ndarray, " n"]) -> int:
        """Multiply out some rows, this one among them; gives its slot."""
        size = min(MORE_ROWS if self.slots.max() >= 0 else FIRST_ROWS, len(self.made))
        wanted = np.where(self.slots < 0, gains, -np.inf)
        wanted[at] = np.inf
        places = np.argpartition(wanted, -size)[-size:]
        places = places[wanted[places] > -np.inf]
        if self.next_slot + len(places) > len(self.made):
            self.next_slot = 0
        span = slice(self.next_slot, self.next_slot + len(places))
        self.next_slot = span.stop
        old = self.owners[span]
        self.slots[old[old >= 0]] = -1
        self.owners[span] = places
        self.rows[places].pairs(self.rows, self.made[span])
        self._note(places, span)
        return int(self.slots[at])

    def _note(self, places: Int[ndarray, " k"], span: slice) -> None:
        """Note where the products of some rows are, and complete them."""
        slots = np.arange(span.start, span.stop)
        self.slots[places] = slots
        if self.lifts is not None:
            self.made[span] -= self.lifts
        is_last = self.are_last(places)
        self.made[slots, places] = np.where(is_last, np.inf, self.own[places])
