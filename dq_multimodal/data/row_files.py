"""Files that rows name: which of them a source may name, and the only place that opens them."""

import hashlib
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal.config import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

Change = Callable[["pa.StructArray", Any], "pa.StructArray"]
"""Changes structs of bytes and path of some type; gives the same object where nothing changes."""

BYTE_KINDS = ("binary", "large_binary", "binary_view", "null")
TEXT_KINDS = ("string", "large_string", "string_view")
PACKERS = ("zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd")
CARD_FILES = ("README.md", ".huggingface.yaml")
"""Files in which a dataset says which its data files are."""
MAX_PLACES = 100_000
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


def _item(kind: Any) -> Any:
    return kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)


def has_files(kind: Any) -> bool:
    """Say whether values of a type hold files, at any depth."""
    if kind is None or _is_media(kind) or is_file_struct(kind):
        return kind is not None
    parts = list(kind.values()) if isinstance(kind, dict) else [_item(kind)]
    return any(has_files(part) for part in parts)


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


def folder_files(image_folder: str | None) -> RowFiles:
    """Allow files in the folder that the user gave, or none.

    Raises:
        InputError: If it is no folder.
    """
    if image_folder is None:
        return RowFiles()
    folder = os.path.abspath(os.path.expanduser(image_folder))  # noqa: PTH100, PTH111
    if not Path(folder).is_dir():
        raise InputError(f"image_folder must be a folder, got {image_folder}")
    return RowFiles(folder=folder)


def check_configs(configs: Any, name: str, repository: str | None = None) -> None:
    """Raise if the configurations in a dataset card name data outside its folder or repository.

    Args:
        configs: What the card says.
        name: The source, for the message.
        repository: OWNER/NAME on the Hub.
    """
    of_hub = f"hf://datasets/{repository}"
    n_places = 0

    def check(value: Any) -> None:
        nonlocal n_places
        n_places += 1
        if n_places > MAX_PLACES:  # YAML aliases make a short card name billions
            raise InputError(
                f"the README.md of {name} names more than {MAX_PLACES:,} places of data"
            )
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                check(part)
            return
        *hops, place = str(value).replace("\\", "/").split("::")
        if repository and place.startswith((of_hub + "/", of_hub + "@")):
            place = place.removeprefix("hf://")
        is_inside = not (place.startswith("/") or "://" in place or ".." in place.split("/"))
        is_inside &= not os.path.isabs(place)  # noqa: PTH117 - drives
        if not is_inside or any(hop.partition("://")[0] not in PACKERS for hop in hops):
            raise InputError(
                f"the README.md of {name} names data outside it: {_shown(str(value))}: give that "
                "data itself, if you trust it"
            )

    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            check([config[key] for key in ("data_files", "data_dir") if config.get(key)])


def read_configs(files: list[Path]) -> list[Any]:
    """Give the configurations that the card of a dataset and its .huggingface.yaml name."""
    import yaml
    from huggingface_hub import DatasetCard

    found: list[Any] = []
    for file in files:
        if file.is_file():
            try:
                values = (
                    DatasetCard.load(file).data.to_dict()
                    if file.name == CARD_FILES[0]
                    else yaml.safe_load(file.read_text(encoding="utf-8"))
                )
                found += (values or {}).get("configs") or []
            except (ValueError, TypeError, AttributeError, yaml.YAMLError):
                continue  # `datasets` says what is wrong
    return found


def admit(dataset: "Dataset", own: RowFiles, name: str) -> "Dataset":
    """Check all files that rows name, and give the dataset with the places where these lie.

    Raises:
        InputError: If a row names a file that it may not name.
    """
    from datasets import Dataset
    from datasets.fingerprint import update_fingerprint
    from datasets.table import InMemoryTable

    table, features = dataset.data.table, dataset.features
    indices = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
    places: dict[str, str | None] = {}
    for column, rows, paths in named_files(table, features):
        places |= {path: own.find(path) for path in set(paths) - places.keys()}
        bad = {int(r): p for r, p in zip(rows, paths, strict=True) if places[p] is None}
        at = list(bad) if indices is None else np.flatnonzero(np.isin(indices, list(bad))).tolist()
        if at:
            raise _refuse(name, column, at[0], bad[at[0] if indices is None else indices[at[0]]])
    if not places or not (own.folder or own.is_own):
        return dataset
    wide = widen(features)
    moved = _map_files(table, features, lambda file, _: _move(file, places), wide)
    info = dataset.info.copy()
    info.features = wide
    mark = update_fingerprint(dataset._fingerprint, "row_files", {"folder": own.folder})
    return Dataset(InMemoryTable(moved), info, dataset.split, dataset._indices, mark)


def embed(
    table: "pa.Table",
    features: "Features",
    own: RowFiles | None = None,
    name: str = "",
    start: int = 0,
) -> "pa.Table":
    """Put the files that rows name into a table, and leave no folder of this machine in it.

    Args:
        table: Of the types of features.
        features: Its columns.
        own: Which files its rows may name; None for rows that were checked.
        name: The source, for messages.
        start: Row number of its first row.

    Raises:
        InputError: If a row names a file that it may not name.
    """
    if own is not None:
        for column, rows, paths in named_files(table, features):
            for row, path in zip(rows.tolist(), paths, strict=True):
                if own.find(path) is None:
                    raise _refuse(name, column, start + row, path)
    return _shorten_urls(_map_files(table, features, lambda file, kind: _embed(file, kind, own)))


