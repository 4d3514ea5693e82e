"""Machines, workers and drivers that die in the middle of a run of engine ray.

    python eval/ray_faults.py

Clusters of several nodes on this machine (`ray.cluster_utils.Cluster`): a head on which the driver
is, without CPUs for tasks, and nodes of one CPU. In one run all processes of a node
that does a task are killed in every stage, in another the driver is, in a third single workers; and
there are clusters of 1, 2 and 4 nodes. In the end a run must be what it is undisturbed.

Shards are made small, so that a stage has some ten tasks. In a stage with a death all tasks but the
first wait at a gate, a file, that is opened after the death. A killed node comes back in the next
such stage; a driver is started again at once.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from measure import DATA, ROOT, command_line, dq, flags, write

from dq_multimodal import verify

DRIVER = "--driver"
MAP_STAGES = ("files", "embeddings", "parts", "bins", "order", "selection", "subset")
ADQ_STAGES = ("files", "model", *MAP_STAGES[1:4], "scores", "score", *MAP_STAGES[4:])
AT_DRIVER = ("join", "write", "report")
"""What the driver does itself: selection.parquet, the names of the subset's files, the report."""
BEFORE = ("files", "model")
"""What every driver that starts has done."""
ALONE = ("model", "score", "report")
"""Stages of one task."""
PATIENCE = 900.0
STORE_BYTES = 100 * 2**20


class Case(NamedTuple):
    """A source, the flags of its runs, and how small its shards are."""

    name: str
    source: Path
    flags: tuple[str, ...]
    shard_rows: int
    stages: tuple[str, ...]


Death = tuple[str, str]
"""What is killed (node, worker or driver), and in which stage."""


class Machines:
    """A cluster on this machine: a head without CPUs, and nodes with one each."""

    def __init__(self, n_nodes: int) -> None:
        self._stack = ExitStack()
        place = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ray"))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {"RAY_TMPDIR": place, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
        self._stack.enter_context(patch.dict(os.environ, own))  # auto is not this cluster
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self.fill_up(n_nodes)

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._stack:
            self._cluster.shutdown()

    def fill_up(self, n_nodes: int = 0) -> None:
        """Have that many nodes, or as many as there were."""
        self.n_nodes = n_nodes or self.n_nodes
        while len(self._cluster.worker_nodes) < self.n_nodes:
            self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def kill(self, node_id: str) -> None:
        """Kill all processes of a node at once."""
        [node] = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        own = [one.process.pid for many in node.all_processes.values() for one in many]
        for process in [x for pid in own for x in [psutil.Process(pid), *children(pid)]]:
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)


def children(pid: int) -> list[psutil.Process]:
    """Give the processes that a process started, at any depth."""
    return psutil.Process(pid).children(recursive=True)


def note(log: str, **facts: Any) -> None:
    """Add a line to the log, which the driver and all workers write."""
    with Path(log).open("a") as out:
        out.write(json.dumps({**facts, "pid": os.getpid(), "time": time.time()}) + "\n")


