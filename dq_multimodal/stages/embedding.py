"""The embedding stage: one global plan of batches, saved as it goes, resumable at any moment.

First `embed_rows` and what it stands on: batches that are read ahead, and noted when done.
Then embeddings that are there already.
"""

import errno
import hashlib
import io
import json
import os
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter, Embedded, Problems
from dq_multimodal.config import InputError
from dq_multimodal.data.row_sizes import BLOCK_BYTES, read_blocks
from dq_multimodal.data.splits import split_ranges
from dq_multimodal.files import expand_home, put_in_place, write_text

if TYPE_CHECKING:
    from datasets import Dataset

FILE = "embeddings.npy"
MIDDLE, TEXTURE = "middle.npy", "texture.npy"
"""What the scores of the bins need beside the embeddings: (n, k) float16, (n, t) float32."""
FILES = (FILE, MIDDLE, TEXTURE)
PARTIAL = ".partial"
HALF_RANGE = (-65504.0, 65504.0)
"""What float16 can hold: beyond it lies infinity, which would undo every score."""
PROGRESS = "embeddings.progress.json"
ALIKE_ROWS, ALIKE_NUMBERS = 1000, 2**23
ALIKE_COSINE = 0.99
EQUAL_SQUARE = {True: 2e-4, False: 1e-12}
"""Squared distance, over the greatest squared norm, up to which two embeddings count as equal: a
cosine of 0.9999 (batches of other lengths change the last bits), or rounding."""
SAVE_SECONDS = 5.0
"""So much work at most is done again after a stop."""
BLOCK_ROWS = 65536


