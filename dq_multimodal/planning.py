"""plan(): what a run will take and leave, said before anything runs."""

import io
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.choice import choose_adapter, label_column_of
from dq_multimodal.adapters.image import CHECKED_ROWS, ImageAdapter
from dq_multimodal.byte_sizes import parse_bytes
from dq_multimodal.config import CompressConfig
from dq_multimodal.core.diversity import count_sampled
from dq_multimodal.data.pixels import UNDECODED
from dq_multimodal.data.source import Source
from dq_multimodal.files import expand_home
from dq_multimodal.manifest import Target as TargetFacts
from dq_multimodal.manifest import make
from dq_multimodal.memory import bin_sizes, check_memory, estimate_memory
from dq_multimodal.preparation import (
    leaves_out,
    make_config,
    note_left_out,
    note_model,
    open_source,
    read_request,
    settle_method,
    survey,
)
from dq_multimodal.probes import (
    PICK_ROWS,
    VIEW_SECONDS,
    probe_encoder,
    probe_subset,
    probe_tables,
    spread,
    time_balance,
    time_coverage,
    time_duplicates,
    time_picks,
    time_scores,
    time_surprisal,
)
from dq_multimodal.report.summary import describe_strata
from dq_multimodal.report_probes import probe_report
from dq_multimodal.run import default_folder
from dq_multimodal.stages import embedding, subset
from dq_multimodal.stages.marks import Marks, make_marks
from dq_multimodal.stages.ordering import count_left, count_subset
from dq_multimodal.stages.targeting import Target, describe_target, load_target

if TYPE_CHECKING:
    from datasets import Dataset

    from dq_multimodal.stages.patching import PatchDropper

SMALL_FILES_BYTES = 16_000
"""config.yaml, manifest.json and README.md."""
CHECK_SECONDS = 5.0
"""So long images are looked at to see whether they can be decoded."""


@dataclass
class Asked:
    """A request with its rows and model at hand."""

    request: CompressConfig
    source: Source
    adapter: Adapter | None
    dropper: "PatchDropper | None"
    strata: Int[ndarray, " n"]
    labels: list[str]
    config: dict[str, Any]
    target: Target | None

    @property
    def has_model(self) -> bool:
        """Whether the encoder runs."""
        found = self.config["embedding"] or {}
        return self.adapter is not None and ("model" in found or self.request.method == "adq")


