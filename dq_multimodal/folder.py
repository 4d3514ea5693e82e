"""The run folder as a place to write: claimed by one process, every file whole or absent."""

import errno
import glob
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from dq_multimodal import __version__, card, report
from dq_multimodal.card import CARD, FIGURE_TEXTS, FIGURES
from dq_multimodal.config import CompressConfig, InputError, split_models
from dq_multimodal.data.local import check_path
from dq_multimodal.data.source import Source, is_same_source
from dq_multimodal.files import describe_file, expand_home
from dq_multimodal.manifest import (
    CONDENSED,
    CONFIG,
    FORMAT,
    MANIFEST,
    Config,
    ConfigFile,
    Manifest,
    ManifestFile,
    Model,
    Stage,
    Written,
    begin_mark,
    has_mark,
    write_mark,
)
from dq_multimodal.options import Request
from dq_multimodal.stages import embedding, patching, scoring, subset, targeting
from dq_multimodal.stages.preparation import MODELS
from dq_multimodal.stages.selection import BINS_FILE, SELECTION_FILE, read_selection

C = TypeVar("C", bound=ConfigFile)
M = TypeVar("M", bound=ManifestFile)

LOCK = "run.lock"
"""There while a process writes to the folder, or after it was killed; see filelock."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""How file systems that have no locks answer: there, nothing keeps a second process out."""
SHOWN = (
    *(name for name in report.FILES if name != FIGURES),
    *(f"{FIGURES}/{n}" for n in FIGURE_TEXTS),
)
"""What a report leaves."""
OURS = (
    "world.token",  # of earlier releases
    CARD,
    *embedding.FILES,
    *(file + embedding.PARTIAL for file in embedding.FILES),
    embedding.PROGRESS,
    SELECTION_FILE,
    BINS_FILE,
    *SHOWN,
    CONFIG,
)
"""Files that a run may leave beside its mark (besides NAME.tmp of each)."""
_ROWS = "|".join(re.escape(name) for name in (*embedding.FILES, embedding.PROGRESS))
PARTS = "parts"
"""What the engine ray has done so far; gone when the run is finished."""
WHOLE = {
    subset.FOLDER: f"{subset.PART}|{re.escape(subset.FILE_NAMES)}",
    subset.PARTIAL: f"{subset.PART}|{re.escape(subset.FILE_NAMES)}",
    scoring.FOLDER: rf"(rows|views)(/({_ROWS})({re.escape(embedding.PARTIAL)}|\.tmp)?)?",
    patching.FOLDER: r"\d{6}\.parquet(\.tmp)?",
    targeting.FOLDER: targeting.WHOLE_PATTERN,
    PARTS: r"[0-9a-f]{16}(/embeddings\.npy(\.tmp)?|/[a-z]+(/\d{5,}(-\d+)?\.(json|parquet|bin|txt)"
    r"(\.[0-9a-f]{32}\.tmp)?)?)?",
}
"""Folders that a run replaces or removes as a whole, and what it writes into them."""
PICKS = f"{targeting.FOLDER}/{targeting.PICKS}"
KEPT_FILES = f"{subset.FOLDER}/{subset.FILE_NAMES}"
STAGES = {
    "embeddings": (embedding.FILE,),
    "selection": (SELECTION_FILE, BINS_FILE, targeting.FOLDER),
    "subset": (subset.FOLDER,),
    "report": SHOWN,
}
"""Which stage of a run writes which files."""
BEGUN: dict[Stage, str] = {
    "embeddings": embedding.PROGRESS,
    "selection": scoring.FOLDER,
    "subset": patching.FOLDER,
}
"""What a stage leaves when it is stopped on its way."""
PACKAGES = ("torch", "numpy", "datasets", "sentence-transformers", "transformers", "timm")


