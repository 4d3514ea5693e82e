"""All rows that are left, where no bound excludes many of them."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.held import SourceRows
from dq_multimodal.core.losses import has_room
from dq_multimodal.core.rows import HELD_BYTES
from dq_multimodal.core.table import UNDERFLOW, Table
from dq_multimodal.core.way import Way

if TYPE_CHECKING:
    from dq_multimodal.core.blocks import Rows
    from dq_multimodal.core.graph_cut import GraphCut

RACE_PICKS, RACE_VALUES = 256, 2**22
"""Picks that are made in a row, and gains that are held meanwhile, at most."""

OPEN_SHARE = 0.75
"""Part of the rows that is open, at least; else those that are used up are forgotten."""


class Whole(Table):
    """All rows left, of which one is picked after another.

    Args:
        cut: The greedy run.
        places: Places of the rows among the distinct rows.
        numbers: The rows, all open.
        narrow: The same in float32; None is to be read.
    """

    def __init__(
        self,
        cut: "GraphCut",
        places: Int[ndarray, " n"],
        numbers: Int[ndarray, " n"],
        narrow: "Rows | None" = None,
    ) -> None:
        self.is_held = 8 * len(numbers) * cut.source.values.shape[1] <= HELD_BYTES
        is_held, source = self.is_held, cut.source
        block = source.take(numbers) if is_held else SourceRows(source, numbers.copy())
        self.places, self.narrow = places, block.narrow() if narrow is None else narrow
        squares = cut.squares[places]
        super().__init__(cut, numbers, squares, block)
        self.losses = self._find_losses(self.narrow, cut.table_bytes)
        self.is_full = has_room(len(numbers), cut.table_bytes)

    def pick_some(self, n_most: int) -> Way:
        """Make some picks, at least one."""
        cut = self.cut
        gains, error = (self.work_out(), 0.0) if self.is_held or cut.is_walking else self.estimate()
        n_held = max(1, RACE_VALUES // len(self))
        way = self.pick(min(n_most, RACE_PICKS, n_held), gains, error)
        self.keep()
        return way

    def estimate(self) -> tuple[Float[ndarray, " n"], float]:
        """Give gains as by `work_out`, by float32 products, and a bound of their error."""
        cut = self.cut
        products = self.narrow @ cut.sum.astype(np.float32)
        gains = cut.factor * products.astype(np.float64)
        if self.rise:
            gains += cut.tilt(cut.done) * self.squares
        gains[self.numbers < 0] = -np.inf
        most = self.widest * float(np.linalg.norm(cut.sum))
        return gains, self.rounding / 2 * most + UNDERFLOW * (1.0 + cut.factor * most)

    def without_used(self, cut: "GraphCut") -> "Whole":
        """Give the rows that are open, once these are few enough."""
        rows = np.flatnonzero(self.numbers >= 0)
        if self.is_full or len(rows) > OPEN_SHARE * len(self):
            return self
        self.losses = self.block = None  # or the old ones would be held beside the new ones
        self.narrow = self.narrow[rows]
        return Whole(cut, self.places[rows], self.numbers[rows], self.narrow)
