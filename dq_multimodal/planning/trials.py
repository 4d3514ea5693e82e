"""Runs of a request on samples of its rows, and what they say of a run on all of them."""

import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.config import CompressConfig, InputError, format_bytes
from dq_multimodal.core.diversity import count_sampled
from dq_multimodal.core.target import LIST_VALUES
from dq_multimodal.data.columns import NO_LABEL
from dq_multimodal.data.pixels import UNDECODED
from dq_multimodal.data.stream import N_CHUNKS, Stream
from dq_multimodal.files import expand_home
from dq_multimodal.report import FILES as REPORT_FILES
from dq_multimodal.run import Run
from dq_multimodal.stages import embedding, subset
from dq_multimodal.stages.bin_costs import BinTimes, count_working, cut_strata, stretch, time_bins
from dq_multimodal.stages.ordering import bins_kind, count_left, count_subset
from dq_multimodal.stages.preparation import (
    MAX_NAMED,
    Job,
    leaves_out,
    note_left_out,
)
from dq_multimodal.stages.selection import BINS_FILE, SELECTION_FILE

if TYPE_CHECKING:
    from datasets import Dataset

FIRST_ROWS = 8
"""The first trial is of the longest rows: it loads what is loaded late, and shows their memory."""
MODEL_ROWS, PLAIN_ROWS = 4096, 16_384
"""Most rows of a trial with the models of the run, and without them."""
MODEL_SECONDS, PLAIN_SECONDS = 6.0, 16.0
"""So long, about, such trials are made, of the time of a processor."""
SHOWN_ROWS = 4000
"""The report shows no more rows; what it does with others is seen in two trials of more."""
SAMPLE_BYTES, FEWEST_BATCHES = 64_000_000, 32
"""A sample makes as many batches at least: sorted by length, rows of a batch are alike then too."""
COMPILE_SECONDS = 10.0
"""A first trial that used more compiled loops, which are kept for the runs that follow."""
ROW_BYTES = 160
"""Bytes of a row in the arrays and tables that a run holds: bins, ranks, gains, order, sorts."""
MAPPED = (".arrow", ".npy", ".parquet")
"""Files whose pages the system takes back when it needs room."""


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
        """What must be free for the run: the base and the stage that takes most."""
        return self.base + max(self.stages.values(), default=0)

    @property
    def peak(self) -> int:
        """The greatest resident size to expect where memory is not short."""
        return self.need + self.mapped

    def as_dict(self) -> dict[str, Any]:
        """Give all terms and sums as plain numbers."""
        return asdict(self) | {"need": self.need, "peak": self.peak}

    def check(self, limit: int | None) -> None:
        """Raise InputError if a run needs more memory than it may take."""
        if limit is None or self.need <= limit:
            return
        name = max(self.stages, key=lambda stage: self.stages[stage], default="")
        raise InputError(
            f"this run needs {format_bytes(self.need)} of memory ({self.need:,} bytes), more than "
            f"--max-memory {format_bytes(limit)} ({limit:,}): {format_bytes(self.base)} for the "
            f"process and its model, {format_bytes(self.need - self.base)} for the stage {name}"
        )