@contextmanager
def claim_folder(folder: Path, mark: str = FORMAT) -> Iterator[None]:
    """Make a folder ours for writing, and keep other processes out of it.

    By its mark it is known as a run's, or as that of something else of ours.

    Raises:
        InputError: If it is a file, cannot be written, holds other things, or is in use.
    """
    check_path(folder)  # the subset is to be loaded from there
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output folder {folder} is a file")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / LOCK  # an empty file
        if own.is_symlink() or (own.exists() and (not own.is_file() or own.stat().st_size)):
            raise _strange(folder, LOCK, mark)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(f"another process is writing to {folder}") from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise InputError(
                f"cannot write to the output folder {folder}: {error.strerror}"
            ) from error
    try:
        if (names := _names(folder)) and not is_ours(folder, mark):
            raise _strange(folder, names[0], mark)
        yield
    except FileNotFoundError as error:
        if folder.exists() and f"'{folder}{os.sep}" not in str(error):
            raise
        name = folder if error.filename is None else error.filename
        raise InputError(
            f"{name} was removed while the run needed it: the same command makes it again"
        ) from error
    finally:
        try:
            with suppress(OSError):
                (folder / LOCK).unlink()  # whoever waits for it sees that it is gone
        finally:
            lock.release()
        with suppress(OSError):  # of the first that holds something
            for place in made:
                place.rmdir()