def read_log(log: Path) -> list[dict[str, Any]]:
    """Give the lines of a log that are whole."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def drive(asked: dict[str, Any]) -> None:
    """Be the driver: the command line, whose workers note what they do."""
    from dq_multimodal import cli
    from dq_multimodal.data import shards
    from dq_multimodal.distributed import cluster, engine
    from dq_multimodal.stages import on_shards

    log, gates = asked["log"], [Path(gate) for gate in asked["gates"]]
    do_once, do_all = on_shards.do_once, cluster.Cluster.do
    progress, write_report = engine.tqdm, engine.write_report

    def begin(stage: str, number: int) -> dict[str, Any]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        about = {"stage": stage, "number": number, "node": node}
        note(log, **about, event="begun")
        mine = [gate for gate in gates if gate.name == stage]
        while any(not gate.exists() for gate in mine) and (number or stage in ALONE):
            time.sleep(0.02)
        return about

    def do_noted(release: str, store: Any, stage: str, task: Any, number: int, place: Path) -> Any:
        about, made = begin(stage, number), []

        def make(number: int, place: Path) -> Any:
            made.append(number)
            return task(number, place)

        facts = do_once(release, store, stage, make, number, place)
        note(log, **about, event="made" if made else "found")
        return facts

    def do_all_noted(machines: Any, what: str, task: Any, *given: Any, **how: Any) -> Any:
        def do_one(number: int, place: Path) -> Any:
            about = begin(what, number)
            facts = task(number, place)
            note(log, **about, event="made")
            return facts

        return do_all(machines, what, do_one if what in BEFORE else task, *given, **how)

    def show_progress(items: Any, **how: Any) -> Any:
        for number, item in enumerate(progress(items, **how)):
            yield item
            if how["desc"] in AT_DRIVER:  # half of the items are done then
                note(log, **begin(how["desc"], number), event="made")

    def report(*given: Any, **how: Any) -> Any:
        begin("report", 0)
        return write_report(*given, **how)

    on_shards.do_once, cluster.Cluster.do = do_noted, do_all_noted
    engine.tqdm = on_shards.tqdm = show_progress
    engine.write_report = report
    shards.SHARD_ROWS = on_shards.GROUP_ROWS = asked["shard_rows"]
    cli.main(asked["arguments"])


class Runner:
    """Runs a case on a cluster, kills, and compares what comes out."""

    def __init__(self, case: Case, work: Path) -> None:
        self.case, self.work = case, work
        self.undisturbed = work / f"{case.name}-undisturbed"

    def start(self, machines: Machines, place: Path, gates: list[Path]) -> subprocess.Popen[str]:
        """Start a driver, or start it again; its tasks wait at those gates."""
        where = ["--engine", "ray", "--ray-address", machines.address, "--output-dir", str(place)]
        asked = {
            "arguments": ["compress", str(self.case.source), *self.case.flags, *where, "--json"],
            "gates": [str(gate) for gate in gates],
            **{"log": str(place.with_suffix(".log")), "shard_rows": self.case.shard_rows},
        }
        return subprocess.Popen(
            [sys.executable, __file__, DRIVER, json.dumps(asked)],
            stdout=place.with_suffix(".out").open("w"),
            stderr=place.with_suffix(".err").open("a"),
            text=True,
        )

    def run(
        self,
        name: str,
        machines: Machines,
        deaths: Sequence[Death] = (),
        elsewhere: Machines | None = None,
    ) -> dict[str, Any]:
        """Run once, with deaths in their order; give what was found.

        Args:
            name: Of the run.
            machines: On which it begins.
            deaths: What is killed, by stage.
            elsewhere: Where a killed driver is started again; on the same machines unless given.
        """
        place = self.work / f"{self.case.name}-{name}"
        log, gates = place.with_suffix(".log"), place.with_suffix(".gates")
        gates.mkdir()
        waiting = [gates / stage for _, stage in deaths]
        began, child = time.perf_counter(), self.start(machines, place, waiting)
        kept, n_changed = dict[Path, int](), 0
        try:
            for what, stage in deaths:
                victim, now = find_victim(log, stage, child), find_parts(place)
                n_changed += sum(now.get(file) != at for file, at in kept.items())
                if what == "node":
                    machines.fill_up()
                    machines.kill(victim["node"])
                elif what == "worker":
                    os.kill(victim["pid"], signal.SIGKILL)
                else:
                    child.kill()
                    child.wait()
                    kept = find_parts(place)
                (gates / stage).touch()
                if what == "driver":
                    child = self.start(elsewhere or machines, place, waiting)
            code, seconds = child.wait(PATIENCE), time.perf_counter() - began
        finally:
            child.kill()
        found: dict[str, Any] = {"run": name, "nodes": machines.n_nodes, "deaths": deaths}
        found |= {"seconds": round(seconds, 1), **count_tasks(read_log(log))}
        if code:
            raise RuntimeError(f"{found}: {place.with_suffix('.err').read_text()}")
        machines.fill_up()
        return found | {"parts_changed": n_changed, **self.compare(place)}

    def compare(self, place: Path) -> dict[str, Any]:
        """Say what of a finished run is as in the undisturbed one, and what is left half."""
        return {
            "same_selection": is_same(place, self.undisturbed, "selection.parquet"),
            "same_bins": is_same(place, self.undisturbed, "bins.parquet"),
            "same_subset": read_subset(place).equals(read_subset(self.undisturbed)),
            "verified": all(check.result != "failed" for check in verify(place)),
            "left": find_leftovers(place),
            "is_answer_whole": json.loads(place.with_suffix(".out").read_text())["complete"],
        }


def count_tasks(events: list[dict[str, Any]]) -> dict[str, int]:
    """Count the tasks of workers, those begun again, and those made twice."""
    parts = [x for x in events if x["stage"] not in (*BEFORE, *AT_DRIVER)]
    begun, made = (
        Counter((x["stage"], x["number"]) for x in parts if x["event"] == event)
        for event in ("begun", "made")
    )
    again, twice = (sum(n - 1 for n in counts.values()) for counts in (begun, made))
    return {"tasks": len(begun), "begun_again": again, "made_again": twice}


def find_victim(log: Path, stage: str, driver: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait until tasks of a stage wait at its gate, and another is done, if any; give one."""
    until = time.time() + PATIENCE
    while time.time() < until and driver.poll() is None:
        events = [event for event in read_log(log) if event["stage"] == stage]
        ended = {x["number"] for x in events if x["event"] != "begun"}
        waiting = [x for x in events if x["event"] == "begun" and x["number"] not in ended]
        if waiting and (ended or time.time() - waiting[0]["time"] > 5):
            return waiting[-1]
        time.sleep(0.02)
    raise RuntimeError(f"no task of {stage} waits: {log.with_suffix('.err').read_text()}")


