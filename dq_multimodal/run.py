"""A finished run: the folder on disk, and what can be drawn from it without an encoder."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal import __version__, card, documents, folder
from dq_multimodal.config import (
    CompressConfig,
    InputError,
)
from dq_multimodal.core import Bins
from dq_multimodal.core.bins import as_matrix
from dq_multimodal.data.local import short_name
from dq_multimodal.data.source import is_same_source, reload_source
from dq_multimodal.data.stream import first_line
from dq_multimodal.files import expand_home
from dq_multimodal.report import FILE, write_report
from dq_multimodal.stages import embedding, patch_records, scoring, subset, targeting
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import bins_kind, count_left
from dq_multimodal.stages.selection import (
    BINS_FILE,
    SELECTION_FILE,
    read_selection,
    read_table,
)

if TYPE_CHECKING:
    from datasets import Dataset


MAX_NAME_BYTES = 200


class Run:
    """A finished run folder.

    Attributes:
        path: The folder.
        config: What config.yaml holds: request, source, columns, embedding, bins.
        manifest: What manifest.json holds: state, rows, bytes, seconds, notes, versions.
        was_complete: Whether the call that gave it found it finished already.
    """

    was_complete = False

    def __init__(self, path: str | Path) -> None:
        """Open a run folder, whoever wrote it.

        Raises:
            InputError: If it is none, or its run has not finished; if config.yaml or manifest.json
                is not what a run writes.
        """
        self.path = expand_home(path)
        config = folder.read_config(self.path) if self.path.is_dir() else None
        if config is None:
            raise InputError(f"{path} is not a run folder: it has no {folder.CONFIG}")
        if _is_of_hub(self.path):  # whoever pushed it knows no path of this machine
            for key in ("path", "image_folder"):
                config["source"].pop(key, None)
        self.config = config
        self.manifest = folder.read_manifest(self.path)
        if not self.manifest.get("complete"):
            raise InputError(f"the run in {path} has not finished: run the same command again")
        files = (SELECTION_FILE, BINS_FILE, subset.FOLDER)
        missing = [name for name in files if not (self.path / name).exists()]
        if missing:
            raise InputError(f"the run in {path} is not whole: {', '.join(missing)} is missing")
        method = self.request.method
        if method == "auto" or bins_kind(method) not in ("none", config["bins"]):
            raise InputError(
                f"{self.path / folder.CONFIG} is not the config.yaml of a run: its method is "
                f"{method}, and its bins are {config['bins']}"
            )

    @property
    def request(self) -> CompressConfig:
        """The settings of the run."""
        return CompressConfig.from_dict(self.config["request"])

    @property
    def subset(self) -> "Dataset":
        """The kept rows, with dq_row, dq_bin, dq_rank and, if rows differ in it, dq_weight."""
        return subset.open_subset(self.path)

    @cached_property
    def _selection(self) -> tuple[Bins, dict[str, ndarray], Marks]:
        """selection.parquet, once it fits config.yaml and manifest.json."""
        bins, places, marks = read_selection(self.path)
        n_rows, n_strata = self.manifest["rows"], len(self.manifest["labels"])
        has_bins = not read_table(self.path, SELECTION_FILE)["bin"].null_count
        if len(bins) != n_rows or self.config["source"]["rows"] != n_rows:
            fault = f"{len(bins):,} rows, and not the {n_rows:,} of {folder.MANIFEST}"
        elif int(bins.stratum.max()) >= n_strata:
            fault = f"more strata than the {n_strata:,} labels of {folder.MANIFEST}"
        elif has_bins == (self.config["bins"] == "none"):
            fault = f"other bins than {folder.CONFIG}, which has {self.config['bins']}"
        else:
            return bins, places, marks
        raise InputError(f"{self.path / SELECTION_FILE} has {fault}")

    @property
    def bins(self) -> Bins:
        """Bin, rank, gain and stratum of every source row; zeros where no bins were made."""
        return self._selection[0]

    @property
    def stratum_rows(self) -> list[int]:
        """Source rows of every stratum, by its code."""
        return np.bincount(self.bins.stratum).tolist()

    @property
    def order(self) -> Int[ndarray, " n"]:
        """Place of every source row in the order of the method."""
        return self._selection[1]["order"]

    @property
    def kept(self) -> Int[ndarray, " k"]:
        """Numbers of the kept source rows, ascending."""
        return np.flatnonzero(self._selection[1]["kept"])

    @property
    def marks(self) -> Marks:
        """What else selection.parquet knows of every source row."""
        return self._selection[2]

    def resample(self, keep_ratio: float | None = None, **options: Any) -> "Run":
        """Draw another subset; see `dq_multimodal.resample`."""
        from dq_multimodal.resampling import resample

        return resample(self, keep_ratio, **options)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Push subset, selection, config.yaml and card; see `dq_multimodal.hub.push`."""
        from dq_multimodal.hub import push

        return push(self, repo_id, private=private)

    def write_report(self, embeddings_of: str | Path | None = None) -> Path:
        """Write report.html, map.parquet and the figures of the card again.

        Args:
            embeddings_of: Run folder whose embeddings.npy to show, for a run that was resampled
                from it; None is this run's own, if it has one.

        Returns:
            The report. It shows no rows where the source cannot be read, and no map, coverage or
            duplicates without embeddings.
        """
        place = expand_home(embeddings_of or self.path)
        has_rows = (place / embedding.FILE).is_file()
        if embeddings_of is not None and not has_rows:
            raise InputError(f"{place} has no {embedding.FILE}")
        with blaming_damage(self):
            self.check_tables()
            rows = self.open_embeddings(place) if has_rows else None
            try:
                dataset = reload_source(
                    self.config["source"], streaming=self.request.streaming
                ).dataset
            except InputError:
                dataset = None
            with folder.claim_folder(self.path):
                write_report(
                    self.path, self.config, self.manifest, embeddings=rows, dataset=dataset
                )
                card.write_card(self.path, self.config, self.manifest)
                if "files" in self.manifest:  # those of the report are others now
                    self.manifest = folder.record_files(self.path, self.manifest)
                    folder.write_manifest(self.path, self.manifest)
        return self.path / FILE

    def check_whole(self) -> None:
        """Raise unless the files are those that the run wrote, and none of them is a link.

        Raises:
            InputError: If they are not.
        """
        damage = self.find_damage()
        for name in sorted(damage):
            raise InputError(f"the run in {self.path} is damaged: {name} {damage[name]}")
        links = [path for path in self.path.rglob("*") if path.is_symlink()]
        links = [path for path in links if not _is_of_hub(path)]
        if links:
            raise InputError(f"{links[0]} is a link: what it leads to was not written by the run")
        self.check_tables()

    def check_tables(self) -> None:
        """Raise unless selection.parquet and bins.parquet fit each other and the documents.

        Raises:
            InputError: If they do not, or cannot be read.
        """
        numbers = read_table(self.path, BINS_FILE)["bin"]
        if set(numbers.to_pylist()) - (
            {None} if self.config["bins"] == "none" else set(self.bins.bin.tolist())
        ):
            raise InputError(f"{self.path / BINS_FILE} has other bins than {SELECTION_FILE}")

    def open_embeddings(self, place: Path | None = None) -> Float[ndarray, "n d"]:
        """Open embeddings.npy of this run, or of one that it was resampled from.

        Raises:
            InputError: If it does not hold a finite vector for every row.
        """
        place = place or self.path
        n_left = count_left(self.config)
        try:
            rows = embedding.open_embeddings(place)
            if rows.dtype != np.float32 or n_left >= rows.shape[1]:
                raise ValueError(f"it holds {rows.dtype} of shape {rows.shape}")
            as_matrix(rows)
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise InputError(
                f"cannot read {place / embedding.FILE}: {first_line(error)}"
            ) from error
        if len(rows) != self.manifest["rows"]:
            raise InputError(
                f"{place} holds {len(rows):,} embeddings, and the source of {self.path} has "
                f"{self.manifest['rows']:,} rows"
            )
        return rows

    def find_damage(self) -> dict[str, str]:
        """Say which files are not those that the run recorded, and how; see verify."""
        found = folder.find_damage(self.path, self.manifest, is_deep=True)
        optional = {embedding.FILE, *folder.SHOWN}
        if _is_of_hub(self.path / folder.CONFIG):  # there are fewer
            optional.add(f"{targeting.FOLDER}/{targeting.PICKS}")
        found = {k: v for k, v in found.items() if v != "is missing" or k not in optional}
        if not documents.is_sealed(self.manifest):
            found[folder.MANIFEST] = "has another content"
        return found

    def __repr__(self) -> str:
        rows, n_kept = self.manifest["rows"], self.manifest["kept"]
        return f"Run({str(self.path)!r}: {n_kept:,} of {rows:,} rows by {self.request.method})"


