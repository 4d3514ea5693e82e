"""compress(): load, embed, select, write, report; and plan()."""

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal import folder
from dq_multimodal.adapters.image_text import image_half
from dq_multimodal.config import CompressConfig, InputError, PlanConfig
from dq_multimodal.core import one_bin
from dq_multimodal.folder import stage
from dq_multimodal.manifest import Manifest, PatchFacts, make
from dq_multimodal.options import takes
from dq_multimodal.planning import make_plan
from dq_multimodal.planning.trials import Trials
from dq_multimodal.report import FILE as REPORT_FILE
from dq_multimodal.report import write_report
from dq_multimodal.run import Run, found_complete, output_folder
from dq_multimodal.stages import embedding, subset
from dq_multimodal.stages.bin_costs import foresee_bins
from dq_multimodal.stages.ordering import (
    bin_by_method,
    count_left,
    count_subset,
    mark_duplicates,
    order_by_method,
    part_rows,
)
from dq_multimodal.stages.patching import (
    PatchDropper,
    check_smaller,
    drop_patches,
    note_original,
    stored_bytes,
)
from dq_multimodal.stages.preparation import (
    Job,
    load_models,
    mark_left_out,
    note_rows,
    open_rows,
    prepare,
    start_manifest,
)
from dq_multimodal.stages.scoring import score_bins
from dq_multimodal.stages.selection import (
    BINS_FILE,
    SELECTION_FILE,
    note_strata,
    read_kept,
    write_selection,
)
from dq_multimodal.stages.targeting import pick_targets

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy import ndarray

    from dq_multimodal.data.source import AnyDataset


@takes(CompressConfig)
def compress(dataset: "AnyDataset", **options: Any) -> Run:
    """Compress a dataset to a share of its rows, into a run folder.

    Interrupted at any moment, the same call goes on where it stopped and ends with the same
    files. In a folder that holds the finished run already, it returns that run.

    Args:
        dataset: Hub id, local path, or a `datasets.Dataset` or `DatasetDict`.

    Raises:
        InputError: For every wrong setting and bad input, in one clear line.
    """
    if options.get("engine") == "ray":
        from dq_multimodal.distributed.engine import compress_on_ray

        return compress_on_ray(dataset, options)
    request, source, why = open_rows(dataset, options)
    place = output_folder(request)
    with folder.claim_folder(place):
        folder.spare_inputs(place, request, source)
        job = prepare(request, source, why)
        if not request.overwrite and folder.is_finished(
            place, job.config, with_report=request.report
        ):
            return found_complete(place)
        load_models(job)
        if request.memory_limit is not None:
            trials = Trials(compress, job)
            trials.memory(trials.count_kept()).check(request.memory_limit)
        manifest = folder.begin(place, job.config, request.overwrite)
        if manifest is None:
            size = subset.count_bytes(source.dataset)
            manifest = start_manifest(source, job.labels, size)
        embed(job, place, manifest)
        select(job, place, manifest)
        write(job, place, manifest)
        if request.report:
            show(job, place, manifest)
        folder.finish(place, job.config, manifest)
        return Run(place)


def embed(job: Job, place: Path, manifest: Manifest) -> None:
    """Embed the rows, or copy ready embeddings, and note what is odd about the rows."""
    request, adapter, is_needed = job.request, job.adapter, job.request.needs_embeddings
    given = request.ready_embeddings
    made = [embedding.FILE] if is_needed else []
    is_scored = all((place / file).exists() for file in (SELECTION_FILE, BINS_FILE))
    if request.method == "adq" and not given and not (is_scored and manifest.has("selection")):
        made = list(embedding.FILES)
    with stage(place, manifest, "embeddings", *made) as is_due:
        if not is_due:
            return
        if given is not None and is_needed:
            embedding.copy_embeddings(given, job.source.dataset, request.split, place)
        elif adapter is not None and is_needed:
            embedding.embed_rows(adapter, place, request.batch_size)
        image = image_half(adapter)
        if image is not None and not (is_needed and given is None):
            image.check_images()
        problems, notes = note_rows(job)
        if is_needed:
            by_cosine = given is None or request.similarity == "cosine"
            vectors = embedding.open_embeddings(place)
            notes = embedding.note_alike(vectors, by_cosine=by_cosine) + notes
        manifest.problems, manifest.notes = problems, notes


