"""How much memory a run needs, worked out before it starts; the limit that it may not pass."""

import json
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.text import BLOCK_ROWS as TEXT_ROWS
from dq_multimodal.byte_sizes import format_bytes
from dq_multimodal.config import CompressConfig, InputError
from dq_multimodal.core import count_working_bytes
from dq_multimodal.core.bins import count_threads
from dq_multimodal.core.coverage import MAX_ROWS as COVERAGE_ROWS
from dq_multimodal.core.coverage import TABLE_BYTES
from dq_multimodal.core.diversity import BLOCK_ROWS, OUT, count_sampled
from dq_multimodal.core.duplicates import MAX_ROWS as DUPLICATE_ROWS
from dq_multimodal.core.target import BLOCK_VALUES, COSINE_VALUES, LIST_VALUES
from dq_multimodal.data.columns import find_image_column
from dq_multimodal.data.pixels import count_pixels, read_bytes, undecoded
from dq_multimodal.data.row_sizes import BLOCK_BYTES as READ_BYTES
from dq_multimodal.data.stream import N_HELD, Stream
from dq_multimodal.models.locate import accelerator, find_gguf, find_model
from dq_multimodal.report.collect import MAX_POINTS
from dq_multimodal.report.compare import MAX_PAIRS
from dq_multimodal.report.duplicates import MAX_ROWS
from dq_multimodal.stages.ordering import count_subset
from dq_multimodal.stages.patch_records import BLOCK_ROWS as PATCH_ROWS
from dq_multimodal.stages.patch_records import LARGEST_PIXELS, STEP_PIXELS
from dq_multimodal.stages.subset import BLOCK_BYTES, measure_picks
from dq_multimodal.stages.targeting import MOST

if TYPE_CHECKING:
    from datasets import Dataset

MAPPED = (".arrow", ".npy", ".parquet")
"""Files whose pages the system takes back when it needs room."""
UNKNOWN_BASE = 1_200_000_000
"""Process with torch and its libraries, where the system does not say what it holds."""
KERNELS = 1.7
"""What a pass takes beside its tensors: buffers of the kernels and what the allocator keeps."""
ORDER_ROW = 160
"""Bytes a row of bins, ranks, gains, order, its sorts, and the table that is written."""
LENGTH_ROW = 48
"""Bytes a row of lengths, the batch plan and its key."""
LOOPS = 150_000_000
"""numba, and the loops that it compiles."""
PASS = 84_000_000
"""Of one thread: rows on their way to unit length, a tile of their products, buffers of BLAS."""
RECORDS = (16, 48)
"""Bytes of a row of coverage that came nearer to a pick: while rows are picked, and afterwards."""
REPORT_IMPORTS = {"sklearn.manifold": 100_000_000, "matplotlib.figure": 90_000_000}
MAP_PAIR = 40
"""Bytes a pair of points of the map: inner products and what is made of them, float64."""
WIDENED = 28
"""Bytes a number of the rows that the report compares: float64, two steps of it, and float32."""
PYTHON = 6
"""Rows as Python objects, to as many bytes of Arrow: some letters make a text of 4 bytes each."""
TOKENS = (100, 40)
"""Bytes a character of the longest text while it becomes tokens, and of all texts of its batch."""
TILE = 64_000_000
"""Inner products of one tile of pairs, in the report."""
PATCH_PIXEL = 70
"""Bytes a pixel of the images that the lossless coder works on together."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs.

    Attributes:
        base: What the process holds with its libraries and the model loaded.
        stages: What each stage takes beside it, at its highest.
        mapped: Pages of data files that are mapped. The system takes them back when it needs
            room, so they are no part of the need, but they show in the resident size.
    """

    base: int
    stages: dict[str, int]
    mapped: int

    @property
    def need(self) -> int:
        """What must be free for the run: the base and the greediest stage."""
        return self.base + max(self.stages.values(), default=0)

    @property
    def peak(self) -> int:
        """The greatest resident size to expect where memory is not short."""
        return self.need + self.mapped

    def as_dict(self) -> dict[str, Any]:
        """Give all terms and sums as plain numbers."""
        sums = {"need": self.need, "mapped": self.mapped, "peak": self.peak}
        return {"base": self.base, "stages": self.stages, **sums}


