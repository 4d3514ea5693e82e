"""Several processes on one job: who they are, what they tell each other, how they end together.

A launcher (`torchrun`, `accelerate launch`, or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT) starts the same command several times. Rank 0 leads: it does all that is done once, and
posts tasks to the others, which do their share and answer. Rows and embeddings go through the files
of the run folder; only tasks and answers come through here, over the key-value store of
torch.distributed's rendezvous. There is no process group on purpose: a collective waits for a lost
member (that of NCCL for ten minutes), a key of the store can be waited for with open eyes.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dq_multimodal.config import InputError
from dq_multimodal.distributed.messages import pack, unpack

WAIT_SECONDS = 0.02
BEAT_SECONDS = 1.0
LOST_BEATS = 30
"""A process that has not been heard of for so many of our own beats is lost. Seconds would not do:
a job that was suspended as a whole, and goes on, has lost nobody."""
JOIN_SECONDS = 300.0
"""Machines of a cluster do not start together."""
LEAVE_SECONDS = 10.0
"""How long the one that ends a run waits until all others know."""
GRACE_SECONDS = 15.0
"""A process that does not come back from a long call by then is ended: no file suffers from it."""
PART_BYTES = 2**21
"""The store takes values of 8 MiB at most."""
MOST_PARTS = 8192
END = "end"
RESUMES = "the same command goes on where it stopped"
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Fault:
    """Why a run ends early.

    Attributes:
        code: Exit code, of every process.
        line: What there is to say.
        is_ours: Whether this is the process that says it; the others are quiet.
    """

    code: int
    line: str
    is_ours: bool


class Stopped(SystemExit):
    """The run has been ended by another process, or by a signal."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.code)
        self.fault = fault