def _is_of_hub(path: Path) -> bool:
    """Say whether a file or folder really lies in the cache of the Hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return path.resolve().is_relative_to(Path(HF_HUB_CACHE).resolve())


def default_folder(request: CompressConfig) -> Path:
    """Give runs/DATASET-METHOD-RATIO, or with keep_rows runs/DATASET-METHOD-N-rows.

    A long name is cut to what file systems take.
    """
    name = re.sub(r"[^\w.-]+", "", short_name(request.dataset)).strip(".") or "dataset"
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    size = f"{request.keep_ratio:g}" if request.keep_rows is None else f"{request.keep_rows}-rows"
    return Path("runs") / f"{name}-{request.method}-{size}"


SEALED = ("complete", "files", "digest")
"""What only the manifest of a finished run has."""
STAGES = {
    "embeddings": (embedding.FILE,),
    "selection": (SELECTION_FILE, BINS_FILE, targeting.FOLDER),
    "subset": (subset.FOLDER,),
    "report": folder.SHOWN,
}
"""Which stage of a run writes which files."""


def is_finished(target: Path, config: dict[str, Any], *, with_report: bool = False) -> bool:
    """Say whether the very run that config asks for is in a folder, finished and whole."""
    before, manifest = _read_before(target)
    if before is None or _differences(before, config) or not manifest.get("complete"):
        return False
    lost = set(_find_lost(target, manifest))
    if with_report:
        return not lost and (target / FILE).exists()
    return not lost - set(folder.SHOWN)


def begin(target: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Start a run in a claimed folder, or go on with the same one.

    What a finished run has lost, or what is not as long as it was, counts as not done.

    Raises:
        InputError: If another run is there and may not be overwritten, or others put something
            where a run writes.
    """
    before, manifest = _read_before(target, is_strict=not overwrite)
    differing = _differences(before, config) if before is not None else []
    work = (embedding.FILE, embedding.PROGRESS, targeting.FOLDER)
    has_work = any((target / name).exists() for name in work)
    is_complete = bool(manifest.get("complete"))
    if not overwrite and (has_work or is_complete) and (differing or before is None):
        found = "; ".join(differing) or f"its {folder.CONFIG} is missing"
        raise InputError(
            f"{target} holds another run ({found}): use --overwrite or another output folder"
        )
    folder.check_strangers(target)
    if before is None or differing or (overwrite and is_complete):
        folder.write_manifest(target, {"state": {}})  # the mark, before and after all else
        card.clear_card(target, before or {}, manifest)
        folder.clear_folder(target)
    elif is_complete:
        lost = _find_lost(target, manifest)
        is_due = False
        for stage, files in STAGES.items():  # what follows is done again too, with its notes
            is_due |= any(name.startswith(files) for name in lost)
            if is_due:
                manifest.get("state", {}).pop(stage, None)
        folder.write_manifest(target, {k: v for k, v in manifest.items() if k not in SEALED})
    folder.write_config(target, config)


