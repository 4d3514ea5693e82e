"""Ray: has tasks done by the machines of a cluster, and does those again that a lost one had."""

import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.config import InputError, format_bytes
from dq_multimodal.files import first_line

CONNECT_SECONDS = 10
Facts = dict[str, Any]
Task = Callable[[int, Path], Facts]
"""Called with a number and a folder of its machine; gives what the driver has to know."""


class Cluster:
    """The machines of a Ray cluster, which do tasks.

    Args:
        address: As ray.init takes it; None starts one on this machine. If this process is in a
            cluster already, that is the one.
    """

    def __init__(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # else every pool of workers is announced as an error, whatever comes of it
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise InputError("engine ray needs Ray: pip install 'dq-multimodal[ray]'") from error
        self._ray, self._is_ours = ray, not ray.is_initialized()
        for name in ("ray", "ray.data"):  # what ends a run is said in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self._is_ours:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            host, _, port = (address or "").rpartition(":")
            try:
                if host and port.isdigit():  # Ray itself tries for minutes
                    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
                ray.init(address or "local", **quiet)
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"no Ray cluster at {address or 'this machine'}: {first_line(error)}"
                ) from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False

    def __enter__(self) -> "Cluster":
        self._away = redirect_stdout(sys.stderr)  # Ray prints there what has died
        self._away.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._away.__exit__(*_)
        if self._is_ours:
            self._ray.shutdown()

    @property
    def room(self) -> int:
        """Bytes of memory of the largest machine."""
        nodes = (node["Resources"] for node in self._ray.nodes() if node["Alive"])
        return int(max((node.get("memory", 0) for node in nodes), default=0))

    def do(
        self, what: str, task: Task, numbers: list[int], *, has_model: bool = False, memory: int = 0
    ) -> Iterator[tuple[int, Facts]]:
        """Have tasks done, in any order; give their facts.

        Args:
            what: Names them beside the progress bar.
            task: Called with a number and a folder.
            numbers: Of the tasks.
            has_model: Whether each worker loads a model and so does many tasks, on a GPU of its own
                where there are any.
            memory: Bytes that a task takes at most.
        """
        if not numbers:
            return
        ray, found = self._ray, self._ray.cluster_resources()
        n_cpus, n_gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        if memory > self.room or not n_cpus:
            raise InputError(
                f"a task needs a core and {format_bytes(memory)}, and no machine has more than "
                f"{format_bytes(self.room)}: use --partition kmeans, or other strata"
            )
        options: dict[str, Any] = {"batch_size": 1, "num_cpus": 1, "memory": memory or None}
        call: Any = partial(perform, task)
        if has_model:
            options |= {"num_gpus": 1} if n_gpus else {}
            options |= {"fn_constructor_args": (task,)}
            options["concurrency"] = min(n_gpus or n_cpus, len(numbers))
            call = Worker
        items = ray.data.from_items(
            [{"number": number} for number in numbers], override_num_blocks=len(numbers)
        )
        done = items.map_batches(call, **options).iter_rows()
        try:
            for row in tqdm(done, total=len(numbers), desc=what, unit="task"):
                facts = json.loads(row["facts"])
                if "error" in facts:
                    raise InputError(facts["error"])
                yield int(row["number"]), facts
        except ray.exceptions.RayError as error:  # a task that fails otherwise has facts
            raise InputError(
                f"{what}: no worker could do a task ({type(error).__name__}); the same command "
                "goes on"
            ) from error


def perform(task: Task, batch: dict[str, ndarray]) -> dict[str, list[Any]]:
    """Do the task whose number is in a batch; a fault that a user can mend is one of its facts."""
    number = int(batch["number"][0])
    try:
        with TemporaryDirectory() as place:
            facts = task(number, Path(place))
    except Exception as error:  # Ray would do it again and again
        traceback.print_exc()  # into the log of the worker
        name = "" if isinstance(error, InputError) else f"task {number} failed: {error!r}: "
        facts = {"error": name + first_line(error)}
    return {"number": [number], "facts": [json.dumps(facts)]}


class Worker:
    """Does one task after the other, in a process of its own."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, batch: dict[str, ndarray]) -> dict[str, list[Any]]:
        """Do the task in a batch."""
        return perform(self._task, batch)