class World:
    """The processes that work on one job, seen from one of them.

    Attributes:
        rank: Number of this process; 0 leads.
        size: Number of processes.
    """

    def __init__(self, store: Any = None, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._n_posted = self._n_sent = 0
        self._n_read = [0] * size
        self._fault: Fault | None = None
        self._is_ending = False
        self._n_heard = 0
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def is_main(self) -> bool:
        """Whether this process leads."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    @property
    def n_here(self) -> int:
        """Number of processes on this machine, as far as the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def post(self, name: str, **given: Any) -> None:
        """Give all others something to do; without others, nothing happens."""
        if not self.is_alone:
            self._put(f"task/{self._n_posted}", (name, given))
            self._n_posted += 1

    def tasks(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what rank 0 posts until the run ends."""
        number = 0
        while not self._ask("check", [END]):  # a slow one leaves out what others have done
            if self._ask("check", [f"task/{number}"]):
                match self._take(f"task/{number}"):
                    case (str() as name, dict() as given):
                        yield name, given
                    case other:
                        raise InputError(f"got a task of rank 0 that is none: {str(other)[:80]}")
                number += 1
            else:
                time.sleep(WAIT_SECONDS)

    def send(self, message: Any) -> None:
        """Answer rank 0."""
        self._put(f"message/{self.rank}/{self._n_sent}", message)
        self._n_sent += 1

    def receive(self, *, wait: bool = False) -> list[tuple[int, Any]]:
        """Give the answers that have come since, with their ranks, in the order of each rank.

        Args:
            wait: Wait until there is at least one.
        """
        found: list[tuple[int, Any]] = []
        while not self.is_alone:
            for rank in range(1, self.size):
                while self._ask("check", [key := f"message/{rank}/{self._n_read[rank]}"]):
                    found.append((rank, self._take(key, is_last=True)))
                    self._n_read[rank] += 1
            if found or not wait:
                break
            time.sleep(WAIT_SECONDS)
        return found

    def deal(self, what: str, numbers: list[int]) -> Iterator[int]:
        """Yield numbers in their order, each to that process which asks for it first."""
        if self.is_alone:
            yield from numbers
            return
        while (place := self._ask("add", f"deal/{what}", 1) - 1) < len(numbers):
            yield numbers[place]

    def end(self, code: int, line: str | None) -> str | None:
        """Say how this process ends; an exit code above 0 ends the others with the same.

        Returns:
            The line, if this process is the one to print it.
        """
        if self.is_alone:
            return line
        self._is_ending = True
        if not code:
            if self.is_main:
                self._ask("set", END, "")
            return line
        self._fault = self._fault or self._record(code, line or "")
        return line if self._fault.is_ours else None

    def start(self) -> None:
        """Meet the others, and begin to watch over them.

        Raises:
            InputError: If they do not all come.
        """
        self._store.set(f"beat/{self.rank}", "0")
        others = range(1, self.size) if self.is_main else [0]
        if not self._wait_for([f"beat/{rank}" for rank in others], JOIN_SECONDS):
            raise InputError(f"rank {self.rank} waited {JOIN_SECONDS:.0f} s for other processes")
        signal.signal(signal.SIGTERM, self._on_signal)
        for task in (self._watch, self._guard):
            self._threads.append(threading.Thread(target=task, daemon=True))
            self._threads[-1].start()

    def leave(self) -> None:
        """Stop watching. Those that the others listen to wait until they know, or are lost."""
        self._is_ending = True
        until = time.monotonic() + LEAVE_SECONDS
        with suppress(RuntimeError):  # the store has gone
            n_left = self._store.add("left", 1)
            is_heard = self.is_main or (self._fault is not None and self._fault.is_ours)
            while is_heard and n_left < self.size:
                if self._fault and time.monotonic() > until:
                    break
                time.sleep(WAIT_SECONDS)
                n_left = self._store.add("left", 0)
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * BEAT_SECONDS)

    def _watch(self) -> None:
        """Give a sign of life, and look for a fault and for those of the others."""
        store, count = self._store.clone(), 0
        watched = range(1, self.size) if self.is_main else [0]
        seen = {rank: (b"", 0) for rank in watched}
        while not self._closed.wait(BEAT_SECONDS):
            count += 1
            try:
                store.set(f"beat/{self.rank}", str(count))
                if not self._fault and store.check(["fault"]):
                    self._fault = self._read_fault(store.get("fault"))
                for rank, (before, n_silent) in seen.items():
                    beat = store.get(f"beat/{rank}")
                    seen[rank] = (beat, n_silent + 1 if beat == before else 0)
                    if seen[rank][1] > LOST_BEATS and not self._fault:
                        self._fault = self._record(1, f"rank {rank} was lost: {RESUMES}")
                self._n_heard = count
            except RuntimeError:
                self._fault = self._fault or self._without_store()
            if self._fault and not self._is_ending:
                self._interrupt()
                return

    def _guard(self) -> None:
        """End this process when even the store does not answer: its machine is lost."""
        before, n_silent = 0, 0
        while not self._closed.wait(BEAT_SECONDS) and self._threads[0].is_alive():
            n_silent = n_silent + 1 if self._n_heard == before else 0
            before = self._n_heard
            if n_silent > LOST_BEATS:
                self._fault = self._fault or self._without_store()
                self._interrupt()
                return

    def _interrupt(self) -> None:
        """Stop the main thread where it is, or after a while the whole process."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if not self._closed.wait(GRACE_SECONDS) and self._fault:
            if self._fault.is_ours:
                print(f"\nerror: {self._fault.line}", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(self._fault.code)

    def _on_signal(self, *_: Any) -> None:
        if not self._is_ending:
            self._is_ending = True
            line = f"the run was ended from outside, or one of its processes was: {RESUMES}"
            self._fault = self._fault or self._record(TERMINATED, line)
            raise Stopped(self._fault)

    def _record(self, code: int, line: str) -> Fault:
        """Write down a fault, unless there is one already; give the one that counts."""
        entry = json.dumps([self.rank, code, line])
        try:
            return self._read_fault(self._store.compare_set("fault", "", entry))
        except RuntimeError:
            return Fault(code, line, is_ours=True)

    def _read_fault(self, entry: bytes) -> Fault:
        try:
            rank, code, line = json.loads(entry)
            return Fault(int(code), str(line), is_ours=rank == self.rank)
        except (ValueError, TypeError, RecursionError):
            return Fault(1, "another process ended in a way that cannot be read", is_ours=True)

    def _without_store(self) -> Fault:
        """Say that the store has gone, and who held it; one process of each machine says so."""
        is_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        lost = "the launcher" if is_agent else "rank 0"
        is_first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        is_first |= self.rank == 1 and not is_agent
        return Fault(1, f"{lost} was lost: {RESUMES}", is_ours=is_first)

    def _ask(self, what: str, *given: Any) -> Any:
        try:
            return getattr(self._store, what)(*given)
        except RuntimeError:
            self._is_ending, self._fault = True, self._fault or self._without_store()
            raise Stopped(self._fault) from None

    def _wait_for(self, keys: list[str], seconds: float = float("inf")) -> bool:
        until = time.monotonic() + seconds
        while not self._ask("check", keys):
            if time.monotonic() > until:
                return False
            time.sleep(WAIT_SECONDS)
        return True

    def _put(self, key: str, value: Any) -> None:
        blob = pack(value)
        starts = range(0, len(blob), PART_BYTES)
        if len(starts) > MOST_PARTS:
            raise InputError(
                f"{len(blob):,} bytes are too many for other processes: use fewer rows"
            )
        for number, start in enumerate(starts):
            self._ask("set", f"{key}/{number}", blob[start : start + PART_BYTES])
        self._ask("set", key, str(len(starts)))

    def _take(self, key: str, *, is_last: bool = False) -> Any:
        n_parts = self._ask("get", key)
        if not n_parts.isdigit() or not 0 < int(n_parts) <= MOST_PARTS:
            raise InputError(f"got a message of another process in {n_parts[:20]!r} parts")
        parts = [f"{key}/{number}" for number in range(int(n_parts))]
        if not self._ask("check", parts):
            raise InputError("got a message of another process without some of its parts")
        blob = bytearray().join(self._ask("get", part) for part in parts)
        for used in (key, *parts) if is_last else ():
            self._ask("delete_key", used)
        return unpack(blob)


ALONE = World()
"""A single process."""


def is_launched() -> bool:
    """Say whether a launcher started this process as one of several."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdigit() and int(size) > 1
