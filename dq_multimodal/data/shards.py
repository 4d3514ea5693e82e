"""The rows of a source in shards, each of which a worker reads without the others."""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, load_dataset, load_dataset_builder
from datasets.table import table_cast

from dq_multimodal.config import SPLIT_NAME, CompressConfig, InputError
from dq_multimodal.data.listing import DataFiles
from dq_multimodal.data.local import NAMES, describe_pins, find_data, is_local, is_saved
from dq_multimodal.data.pixels import image_columns
from dq_multimodal.data.row_files import NO_FILES, admit, named_files
from dq_multimodal.data.source import Source, from_memory, load_source
from dq_multimodal.data.stream import reading
from dq_multimodal.data.text_files import check_utf8
from dq_multimodal.files import expand_home

SHARD_ROWS, SHARD_BYTES, IMAGE_ROWS = 100_000, 2**28, 10_000
"""A shard holds about so many rows (of images: the last) or bytes, or more where there would be
more than MOST_SHARDS."""
MOST_SHARDS = 4000
PROBED_ROWS = 1000
BLOCK_BYTES = 2**26
LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Piece:
    """Rows that are read together: row groups of a parquet file, bytes of a file of JSON lines, or
    rows of a dataset, from start to stop."""

    file: int
    start: int
    stop: int
    n_rows: int
    n_bytes: int


@dataclass(frozen=True)
class Rows:
    """A source, for every worker to read.

    Attributes:
        name: The source, for messages.
        files: Paths or URLs of parquet files or files of JSON lines, in the order of their rows;
            none where the rows are a dataset.
        stamps: What tells of each file whether it was changed.
        dataset: The rows, memory-mapped on every machine, or small.
        shards: Pieces of every shard.
        starts: Number of the first row of every shard, and the number of rows.
    """

    name: str
    files: tuple[str, ...]
    stamps: tuple[str, ...]
    features: Features
    dataset: Dataset | None
    shards: tuple[tuple[Piece, ...], ...]
    starts: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.starts[-1]

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest shard, as far as its files tell."""
        return max(sum(piece.n_bytes for piece in shard) for shard in self.shards)

    def read(self, number: int) -> Dataset:
        """Read the rows of a shard.

        Raises:
            InputError: If they cannot be read, or a file is not the one that was counted.
        """
        pieces = self.shards[number]
        if self.dataset is not None:
            return self.dataset.select(range(pieces[0].start, pieces[-1].stop))
        with reading(self.name):
            table = pa.concat_tables([self._read(piece) for piece in pieces])
            mark = f"{self.stamps[0]}-{number}"
            info = DatasetInfo(features=self.features)
            return admit(Dataset(table, info, fingerprint=mark), NO_FILES, self.name)

    def _read(self, piece: Piece) -> pa.Table:
        address = self.files[piece.file]
        fs, path = fsspec.core.url_to_fs(address)
        if _stamp(fs, path) != self.stamps[piece.file]:
            raise InputError(f"{self.name} has changed while it was read: {Path(path).name}")
        if _is_lines(address):
            table = read_lines(fs.cat_file(path, piece.start, piece.stop))
            origin = f"{Path(path).name} from byte {piece.start:,} on"
            for name in {*self.features} - {*table.column_names}:
                table = table.append_column(name, pa.nulls(len(table)))
            check_types(table, self.features.arrow_schema, origin)
        else:
            origin = Path(path).name
            with fs.open(path, "rb") as file, pq.ParquetFile(file) as source:
                table = source.read_row_groups(range(piece.start, piece.stop))
        for name in sorted({*table.column_names} ^ {*self.features}):
            raise InputError(f"{origin} has other columns than the first rows: {name}")
        if len(table) != piece.n_rows:
            raise InputError(
                f"{Path(path).name} must hold one JSON object a line, got {len(table):,} in "
                f"{piece.n_rows:,} lines"
            )
        return table_cast(table.select(list(self.features)), self.features.arrow_schema)


def _is_lines(address: str) -> bool:
    return address.lower().endswith(LINES)


def _is_utf8(data: bytes) -> bool:
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False


def read_lines(data: bytes) -> pa.Table:
    """Read JSON lines as `datasets` does."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "lines.jsonl")
        file.write_bytes(data)
        found = load_dataset("json", data_files=str(file), split="train", cache_dir=folder)
        return found.with_format("arrow")[:]


