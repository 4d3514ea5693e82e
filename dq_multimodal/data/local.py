"""Datasets on this machine: data files, folders of them, folders made by save_to_disk."""

import glob
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.data.listing import METADATA, is_picture, list_data
from dq_multimodal.data.pinned import PACKED, PinnedFiles
from dq_multimodal.data.row_files import NO_FILES, RowFiles, admit, check_configs, folder_files
from dq_multimodal.data.splits import name_split, split_parts, take_slice, take_splits
from dq_multimodal.data.stream import Passes, Stream, first_line, stream_from
from dq_multimodal.data.text_tables import Values, find_mixed, find_separator, lift_rows, pack_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

READERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
MAX_LISTED = 100
"""More files than this (the images of a folder) are recorded as one."""
TEXT_READERS = ("json", "csv", "text")
NAMES = "relative"
"""The pin names files by their place in the folder; earlier releases left the folders out."""
WANTED = ".parquet, .json, .jsonl or .csv"
JUNK = re.compile(r"(^|/)(\.|__MACOSX/)")
"""Hidden members of zip files, and what macOS adds."""
SAVED_MARKS = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class LocalData:
    """A dataset on this machine.

    Attributes:
        dataset: Its rows, or a stream of them.
        origin: What config.yaml records of it.
        files: Its own data files.
        check: Raises if one of them has changed since it was pinned.
        note: What was found beside them and is not read.
    """

    dataset: "Dataset | Stream"
    origin: dict[str, Any]
    files: tuple[str, ...]
    check: Callable[[], None]
    note: str | None = None


@dataclass(frozen=True)
class _Found:
    """What is to be read.

    Attributes:
        reader: Name of the packaged reader of `datasets`.
        by_split: Paths of the files of each split.
        root: Folder that their names in the pin are relative to.
        options: What the reader is to be given.
        make: Makes the reader that the card of a folder describes, given a folder for its cache.
        note: What was found beside the files and is not read.
    """

    reader: str
    by_split: dict[str, list[str]]
    root: Path
    options: dict[str, Any]
    make: "Callable[[str], DatasetBuilder] | None" = None
    note: str | None = None


def is_local(name: str) -> bool:
    """Say whether a name means something on this machine, there or not, and no Hub id."""
    if _ending_of(name) in READERS or name.startswith(("/", ".", "~")):
        return True
    if any(c in name for c in "*?["):
        return True
    try:
        return Path(name).exists()
    except OSError:  # too long for a path
        return False


def check_path(path: Path) -> None:
    """Raise for a path that `datasets` would take for another one."""
    place = str(path.absolute())
    if "::" in place or os.path.expandvars(place) != place:
        raise InputError(f"the path {place} has :: or $NAME in it, which `datasets` expands")


def last_part(name: str) -> str:
    """Leave out the folders of this machine that a file or a model may be named by."""
    is_place = is_local(name) or name.startswith("local-dir:") or name.count("/") > 1
    return (Path(name.removeprefix("local-dir:")).name or name) if is_place else name


def _ending_of(name: str) -> str:
    """Give the ending of a data file, that of its compression left aside."""
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def is_table(name: str) -> bool:
    """Say whether a file holds rows of a table, by its ending."""
    return _ending_of(name) in (*READERS, ".arrow")


def short_name(name: str) -> str:
    """Give the last part of a path or Hub id, without the ending of a data file."""
    last = Path(name.rstrip("/*"))
    if _ending_of(name) not in READERS:
        return last.name
    return Path(last.stem).stem if last.suffix.lower() in PACKED else last.stem