def _read_before(
    target: Path, *, is_strict: bool = True
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Read the documents of what is in a folder; unless strict, damaged ones count as none."""
    try:
        manifest = folder.read_manifest(target)
        if manifest.get("complete") and not documents.is_sealed(manifest):
            raise InputError(f"{target / folder.MANIFEST} was changed after the run")
        return folder.read_config(target), manifest
    except InputError as error:
        if is_strict:
            raise InputError(f"{error}: use --overwrite or another output folder") from error
        return None, {}


def _find_lost(target: Path, manifest: dict[str, Any]) -> list[str]:
    """Name files of a finished run that are gone or cut; config.yaml is compared by content."""
    return [name for name in folder.find_damage(target, manifest) if name != folder.CONFIG]


def _differences(before: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Say what another run in the folder was asked or made from."""
    then = {f.name: f.default for f in fields(CompressConfig)} | before["request"]  # older runs
    found = [
        f"{key} {then.get(key)!r} there, {value!r} asked"
        for key, value in config["request"].items()
        if then.get(key) != value
    ]
    if not found and not is_same_source(before["source"], config["source"]):
        found = ["its source had another content"]
    if not found and before.get("dynamics") != config.get("dynamics"):
        found = ["its dynamics had another content"]
    if not found and before.get("target") != config.get("target"):
        found = ["its target had another content"]
    then_folders, now_folders = before.get("model_folders") or {}, config.get("model_folders") or {}
    if not found and any(then_folders.get(k) != now_folders.get(k) for k in now_folders):
        found = ["a model folder held other weights"]
    old, new = before.get("embedding") or {}, config["embedding"] or {}
    keys = (old.keys() & new.keys()) - {"revision"}
    if not found and any(old[key] != new[key] for key in keys):
        found = ["its embeddings had another content"]
    templates = [(part.get("rows") or {}).get("template") for part in (before, config)]
    asked = config["request"]
    is_read = CompressConfig.from_dict(asked).needs_embeddings
    is_read &= not asked["embeddings"] or asked["method"] == "adq"
    if not found and is_read and templates[0] != templates[1]:
        found = ["its text was put together by another template"]
    return found


def found_complete(target: Path) -> Run:
    """Open a run that was there already."""
    run = Run(target)
    run.was_complete = True
    return run


def finish(target: Path, config: dict[str, Any], manifest: dict[str, Any]) -> Run:
    """Write the card and the manifest that says that all is there."""
    from importlib.metadata import version

    sizes = [path.stat().st_size for path in subset.subset_files(target)]
    manifest["bytes"]["subset_files"] = sum(sizes)
    manifest["kept"] = int(read_selection(target)[1]["kept"].sum())
    packages = ("torch", "numpy", "datasets", "sentence-transformers", "transformers", "timm")
    manifest["versions"] = {"dq-multimodal": __version__, **{p: version(p) for p in packages}}
    card.write_card(target, config, manifest)
    scored = (embedding.PROGRESS, embedding.MIDDLE, embedding.TEXTURE)
    for name in (*scored, folder.TOKEN):
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / scoring.FOLDER, ignore_errors=True)
    shutil.rmtree(target / patch_records.FOLDER, ignore_errors=True)  # it is in the subset now
    targeting.forget_vectors(target)
    finished = folder.record_files(target, {"complete": True, **manifest})
    folder.write_manifest(target, finished)
    return Run(target)


@contextmanager
def blaming_damage(run: Run) -> Iterator[None]:
    """Say of a run that was changed since it was made that this is why something failed.

    What a file of anybody may hold has no end: whatever it makes of the code ends in one line.

    Raises:
        InputError: In place of any other error, if a file is not what the run wrote.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        damage = [f"{name} {what}" for name, what in run.find_damage().items()]
        if not damage:
            raise
        raise InputError(f"the run in {run.path} is damaged: {damage[0]} (see verify)") from error