def check_memory(memory: Memory, limit: int | None) -> None:
    """Raise if a run needs more memory than it may take.

    Raises:
        InputError: Naming both figures, and the stage that needs most.
    """
    if limit is None or memory.need <= limit:
        return
    name = max(memory.stages, key=lambda stage: memory.stages[stage], default="")
    raise InputError(
        f"this run needs {format_bytes(memory.need)} of memory ({memory.need:,} bytes), more than "
        f"--max-memory {format_bytes(limit)} ({limit:,}): {format_bytes(memory.base)} for the "
        f"process and its model, {format_bytes(memory.need - memory.base)} for the stage {name}"
    )


def estimate_memory(
    dataset: "Dataset",
    strata: Int[ndarray, " n"],
    adapter: Adapter | None,
    request: CompressConfig,
    config: dict[str, Any],
    *,
    with_report: bool,
    n_targets: int = MOST,
) -> Memory:
    """Work out what a run needs, from its sizes and one row through the model.

    Of a language model that compares the rows with a target, the weights alone are counted.

    Args:
        dataset: The rows.
        strata: Stratum of every row.
        adapter: What reads and embeds them; its model is loaded if the run needs it.
        request: The settings.
        config: What config.yaml will hold.
        with_report: Whether the report is written.
        n_targets: Rows of the target, if there is one.
    """
    n_rows = len(dataset)
    n_kept = count_subset(strata, request)
    row_sizes = measure_picks(dataset)
    largest_first = np.sort(row_sizes)[::-1]
    block = max(BLOCK_BYTES, int(largest_first[0]))
    width = (config["embedding"] or {}).get("dimension", 0)
    has_model = adapter is not None and (request.method == "adq" or "model" in _embedding(config))
    stages: dict[str, int] = {"selection": ORDER_ROW * n_rows}
    stages["rows"] = PYTHON * min(max(READ_BYTES, int(largest_first[0])), int(row_sizes.sum()))
    mapped = int(row_sizes.sum())
    if config["bins"] in ("dq", "graphcut"):
        largest = np.sort(np.bincount(strata))[-(os.cpu_count() or 1) :]  # side by side
        stages["selection"] += count_working_bytes(largest.tolist(), width)
    if config["bins"] == "coverage":
        copied = 4 * n_rows * width * bool(request.noise_share)
        stages["selection"] += copied + coverage_bytes(np.bincount(strata).tolist(), width)
    if config["bins"] == "blocks":
        stages["selection"] += balance_bytes(np.bincount(strata).tolist(), width)
    if request.drop_duplicates is not None:
        numbers = min(n_rows, DUPLICATE_ROWS) * width
        stages["duplicates"] = ORDER_ROW * n_rows + 8 * numbers + PASS
    if request.target is not None:
        stages["target"] = ORDER_ROW * n_rows + target_bytes(n_rows, n_targets, width or 64)
        if request.target_model is not None:
            weights = weight_bytes(request.target_model)
            stages["target model"] = LENGTH_ROW * n_rows + weights
            stages["target"] += weights
    if request.needs_embeddings:
        mapped += 4 * n_rows * width
    if has_model and adapter is not None:
        stages["embeddings"] = LENGTH_ROW * n_rows + _pass_bytes(adapter, request.batch_size)
        if request.method == "adq":
            middle = adapter.middle_dimension
            mapped += 2 * n_rows * middle + 8 * n_rows
            sizes = bin_sizes(strata, request.n_bins)
            counts = [count_sampled(size, request.score_rows) for size in sizes]
            features = adapter.dimension + middle
            learning = sum(counts) * (features * 24 + OUT * 16)
            stages["scores"] = learning + 3 * BLOCK_ROWS * 8 * max(counts)
            stages["scores"] = max(stages["scores"], stages["embeddings"])
    stages["subset"] = 4 * min(block, int(largest_first[:n_kept].sum()))
    if request.drop_ratio:
        column = find_image_column(dataset, request.image_column)
        stages["patches"] = _patch_bytes(dataset, column, row_sizes)
    if with_report:
        kind = (config["rows"] or {}).get("modality", "none")
        stages["report"] = _report_bytes(n_rows, n_kept, width, MAX_POINTS[kind]) + stages["rows"]
    if isinstance(dataset, Stream):
        part = min(1.0, TEXT_ROWS / dataset.chunk_rows)
        held = int((N_HELD + PYTHON * part) * dataset.chunk_bytes)
        stages = {name: size + held for name, size in stages.items()}
    return Memory(resident_bytes(), stages, mapped)