def _shorten_urls(table: "pa.Table") -> "pa.Table":
    """Leave folders of this machine out of the column that names the tar files of webdataset."""
    import pyarrow as pa

    if not {"__key__", "__url__"} <= {*table.column_names}:
        return table
    at = table.column_names.index("__url__")
    coded = table.column(at).combine_chunks().dictionary_encode()
    urls = coded.dictionary.to_pylist()
    names = [Path(url).name if Path(url).is_absolute() else url for url in urls]
    short = pa.array(names, coded.dictionary.type).take(coded.indices)
    return table.set_column(at, table.schema.field(at), short)


def hash_files(tables: "Iterable[pa.Table]", features: "Features") -> str:
    """Give one SHA-256 of all files in the rows of checked tables, and of those that they name."""
    found = hashlib.sha256()
    for table in tables:
        for column, kind in features.items():
            for chunk in table[column].chunks if has_files(kind) else ():
                for file, rows in _find_files(chunk, kind, np.arange(len(chunk))):
                    for row, value in zip(rows.tolist(), file, strict=True):
                        data = read_bytes(value.as_py())
                        found.update(f"{column} {row} {data and len(data)} ".encode())
                        found.update(data or b"")
    return found.hexdigest()


def count_outside(table: "pa.Table", features: "Features") -> int:
    """Count the bytes of the files that rows name."""
    return sum(_size_of(path) for _, _, paths in named_files(table, features) for path in paths)


def measure_outside(
    table: "pa.Table", features: "Features", rows: Int[ndarray, " k"]
) -> Int[ndarray, " k"]:
    """Give the bytes of the files that each of some rows names."""
    sizes = np.zeros(len(table), dtype=np.int64)
    is_asked = np.zeros(len(table), dtype=bool)
    is_asked[rows] = True
    for _, at, paths in named_files(table, features):
        asked = np.flatnonzero(is_asked[at])
        np.add.at(sizes, at[asked], [_size_of(paths[k]) for k in asked])
    return sizes[rows]


def named_files(
    table: "pa.Table", features: "Features"
) -> Iterator[tuple[str, Int[ndarray, " n"], list[str]]]:
    """Yield column, row numbers and names of the files that lie outside a table, part by part."""
    for column, kind in features.items():
        start = 0
        for chunk in table[column].chunks if has_files(kind) else ():
            rows = np.arange(start, start + len(chunk))
            for file, at in _find_files(chunk, kind, rows):
                is_named = _is_named(file)
                if is_named.true_count:
                    named = is_named.to_numpy(zero_copy_only=False)
                    yield column, at[named], _field(file, "path").filter(is_named).to_pylist()
            start += len(chunk)