def load_local(
    name: str,
    split: str,
    *,
    config_name: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    n_rows: int | None = None,
    image_folder: str | None = None,
) -> LocalData:
    """Load local data, and say which files it came from and what is in them.

    Args:
        name: File, glob or folder.
        split: Name or slice.
        config_name: Configuration of a folder that has several.
        field: Key of JSON files under which the list of rows is.
        streaming: Read the rows as a stream.
        n_rows: Rows of that stream, where they are known.
        image_folder: Folder in which rows may name files beside the source's own.

    Raises:
        InputError: If there is no such thing, it is of no known kind, has no such split, or names
            files that are not its own.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser fails on ~unknown
    check_path(path)
    own = folder_files(image_folder)
    chosen = {"config_name": config_name, "field": field}
    origin: dict[str, Any] = {
        "kind": "folder" if path.is_dir() else "file",
        "name": name,
        "path": str(path.absolute()),
        "split": split,
        "names": NAMES,
        **{key: value for key, value in chosen.items() if value is not None},
    }
    dataset: Dataset | Stream
    if path.is_dir() and any((path / mark).is_file() for mark in SAVED_MARKS):
        for key in chosen.keys() & origin.keys():
            raise InputError(f"{key} is not for a folder made by save_to_disk, and {name} is one")
        if streaming:
            raise InputError(f"{name} is memory-mapped where it is: leave out --streaming")
        dataset, pinned = _load_saved(path, name, split)
        note = None
    else:
        find = _find_folder if path.is_dir() else _find_files
        found = find(path, name, config_name)
        if field is not None and (found.reader != "json" or found.make is not None):
            raise InputError(f"field is for .json files, and {name} has others")
        parts = split_parts(split, found.by_split) if path.is_dir() else ["train"]
        try:
            bases = {name_split(found.by_split, part, name) for part in parts}
        except InputError as error:
            raise InputError(f"{error} ({found.note})" if found.note else str(error)) from error
        files = sorted(file for base in bases for file in found.by_split[base])
        others = [f for key, part in found.by_split.items() if key not in bases for f in part]
        has_text = found.reader in TEXT_READERS

        def is_text(file: str) -> bool:
            return has_text or file.endswith(METADATA[:2])

        pinned = PinnedFiles(files, found.root, name, beside=others, is_text=is_text)
        if found.reader == "csv" and found.make is None:
            found.options.setdefault("sep", find_separator(files))
            if found.options["sep"] != ",":
                origin["separator"] = found.options["sep"]
        if path.is_dir():
            all_files = frozenset(file for part in found.by_split.values() for file in part)
            own = replace(own, files=all_files, home=str(found.root))
        dataset = _read(found, pinned, name, split, field, streaming, n_rows, own)
        note = found.note
    origin["files"] = pinned.describe(MAX_LISTED)
    if not isinstance(dataset, Stream):
        dataset = admit(dataset, own, name)
        origin["rows"] = len(dataset)
    return LocalData(dataset, origin, tuple(pinned.paths), pinned.check, note)


def _find_files(path: Path, name: str, config_name: str | None) -> _Found:
    """Say which files a path or glob means, and how they are to be read."""
    if config_name is not None:
        raise InputError(f"config_name is for the Hub and for folders, and {name} is neither")
    found = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [os.path.abspath(file) for file in found if Path(file).is_file()]  # noqa: PTH100
    if not files:
        raise InputError(f"no such file or folder: {name} (wanted {WANTED})")
    readers = {READERS.get(_ending_of(file), Path(file).suffix) for file in files}
    if len(readers) != 1 or not readers <= set(READERS.values()):
        raise InputError(
            f"{name} must be {WANTED} files of one kind, got {', '.join(sorted(readers))}"
        )
    reader = readers.pop()
    packed = [file for file in files if file.lower().endswith(PACKED)]
    if reader == "parquet" and packed:
        raise InputError(f"{packed[0]} is compressed twice: unpack it to a .parquet file")
    is_tab = {_ending_of(file) == ".tsv" for file in files}
    if len(is_tab) > 1:
        raise InputError(f"{name} must be files of one kind, got .csv and .tsv")
    root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))  # noqa: PTH120
    return _Found(reader, {"train": files}, root, {"sep": "\t"} if is_tab == {True} else {})


def _find_folder(path: Path, name: str, config_name: str | None) -> _Found:
    """Find the data files of a folder, with the splits that its card or its file names tell."""
    import datasets

    root = path.resolve()
    card = _read_card(root)
    check_configs(card.get("configs"), name)
    parts = [card.get("configs") or [], card.get("dataset_info") or []]
    parts = [part if isinstance(part, list) else [part] for part in parts]
    names = list(
        dict.fromkeys(c["config_name"] for part in parts for c in part if "config_name" in c)
    )
    if config_name is not None and config_name not in names:
        held = f"only {', '.join(names)}" if names else "it has none"
        raise InputError(f"{name} has no configuration {config_name!r}, {held}")
    if not any(parts) and not (root / "dataset_infos.json").is_file():
        listing = list_data(root, name)
        by_split = {
            split: [f"{root}/{file}" for file in files] for split, files in listing.by_split.items()
        }
        return _Found(listing.reader, by_split, root, dict(listing.options), note=listing.note)
    make = partial(datasets.load_dataset_builder, glob.escape(str(root)), config_name)
    try:
        builder = make(cache_dir=str(_cache_folder()))
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        if config_name is None and len(names) > 1:
            raise InputError(
                f"{name} has several configurations: choose one with --config-name "
                f"({', '.join(names)})"
            ) from error
        raise InputError(
            f"no data files as its card says in {name}: {first_line(error)}"
        ) from error
    by_split = {
        str(split): list(files) for split, files in (builder.config.data_files or {}).items()
    }
    return _Found(builder.name, by_split, root, {}, lambda place: make(cache_dir=place))


def _read_card(root: Path) -> dict[str, Any]:
    """Read what the card of a folder says for `datasets`."""
    import yaml
    from huggingface_hub import metadata_load

    card, beside = root / "README.md", root / ".huggingface.yaml"
    try:
        told = metadata_load(card) if card.is_file() else None
        more = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the card {card}: {first_line(error)}") from error
    return {**(told or {}), **(more or {})}


def _cache_folder() -> Path:
    """Give where rows that were read are kept, under the content of their files.

    The cache of `datasets` knows files by path and time, and gives old rows for replaced ones.
    """
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "by-content"


def _read(
    found: _Found,
    pinned: PinnedFiles,
    name: str,
    split: str,
    field: str | None,
    streaming: bool,
    n_rows: int | None,
    own: RowFiles,
) -> "Dataset | Stream":
    """Read the rows of files, or what is kept of the very same files."""
    by_split = found.by_split
    place = _cache_folder() / pinned.key(found.reader, by_split, found.options, field)
    if found.reader == "imagefolder" and found.make is None and _is_plain(by_split):
        load = partial(_list_pictures, by_split, place)
        if not streaming:
            return take_splits(load, by_split, split, name)
        pictures = take_splits(load, by_split, split, name)

        def begin(_: list[str] | None) -> "IterableDataset":
            pinned.check()
            return pictures.to_iterable_dataset()

        return Stream(Passes(name, begin, n_rows, own))
    if field is not None:
        by_split = {
            key: lift_rows(files, field, place / "lifted" / key) for key, files in by_split.items()
        }
    mixed: dict[str, Values] | None = None
    if found.reader == "json" and found.make is None:
        mixed = find_mixed([file for files in by_split.values() for file in files])
    if mixed is not None:
        by_split = {
            key: pack_rows(files, mixed, place / "packed" / key) for key, files in by_split.items()
        }
    make = found.make or partial(_make_builder, found.reader, by_split, found.root, found.options)
    if streaming:
        rows = stream_from(
            name,
            partial(make, str(place)),
            split,
            n_rows,
            pinned.check,
            own,
            partial(_name_json, mixed),
        )
    else:
        rows = _name_json(mixed, _prepare(make(str(place)), split))
        rows._fingerprint = _fingerprint(place, split)
        pinned.check()
    if field is None and found.reader == "json":
        _check_rows(rows, name)
    return rows


def _name_json(mixed: dict[str, Values] | None, rows: Any) -> Any:
    """Give rows, or a pass over them, in which texts that were packed count as JSON."""
    from datasets.utils.json import set_json_types_in_feature

    if not mixed:
        return rows
    paths = [[name, *path] for name, values in mixed.items() for path in values.paths()]
    return rows.cast(set_json_types_in_feature(rows.features, paths))


def _fingerprint(place: Path, split: str) -> str:
    """Give what `datasets` knows rows by; its own would be that of all files of a kind."""
    return hashlib.sha256(f"{place.name} {split}".encode()).hexdigest()[:16]


def _make_builder(
    reader: str, by_split: dict[str, list[str]], root: Path, options: dict[str, Any], place: str
) -> "DatasetBuilder":
    """Make a reader of files that are found already."""
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.load import import_main_class
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    builder = import_main_class(_PACKAGED_DATASETS_MODULES[reader][0])
    assert builder is not None
    files = DataFilesDict({key: DataFilesList(part, []) for key, part in by_split.items()})
    return builder(
        cache_dir=place, data_files=files, base_path=str(root), config_id="default", **options
    )


def _prepare(builder: "DatasetBuilder", split: str) -> "Dataset":
    builder.download_and_prepare()
    rows = builder.as_dataset(split)
    assert not isinstance(rows, dict)
    return rows


def read_parquet(files: list[Path]) -> "Dataset":
    """Read parquet files of one folder; never what an earlier file of the same name held."""
    paths = [str(file.absolute()) for file in files]
    root = files[0].parent.absolute()
    pinned = PinnedFiles(paths, root, str(files[0].parent))
    found = _Found("parquet", {"train": paths}, root, {})
    rows = _read(found, pinned, pinned.name, "train", None, False, None, NO_FILES)
    assert not isinstance(rows, Stream)
    return rows


def _check_rows(rows: "Dataset | Stream", name: str) -> None:
    """Raise if a JSON file is one object that holds the rows in a list."""
    import pyarrow as pa

    first = next(rows.with_format("arrow").iter(2))
    lists = [field for field in first.schema if pa.types.is_list(field.type)]
    nested = [field.name for field in lists if pa.types.is_struct(field.type.value_type)]
    nested = nested or [field.name for field in lists if first.num_columns == 1]
    if len(first) == 1 and nested and not name.lower().endswith(".jsonl"):
        raise InputError(
            f"{name} is one object, and its rows are a list in it: name the key of the list "
            f"(--field {nested[0]})"
        )


def _is_plain(by_split: dict[str, list[str]]) -> bool:
    """Say whether a folder of pictures is nothing but pictures, one a file or in a zip file."""
    return not any(
        name.endswith(METADATA)
        for part in by_split.values()
        for file in part
        for name in (_members(file) if file.endswith(".zip") else [file])
    )


def _members(file: str) -> list[str]:
    """Name the pictures and tables in a zip file."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not JUNK.search(name)]
    return [name for name in names if is_picture(name)]


