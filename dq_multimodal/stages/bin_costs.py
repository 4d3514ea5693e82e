"""What the bins of many rows will take: seconds, by trials of fewer rows, and bytes."""

import contextlib
import io
import time
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import CompressConfig, count_parts
from dq_multimodal.core import one_bin
from dq_multimodal.core.bins import count_threads, count_working_bytes
from dq_multimodal.core.coverage import MAX_ROWS as COVERAGE_ROWS
from dq_multimodal.core.coverage import TABLE_BYTES
from dq_multimodal.core.duplicates import MAX_ROWS as DUPLICATE_ROWS
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import bin_by_method, bins_kind, mark_duplicates

TRIAL_ROWS, TRIAL_SECONDS = (1024, 4096, 16_384), 4.0
"""Rows of the trials; one that would take longer is left out."""
MOST_GROWTH = 2.5
"""The exponent of rows that is believed at most."""
LONG_SECONDS, MANY_ROWS = 120.0, 65_536
"""Bins of fewer rows take less; a word on them would take its time for nothing."""


@dataclass(frozen=True)
class BinTimes:
    """Rows and seconds of each trial, and the strata side by side in it: the seconds of bins.

    The share of the last trial's seconds would have been enough on a machine that is not busy.
    """

    n_strata: int
    seconds: list[tuple[int, float]]
    share: float = 1.0

    @property
    def growth(self) -> float:
        """The exponent of rows that the two largest trials show, between 1 and 2.5."""
        if len(self.seconds) < 2:
            return 1.0
        (few, before), (many, after) = self.seconds[-2:]
        found = np.log(max(after, 1e-9) / max(before, 1e-9)) / np.log(many / few)
        return float(np.clip(found, 1.0, MOST_GROWTH))

    def scale(self, sizes: Float[ndarray, " s"]) -> float:
        """Give the seconds of strata of these sizes."""
        n_rows, seconds = self.seconds[-1]
        times = (sizes * self.n_strata / n_rows) ** self.growth
        return seconds * float(times.sum()) / self.n_strata


def time_bins(
    vectors: Float[ndarray, "k d"],
    sizes: Int[ndarray, " s"],
    request: CompressConfig,
    n_left: int = 0,
) -> BinTimes:
    """Time the bins of ever more rows, and the search for near-duplicates if it is asked for.

    The vectors are embeddings of some rows; there are so many rows in each stratum (sizes).
    """
    kind, n_most, found = bins_kind(request.method), int(sizes.sum()), []
    n_strata = count_threads(int((sizes > 0).sum()))
    if kind == "coverage":
        n_strata = _side_by_side(cut_strata(sizes, request), n_strata)
    for number, size in enumerate(min(size, n_most) for size in (TRIAL_ROWS[0], *TRIAL_ROWS)):
        rows, strata = stretch(vectors, size), np.arange(size) % min(n_strata, size)
        bins = one_bin(strata)
        started, used = time.perf_counter(), time.process_time()
        with contextlib.redirect_stderr(io.StringIO()):  # no progress bars
            if kind != "none":
                asked = replace(request, n_bins=min(request.n_bins, size))
                bins, _ = bin_by_method(rows, strata, kind, asked, Marks(), n_left)
            if request.drop_duplicates is not None:
                mark_duplicates(rows, bins, replace(request, method="random"), None, Marks())
        if not number:  # loads libraries, and may compile
            continue
        found.append((size, time.perf_counter() - started))
        used = min(found[-1][1], time.process_time() - used)  # however busy the machine is
        if size == n_most or 6 * used > TRIAL_SECONDS:
            break
    return BinTimes(n_strata, found, used / found[-1][1])


def _side_by_side(parts: Float[ndarray, " p"], n_threads: int) -> int:
    """Give how many parts coverage takes at a time: large tables are made one after the other."""
    return 1 if 4 * parts.max() ** 2 * n_threads > TABLE_BYTES else n_threads


def foresee_bins(
    vectors: Float[ndarray, "n d"],
    strata: Int[ndarray, " n"],
    request: CompressConfig,
    n_left: int,
    *,
    can_part: bool,
) -> str | None:
    """Say in one line about how long the bins will take, where that is long.

    The vectors are of all rows, `can_part` is whether these may be parted instead.
    """
    sizes = np.bincount(strata)
    if sizes.max() < MANY_ROWS:
        return None
    seconds = time_bins(vectors, sizes, request, n_left).scale(sizes)
    if seconds < LONG_SECONDS:
        return None
    long = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.0f} hours"
    advice = "; --partition kmeans picks within parts of similar rows, in much less" * can_part
    return f"the selection will take about {long}, slower as it goes on{advice}"


def cut_strata(sizes: Int[ndarray, " s"], request: CompressConfig) -> Float[ndarray, " p"]:
    """Give the rows of what is binned at once: the strata, or the parts that they are cut into."""
    sizes, most = sizes[sizes > 0].astype(float), float(sizes.sum())
    if request.partition is not None:
        n_rows = int(most) if request.partition == "kmeans" else 10**18  # these may be a sample
        most = max(1.0, most / count_parts(request.partition, n_rows))
    if bins_kind(request.method) == "coverage":
        most = min(most, COVERAGE_ROWS)
    if request.drop_duplicates is not None:  # the strata do not count
        sizes, most = np.array([sizes.sum()]), min(most, DUPLICATE_ROWS)
    n_parts = np.ceil(sizes / most).astype(int)
    return np.repeat(sizes / n_parts, n_parts)


def count_working(request: CompressConfig, sizes: Int[ndarray, " s"], width: int) -> float:
    """Give what the bins of strata of these sizes take by their order of growth, in bytes."""
    kind, found, n_rows = bins_kind(request.method), 0.0, float(sizes.sum())
    parts = np.sort(cut_strata(sizes, replace(request, drop_duplicates=None)))[::-1]
    n_beside = count_threads(len(parts))
    if kind in ("dq", "graphcut"):
        found = count_working_bytes(parts[:n_beside].astype(int).tolist(), width)
    elif kind == "coverage":  # a table of cosines, and the records of the nearest rows
        n_beside = _side_by_side(parts, n_beside)
        found = float((4 * parts**2 + 8 * parts * width)[:n_beside].sum())
        found += 48 * float((parts * (1 + np.log(parts))).sum())
    elif kind == "blocks":
        found = 4 * n_rows * width
    if request.drop_duplicates is not None:
        found = max(found, 8 * min(n_rows, DUPLICATE_ROWS) * width)
    return found


def stretch(vectors: Float[ndarray, "k d"], n_rows: int) -> Float[ndarray, "n d"]:
    """Give rows like those given: some of them, or all and mixtures of two."""
    if len(vectors) >= n_rows:
        return vectors[np.linspace(0, len(vectors) - 1, n_rows).astype(int)]
    rng = np.random.default_rng(0)
    pairs = rng.integers(len(vectors), size=(2, n_rows - len(vectors)))
    shares = rng.uniform(0.2, 0.8, size=(pairs.shape[1], 1))
    mixed = shares * vectors[pairs[0]] + (1 - shares) * vectors[pairs[1]]
    return np.concatenate([vectors, mixed.astype(vectors.dtype)])