class RowsFile:
    """Rows of a .npy file that is being written; a new one is all zeros, and has its room.

    A memory map would not do: on a full disk it ends the process without a word.

    Raises:
        OSError: If there is no room; a file that was to be made is gone then.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int], kind: Any, *, is_new: bool = False
    ) -> None:
        self._kind = np.dtype(kind)
        self._row_bytes = shape[1] * self._kind.itemsize
        header = io.BytesIO()
        facts = {"descr": self._kind.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, facts)  # as a memory map would begin
        self._offset = header.tell()
        if is_new:
            path.unlink(missing_ok=True)
        flags = os.O_WRONLY | (os.O_CREAT | os.O_EXCL if is_new else 0)
        self._descriptor = os.open(path, flags, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        if is_new:
            try:
                _allocate(self._descriptor, self._offset + shape[0] * self._row_bytes)
                self._write(header.getvalue(), 0)
                self.flush()
            except OSError:
                path.unlink()
                raise

    def __setitem__(self, rows: Int[ndarray, " b"], values: ndarray) -> None:
        values = np.ascontiguousarray(values, dtype=self._kind)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for row, part in zip(rows[starts].tolist(), np.split(values, starts[1:]), strict=True):
            self._write(part.tobytes(), self._offset + row * self._row_bytes)

    def _write(self, data: bytes, place: int) -> None:
        while data:  # a full disk takes a part, and then none
            written = os.pwrite(self._descriptor, data, place)
            data, place = data[written:], place + written

    def flush(self) -> None:
        """Bring all to the disk."""
        os.fsync(self._descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Give a new file its size and its room on the disk, as far as the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # not on every system
        if getattr(error, "errno", None) not in (None, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, size)


def plan_batches(
    lengths: Int[ndarray, " n"], batch_size: int, chunks: Int[ndarray, " n"] | None = None
) -> list[Int[ndarray, " b"]]:
    """Cut all rows, longest first, into batches of rows alike in length.

    The plan depends on the lengths and the batch size alone, so an interrupted run goes on with
    the very batches it would have had, and each row meets the same neighbours (and the same
    padding, so the same last bits) as in an undisturbed run. Rows that come in chunks, one chunk
    after the other (a stream), are planned chunk by chunk; `chunks` is the chunk of every row.
    """
    if chunks is not None:
        parts = np.split(np.arange(len(chunks)), np.flatnonzero(np.diff(chunks)) + 1)
        return [part[b] for part in parts for b in plan_batches(lengths[part], batch_size)]
    rows = np.lexsort((np.arange(len(lengths)), -lengths))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@dataclass(frozen=True)
class Plan:
    """What is to be embedded, in which batches, into which files.

    Attributes:
        rows: Row numbers in the dataset.
        batches: Places among them.
        shapes: Columns and type of each file.
        key: What tells this plan from others.
    """

    rows: Int[ndarray, " k"]
    batches: list[Int[ndarray, " b"]]
    shapes: dict[str, tuple[int, Any]]
    key: str

    def open_files(self, folder: Path, *, is_new: bool = False) -> dict[str, RowsFile]:
        """Open the files, or make all of them or none."""
        places = self.places(folder)
        opened: dict[str, RowsFile] = {}
        try:
            for file, (size, kind) in self.shapes.items():
                opened[file] = RowsFile(places[file], (len(self.rows), size), kind, is_new=is_new)
        except OSError:
            for file in opened if is_new else ():
                places[file].unlink()
            raise
        return opened

    def places(self, folder: Path) -> dict[str, Path]:
        """Give the paths of the files while they are made."""
        return {file: folder / (file + PARTIAL) for file in self.shapes}


def make_plan(
    adapter: Adapter, batch_size: int, rows: Int[ndarray, " k"] | None, view: int | None
) -> Plan:
    """Plan the embedding of rows, None for all of them, or of a view of each."""
    lengths = adapter.lengths()
    picked = np.arange(len(lengths)) if rows is None else rows
    shapes: dict[str, tuple[int, Any]] = {FILE: (adapter.dimension, np.float32)}
    if adapter.is_scored:
        shapes[MIDDLE] = (adapter.middle_dimension, np.float16)
        if view is None:
            shapes[TEXTURE] = (2 * len(adapter.parts), np.float32)
    chunks = picked // adapter.chunk_rows if adapter.chunk_rows else None
    sizes = [len(picked), adapter.chunk_rows, *(size for size, _ in shapes.values())]
    facts = json.dumps([sizes, batch_size, view, adapter.describe(), adapter.describe_model()])
    key = hashlib.sha256(facts.encode() + lengths.tobytes() + picked.tobytes()).hexdigest()
    return Plan(picked, plan_batches(lengths[picked], batch_size, chunks), shapes, key)


def load_ahead(
    adapter: Adapter,
    batches: Iterable[tuple[int, Int[ndarray, " b"]]],
    view: int | None,
) -> Generator[tuple[int, Any, Problems], None, None]:
    """Yield the loaded batches in their order, some of them read ahead by threads."""
    n_threads = max(1, min(8, (os.cpu_count() or 2) - 1))
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="load")
    waiting: deque[tuple[int, Future[tuple[Any, Problems]]]] = deque()
    try:
        for number, rows in batches:
            waiting.append((number, pool.submit(adapter.load, rows, view)))
            if len(waiting) > 2 * n_threads:
                number, loaded = waiting.popleft()
                yield number, *loaded.result()
        while waiting:
            number, loaded = waiting.popleft()
            yield number, *loaded.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
    Threads read and prepare the next batches while the model works on one. Batches are on disk, and
    the odd rows that they held are noted, before they count as done. The files get their names when
    they are whole.

    Rows are numbers, None for all; a view is the seed of an augmented view of each to embed
    instead.
    """
    plan = make_plan(adapter, batch_size, rows, view)
    places, n_batches = plan.places(folder), len(plan.batches)
    n_done, problems = read_progress(folder, plan.key)
    are_there = all((folder / file).exists() or place.exists() for file, place in places.items())
    if n_done < n_batches or not are_there:  # else it only was not said that all is done
        is_new = not n_done or not all(place.exists() for place in places.values())
        if is_new:
            (folder / PROGRESS).unlink(missing_ok=True)  # before the new files of zeros are there
            n_done, problems = 0, {}
        out = plan.open_files(folder, is_new=is_new)
        start, saved = sum(map(len, plan.batches[:n_done])), time.monotonic()
        batches = enumerate((plan.rows[batch] for batch in plan.batches[n_done:]), n_done)
        with tqdm(total=len(plan.rows), initial=start, desc=name, unit="row") as bar:
            for number, batch, odd in load_ahead(adapter, batches, view):
                write_batch(out, plan.batches[number], adapter.embed(batch))
                for what, found in odd.items():
                    problems.setdefault(what, []).extend(found)
                bar.update(len(plan.batches[number]))
                if number + 1 == n_batches or time.monotonic() - saved >= SAVE_SECONDS:
                    save_progress(folder, out, plan.key, number + 1, problems)
                    saved = time.monotonic()
        out.clear()  # closes the files
    for file, place in places.items():
        if place.exists():
            put_in_place(place, folder / file)
    if rows is None:
        adapter.problems |= problems


