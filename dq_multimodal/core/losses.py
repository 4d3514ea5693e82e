"""What the pick of a row takes from the gains of all, worked out before its turn."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.core.blocks import Rows, all_pairs

FIRST_ROWS, MORE_ROWS = 128, 32
"""Rows with the highest gains that are multiplied with all where there is no room for all pairs:
first, and each time that the next pick is none of them."""


class Losses:
    """Of some rows, what their picks take from the gains of all, in units of 2 f.

    That is <p, x> for the pick p and a row x (cosine), or <p, x> - |x|^2 / 2 (euclidean), rounded
    to float32; infinity for the row itself where no equal one is left. Where all pairs have room,
    they are multiplied out at once, which takes half the products. Else the rows with the highest
    gains are multiplied with all, since most of them are picked soon; when the memory is full,
    those that were multiplied first give way.

    Args:
        narrow: All rows, float32.
        squares: Their squared norms.
        weight: Of the squared norm, 0 or 1/2.
        is_last: Whether the next pick of a row uses it up.
        n_bytes: Memory for all pairs; if they take more, half of it is used, or what `MORE_ROWS`
            rows take.

    Attributes:
        rows: Of each row what its pick takes from the gains of all; None before it is worked out.
    """

    def __init__(
        self,
        narrow: Rows,
        squares: Float[ndarray, " n"],
        weight: float,
        is_last: Bool[ndarray, " n"],
        n_bytes: int,
    ) -> None:
        self.is_last = is_last
        self.lifts = (weight * squares).astype(np.float32) if weight else None
        self.own = ((1.0 - weight) * squares).astype(np.float32)
        n_rows = len(squares)
        if has_room(n_rows, n_bytes):
            self.rows: Any = self._complete(all_pairs(narrow), np.arange(n_rows))
        else:
            self.rows, self.is_made = [None] * n_rows, np.zeros(n_rows, dtype=bool)
            self.narrow: Any = narrow
            height = count_slots(n_rows, n_bytes)
            self.made = np.empty((height, n_rows), dtype=np.float32)
            self.owners, self.next_slot, self.n_wanted = [-1] * height, 0, FIRST_ROWS

    def change_own(self, at: int, is_last: Any) -> None:
        """Note whether the next pick of a row uses it up."""
        self.is_last[at], row = is_last, self.rows[at]
        if row is not None:
            row[at] = np.inf if is_last else self.own[at]

    def of(self, at: int, gains: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        """Give what the pick of the row with the highest gain takes."""
        row = self.rows[at]
        return self.fill(at, gains) if row is None else row

    def fill(self, at: int, gains: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        """Multiply out the row with the highest gain, and the next in order.

        Args:
            at: Its place.
            gains: The gains of all rows.
        """
        size, self.n_wanted = min(self.n_wanted, len(self.made)), MORE_ROWS
        wanted = np.where(self.is_made, -np.inf, gains)
        wanted[at] = np.inf
        places = np.argpartition(wanted, -size)[-size:]
        places = places[wanted[places] > -np.inf]
        if self.next_slot + len(places) > len(self.made):
            self.next_slot = 0
        made = self.made[self.next_slot : self.next_slot + len(places)]
        made[:] = self.narrow[places].pairs(self.narrow)
        self._complete(made, places)
        for place, row in zip(places.tolist(), made, strict=True):
            self._forget(self.owners[self.next_slot])
            self.owners[self.next_slot], self.rows[place] = place, row
            self.next_slot += 1
        self.is_made[places] = True
        return self.rows[at]

    def _forget(self, place: int) -> None:
        """Forget what the pick of a row takes, as its memory is wanted."""
        if place >= 0:
            self.rows[place], self.is_made[place] = None, False

    def _complete(
        self, pairs: Float[ndarray, "k n"], places: Int[ndarray, " k"]
    ) -> Float[ndarray, "k n"]:
        """Make losses of the inner products of some rows with all."""
        if self.lifts is not None:
            pairs -= self.lifts
        own = np.where(self.is_last[places], np.inf, self.own[places])
        pairs[np.arange(len(places)), places] = own
        return pairs


def has_room(n_rows: int, n_bytes: int) -> bool:
    """Tell whether all pairs of so many rows have room."""
    return 4 * n_rows**2 <= n_bytes


def count_slots(n_rows: int, n_bytes: int) -> int:
    """Give how many rows are held multiplied with all where not all pairs have room."""
    return min(n_rows, max(MORE_ROWS, n_bytes // (8 * n_rows)))


def count_pair_bytes(n_rows: int, n_bytes: int) -> int:
    """Bound the memory that the pairs take, of so many rows or of fewer of them."""
    if has_room(n_rows, n_bytes):
        return 4 * n_rows**2
    n_slots = count_slots(n_rows, n_bytes)
    return max(n_bytes, 4 * n_rows * (n_slots + 2 * min(FIRST_ROWS, n_slots)))