def select(job: Job, place: Path, manifest: Manifest) -> None:
    """Bin the rows, score the bins, and put the rows in their order."""
    request, config = job.request, job.config
    marks = replace(job.marks, unreadable=mark_left_out(manifest, job.adapter, request))
    count_subset(job.strata, request, marks)  # raises if too few rows are left
    with stage(place, manifest, "selection", SELECTION_FILE, BINS_FILE) as is_due:
        if not is_due:
            return
        bins, scores, vectors = one_bin(job.strata), None, None
        if request.needs_embeddings:
            vectors = embedding.open_embeddings(place)
        if vectors is not None and config.bins != "none":
            strata = job.strata
            if request.partition is not None:
                strata, manifest.labels = part_rows(vectors, request.partition, request.similarity)
            n_left = count_left(config)
            if config.bins in ("dq", "graphcut"):
                can_part = len(manifest.labels) == 1 and not n_left
                long = foresee_bins(vectors, strata, request, n_left, can_part=can_part)
                if long is not None:
                    print(long, file=sys.stderr, flush=True)  # noqa: T201
            bins, marks = bin_by_method(vectors, strata, config.bins, request, marks, n_left)
        if request.method == "adq" and job.adapter is not None:
            started = time.perf_counter()
            n_left = count_left(config, "scoring" if request.ready_embeddings else "embedding")
            scores, manifest.scores = score_bins(job.adapter, place, bins, request, n_left)
            manifest.seconds["scores"] = round(time.perf_counter() - started, 3)
        if job.target is not None:
            rank, row, notes = pick_targets(
                place, job.source.dataset, job.adapter, vectors, job.target, request
            )
            marks = replace(marks, target_rank=rank, target_row=row)
            manifest.add_notes(notes)
        if request.drop_duplicates is not None:
            assert vectors is not None
            share = getattr(config.embedding, "text_share", None)
            marks = mark_duplicates(vectors, bins, request, scores, marks, share)
            assert marks.duplicate_of is not None
            n_repeated = int((marks.duplicate_of >= 0).sum())
            least = f"{request.drop_duplicates:g}" + (
                "" if share is None else " of the images and of the texts"
            )
            manifest.add_notes(
                [
                    f"{n_repeated:,} near-duplicates (cosine of at least {least}) of rows "
                    "before them are at the end of the order, see duplicate_of in selection.parquet"
                ]
            )
        order = order_by_method(bins, request, scores, marks)
        labels = manifest.labels
        write_selection(place, bins, config.bins, order, request, labels, scores, marks)
        if job.label_column is not None:
            manifest.note_selection(note_strata(labels, place, request))


def write(job: Job, place: Path, manifest: Manifest) -> None:
    """Write the kept rows, their images as patch records where patches are dropped."""
    with stage(place, manifest, "subset", subset.FOLDER) as is_due:
        if not is_due:
            return
        rows, kept = job.source.dataset, read_kept(place, job.request)
        picks = kept["row"].to_numpy()
        if job.dropper is None:
            splits = job.config.source.splits
            manifest.bytes.subset_data = subset.write_subset(
                rows, picks, kept, place, splits=splits
            )
        else:
            write_patches(job, job.dropper, picks, kept, place, manifest)
        job.source.check()
        manifest.bytes.source_data = subset.count_bytes(rows)


def show(job: Job, place: Path, manifest: Manifest) -> None:
    """Write the report."""
    with stage(place, manifest, "report", REPORT_FILE) as is_due:
        if is_due:
            is_embedded = job.request.needs_embeddings
            vectors = embedding.open_embeddings(place) if is_embedded else None
            rows = job.source.dataset
            write_report(place, job.config, manifest, embeddings=vectors, dataset=rows)


@takes(PlanConfig, "overwrite")
def plan(dataset: "AnyDataset", **options: Any) -> dict[str, Any]:
    """Say what `compress` with these arguments will take: seconds, memory, disk, rows, bytes.

    Rows are read, the model is loaded, and `compress` itself is run on samples of the rows in a
    temporary folder, for about half a minute of a processor. No run folder is made or changed. The
    seconds are those of this machine as busy as it is now, and of a run from its beginning.

    Args:
        dataset: Hub id, local path, or a `datasets.Dataset` or `DatasetDict`.

    Returns:
        The figures, as plain values that JSON can hold; sizes in bytes, times in seconds.

    Raises:
        InputError: For what `compress` would refuse at its beginning, or of a sample.
    """
    return make_plan(compress, dataset, options)


def write_patches(
    job: Job,
    dropper: PatchDropper,
    picks: "ndarray",
    kept: "pa.Table",
    place: Path,
    manifest: Manifest,
) -> None:
    """Write the kept rows with the patch records of their images, and note what these lose."""
    rows, splits = job.source.dataset, job.config.source.splits
    records = drop_patches(rows, picks, dropper, place)
    found = records.summarise()
    data_bytes = subset.write_subset(rows, picks, kept, place, records, splits=splits)
    stored = stored_bytes(subset.subset_files(place), dropper.column)
    try:
        check_smaller(found, stored)
    except InputError:
        shutil.rmtree(place / subset.FOLDER)
        raise
    sizes = manifest.bytes
    sizes.subset_data, sizes.stored_images = data_bytes, stored
    sizes.source_images = found["source_bytes"]
    manifest.add_notes(note_original(what, which) for what, which in found["originals"].items())
    if found["lost"]:
        parts = ", ".join(f"{what} of {n:,}" for what, n in found["lost"].items())
        manifest.add_notes(
            [f"patch records hold pixels and colour profile alone; images lose: {parts}"]
        )
    originals = {what: len(which) for what, which in found["originals"].items()}
    facts = {**found, "originals": originals, "fill": dropper.fill}
    manifest.patches = make(PatchFacts, facts)