def find_parts(place: Path) -> dict[Path, int]:
    """Give the files in a run folder of those tasks that are done, with their times."""
    done = [file.with_suffix("") for file in place.glob("parts/**/*.json")]
    files = [file for task in done for file in task.parent.glob(f"{task.name}[.-]*")]
    return {file: file.stat().st_mtime_ns for file in files if file.suffix != ".tmp"}


def is_same(place: Path, other: Path, name: str) -> bool:
    """Say whether two runs have the same table."""
    return pq.read_table(place / name).equals(pq.read_table(other / name))


def read_subset(place: Path) -> pa.Table:
    """Read all rows of a subset."""
    files = sorted((place / "subset").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).combine_chunks()


def find_leftovers(place: Path) -> list[str]:
    """Name what a finished run must not have left."""
    found = [p for p in place.rglob("*") if p.name.endswith((".tmp", ".partial"))]
    return sorted(p.relative_to(place).as_posix() for p in [*found, *place.glob("parts")])


def make_vectors(folder: Path, n_rows: int, n_files: int = 8, dimension: int = 64) -> Path:
    """Write parquet files of short texts with float16 vectors around some centres."""
    rng, folder = np.random.default_rng(0), folder / "vectors"
    folder.mkdir()
    words = np.array([f"word{k}" for k in range(1000)])
    centres = rng.normal(size=(40, dimension))
    for number, rows in enumerate(np.array_split(np.arange(n_rows), n_files)):
        noise = rng.normal(size=(len(rows), dimension))
        vectors = (centres[rng.integers(0, 40, size=len(rows))] + noise).astype(np.float16)
        texts = [" ".join(row) for row in words[rng.integers(0, 1000, size=(len(rows), 8))]]
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dimension)
        table = pa.table({"text": texts, "vector": column})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=len(rows) // 4)
    return folder


