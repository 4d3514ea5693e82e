"""One piece of eval/selection_benchmark.py, in a process of its own: rows, or a measurement.

    python eval/selection_piece.py '{"method": "ours", "file": "rows.npy", "rows": 2000, ...}'

Prints one JSON document. Alone in its process, a method has a peak of memory of its own: that of
the process above what was resident before it began, the imports done and every page of the
embeddings touched.
"""

import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

BLOCK_ROWS = 65_536
TIE_WIDTH = 1e-9
"""Gains closer than this times the rows of the pool are a tie, which the lowest row number wins."""

Pick = Callable[[ndarray, int], ndarray]
"""Unit rows of the pool and a number of picks -> picked places, in the order of the picks."""


def main() -> None:
    """Make what the first argument asks for."""
    asked = json.loads(sys.argv[1])
    found = make_rows(asked) if "make" in asked else measure(asked)
    print(json.dumps(found))


# --- methods


def plain_greedy(embeddings: ndarray, n_bins: int, pick: Pick, dtype: Any) -> tuple[ndarray, ...]:
    """Make the bins one greedy run after the other, each on the rows that are left.

    Returns:
        Bin and rank of every row.
    """
    rows = np.array(embeddings, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = (rows / np.where(norms > 0, norms, 1)).astype(dtype)
    bins, ranks = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    left = np.arange(len(rows))
    for b in range(n_bins):
        size = -(-len(left) // (n_bins - b))
        picks = np.asarray(pick(rows[left], size))
        bins[left[picks]], ranks[left[picks]] = b, np.arange(size)
        left = np.delete(left, picks)
    return bins, ranks


def pick_by_matrix(rows: ndarray, n_picks: int) -> ndarray:
    r"""Pick as published: a matrix of all pairs, and every gain from its definition at each pick.

    gain(x) = sum over the pool of <p, x> - 2 sum over the picked of <p, x>. The first sum is
    made once; the second anew for all candidates from the rows of the picked, so a bin of k rows
    from a pool of r costs about k^2 r / 2 additions: n^3 in all.
    """
    matrix = rows @ rows.T
    pool_sums = matrix.sum(axis=0)
    is_open, picks = np.ones(len(rows), dtype=bool), np.empty(n_picks, dtype=np.int64)
    for done in range(n_picks):
        gains = pool_sums - 2 * matrix[picks[:done]].sum(axis=0)
        picks[done] = best_open(gains, is_open)
    return picks


def pick_closed_form(rows: ndarray, n_picks: int) -> ndarray:
    """Pick by running sums: one product of the rows with a vector at each pick, no matrix."""
    total, picked = rows.sum(axis=0), np.zeros(rows.shape[1])
    is_open, picks = np.ones(len(rows), dtype=bool), np.empty(n_picks, dtype=np.int64)
    for done in range(n_picks):
        picks[done] = best_open(rows @ (total - 2 * picked), is_open)
        picked += rows[picks[done]]
    return picks


def best_open(gains: ndarray, is_open: ndarray) -> int:
    """Find the open row of largest gain, the first of those that tie with it, and close it."""
    gains = np.where(is_open, gains, -np.inf)
    best = int(np.argmax(gains >= gains.max() - TIE_WIDTH * len(gains)))
    is_open[best] = False
    return best


def similarities(rows: ndarray) -> ndarray:
    """Give (1 + cosine) / 2 of all pairs, which apricot and submodlib can take.

    Lazy greedy needs similarities that are not negative. With these the gain of a unit row is half
    of ours plus what is the same for all rows, so the picks of a bin are the same.
    """
    matrix = rows @ rows.T
    matrix += 1
    matrix /= 2
    return np.maximum(matrix, 0, out=matrix)


def pick_by_apricot(rows: ndarray, n_picks: int) -> ndarray:
    """Pick with apricot's lazy greedy graph cut: alpha 1 is the lambda of ours."""
    from apricot import GraphCutSelection

    cut = GraphCutSelection(n_picks, metric="precomputed", alpha=1, optimizer="lazy")
    return cut.fit(similarities(rows)).ranking


def pick_by_submodlib(rows: ndarray, n_picks: int) -> ndarray:
    """Pick with submodlib's lazy greedy graph cut, which never picks its last row: we do."""
    from submodlib import GraphCutFunction

    if len(rows) == 1:
        return np.zeros(1, dtype=np.int64)
    cut = GraphCutFunction(len(rows), "dense", 1.0, ggsijs=similarities(rows))
    found = cut.maximize(min(n_picks, len(rows) - 1), "LazyGreedy", show_progress=False)
    picks = np.array([row for row, _ in found], dtype=np.int64)
    rest = np.setdiff1d(np.arange(len(rows)), picks) if len(picks) < n_picks else picks[:0]
    return np.concatenate([picks, rest])


PLAIN: dict[str, tuple[Pick, Any]] = {
    "n-by-n": (pick_by_matrix, np.float64),
    "n-by-n, float32": (pick_by_matrix, np.float32),
    "closed form": (pick_closed_form, np.float64),
    "apricot": (pick_by_apricot, np.float64),
    "submodlib": (pick_by_submodlib, np.float64),
}


# --- measuring


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Time a method, and save its picks; "absent" says why there is nothing to time."""
    method, n_bins, n_rows = asked["method"], asked["n_bins"], asked["rows"]
    if asked.get("peers"):  # an older package goes before this one, other libraries behind it
        sys.path.insert(0 if method == "ours before" else len(sys.path), asked["peers"])
    embeddings = np.load(asked["file"], mmap_mode="r")[:n_rows]
    strata = np.load(asked["strata"])[:n_rows] if asked.get("strata") else None
    if method in ("ours", "ours before"):
        from dq_multimodal.core import make_bins

        def work(rows: ndarray, strata: Any = None) -> tuple[ndarray, ...]:
            bins = make_bins(rows, n_bins, asked["similarity"], strata)
            return bins.bin, bins.rank
    elif method == "ours in parts":
        from dq_multimodal.config import count_parts
        from dq_multimodal.core import make_bins, partition_rows

        def work(rows: ndarray, strata: Any = None) -> tuple[ndarray, ...]:
            parts = partition_rows(rows, count_parts("kmeans", len(rows)), asked["similarity"])
            bins = make_bins(rows, n_bins, asked["similarity"], parts)
            return bins.bin, bins.rank
    else:
        pick, dtype = PLAIN[method]

        def work(rows: ndarray, strata: Any = None) -> tuple[ndarray, ...]:
            return plain_greedy(rows, n_bins, pick, dtype)

    try:
        n_first = 2000 if method.startswith("ours") else 10 * n_bins
        work(np.array(embeddings[:n_first]))  # what compiles or loads on its first call
    except ImportError as error:
        return {"absent": f"not installed: {error}"}
    for start in range(0, n_rows, BLOCK_ROWS):
        float(embeddings[start : start + BLOCK_ROWS].sum())
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    load, before, seconds, used = os.getloadavg()[0], resident_bytes(), [], []
    for _ in range(asked["repeats"]):
        started, began = time.perf_counter(), time.process_time()
        bins, ranks = work(embeddings, strata)
        seconds.append(time.perf_counter() - started)
        used.append(time.process_time() - began)
    peak = peak_bytes()
    np.savez(asked["picks"], bin=bins, rank=ranks)
    return {
        "seconds": seconds,
        "cpu_seconds": round(statistics.median(used), 4),
        "memory_bytes": max(0, peak - before),
        "load_before": round(load, 2),
        "threads": count_threads(),
    }


def resident_bytes() -> int:
    """Give the memory of the process that is resident now; its peak where that is not known."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Give the largest resident memory of the process.

    As `ru_maxrss`, which on Linux also counts the process that started this one.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(name + ":")), 0)


