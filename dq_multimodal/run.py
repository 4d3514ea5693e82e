"""A finished run: the folder on disk, and what can be drawn from it without an encoder."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal import card, folder, hub, report
from dq_multimodal.config import CompressConfig, InputError, ResampleConfig
from dq_multimodal.core import Bins
from dq_multimodal.core.bins import as_matrix
from dq_multimodal.data.local import short_name
from dq_multimodal.data.source import reload_source
from dq_multimodal.files import expand_home, first_line
from dq_multimodal.manifest import (
    CONDENSED,
    CONFIG,
    MANIFEST,
    BinsKind,
    Config,
    Manifest,
    has_mark,
)
from dq_multimodal.options import takes
from dq_multimodal.patches.codec import OLD_STORE
from dq_multimodal.patches.store import has_old_records
from dq_multimodal.stages import embedding, subset
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import (
    bin_by_method,
    bins_kind,
    check_scores,
    count_left,
    count_subset,
    order_by_method,
)
from dq_multimodal.stages.selection import (
    BINS_FILE,
    SELECTION_FILE,
    note_strata,
    read_kept,
    read_scores,
    read_selection,
    read_table,
    write_selection,
)

if TYPE_CHECKING:
    from datasets import Dataset

MAX_NAME_BYTES = 200


class Run:
    """A finished run folder: its path, and config and manifest, see `dq_multimodal.manifest`."""

    was_complete = False
    """Whether the call that gave it found it finished already."""

    def __init__(self, path: str | Path) -> None:
        """Open a run folder, whoever wrote it.

        Raises:
            InputError: If it is none, or its run has not finished; if config.yaml or manifest.json
                is not what a run writes.
        """
        self.path = expand_home(path)
        if has_mark(self.path / MANIFEST, CONDENSED):
            raise InputError(
                f"{path} is a condensed set: smaller ones are its first rows, m x the number of "
                "its classes (load_dataset, then select)"
            )
        config = Config.read(self.path) if self.path.is_dir() else None
        if config is None:
            raise InputError(f"{path} is not a run folder: it has no {CONFIG}")
        if is_of_hub(self.path):  # whoever pushed it knows no path of this machine
            config.source = replace(config.source, path=None, image_folder=None)
        manifest = Manifest.read(self.path)
        if manifest is None or not manifest.complete:
            raise InputError(f"the run in {path} has not finished: run the same command again")
        self.config, self.manifest = config, manifest
        files = (SELECTION_FILE, BINS_FILE, subset.FOLDER)
        missing = [name for name in files if not (self.path / name).exists()]
        if missing:
            raise InputError(f"the run in {path} is not whole: {', '.join(missing)} is missing")
        method = self.request.method
        if method == "auto" or bins_kind(method) not in ("none", config.bins):
            raise InputError(
                f"{self.path / CONFIG} is not the config.yaml of a run: its method is "
                f"{method}, and its bins are {config.bins}"
            )

    @property
    def request(self) -> CompressConfig:
        """The settings of the run."""
        return self.config.request

    @property
    def subset(self) -> "Dataset":
        """The kept rows, with dq_row, dq_bin, dq_rank and, if rows differ in it, dq_weight."""
        return subset.open_subset(self.path)

    @cached_property
    def _selection(self) -> tuple[Bins, dict[str, ndarray], Marks]:
        """selection.parquet, once it fits config.yaml and manifest.json."""
        bins, places, marks = read_selection(self.path)
        n_rows, n_strata = self.manifest.rows, len(self.manifest.labels)
        has_bins = not read_table(self.path, SELECTION_FILE)["bin"].null_count
        if len(bins) != n_rows or self.config.source.rows != n_rows:
            fault = f"{len(bins):,} rows, and not the {n_rows:,} of {MANIFEST}"
        elif int(bins.stratum.max()) >= n_strata:
            fault = f"more strata than the {n_strata:,} labels of {MANIFEST}"
        elif has_bins == (self.config.bins == "none"):
            fault = f"other bins than {CONFIG}, which has {self.config['bins']}"
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
        table = read_table(self.path, BINS_FILE)
        strata, sizes = (table[name].to_numpy() for name in ("stratum", "size"))
        return np.bincount(strata, sizes).astype(int).tolist()

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

    @takes(ResampleConfig)
    def resample(self, *keep_ratio: float, **options: Any) -> "Run":
        """Draw another subset; see `dq_multimodal.resample`.

        Args:
        """
        return resample(self, *keep_ratio, **options)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Push subset, selection, config.yaml and card; see `dq_multimodal.push`."""
        return push(self, repo_id, private=private)

    def write_report(self, embeddings_of: str | Path | None = None) -> Path:
        """Write report.html, map.parquet and the figures of the card again; give the report.

        It shows no rows where the source cannot be read, and no map, coverage or duplicates
        without embeddings.

        Args:
            embeddings_of: Run folder whose embeddings.npy to show, for a run that was resampled
                from it; None is this run's own, if it has one.
        """
        place = expand_home(embeddings_of or self.path)
        has_rows = (place / embedding.FILE).is_file()
        if embeddings_of is not None and not has_rows:
            raise InputError(f"{place} has no {embedding.FILE}")
        with blaming_damage(self):
            self.check_tables()
            rows = self.open_embeddings(place) if has_rows else None
            try:
                dataset = self.open_source()
            except InputError:
                dataset = None
            with folder.claim_folder(self.path):
                report.write_report(
                    self.path, self.config, self.manifest, embeddings=rows, dataset=dataset
                )
                card.write_card(self.path, self.config, self.manifest)
                folder.seal(self.path, self.manifest)  # the files of the report are others now
        return self.path / report.FILE

    def open_source(self) -> "Dataset":
        """Load the source again; InputError if it cannot be had, or has changed."""
        origin = self.config.source.as_dict()
        return reload_source(origin, streaming=self.request.streaming).dataset

    def check_whole(self) -> None:
        """Raise unless the files are those that the run wrote, and none of them is a link."""
        for name, what in sorted(self.find_damage().items()):
            raise InputError(f"the run in {self.path} is damaged: {name} {what}")
        check_links(self.path)
        self.check_tables()

    def check_tables(self) -> None:
        """Raise unless selection.parquet and bins.parquet fit each other and the documents."""
        numbers = set(read_table(self.path, BINS_FILE)["bin"].to_pylist())
        if numbers - ({None} if self.config.bins == "none" else {*self.bins.bin.tolist()}):
            raise InputError(f"{self.path / BINS_FILE} has other bins than {SELECTION_FILE}")

    def open_embeddings(self, place: Path | None = None) -> Float[ndarray, "n d"]:
        """Open embeddings.npy of this run, or of one that it was resampled from.

        Raises:
            InputError: If it does not hold a finite vector for every row.
        """
        place = place or self.path
        try:
            rows = embedding.open_embeddings(place)
            if rows.dtype != np.float32 or count_left(self.config) >= rows.shape[1]:
                raise ValueError(f"it holds {rows.dtype} of shape {rows.shape}")
            as_matrix(rows)
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise InputError(
                f"cannot read {place / embedding.FILE}: {first_line(error)}"
            ) from error
        if len(rows) != self.manifest.rows:
            raise InputError(
                f"{place} holds {len(rows):,} embeddings, and the source of {self.path} has "
                f"{self.manifest['rows']:,} rows"
            )
        return rows

    def find_damage(self) -> dict[str, str]:
        """Say which files are not those that the run recorded, and how; see verify."""
        found = folder.find_damage(self.path, self.manifest, is_deep=True)
        optional = {embedding.FILE, *folder.SHOWN}
        if is_of_hub(self.path / CONFIG):  # version 0.1 recorded what it did not push
            optional.add(folder.PICKS)
        found = {k: v for k, v in found.items() if v != "is missing" or k not in optional}
        if not self.manifest.is_sealed:
            found[MANIFEST] = "has another content"
        return found

    def __repr__(self) -> str:
        rows, n_kept = self.manifest.rows, self.manifest.kept
        return f"Run({str(self.path)!r}: {n_kept:,} of {rows:,} rows by {self.request.method})"


