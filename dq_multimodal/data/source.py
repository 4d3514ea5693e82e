"""Where the rows come from: a Hub dataset, local files or a folder, or a dataset in memory."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.file_download import repo_folder_name

from dq_multimodal.config import InputError
from dq_multimodal.data.hub_errors import HubOutOfReach, hub_errors
from dq_multimodal.data.local import SAVED_MARKS, Source, is_local, load_local
from dq_multimodal.data.pixels import read_paths
from dq_multimodal.data.row_files import (
    CARD_FILES,
    RowFiles,
    admit,
    allow_folder,
    has_files,
    hash_files,
    read_card,
)
from dq_multimodal.data.splits import ALL, count_splits, take_slice, take_splits
from dq_multimodal.data.stream import Stream, reading, stream_from
from dq_multimodal.files import expand_home

AnyDataset = str | os.PathLike[str] | Dataset | DatasetDict
"""A Hub id, a local path, or a loaded dataset, of which split names what is meant."""

TABLES = ("arrow", "cache", "csv", "hdf5", "iceberg", "json", "lance", "pandas", "parquet", "sql")
"""Builders of `datasets` whose rows come from a table that another may have written."""
HASHED_ROWS = 1000
LICENCE = ("license", "license_name", "license_link")
"""Keys of a card that say it."""
OLD_PIN = ", or an earlier release pinned it, without the folders of its files: compress it again"
MEMORY = "dataset"
"""The name of a dataset that came as an object and not by name."""


def load_source(
    name: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    n_rows: int | None = None,
    image_folder: str | None = None,
) -> Source:
    """Load a dataset by Hub id or local path, and pin what was loaded.

    Args:
        name: OWNER/NAME on the Hub; a .parquet, .json, .jsonl or .csv file or glob of one kind; a
            folder made by `save_to_disk`; or a folder of such files.
        split: Name or slice, as `datasets.load_dataset` takes it.
        config_name: Configuration of a Hub dataset or of a folder.
        revision: Branch, tag or commit of a Hub dataset.
        field: Key of local JSON files under which the list of rows is.
        streaming: Read the rows as a stream, pass by pass.
        n_rows: Rows of that stream, where they are known.
        image_folder: Folder in which rows may name files beside the source's own. Columns of paths
            of images are read as images then, where rows have no others.

    Raises:
        InputError: If it cannot be found, reached or read, has no rows, or a row names a file that
            it may not name.
    """
    with reading(name):
        own = allow_folder(image_folder)
        if is_local(name):
            if revision is not None:
                raise InputError(f"revision is for the Hub, and {name} is local")
            source = load_local(name, split, config_name, field, streaming, n_rows, own)
        else:
            if field is not None:
                raise InputError(f"field is for local .json files, and {name} is on the Hub")
            source = _load_from_hub(name, split, config_name, revision, streaming, n_rows, own)
    if not streaming and not len(source.dataset):
        raise InputError(f"{name} has no rows in split {split!r}")
    if split == ALL and not isinstance(source.dataset, Stream):
        source.origin["splits"] = count_splits(source.dataset)
    if image_folder is not None:
        with reading(name):
            source = replace(source, dataset=_read_paths(source.dataset, own, name))
    source.origin.update(_pin_folder(source.dataset, image_folder))
    return source


def _read_paths(dataset: Any, own: RowFiles, name: str) -> Any:
    """Read paths into the folder of a user as images; InputError if no row can name a file."""

    def is_there(path: str) -> bool:
        place = own.find(path)
        return place is not None and Path(place).is_file()

    is_stream = isinstance(dataset, Stream)
    named = dataset if is_stream else read_paths(dataset, is_there)
    if not any(map(has_files, named.features.values())):
        raise InputError(
            f"image_folder is for rows that name images, and {name} has no column of images, nor "
            f"one of nothing but paths of images, of which the first lies in {own.folder}"
            + (" (of a stream paths are not read)" if is_stream else "")
        )
    return named if named is dataset else admit(named, own, name)


def _pin_folder(dataset: Dataset | Stream, image_folder: str | None) -> dict[str, str]:
    """Give what an origin records of the folder in which rows name files, and of these files."""
    if image_folder is None:
        return {}
    names = [name for name, kind in dataset.features.items() if has_files(kind)]
    files = dataset.select_columns(names).with_format("arrow")
    return {
        "image_files": hash_files(files.iter(HASHED_ROWS), files.features),
        "image_folder": str(expand_home(image_folder).absolute()),
    }


def reload_source(origin: dict[str, Any], *, streaming: bool = False) -> Source:
    """Load the rows that a config.yaml recorded, and make sure that they are the same.

    InputError if they cannot be had or have changed; the number of rows of a stream is checked by
    every whole pass over it.
    """
    if origin["kind"] == "memory":
        raise InputError("the source was a dataset in memory, which is not recorded")
    if origin.get("image_files") and not origin.get("image_folder"):
        raise InputError("the source names files in a folder of the machine that it was read on")
    keys = ("config_name", "revision", "field", "image_folder")
    source = load_source(
        origin.get("path") or origin["name"],
        split=origin["split"],
        streaming=streaming,
        n_rows=origin["rows"],
        **{key: origin.get(key) for key in keys},
    )
    source.origin.setdefault("rows", origin["rows"])
    if not is_same_source(origin, source.origin):
        old = "" if "names" in origin or origin["kind"] != "folder" else OLD_PIN
        raise InputError(f"{origin['name']} is not what it was: its content has changed{old}")
    return source


def is_same_source(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Say whether two origins are of the same rows, one of an earlier release as far as it says."""
    has_names = "names" in before
    return pin_of(before, has_names) == pin_of(now, has_names)


