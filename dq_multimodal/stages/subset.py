"""The kept rows on disk: parquet, all source columns untouched, plus where each row stood."""

import json
import os
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.config import InputError, Method
from dq_multimodal.data.local import read_parquet
from dq_multimodal.data.row_files import NO_FILES, admit, embed, measure_outside, named_files
from dq_multimodal.data.row_sizes import cut_rows, measure_rows
from dq_multimodal.data.stream import Stream, reading
from dq_multimodal.files import first_line, open_parquet

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from dq_multimodal.stages.patching import PatchColumn

FOLDER = "subset"
PART = r"part-\d{5}\.parquet"
"""Names of its files of rows."""
FILE_NAMES = "kept_files.txt"
"""The files that the kept rows came from, a line for each row in the order of the subset."""
PARTIAL = "subset.partial"
OWN_TYPES = {"row": "int64", "bin": "int32", "rank": "int32", "weight": "float32"}
OWN_COLUMNS = tuple(f"dq_{name}" for name in OWN_TYPES)
"""Columns beside those of the source; the weight is there where rows differ in it."""
SHARD_BYTES = 500_000_000
PROBED_ROWS = 64
BLOCK_ROWS, BLOCK_BYTES = 100_000, 64_000_000
"""Rows are read and written (as one row group) in blocks of so many at most, or of one row."""


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
    records: "PatchColumn | None" = None,
    origin: Path | None = None,
    splits: dict[str, int] | None = None,
) -> int:
    """Write rows of a dataset to folder/subset; the folder appears when it is complete.

    Picks are the places of the rows in the dataset; kept is from `read_kept`, and its columns are
    written as dq_row, dq_bin, dq_rank, dq_weight. Records, in the order of picks, take the place of
    a column. Beside the rows lies kept_files.txt where they name files that lie outside the
    dataset, which may be the subset of another run, `origin`. Splits are the source rows of each,
    one after the other; a file holds rows of one split.

    Returns:
        Bytes of the columns of the rows that are not ours, as uncompressed Arrow data.
    """
    import pyarrow.parquet as pq
    from datasets import Features

    features = dict(dataset.features)
    if records is not None:
        features[records.name] = records.feature
    kinds = Features(features)
    contents = kinds.arrow_schema
    schema = Features({**features, **own_features(kept)}).arrow_schema
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    source = dataset.with_format("arrow")
    sizes = measure_picks(dataset, picks)
    ends = np.cumsum([*splits.values()]) if splits else [sys.maxsize]
    edges = [0, *np.searchsorted(kept["row"].to_numpy(), ends).tolist()]
    blocks = [
        (first + start, first + stop)
        for first, last in pairwise(edges)
        for start, stop in cut_rows(sizes[first:last], BLOCK_ROWS, BLOCK_BYTES)
    ]
    n_bytes, n_shards, shard_bytes = 0, 0, 0
    writer = None
    try:
        for start, stop in tqdm(blocks, desc="write", unit="block"):
            if writer is not None and (start in edges or shard_bytes >= SHARD_BYTES):
                writer.close()
                writer, n_shards, shard_bytes = None, n_shards + 1, 0
            table = source[picks[start:stop].tolist()]
            if records is not None:
                at = table.column_names.index(records.name)
                table = table.set_column(at, records.name, records.slice(start, len(table)))
            table = embed(conform(table, contents), kinds)
            n_bytes += table.nbytes
            shard_bytes += table.nbytes
            for name in kept.column_names:
                table = table.append_column(f"dq_{name}", kept[name].slice(start, stop - start))
            if writer is None:
                path = partial / f"part-{n_shards:05d}.parquet"
                options = writer_options(schema, records.name if records is not None else None)
                writer = pq.ParquetWriter(path.absolute(), schema, **options)  # a:b is no address
            writer.write_table(conform(table, schema))
        if isinstance(source, Stream):
            source.finish()
    finally:
        if writer is not None:
            writer.close()
    names = name_files(dataset, origin)
    if any(names):
        lines = [names[row] for row in picks.tolist()]
        (partial / FILE_NAMES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path in partial.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    partial.replace(folder / FOLDER)
    return n_bytes


def name_files(dataset: "Dataset | Stream", origin: Path | None = None) -> list[str]:
    """Name the file that each row came from, "" where it is unknown; nothing if all are.

    Of rows that name several files it is the first. Names that are no plain text are quoted as
    JSON. The rows of a stream no longer name theirs. Those of a subset its run names, `origin`.
    """
    if origin is not None:
        place = origin / FOLDER / FILE_NAMES
        try:
            names = place.read_text(encoding="utf-8").split("\n")[:-1] if place.is_file() else []
        except UnicodeDecodeError:
            names = ["not UTF-8"] * (len(dataset) + 1)
        if names and len(names) != len(dataset):
            raise InputError(
                f"{place} does not hold a line for each row: it is not what was written"
            )
        return names
    if isinstance(dataset, Stream):
        return []
    found: dict[int, str] = {}
    for _, rows, paths in named_files(dataset.data.table, dataset.features):
        for row, path in zip(rows.tolist(), paths, strict=True):
            found.setdefault(row, path if path.isprintable() else json.dumps(path))
    if not found:
        return []
    places = range(len(dataset))
    if dataset._indices is not None:
        places = dataset._indices.column(0).to_pylist()
    return [found.get(place, "") for place in places]


def own_features(kept: "pa.Table") -> dict[str, Any]:
    """Give the types of the columns that a subset has beside those of the source."""
    from datasets import Value

    return {f"dq_{name}": Value(OWN_TYPES[name]) for name in kept.column_names}


def conform(table: "pa.Table", schema: "pa.Schema") -> "pa.Table":
    """Give a table the types of a schema; Arrow's cast breaks slices of structs that hold nulls."""
    if table.schema.equals(schema):
        return table.replace_schema_metadata(schema.metadata)
    return table.combine_chunks().cast(schema)


def writer_options(schema: "pa.Schema", column: str | None) -> dict[str, Any]:
    """Compress all but coded images, and keep least and greatest values of numbers only.

    Those of images would store two of them once more in every block; zstd on coded images gains
    nothing, and on original files it would be credited to the dropping of patches. The first bytes
    of coded images, which are the same for all of one shape, are stored once.
    """
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.ParquetWriter(file, schema).close()  # an empty table of extension types cannot be made
    found = pq.read_metadata(file).schema
    leaves = [found.column(k).path for k in range(len(found.names))]
    coded = f"{column}.data" if column is not None else None
    packed = [leaf for leaf in leaves if leaf != coded]
    is_number = {
        field.name: pa.types.is_primitive(field.type) or pa.types.is_boolean(field.type)
        for field in schema
    }
    return {
        "compression": {leaf: "none" if leaf == coded else "zstd" for leaf in leaves},
        "compression_level": dict.fromkeys(packed, 9),
        "write_statistics": [name for name in is_number if is_number[name]],
        "use_dictionary": packed,
        "column_encoding": {coded: "DELTA_BYTE_ARRAY"} if coded is not None else None,
    }


def measure_picks(
    dataset: "Dataset | Stream", picks: Int[ndarray, " k"] | None = None
) -> Int[ndarray, " k"]:
    """Give the bytes of some rows, None for all, files outside the table included.

    Those of a stream are all taken to be like its first few.
    """
    picks = np.arange(len(dataset)) if picks is None else picks
    if isinstance(dataset, Stream):
        some = dataset.select(picks[:PROBED_ROWS])
        return np.full(len(picks), some.data.nbytes // len(some) + 1)
    places = picks if dataset._indices is None else dataset._indices.column(0).to_numpy()[picks]
    outside = measure_outside(dataset.data.table, dataset.features, places)
    return measure_rows(dataset)[picks] + outside


def count_bytes(dataset: "Dataset | Stream") -> int | None:
    """Count the bytes of all rows as uncompressed Arrow data, files outside the table included.

    None for a stream of which no whole pass has been made; `write_subset` makes one.
    """
    if isinstance(dataset, Stream):
        return dataset.passes.n_bytes
    if dataset._indices is None:
        outside = measure_outside(dataset.data.table, dataset.features)
        return dataset.data.nbytes + int(outside.sum())
    columns = dataset.with_format("arrow")
    blocks = cut_rows(measure_rows(dataset), 1000, BLOCK_BYTES)
    tables = (columns[start:stop] for start, stop in blocks)
    return sum(t.nbytes + int(measure_outside(t, dataset.features).sum()) for t in tables)


def open_subset(folder: Path) -> "Dataset":
    """Load folder/subset as a datasets.Dataset.

    Raises:
        InputError: If there is none, it cannot be read, or a row names a file: `write_subset` puts
            all into it.
    """
    name = f"the subset of {folder}"
    with reading(name):
        return admit(read_parquet(subset_files(folder)), NO_FILES, name)


def subset_files(folder: Path) -> list[Path]:
    """List the files of folder/subset.

    Raises:
        InputError: If there are none, or others than a run writes.
    """
    files = sorted((folder / FOLDER).glob("*.parquet"))
    if not files:
        raise InputError(f"no subset in {folder}")
    for file in files:
        if not re.fullmatch(PART, file.name) or not file.is_file():  # a pipe has no end
            raise InputError(f"{file} was not written by a run: move it away")
    return files


def files_by_split(folder: Path, splits: dict[str, int]) -> dict[str, list[str]]:
    """Name the files of folder/subset that hold the rows of each split, by their first row."""
    ends, found = np.cumsum([*splits.values()]), dict[str, list[str]]()
    for path in subset_files(folder):
        with open_parquet(path) as file:
            row = file.read_row_group(0, columns=["dq_row"])["dq_row"][0].as_py()
        split = [*splits][int(np.searchsorted(ends, row, side="right"))]
        found.setdefault(split, []).append(f"{FOLDER}/{path.name}")
    return found


def read_numbers(folder: Path, n_rows: int) -> "pa.Table":
    """Read dq_row, dq_bin, dq_rank and, if it is there, dq_weight of folder/subset.

    Raises:
        InputError: If it does not have n rows, has other columns, or cannot be read.
    """
    import pyarrow as pa

    tables: list[pa.Table] = []
    try:
        for path in subset_files(folder):
            with open_parquet(path) as file:
                has_weight = "dq_weight" in file.schema_arrow.names
                schema = pa.schema([*zip(OWN_COLUMNS, OWN_TYPES.values(), strict=True)])
                schema = schema if has_weight else schema.remove(len(schema) - 1)
                found = sum(map(len, tables)) + file.metadata.num_rows
                if found > n_rows:
                    break
                tables.append(file.read(columns=schema.names).replace_schema_metadata())
            if not tables[-1].schema.equals(schema):
                raise InputError(
                    f"the subset of {folder} must have {schema}, got {tables[-1].schema}"
                )
        if found != n_rows:
            raise InputError(f"the subset of {folder} does not have {n_rows:,} rows")
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read the subset of {folder}: {first_line(error)}") from error
    return pa.concat_tables(tables)


def is_of_kept(written: "pa.Table", kept: "pa.Table", method: Method) -> bool:
    """Say whether `read_numbers` found the numbers and weights of the kept rows, `read_kept`.

    Earlier releases wrote no weights of adq.
    """
    wanted = kept.rename_columns([f"dq_{name}" for name in kept.column_names])
    if method == "adq" and "dq_weight" not in written.column_names:
        wanted = wanted.drop_columns(["dq_weight"])
    return written.equals(wanted)