def check_links(place: Path) -> None:
    """Raise if something in a folder is a link, that of the cache of the Hub apart."""
    for path in place.rglob("*"):
        if path.is_symlink() and not is_of_hub(path):
            raise InputError(f"{path} is a link: what it leads to was not written by the run")


def is_of_hub(path: Path) -> bool:
    """Say whether a file or folder really lies in the cache of the Hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return path.resolve().is_relative_to(Path(HF_HUB_CACHE).resolve())


def output_folder(request: CompressConfig) -> Path:
    """Give the output_dir, or runs/DATASET-METHOD-RATIO, with keep_rows runs/DATASET-METHOD-N-rows.

    A long name is cut to what file systems take.
    """
    if request.output_dir is not None:
        return expand_home(request.output_dir)
    name = re.sub(r"[^\w.-]+", "", short_name(request.dataset)).strip(".") or "dataset"
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    size = f"{request.keep_ratio:g}" if request.keep_rows is None else f"{request.keep_rows}-rows"
    return Path("runs") / f"{name}-{request.method}-{size}"


def found_complete(target: Path) -> Run:
    """Open a run that was there already."""
    run = Run(target)
    run.was_complete = True
    return run


def push(run: Run | str | Path, repo_id: str, *, private: bool = False) -> str:
    """Push a run, or the one in a folder, as one commit; see `dq_multimodal.hub.push`.

    Raises:
        InputError: If the run is damaged, or as `hub.push` does.
    """
    run = Run(run.path if isinstance(run, Run) else run)  # as it is now
    run.check_whole()
    if run.request.drop_ratio and has_old_records(subset.subset_files(run.path)):
        raise InputError(f"{run.path} cannot be pushed: {OLD_STORE}")
    return hub.push(run.path, run.config, run.manifest, repo_id, private=private)


def open_run(name: str | Path, revision: str | None = None) -> Run:
    """Open a run folder, or a repository on the Hub that `push` made.

    A repository lacks the embeddings, so `resample` can draw from it what follows from its bins.

    Args:
        name: Folder, or OWNER/NAME.
        revision: Branch, tag or commit of the repository.
    """
    return Run(name if expand_home(name).exists() else hub.download(str(name), revision))


@contextmanager
def blaming_damage(run: Run) -> Iterator[None]:
    """Say of a run that was changed since it was made that this is why something failed.

    What a file of anybody may hold has no end: whatever it makes of the code ends in one line.
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


