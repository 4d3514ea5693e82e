"""Rows read as a stream: forward, chunk by chunk, never all of them on this disk or in memory."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import islice
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetBuilder, DatasetInfo, Features, IterableDataset
from datasets.table import InMemoryTable, table_cast

from dq_multimodal.config import InputError
from dq_multimodal.data.row_files import NO_FILES, RowFiles, embed, widen
from dq_multimodal.files import first_line

CHUNK_ROWS = 16384
CHUNK_BYTES = 64_000_000
"""Chunks have fewer rows, a power of two of them, where rows are large."""
LEAST_ROWS = 64
N_CHUNKS = 3
"""Chunks that a view holds: threads read a little behind the foremost."""


class Passes:
    """What all passes over one source have in common.

    Args:
        name: The source, for messages.
        begin: Begins a pass over some columns (None is all); it may give more than these.
        n_rows: Rows of the source, where they are known; else the first whole pass counts them.
        own: Which files its rows may name.

    Attributes:
        chunk_rows: Rows of a chunk.
        chunk_bytes: Bytes of the largest chunk seen so far.
        n_bytes: Those of all rows as uncompressed Arrow data; None before a whole pass over them.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[list[str] | None], IterableDataset],
        n_rows: int | None = None,
        own: RowFiles = NO_FILES,
    ) -> None:
        self.name, self._begin, self.n_rows, self._own = name, begin, n_rows, own
        self.n_bytes: int | None = None
        self.chunk_rows = LEAST_ROWS
        with reading(name):
            rows = begin(None)
            first = next(_read_tables(rows, LEAST_ROWS))
            schema = first.schema.remove_metadata()
            self.features: Features = rows.features or Features.from_arrow_schema(schema)
            if own.folder is not None:
                self.features = widen(self.features)
            row_bytes = max(1, self.convert(first, self.features, 0).nbytes // len(first))
        self.chunk_bytes = self.chunk_rows * row_bytes
        while self.chunk_rows < CHUNK_ROWS and 2 * self.chunk_rows * row_bytes <= CHUNK_BYTES:
            self.chunk_rows *= 2

    def tables(self, columns: list[str] | None) -> Iterator[pa.Table]:
        """Yield the chunks of one pass as they come; all but the last are of `chunk_rows`.

        A pass over all columns counts the bytes too, of files outside the table as well. InputError
        if rows cannot be read, or are not as many as in the pass before.
        """
        n_read = n_bytes = 0
        with reading(self.name):
            for table in _read_tables(self._begin(columns), self.chunk_rows):
                assert n_read % self.chunk_rows == 0, "a short chunk before the last"
                self._check(len(table), n_read)
                self.chunk_bytes = max(self.chunk_bytes, table.nbytes)
                if columns is None:
                    table = self.convert(table, self.features, n_read)
                    n_bytes += table.nbytes
                n_read += len(table)
                yield table
        self._check(0, n_read)
        self.n_rows = n_read
        self.n_bytes = n_bytes if columns is None else self.n_bytes

    def convert(self, table: pa.Table, features: Features, start: int) -> pa.Table:
        """Give the chunk from row `start` on the columns and types of features, with its files."""
        table = table_cast(table.select(list(features)), features.arrow_schema)
        return embed(table, features, self._own, self.name, start)

    def _check(self, size: int, start: int) -> None:
        """Raise if a chunk at some row cannot be one of a source of so many rows."""
        if self.n_rows is None:
            return
        wanted = min(self.chunk_rows, self.n_rows - start)
        if size != wanted:
            raise InputError(
                f"{self.name} has changed while it was read: a pass over it found {self.n_rows:,} "
                f"rows, and a later one {'fewer' if size < wanted else 'more'}"
            )


class Stream:
    """Stands in for a `datasets.Dataset` where rows are asked for from the first to the last.

    Each view (`select_columns`, `with_format`, ...) reads a pass of its own, and holds a few
    chunks. Asked for a row behind them, it begins another pass: right, and slow. So batches are
    planned chunk by chunk (`chunk_rows`), and rows to show are read in their order.

    Attributes:
        features: As of a Dataset.
        passes: Its passes over the source.
        chunk_rows: Rows of a chunk; chunk k holds the rows from k * chunk_rows on.
    """

    def __init__(self, passes: Passes) -> None:
        self.features, self.chunk_rows, self.passes = passes.features, passes.chunk_rows, passes
        self._format: str | None = None
        self._reset()

    def _reset(self) -> None:
        self._lock = Lock()
        self._chunks: deque[tuple[int, pa.Table]] = deque(maxlen=N_CHUNKS)
        self._coming: Iterator[pa.Table] | None = None
        self._n_read = 0

    def _view(self, **changes: Any) -> "Stream":
        view = copy(self)
        vars(view).update(changes)
        view._reset()
        return view

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.features)

    def __len__(self) -> int:
        if self.passes.n_rows is None:  # a pass for that alone, over what is read fastest
            plain = [name for name in self.features if getattr(self.features[name], "dtype", "")]
            deque(self.passes.tables((plain or self.column_names)[:1]), maxlen=0)
        assert self.passes.n_rows is not None
        return self.passes.n_rows

    def select_columns(self, names: list[str]) -> "Stream":
        """Give a view of some columns."""
        return self._view(features=Features({name: self.features[name] for name in names}))

    def cast_column(self, name: str, feature: Any) -> "Stream":
        """Give a view in which a column is read as another type."""
        return self._view(features=Features({**self.features, name: feature}))

    def with_format(self, kind: str | None) -> "Stream":
        """Give a view of Arrow tables ("arrow") or of plain values (None)."""
        return self._view(_format=kind)

    def iter(self, batch_size: int) -> Iterator[Any]:
        """Read all rows, some at a time."""
        number = 0
        while (table := self._chunk(number)) is not None:
            for start in range(0, len(table), batch_size):
                yield self._show(table.slice(start, batch_size))
            number += 1

    def __getitem__(self, rows: list[int]) -> Any:
        return self._show(self._take(rows))

    def select(self, rows: Any) -> Dataset:
        """Read some rows into memory."""
        return self._as_dataset(self._take(rows))

    def finish(self) -> None:
        """Go on to the end of the pass, so that its rows and bytes are counted and checked."""
        if self._coming is not None:
            self._chunk(len(self))

    def _take(self, asked: Any) -> pa.Table:
        """Read rows, in the order asked for."""
        rows = np.asarray(asked, dtype=np.int64)
        chunks = rows // self.chunk_rows
        parts = []
        for number in np.unique(chunks).tolist():
            table = self._chunk(number)
            if table is None:
                raise IndexError(f"the stream has {len(self):,} rows, asked for {rows.max():,}")
            parts.append(_take_rows(table, rows[chunks == number] - number * self.chunk_rows))
        if not parts:
            return self.features.arrow_schema.empty_table()
        places = np.argsort(np.argsort(chunks, kind="stable"))
        is_in_order = (np.diff(chunks) >= 0).all()
        found = pa.concat_tables(parts)
        return found if is_in_order else _take_rows(found, places)

    def _chunk(self, number: int) -> pa.Table | None:
        """Give a chunk, one that was read last or by going on; None beyond the last."""
        with self._lock:
            for known, table in self._chunks:
                if known == number:
                    return table
            if self._coming is None or number < self._n_read:
                are_all = {*self.features} == {*self.passes.features}
                self._coming = self.passes.tables(None if are_all else self.column_names)
                self._n_read = 0
                self._chunks.clear()
            while (table := next(self._coming, None)) is not None:
                self._n_read += 1
                if self._n_read > number:  # what is passed over need not be made ready
                    start = number * self.chunk_rows
                    table = self.passes.convert(table, self.features, start).combine_chunks()
                    self._chunks.append((number, table))
                    return table
            self._coming = None
            return None

    def _show(self, table: pa.Table) -> Any:
        return self._as_dataset(table).with_format(self._format)[:]

    def _as_dataset(self, table: pa.Table) -> Dataset:
        # A fingerprint of its own would be computed from all the data.
        return Dataset(table, info=DatasetInfo(features=self.features), fingerprint="stream")


