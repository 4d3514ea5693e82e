"""compress(): load, embed, bins, order, subset."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal import embedding, folder, patch_records, subset
from dq_multimodal.adapters.base import Adapter, Problems, note_problem
from dq_multimodal.adapters.choice import choose_adapter, label_column_of
from dq_multimodal.config import CompressConfig, InputError, count_kept
from dq_multimodal.core import one_bin
from dq_multimodal.model_source import hash_weights
from dq_multimodal.patch_records import (
    check_smaller,
    drop_patches,
    note_original,
    stored_bytes,
)
from dq_multimodal.run import Run, begin, default_folder, finish, found_complete, is_finished
from dq_multimodal.selection import (
    BINS_FILE,
    NO_LABEL,
    SELECTION_FILE,
    bin_rows,
    bins_kind,
    count_left,
    order_by_method,
    read_kept,
    read_strata,
    write_selection,
)
from dq_multimodal.source import Source, from_memory, load_source

if TYPE_CHECKING:
    from datasets import Dataset

    from dq_multimodal.patching import PatchDropper

MODELS = ("embedding_model", "attribution_model", "mae_model")
MAX_LISTED = 1000
"""Row numbers of one problem that manifest.json lists; the count is exact."""


def compress(
    dataset: "str | Dataset",
    *,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Run:
    """Compress a dataset to a share of its rows, into a run folder.

    Interrupted at any moment, the same call goes on where it stopped and ends with the same
    files. In a folder that holds the finished run already, it returns that run.

    Args:
        dataset: Hub id, local path, or a `datasets.Dataset`.
        output_dir: The run folder; None is runs/DATASET-METHOD-RATIO.
        overwrite: Replace another run that is there already.
        **options: The other fields of `CompressConfig`: keep_ratio, method, n_bins, ...

    Raises:
        InputError: For every wrong setting and bad input, in one clear line.
    """
    source = None
    if not isinstance(dataset, str | Path):
        source = from_memory(dataset, options.get("split", "train"))
    request = _make_request(source.origin["name"] if source else str(dataset), options)
    target = Path(output_dir) if output_dir is not None else default_folder(request)
    with folder.claim_folder(target):
        source = source or load_source(
            request.dataset,
            split=request.split,
            config_name=request.config_name,
            revision=request.revision,
        )
        n_rows = len(source.dataset)
        count_kept(n_rows, request.keep_ratio)
        if bins_kind(request.method) == "dq" and request.n_bins > n_rows:
            raise InputError(f"n_bins must be at most the {n_rows} rows, got {request.n_bins}")
        subset.check_columns(source.dataset)
        adapter = choose_adapter(source.dataset, request)
        label_column = label_column_of(adapter, request)
        strata, labels = read_strata(source.dataset, label_column)
        config = _make_config(request, source, adapter, label_column)
        if not overwrite and is_finished(target, config):
            return found_complete(target)
        if config["embedding"] is None and config["bins"] != "none" and adapter is not None:
            if not adapter.lengths().any():
                raise InputError(f"no row of {request.dataset} has anything to embed")
            config["embedding"] = adapter.describe_model()
        dropper = None
        if request.drop_ratio:
            from dq_multimodal.patching import make_dropper

            dropper = make_dropper(source.dataset, request, adapter)
            config["patches"] = dropper.describe()
        _spare_inputs(target, request)
        begin(target, config, overwrite)
        manifest = _start_manifest(target, source, labels)

        made = [embedding.FILE] if config["bins"] != "none" else []
        with _stage(target, manifest, "embeddings", *made) as is_due:
            if is_due:
                if request.embeddings is not None and config["bins"] != "none":
                    embedding.copy_embeddings(
                        request.embeddings, source.dataset, request.split, target
                    )
                elif adapter is not None and config["bins"] != "none":
                    embedding.embed_rows(adapter, target, request.batch_size)
                _note_rows(manifest, adapter, strata, labels)
        with _stage(target, manifest, "selection", SELECTION_FILE, BINS_FILE) as is_due:
            if is_due:
                bins = one_bin(strata)
                if config["bins"] != "none":
                    bins = bin_rows(
                        embedding.open_embeddings(target),
                        strata,
                        config["bins"],
                        request.n_bins,
                        request.similarity,
                        count_left(config),
                    )
                order = order_by_method(bins, request.method, request.draw, request.seed)
                write_selection(target, bins, config["bins"], order, request.keep_ratio, labels)
        with _stage(target, manifest, "subset", subset.FOLDER) as is_due:
            if is_due:
                _write_subset(target, source.dataset, dropper, manifest)
        return finish(target, config, manifest)


def _write_subset(
    target: Path, dataset: "Dataset", dropper: "PatchDropper | None", manifest: dict[str, Any]
) -> None:
    """Write the kept rows, their images as patch records where patches are dropped."""
    kept = read_kept(target)
    picks = kept["row"].to_numpy()
    if dropper is None:
        manifest["bytes"]["subset_data"] = subset.write_subset(dataset, picks, kept, target)
        return
    records = drop_patches(dataset, dropper.column, picks, dropper.drop, target)
    found = records.summarise()
    manifest["bytes"]["subset_data"] = subset.write_subset(dataset, picks, kept, target, records)
    stored = stored_bytes(subset.subset_files(target), dropper.column)
    try:
        check_smaller(found, stored)
    except InputError:
        subset.remove_subset(target)
        raise
    manifest["bytes"] |= {"source_images": found.pop("source_bytes"), "stored_images": stored}
    for what, rows in found["originals"].items():
        note = note_original(what, rows)
        manifest["notes"] += [note] if note not in manifest["notes"] else []
        found["originals"][what] = len(rows)
    manifest["patches"] = {"fill": dropper.fill_name, **found}


def _note_rows(
    manifest: dict[str, Any],
    adapter: Adapter | None,
    strata: Int[ndarray, " n"],
    labels: list[str],
) -> None:
    """Write down what is odd about the rows."""
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
    manifest["problems"] = {
        what: {"count": len(rows), "rows": rows[:MAX_LISTED]} for what, rows in problems.items()
    }


def _make_request(name: str, options: dict[str, Any]) -> CompressConfig:
    try:
        return CompressConfig(dataset=name, **options)
    except TypeError as error:
        raise InputError(f"compress: {error}".replace("CompressConfig.__init__() ", "")) from None


def _spare_inputs(target: Path, request: CompressConfig) -> None:
    """Raise before a run would overwrite the very files it is made from."""
    for name in (request.embeddings, request.dataset):
        if name and target.resolve() in Path(name).resolve().parents:
            raise InputError(f"{name} lies in the output folder {target}: name another")


def _make_config(
    request: CompressConfig, source: Source, adapter: Adapter | None, label_column: str | None
) -> dict[str, Any]:
    """Put together config.yaml, all but the model, which takes seconds to load."""
    kind = bins_kind(request.method)
    given = request.embeddings if kind != "none" else None
    return {
        "request": request.as_dict(),
        "source": source.origin,
        "rows": adapter.describe() if adapter is not None else None,
        "label_column": label_column,
        "embedding": (
            embedding.describe_given(given, source.dataset, request.split) if given else None
        ),
        "bins": kind,
        "model_folders": {name: hash_weights(getattr(request, name)) for name in MODELS},
    }


def _start_manifest(target: Path, source: Source, labels: list[str]) -> dict[str, Any]:
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


@contextmanager
def _stage(target: Path, manifest: dict[str, Any], name: str, *files: str) -> Iterator[bool]:
    """Run a stage unless it is done and its files are there; note its seconds when it is done."""
    is_there = all((target / file).exists() for file in files)
    is_due = manifest["state"].get(name) != "done" or not is_there
    begun = {"embeddings": embedding.PROGRESS, "subset": patch_records.FOLDER}.get(name)
    is_resumed = is_due and begun is not None and (target / begun).exists()
    started = time.perf_counter()
    yield is_due
    if is_due:
        manifest["seconds"][name] = round(time.perf_counter() - started, 3)
        if is_resumed:
            manifest["resumed"] = sorted({*manifest.get("resumed", []), name})
        manifest["state"][name] = "done"
        folder.write_manifest(target, manifest)
