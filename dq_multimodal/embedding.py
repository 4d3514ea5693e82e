"""The embedding stage: one global batch plan, saved as it goes, resumable at any moment."""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter, Problems
from dq_multimodal.atomic import put_in_place, write_text
from dq_multimodal.config import InputError
from dq_multimodal.splits import split_ranges

if TYPE_CHECKING:
    from datasets import Dataset

FILE = "embeddings.npy"
MIDDLE, TEXTURE = "middle.npy", "texture.npy"
"""What the scores of the bins need beside the embeddings: (n, k) float16, (n, 2) float32."""
FILES = (FILE, MIDDLE, TEXTURE)
HALF_RANGE = (-65504.0, 65504.0)
"""What float16 can hold: beyond it lies infinity, which would undo every score."""
PARTIAL = ".partial"
PROGRESS = "embeddings.progress.json"
SAVE_SECONDS = 5.0
"""So much work at most is done again after a stop."""
BLOCK_ROWS = 65536


def plan_batches(lengths: Int[ndarray, " n"], batch_size: int) -> list[Int[ndarray, " b"]]:
    """Cut all rows, longest first, into batches of rows alike in length.

    The plan depends on the lengths and the batch size alone, so an interrupted run goes on with
    the very batches it would have had, and each row meets the same neighbours (and the same
    padding, so the same last bits) as in an undisturbed run.
    """
    rows = np.lexsort((np.arange(len(lengths)), -lengths))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def embed_rows(
    adapter: Adapter,
    folder: Path,
    batch_size: int,
    *,
    rows: Int[ndarray, " k"] | None = None,
    view: int | None = None,
    name: str = "embed",
) -> None:
    """Embed rows into folder/embeddings.npy, (n, d) float32, going on where it stopped.

    With an adapter that is scored, the same pass fills middle.npy and, but for views, texture.npy.
    Threads read and prepare the next batches while the model works on one. Batches are on disk,
    and the odd rows that they held are noted, before they count as done. The files get their
    names when they are whole.

    Args:
        adapter: What reads and embeds the rows.
        folder: Where to.
        batch_size: Rows that go through the encoder together.
        rows: Row numbers; None is all rows.
        view: Seed of the augmented view of each row to embed; None is the row itself.
        name: What the progress bar calls it.
    """
    lengths = adapter.lengths()
    picked = np.arange(len(lengths)) if rows is None else rows
    batches = plan_batches(lengths[picked], batch_size)
    shapes: dict[str, tuple[int, Any]] = {FILE: (adapter.dimension, np.float32)}
    if adapter.is_scored:
        shapes[MIDDLE] = (adapter.middle_dimension, np.float16)
        if view is None:
            shapes[TEXTURE] = (2, np.float32)
    sizes = [len(picked), *(size for size, _ in shapes.values())]
    facts = json.dumps([sizes, batch_size, view, adapter.describe(), adapter.describe_model()])
    key = hashlib.sha256(facts.encode() + lengths.tobytes() + picked.tobytes()).hexdigest()

    done, problems = _read_progress(folder, key)
    places = {file: folder / (file + PARTIAL) for file in shapes}
    are_there = all((folder / file).exists() or place.exists() for file, place in places.items())
    if done == len(batches) and are_there:
        _finish(adapter, folder, places, problems, is_all=rows is None)
        return  # the run stopped just before it could say that this stage is done
    if not done or not all(place.exists() for place in places.values()):
        done, problems = 0, {}
        (folder / PROGRESS).unlink(missing_ok=True)  # before the new files of zeros are there
        for place in places.values():
            place.unlink(missing_ok=True)
    out = {
        file: np.lib.format.open_memmap(
            places[file], mode="r+" if done else "w+", dtype=kind, shape=(len(picked), size)
        )
        for file, (size, kind) in shapes.items()
    }
    n_done = sum(len(part) for part in batches[:done])
    saved = time.monotonic()
    with tqdm(total=len(picked), initial=n_done, desc=name, unit="row") as bar:
        loaded = _load_ahead(adapter, [picked[part] for part in batches[done:]], view)
        for number, (batch, found) in enumerate(loaded, done + 1):
            looks = adapter.embed(batch)
            values = {FILE: looks.embedding, MIDDLE: looks.middle, TEXTURE: looks.texture}
            if looks.middle is not None:
                values[MIDDLE] = np.clip(looks.middle, *HALF_RANGE)
            for file, array in out.items():
                array[batches[number - 1]] = values[file]
            for what, odd in found.items():
                problems.setdefault(what, []).extend(odd)
            bar.update(len(batches[number - 1]))
            if number == len(batches) or time.monotonic() - saved >= SAVE_SECONDS:
                for whole in out.values():
                    whole.flush()
                progress = {"key": key, "batches": number, "problems": problems}
                write_text(folder / PROGRESS, json.dumps(progress))
                saved = time.monotonic()
    out.clear()  # closes the files
    _finish(adapter, folder, places, problems, is_all=rows is None)


def _finish(
    adapter: Adapter, folder: Path, places: dict[str, Path], problems: Problems, *, is_all: bool
) -> None:
    """Give the files that are whole their names, and the adapter what was odd about all rows."""
    for file, place in places.items():
        if place.exists():
            put_in_place(place, folder / file)
    if is_all:
        adapter.problems |= problems