def stream_from(
    name: str,
    make: Callable[[], DatasetBuilder],
    split: str,
    n_rows: int | None = None,
    check: Callable[[], None] = lambda: None,
    own: RowFiles = NO_FILES,
    change: Callable[[IterableDataset], IterableDataset] = lambda rows: rows,
) -> Stream:
    """Open as a stream what a builder reads; one is made for every pass, see `Passes`.

    Args:
        check: Called before every pass: raises if the source has changed.
        change: Gives the rows of a pass other types.
    """

    def begin(columns: list[str] | None) -> IterableDataset:
        check()
        builder = make()
        if columns is not None and hasattr(builder.config, "columns"):
            builder.config.columns = columns  # parquet: the others are not even fetched
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0  # files come as they are, not as pictures
        return change(builder.as_streaming_dataset(split=split))

    return Stream(Passes(name, begin, n_rows, own))


def _read_tables(rows: IterableDataset, n_rows: int) -> Iterator[pa.Table]:
    """Yield the rows of a pass as tables of so many; the last may have fewer."""
    if rows._ex_iterable.iter_arrow or rows.features is None:
        yield from rows.with_format("arrow").iter(batch_size=n_rows)
        return
    # Left to itself, `datasets` makes a table of every example, of types that it guesses anew.
    features = rows.features
    examples = (example for _, example in rows._ex_iterable)
    while block := list(islice(examples, n_rows)):
        columns = {name: [example.get(name) for example in block] for name in features}
        yield Dataset.from_dict(columns, features).data.table


def _take_rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Give rows of a table by their numbers."""
    try:
        return table.take(pa.array(rows))
    except pa.ArrowNotImplementedError:  # views, such as string_view
        return InMemoryTable(table).fast_gather(rows).combine_chunks()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the dataset."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise InputError(f"{name} has no rows") from error
        raise InputError(f"cannot read {name}: {first_line(error)}") from error
