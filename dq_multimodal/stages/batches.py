"""Batches of a plan through an encoder into files: read ahead, shared, and noted when done."""

import errno
import hashlib
import io
import json
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter, Problems
from dq_multimodal.files import write_text

FILE = "embeddings.npy"
MIDDLE, TEXTURE = "middle.npy", "texture.npy"
"""What the scores of the bins need beside the embeddings: (n, k) float16, (n, 2) float32."""
FILES = (FILE, MIDDLE, TEXTURE)
PARTIAL = ".partial"
HALF_RANGE = (-65504.0, 65504.0)
"""What float16 can hold: beyond it lies infinity, which would undo every score."""

Found = dict[int, Problems]
"""The odd rows of each batch."""


class Progress:
    """Which batches of a plan are on disk, and what was odd in them, whoever did them.

    Attributes:
        is_done: (k,) which of the k batches are done.
    """

    def __init__(self, path: Path, key: str, n_batches: int) -> None:
        """Read what an earlier run of the very same plan left, if anything.

        Args:
            path: File of the record.
            key: What tells the plan from others.
            n_batches: Batches of the plan.
        """
        self.path, self.key = path, key
        self.is_done = np.zeros(n_batches, dtype=bool)
        self._problems: Found = {}
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if before["key"] == key and "done" in before:  # written by this release
            for start, stop in before["done"]:
                self.is_done[start:stop] = True
            self._problems = {int(k): found for k, found in before["problems"].items()}

    def forget(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)
        self.is_done[:] = False
        self._problems.clear()

    def note(self, found: Found) -> None:
        """Take batches, which are on disk, for done."""
        self.is_done[list(found)] = True
        self._problems |= {number: odd for number, odd in found.items() if odd}

    def save(self) -> None:
        """Write the record."""
        edges = np.flatnonzero(np.diff(self.is_done, prepend=False, append=False))
        record = {"key": self.key, "done": edges.reshape(-1, 2).tolist()}
        write_text(self.path, json.dumps({**record, "problems": self._problems}))

    def problems(self) -> Problems:
        """Give the odd rows of all batches, in the order of the plan."""
        together: Problems = {}
        for number in sorted(self._problems):
            for what, odd in self._problems[number].items():
                together.setdefault(what, []).extend(odd)
        return together


class RowsFile:
    """Rows of a .npy file that is being written, maybe by several processes at once.

    A memory map would not do: on a full disk it ends the process without a word. And on a file
    system of a network, machines write back whole pages, and with them rows of others as they
    were before. So rows are written by themselves, and the file is open for writing only and out
    of the cache, so that no page of it is known as a whole.

    Args:
        path: The file.
        shape: Rows and columns.
        kind: Type of the numbers.
        is_new: Make the file, all zeros, its room on the disk taken.

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
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

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
        """Open the files, or make all of them or none, for several processes to write."""
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
            shapes[TEXTURE] = (2, np.float32)
    chunks = picked // adapter.chunk_rows if adapter.chunk_rows else None
    sizes = [len(picked), adapter.chunk_rows, *(size for size, _ in shapes.values())]
    facts = json.dumps([sizes, batch_size, view, adapter.describe(), adapter.describe_model()])
    key = hashlib.sha256(facts.encode() + lengths.tobytes() + picked.tobytes()).hexdigest()
    return Plan(picked, plan_batches(lengths[picked], batch_size, chunks), shapes, key)


def embed_batches(
    adapter: Adapter,
    plan: Plan,
    numbers: Iterable[int],
    out: dict[str, RowsFile],
    view: int | None,
    save_seconds: float,
    n_sharing: int = 1,
    on_rows: Callable[[int], object] | None = None,
) -> Iterator[Found]:
    """Embed some batches into arrays; yield those that are on the disk, now and then.

    Args:
        adapter: What reads and embeds the rows.
        plan: All batches.
        numbers: Which of them, in this order.
        out: What takes the values of rows, by file; empty, so closed, at the end.
        view: Seed of the augmented views; None is the rows themselves.
        save_seconds: So long at least between two yields.
        n_sharing: Processes that share the processors of this machine.
        on_rows: Called with the number of rows embedded since (for progress bars).
    """
    done: Found = {}
    saved = time.monotonic()
    batches = ((number, plan.rows[plan.batches[number]]) for number in numbers)
    for number, batch, odd in load_ahead(adapter, batches, view, n_sharing):
        looks = adapter.embed(batch)
        values: dict[str, Any] = {
            FILE: looks.embedding,
            MIDDLE: looks.middle,
            TEXTURE: looks.texture,
        }
        if looks.middle is not None:
            values[MIDDLE] = np.clip(looks.middle, *HALF_RANGE)
        for file, array in out.items():
            array[plan.batches[number]] = values[file]
        done[number] = odd
        if on_rows is not None:
            on_rows(len(plan.batches[number]))
        if time.monotonic() - saved >= save_seconds:
            for whole in out.values():
                whole.flush()
            yield done
            done, saved = {}, time.monotonic()
    for whole in out.values() if done else ():
        whole.flush()
    out.clear()
    if done:
        yield done


def load_ahead(
    adapter: Adapter,
    batches: Iterable[tuple[int, Int[ndarray, " b"]]],
    view: int | None,
    n_sharing: int = 1,
) -> Generator[tuple[int, Any, Problems], None, None]:
    """Yield the loaded batches in their order, some of them read ahead by threads."""
    n_threads = max(1, min(8, (os.cpu_count() or 2) // n_sharing - 1))
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
