"""Where the rows come from: a Hub dataset, local files or a folder, or a dataset in memory."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
MEMORY = "dataset"
"""The name of a dataset that came as an object and not by name."""


@dataclass(frozen=True)
class Source:
    """A loaded dataset and where it is from.

    Attributes:
        dataset: All its rows, memory-mapped.
        origin: What config.yaml records: kind, name, split, and what pins the content (the commit
            of a Hub dataset, the hashes of local files, the fingerprint of an object).
    """

    dataset: "Dataset"
    origin: dict[str, Any]


def load_source(
    name: str, *, split: str = "train", config_name: str | None = None, revision: str | None = None
) -> Source:
    """Load a dataset by Hub id or local path, and pin what was loaded.

    Args:
        name: OWNER/NAME on the Hub; a .parquet, .json, .jsonl or .csv file or glob of one kind; a
            folder made by `save_to_disk`; or a folder of such files.
        split: Name or slice, as `datasets.load_dataset` takes it.
        config_name: Configuration of a Hub dataset.
        revision: Branch, tag or commit of a Hub dataset.

    Raises:
        InputError: If it cannot be found, reached or read, or has no rows.
    """
    if _is_local(name):
        source = _load_local(name, split)
    else:
        source = _load_from_hub(name, split, config_name, revision)
    if not len(source.dataset):
        raise InputError(f"{name} has no rows in split {split!r}")
    return source


def reload_source(origin: dict[str, Any]) -> Source:
    """Load the rows that a config.yaml recorded, and make sure that they are the same.

    Raises:
        InputError: If they cannot be had or have changed.
    """
    if origin["kind"] == "memory":
        raise InputError("the source was a dataset in memory, which is not recorded")
    source = load_source(
        origin["name"],
        split=origin["split"],
        config_name=origin.get("config_name"),
        revision=origin.get("revision"),
    )
    if pin_of(source.origin) != pin_of(origin):
        raise InputError(f"{origin['name']} is not what it was: its content has changed")
    return source


def pin_of(origin: dict[str, Any]) -> Any:
    """Give the part of an origin that says which content it was."""
    if "files" in origin:
        return [file["sha256"] for file in origin["files"]], origin["rows"]
    return origin.get("revision") or origin.get("fingerprint"), origin["rows"]


def from_memory(dataset: "Dataset") -> Source:
    """Wrap a dataset object.

    Raises:
        InputError: If it is another kind of object, or has no rows.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise InputError(
            f"dataset must be a Hub id, a path or a datasets.Dataset, got {type(dataset).__name__}"
        )
    if not len(dataset):
        raise InputError("the dataset has no rows")
    origin = {"kind": "memory", "name": MEMORY, "split": str(dataset.split or "train")}
    return Source(dataset, {**origin, "fingerprint": dataset._fingerprint, "rows": len(dataset)})


def base_split(split: str) -> str:
    """Give the name of a split without its slice: train[:90%] -> train."""
    return re.split(r"[\[+]", split)[0] or "train"


def _is_local(name: str) -> bool:
    path = Path(name).expanduser()
    has_data_suffix = path.suffix.lower() in BUILDERS
    looks_local = (
        has_data_suffix or name.startswith(("/", ".", "~")) or any(c in name for c in "*?[")
    )
    return looks_local or path.exists()


def _load_local(name: str, split: str) -> Source:
    import datasets

    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        is_saved = any(p.name in ("dataset_info.json", "dataset_dict.json") for p in files)
        if not is_saved:
            files = [p for p in files if p.suffix.lower() in BUILDERS]
    else:
        root = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
        files = [path] if path.is_file() else sorted(p for p in root.glob(pattern) if p.is_file())
        is_saved = False
    if not files:
        wanted = "data files in it" if path.is_dir() else "such file or folder"
        raise InputError(f"no {wanted}: {name} (wanted .parquet, .json, .jsonl or .csv)")
    suffixes = {BUILDERS.get(p.suffix.lower(), p.suffix) for p in files}
    if not is_saved and (len(suffixes) != 1 or not suffixes <= set(BUILDERS.values())):
        raise InputError(
            f"{name} must be .parquet, .json, .jsonl or .csv files of one kind, "
            f"got {', '.join(sorted(suffixes))}"
        )
    with _one_line(name):
        if is_saved:
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise InputError(f"{name} has no split {split!r}, only {', '.join(loaded)}")
                loaded = loaded[split]
        else:
            data_files = [str(p) for p in files]
            loaded = datasets.load_dataset(suffixes.pop(), data_files=data_files, split=split)
    origin = {
        "kind": "folder" if path.is_dir() else "file",
        "name": name,
        "split": split,
        "files": [
            {"name": p.name, "bytes": p.stat().st_size, "sha256": hash_file(p)} for p in files
        ],
        "rows": len(loaded),
    }
    return Source(loaded, origin)


def _load_from_hub(name: str, split: str, config_name: str | None, revision: str | None) -> Source:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import HfHubHTTPError, httpx

    licence, is_reached = None, True
    try:
        info = HfApi().dataset_info(name, revision=revision)
        revision = info.sha
        licence = getattr(info.card_data, "license", None) if info.card_data else None
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
    except (httpx.HTTPError, ConnectionError):
        is_reached = False
    with _one_line(name):
        if is_reached:
            loaded = datasets.load_dataset(name, config_name, split=split, revision=revision)
        else:
            try:
                with hub_offline():
                    loaded = datasets.load_dataset(name, config_name, split=split)
            except (ConnectionError, FileNotFoundError, ValueError) as error:
                raise InputError(
                    f"the Hub is out of reach and {name} is not in the local cache: give a local "
                    "file, or see recipes/configs/demo.yaml (`make demo`), which needs no network"
                ) from error
            revision = _cached_revision(loaded)
    origin = {"kind": "hub", "name": name, "split": split, "config_name": config_name}
    return Source(loaded, {**origin, "revision": revision, "license": licence, "rows": len(loaded)})


def _cached_revision(dataset: "Dataset") -> str | None:
    """Read the commit off the cache path of a Hub dataset."""
    paths = " ".join(file["filename"] for file in dataset.cache_files)
    found = re.search(r"[\\/]([0-9a-f]{40})[\\/]", paths)
    return found.group(1) if found else None


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


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the dataset."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except StopIteration as error:
        raise InputError(f"{name} has no rows") from error
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise InputError(f"{name} has no rows") from error
        raise InputError(f"cannot read {name}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Give the first line of the deepest message in a chain of exceptions."""
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def hash_file(path: Path) -> str:
    """Give the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