@takes(ResampleConfig)
def resample(run: "str | Path | Run", keep_ratio: float | None = None, **options: Any) -> Run:
    """Draw a subset of another size or by another method from a finished run, without an encoder.

    What needs other bins than the run has needs its embeddings.npy. The scores stay what they are.

    Args:
        run: A run, or its folder (for a repository on the Hub see `open_run`).

    Raises:
        InputError: If the run lacks what is needed, or rows that it does not hold cannot be read
            from the source.
    """
    run = run if isinstance(run, Run) else Run(run)
    asked = ResampleConfig.from_options({"run": run.path, "keep_ratio": keep_ratio, **options})
    changes = asked.changes()
    request = replace(run.request, **changes, output_dir=asked.output_dir)
    request = request.of_rows(run.manifest.rows)
    run.check_tables()
    scores = read_scores(run.path)
    lone = [name for name in ("alpha", "importance", "norm") if name in changes]
    if lone and request.method != "adq":
        raise InputError(f"{lone[0]} is for adq, and this draws by {request.method}")
    if request.method == "adq":
        check_scores(scores)
    target = output_folder(request)
    if run.path.resolve() in (target.resolve(), *target.resolve().parents):
        raise InputError(f"{target} is the run to resample from: name another output folder")
    started = time.perf_counter()
    with blaming_damage(run), folder.claim_folder(target):
        folder.check_apart(target, run.path, str(run.path))
        bins, marks, kind = _bins_for(run, request)
        n_kept = count_subset(bins.stratum, request, marks)
        config = replace(run.config, request=request, bins=kind)
        if not asked.overwrite and folder.is_finished(target, config):
            return found_complete(target)
        order = order_by_method(bins, request, scores, marks)
        # Before all is replaced.
        dataset, picks, origin = _rows_from(run, np.flatnonzero(order < n_kept))
        folder.begin(target, config, asked.overwrite)
        labels = run.manifest.labels
        write_selection(target, bins, kind, order, request, labels, scores, marks)
        kept = read_kept(target, request)
        data_bytes = subset.write_subset(
            dataset, picks, kept, target, origin=origin, splits=config.source.splits
        )
        manifest = run.manifest.draw_again(time.perf_counter() - started, data_bytes)
        if run.config.label_column is not None:
            manifest.note_selection(note_strata(labels, target, request))
        folder.finish(target, config, manifest)
        return Run(target)


def _bins_for(run: Run, request: CompressConfig) -> tuple[Bins, Marks, BinsKind]:
    """Give bins that fit the method: those of the run, or new ones from its embeddings."""
    needed, present = bins_kind(request.method), run.config.bins
    if needed in ("none", present):
        return run.bins, run.marks, present
    if present == "none" and request.partition is not None:
        raise InputError(f"the rows of {run.path} were not parted: compress the source anew")
    if not (run.path / embedding.FILE).is_file():
        raise InputError(
            f"{request.method} needs bins that {run.path} does not have (its method was "
            f"{run.request.method}), nor {embedding.FILE}: compress the source anew"
        )
    rows = run.open_embeddings()
    n_left = count_left(run.config)
    bins, marks = bin_by_method(rows, run.bins.stratum, needed, request, run.marks, n_left)
    return bins, marks, needed


def _rows_from(
    run: Run, kept: Int[ndarray, " k"]
) -> tuple["Dataset", Int[ndarray, " k"], Path | None]:
    """Find source rows: in the subset of the run if it holds them all, else in the source.

    Returns:
        The rows, the places of those asked for, and the folder of the run if they are its subset.
    """
    written = subset.read_numbers(run.path, run.manifest.kept)
    wanted = read_kept(run.path, run.request)
    if not subset.is_of_kept(written, wanted, run.request.method):
        raise InputError(f"the subset of {run.path} does not hold the rows marked as kept")
    numbers = written["dq_row"].to_numpy()
    missing = np.setdiff1d(kept, numbers)
    if run.request.drop_ratio and has_old_records(subset.subset_files(run.path)):
        raise InputError(f"{run.path} cannot be resampled: {OLD_STORE}")
    if not len(missing):
        held = run.subset
        own = [name for name in subset.OWN_COLUMNS if name in held.column_names]
        return held.remove_columns(own), np.searchsorted(numbers, kept), run.path
    gone = f"{len(missing):,} of the {len(kept):,} rows are not in the subset of {run.path}, and "
    if run.request.drop_ratio:
        raise InputError(gone + "their patches were not dropped: compress the source anew")
    try:
        return run.open_source(), kept, None
    except InputError as error:
        raise InputError(f"{gone}the source cannot give them: {error}") from error