def widen(features: "Features") -> "Features":
    """Give plain structs of files a type that can hold their bytes."""
    from datasets import Features, Value

    def change(kind: Any) -> Any:
        if is_file_struct(kind):
            is_narrow = "binary" not in kind["bytes"].dtype
            return {**kind, "bytes": Value("binary")} if is_narrow else kind
        if _is_media(kind) or not has_files(kind):
            return kind
        if isinstance(kind, dict):
            return {name: change(part) for name, part in kind.items()}
        if isinstance(kind, list):
            return [change(kind[0])]
        kind = copy(kind)
        kind.feature = change(kind.feature)
        return kind

    return Features({name: change(kind) for name, kind in features.items()})


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

    Returns:
        Its bytes; none where it is missing or broken, or no regular file.

    Raises:
        OSError: If the Hub fails.
    """
    member, _, container = path.rpartition("::")
    try:
        if member:
            with _UNZIPPING:  # one file handle serves all threads
                return _open_zip(*_pin(container)).read(member.removeprefix("zip://"))
        if path.startswith("hf://"):
            return _open_hub(path).read()
        return Path(path).read_bytes() if stat.S_ISREG(Path(path).stat().st_mode) else b""
    except OSError as error:
        if "hf://" in path and not isinstance(error, FileNotFoundError):
            raise
        return b""
    except _BROKEN:
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
    import fsspec

    return fsspec.filesystem("hf").open(path, "rb")


def _pin(path: str) -> tuple[Any, ...]:
    """Say what an open zip file must not outlive: the file as it is, and this process.

    Raises:
        OSError: If it is no regular file.
    """
    if path.startswith("hf://"):
        return path, os.getpid()
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"no regular file: {path}")
    return path, os.getpid(), found.st_mtime_ns, found.st_size


@lru_cache(maxsize=16)
def _open_zip(path: str, *_: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(_open_hub(path) if path.startswith("hf://") else path)


def _refuse(name: str, column: str, row: int, path: str) -> InputError:
    return InputError(
        f"row {row} of {name} names a file that is none of its own, in the column {column}: "
        f"{_shown(path)}: files in a folder that you trust are read with --image-folder DIR"
    )


def _shown(path: str) -> str:
    return repr(path if len(path) <= SHOWN else path[:SHOWN] + "…")


def _field(file: "pa.StructArray", name: str) -> "pa.Array":
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.struct_field(file, name)
    return found.cast(pa.string()) if name == "path" else found


def _is_named(file: "pa.StructArray") -> "pa.BooleanArray":
    """Mark the values that have a path and no bytes."""
    import pyarrow.compute as pc

    is_bare = _field(file, "bytes").is_null()
    if not is_bare.true_count:
        return is_bare
    return pc.and_(is_bare, pc.fill_null(pc.not_equal(_field(file, "path"), ""), False))


def _find_files(
    array: "pa.Array", kind: Any, rows: Int[ndarray, " n"]
) -> Iterator[tuple["pa.StructArray", Int[ndarray, " m"]]]:
    """Yield the structs of bytes and path in an array, with the row of each value."""
    import pyarrow.compute as pc

    if _is_media(kind) or is_file_struct(kind):
        yield array, rows
    elif isinstance(kind, dict):
        for name, part in kind.items():
            if has_files(part):
                yield from _find_files(pc.struct_field(array, name), part, rows)
    else:
        parents = pc.list_parent_indices(array).to_numpy()
        yield from _find_files(pc.list_flatten(array), _item(kind), rows[parents])


def _map_files(
    table: "pa.Table", features: "Features", change: Change, wide: "Features | None" = None
) -> "pa.Table":
    """Change the structs of bytes and path in a table, which may take wider types by that."""
    import pyarrow as pa

    for column, kind in features.items():
        chunks = table[column].chunks if has_files(kind) else []
        changed = [_map(chunk, kind, change) for chunk in chunks]
        if any(new is not old for new, old in zip(changed, chunks, strict=True)):
            at = table.column_names.index(column)
            field = table.schema.field(at)
            if wide is not None:
                field = field.with_type(wide.arrow_schema.field(column).type)
            cast = [new.cast(field.type) for new in changed]
            table = table.set_column(at, field, pa.chunked_array(cast, field.type))
    return table


def _map(array: "pa.Array", kind: Any, change: Change) -> "pa.Array":
    """Change the structs of bytes and path in an array; the same object where nothing changes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_media(kind) or is_file_struct(kind):
        return change(array, kind)
    if isinstance(kind, dict):
        names = [field.name for field in array.type]
        old = [pc.struct_field(array, name) for name in names]
        new = [
            _map(part, kind[name], change) if has_files(kind[name]) else part
            for name, part in zip(names, old, strict=True)
        ]
        if all(part is before for part, before in zip(new, old, strict=True)):
            return array
        return pa.StructArray.from_arrays(new, names, mask=array.is_null())
    items = pc.list_flatten(array)
    changed = _map(items, _item(kind), change)
    if changed is items:
        return array
    sizes = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    return pa.LargeListArray.from_arrays(offsets, changed, mask=array.is_null())


def _move(file: "pa.StructArray", places: dict[str, str | None]) -> "pa.StructArray":
    """Name the place where each file lies, in a struct that can hold its bytes."""
    import pyarrow as pa

    data, path, is_named = _field(file, "bytes"), _field(file, "path"), _is_named(file)
    data = data if "binary" in str(data.type) else data.cast(pa.binary())
    moved = [places[name] for name in path.filter(is_named).to_pylist()]
    return _pack(file, data, _replace(path, is_named, moved))


def _embed(file: "pa.StructArray", kind: Any, own: RowFiles | None) -> "pa.StructArray":
    """Read the named files; paths become base names, in plain structs those named or rooted."""
    import pyarrow.compute as pc

    data, path, is_named = _field(file, "bytes"), _field(file, "path"), _is_named(file)
    is_long = pc.match_substring_regex(path, f"/|{ROOTED}" if _is_media(kind) else ROOTED)
    is_long = pc.or_(pc.fill_null(is_long, False), is_named)
    if not is_long.true_count:
        return file
    named = path.filter(is_named).to_pylist()
    places = [name if own is None else own.find(name) for name in named]
    data = _replace(data, is_named, [read_file(place) if place else b"" for place in places])
    short = [_base_name(name) for name in path.filter(is_long).to_pylist()]
    return _pack(file, data, _replace(path, is_long, short))


def _base_name(path: str) -> str:
    return re.split(r"[/\\]", path.rpartition("::")[0] or path)[-1]


def _replace(array: "pa.Array", mask: "pa.BooleanArray", values: list[Any]) -> "pa.Array":
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.replace_with_mask(array, mask, pa.array(values, array.type)) if values else array


def _pack(file: "pa.StructArray", data: "pa.Array", path: "pa.Array") -> "pa.StructArray":
    import pyarrow as pa

    names = [field.name for field in file.type]
    parts = [data if name == "bytes" else path for name in names]
    return pa.StructArray.from_arrays(parts, names, mask=file.is_null())
