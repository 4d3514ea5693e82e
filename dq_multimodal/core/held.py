"""Rows of a source that a greedy run looks at again and again."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.blocks import Rows, as_rows
from dq_multimodal.core.rows import HELD_BYTES, RowSource


class HeldRows:
    """Some rows of a source that are multiplied again and again.

    Args:
        source: The rows.
        numbers: Which of them.
    """

    def __init__(self, source: RowSource, numbers: Int[ndarray, " r"]) -> None:
        self.source, self.numbers = source, numbers
        width = np.float32 if source.is_light else source.values.dtype  # float16 is slow to widen
        n_bytes = len(numbers) * source.values.shape[1] * np.dtype(width).itemsize
        is_held = n_bytes <= HELD_BYTES
        self.given = source.read(numbers).astype(width, copy=False) if is_held else None

    def multiply(
        self, part: slice | Int[ndarray, " b"], vectors: Float[ndarray, "d *t"]
    ) -> Float[ndarray, "b *t"]:
        """Multiply some of them with vectors; see `RowSource.multiply`."""
        numbers = self.numbers[part]
        if self.given is None:
            return self.source.screen(numbers, vectors)
        return self.source.multiply(self.given[part], numbers, vectors)

    def prepare(self, places: Int[ndarray, " b"]) -> Rows:
        """Prepare some of them, in float64."""
        numbers = self.numbers[places]
        if self.given is None:
            return self.source.take(numbers)
        return self.source.prepare(self.given[places], numbers)


class SourceRows:
    """Some rows of a source, prepared in float64 whenever some of them are taken.

    Args:
        source: The rows.
        numbers: Which of them.
    """

    def __init__(self, source: RowSource, numbers: Int[ndarray, " r"]) -> None:
        self.source, self.numbers = source, numbers
        self.shape, self.widths = (len(numbers), source.n_columns), source.widths

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> "SourceRows":
        return SourceRows(self.source, self.numbers[rows])

    def __matmul__(self, vector: Float[ndarray, " d"]) -> Float[ndarray, " n"]:
        made = np.empty(len(self))
        for span, block in self._blocks():
            made[span] = block @ vector
        return made

    def sum(self) -> Float[ndarray, " d"]:
        """Give the sum of all rows."""
        return sum((block.sum() for _, block in self._blocks()), np.zeros(self.source.n_columns))

    def flat(self) -> Float[ndarray, "n d"]:
        """Give the rows as a matrix."""
        return self.source.take(self.numbers).flat()

    def narrow(self) -> Rows:
        """Give the rows in float32."""
        parts = self.source.parts
        width = self.source.values.shape[1]
        made = np.empty((len(self), width), dtype=np.float32)
        held = [made[:, part] for part in parts]
        for span, block in self._blocks():
            for part, given in zip(held, block.parts(), strict=True):
                part[span] = given
        return as_rows(held)

    def _blocks(self) -> Iterator[tuple[slice, Rows]]:
        """Take the rows block by block."""
        for start in range(0, len(self), self.source.block_rows):
            span = slice(start, start + self.source.block_rows)
            yield span, self.source.take(self.numbers[span])