class Watch:
    """Notes what this process holds in memory, a hundred times a second, while it is open."""

    def __enter__(self) -> "Watch":
        self.seen = [(time.perf_counter(), resident())]
        self._is_over = Event()
        self._thread = Thread(target=self._go_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.seen.append((time.perf_counter(), resident()))

    def _go_on(self) -> None:
        while not self._is_over.wait(0.01):
            self.seen.append((time.perf_counter(), resident()))

    def peak(self, since: float = 0.0, until: float = np.inf) -> int:
        """Give the most that was held in a span of time."""
        times = [moment for moment, _ in self.seen]
        first = max(0, int(np.searchsorted(times, since, side="right")) - 1)
        last = max(first + 1, int(np.searchsorted(times, until, side="right")))
        return max(held for _, held in self.seen[first:last])


@dataclass(frozen=True)
class Trial:
    """What a run on some rows took and left.

    Attributes:
        rows: Their row numbers.
        used: Seconds in all, or those of the processors if fewer, however busy the machine is.
        share: Used over the seconds that it took.
        held: Bytes of each stage at its highest, beside what the process held before all trials.
        files: Bytes of each file or folder in the run folder.
        manifest: What manifest.json holds.
        vectors: The embeddings of the rows, if there are any.
    """

    rows: Int[ndarray, " k"]
    used: float
    share: float
    held: dict[str, int]
    files: dict[str, int]
    manifest: dict[str, Any]
    vectors: Float[ndarray, "k d"] | None

    @property
    def seconds(self) -> dict[str, float]:
        """Those of each stage."""
        return self.manifest["seconds"]

    @property
    def n_kept(self) -> int:
        """Rows of the subset."""
        return self.manifest["kept"]


DEFAULTS = {field.name: field.default for field in fields(CompressConfig)}
OF_MODELS = [
    name
    for name in DEFAULTS
    if name in ("drop_ratio", "min_psnr", "image_embedding")
    or name.startswith(("target", "patch", "attribution", "fill", "mae"))
]
"""Settings that a run without models leaves out."""
OF_ALL_ROWS = (
    *("split", "config_name", "revision", "field", "streaming", "image_folder"),
    *("keep_rows", "cap_by", "cap", "keep_every_class", "partition", "max_memory"),
    *("engine", "ray_address", "ray_storage"),
)
"""Settings that are for all rows, not for a sample of them."""


class Trials:
    """Runs of a request on samples of its rows, and what they say of a run on all of them.

    Attributes:
        by_model: Runs whose rows go through the models, the longest rows first, then ever more.
        plain: Runs with ready embeddings, or none, and without what needs a model.
        bins: The bins alone; None where none are made.
        sizes: Rows of each stratum.
        n_targets: Rows of the target that took part.
        base: Bytes that this process held with its model before them.
        pass_held: Bytes that a batch of the longest rows holds on its way through the encoder.
        notes: What a user has to be told of the figures.
    """

    def __init__(self, compress: Callable[..., Run], job: Job) -> None:
        self._compress, self.job, request = compress, job, job.request
        self.is_embedded = request.needs_embeddings and request.ready_embeddings is None
        self.n_rows, self.rows = len(job.strata), job.source.dataset
        self.sizes: ndarray = np.bincount(job.strata)
        self.by_model: list[Trial] = []
        self.bins: BinTimes | None = None
        self.notes: list[str] = []
        self.n_targets = self.pass_held = 0
        few = subset.measure_picks(self.rows, self._spread(min(self.n_rows, 64)))
        self._n_most = min(self.n_rows, max(FIRST_ROWS, SAMPLE_BYTES // int(few.mean() + 1)))
        place = tempfile.TemporaryDirectory(prefix="dq-plan-")
        with place as name, contextlib.redirect_stderr(io.StringIO()):
            self._place = Path(name)
            if self.is_embedded and job.adapter is not None:
                self.pass_held = self._hold_longest(job.adapter)
            self.base, self._rss = resident_unmapped(), resident()
            vectors, method = self._try_models(), request.method
            plain: dict[str, Any] = {name: DEFAULTS[name] for name in OF_MODELS}
            if vectors is not None and method in ("adq", "random", "ccs", "dual"):
                plain["method"] = "dq" if method == "adq" else "blocks"
            self.plain = self._grow(PLAIN_ROWS, PLAIN_SECONDS, plain, vectors, request.report)
            if vectors is not None and (bins_kind(method) != "none" or request.drop_duplicates):
                n_left = count_left(job.config)
                self.bins = time_bins(vectors, self.sizes, request, n_left)

    def _try_models(self) -> Float[ndarray, "k d"] | None:
        """Try what needs a model; give some embeddings, if there will be any."""
        request, target, options, vectors = self.job.request, self.job.target, {}, None
        if request.needs_embeddings and request.ready_embeddings is not None:
            vectors = read_some(request.ready_embeddings, self.rows, request.split)
        if target is not None:
            self.n_targets = min(len(target.source.dataset), 2 * FIRST_ROWS)
            place = str(self._place / "target.parquet")
            target.source.dataset.select(range(self.n_targets)).to_parquet(place)
            options = {"target": place, "target_split": "train", "target_config": None}
        elif not (self.is_embedded or request.method == "adq" or request.drop_ratio):
            return vectors
        self.by_model = self._grow(MODEL_ROWS, MODEL_SECONDS, options, vectors)
        return self.by_model[-1].vectors if self.is_embedded else vectors

    def _grow(self, most: int, seconds: float, *trial: Any) -> list[Trial]:
        """Try the longest rows, then ever more from all over the dataset, until the time is up."""
        found, left, most = [], seconds, min(most, self._n_most)
        size, before, took = 8 * FIRST_ROWS, 0, 0.0
        with contextlib.suppress(InputError):  # of so few images patches may gain nothing
            found.append(self._run(self._longest(), *trial))
            if sum(found[0].seconds.get(k, 0) for k in ("embeddings", "scores", "subset")) > left:
                size //= 4
        while True:
            found.append(self._run(self._spread(min(size, most)), *trial))
            last, took = took, found[-1].used
            left -= took
            slope = max((took - last) / (size - before), 1e-9)
            more = min(most, 8 * size, size + int((left - took) / slope))
            if size >= most or more < min(most, 1.5 * size):
                return found
            before, size = size, more

    def _run(
        self,
        rows: Int[ndarray, " k"],
        options: dict[str, Any],
        vectors: Float[ndarray, "m d"] | None,
        report: bool = False,
    ) -> Trial:
        """Compress some rows as the request says, with other options and embeddings if given."""
        from datasets import Dataset, DatasetInfo

        request, size, folder = self.job.request, len(rows), self._place / "run"
        given = vars(request) | {name: DEFAULTS[name] for name in OF_ALL_ROWS}
        del given["dataset"]
        given |= {
            "output_dir": folder,
            "report": report,
            "keep_ratio": max(request.keep_ratio, 1 / size),
            "keep_unreadable": True,
            "label_column": self.job.config.label_column or NO_LABEL,
            "n_bins": min(request.n_bins, size),
            "batch_size": max(1, min(request.batch_size, size // FEWEST_BATCHES)),
            **options,
        }
        if vectors is not None:
            given["ready_embeddings"] = str(self._place / "given.npy")
            np.save(given["ready_embeddings"], stretch(vectors, size))
        if request.dynamics is not None:
            given["dynamics"] = str(self._place / "dynamics.npy")
            np.save(given["dynamics"], np.load(expand_home(request.dynamics), "r")[:, rows])
        table = self.rows.select(rows).with_format("arrow")[:].combine_chunks()
        sample = Dataset(table, DatasetInfo(features=self.rows.features), fingerprint="sample")
        before, started, used = resident(), time.perf_counter(), time.process_time()
        try:
            with Watch() as watch:
                self._compress(sample, **given)
            until = time.perf_counter()
            took = until - started
            used = min(took, time.process_time() - used)
            manifest = json.loads((folder / "manifest.json").read_text())
            peaks, spent = {}, manifest["seconds"]
            for name in ("report", "subset", "selection", "embeddings"):
                since = (
                    until - spent.get(name, 0.0) - spent.get("scores", 0.0) * (name == "selection")
                )
                peaks[name], until = watch.peak(since, until), since
            models = watch.peak(until, until) - before  # this process holds them already
            return Trial(
                rows=rows,
                used=used,
                share=used / took,
                held={name: peaks[name] - models - self._rss for name in peaks if name in spent},
                files={
                    path.name: sum(
                        p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file()
                    )
                    for path in folder.iterdir()
                },
                manifest=manifest,
                vectors=np.load(folder / embedding.FILE) if self.is_embedded else None,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # for the next trial

    def _spread(self, size: int) -> Int[ndarray, " k"]:
        """Give rows from all over the dataset; of a stream, the first."""
        if isinstance(self.rows, Stream):
            return np.arange(size)
        return np.linspace(0, self.n_rows - 1, size).astype(int)

    def _longest(self) -> Int[ndarray, " k"]:
        if isinstance(self.rows, Stream):
            return self._spread(min(self.n_rows, FIRST_ROWS))
        adapter = self.job.adapter
        sizes = subset.measure_picks(self.rows) if adapter is None else adapter.lengths()
        return np.sort(np.argsort(-sizes, kind="stable")[:FIRST_ROWS])

    def _hold_longest(self, adapter: Adapter) -> int:
        """Give the bytes that a batch of the longest rows holds on its way through the encoder."""
        rows = self._longest()
        adapter.embed(adapter.load(rows[:1])[0])  # what is loaded late is no part of the batch
        before = resident()
        with Watch() as watch:
            adapter.embed(adapter.load(rows)[0])
        return (watch.peak() - before) * min(self.job.request.batch_size, self.n_rows) // len(rows)

    def count_kept(self) -> int:
        """Count the rows of the subset: of images, by how many of those tried can be decoded."""
        request, adapter = self.job.request, self.job.adapter
        tried = max(self.by_model + self.plain, key=lambda trial: len(trial.rows))
        n_kept, marks = count_subset(self.job.strata, request, self.job.marks), self.job.marks
        if adapter is None or not leaves_out(adapter, request):
            return n_kept
        problems = tried.manifest["problems"]
        lost = [tried.rows[problems[what]["rows"]] for what in UNDECODED if what in problems]
        unreadable = np.isin(np.arange(self.n_rows), np.concatenate([[], *lost]))
        n_tried, n_lost = len(tried.rows), int(unreadable.sum())
        lost = np.flatnonzero(unreadable).tolist()
        if lost:
            assert isinstance(adapter, ImageAdapter)
            self.notes += note_left_out(lost, adapter.file_names(lost[:MAX_NAMED]))
        if n_tried == self.n_rows:
            return count_subset(self.job.strata, request, replace(marks, unreadable=unreadable))
        self.notes.append(
            f"{n_tried:,} of the {self.n_rows:,} images were looked at, and {n_lost:,} of "
            "them cannot be decoded: the rows that will be kept are an estimate"
        )
        return max(1, round(n_kept * (1 - n_lost / n_tried)))

    def seconds(self, n_kept: int) -> dict[str, float]:
        """Give the seconds of each stage with all rows."""
        request, plain, models = self.job.request, self.plain, self.by_model
        runs = models if self.is_embedded else plain
        rows = [(len(run.rows), run.seconds["embeddings"]) for run in runs]
        found = {"embeddings": scale(rows, self.n_rows)}
        if request.method == "adq":
            times = self.count_scored() / max(1, models[-1].manifest["scores"]["rows"])
            found["scores"] = models[-1].seconds["scores"] * times
        if self.job.target is not None:
            n_targets = len(self.job.target.source.dataset)
            times = n_targets / self.n_targets
            if request.target_model is not None:  # all rows go through it
                times = (self.n_rows + n_targets) / (len(models[-1].rows) + self.n_targets)
            found["target"] = models[-1].seconds["selection"] * times
        found["selection"] = self.order_seconds() + time_loading(models or plain, "selection")
        if self.bins is not None:
            found["selection"] += self.bins.scale(cut_strata(self.sizes, request))
        runs = models if request.drop_ratio else plain
        kept = [(run.n_kept, run.seconds["subset"]) for run in runs]
        found["subset"] = scale(kept, n_kept)
        if "report" in plain[-1].seconds:
            rows = [(len(run.rows), run.seconds["report"]) for run in plain]
            (few, _), (many, _) = rows[-2:]
            most = self.n_rows if few >= SHOWN_ROWS else max(many, min(self.n_rows, SHOWN_ROWS))
            found["report"] = scale(rows, most, 0.0) + time_loading(plain, "report")
        return found

    def order_seconds(self) -> float:
        """Give the seconds of the selection with all rows, without the bins."""
        size, seconds = len(self.plain[-1].rows), self.plain[-1].seconds["selection"]
        if self.bins is not None:
            seconds = max(0.0, seconds - self.bins.scale(np.array([float(size)])))
        return seconds * self.n_rows / size

    def of_rows(self, n_rows: int) -> "Trials":
        """Give the same trials, for as many rows of the same kind."""
        found = copy(self)
        found.n_rows, found.sizes = n_rows, self.sizes * (n_rows / self.n_rows)
        return found

    def memory(self, n_kept: int) -> Memory:
        """Give what is held with all rows: what the trials held, and what grows with the rows."""
        request, adapter = self.job.request, self.job.adapter
        width = getattr(self.job.config.embedding, "dimension", None) or 0
        tried = self.plain[-1]
        names = {"subset": "patches"} if request.drop_ratio else {}
        if self.job.target is not None or request.method == "adq":
            names["selection"] = "scores" if self.job.target is None else "target"
        held = [item for run in self.plain for item in run.held.items()]
        held += [(names.get(k, k), size) for run in self.by_model for k, size in run.held.items()]
        stages = {name: max(0, *(size for k, size in held if k == name)) for name, _ in held}
        if self.bins is not None:
            sizes = [np.bincount(self.job.strata[rows]) for rows in (slice(None), tried.rows)]
            more, less = (count_working(request, counts, width) for counts in sizes)
            stages["selection"] += max(0, int(more - less))
        stages["embeddings"] = max(stages["embeddings"], self.pass_held)
        mapped = int(subset.measure_picks(self.rows).sum()) + 4 * self.n_rows * width
        if request.method == "adq" and adapter is not None:  # rows, views, and what is learned
            more = self.count_scored() - self.by_model[-1].manifest["scores"]["rows"]
            features = adapter.dimension + adapter.middle_dimension
            stages["scores"] = max(stages["scores"], self.pass_held) + 24 * features * max(0, more)
            mapped += (2 * adapter.middle_dimension + 8) * self.n_rows * self.is_embedded
        if self.job.target is not None:  # lists of near rows
            n_targets = len(self.job.target.source.dataset)
            stages["target"] += 4 * min(n_targets * self.n_rows, LIST_VALUES)
        tried_bytes = tried.manifest["bytes"]["subset_data"]
        kept_bytes = tried_bytes * n_kept // tried.n_kept
        stages["subset"] += 4 * max(0, min(subset.BLOCK_BYTES, kept_bytes) - tried_bytes)
        more = ROW_BYTES * (self.n_rows - len(tried.rows))
        if isinstance(self.rows, Stream):
            more += (N_CHUNKS + 1) * self.rows.passes.chunk_bytes
        return Memory(self.base, {name: size + more for name, size in stages.items()}, mapped)

    def count_scored(self) -> int:
        """Count the rows by which adq scores the bins, which are pooled over the strata."""
        sizes, n_bins = self.sizes, self.job.request.n_bins
        pooled = [int((sizes // n_bins + (k < sizes % n_bins)).sum()) for k in range(n_bins)]
        return sum(count_sampled(size, self.job.request.score_rows) for size in pooled)

    def disk(self, n_kept: int) -> dict[str, int]:
        """Give the bytes of the files that the run leaves."""
        tried, files = self.plain[-1], {**self.plain[-1].files}
        rows = [(len(run.rows), run.files[SELECTION_FILE]) for run in self.plain]
        runs = self.by_model if self.job.request.drop_ratio else self.plain
        kept = [(run.n_kept, run.files[subset.FOLDER]) for run in runs]
        found = {
            SELECTION_FILE: round(scale(rows, self.n_rows)),
            BINS_FILE: files[BINS_FILE],
            subset.FOLDER: round(scale(kept, n_kept)),
        }
        if embedding.FILE in files:
            numbers = (files[embedding.FILE] - 128) * self.n_rows // len(tried.rows)
            found = {embedding.FILE: 128 + numbers, **found}  # with the head of a .npy file
        if report := sum(files.pop(name, 0) for name in REPORT_FILES):
            shown = max(len(tried.rows), min(self.n_rows, SHOWN_ROWS))
            found["report"] = report * shown // len(tried.rows)
        return found | {"other": sum(files[name] for name in files.keys() - found.keys())}


def scale(trials: Sequence[tuple[int, float]], n_all: int, least: float = 1 / 3) -> float:
    """Give what grows with a count, of rows say, for all of them, from the two largest trials.

    The first trial is of the longest rows. At least so large a share (`least`) of the value grows
    with the count, whatever the trials show.
    """
    count, value = trials[-1]
    share = value / count
    if len(trials) > 2 and count > trials[-2][0]:
        slope = (value - trials[-2][1]) / (count - trials[-2][0])
        share = float(np.clip(slope, least * share, share))
    return value + share * (n_all - count)


def time_loading(runs: list[Trial], stage: str) -> float:
    """Give what the first trial took longer than the second: it loads what is loaded late."""
    if len(runs) < 2:
        return 0.0
    late = max(0.0, runs[0].seconds[stage] - runs[1].seconds[stage])
    return late * (runs[0].used < COMPILE_SECONDS)


def resident() -> int:
    """Give what this process holds now, in bytes."""
    return psutil.Process().memory_info().rss


def resident_unmapped() -> int:
    """Give what this process holds now without the pages of mapped data files, in bytes."""
    process = psutil.Process()
    places = process.memory_maps() if hasattr(process, "memory_maps") else []  # not on macOS
    return resident() - sum(place.rss for place in places if place.path.endswith(MAPPED))


def read_some(given: str, dataset: "Dataset", split: str) -> Float[ndarray, "k d"]:
    """Read some of the ready embeddings, from all over."""
    step, some, n_read = -(-len(dataset) // PLAIN_ROWS), [], 0
    for block in embedding.read_given(given, dataset, split):
        some.append(block[-n_read % step :: step].copy())
        n_read += len(block)
    return np.concatenate(some)