def count_threads() -> dict[str, int]:
    """Give the threads of the libraries that are loaded."""
    from threadpoolctl import threadpool_info

    found = {Path(pool["filepath"]).name: pool["num_threads"] for pool in threadpool_info()}
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].get_num_threads()
    return found


# --- rows


def make_rows(asked: dict[str, Any]) -> dict[str, Any]:
    """Write the rows of one kind into asked["file"], float32, block by block."""
    target = Path(asked["file"])
    target.parent.mkdir(parents=True, exist_ok=True)
    if asked["make"] == "strata":
        import pyarrow.parquet as pq

        np.save(target, pq.read_table(asked["from"], columns=["stratum"])["stratum"].to_numpy())
        return {}
    if asked["make"] == "classes":
        n_rows, size = asked["rows"], 512
        strata = np.arange(n_rows) % 10
        np.save(asked["strata"], strata)
    elif asked["make"] == "flat":
        rng, n_rows, size = np.random.default_rng(asked["seed"]), asked["rows"], 256
        flat = rng.normal(size=(n_rows, 8)) @ rng.normal(size=(8, size))
        np.save(target, flat.astype(np.float32))
        return {}
    else:
        source = np.load(asked["from"], mmap_mode="r")
        n_rows, size = asked.get("rows", len(source)), source.shape[1]
    temporary = target.with_name(target.name + ".partial")
    out = np.lib.format.open_memmap(temporary, "w+", dtype=np.float32, shape=(n_rows, size))
    for start in range(0, n_rows, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, n_rows))
        if asked["make"] == "copy":
            out[block] = source[block]
            continue
        rng = np.random.default_rng([asked["seed"], start])  # the first rows of more are the same
        if asked["make"] == "mixed":
            rows = mix_rows(source, BLOCK_ROWS, rng)
        else:
            rows = class_rows(strata[block], size, asked["seed"], rng)
        out[block] = rows[: block.stop - start]
    out.flush()
    temporary.replace(target)
    return {}


def mix_rows(source: ndarray, n_rows: int, rng: np.random.Generator) -> ndarray:
    """Mix pairs of real rows at random shares, add noise of norm about 0.1, scale to length 1."""
    pairs = rng.integers(len(source), size=(2, n_rows))
    share = rng.random((n_rows, 1), dtype=np.float32)
    rows = share * source[pairs[0]] + (1 - share) * source[pairs[1]]
    rows += rng.standard_normal(rows.shape, dtype=np.float32) * (0.1 / source.shape[1] ** 0.5)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def class_rows(strata: ndarray, size: int, seed: int, rng: np.random.Generator) -> ndarray:
    """Make rows like pooled features: a centre a class, 32 common directions, noise, none < 0."""
    common = np.random.default_rng(seed)
    centres = common.standard_normal((10, size), dtype=np.float32)
    directions = common.standard_normal((32, size), dtype=np.float32) / 32**0.5
    rows = centres[strata] + rng.standard_normal((len(strata), 32), dtype=np.float32) @ directions
    rows += 0.3 * rng.standard_normal(rows.shape, dtype=np.float32)
    return np.maximum(rows, 0)


if __name__ == "__main__":
    main()
