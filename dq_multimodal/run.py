"""A finished run: the folder on disk, and what can be drawn from it without an encoder."""

import re
import shutil
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal import __version__, card, embedding, folder, patch_records, scoring, subset
from dq_multimodal.atomic import write_text
from dq_multimodal.config import (
    CompressConfig,
    InputError,
    count_kept,
)
from dq_multimodal.core import Bins
from dq_multimodal.local_data import short_name
from dq_multimodal.report import FILE, write_report
from dq_multimodal.selection import (
    BINS_FILE,
    SELECTION_FILE,
    read_selection,
)
from dq_multimodal.source import is_same_source, reload_source

if TYPE_CHECKING:
    from datasets import Dataset


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
        """Open a run folder.

        Raises:
            InputError: If it is none, or its run has not finished.
        """
        self.path = Path(path)
        config = folder.read_config(self.path) if self.path.is_dir() else None
        if config is None:
            raise InputError(f"{path} is not a run folder: it has no {folder.CONFIG}")
        self.config = config
        self.manifest = folder.read_manifest(self.path)
        if not self.manifest.get("complete"):
            raise InputError(f"the run in {path} has not finished: run the same command again")
        files = (SELECTION_FILE, BINS_FILE, subset.FOLDER)
        missing = [name for name in files if not (self.path / name).exists()]
        if missing:
            raise InputError(f"the run in {path} is not whole: {', '.join(missing)} is missing")

    @property
    def request(self) -> CompressConfig:
        """The settings of the run."""
        return CompressConfig.from_dict(self.config["request"])

    @property
    def subset(self) -> "Dataset":
        """The kept rows, with dq_row, dq_bin and dq_rank."""
        return subset.open_subset(self.path)

    @cached_property
    def bins(self) -> Bins:
        """Bin, rank, gain and stratum of every source row; zeros where no bins were made."""
        return read_selection(self.path)[0]

    @property
    def order(self) -> Int[ndarray, " n"]:
        """Place of every source row in the order of the method."""
        return read_selection(self.path)[1]["order"]

    @property
    def kept(self) -> Int[ndarray, " k"]:
        """Numbers of the kept source rows, ascending."""
        return np.flatnonzero(read_selection(self.path)[1]["kept"])

    def resample(self, keep_ratio: float, **options: Any) -> "Run":
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
        place = Path(embeddings_of or self.path)
        has_rows = (place / embedding.FILE).is_file()
        rows = embedding.open_embeddings(place) if has_rows else None
        if rows is not None and len(rows) != self.manifest["rows"]:
            raise InputError(
                f"{place} holds {len(rows):,} embeddings, and the source of {self.path} has "
                f"{self.manifest['rows']:,} rows"
            )
        if embeddings_of is not None and rows is None:
            raise InputError(f"{place} has no {embedding.FILE}")
        try:
            dataset = reload_source(self.config["source"], streaming=self.request.streaming).dataset
        except InputError:
            dataset = None
        with folder.claim_folder(self.path):
            write_report(self.path, self.config, self.manifest, embeddings=rows, dataset=dataset)
            text = card.make_card(self.path, self.config, self.manifest)
            write_text(self.path / folder.CARD, text)
        return self.path / FILE

    def __repr__(self) -> str:
        rows, n_kept = self.manifest["rows"], self.manifest["kept"]
        return f"Run({str(self.path)!r}: {n_kept:,} of {rows:,} rows by {self.request.method})"


def default_folder(request: CompressConfig) -> Path:
    """Give runs/DATASET-METHOD-RATIO."""
    name = re.sub(r"[^\w.-]+", "", short_name(request.dataset)).strip(".") or "dataset"
    return Path("runs") / f"{name}-{request.method}-{request.keep_ratio:g}"


def is_finished(target: Path, config: dict[str, Any]) -> bool:
    """Say whether the very run that config asks for is in a folder, finished and whole."""
    before = folder.read_config(target)
    if before is None or _differences(before, config):
        return False
    files = (SELECTION_FILE, BINS_FILE, subset.FOLDER, folder.CARD)
    is_whole = all((target / name).exists() for name in files)
    return is_whole and bool(folder.read_manifest(target).get("complete"))


def begin(target: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Start a run in a claimed folder, or go on with the same one.

    Raises:
        InputError: If another run is there and may not be overwritten.
    """
    before = folder.read_config(target)
    differing = _differences(before, config) if before is not None else []
    has_work = any((target / name).exists() for name in (embedding.FILE, embedding.PROGRESS))
    manifest = folder.read_manifest(target)
    if differing and not overwrite and (has_work or manifest.get("complete")):
        raise InputError(
            f"{target} holds another run ({'; '.join(differing)}): "
            "use --overwrite or another output folder"
        )
    if before is None or differing or (overwrite and manifest.get("complete")):
        folder.clear_folder(target)
    elif manifest.pop("complete", False):  # a file of it was lost
        folder.write_manifest(target, manifest)
    folder.write_config(target, config)


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
    if not found and before.get("model_folders") != config.get("model_folders"):
        found = ["a model folder held other weights"]
    old, new = before.get("embedding") or {}, config["embedding"] or {}
    keys = (old.keys() & new.keys()) - {"revision"}
    if not found and any(old[key] != new[key] for key in keys):
        found = ["its embeddings had another content"]
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
    manifest["kept"] = count_kept(manifest["rows"], config["request"]["keep_ratio"])
    packages = ("torch", "numpy", "datasets", "sentence-transformers", "transformers", "timm")
    manifest["versions"] = {"dq-multimodal": __version__, **{p: version(p) for p in packages}}
    write_text(target / folder.CARD, card.make_card(target, config, manifest))
    scored = (embedding.PROGRESS, embedding.MIDDLE, embedding.TEXTURE)
    for name in (*scored, folder.TOKEN):
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / scoring.FOLDER, ignore_errors=True)
    shutil.rmtree(target / patch_records.FOLDER, ignore_errors=True)  # it is in the subset now
    folder.write_manifest(target, {"complete": True, **manifest})
    return Run(target)