def make_texts(folder: Path, n_rows: int, n_files: int = 4) -> Path:
    """Write the first rows of Alpaca, or made-up ones where it is not there."""
    folder = folder / "texts"
    folder.mkdir()
    if (DATA / "alpaca.parquet").exists():
        table = pq.read_table(DATA / "alpaca.parquet").slice(0, n_rows)
    else:
        rng = np.random.default_rng(1)
        sizes = rng.integers(5, 40, size=n_rows)
        texts = [" ".join(f"word{k}" for k in rng.integers(0, 500, size=n)) for n in sizes]
        table = pa.table({"instruction": texts})
    size = n_rows // n_files
    for number in range(n_files):
        part = table.slice(number * size, size)
        pq.write_table(part, folder / f"{number}.parquet", row_group_size=max(1, size // 5))
    return folder


COMMON = ("--keep-ratio", "0.1", "--partition")


def make_given(work: Path, share: int) -> Case:
    """Make rows whose vectors are given."""
    asked, n_rows = ("--method", "dq", "--ready-embeddings", "vector"), 200_000 // share
    source = make_vectors(work, n_rows)
    return Case("vectors", source, (*asked, *COMMON, "kmeans:8"), n_rows // 10, MAP_STAGES)


def make_embedded(work: Path, share: int) -> Case:
    """Make rows whose instructions the default encoder embeds."""
    asked = ("--method", "adq", "--score-rows", "20", "--text-columns", "instruction")
    source, n_rows = make_texts(work, 5000 // share), 5000 // share
    return Case("texts", source, (*asked, *COMMON, "kmeans:2"), n_rows // 10, ADQ_STAGES)


SOURCES = {"vectors": make_given, "texts": make_embedded}


def measure(case: Case, work: Path) -> dict[str, Any]:
    """Run a case with every death; the other clusters, and single workers, for given vectors."""
    runner, found = Runner(case, work), list[dict[str, Any]]()
    local, is_given = work / f"{case.name}-local", "--ready-embeddings" in case.flags
    seconds = dq("compress", case.source, *case.flags, output_dir=local).seconds
    at = [case.stages.index(stage) + 1 for stage in ("selection", "subset")]
    every = [*case.stages[: at[0]], "join", *case.stages[at[0] : at[1]], "write", "report"]
    runs: dict[str, Sequence[Death]] = {
        "undisturbed": (),
        "nodes": [("node", stage) for stage in case.stages],
        "drivers": [("driver", stage) for stage in every],
    }
    if is_given:
        runs["workers"] = [("worker", "embeddings"), ("worker", "bins")]
    with Machines(3) as machines:
        for name, deaths in runs.items():
            found.append(runner.run(name, machines, deaths))
            print(json.dumps(found[-1]), flush=True)
        if is_given:
            with Machines(1) as other:
                found.append(runner.run("elsewhere", machines, [("driver", "bins")], other))
                print(json.dumps(found[-1]), flush=True)
    for n_nodes in (1, 2, 4) if is_given else (1,):
        with Machines(n_nodes) as machines:
            found.append(runner.run(f"{n_nodes} nodes", machines))
            print(json.dumps(found[-1]), flush=True)
    kept = [set(read_subset(place)["dq_row"].to_pylist()) for place in (local, runner.undisturbed)]
    return {
        "rows": pq.read_table(runner.undisturbed / "selection.parquet").num_rows,
        "flags": case.flags,
        "local": {"seconds": round(seconds, 1), "same_rows": len(kept[0] & kept[1]) / len(kept[0])},
        "runs": found,
    }


def main() -> None:
    """Run every case undisturbed and with every death, write the numbers."""
    if sys.argv[1:2] == [DRIVER]:
        return drive(json.loads(sys.argv[2]))
    parser = flags(__doc__, "ray_faults")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    args = parser.parse_args()
    for name in args.sources:
        with tempfile.TemporaryDirectory(prefix="dq") as folder:
            case = SOURCES[name](Path(folder), 10 if args.quick else 1)
            about = {"command": command_line(), "cores": os.cpu_count()}
            found = {**about, "load_before": os.getloadavg()[0], **measure(case, Path(folder))}
        before = json.loads(args.output.read_text())["sources"] if args.output.exists() else {}
        write(args.output, {"sources": before | {name: found}})


if __name__ == "__main__":
    main()
