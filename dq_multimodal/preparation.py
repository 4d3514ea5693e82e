"""What stands before the first stage of a run: the request, its config.yaml, its manifest."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal import embedding, folder, subset
from dq_multimodal.adapters.base import Adapter, Problems, note_problem
from dq_multimodal.config import (
    PRESETS,
    CompressConfig,
    InputError,
    Preset,
    check_choice,
    count_kept,
    count_parts,
)
from dq_multimodal.model_source import hash_weights
from dq_multimodal.selection import NO_LABEL, bins_kind, read_strata
from dq_multimodal.source import Source, from_memory, load_source
from dq_multimodal.stream import Stream

if TYPE_CHECKING:
    from datasets import Dataset

MODELS = ("embedding_model", "attribution_model", "mae_model")
MAX_LISTED = 1000
"""Row numbers of one problem that manifest.json lists; the count is exact."""


def make_request(name: str, options: dict[str, Any]) -> CompressConfig:
    """Make the request from the options of `compress`; those beside a preset win over it."""
    preset = options.pop("preset", None)
    if preset is not None:
        check_choice("preset", preset, Preset)
        options = {**PRESETS[preset], **options}
    try:
        return CompressConfig(dataset=name, **options)
    except TypeError as error:
        raise InputError(f"compress: {error}".replace("CompressConfig.__init__() ", "")) from None


def read_request(
    dataset: "str | Path | Dataset", options: dict[str, Any]
) -> tuple[CompressConfig, Source | None]:
    """Make the request for a dataset, by name or path or loaded; of a loaded one its source too."""
    if isinstance(dataset, str | Path):
        return make_request(str(dataset), options), None
    source = from_memory(dataset, options.get("split", "train"))
    return make_request(source.origin["name"], options), source


def open_source(request: CompressConfig) -> Source:
    """Find the dataset of the request, on disk or on the Hub; its rows may be a stream."""
    return load_source(
        request.dataset,
        split=request.split,
        config_name=request.config_name,
        revision=request.revision,
        field=request.field,
        streaming=request.streaming,
    )


def survey(
    source: Source, adapter: Adapter | None, request: CompressConfig, label_column: str | None
) -> tuple[Int[ndarray, " n"], list[str]]:
    """Count the rows and number their strata, in one pass over a stream where that can be.

    Raises:
        InputError: If there are too few rows for what is asked, or a label is no plain value.
    """
    if isinstance(source.dataset, Stream) and label_column is None and adapter is not None:
        adapter.lengths()  # has to read the rows of a text anyway, and counts them
    strata, labels = read_strata(source.dataset, label_column)
    n_rows = len(strata)
    source.origin["rows"] = n_rows
    count_kept(n_rows, request.keep_ratio)
    if bins_kind(request.method) == "dq" and request.n_bins > n_rows:
        raise InputError(f"n_bins must be at most the {n_rows} rows, got {request.n_bins}")
    if request.partition is not None:
        count_parts(request.partition, n_rows)
        if label_column is not None:
            raise InputError(
                f"partition is for rows without labels, and {label_column} makes strata "
                "already: leave out one of them (--label-column none)"
            )
    return strata, labels


def make_config(
    request: CompressConfig, source: Source, adapter: Adapter | None, label_column: str | None
) -> dict[str, Any]:
    """Put together config.yaml, all but the model, which takes seconds to load."""
    kind = bins_kind(request.method)
    given = request.embeddings if kind != "none" else None
    rows = adapter.describe() if adapter is not None else None
    measure = request.measure_of(rows["modality"] if rows is not None else "")
    return {
        "request": {**request.as_dict(), "representativeness": measure},
        "source": source.origin,
        "rows": rows,
        "label_column": label_column,
        "embedding": (
            embedding.describe_given(given, source.dataset, request.split) if given else None
        ),
        "bins": kind,
        "model_folders": {name: hash_weights(getattr(request, name)) for name in MODELS},
    }


def note_model(
    config: dict[str, Any], adapter: Adapter | None, request: CompressConfig, columns: list[str]
) -> None:
    """Add to config.yaml the model that embeds or scores, where one is needed.

    Raises:
        InputError: If adq has no text or images to score, or no row has anything to embed.
    """
    is_adaptive = request.method == "adq"
    if adapter is None:
        if is_adaptive:
            raise InputError(
                f"adq scores the text or images of rows, and {request.dataset} has the columns "
                f"{', '.join(columns)}: name --text-columns, or --method dq"
            )
    elif is_adaptive or (config["embedding"] is None and config["bins"] != "none"):
        if not adapter.lengths().any():
            raise InputError(f"no row of {request.dataset} has anything to embed")
        is_beside = is_adaptive and request.embeddings is not None
        config["scoring" if is_beside else "embedding"] = describe_model(adapter, request)


def describe_model(adapter: Adapter, request: CompressConfig) -> dict[str, Any]:
    """Load the model and say which it is."""
    try:
        return adapter.describe_model()
    except InputError as error:
        if request.embeddings is None:
            raise
        raise InputError(
            f"beside ready embeddings adq needs an encoder for its scores (dq does not): {error}"
        ) from error


def spare_inputs(target: Path, request: CompressConfig) -> None:
    """Raise before a run would overwrite the very files it is made from."""
    for name in (request.embeddings, request.dataset):
        if name and target.resolve() in Path(name).resolve().parents:
            raise InputError(f"{name} lies in the output folder {target}: name another")


def start_manifest(target: Path, source: Source, labels: list[str]) -> dict[str, Any]:
    """Read the manifest of a run that was stopped, or begin one."""
    before = folder.read_manifest(target)
    if before:
        return before
    files = source.origin.get("files")
    return {
        "state": {},
        "rows": len(source.dataset),
        "labels": labels,
        "notes": [],
        "problems": {},
        "bytes": {
            "source_data": subset.count_bytes(source.dataset),
            "source_files": sum(file["bytes"] for file in files) if files else None,
        },
        "seconds": {},
        "resumed": [],
    }


def note_rows(
    manifest: dict[str, Any],
    source: Source,
    adapter: Adapter | None,
    strata: Int[ndarray, " n"],
    labels: list[str],
) -> None:
    """Write down what is odd about the rows, and what lies beside them."""
    problems: Problems = {}
    if adapter is not None:
        adapter.lengths()  # reads the rows of a text once, also where nothing is embedded
        problems = {what: sorted(rows) for what, rows in adapter.problems.items()}
    if NO_LABEL in labels and len(labels) > 1:
        rows = np.flatnonzero(strata == labels.index(NO_LABEL)).tolist()
        problems["no label, a stratum of their own"] = rows
    manifest["notes"] = [note_problem(what, rows) for what, rows in problems.items()]
    if adapter is not None:
        manifest["notes"] = adapter.notes + manifest["notes"]
    if source.note is not None:
        manifest["notes"].append(source.note)
    manifest["problems"] = {
        what: {"count": len(rows), "rows": rows[:MAX_LISTED]} for what, rows in problems.items()
    }
