"""resample(): another size or method from a finished run, without an encoder."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal import folder
from dq_multimodal.config import (
    CompressConfig,
    Draw,
    Importance,
    InputError,
    Method,
    Norm,
)
from dq_multimodal.core import Bins
from dq_multimodal.data.source import reload_source
from dq_multimodal.files import expand_home
from dq_multimodal.preparation import AUTO_NOTE
from dq_multimodal.run import (
    Run,
    begin,
    blaming_damage,
    default_folder,
    finish,
    found_complete,
    is_finished,
)
from dq_multimodal.stages import embedding, subset
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import (
    BinsKind,
    bin_by_method,
    bins_kind,
    check_scores,
    count_left,
    count_subset,
    order_by_method,
)
from dq_multimodal.stages.selection import (
    note_strata,
    read_kept,
    read_scores,
    write_selection,
)

if TYPE_CHECKING:
    from datasets import Dataset


def resample(
    run: "str | Path | Run",
    keep_ratio: float | None = None,
    *,
    keep_rows: int | None = None,
    method: Method | None = None,
    draw: Draw | None = None,
    seed: int | None = None,
    alpha: float | None = None,
    importance: Importance | None = None,
    norm: Norm | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Run:
    """Draw a subset of another size or by another method from a finished run, without an encoder.

    Args:
        run: A run, or its folder (for a repository on the Hub see `dq_multimodal.hub.open_run`).
        keep_ratio: Share of the source rows to keep, in (0, 1].
        keep_rows: Number of rows to keep, in its place.
        method: Another method; None keeps that of the run. What needs other bins than the run has
            needs its embeddings.npy.
        draw: Another draw within the bins.
        seed: Another seed of the draw; the scores stay what they are.
        alpha: Another weight of the importance of the bins, for adq.
        importance: Other scores that count, for adq.
        norm: Another scale of them, for adq.
        output_dir: Where to; None is runs/DATASET-METHOD-RATIO.
        overwrite: Replace a run that is there already.

    Raises:
        InputError: If the run lacks what is needed, or rows that it does not hold cannot be read
            from the source.
    """
    run = run if isinstance(run, Run) else Run(run)
    changes: dict[str, Any] = {"method": method, "draw": draw, "seed": seed}
    changes |= {"alpha": alpha, "importance": importance, "norm": norm}
    changes = {name: value for name, value in changes.items() if value is not None}
    if (keep_ratio is None) == (keep_rows is None):
        raise InputError("resample needs a keep_ratio or keep_rows, one of them")
    if method == "auto":
        raise InputError("auto is for compress: name the method to resample by")
    changes["keep_rows"] = keep_rows
    if keep_ratio is not None:
        changes["keep_ratio"] = keep_ratio
    request = replace(run.request, **changes).of_rows(run.manifest["rows"])
    run.check_tables()
    scores = read_scores(run.path)
    lone = [name for name in ("alpha", "importance", "norm") if name in changes]
    if lone and request.method != "adq":
        raise InputError(f"{lone[0]} is for adq, and this draws by {request.method}")
    if request.method == "adq":
        check_scores(scores)
    target = expand_home(output_dir) if output_dir is not None else default_folder(request)
    if run.path.resolve() in (target.resolve(), *target.resolve().parents):
        raise InputError(f"{target} is the run to resample from: name another output folder")
    started = time.perf_counter()
    with blaming_damage(run), folder.claim_folder(target):
        folder.check_apart(target, run.path, str(run.path))
        bins, marks, kind = _bins_for(run, request)
        n_kept = count_subset(bins.stratum, request, marks)
        config = {**run.config, "request": request.as_dict(), "bins": kind}
        if not overwrite and is_finished(target, config):
            return found_complete(target)
        order = order_by_method(bins, request, scores, marks)
        dataset, picks = _rows_from(run, np.flatnonzero(order < n_kept))  # before all is replaced
        begin(target, config, overwrite)
        labels = run.manifest["labels"]
        write_selection(target, bins, kind, order, request, labels, scores, marks)
        data_bytes = subset.write_subset(dataset, picks, read_kept(target, request), target)
        sizes = run.manifest["bytes"]
        of_source = {key: sizes[key] for key in ("source_data", "source_files")}
        manifest = {
            **{key: run.manifest[key] for key in ("rows", "labels", "problems")},
            "notes": [n for n in run.manifest["notes"] if not n.startswith(AUTO_NOTE)],
            "scores": run.manifest.get("scores"),
            "bytes": {**of_source, "subset_data": data_bytes},
            "seconds": {"resample": round(time.perf_counter() - started, 3)},
        }
        manifest["selection_notes"] = run.manifest.get("selection_notes", [])
        if run.config["label_column"] is not None:
            note_strata(manifest, target, request)
        return finish(target, config, manifest)


def _bins_for(run: Run, request: CompressConfig) -> tuple[Bins, Marks, BinsKind]:
    """Give bins that fit the method: those of the run, or new ones from its embeddings."""
    needed, present = bins_kind(request.method), run.config["bins"]
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


def _rows_from(run: Run, kept: Int[ndarray, " k"]) -> tuple["Dataset", Int[ndarray, " k"]]:
    """Find source rows: in the subset of the run if it holds them all, else in the source."""
    n_held = int(run.manifest["kept"])
    written = subset.read_numbers(run.path, n_held)
    wanted = read_kept(run.path, run.request)
    if not subset.is_of_kept(written, wanted, run.request.method):
        raise InputError(f"the subset of {run.path} does not hold the rows marked as kept")
    numbers = written["dq_row"].to_numpy()
    missing = np.setdiff1d(kept, numbers)
    if not len(missing):
        held = run.subset
        return subset.drop_own(held), np.searchsorted(numbers, kept)
    if run.request.drop_ratio:
        raise InputError(
            f"{len(missing):,} of the {len(kept):,} rows are not in the subset of {run.path}, and "
            "their patches were not dropped: compress the source anew"
        )
    try:
        return reload_source(run.config["source"], streaming=run.request.streaming).dataset, kept
    except InputError as error:
        raise InputError(
            f"{len(missing):,} of the {len(kept):,} rows are not in the subset of {run.path}, and "
            f"the source cannot give them: {error}"
        ) from error
