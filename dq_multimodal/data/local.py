"""Datasets on this machine: data files, folders of them, folders made by save_to_disk."""

import glob
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetBuilder, IterableDataset
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.load import import_main_class
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.table import table_cast
from datasets.utils.json import set_json_types_in_feature
from tqdm import tqdm

from dq_multimodal.config import InputError
from dq_multimodal.data.listing import METADATA, DataFiles, is_picture, list_data
from dq_multimodal.data.row_files import NO_FILES, RowFiles, admit, read_card
from dq_multimodal.data.splits import name_split, split_parts, take_slice, take_splits
from dq_multimodal.data.stream import Passes, Stream, stream_from
from dq_multimodal.data.text_files import check_utf8, find_mixed, find_separator, write_rows
from dq_multimodal.files import expand_home, first_line

READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
READERS |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "json")
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed files that `datasets` reads through."""
TEXT_READERS = ("json", "csv", "text")
WANTED = ".parquet, .json, .jsonl or .csv"
MAX_LISTED = 100
"""More files than this (the images of a folder) are recorded as one."""
NAMES = "relative"
"""The pin names files by their place in the folder; earlier releases left the folders out."""
HASHED_TOGETHER = 200
"""Files that one thread hashes before it takes others."""
JUNK = re.compile(r"(^|/)(\.|__MACOSX/)")
"""Hidden members of zip files, and what macOS adds."""
SAVED_MARKS = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """A loaded dataset and where it is from.

    Attributes:
        dataset: All its rows, memory-mapped, without a format or transform; or a stream of them.
        origin: What config.yaml records: kind, name, split, and what pins the content (the commit
            of a Hub dataset, the hashes of local files, the fingerprint of an object), and the
            number of rows, of a stream once they have been counted; and the folder in which rows
            may name files, where one was given, and the hash of these files.
        files: The data files themselves, where they are on this machine.
        check: Raises if one of these files has changed since it was pinned.
        note: What lies beside these files in their folder and is not read.
    """

    dataset: Dataset | Stream
    origin: dict[str, Any]
    files: tuple[str, ...] = ()
    check: Callable[[], None] = lambda: None
    note: str | None = None


class PinnedFiles:
    """Files and their SHA-256, with what tells that one was replaced since.

    A file that is put in the place of another has another number (inode) or another time of
    change, which no copy can keep, also where its size and its time of writing are the same.

    Args:
        paths: The files.
        root: Folder that they lie in, which their recorded names leave out.
        name: What they are the data of, for messages.
        beside: Files that only tell the types of the columns: watched, not hashed.
        is_text: Says of a file whether it must be UTF-8.

    Raises:
        InputError: If one is text and not UTF-8.
    """

    def __init__(
        self,
        paths: list[str],
        root: Path,
        name: str,
        beside: list[str] | None = None,
        is_text: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.paths, self.name = paths, name
        self._names = [path.removeprefix(f"{root}/") for path in paths]
        self._stamps = {path: _stamp(path) for path in [*paths, *(beside or [])]}
        step = HASHED_TOGETHER
        batches = [paths[k : k + step] for k in range(0, len(paths), step)]
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            found = pool.map(lambda batch: [*map(hash_file, batch)], batches)
            hashes = chain.from_iterable(found)
            self._hashes = [*tqdm(hashes, total=len(paths), desc="hash", unit="file", delay=1)]
            list(pool.map(check_utf8, filter(is_text, paths)))

    def describe(self) -> list[dict[str, Any]]:
        """Give name, bytes and SHA-256 of each; of more files than that, all in one entry."""
        stamps = (self._stamps[path] for path in self.paths)
        found = zip(self._names, stamps, self._hashes, strict=True)
        return describe_pins([(name, stamp[0], digest) for name, stamp, digest in found])

    def key(self, *more: Any) -> str:
        """Give a name under which what was read of these very files may be kept."""
        text = json.dumps([self._stamps, self._hashes, more], default=str)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]

    def check(self) -> None:
        """Raise if a file is not the one that was hashed."""
        for path, stamp in self._stamps.items():
            if not os.path.exists(path) or _stamp(path) != stamp:  # noqa: PTH110
                raise InputError(f"{self.name} has changed while it was read: {Path(path).name}")


def describe_pins(files: list[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """Record name, bytes and SHA-256 of files; more than 100 are one entry."""
    found: list[dict[str, Any]] = [
        {"name": name, "bytes": size, "sha256": digest} for name, size, digest in files
    ]
    if len(found) <= MAX_LISTED:
        return found
    total = sum(file["bytes"] for file in found)
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return [{"name": f"{len(found)} files", "bytes": total, "sha256": digest}]


def _stamp(path: str) -> tuple[int, ...]:
    found = os.stat(path)  # noqa: PTH116 - a Path for each of 200,000 files takes as long as hashing
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def hash_file(path: str) -> str:
    """Give the SHA-256 of a file."""
    with open(path, "rb") as file:  # noqa: PTH123
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_local(name: str) -> bool:
    """Say whether a name means something on this machine, there or not, and no Hub id."""
    if _ending_of(name) in READERS or name.startswith(("/", ".", "~")):
        return True
    try:
        return any(c in name for c in "*?[") or Path(name).exists()
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
    config_name: str | None,
    field: str | None,
    streaming: bool,
    n_rows: int | None,
    own: RowFiles,
) -> Source:
    """Load local data, and pin the files that it came from; see `source.load_source`."""
    path = expand_home(name)
    check_path(path)
    is_folder = path.is_dir()
    chosen = {"config_name": config_name, "field": field}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    origin: dict[str, Any] = {"kind": "folder" if is_folder else "file", "name": name}
    origin |= {"path": str(path.absolute()), "split": split, "names": NAMES, **chosen}
    note = None
    rows: Dataset | Stream
    if is_saved(path):
        for key in chosen:
            raise InputError(f"{key} is not for a folder made by save_to_disk, and {name} is one")
        if streaming:
            raise InputError(f"{name} is memory-mapped where it is: leave out --streaming")
        rows, pinned = _load_saved(path, name, split)
    else:
        if not is_folder and config_name is not None:
            raise InputError(f"config_name is for the Hub and for folders, and {name} is neither")
        found = find_data(path, name, config_name)
        note, is_plain = found.note, found.make is None
        if field is not None and (found.reader != "json" or not is_plain):
            raise InputError(f"field is for .json files, and {name} has others")
        pinned = _pin(found, split_parts(split, found.by_split) if is_folder else ["train"], name)
        if found.reader == "csv" and is_plain:
            found.options.setdefault("sep", find_separator(pinned.paths))
            if found.options["sep"] != ",":
                origin["separator"] = found.options["sep"]
        if is_folder:
            files = frozenset(chain.from_iterable(found.by_split.values()))
            own = replace(own, files=files, home=str(found.root))
        rows = _read(found, pinned, split, field, streaming, n_rows, own)
    origin["files"] = pinned.describe()
    if isinstance(rows, Dataset):
        rows = admit(rows, own, name)
        origin["rows"] = len(rows)
    return Source(rows, origin, tuple(pinned.paths), pinned.check, note)


def is_saved(path: Path) -> bool:
    """Say whether save_to_disk made a folder."""
    return any((path / mark).is_file() for mark in SAVED_MARKS)


def find_data(path: Path, name: str, config_name: str | None) -> DataFiles:
    """Say which files a path, glob or folder means, and how they are to be read."""
    return _find_in_folder(path, name, config_name) if path.is_dir() else _find(path, name)


def _find(path: Path, name: str) -> DataFiles:
    """Say which files a path or glob means, and how they are to be read."""
    found = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [os.path.abspath(file) for file in found if Path(file).is_file()]  # noqa: PTH100
    if not files:
        raise InputError(f"no such file or folder: {name} (wanted {WANTED})")
    endings = {_ending_of(file) for file in files}
    readers = {READERS.get(_ending_of(file), Path(file).suffix) for file in files}
    if len(readers) != 1 or not readers <= {*READERS.values()}:
        shown = ", ".join(sorted(readers))
        raise InputError(f"{name} must be {WANTED} files of one kind, got {shown}")
    reader = readers.pop()
    packed = [file for file in files if file.lower().endswith(PACKED)]
    if reader == "parquet" and packed:
        raise InputError(f"{packed[0]} is compressed twice: unpack it to a .parquet file")
    if endings > {".tsv"}:
        raise InputError(f"{name} must be files of one kind, got .csv and .tsv")
    root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))  # noqa: PTH120
    options = {"sep": "\t"} if endings == {".tsv"} else {}
    return DataFiles(reader, options, {"train": files}, root)


def _find_in_folder(path: Path, name: str, config_name: str | None) -> DataFiles:
    """Find the data files of a folder, with the splits that its card or its file names tell."""
    root = path.resolve()
    card = read_card(root, name)
    parts = [card.get(key) or [] for key in ("configs", "dataset_info")]
    described = [c for part in parts for c in (part if isinstance(part, list) else [part])]
    names = dict.fromkeys(c["config_name"] for c in described if "config_name" in c)
    if config_name is not None and config_name not in names:
        present = f"only {', '.join(names)}" if names else "it has none"
        raise InputError(f"{name} has no configuration {config_name!r}, {present}")
    if not described and not (root / "dataset_infos.json").is_file():
        return list_data(root, name)
    make = partial(datasets.load_dataset_builder, glob.escape(str(root)), config_name)
    try:
        builder = make(cache_dir=str(_cache_folder()))
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        reason = f"no data files as its card says in {name}: {first_line(error)}"
        if config_name is None and len(names) > 1:
            shown = ", ".join(names)
            reason = f"{name} has several configurations: choose one with --config-name ({shown})"
        raise InputError(reason) from error
    found = builder.config.data_files or {}
    by_split = {str(split): list(files) for split, files in found.items()}
    return DataFiles(builder.name, {}, by_split, root, make=lambda place: make(cache_dir=place))


def _pin(found: DataFiles, parts: list[str], name: str) -> PinnedFiles:
    """Pin the files of the slices that are asked for, and watch the others."""
    try:
        bases = {name_split(found.by_split, part, name) for part in parts}
    except InputError as error:
        raise InputError(f"{error} ({found.note})" if found.note else str(error)) from error
    files = sorted(file for base in bases for file in found.by_split[base])
    others = [f for key, part in found.by_split.items() if key not in bases for f in part]
    is_text = found.reader in TEXT_READERS
    return PinnedFiles(
        files, found.root, name, others, lambda file: is_text or file.endswith(METADATA[:2])
    )


def _cache_folder() -> Path:
    """Give where rows that were read are kept, under the content of their files.

    The cache of `datasets` knows files by path and time, and gives old rows for replaced ones.
    """
    return Path(datasets.config.HF_DATASETS_CACHE) / "by-content"


def _read(
    found: DataFiles,
    pinned: PinnedFiles,
    split: str = "train",
    field: str | None = None,
    streaming: bool = False,
    n_rows: int | None = None,
    own: RowFiles = NO_FILES,
) -> Dataset | Stream:
    """Read the rows of files, or what is kept of the very same files."""
    name, by_split, make, mixed = pinned.name, found.by_split, found.make, None
    place = _cache_folder() / pinned.key(found.reader, by_split, found.options, field)
    rows: Dataset | Stream
    if make is None and found.reader == "imagefolder":
        listed = {key: _list_pictures(part) for key, part in by_split.items()}
        addresses = (address for part in listed.values() for address, _ in part)
        if not any(address.partition("::")[0].endswith(METADATA) for address in addresses):
            pictures = take_splits(partial(_make_pictures, listed, place), by_split, split, name)

            def begin(_: list[str] | None) -> IterableDataset:
                pinned.check()
                return pictures.to_iterable_dataset()

            return Stream(Passes(name, begin, n_rows, own)) if streaming else pictures
    if make is None and found.reader == "json":
        mixed = find_mixed([*chain.from_iterable(by_split.values())], field)
        if mixed is not None:
            by_split = {
                key: write_rows(files, mixed, place / "rows" / key, field)
                for key, files in by_split.items()
            }
    make = make or partial(_make_builder, found.reader, by_split, found.root, found.options)
    builder_of = partial(make, str(place))

    def name_json(rows: Any) -> Any:
        """Give rows, or a pass over them, in which texts that were packed count as JSON."""
        paths = [list(place) for place in mixed or ()]
        return rows.cast(set_json_types_in_feature(rows.features, paths)) if paths else rows

    if streaming:
        rows = stream_from(name, builder_of, split, n_rows, pinned.check, own, name_json)
    else:
        builder = builder_of()
        builder.download_and_prepare()
        rows = name_json(builder.as_dataset(split))
        rows._fingerprint = _fingerprint(place, split)
        pinned.check()
    if field is None and found.reader == "json":
        _check_rows(rows, name)
    return rows


def _fingerprint(place: Path, split: str) -> str:
    """Give what `datasets` knows rows by; its own would be that of all files of a kind."""
    return hashlib.sha256(f"{place.name} {split}".encode()).hexdigest()[:16]


def _make_builder(
    reader: str, by_split: dict[str, list[str]], root: Path, options: dict[str, Any], place: str
) -> DatasetBuilder:
    """Make a reader of files that are found already."""
    builder: Any = import_main_class(_PACKAGED_DATASETS_MODULES[reader][0])
    files = DataFilesDict({key: DataFilesList(part, []) for key, part in by_split.items()})
    return builder(
        cache_dir=place, data_files=files, base_path=str(root), config_id="default", **options
    )


def read_parquet(files: list[Path]) -> Dataset:
    """Read parquet files of one folder; never what an earlier file of the same name held."""
    paths = [str(file.absolute()) for file in files]
    found = DataFiles("parquet", {}, {"train": paths}, files[0].parent.absolute())
    rows: Any = _read(found, PinnedFiles(paths, found.root, str(files[0].parent)))
    return rows


def _check_rows(rows: Dataset | Stream, name: str) -> None:
    """Raise if a JSON file is one object that holds the rows in a list."""
    first = next(rows.with_format("arrow").iter(2))
    lists = [field for field in first.schema if pa.types.is_list(field.type)]
    nested = [field.name for field in lists if pa.types.is_struct(field.type.value_type)]
    nested = nested or [field.name for field in lists if first.num_columns == 1]
    if len(first) == 1 and nested and not name.lower().endswith(".jsonl"):
        raise InputError(
            f"{name} is one object, and its rows are a list in it: name the key of the list "
            f"(--field {nested[0]})"
        )


def _list_pictures(files: list[str]) -> list[tuple[str, str]]:
    """Give the address of every picture, those in zip files last, and its folder."""
    found = [(file, os.path.dirname(file)) for file in files if not file.endswith(".zip")]  # noqa: PTH120
    for file in files:
        if file.endswith(".zip"):
            with zipfile.ZipFile(file) as archive:
                names = [n for n in archive.namelist() if is_picture(n) and not JUNK.search(n)]
            found += [(f"zip://{n}::{file}", f"{file}/{os.path.dirname(n)}") for n in names]  # noqa: PTH120
    return found


def _make_pictures(listed: dict[str, list[tuple[str, str]]], place: Path, split: str) -> Dataset:
    """Make the rows of pictures as the reader of `datasets` does, at a hundredth of its time.

    The names of their folders are labels if they are several, all equally deep. As there, a split
    has labels if those up to it are so, and the column is there if the last split has them.
    """
    folders: set[str] = set()
    is_labelled = {}
    for key, part in listed.items():
        folders |= {folder for _, folder in part}
        labels = {folder.rpartition("/")[2] for folder in folders}
        is_labelled[key] = len(labels) > 1 and len({f.count("/") for f in folders}) == 1
    features = datasets.Features({"image": datasets.Image()})
    columns = {"image": pa.array([address for address, _ in listed[split]], pa.string())}
    if is_labelled[key]:
        features["label"] = datasets.ClassLabel(names=sorted(labels))
        names = [f.rpartition("/")[2] if is_labelled[split] else None for _, f in listed[split]]
        columns["label"] = pa.array(names, pa.string())
    table = table_cast(pa.table(columns), features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(table, info, fingerprint=_fingerprint(place, split))


def _load_saved(path: Path, name: str, split: str) -> tuple[Dataset, PinnedFiles]:
    """Load what save_to_disk made; a single dataset counts as the split that is asked for."""
    path = path.absolute()
    loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.DatasetDict):
        pinned = PinnedFiles(_saved_files(path), path, name)
        rows = take_slice(loaded.with_format(None), split)
        rows.info.splits = None  # of what they were taken from, which may have been changed
        return rows, pinned
    bases = {name_split(loaded, part, name) for part in split_parts(split, loaded)}
    pinned = PinnedFiles(
        [f for base in sorted(bases) for f in _saved_files(path / base)], path, name
    )
    return take_splits(lambda base: loaded[base].with_format(None), loaded, split, name), pinned


def _saved_files(path: Path) -> list[str]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    names = ["dataset_info.json", *(entry["filename"] for entry in state["_data_files"])]
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{path / 'state.json'} names data outside its folder: {name!r}")
    return [str(path / name) for name in names]
