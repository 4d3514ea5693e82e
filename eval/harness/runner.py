"""Train the cells of a suite: several at a time, within a budget, each one line of the results.

Every worker is a process of its own that trains one cell after the other. The parent hands cells
out in the order of the suite, writes the lines and keeps the time.
"""

import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from measure import versions
from tqdm import tqdm

from dq_multimodal.config import InputError
from harness.bundle import Bundle
from harness.results import appending, digest, key_of, read_lines
from harness.suite import Cell, Job, Suite, read_suite, trainer_of

PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy")
CUDA_JOBS = 4
SPARE_SHARE = 0.1
"""What of a device's memory stays free beside what the cells are known to take."""
SURE_SECONDS, SURE_SHARE = 30.0, 0.1
"""After so long, or so much of its work, the speed of a cell says when it would end; where little
time was left, after a quarter of that."""
LATE = 1.2
"""A cell is given up where it would need so many times what is left."""
CLOSE_SECONDS = 3.0
"""Cells are to end so long before the budget does; workers that have not by its end are killed."""
STOP_SECONDS = 1.0
"""So long a worker may take to end when it is told to."""
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""What the errors of CUDA, cuBLAS and cuDNN say where the memory of a device does not do."""
ALIKE = ("task", "protocol", "net")
"""What cells have in common whose seconds and memory are much the same."""


class OverBudget(Exception):
    """A cell would not end within the budget."""


@dataclass
class Plan:
    """What the workers of one run share; cells are to end by `deadline`, of `time.time()`."""

    suite: Suite
    bundle: Path
    device: str
    threads: int
    deadline: float


class Choices:
    """The kept rows of every cell, as `prepare` wrote them."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.lines = bundle, dict[tuple[Any, ...], dict[str, Any]]()
        for task in bundle.about["tasks"]:
            for line in bundle.table(f"{task}/selections").to_pylist():
                self.lines[task, line["selection"], line["keep"], line["draw"]] = line

    def of(self, cell: Cell) -> dict[str, Any]:
        """Give what was chosen for a cell.

        Raises:
            InputError: If the bundle was prepared from another state of the suite.
        """
        try:
            return self.lines[cell.task, cell.selection, str(cell.keep), cell.draw]
        except KeyError:
            raise InputError(
                f"the bundle has no rows of {cell.selection}, {cell.keep}, draw {cell.draw} of "
                f"{cell.task}: prepare it anew"
            ) from None

    def digest_of(self, cell: Cell, trainer: str) -> str:
        """Give the digest of the data, and of a text cell the model, that a cell depends on.

        Raises:
            InputError: If the bundle has none.
        """
        name = f"text/{cell.net}" if trainer == "text" else trainer
        try:
            return self.bundle.about["tasks"][cell.task]["digests"][name]
        except (KeyError, TypeError):
            place = self.bundle.folder_path
            raise InputError(f"{place} is of another version: prepare it anew") from None


def describe(cell: Cell, suite: Suite, choices: Choices) -> dict[str, Any]:
    """Give all that is known of a cell before it is trained; its digest tells it apart."""
    chosen = choices.of(cell)
    settings, options = suite.settings[cell.protocol], json.loads(chosen["options"])
    data = choices.digest_of(cell, settings["trainer"])
    rows, condensed = np.asarray(chosen["rows"], dtype=np.int64), chosen.get("condensed")
    return {
        "suite": suite.name,
        "task": cell.task,
        "selection": cell.selection,
        "options": options,
        "use_weights": chosen.get("use_weights") or "none",
        "labels": "soft" if chosen.get("is_soft") else "hard",
        "condensed": json.loads(condensed) if condensed else None,
        "keep": cell.keep,
        "keep_ratio": chosen["keep_ratio"],
        "rows": len(rows),
        "bytes": chosen["bytes"],
        "protocol": cell.protocol,
        "settings": settings,
        "net": cell.net,
        "draw": cell.draw,
        "seed": cell.seed,
        "training_seed": cell.training_seed,
        "is_fixed": cell.is_fixed,
        "data": data,
        "digest": digest(settings, options, chosen["rows_digest"], data),
    }


