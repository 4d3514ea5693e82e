"""compress(): load, embed, bins, order, subset."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal import folder
from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.choice import choose_adapter, label_column_of
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.config import CompressConfig, InputError
from dq_multimodal.core import Bins, Scores, one_bin
from dq_multimodal.data.source import Source, pin_of
from dq_multimodal.distributed.world import ALONE, World
from dq_multimodal.manifest import Manifest, Patches, PatchFacts, Stage, Target, make
from dq_multimodal.options import takes
from dq_multimodal.planning import Asked, Trials, make_plan
from dq_multimodal.preparation import (
    make_config,
    mark_left_out,
    note_model,
    note_rows,
    open_source,
    read_request,
    settle_method,
    spare_inputs,
    start_manifest,
    survey,
)
from dq_multimodal.report import FILE as REPORT_FILE
from dq_multimodal.report import write_report
from dq_multimodal.run import Run, found_complete, output_folder
from dq_multimodal.stages import embedding, patch_records, subset
from dq_multimodal.stages.bin_costs import foresee_bins
from dq_multimodal.stages.marks import Marks, make_marks, note_marks
from dq_multimodal.stages.ordering import (
    bin_by_method,
    count_left,
    count_subset,
    mark_duplicates,
    order_by_method,
    part_rows,
)
from dq_multimodal.stages.patch_records import (
    check_smaller,
    drop_patches,
    note_original,
    stored_bytes,
)
from dq_multimodal.stages.scoring import FOLDER as SCORES_FOLDER
from dq_multimodal.stages.scoring import score_bins
from dq_multimodal.stages.selection import (
    BINS_FILE,
    SELECTION_FILE,
    note_strata,
    read_kept,
    write_selection,
)
from dq_multimodal.stages.targeting import Target as Aim
from dq_multimodal.stages.targeting import describe_target, load_target, pick_targets

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy import ndarray

    from dq_multimodal.stages.patching import PatchDropper

BEGUN: dict[Stage, str] = {
    "embeddings": embedding.PROGRESS,
    "selection": SCORES_FOLDER,
    "subset": patch_records.FOLDER,
}
"""What a stage leaves when it is stopped on its way."""


@takes(CompressConfig)
def compress(
    dataset: "str | PathLike[str] | Dataset", *, world: World = ALONE, **options: Any
) -> Run:
    """Compress a dataset to a share of its rows, into a run folder.

    Interrupted at any moment, the same call goes on where it stopped and ends with the same
    files. In a folder that holds the finished run already, it returns that run.

    Args:
        dataset: Hub id, local path, or a `datasets.Dataset`.

    Raises:
        InputError: For every wrong setting and bad input, in one clear line.
    """
    request, source = read_request(dataset, options)
    if request.streaming and not world.is_alone:
        raise InputError("streaming is for one process: leave out --streaming or the launcher")
    source = source or open_source(request)
    subset.check_columns(source.dataset)
    request, why = settle_method(request, source.dataset)
    target = output_folder(request)
    with folder.claim_folder(target):
        spare_inputs(target, request, source)
        world.post("source", pin=pin_of(source.origin))
        adapter = choose_adapter(source.dataset, request)
        aim = None
        if request.target is not None:
            aim = load_target(request, adapter)
        label_column = label_column_of(adapter, request)
        strata, labels, unlabelled = survey(source, adapter, request, label_column)
        request = request.of_rows(len(strata))
        config = make_config(request, source, adapter, label_column)
        if aim is not None:
            config.target = make(Target, describe_target(aim, request))
        marks = make_marks(source.dataset, request, len(strata))
        count_subset(strata, request, marks)  # raises if a cap leaves too few
        if not request.overwrite and folder.is_finished(target, config, with_report=request.report):
            return found_complete(target)
        note_model(config, adapter, request, source.dataset.column_names)
        is_adaptive = request.method == "adq"
        dropper = None
        if request.drop_ratio:
            from dq_multimodal.stages.patching import make_dropper

            dropper = make_dropper(source.dataset, request, adapter)
            config.patches = make(Patches, dropper.describe())
        if request.memory_limit is not None:
            asked = Asked(request, source, adapter, aim, strata, labels, marks, config.as_dict())
            trials = Trials(compress, asked)
            trials.memory(trials.count_kept()).check(request.memory_limit)
        manifest = folder.begin(target, config, request.overwrite) or start_manifest(source, labels)
        folder.share_folder(target, world)

        made = [embedding.FILE] if request.needs_embeddings else []
        files = (target / SELECTION_FILE, target / BINS_FILE)
        is_scored = manifest.has("selection") and all(f.exists() for f in files)
        if is_adaptive and not request.ready_embeddings and not is_scored:
            made = list(embedding.FILES)
        with _stage(target, manifest, "embeddings", *made) as is_due:
            if is_due:
                if request.ready_embeddings is not None and request.needs_embeddings:
                    embedding.copy_embeddings(
                        request.ready_embeddings, source.dataset, request.split, target
                    )
                elif adapter is not None and request.needs_embeddings:
                    embedding.embed_rows(adapter, target, request.batch_size, world=world)
                is_read = request.ready_embeddings is None and request.needs_embeddings
                if isinstance(adapter, ImageAdapter) and not is_read:
                    adapter.check_images()
                problems, notes = note_rows(source, adapter, request, strata, unlabelled)
                notes += note_marks(marks) + ([] if why is None else [why])
                if request.needs_embeddings:
                    by_cosine = request.ready_embeddings is None or request.similarity == "cosine"
                    embedded = embedding.open_embeddings(target)
                    notes = embedding.note_alike(embedded, by_cosine=by_cosine) + notes
                manifest.describe_rows(problems, notes)
        unreadable = mark_left_out(manifest, adapter, request)
        marks = replace(marks, unreadable=unreadable)
        count_subset(strata, request, marks)  # raises if too few rows are left
        with _stage(target, manifest, "selection", SELECTION_FILE, BINS_FILE) as is_due:
            if is_due:
                bins = one_bin(strata)
                is_embedded = request.needs_embeddings
                vectors = embedding.open_embeddings(target) if is_embedded else None
                if vectors is not None and config.bins != "none":
                    if request.partition is not None:
                        strata, labels = part_rows(vectors, request.partition, request.similarity)
                        manifest.set_labels(labels)
                    n_left = count_left(config)
                    if config.bins in ("dq", "graphcut"):
                        can_part = len(labels) == 1 and not n_left
                        long = foresee_bins(vectors, strata, request, n_left, can_part=can_part)
                        if long is not None:
                            print(long, file=sys.stderr, flush=True)  # noqa: T201
                    kind, where = config.bins, {"folder": target, "world": world}
                    bins, marks = bin_by_method(
                        vectors, strata, kind, request, marks, n_left, where=where
                    )
                scores = None
                if is_adaptive and adapter is not None:
                    is_beside = request.ready_embeddings is not None
                    n_left = count_left(config, "scoring" if is_beside else "embedding")
                    scores = _score(target, adapter, bins, request, n_left, manifest, world)
                marks, notes = _mark_more(
                    target, source, adapter, vectors, aim, bins, request, scores, marks
                )
                manifest.add_notes(notes)
                order = order_by_method(bins, request, scores, marks)
                labels = manifest.labels
                write_selection(target, bins, config.bins, order, request, labels, scores, marks)
                if label_column is not None:
                    manifest.note_selection(note_strata(labels, target, request))
        with _stage(target, manifest, "subset", subset.FOLDER) as is_due:
            if is_due:
                _write_subset(target, request, source.dataset, dropper, manifest)
                source.check()
                manifest.set_bytes(source_data=subset.count_bytes(source.dataset))
        if request.report:
            with _stage(target, manifest, "report", REPORT_FILE) as is_due:
                if is_due:
                    is_embedded = request.needs_embeddings
                    rows = embedding.open_embeddings(target) if is_embedded else None
                    documents = config.as_dict(), manifest.as_dict()
                    write_report(target, *documents, embeddings=rows, dataset=source.dataset)
        folder.finish(target, config, manifest)
        return Run(target)


@takes(CompressConfig, "overwrite")
def plan(dataset: "str | PathLike[str] | Dataset", **options: Any) -> dict[str, Any]:
    """Say what `compress` with the same arguments will take: seconds, memory, disk, rows, bytes.

    Rows are read, the model is loaded, and `compress` itself is run on samples of the rows in a
    temporary folder, for about half a minute of a processor. No run folder is made or changed. The
    seconds are those of this machine as busy as it is now, and of a run from its beginning.

    Args:
        dataset: Hub id, local path, or a `datasets.Dataset`.

    Returns:
        The figures, as plain values that JSON can hold; sizes in bytes, times in seconds.

    Raises:
        InputError: For what `compress` would refuse at its beginning, or of a sample.
    """
    return make_plan(compress, dataset, options)


def _score(
    target: Path,
    adapter: Adapter,
    bins: Bins,
    request: CompressConfig,
    n_left: int,
    manifest: Manifest,
    world: World,
) -> Scores:
    """Score the bins, and note what that took."""
    started = time.perf_counter()
    scores, facts = score_bins(adapter, target, bins, request, n_left, world)
    manifest.set_scores(facts)
    manifest.note_seconds("scores", time.perf_counter() - started)
    return scores


def _mark_more(
    folder: Path,
    source: Source,
    adapter: Adapter | None,
    embeddings: "ndarray | None",
    aim: Aim | None,
    bins: Bins,
    request: CompressConfig,
    scores: Scores | None,
    marks: Marks,
) -> tuple[Marks, list[str]]:
    """Pick rows for the target and find near-duplicates, where that was asked for.

    Returns:
        The marks with those, and what there is to note.
    """
    notes = []
    if aim is not None:
        found = pick_targets(folder, source.dataset, adapter, embeddings, aim, request)
        marks = replace(marks, target_rank=found.rank, target_row=found.row)
        notes += found.notes
    if request.drop_duplicates is not None:
        assert embeddings is not None
        marks = mark_duplicates(embeddings, bins, request, scores, marks)
        assert marks.duplicate_of is not None
        n_alike = int((marks.duplicate_of >= 0).sum())
        notes.append(
            f"{n_alike:,} near-duplicates (cosine of at least {request.drop_duplicates:g}) of rows "
            "before them are at the end of the order, see duplicate_of in selection.parquet"
        )
    return marks, notes


def _write_subset(
    target: Path,
    request: CompressConfig,
    dataset: "Dataset",
    dropper: "PatchDropper | None",
    manifest: Manifest,
) -> None:
    """Write the kept rows, their images as patch records where patches are dropped."""
    kept = read_kept(target, request)
    picks = kept["row"].to_numpy()
    if dropper is None:
        manifest.set_bytes(subset_data=subset.write_subset(dataset, picks, kept, target))
        return
    records = drop_patches(dataset, dropper.column, picks, dropper.drop, target)
    found = records.summarise()
    data_bytes = subset.write_subset(dataset, picks, kept, target, records)
    stored = stored_bytes(subset.subset_files(target), dropper.column)
    try:
        check_smaller(found, stored)
    except InputError:
        subset.remove_subset(target)
        raise
    manifest.set_bytes(
        subset_data=data_bytes, source_images=found["source_bytes"], stored_images=stored
    )
    manifest.add_notes(note_original(what, rows) for what, rows in found["originals"].items())
    if found["lost"]:
        parts = ", ".join(f"{what} of {n:,}" for what, n in found["lost"].items())
        manifest.add_notes(
            [f"patch records hold pixels and colour profile alone; images lose: {parts}"]
        )
    originals = {what: len(rows) for what, rows in found["originals"].items()}
    facts = {**found, "originals": originals, "fill": dropper.fill_name}
    manifest.set_patches(make(PatchFacts, facts))


@contextmanager
def _stage(target: Path, manifest: Manifest, name: Stage, *files: str) -> Iterator[bool]:
    """Run a stage unless it is done and its files are there; note its seconds when it is done."""
    is_there = all((target / file).exists() for file in files)
    is_due = not manifest.has(name) or not is_there
    begun = BEGUN.get(name)
    is_resumed = is_due and begun is not None and (target / begun).exists()
    started = time.perf_counter()
    yield is_due
    if is_due:
        scored = manifest.seconds.get("scores", 0.0) if name == "selection" else 0.0
        manifest.end_stage(name, time.perf_counter() - started - scored, is_resumed=is_resumed)
        manifest.write(target)
