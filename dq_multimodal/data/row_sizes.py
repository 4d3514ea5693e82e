"""How large each row is, from the offsets of Arrow alone; blocks of rows by their bytes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from jaxtyping import Int
from numpy import ndarray

BLOCK_BYTES = 8_000_000
"""Blocks that become Python objects, several times as large, hold so many bytes, or one row."""
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_map)


def measure_rows(dataset: Dataset) -> Int[ndarray, " n"]:
    """Give the bytes of every row, files outside the table left out; no row is read."""
    sizes = np.zeros(dataset.data.num_rows, dtype=np.int64)
    for column in dataset.data.columns:
        start = 0
        for chunk in column.chunks:
            sizes[start : start + len(chunk)] += _measure(chunk)
            start += len(chunk)
    if dataset._indices is not None:
        return sizes[dataset._indices.column(0).to_numpy()]
    return sizes


def cut_rows(
    sizes: Int[ndarray, " n"], most_rows: int, most_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks (first, end) of so many rows and bytes at most, or of one row."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(ends):
        most = most_bytes + (ends[start - 1] if start else 0)
        stop = max(start + 1, int(np.searchsorted(ends, most, side="right")))
        stop = min(stop, start + most_rows)
        yield start, stop
        start = stop


def read_blocks(dataset: Dataset, most_rows: int) -> Iterator[Any]:
    """Read all rows of a dataset or a stream, not too many bytes at once."""
    if not hasattr(dataset, "data"):  # a stream reads chunks as they come
        yield from dataset.iter(most_rows)
        return
    for start, stop in cut_rows(measure_rows(dataset), most_rows):
        yield dataset[start:stop]


def _measure(array: pa.Array) -> Any:
    """Give the bytes of every value, or one number for all."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _measure(array.storage)
    if pa.types.is_struct(kind):
        return sum(_measure(array.field(k)) for k in range(kind.num_fields))
    is_fixed = pa.types.is_fixed_size_list(kind)
    if is_fixed or any(test(kind) for test in LISTS):
        inner = _measure(array.values)
        if is_fixed:
            offsets = (array.offset + np.arange(len(array) + 1)) * kind.list_size
        else:
            offsets = array.offsets.to_numpy()
        if not isinstance(inner, ndarray):
            return inner * np.diff(offsets)
        return np.diff(np.concatenate([[0], np.cumsum(inner)])[offsets])
    if kind in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
    try:
        return -(-kind.bit_width // 8)
    except ValueError:  # views, which datasets has not
        return -(-array.nbytes // max(1, len(array)))