def run_suite(
    name: str,
    bundle_folder: Path,
    output: Path,
    *,
    budget_minutes: float | None = None,
    n_jobs: int | None = None,
    device: str = "auto",
    started: float | None = None,
) -> int:
    """Train the cells that the results file does not hold yet, and give how many failed.

    Args:
        name: Name or file of the suite.
        bundle_folder: What `prepare` wrote.
        output: Results file, to which lines are appended.
        budget_minutes: Minutes from `started` after which everything has ended; None is no limit.
        n_jobs: Cells at a time. None is one for each CPU core, or on a GPU as many as its memory
            holds, 4 at most.
        device: cpu, cuda, or auto.
        started: When the budget began, by `time.time()`; None is now.

    Raises:
        InputError: If the suite, the bundle or the results file cannot be used.
    """
    started = time.time() if started is None else started
    suite, choices = read_suite(name), Choices(Bundle(bundle_folder))
    device = choose_device(device)
    n_cores = os.cpu_count() or 1
    n_jobs = n_jobs or (min(CUDA_JOBS, n_cores) if device == "cuda" else n_cores)
    threads = 1 if device == "cpu" else max(1, n_cores // n_jobs)
    budget = float("inf") if budget_minutes is None else 60 * budget_minutes
    plan = Plan(suite, bundle_folder, device, threads, started + budget - CLOSE_SECONDS)
    asked = [(cell, describe(cell, suite, choices)) for cell in suite.cells]
    with appending(output) as append:
        done = read_lines(output)
        known = {key_of(line) for line in done}
        left = [(cell, about) for cell, about in asked if key_of(about, device) not in known]
        n_before = len(asked) - len(left)
        with tqdm(total=len(asked), initial=n_before, desc=suite.name, unit="cell") as bar:
            crew = Crew(plan, min(n_jobs, max(1, len(left))), done)
            try:
                return crew.work(left, append, bar)
            finally:
                crew.stop()


def choose_device(asked: str) -> str:
    """Give cpu or cuda; an InputError where cuda was asked for and there is none."""
    import torch

    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise InputError("device cuda was asked for, and PyTorch sees none here")
    return asked if asked != "auto" else "cuda" if has_cuda else "cpu"


@dataclass
class Worker:
    """A process that trains cells, and the one that it trains now, beside `most` - 1 others."""

    process: Any
    pipe: Connection
    cell: Cell | None = None
    about: dict[str, Any] = field(default_factory=dict)
    most: int = 1


class Crew:
    """The workers of a run; `done` are lines by which seconds and memory are estimated."""

    def __init__(self, plan: Plan, n_jobs: int, done: list[dict[str, Any]]) -> None:
        self.plan, self.n_jobs = plan, n_jobs
        self.done = [line for line in done if line["device"]["type"] == plan.device]
        self.workers: list[Worker] = []

    def work(
        self, left: list[tuple[Cell, dict[str, Any]]], append: Callable[[dict], None], bar: tqdm
    ) -> int:
        """Hand out the cells, write what comes back, and give the number of failures."""
        left, n_failed = list(left), 0
        while True:
            self.hand_out(left)
            busy = {w.pipe: w for w in self.workers if w.cell is not None}
            if not busy:
                break
            patience = min(1.0, self.plan.deadline + CLOSE_SECONDS - time.time())
            for pipe in wait(list(busy), timeout=max(0.0, patience)):
                worker = busy[pipe]
                kind, found = self.receive(worker)
                cell, about = worker.cell, worker.about
                worker.cell = None
                if kind == "done":
                    line = about | found
                    append(line)
                    self.done.append(line)
                    bar.update()
                elif kind == "memory" and worker.most > 1:
                    self.n_jobs = min(self.n_jobs, worker.most - 1)
                    left.insert(0, (cell, about))
                elif kind != "over":
                    n_failed += 1
                    bar.write(f"failed: {name_of(about)}: {found}", file=sys.stderr)
                if kind in ("memory", "broken"):  # what it holds of the device may be of no use
                    self.dismiss(worker)
            if time.time() > self.plan.deadline + CLOSE_SECONDS:
                break
        return n_failed

    def hand_out(self, left: list[tuple[Cell, dict[str, Any]]]) -> None:
        """Give every free worker the next cell that would end within the budget."""
        while sum(w.cell is not None for w in self.workers) < self.n_jobs:
            at = next((k for k, (_, about) in enumerate(left) if self.would_end(about)), None)
            if at is None or not self.has_room(left[at][1]):
                return
            worker = next((w for w in self.workers if w.cell is None), None) or self.hire()
            try:
                worker.pipe.send(left[at][0])
            except OSError:  # it died while it had nothing to do
                self.dismiss(worker)
                continue
            worker.cell, worker.about = left.pop(at)
            busy = [w for w in self.workers if w.cell is not None]
            worker.most = 1
            for other in busy:
                other.most = max(other.most, len(busy))

    def would_end(self, about: dict[str, Any]) -> bool:
        """Say whether a cell would end in time, by the seconds of those done that are most alike.

        A cell like none that is done is begun, and ends itself where it proves too long.
        """
        remaining = self.plan.deadline - time.time()
        if remaining <= 0:
            return False
        alike = self.alike(about)
        if not alike:
            return True
        remaining -= min(x["seconds"]["setup"] for x in alike)
        same = [x for x in alike if x["keep_ratio"] == about["keep_ratio"]]
        if same:
            return statistics.median(x["seconds"]["training"] for x in same) <= remaining
        scaled = [x["seconds"]["training"] * max(1.0, about["rows"] / x["rows"]) for x in alike]
        return min(scaled) <= remaining

    def has_room(self, about: dict[str, Any]) -> bool:
        """Say whether the memory of the device holds one cell more; one always runs."""
        if self.plan.device != "cuda" or not any(w.cell is not None for w in self.workers):
            return True
        import torch

        free, total = torch.cuda.mem_get_info()
        taken = [x["device"]["peak_bytes"] for x in self.alike(about)]
        return max(taken, default=total / self.n_jobs) + SPARE_SHARE * total <= free

    def alike(self, about: dict[str, Any]) -> list[dict[str, Any]]:
        """Give the lines of the cells done that are most like another one."""
        return [x for x in self.done if all(x[k] == about[k] for k in ALIKE)]

    def hire(self) -> Worker:
        """Start a worker."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(self.plan, theirs))  # may have children
        process.start()
        theirs.close()
        self.workers.append(Worker(process, ours))
        return self.workers[-1]

    def receive(self, worker: Worker) -> tuple[str, Any]:
        """Give what a worker says, done or a kind of `failure`, and what it found."""
        try:
            return worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(30 * STOP_SECONDS)  # it is about to end
            return "broken", f"its process ended with code {worker.process.exitcode}"

    def dismiss(self, worker: Worker) -> None:
        """End a worker that is not wanted any more."""
        worker.pipe.close()
        worker.process.join(STOP_SECONDS)
        worker.process.kill()
        worker.process.join()
        self.workers.remove(worker)

    def stop(self) -> None:
        """End all workers, at work or not."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()


def name_of(about: dict[str, Any]) -> str:
    """Say which cell it is."""
    place = f"{about['task']}, {about['selection']}, {about['keep']}, {about['protocol']}"
    return f"{place}, {about['net']}, draw {about['draw']}, seed {about['seed']}"


def serve(plan: Plan, pipe: Connection) -> None:
    """Train the cells that come through the pipe until it is closed; runs in a worker."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    torch.set_num_threads(plan.threads)
    choices = Choices(Bundle(plan.bundle))
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        try:
            said = "done", train_cell(cell, choices, plan)
        except Exception as error:  # one cell must not stop the others
            said = failure(error)
        pipe.send(said)


def failure(error: Exception) -> tuple[str, str]:
    """Give the kind of an error of a cell and its text: over, failed, memory or broken.

    After one of the last two the process and its device may be in no state to go on.
    """
    if isinstance(error, OverBudget):
        return "over", ""
    if isinstance(error, InputError):
        return "failed", str(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY):
        return "memory", text.splitlines()[0]
    traceback.print_exception(error)
    return "broken", text


def train_cell(cell: Cell, choices: Choices, plan: Plan) -> dict[str, Any]:
    """Train one cell, and give what its line holds beside what was known before."""
    import torch

    started = time.time()
    chosen = choices.of(cell)
    weights, is_listed = chosen["weights"], isinstance(cell.keep, str)
    job = Job(
        cell.task,
        plan.suite.protocol(cell.protocol),
        cell.net,
        np.asarray(chosen["rows"], dtype=np.int64),
        chosen["keep_ratio"] if is_listed else cell.keep,
        cell.training_seed,
        None if weights is None else np.asarray(weights, dtype=np.float32),
        chosen.get("use_weights") == "sample",
        bool(chosen.get("is_soft")),
    )
    is_cuda = plan.device == "cuda"
    device = torch.device(plan.device)
    if is_cuda:
        torch.cuda.init()  # else there are no statistics yet to reset
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(plan.deadline)
    trainer = trainer_of(plan.suite.settings[cell.protocol]["trainer"])
    found = trainer.train(job, choices.bundle, device, watch)
    return found | {
        "seconds": {
            "selection": chosen["selection_seconds"],
            "proxy": chosen["proxy_seconds"],
            "setup": round(watch.begin - started, 3),
            "training": round(time.time() - watch.begin, 3),
        },
        "device": {
            "type": plan.device,
            "name": torch.cuda.get_device_name() if is_cuda else processor_name(),
            "threads": plan.threads,
            "peak_bytes": torch.cuda.max_memory_reserved() if is_cuda else None,
        },
        "versions": versions(*PACKAGES),
    }


class Watch:
    """Ends a cell, through `OverBudget`, as soon as it is plain that it would not end in time.

    Attributes:
        begin: When training began, by `time.time()`: at the first call if nothing is done by then,
            so that what comes before is set-up (data, compilation); else when this was made.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline, self.parent = deadline, os.getppid()
        self.begin, self.is_first = time.time(), True
        self.sure = min(SURE_SECONDS, (deadline - self.begin) / 4)

    def __call__(self, share: float) -> None:
        """Take note that so much of the work of the cell is done, in [0, 1]."""
        if os.getppid() != self.parent:  # killed: nobody would write the line of this cell
            sys.exit(1)
        now = time.time()
        if self.is_first and share == 0:
            self.begin = now
        self.is_first = False
        if now > self.deadline:
            raise OverBudget
        passed = now - self.begin
        is_sure = share > 0 and (share >= SURE_SHARE or passed >= self.sure)
        if is_sure and passed / share * (1 - share) > LATE * (self.deadline - now):
            raise OverBudget


def processor_name() -> str:
    """Give the model of the CPU and the number of its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
