"""What a run has before its first stage: the request, its rows, config.yaml, manifest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter, note_problem
from dq_multimodal.adapters.choice import choose_adapter, find_modality, label_column_of
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.adapters.image_text import image_half
from dq_multimodal.config import CompressConfig, InputError, Method, count_parts, split_models
from dq_multimodal.data.local import is_table
from dq_multimodal.data.pixels import UNDECODED
from dq_multimodal.data.repeats import note_repeats
from dq_multimodal.data.source import MEMORY, Source, from_memory, load_source
from dq_multimodal.data.stream import Stream
from dq_multimodal.files import show_name
from dq_multimodal.manifest import (
    AUTO_NOTE,
    Columns,
    Config,
    Manifest,
    Model,
    Origin,
    Patches,
    Problem,
    Sizes,
    make,
)
from dq_multimodal.models.locate import hash_weights
from dq_multimodal.stages import embedding, subset
from dq_multimodal.stages.marks import Marks, has_epochs, hash_file, make_marks, note_marks
from dq_multimodal.stages.ordering import bins_kind, count_subset
from dq_multimodal.stages.selection import read_strata
from dq_multimodal.stages.targeting import Target, describe_target, load_target

if TYPE_CHECKING:
    from datasets import Dataset

    from dq_multimodal.data.source import AnyDataset
    from dq_multimodal.stages.patching import PatchDropper

MODELS = ("embedding_model", "attribution_model", "mae_model", "target_model")
COVERED_SHARE = 0.1
"""Share of images up to which auto takes coverage, without training dynamics."""
UNLABELLED = "no label, a stratum of their own"
MAX_LISTED = 1000
"""Row numbers of one problem that manifest.json lists; the count is exact.

