"""What engine ray will take on a cluster: time, bytes and memory of each stage, without Ray.

Rates are measured in this process, and multiplied by the rows of the cluster.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from numpy import ndarray

from dq_multimodal.config import PlanConfig, format_bytes
from dq_multimodal.core.bins import count_threads
from dq_multimodal.core.order import place_in_all
from dq_multimodal.core.partition import (
    MAX_STEPS,
    ROWS_A_PART,
    SAMPLE_ROWS,
    Directions,
    Parts,
    average_parts,
    sample_numbers,
)
from dq_multimodal.data.shards import IMAGE_ROWS, MOST_SHARDS, SHARD_BYTES, SHARD_ROWS
from dq_multimodal.stages.bin_costs import BinTimes, count_working, cut_strata
from dq_multimodal.stages.on_shards import BIN, GROUP_ROWS, PLACE

ROW_BYTES = 160
"""Bytes of a row in the arrays and tables of a task."""
LARGEST_PART = 1.6
"""The largest part by k-means over the mean, see docs/scale.md."""
SAMPLE_BYTES = 28
"""What k-means holds for each number of its sample: it in float32, and three times in float64."""
HASHED_BYTES, HASHED_ROWS, JOINED_ROWS, BLOCK_PAIRS = 2**26, 2**22, 2**17, 2**23
ORDERED, LEAST_SECONDS = (8192, 9192), 0.3
"""What the trials are of: bytes, rows, rows times centres, rows of strata, and seconds at least."""


@dataclass(frozen=True)
class Seen:
    """What was measured here, scaled to the rows of the cluster where a figure is of all rows.

    Attributes:
        n_rows: Rows of the source.
        n_kept: Rows of the subset.
        sizes: Rows of each stratum.
        width: Numbers of an embedding; 0 where there are none.
        value_bytes: Of each of them.
        is_embedded: Whether a model makes them.
        file_bytes: Of the files of the source.
        data_bytes: Of its rows, read.
        seconds: Of each stage in one process of this machine, `order` without the bins; of the
            report, with SAMPLE_ROWS.
        disk: Bytes of what the run leaves.
        bins: The bins alone; None where none are made.
        base_bytes: What a process holds with its libraries and model.
        batch_bytes: What a batch of the longest rows holds on its way through the model.
        device: Where the models ran.
        n_threads: Cores that they took; 1 where that was a GPU.
        table: Some rows of the source.
        is_image: Whether the rows hold images.
    """

    n_rows: int
    n_kept: int
    sizes: Float[ndarray, " s"]
    width: int
    value_bytes: int
    is_embedded: bool
    file_bytes: float
    data_bytes: float
    seconds: dict[str, float]
    disk: dict[str, int]
    bins: BinTimes | None
    base_bytes: int
    batch_bytes: int
    device: str
    n_threads: int
    table: pa.Table
    is_image: bool


@dataclass(frozen=True)
class StageCost:
    """What a stage takes on the cluster.

    Attributes:
        name: Its name.
        unit: What works on it: core, GPU, or driver.
        n_units: How many of them side by side.
        work_seconds: Of all of them together.
        longest_seconds: Of its largest task.
        read_bytes: Read from the storage, in all.
        written_bytes: Written to it.
        task_bytes: What a task holds beside its process, the largest one.
    """

    name: str
    unit: str
    n_units: int
    work_seconds: float
    longest_seconds: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    task_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """From its beginning to its end."""
        return max(self.work_seconds / self.n_units, self.longest_seconds)

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, bytes as whole numbers."""
        found = {"seconds": self.seconds, **asdict(self)}
        for name, value in found.items():
            if isinstance(value, float):
                found[name] = round(value) if name.endswith("bytes") else round(value, 3)
        return found


