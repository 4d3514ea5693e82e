"""The run folder as a place to write: claimed by one process, every file whole or absent."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from dq_multimodal import documents, report
from dq_multimodal.card import CARD, FIGURE_TEXTS, FIGURES
from dq_multimodal.config import InputError
from dq_multimodal.data.local import check_path
from dq_multimodal.distributed.world import World
from dq_multimodal.files import open_parquet, write_text
from dq_multimodal.stages import embedding, patch_records, scoring, selection, subset, targeting

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
TOKEN = "world.token"
"""By this file other processes know the folder of rank 0 from another of the same name."""
SHARED_SECONDS = 30.0
"""File systems of a network tell late what is new."""
MARK = b'{\n  "format": "dq-multimodal run '
"""How a manifest.json of ours begins; it is the first file that a run writes."""
SHOWN = (
    *(name for name in report.FILES if name != FIGURES),
    *(f"{FIGURES}/{n}" for n in FIGURE_TEXTS),
)
"""What a report leaves."""
OURS = (
    TOKEN,
    CARD,
    *embedding.FILES,
    *(file + embedding.PARTIAL for file in embedding.FILES),
    embedding.PROGRESS,
    selection.SELECTION_FILE,
    selection.BINS_FILE,
    *SHOWN,
    CONFIG,
)
"""Files that a run may leave beside its mark (besides NAME.tmp of each)."""
_ROWS = "|".join(re.escape(name) for name in (*embedding.FILES, embedding.PROGRESS))
WHOLE = {
    subset.FOLDER: subset.PART,
    subset.PARTIAL: subset.PART,
    scoring.FOLDER: rf"(rows|views)(/({_ROWS})({re.escape(embedding.PARTIAL)}|\.tmp)?)?",
    patch_records.FOLDER: r"\d{6}\.parquet(\.tmp)?",
    targeting.FOLDER: targeting.WHOLE_PATTERN,
}
"""Folders that a run replaces or removes as a whole, and what it writes into them."""

CONFIG_HEAD = "# What was asked of dq-multimodal, and what exactly it was asked of.\n"


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Make a folder ours for writing, and keep other processes out of it.

    Raises:
        InputError: If it is a file, cannot be written, holds other things, or is in use.
    """
    check_path(folder)  # the subset is to be loaded from there
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
    names = sorted(path.name for path in folder.iterdir())
    if names and not is_ours(folder):
        raise InputError(
            f"the output folder {folder} is not a run folder and holds other files "
            f"({names[0]}): name an empty or new one"
        )


def is_ours(folder: Path) -> bool:
    """Say whether a run made a folder: by the mark in its manifest.json, and nothing else.

    Runs of earlier releases have no mark: their manifest.json and config.yaml must be whole. A run
    that was stopped before it had anything leaves the beginning of its mark.
    """
    if documents.has_mark(folder / MANIFEST):
        return True
    started = folder / (MANIFEST + ".tmp")
    if [path.name for path in folder.iterdir()] == [started.name] and started.is_file():
        content = started.read_bytes()
        return content.startswith(MARK) or MARK.startswith(content)
    try:
        return bool(read_config(folder)) and "rows" in read_manifest(folder)
    except InputError:
        return False


def check_apart(target: Path, place: Path, name: str) -> None:
    """Raise if something that a run reads lies in its output folder, wherever links lead.

    Args:
        target: The output folder.
        place: A file, or a folder with all that is in it.
        name: What the message calls it.
    """
    if not target.exists() or not any(target.iterdir()):
        return  # nothing lies in it
    links = (
        path
        for base, folders, files in os.walk(place)
        for path in (Path(base, part) for part in folders + files)
        if path.is_symlink()
    )
    for path in (place, *links):
        real = path.resolve()
        if real == target.resolve() or target.resolve() in real.parents:
            raise InputError(f"{name} lies in the output folder {target}: name another")


def check_strangers(folder: Path) -> None:
    """Raise if others put something where a run writes, or where it replaces a whole folder."""
    for name in OURS:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise InputError(f"{folder / name} is a folder, and a run writes a file there")
    for name, known in WHOLE.items():
        place = folder / name
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise InputError(f"{place} is not the folder that a run makes: move it away")
        for path in place.rglob("*"):
            if not re.fullmatch(known, path.relative_to(place).as_posix()) or path.is_symlink():
                raise InputError(f"{path} was not written by a run: move it away")


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
    """Remove what a run left in a folder, its mark and its card apart, and nothing else.

    Nobody else has put anything where it writes (see `check_strangers`), but for the card (see
    `card.clear_card`).
    """
    for name in {*OURS} - {CARD}:
        for path in (folder / name, folder / (name + ".tmp")):
            if path.is_symlink() or path.is_file():
                path.unlink()
    for name in WHOLE:
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    with suppress(OSError):  # holds figures of others
        (folder / FIGURES).rmdir()