Rows that are left out are all listed.
"""
MAX_NAMED = 20
"""Rows that are left out, named in a note with the names of their files."""


@dataclass
class Job:
    """A request, its method settled, with all that its stages need.

    There is an adapter where there is text or an image. Each row has the code of its stratum, each
    stratum a label; some rows may have been without one. Why is said of method auto.
    """

    request: CompressConfig
    source: Source
    adapter: Adapter | None
    target: Target | None
    label_column: str | None
    strata: Int[ndarray, " n"]
    labels: list[str]
    unlabelled: Bool[ndarray, " n"] | None
    marks: Marks
    config: Config
    why: str | None
    dropper: "PatchDropper | None" = None


def open_rows(
    dataset: "AnyDataset", options: dict[str, Any]
) -> tuple[CompressConfig, Source, str | None]:
    """Make the request, open its dataset and settle its method.

    Returns:
        The request, the source, and why method auto is the one that it is.

    Raises:
        InputError: If there is no such option or dataset, or an option does not go with another.
    """
    if isinstance(dataset, str | PathLike):
        request = CompressConfig.from_options({"dataset": dataset, **options})
        source = open_source(request)
    else:
        request = CompressConfig.from_options({"dataset": MEMORY, **options})
        if request.streaming:
            raise InputError("streaming is for a name or a path: this dataset is loaded already")
        source = from_memory(dataset, request.split, request.image_folder)
    subset.check_columns(source.dataset)
    request, why = settle_method(request, source.dataset)
    return request, source, why


def prepare(request: CompressConfig, source: Source, why: str | None) -> Job:
    """Find columns, strata and all that the order depends on; no model is loaded.

    Raises:
        InputError: For what cannot be done with these rows, in one clear line.
    """
    adapter = choose_adapter(source.dataset, request)
    target = None if request.target is None else load_target(request, adapter)
    label_column = label_column_of(adapter, request)
    strata, labels, unlabelled = survey(source, adapter, request, label_column)
    request = request.of_rows(len(strata))
    given = request.ready_embeddings if request.needs_embeddings else None
    vectors = embedding.describe_given(given, source.dataset, request.split) if given else None
    config = make_config(request, source, adapter, label_column, vectors)
    if target is not None:
        config.target = describe_target(target, request)
    marks = make_marks(source.dataset, request, len(strata))
    count_subset(strata, request, marks)  # raises if a cap leaves too few
    where = (request, source, adapter, target, label_column)
    return Job(*where, strata, labels, unlabelled, marks, config, why)


def load_models(job: Job) -> None:
    """Load the models that embed, score and attribute, and note them in config.yaml."""
    rows = job.source.dataset
    note_model(job.config, job.adapter, job.request, rows.column_names)
    if job.request.drop_ratio:
        from dq_multimodal.stages.patching import make_dropper

        job.dropper = make_dropper(rows, job.request, job.adapter)
        job.config.patches = make(Patches, job.dropper.describe())


def open_source(request: CompressConfig) -> Source:
    """Find the dataset of the request, on disk or on the Hub; its rows may be a stream."""
    return load_source(
        request.dataset,
        split=request.split,
        config_name=request.config_name,
        revision=request.revision,
        field=request.field,
        streaming=request.streaming,
        image_folder=request.image_folder,
    )


def settle_method(
    request: CompressConfig, dataset: "Dataset", n_rows: int | None = None
) -> tuple[CompressConfig, str | None]:
    """Give method auto the name of the method that the evidence supports, and say why.

    There are n_rows rows where the dataset is only the first of them.

    The reasons are in docs/selection.md, what was measured in docs/results.md.
    """
    method: Method
    if request.method != "auto":
        return request, None
    share = request.keep_ratio
    if request.keep_rows is not None and not isinstance(dataset, Stream):
        share = request.keep_rows / (n_rows or len(dataset))
    is_plain = request.image_embedding == "features" and request.similarity == "cosine"
    if request.difficulty is not None:
        method, why = "coverage", "there is a difficulty"
    elif request.target is not None:
        method, why = "random", "no other way to choose what is not for the target is known better"
    elif is_plain and request.dynamics is not None and has_epochs(request.dynamics):
        request = replace(request, difficulty="cad", method="coverage")
        method, why = "coverage", "there are training dynamics, by which rows weigh as cad says"
    elif is_plain and share <= COVERED_SHARE and find_modality(dataset, request) != "text":
        method, why = "coverage", f"there are images, and at most {COVERED_SHARE:.0%} are kept"
    elif is_plain and (request.ready_embeddings is not None or request.embedding_model is not None):
        method, why = "blocks", "there are embeddings, and no method is known to do more with them"
    else:
        method, why = "random", "no method is known to be better for such rows at this size"
    return replace(request, method=method), f"{AUTO_NOTE}{method}, since {why}"


def survey(
    source: Source, adapter: Adapter | None, request: CompressConfig, label_column: str | None
) -> tuple[Int[ndarray, " n"], list[str], Bool[ndarray, " n"] | None]:
    """Count the rows and number their strata, in one pass over a stream where that can be.

    Returns:
        See `read_strata`.

    Raises:
        InputError: If there are too few rows for what is asked, or a label is no plain value.
    """
    if isinstance(source.dataset, Stream) and label_column is None and adapter is not None:
        adapter.lengths()  # has to read the rows of a text anyway, and counts them
    if request.keep_every_class and label_column is None:
        raise InputError(
            "keep_every_class is for rows with labels: name their column with --label-column"
        )
    splits = source.origin.get("splits")
    strata, labels, unlabelled = read_strata(source.dataset, label_column, splits)
    n_rows = len(strata)
    image = image_half(adapter)
    if image is not None and has_numbered_folders(source, image, labels):
        image.notes.append(
            f"the folders {min(labels)} ... {max(labels)} are taken for {len(labels):,} classes: "
            "if they are shards of one set, use --label-column none"
        )
    source.origin["rows"] = n_rows
    count_subset(strata, request)
    check_strata(request, n_rows, label_column)
    if request.partition is not None and splits:
        raise InputError("partition is for the rows of one split, and the splits are strata")
    return strata, labels, unlabelled


def check_strata(request: CompressConfig, n_rows: int, label_column: str | None) -> None:
    """Raise unless so many rows can be binned, and parted, as is asked."""
    if bins_kind(request.method) == "dq" and request.n_bins > n_rows:
        raise InputError(f"n_bins must be at most the {n_rows} rows, got {request.n_bins}")
    if request.partition is not None:
        count_parts(request.partition, n_rows)
        if label_column is not None:
            raise InputError(
                f"partition is for rows without labels, and {label_column} makes strata "
                "already: leave out one of them (--label-column none)"
            )


def has_numbered_folders(source: Source, adapter: ImageAdapter, labels: list[str]) -> bool:
    """Say whether the classes are folders whose names are all numbers of one width."""
    column = adapter.label_column
    is_numbered = all(label.isascii() and label.isdigit() for label in labels)
    if column is None or len(labels) < 2 or not is_numbered or len({*map(len, labels)}) > 1:
        return False
    if type(source.dataset.features[column]).__name__ != "ClassLabel":
        return False
    if isinstance(source.dataset, Stream):  # its images have lost their folders
        names = [file["name"] for file in source.origin.get("files") or []]
        return source.origin["kind"] == "folder" and not any(is_table(n) for n in names)
    return adapter.folder_of(0) in labels


def make_config(
    request: CompressConfig,
    source: Source,
    adapter: Adapter | None,
    label_column: str | None,
    vectors: dict[str, Any] | None,
) -> Config:
    """Put together config.yaml, all but the model, which takes seconds to load.

    Vectors are what there is to say of ready embeddings.
    """
    rows = adapter.describe() if adapter is not None else None
    measure = request.measure_of(rows["modality"] if rows is not None else "")
    return Config(
        request=replace(request, representativeness=measure),
        source=make(Origin, source.origin),
        rows=None if rows is None else make(Columns, rows),
        label_column=label_column,
        embedding=None if vectors is None else make(Model, vectors),
        bins=bins_kind(request.method),
        dynamics=hash_file(request.dynamics),
        model_folders={name: hash_models(getattr(request, name)) for name in MODELS},
    )


def hash_models(names: str | None) -> str | None:
    """Hash the weights of a model, or of two, whose folders may hold others tomorrow."""
    found = [*filter(None, map(hash_weights, split_models(names)))]
    return ",".join(found) or None


def note_model(
    config: Config, adapter: Adapter | None, request: CompressConfig, columns: list[str]
) -> None:
    """Add to config.yaml the model that embeds or scores, where one is needed.

    Raises:
        InputError: If adq has no text or images to score, or no row has anything to embed.
    """
    is_adaptive, is_given = request.method == "adq", request.ready_embeddings is not None
    if adapter is None:
        if is_adaptive:
            raise InputError(
                f"adq scores the text or images of rows, and {request.dataset} has the columns "
                f"{', '.join(columns)}: name --text-columns, or --method dq"
            )
        return
    if not is_adaptive and (config.embedding is not None or not request.needs_embeddings):
        return
    if not adapter.lengths().any():
        raise InputError(f"no row of {request.dataset} has anything to embed")
    try:
        model = make(Model, adapter.describe_model())
    except InputError as error:
        if not is_given:
            raise
        raise InputError(
            f"beside ready embeddings adq needs an encoder for its scores (dq does not): {error}"
        ) from error
    if is_adaptive and is_given:
        config.scoring = model
    else:
        config.embedding = model


def start_manifest(source: Source, labels: list[str], source_data: int | None) -> Manifest:
    """Begin the manifest of a run."""
    files = source.origin.get("files")
    source_files = sum(file["bytes"] for file in files) if files else None
    sizes = Sizes(source_data=source_data, source_files=source_files)
    return Manifest(rows=source.origin["rows"], labels=labels, bytes=sizes)


def note_rows(job: Job) -> tuple[dict[str, Problem], list[str]]:
    """Give the odd rows, and notes on them and on what lies beside them."""
    adapter, problems = job.adapter, {}
    if adapter is not None:
        adapter.lengths()  # reads the rows of a text once, also where nothing is embedded
        problems = {what: (len(rows), sorted(rows)) for what, rows in adapter.problems.items()}
    if job.unlabelled is not None and not job.unlabelled.all():
        rows = np.flatnonzero(job.unlabelled).tolist()
        problems[UNLABELLED] = len(rows), rows
    listed, notes = note_problems(problems, len(job.strata), adapter, job.request)
    if adapter is not None:
        notes = adapter.notes + notes
    notes += note_repeats(job.source.dataset, adapter, job.request)
    notes += [job.source.note] if job.source.note is not None else []
    return listed, notes + note_marks(job.marks) + ([] if job.why is None else [job.why])


def note_problems(
    problems: dict[str, tuple[int, list[int]]],
    n_rows: int,
    adapter: Adapter | None,
    request: CompressConfig,
    names: Callable[[list[int]], list[str | None]] | None = None,
) -> tuple[dict[str, Problem], list[str]]:
    """Record the odd rows, how many and the first of them, and say what becomes of them.

    Names gives those of the files of rows; None asks the adapter.
    """
    left_out = UNDECODED if leaves_out(adapter, request) else ()
    notes, listed = [], {}
    for what, (n_odd, rows) in problems.items():
        is_out = what in left_out
        fate = "left out of the subset" if is_out else "still candidates"
        notes.append(note_problem(what, rows, n_rows, fate, n_odd))
        listed[what] = Problem(count=n_odd, rows=rows[: None if is_out else MAX_LISTED])
    lost = sorted(row for what in left_out if what in listed for row in listed[what].rows)
    if lost and isinstance(adapter, ImageAdapter):
        names = names or adapter.file_names
        notes = note_left_out(lost, names(lost[:MAX_NAMED])) + notes
    return listed, notes


def leaves_out(adapter: Adapter | None, request: CompressConfig) -> bool:
    """Say whether rows whose image cannot be decoded are left out of the subset."""
    return isinstance(adapter, ImageAdapter) and not request.keep_unreadable


def note_left_out(rows: list[int], names: Sequence[str | None]) -> list[str]:
    """Say in one line how many rows are left out, and the first of them with their files."""
    named = zip(rows, names, strict=False)
    shown = [f"row {row}" + (f" ({show_name(name)})" if name else "") for row, name in named]
    if len(rows) > MAX_NAMED:
        shown.append(f"... ({len(rows) - MAX_NAMED:,} more, see selection.parquet)")
    verb = "row whose image cannot be decoded is"
    if len(rows) > 1:
        verb = "rows whose image cannot be decoded are"
    return [
        f"{len(rows):,} {verb} left out of the subset (--keep-unreadable keeps such rows): "
        + ", ".join(shown)
    ]


def mark_left_out(
    manifest: Manifest, adapter: Adapter | None, request: CompressConfig
) -> Bool[ndarray, " n"] | None:
    """Mark the rows that the subset leaves out; None where none is looked for."""
    if not leaves_out(adapter, request):
        return None
    marks = np.zeros(manifest.rows, dtype=bool)
    for what in UNDECODED:
        if what in manifest.problems:
            marks[manifest.problems[what].rows] = True
    return marks