def _strange(folder: Path, name: str, mark: str) -> InputError:
    what = "a condensed set" if mark == CONDENSED else "a run folder"
    return InputError(
        f"the output folder {folder} is not {what} and holds other files ({name}): name an "
        "empty or new one"
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


def is_ours(folder: Path, mark: str = FORMAT) -> bool:
    """Say whether a run made a folder: by the mark in its manifest.json, and nothing else.

    A run that was stopped before it had anything leaves the beginning of it.
    """
    started = folder / (MANIFEST + ".tmp")
    if _names(folder) != [started.name] or not started.is_file():
        return has_mark(folder / MANIFEST, mark)
    content, begun = started.read_bytes(), begin_mark(mark)
    return content.startswith(begun) or begun.startswith(content)


def check_apart(target: Path, place: Path, name: str) -> None:
    """Raise if a file, or a folder and what is in it, lies in the output folder by any link."""
    if not target.exists() or not _names(target):
        return  # nothing lies in it
    for path in (place, *(path for path in place.rglob("*") if path.is_symlink())):
        if path.resolve().is_relative_to(target.resolve()):
            raise InputError(f"{name} lies in the output folder {target}: name another")


def spare_inputs(target: Path, request: CompressConfig, source: Source) -> None:
    """Raise before a run would overwrite the very files it is made from."""
    names = [request.dataset, request.ready_embeddings, request.image_folder]
    names += [request.dynamics, request.target]
    names += [part for name in MODELS for part in split_models(getattr(request, name))]
    spare(target, names, source)


def spare(target: Path, names: Iterable[str | None], source: Source) -> None:
    """Raise if one of the inputs that are named, or a file of the source, lies in a folder."""
    files = [file["filename"] for file in getattr(source.dataset, "cache_files", [])]
    for name in filter(None, (*names, *files)):
        path = expand_home(name)
        found = [path] if path.exists() else glob.glob(str(path), recursive=True)  # noqa: PTH207
        for place in map(Path, found):
            check_apart(target, place, name)


def check_strangers(
    folder: Path, ours: Iterable[str] = OURS, whole: dict[str, str] = WHOLE
) -> None:
    """Raise if others put something where a run writes, or where it replaces a whole folder."""
    for name in ours:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise InputError(f"{folder / name} is a folder, and a run writes a file there")
    for name, known in whole.items():
        place = folder / name
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise InputError(f"{place} is not the folder that a run makes: move it away")
        for path in place.rglob("*"):
            if not re.fullmatch(known, path.relative_to(place).as_posix()) or path.is_symlink():
                raise InputError(f"{path} was not written by a run: move it away")


def clear_folder(folder: Path, ours: Iterable[str] = OURS, whole: Iterable[str] = WHOLE) -> None:
    """Remove what a run left in a folder, its mark and its card apart, and nothing else.

    Nobody else has put anything where it writes (see `check_strangers`), but for the card (see
    `card.clear_card`).
    """
    for name in {*ours} - {CARD}:
        for path in (folder / name, folder / (name + ".tmp")):
            if path.is_symlink() or path.is_file():
                path.unlink()
    for name in whole:
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    with suppress(OSError):  # holds figures of others
        (folder / FIGURES).rmdir()


def is_finished(target: Path, config: Config, *, with_report: bool = False) -> bool:
    """Say whether the very run that config asks for is in a folder, finished and whole."""
    before, manifest = read_before(target, Config, Manifest)
    if before is None or _differences(before, config) or manifest is None or not manifest.complete:
        return False
    lost = set(find_damage(target, manifest)) - {CONFIG}  # which is compared by content
    if with_report:
        return not lost and (target / report.FILE).exists()
    return not lost - set(SHOWN)


def begin(target: Path, config: Config, overwrite: bool) -> Manifest | None:
    """Start a run in a claimed folder, or go on with the same one: give its manifest, if any.

    What a finished run has lost, or what is not as long as it was, counts as not done.

    Raises:
        InputError: If another run is there and may not be overwritten, or others put something
            where a run writes.
    """
    before, manifest = read_before(target, Config, Manifest, is_strict=not overwrite)
    differing = _differences(before, config) if before is not None else []
    work = (embedding.FILE, embedding.PROGRESS, targeting.FOLDER, PARTS)
    has_work = any((target / name).exists() for name in work)
    is_complete = manifest is not None and manifest.complete
    if not overwrite and (has_work or is_complete) and (differing or before is None):
        found = "; ".join(differing) or f"its {CONFIG} is missing"
        raise InputError(
            f"{target} holds another run ({found}): use --overwrite or another output folder"
        )
    check_strangers(target)
    if before is None or differing or (overwrite and is_complete):
        write_mark(target)  # before and after all else
        card.clear_card(target)
        clear_folder(target)
        manifest = None
    elif manifest is not None and manifest.complete:
        lost = set(find_damage(target, manifest)) - {CONFIG}
        first = next(
            (k for k, files in enumerate(STAGES.values()) for f in lost if f.startswith(files)),
            len(STAGES),
        )
        manifest.reopen([*STAGES][first:])  # what follows is done again too, with its notes
        manifest.write(target)
    config.write(target)
    return manifest


def read_before(
    target: Path, config: type[C], manifest: type[M], *, is_strict: bool = True
) -> tuple[C | None, M | None]:
    """Read the documents of what is in a folder; unless strict, damaged ones count as none."""
    try:
        found = manifest.read(target)
        if found is not None and not found.is_sealed:
            raise InputError(f"{target / MANIFEST} was changed after the run")
        return config.read(target), found
    except InputError as error:
        if is_strict:
            raise InputError(f"{error}: use --overwrite or another output folder") from error
        return None, None


def _differences(before: Config, config: Config) -> list[str]:
    """Say what another run in the folder was asked or made from."""
    if found := differing_settings(before.request, config.request):
        return found
    old, new = before.embedding or Model(), config.embedding or Model()
    pairs = [(old[part.name], new[part.name]) for part in fields(Model) if part.name != "revision"]
    request = config.request
    is_read = request.needs_embeddings and (not request.ready_embeddings or request.method == "adq")
    templates = [part.rows and part.rows.template for part in (before, config)]
    other = {
        "its source had another content": not is_same_source(
            before.source.as_dict(), config.source.as_dict()
        ),
        "its splits were not told apart": before.source.splits != config.source.splits,
        "its dynamics had another content": before.dynamics != config.dynamics,
        "its target had another content": before.target != config.target,
        "a model folder held other weights": any(
            before.model_folders.get(k) != v for k, v in config.model_folders.items()
        ),
        "its embeddings had another content": any(
            a != b for a, b in pairs if a is not None and b is not None
        ),
        "its text was put together by another template": is_read and templates[0] != templates[1],
    }
    return [what for what, is_so in other.items() if is_so][:1]


def differing_settings(before: Request, asked: Request) -> list[str]:
    """Say which settings are others than before."""
    then, now = before.as_dict(), asked.as_dict()
    return [
        f"{key} {then[key]!r} there, {value!r} asked"
        for key, value in now.items()
        if then[key] != value
    ]


@contextmanager
def stage(place: Path, manifest: Manifest, name: Stage, *files: str) -> Iterator[bool]:
    """Run a stage unless it is done and its files are there; note its seconds when it is done."""
    is_there = all((place / file).exists() for file in files)
    is_due = not manifest.has(name) or not is_there
    begun = BEGUN.get(name)
    is_resumed = is_due and begun is not None and (place / begun).exists()
    started = time.perf_counter()
    yield is_due
    if is_due:
        scored = manifest.seconds.get("scores", 0.0) if name == "selection" else 0.0
        manifest.end_stage(name, time.perf_counter() - started - scored, is_resumed=is_resumed)
        manifest.write(place)


def finish(target: Path, config: Config, manifest: Manifest, kept: int | None = None) -> None:
    """Write the card and the manifest that says that all is there, with the number of kept rows."""
    sizes = [path.stat().st_size for path in subset.subset_files(target)]
    manifest.kept = int(read_selection(target)[1]["kept"].sum()) if kept is None else kept
    manifest.complete = True
    manifest.versions = {"dq-multimodal": __version__, **{p: version(p) for p in PACKAGES}}
    manifest.bytes.subset_files = sum(sizes)
    card.write_card(target, config, manifest)
    for name in (embedding.PROGRESS, embedding.MIDDLE, embedding.TEXTURE):
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / scoring.FOLDER, ignore_errors=True)
    shutil.rmtree(target / patching.FOLDER, ignore_errors=True)  # it is in the subset now
    targeting.forget_vectors(target)
    seal(target, manifest)
    if (target / PARTS).exists():
        shutil.rmtree(target / PARTS, ignore_errors=True)