def write_config(folder: Path, document: dict[str, Any]) -> None:
    """Write config.yaml."""
    write_text(folder / CONFIG, format_config(document))


def format_config(document: dict[str, Any]) -> str:
    """Give the text of config.yaml."""
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    return CONFIG_HEAD + yaml.dump(
        document, Dumper=dumper, sort_keys=False, allow_unicode=True, width=100
    )


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read config.yaml; None where there is none.

    Raises:
        InputError: If it is not one of ours.
    """
    path = folder / CONFIG
    return documents.read_config(path) if path.is_file() else None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, its mark first."""
    write_text(folder / MANIFEST, format_manifest(manifest))


def format_manifest(manifest: dict[str, Any]) -> str:
    """Give the text of manifest.json, its mark first; one of an earlier release gets none."""
    is_older = manifest.get("complete") and "files" not in manifest
    document = manifest if is_older else {"format": documents.FORMAT, **manifest}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json; an empty one where there is none.

    Raises:
        InputError: If it is not one of ours.
    """
    return documents.read_manifest(folder / MANIFEST)


def record_files(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Give a manifest with bytes and SHA-256 of all files of the run, and its own digest."""
    picks = f"{targeting.FOLDER}/{targeting.PICKS}"
    names = [CONFIG, selection.SELECTION_FILE, selection.BINS_FILE, embedding.FILE, picks, *SHOWN]
    names.remove(report.FILE)  # tells how long the work took
    paths = [path for name in names if (path := folder / name).is_file()]
    paths += subset.subset_files(folder)
    files = {path.relative_to(folder).as_posix(): documents.describe_file(path) for path in paths}
    return documents.seal({"format": documents.FORMAT, **manifest, "files": files})


def record_config(manifest: dict[str, Any], text: str) -> dict[str, Any]:
    """Give a manifest for a config.yaml of another text, such as one without local folders."""
    if "files" not in manifest:
        return manifest
    content = text.encode()
    changed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return documents.seal({**manifest, "files": {**manifest["files"], CONFIG: changed}})


def find_damage(folder: Path, manifest: dict[str, Any], *, is_deep: bool = False) -> dict[str, str]:
    """Say which files of a finished run are gone or not what was written, and how.

    Args:
        folder: The run folder.
        manifest: Its manifest. One of an earlier release recorded no files: only torn ones show.
        is_deep: Compare SHA-256 and not only bytes.
    """
    parts = {path.relative_to(folder).as_posix() for path in folder.glob(subset.FOLDER + "/*")}
    needed = {CONFIG, selection.SELECTION_FILE, selection.BINS_FILE, subset.FOLDER, *parts}
    record = manifest.get("files")
    if record is None:
        return {name: "is torn" for name in sorted(needed | {CARD}) if _is_torn(folder / name)}
    parts |= {name for name in record if re.fullmatch(f"{subset.FOLDER}/{subset.PART}", name)}
    may_be = {embedding.FILE, f"{targeting.FOLDER}/{targeting.PICKS}", *SHOWN}
    found = {}
    for name in sorted((needed - {subset.FOLDER}) | parts | record.keys()):
        path, written = folder / name, record.get(name)
        if written is None or name not in needed | parts | may_be:
            found[name] = "was not recorded"
        elif not path.is_file():
            found[name] = "is missing"
        elif path.stat().st_size != written["bytes"]:
            found[name] = f"has {path.stat().st_size:,} bytes and not {written['bytes']:,}"
        elif is_deep and documents.describe_file(path) != written:
            found[name] = "has another content"
    page = folder / report.FILE
    if page.is_file() and not page.read_bytes().rstrip().endswith(b"</html>"):
        found[report.FILE] = "is torn"
    for name in (CARD, *(() if parts else (subset.FOLDER,))):
        if _is_torn(folder / name):  # a card may be edited, and has no record
            found[name] = "is missing"
    return found


def _is_torn(path: Path) -> bool:
    """Say whether a file is missing, empty or cut, or a folder empty."""
    import pyarrow as pa

    if path.suffix != ".parquet":
        return not (
            any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size
        )
    try:
        with open_parquet(path):
            return False
    except (OSError, pa.ArrowException):
        return True