def pin_of(origin: dict[str, Any], has_names: bool = True) -> Any:
    """Give the part of an origin that says which rows it was."""
    part = [origin.get(key) for key in ("rows", "split", "config_name")]
    part += [origin[key] for key in ("field", "image_files") if origin.get(key)]
    if "files" in origin:
        names = [[file["name"] for file in origin["files"]]] if has_names else []
        return [file["sha256"] for file in origin["files"]], *names, *part
    return origin.get("revision") or origin.get("fingerprint"), *part


def from_memory(
    dataset: Dataset | DatasetDict, split: str = "train", image_folder: str | None = None
) -> Source:
    """Wrap a dataset object, or the slice of it, or of one of its splits, that is asked for.

    Raises:
        InputError: If it is another kind of object, has no rows, or a row names a file that it may
            not name: a dataset made in Python may name any on this machine, one that was read from
            a table or made by save_to_disk those of the folder only.
    """
    origin: dict[str, Any] = {"kind": "memory", "name": MEMORY, "split": split}
    if not isinstance(dataset, Dataset | DatasetDict):
        raise InputError(
            f"dataset must be a Hub id, a path or a datasets.Dataset, got {type(dataset).__name__}"
        )
    dataset = dataset.with_format(None)
    parts = [dataset] if isinstance(dataset, Dataset) else [*dataset.values()]
    files = [Path(file["filename"]) for part in parts for file in part.cache_files]
    is_saved = any(file.with_name(SAVED_MARKS[0]).exists() for file in files)
    is_own = not is_saved and not any(part.info.builder_name in TABLES for part in parts)
    with reading(MEMORY):
        if isinstance(dataset, Dataset):
            dataset = take_slice(dataset, split)
        else:
            dataset = take_splits(dataset.__getitem__, dataset, split, MEMORY)
            origin["splits"] = count_splits(dataset) if split == ALL else None
    if not len(dataset):
        raise InputError("the dataset has no rows")
    own = replace(allow_folder(image_folder), is_own=is_own)
    admitted = admit(dataset, own, MEMORY)
    if image_folder is not None:
        admitted = _read_paths(admitted, own, MEMORY)
    origin |= {"fingerprint": dataset._fingerprint, "rows": len(dataset)}
    return Source(admitted, origin | _pin_folder(admitted, image_folder))


def _load_from_hub(
    name: str,
    split: str,
    config_name: str | None,
    revision: str | None,
    streaming: bool,
    n_rows: int | None,
    own: RowFiles,
) -> Source:
    licence: dict[str, Any] = {}
    names = {name}
    missing = f"there is no such dataset on the Hub that this token may read, and no path {name}"
    loaded: Dataset | Stream
    try:
        with hub_errors(f"read {name}", "try again later", missing=missing):
            info = HfApi().dataset_info(name, revision=revision)
            commit = info.sha
            names.add(info.id)  # another where the repository was renamed
            stated = info.card_data.to_dict() if info.card_data else {}
            licence = {key: stated[key] for key in LICENCE if stated.get(key)}
            for file in {file.rfilename for file in info.siblings or []} & {*CARD_FILES}:
                card = hf_hub_download(name, file, repo_type="dataset", revision=commit)
                read_card(Path(card).parent, name, repository=name)
            if streaming:
                own = replace(own, roots=tuple(f"hf://datasets/{n}@{commit}/" for n in names))
                make = partial(load_dataset_builder, name, config_name, revision=commit)
                loaded = stream_from(name, make, split, n_rows, own=own)
            else:
                loaded = load_dataset(name, config_name, split=split, revision=commit)
    except HubOutOfReach as error:
        if streaming:
            raise InputError(f"the Hub is out of reach, and {name} is to be a stream") from error
        loaded, commit = _load_from_cache(name, split, config_name, revision)
    origin: dict[str, Any] = {"kind": "hub", "name": name, "split": split}
    origin |= {"config_name": config_name, "revision": commit, "license": None, **licence}
    if isinstance(loaded, Dataset):
        own = replace(own, roots=tuple(_cache_of(n, commit) for n in names))
        loaded = admit(loaded, own, name)
        origin["rows"] = len(loaded)
    return Source(loaded, origin)


def _cache_of(name: str, commit: str | None) -> str:
    """Give the folder in which the cache holds the files of a commit, with a slash behind it."""
    repo = repo_folder_name(repo_id=name, repo_type="dataset")
    place = Path(huggingface_hub.constants.HF_HUB_CACHE, repo, "snapshots", str(commit))
    return os.path.normpath(place.absolute()) + os.sep


def _load_from_cache(
    name: str, split: str, config_name: str | None, revision: str | None
) -> tuple[Dataset, str | None]:
    """Load what the cache holds of a Hub dataset, and read the commit off its path."""
    try:
        with hub_offline():
            loaded = load_dataset(name, config_name, split=split)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise InputError(
            f"the Hub is out of reach and {name} is not in the local cache: give a local "
            "file, or see recipes/configs/demo.yaml (`make demo`), which needs no network"
        ) from error
    paths = " ".join(file["filename"] for file in loaded.cache_files)
    found = re.search(r"[\\/]([0-9a-f]{40})[\\/]", paths)
    commit = found.group(1) if found else None
    if revision is not None and revision != commit:
        raise InputError(
            f"the Hub is out of reach: revision {revision!r} of {name} cannot be looked up, and "
            f"the cache holds {commit or 'one without a commit'}"
        )
    return loaded, commit


@contextmanager
def hub_offline() -> Iterator[None]:
    """Make the Hugging Face libraries use their caches at once, without minutes of retries."""
    holders: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    for holder in holders:
        holder.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value
