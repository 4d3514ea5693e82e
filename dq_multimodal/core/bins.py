"""Disjoint bins by greedy GraphCut gains (Dataset Quantization, arXiv:2308.10524)."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import InputError, Similarity
from dq_multimodal.core.graph_cut import HELD_BYTES, MAX_KNOTS, ROOM_BYTES, GraphCut
from dq_multimodal.core.rows import prepare_rows


@dataclass(frozen=True)
class Bins:
    """Where every row stands.

    Attributes:
        bin: Bin of each row within its stratum, from 0.
        rank: Place of each row in the greedy order of its bin, from 0.
        gain: GraphCut gain with which the row was picked; NaN where no greedy run was made.
        stratum: Code of the stratum of each row, from 0.
    """

    bin: Int[ndarray, " n"]
    rank: Int[ndarray, " n"]
    gain: Float[ndarray, " n"]
    stratum: Int[ndarray, " n"]

    def __len__(self) -> int:
        return len(self.bin)

    def take(self, rows: Int[ndarray, " k"]) -> "Bins":
        """Give where some of the rows stand."""
        return Bins(self.bin[rows], self.rank[rows], self.gain[rows], self.stratum[rows])


def make_bins(
    embeddings: Any,
    n_bins: int = 10,
    similarity: Similarity = "cosine",
    strata: Any = None,
    *,
    n_left: int = 0,
    on_picks: Callable[[int], object] | None = None,
) -> Bins:
    """Part the rows of every stratum into bins, one greedy run after the other.

    Bin b is picked greedily (see `GraphCut`) from the rows that the bins before it left; the
    last is what remains, in greedy order too. Sizes differ by at most one, larger bins first. A
    stratum with fewer rows than bins fills only its first bins. Early bins lie in the middle of
    the data, late ones at its edge; the very first row is the one nearest the mean (appendix 1.1,
    claim a). The authors' code forgets the pick order; here it is kept as `rank`.

    Args:
        embeddings: See `as_matrix`; float64 is used inside.
        n_bins: Bins in each stratum, from 1 to n.
        similarity: "cosine" (the authors' code) or "euclidean" (the paper's Eq. 1-2).
        n_left: For rows that are outer products (last-layer gradients): an embedding holds the
            n_left numbers of the left factor, then those of the right one. 0 is plain rows.
        strata: (n,) labels of any type that sorts, integers or strings; None is one stratum.
        on_picks: Called now and then with the number of rows picked since (for progress bars).

    Returns:
        Bin, rank, gain and stratum code (place of the label among the sorted labels) of each row.

    Raises:
        InputError: If n_bins lies outside 1 ... n, or strata has another length.
    """
    values = as_matrix(embeddings)
    n_rows = len(values)
    if similarity not in ("cosine", "euclidean"):
        raise InputError(f"similarity must be cosine or euclidean, got {similarity!r}")
    if isinstance(n_bins, bool) or int(n_bins) != n_bins or not 1 <= n_bins <= n_rows:
        raise InputError(f"n_bins must be a whole number from 1 to the {n_rows} rows, got {n_bins}")
    if not 0 <= n_left < values.shape[1]:
        raise InputError(f"n_left must lie in [0, {values.shape[1]}), got {n_left}")
    codes = stratum_codes(strata, n_rows)

    bins = Bins(
        bin=np.zeros(n_rows, dtype=np.int64),
        rank=np.zeros(n_rows, dtype=np.int64),
        gain=np.full(n_rows, np.nan),
        stratum=codes,
    )

    strata_rows = split_strata(codes)
    n_threads = count_threads(len(strata_rows))

    def bin_stratum(members: Int[ndarray, " k"], tell: Callable[[int], None]) -> None:
        rows = prepare_rows(values, members, similarity, n_left)
        greedy = GraphCut(rows, similarity, n_threads)
        for b in range(min(int(n_bins), len(members))):
            picks, gains = greedy.pick(-(-greedy.n_left // (int(n_bins) - b)), tell)
            bins.bin[members[picks]] = b
            bins.rank[members[picks]] = np.arange(len(picks))
            with np.errstate(over="ignore"):  # of rows near the end of the float64 range
                bins.gain[members[picks]] = gains * rows.unit * rows.unit

    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # more threads wait longer for one another than a product takes
        for_each(bin_stratum, strata_rows, on_picks)
    return bins


def split_strata(codes: Int[ndarray, " n"]) -> list[ndarray]:
    """Give the rows of each stratum, ascending."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def count_threads(n_strata: int) -> int:
    """Give how many strata are binned side by side, at least 1: OMP_NUM_THREADS is a limit."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(n_strata, n_cores, int(limit) if limit.isdigit() else n_cores))


def for_each(
    work: Callable[[Any, Callable[[int], None]], None],
    strata: list[ndarray],
    on_rows: Callable[[int], object] | None = None,
) -> None:
    """Do the work of every stratum, large ones first, side by side where there are cores.

    The work tells how many rows it has done since; that raises once another one has failed.
    """
    is_stopped = Event()

    def tell(n_rows: int) -> None:
        if is_stopped.is_set():
            raise InterruptedError
        if on_rows is not None and n_rows:
            on_rows(n_rows)

    n_threads = count_threads(len(strata))
    if n_threads < 2:
        for members in strata:
            work(members, tell)
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(n_threads) as pool:
        by_size = sorted(strata, key=len, reverse=True)
        running = [pool.submit(work, members, tell) for members in by_size]
        try:
            for done in running:
                done.result()
        except BaseException:
            is_stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def count_working_bytes(sizes: Sequence[int], n_columns: int) -> int:
    """Bound the memory that `make_bins` takes beside the embeddings, in bytes.

    About 300 bytes a row, the rows in float32 where they are held, and in 8 bits, the knots, and
    the room for pools and products, which small strata do not fill. Sizes are the rows of the
    strata that are binned side by side.
    """
    n_bytes = 2**26
    for n_rows in map(int, sizes):
        held = min(4 * n_rows * n_columns, HELD_BYTES // len(sizes))
        room = max(ROOM_BYTES // len(sizes), 8 * n_rows)
        room = min(4 * n_rows * (n_columns + n_rows), room)
        n_bytes += (300 + 2 * n_columns) * n_rows + held + room + 8 * MAX_KNOTS * n_columns
    return n_bytes


def as_matrix(embeddings: Any) -> Float[ndarray, "n d"]:
    """Return embeddings as a checked (n, d) array, copied only where it must be.

    They are an array, memory-mapped ones included, or a torch tensor of finite numbers.

    Raises:
        InputError: If they are not, naming the first row that is wrong.
    """
    if hasattr(embeddings, "detach"):
        embeddings = embeddings.detach().cpu()
        if str(embeddings.dtype) == "torch.bfloat16":  # NumPy has no such type
            embeddings = embeddings.float()
    values = np.asarray(embeddings)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        raise InputError(
            f"embeddings must be an (n, d) array of numbers with n, d >= 1, "
            f"got shape {values.shape} of type {values.dtype}"
        )
    if values.dtype not in (np.float16, np.float32, np.float64):
        values = values.astype(np.float64)
    step = max(1, 2**20 // values.shape[1])
    for start in range(0, len(values), step):
        bad = ~np.isfinite(values[start : start + step]).all(axis=1)
        if bad.any():
            row = start + int(np.argmax(bad))
            raise InputError(f"embeddings must be finite, row {row} holds NaN or infinity")
    return values


def stratum_codes(strata: Any, n_rows: int) -> Int[ndarray, " n"]:
    """Number the strata 0, 1, ... in the sorted order of their labels."""
    if strata is None:
        return np.zeros(n_rows, dtype=np.int64)
    labels = np.asarray(strata.cpu() if hasattr(strata, "cpu") else strata)
    if labels.shape != (n_rows,):
        raise InputError(
            f"strata must hold one label for each of the {n_rows} rows, got shape {labels.shape}"
        )
    return np.unique(labels, return_inverse=True)[1].reshape(-1).astype(np.int64)