def check_types(table: pa.Table, wanted: pa.Schema, origin: str) -> None:
    """Raise where a cast would change values: the types must be those wanted, or null, or int for
    float.
    """
    for name, kind in zip(wanted.names, wanted.types, strict=True):
        found = table.schema.field(name).type
        if not _is_kept(found, kind):
            raise InputError(f"{name} is {found} in {origin}, and {kind} in the first rows")


def _is_kept(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Say whether a cast from one type to another keeps values as they are."""
    if pa.types.is_list(wanted) and pa.types.is_list(found):
        return _is_kept(found.value_type, wanted.value_type)
    if pa.types.is_struct(wanted) and pa.types.is_struct(found):
        names = {part.name for part in found} & {part.name for part in wanted}
        return all(_is_kept(found.field(name).type, wanted.field(name).type) for name in names)
    is_wider = pa.types.is_integer(found) and pa.types.is_floating(wanted)
    return found == wanted or pa.types.is_null(found) or is_wider


STAMPS = ("size", "mtime", "ETag", "etag", "LastModified", "last_modified", "blob_id", "sha256")
"""What file systems say of a file that changes with it."""


def _stamp(fs: Any, path: str) -> str:
    info = fs.info(path)
    return repr([info[name] for name in STAMPS if info.get(name) is not None])


def survey_file(files: list[str], is_hashed: bool, number: int, _: Path) -> dict[str, Any]:
    """Hash one of some files and cut it into pieces; a worker does this.

    Returns:
        Its bytes, sha256 (None unless it is hashed), stamp, and start, stop, rows and bytes of its
        pieces.
    """
    fs, path = fsspec.core.url_to_fs(files[number])
    digest, pieces = hashlib.sha256(), []
    with reading(files[number]), fs.open(path, "rb") as file:
        if _is_lines(path):
            start = 0
            while data := file.read(BLOCK_BYTES):
                data += file.readline()
                digest.update(data)
                if not _is_utf8(data):
                    check_utf8(files[number])
                n_rows = sum(1 for line in data.split(b"\n") if line.strip())
                pieces.append((start, start + len(data), n_rows, len(data)))
                start += len(data)
        else:
            groups = pq.ParquetFile(file).metadata
            for k in range(groups.num_row_groups):
                group = groups.row_group(k)
                pieces.append((k, k + 1, group.num_rows, group.total_byte_size))
            file.seek(0)
            while is_hashed and (data := file.read(BLOCK_BYTES)):
                digest.update(data)
    return {
        "bytes": fs.size(path),
        "sha256": digest.hexdigest() if is_hashed else None,
        "stamp": _stamp(fs, path),
        "pieces": [piece for piece in pieces if piece[2]],
    }


Survey = Callable[[list[str], bool], Iterable[dict[str, Any]]]
"""Has workers survey files, which are hashed or not."""


def open_rows(dataset: Any, request: CompressConfig, survey: Survey) -> tuple[Rows, Source]:
    """Find the rows of a source and cut them into shards; the driver does this.

    Parquet files and files of JSON lines, on disks that all machines see, at URLs and on the Hub,
    are read by the workers. Everything else is loaded here, and the workers map it into memory: its
    files, or those of the cache, have to be visible to them.

    Returns:
        The rows, and a source that holds the first of them, from which columns are told.

    Raises:
        InputError: If they cannot be found or read.
    """
    is_named = isinstance(dataset, str)
    with reading(request.dataset):
        found = find_files(request) if is_named else None
        if found is not None:
            rows, first, source = _open_files(*found, request, survey)
            if not [*named_files(first.data.table, rows.features)]:
                return rows, source
    if not is_named:
        source = from_memory(dataset, request.split, request.image_folder)
    else:
        keys = ("split", "config_name", "revision", "field", "image_folder")
        source = load_source(request.dataset, **{key: getattr(request, key) for key in keys})
    whole = source.dataset
    step = IMAGE_ROWS if image_columns(whole) else SHARD_ROWS
    step = max(step, -(-len(whole) // MOST_SHARDS))
    ends = [*range(step, len(whole), step), len(whole)]
    shards = tuple((Piece(0, a, b, b - a, 0),) for a, b in zip([0, *ends], ends, strict=False))
    rows = Rows(request.dataset, (), ("",), whole.features, whole, shards, (0, *ends))
    return rows, replace(source, dataset=whole.select(range(min(PROBED_ROWS, len(whole)))))


def find_files(
    request: CompressConfig,
) -> tuple[list[str], dict[str, Any], DataFiles | None] | None:
    """Find the files that workers can read, with their origin, and of local ones what they are.

    None where the source is of another kind.
    """
    name, split = request.dataset, request.split
    origin: dict[str, Any] = {"kind": "file", "name": name, "path": name, "split": split}
    data, is_local_name = None, "://" not in name and is_local(name)
    if not re.fullmatch(SPLIT_NAME, split) or request.field or request.image_folder:
        return None
    if "://" in name:
        for key in ("config_name", "revision"):
            if getattr(request, key) is not None:
                raise InputError(f"{key} is for the Hub, and {name} is a URL")
        if split != "train":
            raise InputError(f"files at a URL are the split train, got {split!r}")
        fs, path = fsspec.core.url_to_fs(name)
        found = sorted(fs.find(path) if fs.isdir(path) else fs.glob(path))
        files = [fs.unstrip_protocol(file) for file in found]
        files = [file for file in files if file.lower().endswith((".parquet", *LINES))]
        if not files:
            raise InputError(f"no .parquet or .jsonl files at {name}")
    elif is_local_name and request.revision is None:
        path = expand_home(name)
        if is_saved(path) or (request.config_name is not None and not path.is_dir()):
            return None  # it is refused, or read in another way
        data = find_data(path, name, request.config_name)
        if data.make is not None or split not in data.by_split:
            return None
        files = data.by_split[split]
        origin["kind"] = "folder" if path.is_dir() else "file"
        origin |= {"path": str(path.absolute()), "names": NAMES}
    elif is_local_name:
        return None
    else:
        origin = load_source(
            *(name,), split=split, config_name=request.config_name, revision=request.revision,
            streaming=True,
        ).origin  # fmt: skip
        builder = load_dataset_builder(name, request.config_name, revision=origin["revision"])
        files = list((builder.config.data_files or {}).get(split, []))
    kinds = {"parquet" if f.lower().endswith(".parquet") else _is_lines(f) for f in files}
    return (files, origin, data) if kinds in ({"parquet"}, {True}) else None


def _open_files(
    files: list[str],
    origin: dict[str, Any],
    data: DataFiles | None,
    request: CompressConfig,
    survey: Survey,
) -> tuple[Rows, Dataset, Source]:
    is_hashed = origin["kind"] != "hub"
    found = [*survey(files, is_hashed)]
    pieces = [Piece(k, *piece) for k, part in enumerate(found) for piece in part["pieces"]]
    if not pieces:
        raise InputError(f"{request.dataset} has no rows in split {request.split!r}")
    sizes = [[getattr(piece, name) for piece in pieces] for name in ("n_rows", "n_bytes")]
    limits = [
        max(least, -(-sum(part) // MOST_SHARDS))
        for part, least in zip(sizes, (SHARD_ROWS, SHARD_BYTES), strict=True)
    ]
    fill = np.maximum(*(np.cumsum(s) / limit for s, limit in zip(sizes, limits, strict=True)))
    cuts = np.flatnonzero(np.diff(np.ceil(fill - 1e-9))) + 1
    shards = tuple(
        tuple(pieces[k] for k in part) for part in np.split(np.arange(len(pieces)), cuts)
    )
    starts = (0, *accumulate(sum(piece.n_rows for piece in shard) for shard in shards))
    fs, path = fsspec.core.url_to_fs(files[0])
    if _is_lines(files[0]):
        lines = read_lines(fs.cat_file(path, pieces[0].start, pieces[0].stop))
        features = Features.from_arrow_schema(lines.schema)
    else:
        with fs.open(path, "rb") as file:
            features = Features.from_arrow_schema(pq.read_schema(file))
    stamps = tuple(part["stamp"] for part in found)
    rows = Rows(request.dataset, tuple(files), stamps, features, None, shards, starts)
    first = replace(rows, shards=((pieces[0],),)).read(0)
    if is_hashed:
        names = [file.removeprefix(f"{data.root}/") if data else file for file in files]
        pins = sorted(zip(names, found, strict=True), key=lambda pin: pin[0])
        origin["files"] = describe_pins([(n, f["bytes"], f["sha256"]) for n, f in pins])
    origin["rows"] = rows.n_rows
    first = first.select(range(min(PROBED_ROWS, len(first))))
    return rows, first, Source(first, origin, note=data.note if data else None)