def _load_ahead(
    adapter: Adapter, batches: list[Int[ndarray, " b"]], view: int | None
) -> Iterator[tuple[Any, Problems]]:
    """Yield the loaded batches in their order, some of them read ahead by threads."""
    n_threads = max(1, min(8, (os.cpu_count() or 2) - 1))
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="load")
    waiting: deque[Future[tuple[Any, Problems]]] = deque()
    try:
        for rows in batches:
            waiting.append(pool.submit(adapter.load, rows, view))
            if len(waiting) > 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def describe_given(given: str, dataset: "Dataset", split: str) -> dict[str, Any]:
    """Check ready embeddings and say what they are, as config.yaml records it.

    Args:
        given: A .npy file of (n, d) float16, float32 or float64, or a column of the dataset with
            d numbers a row.
        dataset: The rows that the embeddings belong to.
        split: Their split: for a slice, the file may also hold the rows of the whole split.

    Raises:
        InputError: If there is no such file or column, or it does not hold one finite vector of
            the same size for each row.
    """
    hasher = hashlib.sha256()
    size = 0
    for block in _read_given(given, dataset, split):
        hasher.update(block.tobytes())
        size = block.shape[1]
    key = "column" if _is_column(given, dataset) else "file"
    return {key: given, "dimension": size, "sha256_of_float32": hasher.hexdigest()}


def copy_embeddings(given: str, dataset: "Dataset", split: str, folder: Path) -> None:
    """Write ready embeddings into folder/embeddings.npy as float32; see `describe_given`."""
    out, start = None, 0
    for block in _read_given(given, dataset, split):
        if out is None:
            shape = (len(dataset), block.shape[1])
            out = np.lib.format.open_memmap(
                folder / (FILE + PARTIAL), mode="w+", dtype=np.float32, shape=shape
            )
        out[start : start + len(block)] = block
        start += len(block)
    assert out is not None
    out.flush()
    del out
    put_in_place(folder / (FILE + PARTIAL), folder / FILE)


def _read_given(given: str, dataset: "Dataset", split: str) -> Iterator[ndarray]:
    """Yield the blocks of ready embeddings as float32, checked."""
    size = None
    is_column = _is_column(given, dataset)
    if is_column:
        blocks = _column_blocks(given, dataset)
    else:
        blocks = _npy_blocks(given, len(dataset), split)
    origin = f"column {given}" if is_column else given
    n_read = 0
    for block in blocks:
        size = size or block.shape[1]
        if block.shape[1] != size:
            raise InputError(
                f"{origin} must hold vectors of one size, got {size} and {block.shape[1]}"
            )
        is_bad = ~np.isfinite(block).all(axis=1)
        if is_bad.any():
            row = n_read + int(np.argmax(is_bad))
            raise InputError(f"{origin} must be finite in float32, row {row} holds NaN or infinity")
        yield block
        n_read += len(block)


def open_embeddings(folder: Path) -> ndarray:
    """Open the embeddings of a run folder, memory-mapped, (n, d) float32."""
    return np.load(folder / FILE, mmap_mode="r")


def _is_column(given: str, dataset: "Dataset") -> bool:
    return given in dataset.column_names and not given.endswith(".npy")


def _npy_blocks(given: str, n_rows: int, split: str) -> Iterator[ndarray]:
    path = Path(os.path.expanduser(given))  # noqa: PTH111
    if not path.is_file():
        raise InputError(f"no embeddings {given}: neither a .npy file nor a column of the dataset")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"cannot read {given} as .npy: {error}") from error
    if not isinstance(values, ndarray) or values.ndim != 2 or values.dtype.kind != "f":
        got = getattr(values, "dtype", "an archive"), getattr(values, "shape", "")
        raise InputError(f"{given} must be an (n, d) array of floats, got {got[0]} {got[1]}")
    ranges = [(0, len(values))]
    if len(values) != n_rows:
        with suppress(InputError):  # a slice that does not fit so many rows
            ranges = split_ranges(split, len(values))
    if sum(stop - start for start, stop in ranges) != n_rows or not values.shape[1]:
        raise InputError(
            f"{given} must hold one vector for each of the {n_rows:,} rows, "
            f"got shape {values.shape}"
        )
    for first, stop in ranges:
        for start in range(first, stop, BLOCK_ROWS):
            yield np.asarray(values[start : min(start + BLOCK_ROWS, stop)], dtype=np.float32)


def _column_blocks(name: str, dataset: "Dataset") -> Iterator[ndarray]:
    import pyarrow as pa
    import pyarrow.compute

    column = dataset.select_columns([name]).with_format("arrow")
    for start in range(0, len(dataset), BLOCK_ROWS):
        array = column[start : start + BLOCK_ROWS][name].combine_chunks()
        wrong_type = InputError(f"column {name} must hold lists of numbers, got {array.type}")
        is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
        if not (is_list or pa.types.is_fixed_size_list(array.type)):
            raise wrong_type
        if array.null_count:
            row = start + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise InputError(f"column {name} must hold a vector in every row, row {row} has none")
        sizes = np.asarray(pa.compute.list_value_length(array))
        if sizes.min() != sizes.max() or not sizes.max():
            raise InputError(
                f"column {name} must hold vectors of one size, got {sizes.min()} to {sizes.max()}"
            )
        try:
            flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise wrong_type from error
        yield flat.reshape(len(array), -1)


def _read_progress(folder: Path, key: str) -> tuple[int, Problems]:
    """Give the batches that are done of this very plan, and the problems found in them."""
    try:
        progress = json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):
        return 0, {}
    if progress["key"] != key:
        return 0, {}
    return progress["batches"], progress.get("problems", {})