def coverage_bytes(sizes: Sequence[int], width: int) -> int:
    """Give what coverage takes: tables, rows in float64, and the records of the nearest rows.

    Args:
        sizes: Rows of each stratum.
        width: Numbers of an embedding.
    """
    parts = [min(size, COVERAGE_ROWS) for size in sizes for _ in range(-(-size // COVERAGE_ROWS))]
    parts.sort(reverse=True)
    taken = [4 * k**2 + 8 * k * width + min(PASS, 40 * k * max(k, width)) for k in parts]
    most = TABLE_BYTES // count_threads(len(parts))
    n_alone = sum(4 * k**2 > most for k in parts)
    n_beside = count_threads(len(parts) - n_alone)
    at_once = max(taken[0], sum(taken[n_alone : n_alone + n_beside]))
    n_records = sum(round(k * (1 + np.log(max(k, 1)))) for k in parts)
    cut = 4 * max(sizes) * width * (max(sizes) > COVERAGE_ROWS)
    return _loops() + max(at_once + RECORDS[0] * n_records, RECORDS[1] * n_records, cut)


def balance_bytes(sizes: Sequence[int], width: int) -> int:
    """Give what the trees of `balance_rows` take: whole rows, and lines of the largest stratum."""
    numbers = sum(sizes) * width
    return _loops() + 4 * numbers + min(PASS, 40 * numbers) + 40 * max(sizes)


def target_bytes(n_rows: int, n_targets: int, width: int) -> int:
    """Give what the picks for a target take: lists of near rows, and a block of cosines.

    Args:
        n_rows: Rows of the source.
        n_targets: Rows of the target.
        width: Numbers of an embedding, or fewer.
    """
    lists = 4 * min(n_targets * n_rows, LIST_VALUES)
    at_once = min(n_targets, max(1, COSINE_VALUES // n_rows))
    tile = 16 * at_once * min(n_rows, max(1, BLOCK_VALUES // width))
    return _loops() + lists + 4 * at_once * n_rows + tile + 40 * n_rows + PASS


def _loops() -> int:
    return LOOPS * ("numba" not in sys.modules)


def weight_bytes(name: str) -> int:
    """Give the bytes of the weights of a language model as it is loaded.

    Args:
        name: As `LanguageModel` takes it. Of one on the Hub, what the Hub says of it counts.
    """
    size = 4 if accelerator() is None else 2
    found = find_gguf(name)
    if found:
        from gguf import GGUFReader

        tensors = GGUFReader(Path(*found)).tensors
        return size * sum(int(tensor.n_elements) for tensor in tensors)
    place, _ = find_model(name)
    if not Path(place).is_dir():
        from huggingface_hub import HfApi

        return size * int(getattr(HfApi().model_info(place).safetensors, "total", 0))
    n_numbers = 0
    for path in Path(place).glob("*.safetensors"):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        n_numbers += sum(prod(head[key]["shape"]) for key in head.keys() - {"__metadata__"})
    others = sum(path.stat().st_size for path in Path(place).glob("pytorch_model*.bin"))
    return size * n_numbers or others


def bin_sizes(strata: Int[ndarray, " n"], n_bins: int) -> list[int]:
    """Give the sizes of the bins, pooled over the strata by bin number."""
    counts = np.bincount(strata)
    sizes = [int((counts // n_bins + (b < counts % n_bins)).sum()) for b in range(n_bins)]
    return [size for size in sizes if size]


def report_sizes(n_rows: int, n_kept: int, width: int, points: int) -> tuple[int, int, int]:
    """Give the rows on the map, those asked for coverage and those searched for duplicates."""
    asked = max(256, int(MAX_PAIRS * min(1.0, 384 / width) // n_kept))
    searched = int(MAX_ROWS * min(1.0, (384 / width) ** 0.5))
    return min(n_rows, points), min(n_rows, asked), min(n_rows, searched)


def _report_bytes(n_rows: int, n_kept: int, width: int, points: int) -> int:
    """Give what the report takes: its libraries, and the greediest of its comparisons."""
    imports = sum(
        size
        for name, size in REPORT_IMPORTS.items()
        if name not in sys.modules and find_spec(name.split(".")[0])
    )
    if not width:
        return imports
    shown, asked, searched = report_sizes(n_rows, n_kept, width, points)
    queries = min(asked, max(2048, 2**25 // width))
    rows = max(queries, searched) * width * WIDENED
    return imports + max(MAP_PAIR * shown**2, rows + min(TILE, 4 * max(queries, searched) ** 2))


def _patch_bytes(dataset: "Dataset", column: str, sizes: Int[ndarray, " n"]) -> int:
    """Give what coding the patches takes, from the largest of the first and the largest files."""
    rows = {*range(min(PATCH_ROWS, len(sizes))), *np.argsort(-sizes)[:PATCH_ROWS].tolist()}
    files = undecoded(dataset.select(sorted(rows)), column)[column]
    largest = max((count_pixels(read_bytes(value)) for value in files), default=0)
    largest = min(largest, LARGEST_PIXELS)
    return PATCH_PIXEL * max(largest, min(STEP_PIXELS, PATCH_ROWS * largest))


def _embedding(config: dict[str, Any]) -> dict[str, Any]:
    return config["embedding"] or {}


def _pass_bytes(adapter: Adapter, batch_size: int) -> int:
    """Give the bytes of the longest rows: on their way through the model, and read ahead."""
    lengths = adapter.lengths()
    longest = np.argsort(-lengths, kind="stable")
    batch, _ = adapter.load(longest[:1])
    with measured_tensors() as meter:
        adapter.embed(batch)
    n_readers = max(1, min(8, (os.cpu_count() or 2) - 1))  # as embedding reads ahead
    ahead = lengths[longest[: (3 * n_readers + 1) * batch_size]].sum() / lengths[longest[0]]
    found = batch_size * int(KERNELS * meter.peak) + int(ahead * _held_bytes(batch))
    if isinstance(batch, list):  # texts are cut short only when they are tokens
        found += TOKENS[0] * int(lengths[longest[0]])
        found += TOKENS[1] * int(lengths[longest[:batch_size]].sum())
    return found


def _held_bytes(batch: Any) -> int:
    """Give the bytes of a batch of one row, as `Adapter.load` makes it."""
    if isinstance(batch, tuple | list):
        return sum(_held_bytes(part) for part in batch)
    return int(batch.nbytes) if isinstance(batch, ndarray) else sys.getsizeof(batch)


class _Meter:
    """Bytes of tensors in main memory, now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.known: set[int] = set()

    def note(self, tensor: Any) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "cpu" or key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def measured_tensors() -> Iterator[_Meter]:
    """Count the bytes of the tensors that are made within."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    meter = _Meter()

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(
            self, call: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = call(*args, **(kwargs or {}))
            for leaf in tree_leaves(made):
                if isinstance(leaf, Tensor):
                    meter.note(leaf)
            return made

    with Noting():
        yield meter


def resident_bytes() -> int:
    """Give what this process holds now, without the pages of mapped data files."""
    try:
        lines = Path("/proc/self/smaps").read_text(errors="replace").splitlines()
    except OSError:
        return UNKNOWN_BASE
    total, is_counted = 0, True
    for line in lines:
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            is_counted = not line.endswith(MAPPED)
        elif name == "Rss:" and is_counted:
            total += 1024 * int(rest.split()[0])
    return total
