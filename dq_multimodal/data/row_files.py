"""Files that rows name: which of them a source may name, and the only place that opens them."""

import hashlib
import operator
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from datasets import Dataset, Features, Value
from datasets.features.features import _visit
from datasets.fingerprint import update_fingerprint
from datasets.table import InMemoryTable
from huggingface_hub import metadata_load
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.files import expand_home, first_line, parse_yaml, read_text

Change = Callable[[str, pa.StructArray, Any, Int[ndarray, " n"]], pa.StructArray]
"""Given column, structs of bytes and path, type and rows; gives the same object if all stays."""
BYTE_KINDS = ("binary", "large_binary", "binary_view", "null")
TEXT_KINDS = ("string", "large_string", "string_view")
PACKERS = ("zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd")
CARD_FILES = ("README.md", ".huggingface.yaml")
"""Files in which a dataset says which its data files are."""
MAX_PLACES, MAX_CARD_BYTES = 100_000, 1_000_000
SHOWN = 120
"""Characters of a path that a message shows."""

ROOTED = r"^[~/\\]|^\.\.[/\\]|^[A-Za-z][A-Za-z0-9+.-]*:[/\\]"
"""Paths that tell folders of a machine, and addresses."""

_UNZIPPING = Lock()
_BROKEN = (KeyError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


def is_file_struct(kind: Any) -> bool:
    """Say whether a plain struct holds a file, as parquet that another writer made holds images."""
    if not isinstance(kind, dict) or kind.keys() != {"bytes", "path"}:
        return False
    data, path = (getattr(kind[name], "dtype", None) for name in ("bytes", "path"))
    return data in BYTE_KINDS + TEXT_KINDS and path in (*TEXT_KINDS, "null")


def _is_media(kind: Any) -> bool:
    return hasattr(kind, "embed_storage")


def has_files(kind: Any) -> bool:
    """Say whether values of a type hold files, at any depth."""
    if _is_media(kind) or is_file_struct(kind):
        return True
    parts = kind.values() if isinstance(kind, dict) else [getattr(kind, "feature", None)]
    return any(has_files(part) for part in parts if part is not None)


@dataclass(frozen=True)
class RowFiles:
    """Which files the rows of a source may name; by default none.

    Attributes:
        files: The data files of the source.
        home: Folder of the source, where a file that a row names may also be missing.
        roots: What the names of its files begin with: the repository's place in the cache and on
            the Hub.
        folder: Folder given by the user, in which any file may be named.
        is_own: The rows were made by the user: any file of this machine.
    """

    files: frozenset[str] = frozenset()
    home: str | None = None
    roots: tuple[str, ...] = ()
    folder: str | None = None
    is_own: bool = False

    @cached_property
    def _real_folder(self) -> str:
        return os.path.realpath(self.folder or "")

    def find(self, path: str) -> str | None:
        """Give where the file lies that a row names; None for one that it may not name."""
        if "\0" in path:
            return None
        member, _, container = path.rpartition("::")
        if member:
            is_zip = member.startswith("zip://") and self.find(container) == container
            return path if is_zip else None
        is_plain = ".." not in path.split("/")
        if path in self.files or (is_plain and path.startswith(self.roots)):
            return path
        if "://" in path:
            return None
        if self.home and is_plain and path.startswith(self.home + os.sep):
            return None if os.path.lexists(path) else path
        if self.folder is not None:
            place = os.path.join(self.folder, path)  # noqa: PTH118 - keeps what is absolute
            real = os.path.realpath(place)
            is_inside = real.startswith(os.path.join(self._real_folder, ""))  # noqa: PTH118
            return place if is_inside and _may_open(real) else None
        return path if self.is_own and _may_open(path) else None


NO_FILES = RowFiles()


def _may_open(path: str) -> bool:
    """Say whether a path is a regular file, or missing: nothing that hangs or never ends."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:
        return True


def allow_folder(image_folder: str | None) -> RowFiles:
    """Allow files in the folder that the user gave, or none; InputError if it is no folder."""
    if image_folder is None:
        return NO_FILES
    folder = expand_home(image_folder).absolute()
    if not folder.is_dir():
        raise InputError(f"image_folder must be a folder, got {image_folder}")
    return RowFiles(folder=os.path.normpath(folder))


def read_card(folder: Path, name: str, repository: str | None = None) -> dict[str, Any]:
    """Read what the card of a dataset says for `datasets`, and check that its data is its own.

    Args:
        folder: Where README.md and .huggingface.yaml lie, as far as there are any.
        name: The source, for messages.
        repository: OWNER/NAME on the Hub.

    Raises:
        InputError: If it cannot be read, or names data outside its folder or repository.
    """
    card, beside = (folder / file for file in CARD_FILES)
    try:
        found = (metadata_load(card) if card.is_file() else None) or {}
        more = (parse_yaml(read_text(beside, MAX_CARD_BYTES)) if beside.is_file() else None) or {}
        if not isinstance(more, dict):
            raise InputError(f"{beside} must hold keys and values")
        found |= more
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the card of {name}: {first_line(error)}") from error
    configs = found.get("configs")
    configs = [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    pending = [config.get(key) for config in configs for key in ("data_files", "data_dir")]
    n_places = len(pending)
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            n_places += len(value)
            if n_places > MAX_PLACES:  # YAML aliases make a short card name billions, or itself
                raise InputError(
                    f"the README.md of {name} names more than {MAX_PLACES:,} places of data"
                )
            pending += value.values() if isinstance(value, dict) else value
        elif value and not _is_inside(str(value).replace("\\", "/"), repository):
            raise InputError(
                f"the README.md of {name} names data outside it: {_show(str(value))}: give that "
                "data itself, if you trust it"
            )
    return found


def _is_inside(path: str, repository: str | None) -> bool:
    """Say whether a path in a card stays in the folder or the repository of that card."""
    *hops, place = path.split("::")
    of_hub = f"hf://datasets/{repository}"
    if repository and place.startswith((of_hub + "/", of_hub + "@")):
        place = place.removeprefix("hf://")
    if os.path.isabs(place) or "://" in place or ".." in place.split("/"):  # noqa: PTH117
        return False
    return all(hop.partition("://")[0] in PACKERS for hop in hops)


def admit(dataset: Dataset, own: RowFiles, name: str) -> Dataset:
    """Check all files that rows name, and give the dataset with the places where these lie.

    InputError if a row names a file that it may not name.
    """
    table, features = dataset.data.table, dataset.features
    numbers = np.arange(len(table))
    if dataset._indices is not None:
        numbers = np.full(len(table), -1)
        numbers[dataset._indices.column(0).to_numpy()] = np.arange(len(dataset))
    places = _check(table, features, own, name, numbers)
    if not places or not (own.folder or own.is_own):
        return dataset

    def move(_: str, file: pa.StructArray, *__: Any) -> pa.StructArray:
        """Name the place where each file lies, in a struct that can hold its bytes."""
        data, path, is_named = _field(file, "bytes"), _field(file, "path"), _is_named(file)
        data = data if "binary" in str(data.type) else data.cast(pa.binary())
        moved = [places.get(name, name) for name in path.filter(is_named).to_pylist()]
        return _pack(file, data, _replace(path, is_named, moved))

    wide = widen(features)
    info = dataset.info.copy()
    info.features = wide
    mark = update_fingerprint(dataset._fingerprint, "row_files", {"folder": own.folder})
    moved = InMemoryTable(_change_files(table, features, move, wide))
    return Dataset(moved, info, dataset.split, dataset._indices, mark)


def _check(
    table: pa.Table, features: Features, own: RowFiles, name: str, numbers: Int[ndarray, " n"]
) -> dict[str, str]:
    """Give where the files lie that rows name; InputError for one that they may not name.

    Args:
        numbers: Number of each row in the source, for messages; -1 leaves one out.
    """
    places: dict[str, str] = {}
    for column, rows, paths in named_files(table, features):
        for row, path in zip(numbers[rows].tolist(), paths, strict=True):
            if path in places or row < 0:
                continue
            place = own.find(path)
            if place is None:
                raise InputError(
                    f"row {row} of {name} names a file that is none of its own, in the column "
                    f"{column}: {_show(path)}: files in a folder that you trust are read with "
                    "--image-folder DIR"
                )
            places[path] = place
    return places


def embed(
    table: pa.Table,
    features: Features,
    own: RowFiles | None = None,
    name: str = "",
    start: int = 0,
) -> pa.Table:
    """Put the files that rows name into a table, and leave no folder of this machine in it.

    Args:
        own: Which files its rows may name; None for rows that were checked.
        name: The source, for messages.
        start: Number of its first row in the source.

    Raises:
        InputError: If a row names a file that it may not name.
    """
    numbers = np.arange(start, start + len(table))
    places = {} if own is None else _check(table, features, own, name, numbers)

    def read(_: str, file: pa.StructArray, kind: Any, __: Any) -> pa.StructArray:
        """Read the named files; paths become base names, in plain structs those named or rooted."""
        data, path, is_named = _field(file, "bytes"), _field(file, "path"), _is_named(file)
        is_long = pc.match_substring_regex(path, f"/|{ROOTED}" if _is_media(kind) else ROOTED)
        is_long = pc.or_(pc.fill_null(is_long, False), is_named)
        if not is_long.true_count:
            return file
        named = path.filter(is_named).to_pylist()
        data = _replace(data, is_named, [read_file(places.get(p, p)) for p in named])
        long = path.filter(is_long).to_pylist()
        short = [re.split(r"[/\\]", p.rpartition("::")[0] or p)[-1] for p in long]
        return _pack(file, data, _replace(path, is_long, short))

    return _shorten_urls(_change_files(table, features, read))


def _shorten_urls(table: pa.Table) -> pa.Table:
    """Leave folders of this machine out of the column that names the tar files of webdataset."""
    if not {"__key__", "__url__"} <= {*table.column_names}:
        return table
    at = table.column_names.index("__url__")
    short = pc.replace_substring_regex(table.column(at), r"(?s)^/.*/", "")
    return table.set_column(at, table.schema.field(at), short)


def hash_files(tables: Iterable[pa.Table], features: Features) -> str:
    """Give one SHA-256 of all files in the rows of checked tables, and of those that they name."""
    found = hashlib.sha256()

    def note(column: str, file: pa.StructArray, _: Any, rows: Any) -> pa.StructArray:
        for row, value in zip(rows.tolist(), file, strict=True):
            data = read_bytes(value.as_py())
            found.update(f"{column} {row} {data and len(data)} ".encode())
            found.update(data or b"")
        return file

    for table in tables:
        for column, kind in features.items():
            for chunk in table[column].chunks:  # whose rows are counted anew
                _change_files(pa.table({column: chunk}), {column: kind}, note)
    return found.hexdigest()


def measure_outside(
    table: pa.Table, features: Features, rows: Int[ndarray, " k"] | None = None
) -> Int[ndarray, " k"]:
    """Give the bytes of the files that each of some rows names; None is all rows."""
    sizes = np.zeros(len(table), dtype=np.int64)
    asked = range(len(table)) if rows is None else {*rows.tolist()}
    for _, at, paths in named_files(table, features):
        for row, path in zip(at.tolist(), paths, strict=True):
            sizes[row] += _size_of(path) if row in asked else 0
    return sizes if rows is None else sizes[rows]


def named_files(
    table: pa.Table, features: Features
) -> list[tuple[str, Int[ndarray, " n"], list[str]]]:
    """Give column, row numbers and names of the files that lie outside a table, part by part."""
    found = []

    def note(column: str, file: pa.StructArray, _: Any, rows: Any) -> pa.StructArray:
        is_named = _is_named(file)
        if is_named.true_count:
            paths = _field(file, "path").filter(is_named).to_pylist()
            found.append((column, rows[is_named.to_numpy(zero_copy_only=False)], paths))
        return file

    _change_files(table, features, note)
    return found


def widen(features: Features) -> Features:
    """Give plain structs of files a type that can hold their bytes."""

    def change(kind: Any) -> Any:
        is_narrow = is_file_struct(kind) and "binary" not in kind["bytes"].dtype
        return {**kind, "bytes": Value("binary")} if is_narrow else kind

    return Features({name: _visit(kind, change) for name, kind in features.items()})


def read_bytes(value: Any) -> bytes | None:
    """Give the bytes of a file as `datasets.Image(decode=False)` holds it, of a checked row.

    None where the row has no file; empty where its file is missing, empty or out of reach.
    """
    if value is None:
        return None
    if value["bytes"] is not None:
        return value["bytes"]
    return read_file(value["path"]) if value["path"] else None


def read_file(path: str) -> bytes:
    """Read a file, a member of a zip file, or a file of a repository on the Hub.

    Its bytes are none where it is missing or broken, or no regular file; OSError if the Hub fails.
    """
    member, _, container = path.rpartition("::")
    try:
        if member:
            with _UNZIPPING:  # one file handle serves all threads
                return _open_zip(*_pin(container)).read(member.removeprefix("zip://"))
        if path.startswith("hf://"):
            return _open_hub(path).read()
        _pin(path)
        return Path(path).read_bytes()
    except OSError as error:
        if "hf://" in path and not isinstance(error, FileNotFoundError):
            raise
    except _BROKEN:
        pass
    return b""


def _size_of(path: str) -> int:
    """Give the bytes of a file on this disk or of a member of a zip file; 0 where it is missing."""
    member, _, container = path.rpartition("::")
    try:
        if member:
            return _open_zip(*_pin(container)).getinfo(member.removeprefix("zip://")).file_size
        return Path(path).stat().st_size
    except (OSError, *_BROKEN):
        return 0


def _open_hub(path: str) -> Any:
    return fsspec.filesystem("hf").open(path, "rb")


def _pin(path: str) -> tuple[Any, ...]:
    """Say what an open zip file must not outlive; OSError for what is no regular file."""
    if path.startswith("hf://"):
        return path, os.getpid()
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"no regular file: {path}")
    return path, os.getpid(), found.st_mtime_ns, found.st_size


@lru_cache(maxsize=16)
def _open_zip(path: str, *_: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(_open_hub(path) if path.startswith("hf://") else path)


def _show(path: str) -> str:
    return repr(path if len(path) <= SHOWN else path[:SHOWN] + "…")


def _field(file: pa.StructArray, name: str) -> pa.Array:
    found = pc.struct_field(file, name)
    return found.cast(pa.string()) if name == "path" else found


def _is_named(file: pa.StructArray) -> pa.BooleanArray:
    """Mark the values that have a path and no bytes."""
    is_bare = _field(file, "bytes").is_null()
    if not is_bare.true_count:
        return is_bare
    return pc.and_(is_bare, pc.fill_null(pc.not_equal(_field(file, "path"), ""), False))


def _change_files(
    table: pa.Table, features: Any, change: Change, wide: Features | None = None
) -> pa.Table:
    """Change the structs of bytes and path in a table, which may take wider types by that."""
    for column, kind in features.items():
        chunks = table[column].chunks if has_files(kind) else []
        rows = np.split(np.arange(len(table)), np.cumsum([len(chunk) for chunk in chunks])[:-1])
        change_here = partial(change, column)
        changed = [_change(c, kind, change_here, part) for c, part in zip(chunks, rows)]  # noqa: B905
        if not all(map(operator.is_, changed, chunks)):
            field = table.schema.field(column)
            if wide is not None:
                field = field.with_type(wide.arrow_schema.field(column).type)
            cast = [new.cast(field.type) for new in changed]
            at = table.column_names.index(column)
            table = table.set_column(at, field, pa.chunked_array(cast, field.type))
    return table


def _change(
    array: pa.Array, kind: Any, change: Callable[..., pa.Array], rows: Int[ndarray, " n"]
) -> pa.Array:
    """Change the structs of bytes and path in an array; the same object where nothing changes."""
    if _is_media(kind) or is_file_struct(kind):
        return change(array, kind, rows)
    if not has_files(kind):
        return array
    if isinstance(kind, dict):
        names = [field.name for field in array.type]
        old = [pc.struct_field(array, name) for name in names]
        new = [_change(part, kind[name], change, rows) for name, part in zip(names, old)]  # noqa: B905
        is_same = all(map(operator.is_, new, old))
        return array if is_same else pa.StructArray.from_arrays(new, names, mask=array.is_null())
    items = pc.list_flatten(array)
    changed = _change(items, kind.feature, change, rows[pc.list_parent_indices(array).to_numpy()])
    if changed is items:
        return array
    sizes = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    return pa.LargeListArray.from_arrays(offsets, changed, mask=array.is_null())


def _replace(array: pa.Array, mask: pa.BooleanArray, values: list[Any]) -> pa.Array:
    return pc.replace_with_mask(array, mask, pa.array(values, array.type)) if values else array


def _pack(file: pa.StructArray, data: pa.Array, path: pa.Array) -> pa.StructArray:
    names = [field.name for field in file.type]
    parts = [data if name == "bytes" else path for name in names]
    return pa.StructArray.from_arrays(parts, names, mask=file.is_null())
