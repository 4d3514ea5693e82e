"""Which files of a folder are its data: those that `datasets.load_dataset` reads, and the rest.

The patterns of splits and the choice of a reader are those of `datasets`, matched against one list
of the files. `datasets` itself walks the folder once for each of about sixty patterns.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetBuilder
from datasets import packaged_modules as packaged
from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns
from datasets.load import infer_module_for_data_files_list_in_archives
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from fsspec.utils import glob_translate
from tqdm import tqdm

from dq_multimodal.config import InputError
from dq_multimodal.files import count

PROBED_FILES = 50_000
PROBED_SECONDS = 15.0
LEAST_SHARE = 0.1
"""Of so many files, or those found in so long, a larger share has to be of one kind of data, or it
is no data folder."""
IMAGES = frozenset(ImageFolder.EXTENSIONS)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = ("parquet", "arrow", "json", "csv")
BESIDE = ("text", "xml", "harbor")
"""Readers of what lies beside pictures: lists, annotations. They win over fewer pictures only."""
FAVOURITES = (".csv", ".json", ".jsonl", ".arrow", ".vortex", ".lance", ".parquet")
"""Endings that `datasets` prefers, the last ones most, where as many files have others."""


@dataclass(frozen=True)
class DataFiles:
    """What is to be read.

    Attributes:
        reader: Name of the packaged reader of `datasets`.
        options: What the reader is to be given.
        by_split: Paths of the files of each split.
        root: Folder that their names in the pin are relative to.
        note: What was found beside the files and is not read.
        make: Makes the reader that the card of a folder describes, given a folder for its cache.
    """

    reader: str
    options: dict[str, Any]
    by_split: dict[str, list[str]]
    root: Path
    note: str | None = None
    make: Callable[[str], DatasetBuilder] | None = None


def list_data(root: Path, name: str) -> DataFiles:
    """Find the data files of a folder and the splits that their names tell.

    Args:
        root: The folder, resolved.
        name: The folder as it was asked for, for messages.

    Raises:
        InputError: If there are none, or hardly any among very many other files.
    """
    files, closed = list_files(root, name)
    pictures = list(filter(is_picture, files))
    n_pictures = sum(map(_is_image, pictures))
    try:
        found = _choose(root, files)
        is_beside = found is None or found[0] in BESIDE
    except ValueError:  # its splits hold files of different kinds
        if not n_pictures or _count_readers(files).keys() & set(TABLES):
            raise
        found, is_beside = None, True
    n_found = sum(map(len, found[2].values())) if found else 0
    if is_beside and n_pictures and n_pictures >= n_found:
        found = _choose(root, pictures)
    files = [file for file in files if _name_of(file) not in FILES_TO_IGNORE]
    if found is None:
        present = f"; it holds {_describe(files)}" if files else ""
        raise InputError(
            f"no data files in it: {name} (wanted .parquet, .json, .jsonl or .csv, or "
            f"images{present})"
        )
    reader, options, by_split = found
    read = {file for part in by_split.values() for file in part}
    if len(files) >= PROBED_FILES:
        _check_share(len(read), files, name)
    notes = []
    if rest := [file for file in files if file not in read]:
        notes.append(f"{count(len(rest), 'file')} of the folder not read: {_describe(rest)}")
    if closed:
        what = f"{count(len(closed), 'folder')} in it not entered (links, runs, or not readable)"
        notes.append(f"{what}: {closed[0]}")
    by_split = {split: [f"{root}/{file}" for file in part] for split, part in by_split.items()}
    return DataFiles(reader, dict(options), by_split, root, "; ".join(notes) or None)


def list_files(root: Path, name: str) -> tuple[list[str], list[str]]:
    """List a folder to its depth, without what is hidden; links to folders are not followed.

    Returns:
        Relative paths of the files, sorted, and of the folders that were not entered.
    """
    files: list[str] = []
    closed: list[str] = []
    n_probed, until = PROBED_FILES, time.monotonic() + PROBED_SECONDS

    def relative(place: str) -> str:
        return f"{os.path.relpath(place, root)}/".removeprefix("./")

    walk = os.walk(root, onerror=lambda error: closed.append(relative(error.filename)))
    for place, folders, names in tqdm(walk, desc="list", unit="folder", delay=1):
        at = relative(place)
        if at and (not os.access(place, os.X_OK) or _is_run(place)):
            closed.append(at)
            folders.clear()
            continue
        folders[:] = [folder for folder in folders if not folder.startswith((".", "__"))]
        closed += [at + folder for folder in folders if os.path.islink(f"{place}/{folder}")]  # noqa: PTH114
        shown = (name for name in names if not name.startswith("."))
        files += [at + name for name in shown if os.path.isfile(f"{place}/{name}")]  # noqa: PTH113
        if len(files) >= n_probed or time.monotonic() > until:
            _check_share(max(_count_readers(files).values(), default=0), files, name)
            n_probed, until = 2 * len(files), time.monotonic() + PROBED_SECONDS
    return sorted(files), sorted(closed)


def _is_run(place: str) -> bool:
    """Say whether a folder is a run of ours: what came out of the data is not part of it."""
    config = f"{place}/config.yaml"
    if not (os.path.isfile(config) and os.path.isfile(f"{place}/manifest.json")):  # noqa: PTH113
        return False
    with Path(config).open("rb") as file:
        return b"dq-multimodal" in file.readline(200)


def _check_share(n_read: int, files: list[str], name: str) -> None:
    """Raise if very many files hold hardly any data, as a home folder does."""
    if n_read <= LEAST_SHARE * len(files):
        raise InputError(
            f"{name} is no folder of data: of the first {len(files):,} files in it at most "
            f"{n_read:,} are of one kind that can be read; name the folder that holds the data"
        )


def _count_readers(files: list[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for ending, n_files in Counter(map(_ending, files)).items():
        if ending in packaged._EXTENSION_TO_MODULE:
            found[packaged._EXTENSION_TO_MODULE[ending][0]] += n_files
    return found


def _choose(
    root: Path, files: list[str]
) -> tuple[str, dict[str, Any], dict[str, list[str]]] | None:
    """Choose reader, options and files of each split as `datasets`; ValueError if kinds differ."""
    match = _Matcher(files)
    allowed = frozenset(packaged._ALL_ALLOWED_EXTENSIONS)
    found: dict[str, list[str]] = {}
    try:
        for split, patterns in _get_data_files_patterns(match).items():
            found[str(split)] = [f for p in patterns for f in match(p) if _has_ending(f, allowed)]
    except FileNotFoundError:
        return None
    readers = {split: _infer_reader(root, part) for split, part in found.items()}
    first = next(iter(readers.values()))
    if any(other != first for other in readers.values()):
        shown = ", ".join(f"{split}: {other and other[0]}" for split, other in readers.items())
        raise ValueError(f"its splits hold files of different kinds ({shown})")
    if first is None:
        return None
    reader, options = first
    endings = packaged._MODULE_TO_EXTENSIONS[reader]
    endings = frozenset((*endings, *packaged._MODULE_TO_METADATA_EXTENSIONS[reader]))
    names = tuple(packaged._MODULE_TO_METADATA_FILE_NAMES[reader])
    for split, part in found.items():  # `datasets` leaves out names with a line break
        found[split] = [f for f in part if _has_ending(f, endings) or (names and f.endswith(names))]
    return reader, options, found


def _infer_reader(root: Path, files: list[str]) -> tuple[str, dict[str, Any]] | None:
    """Choose a reader by the most frequent ending, as `datasets` does, which is slow for many."""
    counts: Counter[tuple[bool, str]] = Counter()
    for name in map(_name_of, files):
        is_data = name not in packaged._ALL_METADATA_FILENAMES
        counts.update((is_data, f".{part.lower()}") for part in name.split(".")[1:])

    def rank(found: tuple[bool, str]) -> tuple[Any, ...]:
        favour = FAVOURITES.index(found[1]) if found[1] in FAVOURITES else -1
        return found[0], counts[found], favour, found[1]

    for _, ending in sorted(counts, key=rank, reverse=True):
        if ending in packaged._EXTENSION_TO_MODULE:
            return packaged._EXTENSION_TO_MODULE[ending]
        if ending == ".zip":
            places: Any = [f"{root}/{file}" for file in files]
            reader, options = infer_module_for_data_files_list_in_archives(places)
            return (reader, options) if reader else None
    return None


class _Matcher:
    """Finds the files that match a pattern of `datasets`, in its order."""

    def __init__(self, files: list[str]) -> None:
        self.files, self._found = files, dict[str, list[str]]()

    def __call__(self, pattern: str) -> list[str]:
        if pattern not in self._found:
            found = self.files
            for word in re.findall("[a-z]{2,}", pattern):  # quick to look for, and most have none
                found = [file for file in found if word in file]
            if pattern != "**":
                found = list(filter(re.compile(glob_translate(pattern)).match, found))
            ignored = set(FILES_TO_IGNORE) - {_name_of(pattern)}
            self._found[pattern] = [f for f in found if _name_of(f) not in ignored]
        return self._found[pattern]


def _name_of(file: str) -> str:
    return file.rpartition("/")[2]


def _has_ending(file: str, endings: frozenset[str]) -> bool:
    return any("." + part in endings for part in _name_of(file).split(".")[1:])


def _ending(file: str) -> str:
    name = _name_of(file)
    return name[name.rfind(".") :] if "." in name[1:] else ""


def _is_image(file: str) -> bool:
    return _ending(file).lower() in IMAGES


def is_picture(file: str) -> bool:
    """Say whether a file is one of a folder of pictures: an image, or what describes images."""
    return _is_image(file) or _name_of(file) in METADATA


def _describe(files: list[str]) -> str:
    """Name the endings of files, the most frequent first, and one of the files."""
    endings = Counter(_ending(file).lower() or "without ending" for file in files)
    shown = [f"{n_files:,} {ending}" for ending, n_files in endings.most_common(5)]
    more = f" and {len(endings) - 5:,} other kinds" if len(endings) > 5 else ""
    return f"{', '.join(shown)}{more}, such as {files[0]}"