def read_progress(folder: Path, key: str) -> tuple[int, Problems]:
    """Give how many batches of a plan an earlier run of it has done, and their odd rows."""
    try:
        before = json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):
        return 0, {}
    if before["key"] != key or "n_done" not in before:  # of another release
        return 0, {}
    return before["n_done"], before["problems"]


def save_progress(
    folder: Path, out: dict[str, RowsFile], key: str, n_done: int, problems: Problems
) -> None:
    """Bring the files to the disk, then note how many batches are done."""
    for opened in out.values():
        opened.flush()
    record = {"key": key, "n_done": n_done, "problems": problems}
    write_text(folder / PROGRESS, json.dumps(record))


def write_batch(out: dict[str, RowsFile], places: Int[ndarray, " b"], made: Embedded) -> None:
    """Write what a batch was embedded into, to the places of its rows in the files."""
    values: dict[str, Any] = {FILE: made.embedding, MIDDLE: made.middle, TEXTURE: made.texture}
    if made.middle is not None:
        values[MIDDLE] = np.clip(made.middle, *HALF_RANGE)
    for file, opened in out.items():
        opened[places] = values[file]


def note_alike(rows: Float[ndarray, "n d"], *, by_cosine: bool) -> list[str]:
    """Say, by a fixed sample of the embeddings, if nearly all of them are alike; else nothing.

    Alike is a mean cosine of two rows above 0.99 (only where cosines say how alike rows are,
    `by_cosine`), or more than half of the rows equal.
    """
    size = min(ALIKE_ROWS, 2 + ALIKE_NUMBERS // rows.shape[1])
    places = np.unique(np.linspace(0, len(rows) - 1, size).astype(int))
    some = rows[places].astype(np.float64)
    if by_cosine:
        norms = np.linalg.norm(some, axis=1, keepdims=True)
        some /= np.where(norms > 0, norms, 1)
    n, products = len(some), some @ some.T
    squares = np.diagonal(products)
    distances = squares[:, None] + squares - 2 * products
    n_equal = int((distances <= EQUAL_SQUARE[by_cosine] * squares.max()).sum(axis=1).max())
    mean = (products.sum() - squares.sum()) / max(1, n * (n - 1))
    if by_cosine and mean > ALIKE_COSINE:
        found = f"the mean cosine of two rows is {mean:.4f}"
    elif n > 1 and n_equal > n / 2:
        found = f"{n_equal:,} of {n:,} rows looked at have the same one"
    else:
        return []
    return [f"WARNING: nearly all embeddings are alike ({found}): they hardly tell the rows apart"]


def describe_given(
    given: str, dataset: "Dataset", split: str, n_rows: int | None = None
) -> dict[str, Any]:
    """Check ready embeddings and say what they are, as config.yaml records it.

    There are n_rows rows where the dataset is only the first of them: of a column these are
    checked, and the files of the source are what pins it.

    Given is a .npy file of (n, d) float16, float32 or float64, or a column of the dataset with d
    numbers a row. For a slice, `split`, the file may also hold the rows of the whole split.

    Raises:
        InputError: If there is no such file or column, or it does not hold one finite vector of the
            same size for each row.
    """
    hasher = hashlib.sha256()
    size = 0
    for block in read_given(given, dataset, split, n_rows):
        hasher.update(block.tobytes())
        size = block.shape[1]
    if not _is_column(given, dataset):
        return {"file": given, "dimension": size, "sha256_of_float32": hasher.hexdigest()}
    digest = {} if n_rows else {"sha256_of_float32": hasher.hexdigest()}
    return {"column": given, "dimension": size, **digest}


def copy_embeddings(given: str, dataset: "Dataset", split: str, folder: Path) -> None:
    """Write ready embeddings into folder/embeddings.npy as float32; see `describe_given`."""
    out, start, partial = None, 0, folder / (FILE + PARTIAL)
    for block in read_given(given, dataset, split):
        shape = (len(dataset), block.shape[1])
        out = out or RowsFile(partial, shape, np.float32, is_new=True)
        out[np.arange(start, start + len(block))] = block
        start += len(block)
    put_in_place(partial, folder / FILE)


def read_given(
    given: str, dataset: "Dataset", split: str, n_rows: int | None = None
) -> Iterator[ndarray]:
    """Yield the blocks of ready embeddings as float32, checked."""
    if _is_column(given, dataset):
        yield from read_column(given, dataset)
        return
    yield from _check(_npy_blocks(given, n_rows or len(dataset), split), given)


def read_column(given: str, dataset: "Dataset", start: int = 0) -> Iterator[ndarray]:
    """Yield the blocks of a column of ready embeddings as float32, checked.

    Start is the number of the first row in the source, for messages.
    """
    yield from _check(_column_blocks(given, dataset), f"column {given}", start)


def _check(blocks: Iterable[ndarray], origin: str, start: int = 0) -> Iterator[ndarray]:
    size, n_read = None, start
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


def read_npy(given: str, n_rows: int, split: str, start: int, stop: int) -> ndarray:
    """Read the ready embeddings of rows start to stop of so many, float16 or else float32."""
    values, ranges = _open_ranges(given, n_rows, split)
    found, first = [values[:0]], 0
    for low, high in ranges:
        found.append(values[low + max(start - first, 0) : min(low + stop - first, high)])
        first += high - low
    return np.concatenate(found).astype("f2" if values.dtype == "f2" else "f4")


def _open_ranges(given: str, n_rows: int, split: str) -> tuple[ndarray, list[tuple[int, int]]]:
    """Map a .npy file, and say where in it the rows lie."""
    path = expand_home(given)
    if not path.is_file():
        raise InputError(f"no embeddings {given}: neither a .npy file nor a column of the dataset")
    values = _open_npy(path, given)
    ranges = [(0, len(values))]
    if len(values) != n_rows:
        with suppress(InputError):  # a slice that does not fit so many rows
            ranges = split_ranges(split, len(values))
    if sum(stop - start for start, stop in ranges) != n_rows or not values.shape[1]:
        raise InputError(
            f"{given} must hold one vector for each of the {n_rows:,} rows, "
            f"got shape {values.shape}"
        )
    return values, ranges


def _npy_blocks(given: str, n_rows: int, split: str) -> Iterator[ndarray]:
    values, ranges = _open_ranges(given, n_rows, split)
    step = max(1, BLOCK_BYTES // (4 * values.shape[1]))
    for first, stop in ranges:
        for start in range(first, stop, step):
            with np.errstate(over="ignore"):  # infinity is refused
                block = np.asarray(values[start : min(start + step, stop)], dtype=np.float32)
            yield block


def _open_npy(path: Path, given: str) -> ndarray:
    """Map a .npy file; of any other, say in one line what it is."""
    wanted = f"{given} must be a .npy file of an (n, d) array of float16, float32 or float64"
    try:
        with path.open("rb") as file:
            head = file.read(2)
        values = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise InputError(f"cannot read {given}: {error.strerror or error}") from error
    except Exception as error:  # a header can be wrong in many ways
        got = {b"": "an empty file", b"PK": "an archive (.npz)"}.get(head)
        if got is None:
            is_objects = "Python objects" in str(error)
            reason = " ".join(str(error).split())
            got = "an array of Python objects" if is_objects else f"another file ({reason})"
        raise InputError(f"{wanted}, got {got}") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise InputError(f"{wanted}, got {values.dtype} of shape {values.shape}")
    return values


def _column_blocks(name: str, dataset: "Dataset") -> Iterator[ndarray]:
    import pyarrow as pa
    import pyarrow.compute

    column = dataset.select_columns([name]).with_format("arrow")
    start = 0
    for table in read_blocks(column, BLOCK_ROWS):
        array = table[name].combine_chunks()
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
            with np.errstate(over="ignore"):  # infinity is refused
                flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise wrong_type from error
        yield flat.reshape(len(array), -1)
        start += len(array)
