"""Datasets on this machine: data files, folders of them, folders made by save_to_disk."""

import glob
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.row_files import (
    CARD_FILES,
    admit,
    check_configs,
    folder_files,
    read_configs,
)
from dq_multimodal.splits import name_split, take_slice
from dq_multimodal.stream import Stream, open_stream

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
MAX_LISTED = 100
"""More files than this are recorded as one."""
SAVED_MARKS = ("state.json", "dataset_dict.json")


def is_local(name: str) -> bool:
    """Say whether a name means something on this machine, there or not, and no Hub id."""
    has_suffix = Path(name).suffix.lower() in BUILDERS
    if has_suffix or name.startswith(("/", ".", "~")) or any(c in name for c in "*?["):
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


def short_name(name: str) -> str:
    """Give the last part of a path or Hub id, without the ending of a data file."""
    last = Path(name.rstrip("/*"))
    return last.stem if last.suffix.lower() in BUILDERS else last.name


def load_local(
    name: str,
    split: str,
    *,
    streaming: bool = False,
    n_rows: int | None = None,
    image_folder: str | None = None,
) -> tuple["Dataset | Stream", dict[str, Any]]:
    """Load local data, and say which files it came from and what is in them.

    Args:
        name: File, glob or folder.
        split: Name or slice.
        streaming: Read the rows as a stream.
        n_rows: Rows of that stream, where they are known.
        image_folder: Folder in which rows may name files beside the source's own.

    Raises:
        InputError: If there is no such thing, it is of no known kind, has no such split, or names
            files that are not its own.
    """
    dataset: Dataset | Stream
    own = folder_files(image_folder)
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser fails on ~unknown
    check_path(path)
    if path.is_dir() and any((path / mark).is_file() for mark in SAVED_MARKS):
        if streaming:
            raise InputError(f"{name} is memory-mapped where it is: leave out --streaming")
        dataset, files = _load_saved(path, name, split)
    else:
        find = _find_folder if path.is_dir() else _find_files
        place, options, files, own_files = find(path, name, split)
        own = replace(own, files=own_files, home=str(path.resolve()) if path.is_dir() else None)
        if streaming:
            check = _watch(files, name)
            dataset = open_stream(
                name, place, split=split, n_rows=n_rows, check=check, own=own, **options
            )
        else:
            import datasets

            dataset = datasets.load_dataset(place, split=split, **options)
    if not streaming:
        dataset = admit(dataset, own, name)
    origin = {
        "kind": "folder" if path.is_dir() else "file",
        "name": name,
        "path": str(path.absolute()),
        "split": split,
        "files": describe_files(files),
    }
    return dataset, origin if streaming else {**origin, "rows": len(dataset)}


def _watch(files: list[Path], name: str) -> Callable[[], None]:
    """Give what raises once a file is not the one it is now, by its size and time."""
    before = [(file, file.stat()) for file in files]

    def check() -> None:
        for file, old in before:
            new = file.stat()
            if (new.st_size, new.st_mtime_ns) != (old.st_size, old.st_mtime_ns):
                raise InputError(f"{name} has changed while it was read: {file.name}")

    return check


def _find_files(
    path: Path, name: str, _: str
) -> tuple[str, dict[str, Any], list[Path], frozenset[str]]:
    """Say what `datasets` is to load, which files that is, and which of them rows may name."""
    found = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [Path(file) for file in found if Path(file).is_file()]
    if not files:
        raise InputError(f"no such file or folder: {name} (wanted .parquet, .json, .jsonl or .csv)")
    kinds = {BUILDERS.get(file.suffix.lower(), file.suffix) for file in files}
    if len(kinds) != 1 or not kinds <= set(BUILDERS.values()):
        raise InputError(
            f"{name} must be .parquet, .json, .jsonl or .csv files of one kind, "
            f"got {', '.join(sorted(kinds))}"
        )
    data_files = [glob.escape(str(file)) for file in files]
    return kinds.pop(), {"data_files": data_files}, files, frozenset()


def _load_saved(path: Path, name: str, split: str) -> tuple["Dataset", list[Path]]:
    """Load what save_to_disk made; a single dataset counts as the split that is asked for."""
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        base = name_split(loaded, split, name)
        loaded, path = loaded[base], path / base
    state = json.loads((path / "state.json").read_text())
    files = [path / entry["filename"] for entry in state["_data_files"]]
    return take_slice(loaded, split), [path / "dataset_info.json", *files]


def _find_folder(
    path: Path, name: str, split: str
) -> tuple[str, dict[str, Any], list[Path], frozenset[str]]:
    """Find the data files of a folder, with the splits that its file names tell."""
    import datasets

    check_configs(read_configs([path / file for file in CARD_FILES]), name)
    try:
        builder = datasets.load_dataset_builder(glob.escape(str(path)))
        by_split = builder.config.data_files
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise InputError(
            f"no data files in it: {name} (wanted .parquet, .json, .jsonl or .csv, or images)"
        ) from error
    bases = {name_split(by_split or [], part, name) for part in split.split("+")}
    files = sorted(Path(str(file)) for base in bases for file in by_split[base])
    own_files = frozenset(str(file) for base in by_split for file in by_split[base])
    return glob.escape(str(path)), {}, files, own_files


def describe_files(files: list[Path]) -> list[dict[str, Any]]:
    """Give name, bytes and SHA-256 of files; many (the images of a folder) become one entry."""
    from tqdm import tqdm

    is_many = len(files) > MAX_LISTED
    found: list[dict[str, Any]] = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": hash_file(file)}
        for file in tqdm(files, desc="hash", unit="file", disable=not is_many)
    ]
    if not is_many:
        return found
    hasher = hashlib.sha256(json.dumps(found).encode())
    total = sum(file["bytes"] for file in found)
    return [{"name": f"{len(files)} files", "bytes": total, "sha256": hasher.hexdigest()}]


def hash_file(path: Path) -> str:
    """Give the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
