"""What a run will take and leave: its real stages are run on samples of the rows, and scaled."""

import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dq_multimodal.adapters.image_text import image_half
from dq_multimodal.config import CompressConfig, PlanConfig
from dq_multimodal.core.partition import SAMPLE_ROWS
from dq_multimodal.data.stream import Stream
from dq_multimodal.files import count, expand_home
from dq_multimodal.planning.cluster import Seen, foresee_cluster
from dq_multimodal.planning.trials import Trials
from dq_multimodal.report.summary import describe_strata
from dq_multimodal.run import Run, output_folder
from dq_multimodal.stages import subset
from dq_multimodal.stages.ordering import bins_kind
from dq_multimodal.stages.preparation import load_models, open_rows, prepare

if TYPE_CHECKING:
    from dq_multimodal.data.source import AnyDataset

OF_PLANS = {field.name for field in fields(PlanConfig)} - {f.name for f in fields(CompressConfig)}
"""Options of a plan that a run does not have."""


def make_plan(
    compress: Callable[..., Run],
    dataset: "AnyDataset",
    options: dict[str, Any],
) -> dict[str, Any]:
    """Make the answer of `pipeline.plan`, which describes it."""
    started = time.perf_counter()
    own = {name: options[name] for name in options.keys() & OF_PLANS}
    options = {name: value for name, value in options.items() if name not in own}
    opened = open_rows(dataset, options)  # as `compress` begins, but for the run folder
    asked = PlanConfig(**vars(opened[0]) | own)
    job = prepare(*opened)
    load_models(job)
    request, rows, n_rows, notes = job.request, job.source.dataset, len(job.strata), list[str]()
    if job.adapter is not None:
        job.adapter.lengths()  # reads all rows, as a run does in any case
        notes += job.adapter.notes
    notes += job.target.notes if job.target is not None else []
    if isinstance(rows, Stream):
        notes += ["the figures are of the first rows of the stream, read once"]
    is_parted = request.partition is not None and bins_kind(request.method) != "none"
    if is_parted and request.engine == "local":
        notes += ["the seconds do not count parting the rows by k-means"]
    seconds = {"start": time.perf_counter() - started}
    config = job.config.as_dict()
    trials = Trials(compress, job)
    n_kept = trials.count_kept()
    memory = trials.memory(n_kept)
    memory.check(request.memory_limit)
    seconds |= trials.seconds(n_kept)
    disk, passing, probe, found = trials.disk(n_kept), 0, None, config["embedding"]
    if request.needs_embeddings and request.ready_embeddings is None:
        tried = trials.by_model[-1]
        probe = {"rows": len(tried.rows), "seconds": tried.seconds["embeddings"]}
        probe |= {"rows_per_second": round(n_rows / seconds["embeddings"], 2)}
    if request.method == "adq" and job.adapter is not None:  # files that are gone afterwards
        is_read = request.ready_embeddings is None
        middle, again = 2 * job.adapter.middle_dimension, 1 if is_read else 2
        passing = again * trials.count_scored() * (4 * job.adapter.dimension + middle)
        passing += (middle + 8) * n_rows * is_read
    target = output_folder(request)
    place = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    tried = trials.by_model[-1] if request.drop_ratio else trials.plain[-1]
    data = tried.manifest["bytes"]["subset_data"] * n_kept / tried.n_kept
    sizes = {"subset_data": round(data), "subset_files": disk[subset.FOLDER]}
    return {
        "request": request.as_dict(),
        "output_dir": str(target),
        "rows": n_rows,
        "strata": len(job.labels),
        "strata_rows": describe_strata(np.bincount(job.strata).tolist(), job.labels),
        "kept": n_kept,
        "modality": (config["rows"] or {}).get("modality"),
        "embedding": found,
        "scoring": config.get("scoring"),
        "probe": probe,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 3),
        "memory": memory.as_dict(),
        "disk": disk | {"total": sum(disk.values())},
        "disk_at_most": sum(disk.values()) + passing,
        "disk_free": shutil.disk_usage(place).free,
        "bytes": {"source_data": subset.count_bytes(rows), **sizes},
        "notes": notes + trials.notes,
        "max_memory": request.memory_limit,
        "cluster": None if asked.engine == "local" else plan_cluster(trials, asked, n_kept),
    }


def plan_cluster(trials: Trials, asked: PlanConfig, n_kept: int) -> dict[str, Any]:
    """Say what the request will take on a cluster, with its rows."""
    job, tried, n_rows = trials.job, trials.plain[-1], trials.n_rows
    there = trials.of_rows(asked.rows or n_rows)
    times, given = there.n_rows / n_rows, asked.ready_embeddings
    n_kept = (
        round(n_kept * times) if asked.keep_rows is None else min(asked.keep_rows, there.n_rows)
    )
    seconds = there.seconds(n_kept) | {"order": there.order_seconds()}
    if "report" in seconds:
        shown = trials.of_rows(min(there.n_rows, SAMPLE_ROWS))
        seconds["report"] = shown.seconds(min(n_kept, shown.n_rows))["report"]
    if trials.by_model:  # of the processor: how busy this machine is does not matter there
        seconds["embeddings"] *= (trials.by_model if trials.is_embedded else trials.plain)[-1].share
    seconds |= {k: seconds[k] * tried.share for k in ("order", "subset", "report") if k in seconds}
    data_bytes = subset.measure_picks(trials.rows).sum()
    files = job.source.origin.get("files")
    is_half = given is not None and given.endswith(".npy") and is_float16(given)
    device, n_threads = "", 1
    if trials.by_model:
        import torch

        from dq_multimodal.models.locate import accelerator

        device, n_threads = accelerator(asked.device) or "", 1
        if device:
            device = f"one {torch.cuda.get_device_name(device)}" if "cuda" in device else device
        else:
            n_threads = torch.get_num_threads()
            device = f"cpu, {count(n_threads, 'thread')}"
    seen = Seen(
        n_rows=there.n_rows,
        n_kept=n_kept,
        sizes=there.sizes,
        width=getattr(job.config.embedding, "dimension", None) or 0,
        value_bytes=2 if is_half else 4,
        is_embedded=asked.needs_embeddings and given is None,
        file_bytes=times * (sum(file["bytes"] for file in files) if files else data_bytes),
        data_bytes=times * float(data_bytes),
        seconds=seconds,
        disk=there.disk(n_kept),
        bins=trials.bins,
        base_bytes=trials.base,
        batch_bytes=trials.pass_held,
        device=device,
        n_threads=n_threads,
        table=trials.rows.select(tried.rows).with_format("arrow")[:],
        is_image=image_half(job.adapter) is not None,
    )
    return foresee_cluster(asked, seen)


def is_float16(given: str) -> bool:
    """Say whether an array in a .npy file is of float16."""
    return np.load(expand_home(given), mmap_mode="r").dtype == np.float16