def _unpack(files: list[str]) -> tuple[list[str], list[str]]:
    """Give the address of every picture, those in zip files last, and its folder."""
    loose = [file for file in files if not file.endswith(".zip")]
    packed = [(file, name) for file in files if file.endswith(".zip") for name in _members(file)]
    folders = [os.path.dirname(name) for name in loose]  # noqa: PTH120
    folders += [f"{file}/{os.path.dirname(name)}" for file, name in packed]  # noqa: PTH120
    return [*loose, *(f"zip://{name}::{file}" for file, name in packed)], folders


def _list_pictures(by_split: dict[str, list[str]], place: Path, split: str) -> "Dataset":
    """Make the rows of pictures as the reader of `datasets` does, which takes minutes for many.

    The names of their folders are labels if they are several, all equally deep. As there, a split
    has labels if those up to it are so, and the column is there if the last split has them.
    """
    import datasets
    import pyarrow as pa

    labels: set[str] = set()
    depths: set[int] = set()
    is_labelled = {}
    for key, part in by_split.items():
        folders = set(_unpack(part)[1])
        labels |= {os.path.basename(folder) for folder in folders}  # noqa: PTH119
        depths |= {folder.count("/") for folder in folders}
        is_labelled[key] = len(labels) > 1 and len(depths) == 1
    files, folders_of = _unpack(by_split[split])
    features = datasets.Features({"image": datasets.Image()})
    if any(list(is_labelled.values())[-1:]):
        features["label"] = datasets.ClassLabel(names=sorted(labels))
    kind = features.arrow_schema.field("image").type
    paths = {"bytes": pa.nulls(len(files), pa.binary()), "path": pa.array(files, pa.string())}
    image = pa.StructArray.from_arrays([paths[field.name] for field in kind], fields=list(kind))
    columns: dict[str, Any] = {"image": image}
    if "label" in features:
        number = {label: k for k, label in enumerate(sorted(labels))}
        found = [number[os.path.basename(folder)] for folder in folders_of]  # noqa: PTH119
        columns["label"] = pa.array(
            found if is_labelled[split] else [None] * len(files), pa.int64()
        )
    table = pa.table(columns, schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(table, info, fingerprint=_fingerprint(place, split))


def _load_saved(path: Path, name: str, split: str) -> tuple["Dataset", PinnedFiles]:
    """Load what save_to_disk made; a single dataset counts as the split that is asked for."""
    import datasets

    path = path.absolute()
    loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.DatasetDict):
        pinned = PinnedFiles(_saved_files(path), path, name)
        return take_slice(loaded.with_format(None), split), pinned
    bases = {name_split(loaded, part, name) for part in split_parts(split, loaded)}
    files = [file for base in sorted(bases) for file in _saved_files(path / base)]
    pinned = PinnedFiles(files, path, name)
    return take_splits(lambda base: loaded[base].with_format(None), loaded, split, name), pinned


def _saved_files(path: Path) -> list[str]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    names = ["dataset_info.json", *(entry["filename"] for entry in state["_data_files"])]
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{path / 'state.json'} names data outside its folder: {name!r}")
    return [str(path / name) for name in names]
