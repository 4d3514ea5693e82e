"""compress(): load, embed, bins, order, subset."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal import embedding, folder, subset
from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.text import TextAdapter, detect_layout
from dq_multimodal.config import CompressConfig, InputError, count_kept
from dq_multimodal.core import one_bin
from dq_multimodal.run import Run, begin, default_folder, finish, found_complete, is_finished
from dq_multimodal.selection import (
    BINS_FILE,
    SELECTION_FILE,
    bin_rows,
    bins_kind,
    order_by_method,
    read_kept,
    read_strata,
    write_selection,
)
from dq_multimodal.source import Source, from_memory, load_source

if TYPE_CHECKING:
    from datasets import Dataset

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
        strata, labels = read_strata(source.dataset, request.label_column)
        adapter = _choose_adapter(source.dataset, request)
        config = _make_config(request, source, adapter)
        if not overwrite and is_finished(target, config):
            return found_complete(target)
        if config["embedding"] is None and config["bins"] != "none" and adapter is not None:
            if not adapter.lengths().any():
                raise InputError(f"no row of {request.dataset} has anything to embed")
            config["embedding"] = adapter.describe_model()
        _spare_inputs(target, request)
        begin(target, config, overwrite)
        manifest = _start_manifest(target, source, labels)

        with _stage(target, manifest, "rows") as is_due:
            if is_due and adapter is not None:
                adapter.lengths()
                manifest["notes"] = adapter.notes
                manifest["problems"] = {
                    what: {"count": len(rows), "rows": rows[:MAX_LISTED]}
                    for what, rows in adapter.problems.items()
                }
        made = [embedding.FILE] if config["bins"] != "none" else []
        with _stage(target, manifest, "embeddings", *made) as is_due:
            if is_due and config["bins"] != "none":
                if request.embeddings is not None:
                    embedding.copy_embeddings(
                        request.embeddings, source.dataset, request.split, target
                    )
                elif adapter is not None:
                    embedding.embed_rows(adapter, target, request.batch_size)
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
                    )
                order = order_by_method(bins, request.method, request.draw, request.seed)
                write_selection(target, bins, config["bins"], order, request.keep_ratio, labels)
        with _stage(target, manifest, "subset", subset.FOLDER) as is_due:
            if is_due:
                kept = read_kept(target)
                picks = kept["row"].to_numpy()
                n_bytes = subset.write_subset(source.dataset, picks, kept, target)
                manifest["bytes"]["subset_data"] = n_bytes
        return finish(target, config, manifest)


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


def _choose_adapter(dataset: "Dataset", request: CompressConfig) -> Adapter | None:
    """Find the text; None where nothing is to be embedded and no text was found."""
    needs_text = bins_kind(request.method) != "none" and request.embeddings is None
    try:
        layout = detect_layout(dataset.column_names, request.text_columns)
        return TextAdapter(dataset, layout, request.embedding_model)
    except InputError:
        if needs_text or request.text_columns is not None:
            raise
        return None


def _make_config(
    request: CompressConfig, source: Source, adapter: Adapter | None
) -> dict[str, Any]:
    """Put together config.yaml, all but the model, which takes seconds to load."""
    kind = bins_kind(request.method)
    given = request.embeddings if kind != "none" else None
    return {
        "request": request.as_dict(),
        "source": source.origin,
        "rows": adapter.describe() if adapter is not None else None,
        "embedding": (
            embedding.describe_given(given, source.dataset, request.split) if given else None
        ),
        "bins": kind,
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
    }


@contextmanager
def _stage(target: Path, manifest: dict[str, Any], name: str, *files: str) -> Iterator[bool]:
    """Run a stage unless it is done and its files are there; note its seconds when it is done."""
    is_there = all((target / file).exists() for file in files)
    is_due = manifest["state"].get(name) != "done" or not is_there
    started = time.perf_counter()
    yield is_due
    if is_due:
        manifest["seconds"][name] = round(time.perf_counter() - started, 3)
        manifest["state"][name] = "done"
        folder.write_manifest(target, manifest)
