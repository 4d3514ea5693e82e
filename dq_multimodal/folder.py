"""The run folder as a place to write: claimed by one process, every file whole or absent."""

import errno
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from dq_multimodal import embedding, patch_records, report, scoring, selection, subset
from dq_multimodal.atomic import write_text
from dq_multimodal.config import InputError
from dq_multimodal.world import World

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
TOKEN = "world.token"
"""By this file other processes know the folder of rank 0 from another of the same name."""
SHARED_SECONDS = 30.0
"""File systems of a network tell late what is new."""
CARD = "README.md"
OURS = (
    CONFIG,
    MANIFEST,
    TOKEN,
    CARD,
    *embedding.FILES,
    *(file + embedding.PARTIAL for file in embedding.FILES),
    embedding.PROGRESS,
    scoring.FOLDER,
    selection.SELECTION_FILE,
    selection.BINS_FILE,
    subset.FOLDER,
    subset.PARTIAL,
    patch_records.FOLDER,
    *report.FILES,
)
"""Everything that a run may leave in its folder (besides NAME.tmp of each)."""

CONFIG_HEAD = "# What was asked of dq-multimodal, and what exactly it was asked of.\n"


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Make a folder ours for writing, and keep other processes out of it.

    Raises:
        InputError: If it is a file, cannot be written, holds other things, or is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output folder {folder} is a file")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    with _locked(folder):
        try:
            _check_writable(folder)
            yield
        except FileNotFoundError as error:
            if folder.exists() and f"'{folder}{os.sep}" not in str(error):
                raise
            name = folder if error.filename is None else error.filename
            raise InputError(
                f"{name} was removed while the run needed it: the same command makes it again"
            ) from error
        finally:
            with suppress(OSError):  # of the first that holds something
                for place in made:
                    place.rmdir()


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    others = [p.name for p in folder.iterdir() if p.name.removesuffix(".tmp") not in OURS]
    if others and not (folder / CONFIG).exists():
        raise InputError(
            f"the output folder {folder} is not a run folder and holds other files "
            f"({sorted(others)[0]}): name an empty or new one"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
            yield
            return
        raise InputError(f"another process is writing to {folder}") from error
    try:
        yield
    finally:
        os.close(descriptor)


def share_folder(folder: Path, world: World) -> None:
    """Tell the other processes, if there are any, which folder is written to."""
    if not world.is_alone:
        token = secrets.token_hex(16)
        write_text(folder / TOKEN, token)
        world.post("folder", folder=str(folder.absolute()), token=token)


def check_folder(folder: str, token: str, rank: int) -> None:
    """Make sure that this process sees the folder that rank 0 writes to.

    Raises:
        InputError: If it lies on a disk of another machine.
    """
    until = time.monotonic() + SHARED_SECONDS
    while True:
        with suppress(OSError):
            if (Path(folder) / TOKEN).read_text() == token:
                return
        if time.monotonic() > until:
            raise InputError(
                f"rank {rank} does not see the output folder {folder} of rank 0: it must lie on a "
                "file system that all machines share"
            )
        time.sleep(0.1)


def clear_folder(folder: Path) -> None:
    """Remove what a run left in a folder, and nothing else."""
    for name in OURS:
        for path in (folder / name, folder / (name + ".tmp")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def write_config(folder: Path, document: dict[str, Any]) -> None:
    """Write config.yaml."""
    write_text(folder / CONFIG, format_config(document))


def format_config(document: dict[str, Any]) -> str:
    """Give the text of config.yaml."""
    return CONFIG_HEAD + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read config.yaml; None where there is none.

    Raises:
        InputError: If it is not one of ours.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(document["request"], dict) or not isinstance(document["source"], dict):
            raise KeyError("request")
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not the config.yaml of a run") from error
    return document


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json; an empty one where there is none."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / MANIFEST} is not the manifest.json of a run") from error
