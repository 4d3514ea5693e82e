"""Rows as the greedy sees them: scaled or centred, widened to float64 a block at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import Similarity
from dq_multimodal.core.blocks import Rows, as_rows, row_squares
from dq_multimodal.core.hashing import row_hash

BLOCK_BYTES = 2**24
"""Rows are widened in blocks of about this many bytes."""

HELD_BYTES = 3 * 2**26
"""Rows that are looked at often are kept in memory up to this size, else read whenever needed."""

CACHED_BYTES = 2**20
"""The same, where they are widened to float64 and looked at more than once."""

IN_PLACE_SHARE = 4
"""Of so many rows one has to be wanted for all to be read where they are."""

TAME = (1e-100, 1e100)
"""Norms whose inverse neither overflows nor underflows, by a wide margin."""

LIGHT = (1e-12, 1e12)
"""Norms of rows that may be multiplied in float32."""


class RowSource:
    """The rows of one stratum where they are, prepared whenever some of them are taken.

    Cosine rows get unit norm, rows of zeros stay zero. Euclidean rows are moved to their mean,
    which changes no distance and makes rounding small. Neither step overflows: euclidean rows are
    divided by one power of two near the largest value, and rows of extreme norm are scaled twice.
    Outer products are scaled factor by factor, and not moved: a moved one is no product any more.

    Args:
        values: (N, d) finite floats of any width; may be memory-mapped, is never copied whole.
        members: Which of its rows, ascending; None is all of them.
        similarity: Which gain the rows are prepared for.
        n_left: 0 for plain rows; else a row is the outer product of its first n_left numbers and
            the others.

    Attributes:
        unit: Power of two by which euclidean rows are divided (1 for cosine; the product of two
            for outer products): gains of the rows as given are those of the prepared rows times
            its square.
        offset: How much longer than a prepared row the row may be before it is moved.
    """

    def __init__(
        self,
        values: Float[ndarray, "N d"],
        members: Int[ndarray, " n"] | None,
        similarity: Similarity,
        n_left: int = 0,
    ) -> None:
        self.values, self.members, self.n_left = np.asarray(values), members, n_left
        self.n_rows = len(values) if members is None else len(members)
        n_columns = values.shape[1]
        self.n_columns = n_left * (n_columns - n_left) if n_left else n_columns
        self.block_rows = max(64, BLOCK_BYTES // (8 * n_columns))
        self.parts = [slice(0, n_left), slice(n_left, None)] if n_left else [slice(None)]
        self.widths = (n_left, values.shape[1] - n_left) if n_left else (values.shape[1],)
        self.is_cosine = similarity == "cosine"
        self.unit, self.offset = 1.0, 0.0
        self.mean: Float[ndarray, " d"] | float = 0.0
        is_light = values.dtype.itemsize <= 4 and not n_left
        if self.is_cosine:
            self.factors = [self._inverse_norms(part) for part in self.parts]
            known = self.factors[0]
            is_light = is_light and known is not None and _lie_within(1 / known[known > 0], LIGHT)
            self.is_light = is_light
        else:
            self.units = [self._power_of_two(part) for part in self.parts]
            self.unit = float(np.prod(self.units))
            if not n_left:
                spread = self._move_to_mean()
                is_light = is_light and self.offset <= 10 * spread
            self.is_light = is_light and _lie_within([self.unit], LIGHT)
        self.rounding = 2 * (self.n_columns + 8) * 2.0 ** (-24 if self.is_light else -53)

    def __len__(self) -> int:
        return self.n_rows

    def read(self, numbers: Any) -> ndarray:
        """Read rows as they were given; `numbers` indexes the members."""
        return self.values[numbers if self.members is None else self.members[numbers]]

    def spans(self) -> Iterator[slice]:
        """Cut the rows into blocks that the cache holds."""
        n_rows = max(64, CACHED_BYTES // (8 * self.values.shape[1]))
        for start in range(0, self.n_rows, n_rows):
            yield slice(start, min(start + n_rows, self.n_rows))

    def take(self, numbers: Any) -> Rows:
        """Read rows and prepare them, in float64."""
        return self.prepare(self.read(numbers), numbers)

    def prepare(self, given: ndarray, numbers: Any) -> Rows:
        """Scale or centre rows that were read, in float64."""
        wide = given.astype(np.float64)
        made = [self._prepare(wide[:, part], k, numbers) for k, part in enumerate(self.parts)]
        return as_rows(made)

    def _prepare(self, rows: Float[ndarray, "b d"], k: int, numbers: Any) -> Float[ndarray, "b d"]:
        if not self.is_cosine:
            return rows / self.units[k] - self.mean
        factors = self.factors[k]
        return unit_rows(rows) if factors is None else rows * factors[numbers][:, None]

    def multiply(
        self, given: ndarray, numbers: Any, vectors: Float[ndarray, "d *t"]
    ) -> Float[ndarray, "b *t"]:
        """Multiply rows that were read with vectors, in float32 where that is safe.

        A product is off by at most `rounding` x (norm of the row + offset) x norm of the vector.
        """
        if not self.is_light:
            return self.prepare(given, numbers) @ vectors
        found = given.astype(np.float32, copy=False) @ vectors.astype(np.float32)
        if not self.is_cosine:
            return found / self.unit - self.mean @ vectors
        factors = self.factors[0]
        assert factors is not None  # or rows are not light
        return found * (factors[numbers] if vectors.ndim == 1 else factors[numbers][:, None])

    def screen(
        self, numbers: Int[ndarray, " b"], vectors: Float[ndarray, "d *t"]
    ) -> Float[ndarray, "b *t"]:
        """Read rows block by block and multiply them with vectors; see `multiply`."""
        is_read_in_place = self.members is None and self.values.dtype == np.float32
        share = IN_PLACE_SHARE if is_read_in_place and self.is_light else 1
        made = np.empty((len(numbers), *vectors.shape[1:]))
        for start in range(0, len(numbers), self.block_rows):
            part = numbers[start : start + self.block_rows]
            first, end = int(part.min()), int(part.max()) + 1
            if end - first > share * len(part):
                found = self.multiply(self.read(part), part, vectors)
            else:  # reading others too is faster than a copy
                found = np.empty((end - first, *vectors.shape[1:]))
                for at in range(first, end, self.block_rows):
                    span = slice(at, min(at + self.block_rows, end))
                    found[at - first : span.stop - first] = self.multiply(
                        self.read(span), span, vectors
                    )
                found = found[part - first]
            made[start : start + len(part)] = found
        return made

    def _inverse_norms(self, part: slice) -> Float[ndarray, " n"] | None:
        """Give what makes every row a unit; None where some norm is extreme."""
        factors = np.empty(self.n_rows)
        for span in self.spans():
            rows = np.array(self.read(span)[:, part], dtype=np.float64)
            with np.errstate(over="ignore", under="ignore"):
                norms = np.sqrt(row_squares(rows))
            norms[(norms == 0) & ~rows.any(axis=1)] = np.inf
            if not _lie_within(norms[norms < np.inf], TAME) or rows[norms == np.inf].any():
                return None
            factors[span] = 1 / norms
        return factors

    def _power_of_two(self, part: slice) -> float:
        spans = (self.read(span)[:, part] for span in self.spans())
        largest = max(float(np.abs(block).max(initial=0.0)) for block in spans)
        return float(2.0 ** np.floor(np.log2(largest))) if largest > 0 else 1.0

    def _move_to_mean(self) -> float:
        """Find the mean; gives the root mean square of the rows around it."""
        total, squares = np.zeros(self.values.shape[1]), 0.0
        for span in self.spans():
            block = np.array(self.read(span), dtype=np.float64) / self.unit
            total += block.sum(axis=0)
            squares += float(row_squares(block).sum())
        self.mean = total / self.n_rows
        self.offset = float(np.linalg.norm(self.mean))
        return max(squares / self.n_rows - self.offset**2, 0.0) ** 0.5


def _lie_within(values: Any, limits: tuple[float, float]) -> bool:
    return (
        all(limits[0] < value < limits[1] for value in (np.min(values), np.max(values)))
        if len(values)
        else True
    )


def unit_rows(rows: Float[ndarray, "n d"]) -> Float[ndarray, "n d"]:
    """Give rows unit norm without overflow or underflow; rows of zeros stay zero."""
    peak = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    rows = rows / np.where(peak > 0, peak, 1.0)
    norm = np.sqrt(row_squares(rows))[:, None]
    return rows / np.where(norm > 0, norm, 1.0)


def find_equal(source: RowSource) -> tuple[Int[ndarray, " firsts"], Int[ndarray, " n"] | None]:
    """Find rows that are equal bit for bit.

    Returns:
        The first row of every group of equal rows, ascending, and for every row the next one that
        is equal to it, -1 where there is none; None where all rows differ.
    """
    n_rows, n_columns = len(source), source.values.shape[1]
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[source.values.dtype.itemsize]
    odd = row_hash(0, n_columns) | np.uint64(1)
    hashes = np.empty(n_rows, dtype=np.uint64)
    for span in source.spans():
        bits = (np.ascontiguousarray(source.read(span)) + 0).view(kind)  # + 0: no negative zeros
        hashes[span] = np.einsum("ij,j->i", bits, odd)
    order = np.argsort(hashes, kind="stable")
    is_same = hashes[order[1:]] == hashes[order[:-1]]
    if not is_same.any():
        return np.arange(n_rows), None
    follows = np.flatnonzero(is_same)
    for part in np.array_split(follows, -(-len(follows) // source.block_rows)):
        pairs = source.read(order[part]) == source.read(order[part + 1])
        is_same[part] = pairs.all(axis=1)
    next_equal = np.full(n_rows, -1)
    next_equal[order[:-1][is_same]] = order[1:][is_same]
    is_first = np.ones(n_rows, dtype=bool)
    is_first[order[1:][is_same]] = False
    return np.flatnonzero(is_first), next_equal
