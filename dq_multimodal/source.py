"""Where the rows come from: a Hub dataset, local files or a folder, or a dataset in memory."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.local_data import is_local, load_local
from dq_multimodal.splits import take_slice
from dq_multimodal.stream import Stream, first_line, open_stream, reading

if TYPE_CHECKING:
    from datasets import Dataset

OLD_PIN = ", or an earlier release pinned it, without the folders of its files: compress it again"
MEMORY = "dataset"
"""The name of a dataset that came as an object and not by name."""


@dataclass(frozen=True)
class Source:
    """A loaded dataset and where it is from.

    Attributes:
        dataset: All its rows, memory-mapped, without a format or transform; or a stream of them.
        origin: What config.yaml records: kind, name, split, and what pins the content (the commit
            of a Hub dataset, the hashes of local files, the fingerprint of an object), and the
            number of rows, of a stream once they have been counted.
        files: The data files themselves, where they are on this machine.
        check: Raises if one of these files has changed since it was pinned.
        note: What lies beside these files in their folder and is not read.
    """

    dataset: "Dataset | Stream"
    origin: dict[str, Any]
    files: tuple[str, ...] = ()
    check: Callable[[], None] = lambda: None
    note: str | None = None


def load_source(
    name: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    n_rows: int | None = None,
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

    Raises:
        InputError: If it cannot be found, reached or read, or has no rows.
    """
    with reading(name):
        if not is_local(name):
            if field is not None:
                raise InputError(f"field is for local .json files, and {name} is on the Hub")
            source = _load_from_hub(name, split, config_name, revision, streaming, n_rows)
        elif revision is not None:
            raise InputError(f"revision is for the Hub, and {name} is local")
        else:
            found = load_local(
                name,
                split,
                config_name=config_name,
                field=field,
                streaming=streaming,
                n_rows=n_rows,
            )
            source = Source(found.dataset, found.origin, found.files, found.check, found.note)
    if not streaming and not len(source.dataset):
        raise InputError(f"{name} has no rows in split {split!r}")
    return source


def reload_source(origin: dict[str, Any], *, streaming: bool = False) -> Source:
    """Load the rows that a config.yaml recorded, and make sure that they are the same.

    Of a stream, the number of rows is checked by every whole pass over it.

    Raises:
        InputError: If they cannot be had or have changed.
    """
    if origin["kind"] == "memory":
        raise InputError("the source was a dataset in memory, which is not recorded")
    source = load_source(
        origin.get("path") or origin["name"],
        split=origin["split"],
        config_name=origin.get("config_name"),
        revision=origin.get("revision"),
        field=origin.get("field"),
        streaming=streaming,
        n_rows=origin["rows"],
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
    part = (origin.get("rows"), origin["split"], origin.get("config_name"), origin.get("field"))
    if "files" in origin:
        names = [file["name"] for file in origin["files"]] if has_names else None
        return [file["sha256"] for file in origin["files"]], names, *part
    return origin.get("revision") or origin.get("fingerprint"), *part


def from_memory(dataset: "Dataset", split: str = "train") -> Source:
    """Wrap a dataset object, or the slice of it that the split asks for.

    Raises:
        InputError: If it is another kind of object, or has no rows.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise InputError(
            f"dataset must be a Hub id, a path or a datasets.Dataset, got {type(dataset).__name__}"
        )
    dataset = take_slice(dataset.with_format(None), split)
    if not len(dataset):
        raise InputError("the dataset has no rows")
    origin = {"kind": "memory", "name": MEMORY, "split": split}
    return Source(dataset, {**origin, "fingerprint": dataset._fingerprint, "rows": len(dataset)})


def _load_from_hub(
    name: str,
    split: str,
    config_name: str | None,
    revision: str | None,
    streaming: bool,
    n_rows: int | None,
) -> Source:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import HfHubHTTPError, httpx

    licence = None
    try:
        info = HfApi().dataset_info(name, revision=revision)
        commit = info.sha
        licence = getattr(info.card_data, "license", None) if info.card_data else None
        loaded: Dataset | Stream
        if streaming:
            loaded = open_stream(
                name, name, config_name, split=split, n_rows=n_rows, revision=commit
            )
        else:
            loaded = datasets.load_dataset(name, config_name, split=split, revision=commit)
    except RevisionNotFoundError as error:
        raise InputError(f"{name} on the Hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"no dataset {name} on the Hub that this token may read, and no local path {name}"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{name!r} is neither a local path nor a Hub id OWNER/NAME") from error
    except HfHubHTTPError as error:
        raise InputError(f"the Hub refused to show {name}: {first_line(error)}") from error
    except (httpx.HTTPError, ConnectionError) as error:
        if streaming:
            raise InputError(f"the Hub is out of reach, and {name} is to be a stream") from error
        loaded, commit = _load_from_cache(name, split, config_name, revision)
    origin = {"kind": "hub", "name": name, "split": split, "config_name": config_name}
    origin |= {"revision": commit, "license": licence}
    return Source(loaded, origin if streaming else {**origin, "rows": len(loaded)})


def _load_from_cache(
    name: str, split: str, config_name: str | None, revision: str | None
) -> tuple["Dataset", str | None]:
    """Load what the cache holds of a Hub dataset, and read the commit off its path."""
    import datasets

    try:
        with hub_offline():
            loaded = datasets.load_dataset(name, config_name, split=split)
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
    import datasets.config
    import huggingface_hub.constants

    holders: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    for holder in holders:
        holder.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value
