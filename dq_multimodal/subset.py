"""The kept rows on disk: parquet, all source columns untouched, plus where each row stood."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.config import InputError
from dq_multimodal.local_data import read_parquet
from dq_multimodal.stream import Stream

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

FOLDER = "subset"
PARTIAL = "subset.partial"
OWN_COLUMNS = ("dq_row", "dq_bin", "dq_rank")
SHARD_BYTES = 500_000_000
PROBED_ROWS = 64
BLOCK_BYTES = 64_000_000
"""Rows are read and written (as one row group) in blocks of about so many bytes."""


class RecordColumn(Protocol):
    """A column that was made, not read."""

    name: str

    @property
    def feature(self) -> Any:
        """Its type for `datasets`."""
        ...

    def slice(self, start: int, length: int) -> "pa.ChunkedArray":
        """Give some of its rows."""
        ...


def check_columns(dataset: "Dataset") -> None:
    """Raise if the source already has a column of ours."""
    taken = [name for name in OWN_COLUMNS if name in dataset.column_names]
    if taken:
        raise InputError(
            f"the source already has the column {', '.join(taken)}: rename it, or resample the run "
            "that it came from"
        )


def write_subset(
    dataset: "Dataset",
    picks: Int[ndarray, " k"],
    kept: "pa.Table",
    folder: Path,
    records: "RecordColumn | None" = None,
) -> int:
    """Write rows of a dataset to folder/subset; the folder appears when it is whole.

    Args:
        dataset: Where the rows are taken from.
        picks: Places of the rows in the dataset.
        kept: Their row number in the source, bin and rank, written as dq_row, dq_bin, dq_rank.
        folder: The run folder.
        records: A column that takes the place of one of the dataset, in the order of picks.

    Returns:
        Bytes of the columns of the rows that are not ours, as uncompressed Arrow data.
    """
    import pyarrow.parquet as pq
    from datasets import Features, Value
    from datasets.table import embed_table_storage

    own = {"dq_row": Value("int64"), "dq_bin": Value("int32"), "dq_rank": Value("int32")}
    features = dict(dataset.features)
    if records is not None:
        features[records.name] = records.feature
    contents = Features(features).arrow_schema
    schema = Features({**features, **own}).arrow_schema
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    source = dataset.with_format("arrow")
    block_rows = max(1, min(100_000, BLOCK_BYTES // _row_bytes(dataset, picks)))
    n_bytes, n_shards, shard_bytes = 0, 0, 0
    writer = None
    try:
        for start in tqdm(range(0, len(picks), block_rows), desc="write", unit="block"):
            table = source[picks[start : start + block_rows].tolist()]
            if records is not None:
                at = table.column_names.index(records.name)
                table = table.set_column(at, records.name, records.slice(start, len(table)))
            table = embed_table_storage(conform(table, contents))
            n_bytes += table.nbytes
            shard_bytes += table.nbytes
            for name in ("row", "bin", "rank"):
                table = table.append_column(f"dq_{name}", kept[name].slice(start, block_rows))
            if writer is None:
                path = partial / f"part-{n_shards:05d}.parquet"
                writer = pq.ParquetWriter(path, schema, **_writer_options(schema, records))
            writer.write_table(conform(table, schema))
            if shard_bytes >= SHARD_BYTES:
                writer.close()
                writer, n_shards, shard_bytes = None, n_shards + 1, 0
        if isinstance(source, Stream):
            source.finish()
    finally:
        if writer is not None:
            writer.close()
    for path in partial.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    partial.replace(folder / FOLDER)
    return n_bytes


def remove_subset(folder: Path) -> None:
    """Remove folder/subset."""
    shutil.rmtree(folder / FOLDER)


def conform(table: "pa.Table", schema: "pa.Schema") -> "pa.Table":
    """Give a table the types of a schema; Arrow's cast breaks slices of structs that hold nulls."""
    if table.schema.equals(schema):
        return table.replace_schema_metadata(schema.metadata)
    return table.combine_chunks().cast(schema)


def _writer_options(schema: "pa.Schema", records: "RecordColumn | None") -> dict[str, Any]:
    """Compress all but coded images, and keep least and greatest values of numbers only.

    Those of images would store two of them once more in every block; zstd on coded images gains
    nothing, and on original files it would be credited to the dropping of patches.
    """
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(schema.empty_table(), file)
    found = pq.read_metadata(file).schema
    leaves = [found.column(k).path for k in range(len(found.names))]
    coded = f"{records.name}.data" if records is not None else None
    packed = [leaf for leaf in leaves if leaf != coded]
    numbers = [
        field.name
        for field in schema
        if pa.types.is_primitive(field.type) or pa.types.is_boolean(field.type)
    ]
    return {
        "compression": {leaf: "none" if leaf == coded else "zstd" for leaf in leaves},
        "compression_level": dict.fromkeys(packed, 9),
        "write_statistics": numbers,
    }


def _row_bytes(dataset: "Dataset", picks: Int[ndarray, " k"]) -> int:
    """Estimate the bytes of a row from the first few, files outside the table included."""
    some = dataset.select(picks[:PROBED_ROWS])
    return max(1, (count_bytes(some) or 0) // len(some))


def count_bytes(dataset: "Dataset | Stream") -> int | None:
    """Count the bytes of all rows as uncompressed Arrow data, files outside the table included.

    None for a stream of which no whole pass has been made; `write_subset` makes one.
    """
    if isinstance(dataset, Stream):
        return dataset.n_bytes
    n_bytes = dataset.data.nbytes if dataset._indices is None else 0
    outside = [name for name, kind in dataset.features.items() if hasattr(kind, "embed_storage")]
    if dataset._indices is None and not outside:
        return n_bytes
    columns = dataset.with_format("arrow")
    for table in columns.iter(batch_size=1000):
        n_bytes += table.nbytes if dataset._indices is not None else 0
        for name in outside:
            n_bytes += sum(
                map(_file_bytes, table[name].to_pylist() if _has_paths(table[name]) else [])
            )
    return n_bytes


def _has_paths(column: "pa.ChunkedArray") -> bool:
    """Say whether some files of a column lie outside the table."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type) or not len(column):
        return False
    return any(chunk.field("bytes").null_count for chunk in column.chunks)


def _file_bytes(value: Any) -> int:
    if value is None or value["bytes"] is not None or not value["path"]:
        return 0
    try:
        return Path(value["path"]).stat().st_size
    except OSError:
        return 0


def open_subset(folder: Path) -> "Dataset":
    """Load folder/subset as a datasets.Dataset."""
    return read_parquet(subset_files(folder))


def subset_files(folder: Path) -> list[Path]:
    """List the files of folder/subset.

    Raises:
        InputError: If there are none.
    """
    files = sorted((folder / FOLDER).glob("*.parquet"))
    if not files:
        raise InputError(f"no subset in {folder}")
    return files
