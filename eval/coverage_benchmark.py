"""Seconds, peak memory and picks of coverage: ours, and facility location of two libraries.

    python eval/coverage_benchmark.py [--peers FOLDER]

All order all rows by lazy greedy of facility location with cosines, negative ones counted as 0,
from the embeddings on: making the cosines is timed. Rows: the first of MiniLM embeddings of Alpaca
(alpaca_minilm_f16.npy in DQ_TEST_DATA, default ../shared/data), and made-up clouds in 10 classes of
5,000 x 512. Each line is a process of its own, one after the other in one run; compilation by numba
is not timed. Where other work shares the cores, `cpu_seconds` compare and `seconds` do not; each
line has the load of the machine before it.
`pip install --no-deps --target FOLDER apricot-select submodlib-py` puts the libraries beside the
package.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import fail, write
from numpy import ndarray

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
SEED, N_CLASSES, CLASS_ROWS, WIDTH, N_CLOUDS = 0, 10, 5_000, 512, 20
METHODS = {
    "ours": "dq_multimodal.core.cover_rows",
    "apricot": "FacilityLocationSelection, lazy, on the matrix of cosines; the functions that it "
    "compiles anew for each object, about 2 s, are kept from the first, so this is not counted",
    "submodlib": "FacilityLocationFunction, LazyGreedy, on the matrix of cosines, which it takes "
    "in single precision; it never picks its last row",
}
Line = dict[str, Any]


def main() -> None:
    """Measure every method on every set of rows, and write the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="Folder with apricot and submodlib.")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2_000, 5_000])
    parser.add_argument("--repeats", type=int, default=3, help="Of ours; others run once.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "eval/results/coverage_benchmark.json"
    )
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.piece:
        print(json.dumps(measure(json.loads(args.piece))))
        return
    if not (DATA / "alpaca_minilm_f16.npy").is_file():
        fail(f"no alpaca_minilm_f16.npy in {DATA} (set DQ_TEST_DATA)")
    peers = [] if args.peers is None else ["apricot", "submodlib"]
    asked = [("Alpaca", n, method) for n in args.sizes for method in ["ours", *peers]]
    asked += [("made up, 10 classes", N_CLASSES * CLASS_ROWS, "ours")]
    lines = []
    for data, n_rows, method in asked:
        line = {"method": method, "data": data, "rows": n_rows}
        line["repeats"] = args.repeats if method == "ours" else 1
        line["peers"] = args.peers and str(args.peers.resolve())
        lines.append(run_piece(line))
        print({key: value for key, value in lines[-1].items() if key != "picks"}, flush=True)
    for line in lines:
        compare(line, lines)
    for line in lines:
        line.pop("picks", None)
    write(args.output, {**describe_run(), "methods": METHODS, "lines": lines})


def run_piece(line: Line) -> Line:
    """Measure in a process of its own; of one that fails, give its last line."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, __file__, "--piece", json.dumps(line)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    line.pop("peers")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {**line, "absent": f"failed: {last}"}
    return {**line, **json.loads(done.stdout.splitlines()[-1])}


def measure(line: Line) -> Line:
    """Time one method, and count what its process takes beyond the rows and the libraries."""
    if line["peers"]:
        sys.path.append(line["peers"])
    rows, strata = make_rows(line["data"], line["rows"])
    work: Callable[[ndarray, ndarray | None], ndarray] = {
        "ours": pick,
        "apricot": pick_by_apricot,
        "submodlib": pick_by_submodlib,
    }[line["method"]]
    work(rows[:50], None)  # compiles, imports
    forget_peak()
    before, load = resident_bytes(), os.getloadavg()[0]
    seconds, cpu_seconds = [], []
    for _ in range(line["repeats"]):
        started, cpu_started = time.perf_counter(), time.process_time()
        picks = work(rows, strata)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return {
        "seconds": {"median": statistics.median(seconds), "all": seconds},
        "cpu_seconds": statistics.median(cpu_seconds),
        "memory_bytes": resident_bytes("VmHWM") - before,
        "load_before": round(load, 2),
        "picks": picks.tolist() if strata is None else [],
    }


def make_rows(data: str, n_rows: int) -> tuple[ndarray, ndarray | None]:
    """Give the rows, float32, and their strata."""
    if data == "Alpaca":
        embeddings = np.load(DATA / "alpaca_minilm_f16.npy", mmap_mode="r")
        return embeddings[:n_rows].astype(np.float32), None
    rng = np.random.default_rng(SEED)
    strata = np.arange(n_rows) // CLASS_ROWS
    clouds = rng.normal(size=(N_CLASSES, N_CLOUDS, WIDTH))
    rows = clouds[strata, rng.integers(0, N_CLOUDS, size=n_rows)]
    return (rows + 1.5 * rng.normal(size=rows.shape)).astype(np.float32), strata


def resident_bytes(field: str = "VmRSS") -> int:
    """Give the memory of this process from Linux: VmRSS is what it takes, VmHWM the most so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field))


def forget_peak() -> None:
    """Let the peak begin anew: compilation had one of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def pick(rows: ndarray, strata: ndarray | None) -> ndarray:
    """Order the rows by ours; only without strata is this one order."""
    from dq_multimodal.core import cover_rows

    return np.argsort(cover_rows(rows, strata).rank, kind="stable")


def cosines(rows: ndarray) -> ndarray:
    """Give the cosines of all pairs, in float64, negative ones as 0."""
    rows = rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.maximum(rows @ rows.T, 0)


def pick_by_apricot(rows: ndarray, strata: ndarray | None) -> ndarray:
    """Order the rows by apricot; the functions that it compiles for each object are kept."""
    from apricot import FacilityLocationSelection
    from apricot.functions import facilityLocation

    for name in ("calculate_gains", "calculate_gains_sieve"):
        if not hasattr(getattr(facilityLocation, name), "cache_info"):
            setattr(facilityLocation, name, cache(getattr(facilityLocation, name)))
    found = FacilityLocationSelection(len(rows), metric="precomputed", optimizer="lazy")
    return found.fit(cosines(rows)).ranking


def pick_by_submodlib(rows: ndarray, strata: ndarray | None) -> ndarray:
    """Order all rows but the last by submodlib, stopping neither at gains of 0."""
    from submodlib import FacilityLocationFunction

    function = FacilityLocationFunction(
        n=len(rows), mode="dense", sijs=cosines(rows), separate_rep=False
    )
    found = function.maximize(
        len(rows) - 1, "LazyGreedy", stopIfZeroGain=False, stopIfNegativeGain=False
    )
    return np.array([row for row, _ in found])


def compare(line: Line, lines: list[Line]) -> None:
    """Compare its first picks with ours: the same rows, at the same rank, and their value of F."""
    own = next(x for x in lines if x["method"] == "ours" and x["rows"] == line["rows"])
    if line is own or "picks" not in line:
        return
    table = cosines(make_rows(line["data"], line["rows"])[0])
    for name, share in (("1 %", 0.01), ("10 %", 0.1)):
        k = round(share * line["rows"])
        a, b = line["picks"][:k], own["picks"][:k]
        line[f"agreement at {name}"] = {
            "same rows": len(set(a) & set(b)) / k,
            "same rank": float(np.mean(np.array(a) == b)),
            "value over ours": float(table[a].max(axis=0).sum() / table[b].max(axis=0).sum()),
        }


def describe_run() -> Line:
    """Say where and how it was measured."""
    flags = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", "eval/coverage_benchmark.py", *flags]),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("dq-multimodal", "numpy", "numba")},
        },
    }


if __name__ == "__main__":
    main()
