"""Rows that repeat another row exactly: the same text, or the same image file."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.adapters.image_text import ImageTextAdapter, image_half
from dq_multimodal.adapters.text import TextAdapter
from dq_multimodal.config import CompressConfig
from dq_multimodal.data.pixels import undecoded
from dq_multimodal.data.row_files import measure_outside
from dq_multimodal.data.row_sizes import cut_rows
from dq_multimodal.data.stream import Stream
from dq_multimodal.files import count

BLOCK_ROWS, IMAGE_ROWS = 4096, 64
FACTOR = np.int64(1_000_003)
N_SHOWN = 8


def note_repeats(
    dataset: Dataset | Stream, adapter: Adapter | None, request: CompressConfig
) -> list[str]:
    """Say in one line how many rows repeat a row before them exactly; nothing if none does."""
    rows = find_repeats(dataset, adapter).tolist()
    if not rows:
        return []
    what = "text, white space apart"
    if not isinstance(adapter, TextAdapter):
        what = "image file" if isinstance(adapter, ImageAdapter) else f"image file and {what}"
    verb = count(len(rows), "row repeats a row before it", "rows repeat a row before them")
    shown = ", ".join(map(str, rows[:N_SHOWN])) + (", ..." if len(rows) > N_SHOWN else "")
    advice = "; --drop-duplicates puts near-duplicates last" * (request.drop_duplicates is None)
    noun = "rows" if len(rows) > 1 else "row"
    return [f"{verb} exactly (the same {what}): {noun} {shown}{advice}"]


def find_repeats(dataset: Dataset | Stream, adapter: Adapter | None) -> Int[ndarray, " k"]:
    """Find the rows that repeat a row before them exactly, ascending.

    Texts are compared whole, but for white space, as they were read for their lengths. Of image
    files those are read that are as long as another, or whose text is that of another; a stream of
    images is read once more. Rows without text or file repeat nothing.
    """
    if adapter is None:
        return np.zeros(0, dtype=np.int64)
    if isinstance(adapter, TextAdapter):
        rows = np.flatnonzero(adapter.lengths())
        keys = adapter.text_hashes[rows]
    else:
        found = digest_rows(adapter, _find_alike(dataset, adapter))
        pairs = [(row, int.from_bytes(digest[:8], "big", signed=True)) for row, digest in found]
        rows, keys = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    order = np.argsort(keys, kind="stable")
    is_repeat = keys[order[1:]] == keys[order[:-1]]
    return np.sort(rows[order[1:][is_repeat]])


def _find_alike(dataset: Dataset | Stream, adapter: Adapter) -> Int[ndarray, " k"]:
    """Find the rows with images that may repeat another, or be repeated."""
    rows, image = np.arange(len(dataset)), image_half(adapter)
    codes = np.zeros(len(rows), dtype=np.int64)
    if image is not None and not isinstance(dataset, Stream):
        files = undecoded(dataset, *image.columns)
        codes = np.sum([_file_sizes(files, column) for column in image.columns], axis=0)
        if image is adapter and not image.has_lists:
            rows = np.flatnonzero(codes)
    if isinstance(adapter, ImageTextAdapter):
        codes = codes * FACTOR + adapter.text.text_hashes
    _, code, counts = np.unique(codes[rows], return_inverse=True, return_counts=True)
    return rows[counts[code] > 1]


def digest_rows(
    adapter: Adapter, rows: Int[ndarray, " k"] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Give number and hash of the text or image files of rows; those without any are left out.

    Args:
        adapter: What reads them, see `Adapter.contents`.
        rows: Row numbers, ascending; None is all.
    """
    sizes = adapter.lengths()
    rows = np.arange(len(sizes)) if rows is None else rows
    most_rows = BLOCK_ROWS if isinstance(adapter, TextAdapter) else IMAGE_ROWS
    for start, stop in cut_rows(sizes[rows], most_rows):
        some = rows[start:stop]
        for row, content in zip(some.tolist(), adapter.contents(some), strict=True):
            if content:
                yield row, hashlib.blake2b(content, digest_size=16).digest()


def _file_sizes(files: Dataset, column: str) -> Int[ndarray, " n"]:
    """Give the bytes of the files of every row, 0 where there are none; no file is read.

    Of chat turns those inside the rows do not count.
    """
    sizes = np.concatenate([*map(_sizes_inside, files.data.column(column).chunks)])
    places = np.arange(len(sizes))
    if files._indices is not None:
        places = files._indices.column(0).to_numpy()
    kind = Features({column: files.features[column]})
    return sizes[places] + measure_outside(files.data.table.select([column]), kind, places)


def _sizes_inside(values: pa.Array) -> Int[ndarray, " n"]:
    n_rows, of_row = len(values), np.arange(len(values))
    while hasattr(values.type, "value_type"):
        of_row = of_row[pc.list_parent_indices(values).to_numpy()]
        values = pc.list_flatten(values)
    if "bytes" not in [field.name for field in values.type]:
        return np.zeros(n_rows, dtype=np.int64)
    inside = pc.fill_null(pc.binary_length(pc.struct_field(values, "bytes")), 0)
    sizes = inside.to_numpy(zero_copy_only=False)
    return np.bincount(of_row, sizes, minlength=n_rows).astype(np.int64)
