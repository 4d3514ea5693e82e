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
from dq_multimodal.run import Run, begin, default_folder, finish, found_complete
from dq_multimodal.selection import (
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
    is_object = not isinstance(dataset, str | Path)
    source = from_memory(dataset) if is_object else None
    name = source.origin["name"] if source else str(dataset)
    request = _make_request(name, options)
    target = Path(output_dir) if output_dir is not None else default_folder(request)
    with folder.claim_folder(target):
        if not is_object and not overwrite and _is_finished(target, request):
            return found_complete(target)
        source = source or load_source(
            name,
            split=request.split,
            config_name=request.config_name,
            revision=request.revision,
        )
        count_kept(len(source.dataset), request.keep_ratio)
        if bins_kind(request.method) == "dq" and request.n_bins > len(source.dataset):
            raise InputError(
                f"n_bins must be at most the {len(source.dataset)} rows, got {request.n_bins}"
            )
        subset.check_columns(source.dataset)
        strata, labels = read_strata(source.dataset, request.label_column)
        adapter = _choose_adapter(source.dataset, request)
        config = _make_config(request, source, adapter)
        if begin(target, config, overwrite):
            return found_complete(target)
        manifest = _start_manifest(target, source, labels)

        with _stage(target, manifest, "rows") as is_due:
            if is_due and adapter is not None:
                adapter.lengths()
                manifest |= {"notes": adapter.notes, "problems": adapter.problems}
        with _stage(target, manifest, "embeddings") as is_due:
            if is_due and config["bins"] != "none":
                if request.embeddings is not None:
                    embedding.copy_embeddings(
                        request.embeddings, source.dataset, request.split, target
                    )
                elif adapter is not None:
                    embedding.embed_rows(adapter, target, request.batch_size)
        with _stage(target, manifest, "selection") as is_due:
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
        with _stage(target, manifest, "subset") as is_due:
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


def _is_finished(target: Path, request: CompressConfig) -> bool:
    config = folder.read_config(target)
    is_same = config is not None and config["request"] == request.as_dict()
    return is_same and bool(folder.read_manifest(target).get("complete"))


def _choose_adapter(dataset: "Dataset", request: CompressConfig) -> Adapter | None:
    """Find the text; None where nothing is to be embedded and no text was found."""
    needs_text = bins_kind(request.method) != "none" and request.embeddings is None
    try:
        layout = detect_layout(dataset.column_names, request.text_columns)
    except InputError:
        if needs_text or request.text_columns is not None:
            raise
        return None
    return TextAdapter(dataset, layout, request.embedding_model)


def _make_config(
    request: CompressConfig, source: Source, adapter: Adapter | None
) -> dict[str, Any]:
    """Put together config.yaml."""
    kind = bins_kind(request.method)
    model: dict[str, Any] | None = None
    if kind != "none" and request.embeddings is not None:
        model = embedding.describe_given(request.embeddings, source.dataset, request.split)
    elif kind != "none" and adapter is not None:
        model = adapter.describe_model()
    return {
        "request": request.as_dict(),
        "source": source.origin,
        "rows": adapter.describe() if adapter is not None else None,
        "embedding": model,
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
def _stage(target: Path, manifest: dict[str, Any], name: str) -> Iterator[bool]:
    """Run a stage unless it is done already; note its seconds and that it is done."""
    is_due = manifest["state"].get(name) != "done"
    started = time.perf_counter()
    yield is_due
    if is_due:
        manifest["seconds"][name] = round(time.perf_counter() - started, 3)
        manifest["state"][name] = "done"
        folder.write_manifest(target, manifest)