def plan(
    dataset: "str | Dataset",
    *,
    output_dir: str | Path | None = None,
    report: bool = True,
    max_memory: int | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Say what `compress` with the same arguments will take: seconds, memory, disk, rows, bytes.

    Rows are read, the model is loaded, and every stage is tried on a small part of its work, half
    a minute in all on a dataset of some size. No run folder is made or changed. The seconds are
    those of this machine as busy as it is now, and of a run from its beginning.

    Args:
        dataset: As `compress` takes it, like all that follows.
        output_dir: The run folder that is meant; only the free space beside it is looked at.
        report: Whether the report is written.
        max_memory: Refuse a run that needs more memory.
        **options: The fields of `CompressConfig`.

    Returns:
        The figures, as plain values that JSON can hold; sizes in bytes, times in seconds.

    Raises:
        InputError: For what `compress` would refuse at its beginning.
    """
    started = time.perf_counter()
    limit = None if max_memory is None else parse_bytes(max_memory)
    asked = prepare(dataset, options)
    start_seconds = time.perf_counter() - started
    request, rows, strata = asked.request, asked.source.dataset, asked.strata
    n_targets = len(asked.target.source.dataset) if asked.target is not None else 0
    memory = estimate_memory(
        *(rows, strata, asked.adapter, request, asked.config),
        with_report=report,
        n_targets=n_targets,
    )
    check_memory(memory, limit)
    seconds = {"start": start_seconds, "embeddings": 0.0}
    vectors, probe = _embed_some(asked, seconds)
    n_rows, n_kept = len(rows), _count_kept(asked, seconds)
    if request.method == "adq" and asked.adapter is not None:
        seconds["scores"] = _score_seconds(asked, seconds["embeddings"])
    seconds["selection"], tables = probe_tables(strata, request, asked.labels)
    n_left = count_left(asked.config)
    if vectors is not None:
        seconds["selection"] += _pick_seconds(asked, vectors, n_left)
    seconds["subset"], sizes = probe_subset(rows, strata, n_kept, request.seed, asked.dropper)
    disk = _array_bytes(asked, n_rows) | tables | {"subset": sizes["subset_files"]}
    if report:
        seconds["report"], disk["report"] = probe_report(
            rows, vectors, request, asked.config["rows"], n_kept, n_left
        )
    disk["other"] = SMALL_FILES_BYTES
    passing = sum(disk.pop(file, 0) for file in (embedding.MIDDLE, embedding.TEXTURE, "scores"))
    target = expand_home(output_dir) if output_dir is not None else default_folder(request)
    found = asked.config["embedding"] or {}
    return {
        "request": request.as_dict(),
        "output_dir": str(target),
        "rows": n_rows,
        "strata": len(asked.labels),
        "strata_rows": describe_strata(np.bincount(strata).tolist(), asked.labels),
        "kept": n_kept,
        "modality": (asked.config["rows"] or {}).get("modality"),
        "embedding": found or None,
        "scoring": asked.config.get("scoring"),
        "probe": probe,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 3),
        "memory": memory.as_dict(),
        "disk": disk | {"total": sum(disk.values())},
        "disk_at_most": sum(disk.values()) + passing,
        "disk_free": shutil.disk_usage(_nearest(target)).free,
        "bytes": {"source_data": subset.count_bytes(rows), **sizes},
        "notes": _note(asked),
        "max_memory": limit,
    }


def prepare(dataset: "str | Dataset", options: dict[str, Any]) -> Asked:
    """Do what `compress` does before its first stage, but for the run folder."""
    request, source = read_request(dataset, options)
    source = source or open_source(request)
    rows = source.dataset
    subset.check_columns(rows)
    request, _ = settle_method(request, rows)
    adapter = choose_adapter(rows, request)
    target = load_target(request, adapter) if request.target is not None else None
    label_column = label_column_of(adapter, request)
    strata, labels, _ = survey(source, adapter, request, label_column)
    request = request.of_rows(len(strata))
    count_subset(strata, request, make_marks(rows, request, len(strata)))
    config = make_config(request, source, adapter, label_column)
    if target is not None:
        config.target = make(TargetFacts, describe_target(target, request))
    note_model(config, adapter, request, rows.column_names)
    asked = Asked(request, source, adapter, None, strata, labels, config.as_dict(), target)
    if adapter is not None:
        adapter.lengths()  # reads all rows, as a run does in any case
    if request.drop_ratio:
        from dq_multimodal.stages.patching import make_dropper

        asked.dropper = make_dropper(rows, request, adapter)
    return asked


def _note(asked: Asked) -> list[str]:
    """Give what a user has to be told, and what the seconds leave out."""
    notes = list(asked.adapter.notes) if asked.adapter is not None else []
    if asked.target is None:
        return notes
    what = "embedding the target rows and picking for them"
    if asked.request.target_model is not None:
        what = "reading all rows with the language model of the target"
    return [*notes, *asked.target.notes, f"the seconds do not count {what}"]


def _count_kept(asked: Asked, seconds: dict[str, float]) -> int:
    """Count the rows of the subset: of images, by how many of those looked at can be decoded."""
    request, adapter, n_rows = asked.request, asked.adapter, len(asked.strata)
    if not isinstance(adapter, ImageAdapter) or not leaves_out(adapter, request):
        return count_subset(asked.strata, request)
    parts = np.split(np.arange(n_rows), range(CHECKED_ROWS, n_rows, CHECKED_ROWS))
    places = range(len(parts)) if adapter.chunk_rows else spread(len(parts))  # a stream goes ahead
    started = time.perf_counter()
    n_checked = adapter.check_images((parts[place] for place in places), CHECK_SECONDS)
    took = time.perf_counter() - started
    if request.embeddings is not None or not request.needs_embeddings:
        seconds["embeddings"] += took * n_rows / n_checked
    unreadable = np.zeros(n_rows, dtype=bool)
    lost = sorted(row for what in UNDECODED for row in adapter.problems.get(what, []))
    unreadable[lost] = True
    adapter.notes += note_left_out(adapter, lost)
    if n_checked == n_rows:
        return count_subset(asked.strata, request, Marks(unreadable=unreadable))
    adapter.notes.append(
        f"{n_checked:,} of the {n_rows:,} images were looked at, and {len(lost):,} of them cannot "
        "be decoded: the rows that will be kept are an estimate"
    )
    return max(1, round(count_subset(asked.strata, request) * (1 - len(lost) / n_checked)))


def _embed_some(
    asked: Asked, seconds: dict[str, float]
) -> tuple[Float[ndarray, "k d"] | None, dict[str, Any] | None]:
    """Probe the embedding stage; give some embeddings, and what was tried."""
    request, rows = asked.request, asked.source.dataset
    if not request.needs_embeddings:
        return None, None
    if request.embeddings is not None:
        started = time.perf_counter()
        some, n_read = [], 0
        for block in embedding.read_given(request.embeddings, rows, request.split):
            step = -(-len(rows) // (4 * PICK_ROWS))
            some.append(block[-n_read % step :: step].copy())
            n_read += len(block)
        seconds["embeddings"] = time.perf_counter() - started  # and writing, which is as quick
        return np.concatenate(some), None
    assert asked.adapter is not None
    found = probe_encoder(asked.adapter, np.arange(len(rows)), request.batch_size)
    seconds["embeddings"] = found.seconds
    tried = {"rows": found.probed_rows, "seconds": round(found.probed_seconds, 3)}
    return found.vectors, tried | {"rows_per_second": round(len(rows) / found.seconds, 2)}


def _pick_seconds(asked: Asked, vectors: Float[ndarray, "k d"], n_left: int) -> float:
    """Give the seconds of the bins that the method needs, and of finding near-duplicates."""
    request, strata, kind = asked.request, asked.strata, asked.config["bins"]
    seconds = 0.0
    if kind == "coverage":
        seconds = time_coverage(vectors, strata)
    elif kind == "blocks":
        seconds = time_balance(vectors, strata)
    elif kind != "none":
        n_bins = 1 if kind == "graphcut" else request.n_bins
        seconds = time_picks(vectors, strata, n_bins, request.similarity, n_left)
    if request.drop_duplicates is not None:
        seconds += time_duplicates(vectors, len(strata), request.drop_duplicates)
    return seconds


def _score_seconds(asked: Asked, embed_seconds: float) -> float:
    """Give the seconds of the scores: rows embedded again, discriminator, diversity."""
    request, adapter = asked.request, asked.adapter
    assert adapter is not None
    counts = [count_sampled(s, request.score_rows) for s in bin_sizes(asked.strata, request.n_bins)]
    readable = np.flatnonzero(adapter.lengths())
    places = np.linspace(0, len(readable) - 1, min(sum(counts), len(readable))).astype(int)
    sample = readable[places]
    size, budget = request.batch_size, VIEW_SECONDS
    total = probe_encoder(adapter, sample, size, view=request.seed, budget=budget).seconds
    if request.embeddings is not None:
        total += probe_encoder(adapter, sample, size, budget=budget).seconds
    model = asked.config.get("scoring") or asked.config["embedding"]
    n_features = adapter.dimension + adapter.middle_dimension - (model.get("factors") or [0])[0]
    if request.measure_of(adapter.describe()["modality"]) == "surprisal":
        total += time_surprisal(adapter, len(asked.strata))
    return total + time_scores(counts, n_features)


def _array_bytes(asked: Asked, n_rows: int) -> dict[str, int]:
    """Give the bytes of the .npy files, those included that are gone when a run is finished."""
    request, adapter = asked.request, asked.adapter
    if not request.needs_embeddings:
        return {}
    width = asked.config["embedding"]["dimension"]
    found = {embedding.FILE: npy_bytes((n_rows, width), np.float32)}
    if request.method == "adq" and adapter is not None:
        counts = [
            count_sampled(s, request.score_rows) for s in bin_sizes(asked.strata, request.n_bins)
        ]
        middle = adapter.middle_dimension
        again = 1 if request.embeddings is None else 2
        found["scores"] = again * sum(counts) * (4 * adapter.dimension + 2 * middle)
        if request.embeddings is None:
            found[embedding.MIDDLE] = npy_bytes((n_rows, middle), np.float16)
            found[embedding.TEXTURE] = npy_bytes((n_rows, 2), np.float32)
    return found


def npy_bytes(shape: tuple[int, ...], kind: Any) -> int:
    """Give the size of a .npy file, its header included."""
    head = io.BytesIO()
    dtype = np.dtype(kind)
    document = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, document)
    return head.tell() + int(np.prod(shape)) * dtype.itemsize


def _nearest(folder: Path) -> Path:
    """Give the folder itself, or the nearest above it that there is."""
    folder = folder.absolute()
    return next(place for place in [folder, *folder.parents] if place.exists())