def seal(target: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished run, with a record of its files."""
    names = [CONFIG, SELECTION_FILE, BINS_FILE, embedding.FILE, PICKS, KEPT_FILES, *SHOWN]
    names.remove(report.FILE)  # tells how long the work took
    parts = [path.relative_to(target).as_posix() for path in subset.subset_files(target)]
    names = [name for name in names if (target / name).is_file()]
    manifest.record_files(target, names + parts)
    manifest.write(target)


def find_damage(folder: Path, manifest: Manifest, *, is_deep: bool = False) -> dict[str, str]:
    """Say which files of a finished run are gone or not what was written, and how.

    Bytes are compared, and where it is to be deep, SHA-256.
    """
    record = manifest.files
    parts = {path.relative_to(folder).as_posix() for path in folder.glob(subset.FOLDER + "/*")}
    parts.discard(KEPT_FILES)  # which runs of earlier releases did not record
    parts |= {name for name in record if re.fullmatch(f"{subset.FOLDER}/{subset.PART}", name)}
    known = {CONFIG, SELECTION_FILE, BINS_FILE, *parts}
    optional = {embedding.FILE, PICKS, KEPT_FILES, *SHOWN}
    found = compare_files(folder, record, known, optional, is_deep=is_deep)
    if not parts:
        found[subset.FOLDER] = "is missing"
    return found


def compare_files(
    folder: Path,
    record: dict[str, Written],
    needed: set[str],
    optional: set[str],
    *,
    is_deep: bool = False,
) -> dict[str, str]:
    """Say which files are gone or not what was recorded; needed ones have to be recorded."""
    found = {}
    for name in sorted(needed | record.keys()):
        path, written = folder / name, record.get(name)
        if written is None or name not in needed | optional:
            found[name] = "was not recorded"
        elif not path.is_file():
            found[name] = "is missing"
        elif path.stat().st_size != written.bytes:
            found[name] = f"has {path.stat().st_size:,} bytes and not {written.bytes:,}"
        elif is_deep and describe_file(path) != written.as_dict():
            found[name] = "has another content"
    page = folder / report.FILE
    if page.is_file() and not page.read_bytes().rstrip().endswith(b"</html>"):
        found[report.FILE] = "is torn"
    page = folder / CARD  # a card may be edited, and has no record
    if not page.is_file() or not page.stat().st_size:
        found[CARD] = "is missing"
    return found