def foresee_cluster(asked: PlanConfig, seen: Seen) -> dict[str, Any]:
    """Give what every stage will take, as plain values.

    Returns:
        The cluster, its rows, shards and strata, `stages` (see `StageCost`), `total_seconds`,
        `node_hours`, `dollars` (None without a price), `memory` in bytes, and `notes`.
    """
    n_rows, n_here = seen.n_rows, count_threads(2**31)
    a_node = asked.cores_per_node or n_here
    n_cores, n_gpus = asked.nodes * a_node, asked.nodes * asked.gpus_per_node
    by_rows = -(-n_rows // (IMAGE_ROWS if seen.is_image else SHARD_ROWS))
    n_shards = min(n_rows, MOST_SHARDS, max(by_rows, int(seen.data_bytes // SHARD_BYTES)))
    is_binned, is_parted = seen.bins is not None, asked.partition is not None
    parts = cut_strata(seen.sizes, asked) if is_binned else seen.sizes
    is_parted = is_parted and is_binned and len(parts) > 1
    largest = float(parts.max()) * (LARGEST_PART if is_parted else 1)
    sample = min(n_rows, max(SAMPLE_ROWS, ROWS_A_PART * len(parts))) if is_parted else 0
    shard_bytes, shard_rows = seen.data_bytes / n_shards, n_rows / n_shards
    record = 8 + seen.width * seen.value_bytes
    beside = max(1, int(GROUP_ROWS // parts.mean()))  # small strata share a task
    n_groups, group_rows = -(-len(parts) // beside), max(largest, beside * float(parts.mean()))
    of_shards, of_groups = ("core", min(n_cores, n_shards)), ("core", min(n_cores, n_groups))
    model, times = (("GPU", n_gpus), 1) if n_gpus else (("core", n_cores), seen.n_threads)

    found: list[StageCost] = []

    def add(
        name: str,
        units: tuple[str, int],
        work: float,
        read: float = 0,
        written: float = 0,
        task: float = 0,
        longest: float = 0,
    ) -> None:
        found.append(StageCost(name, *units, work, longest, read, written, task))

    hashing = _time(lambda: hashlib.sha256(bytes(HASHED_BYTES)).digest()) / HASHED_BYTES
    reading, moving = _time_reading(seen.table) * seen.data_bytes, _time_sorting(record) * n_rows
    source, records = seen.file_bytes, record * n_rows
    add("rows", ("core", n_cores), hashing * source, source, task=HASHED_BYTES)
    held = seen.batch_bytes + shard_bytes + 2 * record * shard_rows
    work = reading + seen.seconds["embeddings"] * (times if seen.is_embedded else 1)
    units = (model[0], min(model[1], n_shards)) if seen.is_embedded else of_shards
    add("embeddings", units, work, source, records, held)
    of_row = 0.0
    if is_parted:
        of_row, of_step, of_centre = _time_parts(seen.width, len(parts))
        work = sample * (len(parts) * of_centre + MAX_STEPS * of_step * n_here / a_node)
        work += n_rows * _time(lambda: sample_numbers(HASHED_ROWS, 1)) / HASHED_ROWS
        held = SAMPLE_BYTES * sample * seen.width
        add("centres", ("driver", 1), work, 4 * sample * seen.width, task=held)
    held = 2 * record * shard_rows + 8 * len(parts) * seen.width * is_parted
    written = records + 4 * seen.width * n_rows * (asked.ray_storage is None)  # embeddings.npy
    add("parts", of_shards, n_rows * of_row + moving, records, written, held)
    if seen.bins is not None:
        lone, group = np.array([largest]), np.full(beside, parts.mean())
        work, *longest = (
            seen.bins.n_strata * seen.bins.share * seen.bins.scale(x) for x in (parts, lone, group)
        )
        held = 4 * record * group_rows + count_working(asked, lone, seen.width)
        add("bins", of_groups, work, records, BIN.itemsize * n_rows, held, max(longest))
    if "scores" in seen.seconds:
        work = times * seen.seconds["scores"]
        add("scores", (model[0], 1), work, source, task=seen.batch_bytes)
    n_sizes = len(parts) if is_parted else len(np.unique(parts))
    work, held = seen.seconds["order"] + _time_order() * n_rows * n_sizes, ROW_BYTES * group_rows
    through = (BIN.itemsize * n_rows, PLACE.itemsize * n_rows)
    add("order", of_groups, work, *through, held, work * group_rows / n_rows)
    left = seen.disk["subset"] + seen.disk["selection.parquet"]
    held = 2 * shard_bytes + ROW_BYTES * shard_rows
    add("subset", of_shards, reading + seen.seconds["subset"], source + sum(through), left, held)
    held = ROW_BYTES * shard_rows
    add("joining", ("driver", 1), _time_joining() * n_rows, left, left, held)
    if "report" in seen.seconds:
        held = min(n_rows, SAMPLE_ROWS) * (4 * seen.width + seen.data_bytes / n_rows)
        add("report", ("driver", 1), seen.seconds["report"], held, seen.disk["report"], held)

    total = sum(stage.seconds for stage in found)
    hours, counts = asked.nodes * total / 3600, 8 * n_shards * len(parts)
    task = max(stage.task_bytes for stage in found if stage.unit != "driver")
    driver = max(counts, *(stage.task_bytes for stage in found if stage.unit == "driver"))
    memory = {
        "process": seen.base_bytes,
        "task": task,
        "node": a_node * (seen.base_bytes + task),
        "driver": seen.base_bytes + driver,
        "sample": 8 * sample * seen.width,
        "counts": counts,
    }
    return {
        "nodes": asked.nodes,
        "gpus_per_node": asked.gpus_per_node,
        "cores_per_node": a_node,
        "rows": n_rows,
        "kept": seen.n_kept,
        "shards": n_shards,
        "strata": len(parts),
        "groups": n_groups,
        "rows_of_largest": round(largest),
        "stages": [stage.as_dict() for stage in found],
        "total_seconds": round(total, 1),
        "node_hours": round(hours, 2),
        "dollars": None if asked.node_price is None else round(hours * asked.node_price, 2),
        "memory": {name: round(size) for name, size in memory.items()},
        "notes": _tell(asked, seen, found, largest, n_shards * n_groups),
    }


def _tell(
    asked: PlanConfig, seen: Seen, stages: list[StageCost], largest: float, n_slices: int
) -> list[str]:
    """Say what was measured and what is only multiplied."""
    moved = sum(stage.read_bytes + stage.written_bytes for stage in stages) / asked.nodes
    notes = [
        f"measured on this machine, with {len(seen.table):,} rows at most: seconds and bytes a row "
        f"of reading, writing, the order{' and the bins' * (seen.bins is not None)}",
        "extrapolated: all are multiplied by the rows and divided by the cores; waiting for "
        f"storage and network is not counted: each node moves {format_bytes(round(moved))}, and "
        f"all of them read {3 * n_slices:,} slices of files for the bins and the selection",
    ]
    if seen.is_embedded or any(stage.name == "scores" for stage in stages):
        notes.append(f"the model was measured on {seen.device}")
        if asked.gpus_per_node and "cpu" in seen.device:
            notes[-1] += ", and a GPU is taken to be as fast as that: it will be faster"
        elif not asked.gpus_per_node and "cpu" not in seen.device:
            notes[-1] += ", and a core is taken to be as fast as that: it will be slower"
    if seen.bins is not None:
        notes.append(
            f"the bins of a part of {largest:,.0f} rows, the largest, are extrapolated from "
            f"{seen.bins.seconds[-1][0]:,} rows by their power {seen.bins.growth:.2f}"
        )
    return notes


def _time(work: Callable[[], object]) -> float:
    """Give the seconds of some work, done again until it can be told, however busy the machine."""
    started, used, times = time.perf_counter(), time.process_time(), 0
    while (seconds := time.perf_counter() - started) < LEAST_SECONDS or not times:
        work()
        times += 1
    return min(seconds, time.process_time() - used) / times


def _time_reading(table: pa.Table) -> float:
    """Time the reading of rows from parquet; give seconds for each byte of data."""
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    file = pa.BufferReader(out.getvalue())
    return _time(lambda: pq.read_table(file, use_threads=False)) / max(1, table.nbytes)


def _time_sorting(record: int) -> float:
    """Time the sort of a block of records by part; give seconds a row."""
    block, codes = np.zeros((2**16, record), dtype=np.uint8), np.arange(2**16) % 97
    return _time(lambda: block[np.argsort(codes, kind="stable")].tobytes()) / len(block)


def _time_order() -> float:
    """Time the places of rows in the order; give seconds for each row and size of a stratum."""
    sizes = np.arange(*ORDERED)
    place_in_all(sizes, 0)  # compiles
    return _time(lambda: place_in_all(sizes, 0)) / (len(sizes) * int(sizes[0]))


def _time_joining() -> float:
    """Time a piece of selection.parquet that is read and written; give seconds a row."""
    rng, names = np.random.default_rng(0), ("row", "bin", "rank", "gain", "order")
    table = pa.table({name: rng.integers(2**20, size=JOINED_ROWS) for name in names})

    def write(made: pa.Table) -> pa.Buffer:
        out = pa.BufferOutputStream()
        pq.write_table(made, out, compression="zstd")
        return out.getvalue()

    file = write(table)
    return _time(lambda: write(pq.read_table(pa.BufferReader(file)))) / JOINED_ROWS


def _time_parts(width: int, n_parts: int) -> tuple[float, float, float]:
    """Time k-means, with so many centres of so many numbers.

    Returns:
        Seconds a row: of the nearest centre on one core; of a step of Lloyd's algorithm and of a
        new centre of k-means++, both on all cores.
    """
    from threadpoolctl import threadpool_limits

    rng, n_tried = np.random.default_rng(0), min(n_parts, SAMPLE_ROWS)
    sample = Directions()(rng.normal(size=(SAMPLE_ROWS, width)))[0]
    centres, block = sample[:n_tried], sample[: max(BLOCK_PAIRS // n_tried, 1)]
    codes, parts = np.arange(len(block)) % n_tried, Parts(centres, Directions())
    with threadpool_limits(1):
        nearest = _time(lambda: parts.assign(block)) / len(block)
    with np.errstate(invalid="ignore"):  # parts without a row
        both = _time(lambda: (parts.assign(block), average_parts(block, codes, n_tried)))
    step = both / len(block)
    centre = _time(lambda: sample @ sample[0]) / len(sample)
    return nearest * n_parts / n_tried, step * n_parts / n_tried, centre
