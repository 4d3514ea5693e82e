"""Short probes on the real rows, models and code: what the stages of a run will take."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.config import CompressConfig, Similarity
from dq_multimodal.core import Bins, make_bins, one_bin, order_rows
from dq_multimodal.core.balance import SMALL_ROWS, balance_rows
from dq_multimodal.core.bins import count_threads
from dq_multimodal.core.coverage import MAX_ROWS, TABLE_BYTES, cover_rows
from dq_multimodal.core.diversity import OUT, count_steps, diversity, learn_directions
from dq_multimodal.core.duplicates import MAX_ROWS as DUPLICATE_ROWS
from dq_multimodal.core.duplicates import find_duplicates
from dq_multimodal.stages import subset
from dq_multimodal.stages.batches import load_ahead, plan_batches
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import bins_kind
from dq_multimodal.stages.selection import BINS_FILE, SELECTION_FILE, write_selection

if TYPE_CHECKING:
    from datasets import Dataset

    from dq_multimodal.stages.patching import PatchDropper

EMBED_SECONDS, VIEW_SECONDS = 10.0, 4.0
"""So long, about, batches are tried; at least a few of them, and never more than there are."""
FEWEST, MOST = 3, 96

GROWTH = 1.2
"""Exponent in n of the time of the greedy picks; refit it when core/graph_cut.py changes."""
MOST_GROWTH = 2.5
PICK_ROWS = 4096
COVER_ROWS = 8192
COVER_GROWTH = (1.5, 2.5)
"""Exponents in n that are believed of coverage, whose table grows by the square of the rows."""
LONG_SECONDS, MANY_ROWS = 120.0, 65_536
"""Fewer rows take less; a word on them would take its time for nothing."""
TABLE_ROWS = 100_000
LEARN_ROWS, DIVERSITY_ROWS = 512, 512
SUBSET_BYTES, SUBSET_ROWS = 32_000_000, 20_000
PATCH_ROWS = 128


@dataclass(frozen=True)
class Probe:
    """What a probe of the encoder found.

    Attributes:
        seconds: Time that all rows will take.
        probed_rows: Rows that were tried.
        probed_seconds: What they took.
        vectors: Their embeddings.
    """

    seconds: float
    probed_rows: int
    probed_seconds: float
    vectors: Float[ndarray, "k d"]


def probe_encoder(
    adapter: Adapter,
    rows: Int[ndarray, " k"],
    batch_size: int,
    *,
    view: int | None = None,
    budget: float = EMBED_SECONDS,
) -> Probe:
    """Time some of the very batches that a run would make of rows, spread over their lengths.

    Batches are sorted by length, so the first ones cost many times what the last ones do. The
    tried ones halve the gaps between those before, however early time is up; the cost of a row
    is interpolated between their lengths and summed over all batches. Threads read ahead as they
    do in a run, since they take time from the model.

    Args:
        adapter: What reads and embeds the rows.
        rows: Row numbers.
        batch_size: Rows a batch.
        view: Seed of the augmented views to embed; None is the rows themselves.
        budget: Seconds to try.
    """
    lengths = adapter.lengths()[rows]
    chunks = rows // adapter.chunk_rows if adapter.chunk_rows else None
    batches = plan_batches(lengths, batch_size, chunks)
    places = list(itertools.islice(spread(len(batches)), MOST))
    adapter.embed(adapter.load(rows[batches[len(batches) // 2]], view)[0])  # warms up
    took, vectors = [], []
    loaded = load_ahead(adapter, ((place, rows[batches[place]]) for place in places), view)
    started = before = time.perf_counter()
    for _, batch, _ in loaded:
        vectors.append(adapter.embed(batch).embedding)
        now = time.perf_counter()
        took.append(now - before)
        before = now
        if now - started >= budget and len(took) >= FEWEST:
            break
    loaded.close()
    tried = [batches[place] for place in places[: len(took)]]
    sizes = np.array([len(part) for part in tried])
    typical = np.array([lengths[part].mean() for part in tried])
    known, at = np.unique(typical, return_inverse=True)
    costs = np.bincount(at, weights=took) / np.bincount(at, weights=sizes)
    cost_of = np.interp([lengths[part].mean() for part in batches], known, costs)
    seconds = float(cost_of @ [len(part) for part in batches])
    return Probe(seconds, int(sizes.sum()), sum(took), np.concatenate(vectors))


def spread(n: int) -> Iterator[int]:
    """Give 0 ... n - 1, first both ends, then the middles of ever smaller gaps."""
    seen = set()
    for place in [0, n - 1]:
        if place not in seen:
            seen.add(place)
            yield place
    parts = 2
    while len(seen) < n:
        for k in range(1, parts, 2):
            place = round(k * (n - 1) / parts)
            if place not in seen:
                seen.add(place)
                yield place
        parts *= 2


def stretch(vectors: Float[ndarray, "k d"], n_rows: int) -> Float[ndarray, "n d"]:
    """Give rows like those given: some of them, or all and mixtures of two."""
    if len(vectors) >= n_rows:
        return vectors[np.linspace(0, len(vectors) - 1, n_rows).astype(int)]
    rng = np.random.default_rng(0)
    pairs = rng.integers(len(vectors), size=(2, n_rows - len(vectors)))
    shares = rng.uniform(0.2, 0.8, size=(pairs.shape[1], 1))
    mixed = shares * vectors[pairs[0]] + (1 - shares) * vectors[pairs[1]]
    return np.concatenate([vectors, mixed.astype(vectors.dtype)])


def time_picks(
    vectors: Float[ndarray, "k d"],
    strata: Int[ndarray, " n"],
    n_bins: int,
    similarity: Similarity,
    n_left: int = 0,
) -> float:
    """Give the seconds that the greedy picks of all strata will take.

    The real picks are timed on some rows and on a quarter of them; the exponent of their growth
    is the mean of what that shows and of GROWTH. Of many rows, four times as many are timed too,
    and show the exponent: rows all alike in distance take their square and more.
    """
    sizes = np.bincount(strata)
    largest = int(sizes.max())

    def clock(size: int) -> float:
        rows = stretch(vectors, size)
        started = time.perf_counter()
        make_bins(rows, min(n_bins, size), similarity, n_left=n_left)
        return time.perf_counter() - started

    size = min(PICK_ROWS, largest)
    clock(size)  # warms up
    whole, growth = clock(size), GROWTH
    if size == PICK_ROWS:
        seen = np.log(whole / clock(size // 4)) / np.log(4)
        growth = (GROWTH + float(np.clip(seen, 1.0, 1.5))) / 2
    if largest >= 8 * size:
        more = clock(4 * size)
        growth = float(np.clip(np.log(more / whole) / np.log(4), 1.0, MOST_GROWTH))
        whole, size = more, 4 * size
    return float((whole * (sizes / size) ** growth).sum())


def time_coverage(vectors: Float[ndarray, "k d"], strata: Int[ndarray, " n"]) -> float:
    """Give the seconds that coverage takes: of some rows, and of half of them for the growth."""
    sizes = np.bincount(strata)
    n_parts = -(-sizes // MAX_ROWS)
    parts = np.repeat(sizes / np.maximum(n_parts, 1), n_parts)
    size = min(COVER_ROWS, int(parts.max()))
    whole, half = (_clock(cover_rows, stretch(vectors, k)) for k in (size, -(-size // 2)))
    growth = np.clip(np.log2(max(whole, 1e-9) / max(half, 1e-9)), *COVER_GROWTH)
    taken = whole * (parts / size) ** growth
    is_alone = 4 * parts**2 * count_threads(len(parts)) > TABLE_BYTES
    n_threads = count_threads(int((~is_alone).sum()))
    return float(taken[is_alone].sum() + taken[~is_alone].sum() / n_threads)


def time_balance(vectors: Float[ndarray, "k d"], strata: Int[ndarray, " n"]) -> float:
    """Give the seconds that `balance_rows` takes: all rows pass through every level of a tree."""
    sizes = np.bincount(strata)
    sizes = sizes[sizes > 1]
    if not len(sizes):
        return 0.0
    size = min(PICK_ROWS, int(sizes.max()))
    each = _clock(balance_rows, stretch(vectors, size)) / (size * np.log2(size))
    n_parts = int((-(-sizes // SMALL_ROWS)).sum())
    below = sizes @ np.log2(np.minimum(sizes, SMALL_ROWS)) / count_threads(n_parts)
    return float(each * (below + sizes @ np.log2(np.maximum(sizes / SMALL_ROWS, 1))))


def time_duplicates(vectors: Float[ndarray, "k d"], n_rows: int, threshold: float) -> float:
    """Give about the seconds that finding near-duplicates takes, if few rows are any."""
    size = min(PICK_ROWS, n_rows)
    order = np.arange(size)
    whole = _clock(lambda rows: find_duplicates(rows, order[: len(rows)], threshold),
                   stretch(vectors, size))  # fmt: skip
    n_parts = -(-n_rows // DUPLICATE_ROWS)
    return whole * n_parts * (n_rows / n_parts / size) ** 2


def _clock(work: Callable[[ndarray], object], rows: ndarray) -> float:
    """Time some work on rows, after a few of them that have loops compiled."""
    work(rows[:8])
    started = time.perf_counter()
    work(rows)
    return time.perf_counter() - started


def foresee_picks(
    vectors: Float[ndarray, "n d"],
    strata: Int[ndarray, " n"],
    n_bins: int,
    similarity: Similarity,
    n_left: int,
    *,
    can_part: bool,
) -> str | None:
    """Say in one line about how long the greedy picks will take, where that is long.

    Args:
        vectors: All rows.
        strata: Stratum of every row.
        n_bins: Bins of a stratum.
        similarity: "cosine" or "euclidean".
        n_left: Numbers of the left factor where rows are outer products.
        can_part: Whether the rows may be parted instead.
    """
    if np.bincount(strata).max() < MANY_ROWS:
        return None
    seconds = time_picks(vectors, strata, n_bins, similarity, n_left)
    if seconds < LONG_SECONDS:
        return None
    long = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.0f} hours"
    advice = "; --partition kmeans picks within parts of similar rows, in much less" * can_part
    return f"the selection will take about {long}, slower as it goes on{advice}"


def probe_tables(
    strata: Int[ndarray, " n"], request: CompressConfig, labels: list[str]
) -> tuple[float, dict[str, int]]:
    """Give the seconds that order and tables take, and the bytes of the two files."""
    n_rows = len(strata)
    size = min(n_rows, TABLE_ROWS)
    rng = np.random.default_rng(0)
    bins = one_bin(strata[np.linspace(0, n_rows - 1, size).astype(int)])
    kind = bins_kind(request.method)
    if kind != "none":
        n_bins = request.n_bins if kind == "dq" else 1
        place = rng.permutation(size)
        gains = np.full(size, np.nan) if kind == "blocks" else rng.normal(size=size)
        bins = Bins(bin=place % n_bins, rank=place // n_bins, gain=gains, stratum=bins.stratum)
    marks = Marks()
    if kind == "coverage":
        n_near = round(1 + np.log(np.bincount(strata).max()))
        ranks = np.sort(np.exp(rng.uniform(0, np.log(size), (size, n_near))), axis=1)
        marks = Marks(nearest=(np.arange(size + 1) * n_near, ranks.astype(np.int64).ravel()))
    ratio = max(request.keep_ratio, 1 / size)
    like = CompressConfig(request.dataset, keep_ratio=ratio, method="dq", n_bins=request.n_bins)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        order = order_rows(bins)
        write_selection(Path(folder), bins, kind, order, like, labels, None, marks)
        seconds = time.perf_counter() - started
        found = {name: (Path(folder) / name).stat().st_size for name in (SELECTION_FILE, BINS_FILE)}
    found[SELECTION_FILE] = round(found[SELECTION_FILE] * n_rows / size)
    return seconds * n_rows / size, found


def time_scores(counts: list[int], n_features: int) -> float:
    """Give the seconds that discriminator and diversity take, embedding not counted.

    Args:
        counts: Sampled rows of each bin.
        n_features: Numbers that the discriminator sees of a row.
    """
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(LEARN_ROWS, n_features)).astype(np.float32)
    learn_directions(rows[:2], rows[:2])  # warms up
    started = time.perf_counter()
    learn_directions(rows, rows)
    learning = (time.perf_counter() - started) / count_steps(LEARN_ROWS)
    some = rng.normal(size=(DIVERSITY_ROWS, 2 * OUT)).astype(np.float32)
    some /= np.linalg.norm(some, axis=1, keepdims=True)
    started = time.perf_counter()
    diversity(some, some)
    pairs = (time.perf_counter() - started) / DIVERSITY_ROWS**2
    return count_steps(sum(counts)) * learning + pairs * sum(size**2 for size in counts)


def time_surprisal(adapter: Adapter, n_rows: int) -> float:
    """Give the seconds that the surprisal of all rows takes."""
    size = min(n_rows, TABLE_ROWS // 25)
    started = time.perf_counter()
    adapter.surprisal(np.zeros(size, dtype=np.int64))
    lengths = adapter.lengths() + 1
    return (time.perf_counter() - started) * float(lengths.sum() / lengths[:size].sum())


def probe_subset(
    dataset: "Dataset",
    strata: Int[ndarray, " n"],
    n_kept: int,
    seed: int,
    dropper: "PatchDropper | None" = None,
) -> tuple[float, dict[str, int]]:
    """Write some rows as a subset, in a temporary folder, for the seconds and bytes of all.

    The rows are of the random subset of the same size and seed, which for other methods stands
    for the rows they will keep.

    Returns:
        Seconds, and bytes: data (uncompressed), files.
    """
    import pyarrow as pa

    from dq_multimodal.stages.patch_records import drop_patches

    picks = np.flatnonzero(order_rows(one_bin(strata), seed=seed) < n_kept)
    row_bytes = (subset.count_bytes(dataset.select(picks[:64])) or 0) // len(picks[:64]) + 1
    size = min(n_kept, SUBSET_ROWS, max(64, SUBSET_BYTES // row_bytes))
    if dropper is not None:
        size = min(size, PATCH_ROWS)
    picks = picks[np.linspace(0, n_kept - 1, size).astype(int)]
    rng = np.random.default_rng(0)
    numbers = {"row": picks, "bin": rng.integers(10, size=size), "rank": rng.permutation(n_kept)}
    kept = pa.table({name: values[:size] for name, values in numbers.items()})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        started = time.perf_counter()
        records = None
        if dropper is not None:
            records = drop_patches(dataset, dropper.column, picks, dropper.drop, folder)
        n_bytes = subset.write_subset(dataset, picks, kept, folder, records)
        seconds = time.perf_counter() - started
        stored = sum(path.stat().st_size for path in subset.subset_files(folder))
    times = n_kept / size
    found = {"subset_data": round(n_bytes * times), "subset_files": round(stored * times)}
    return seconds * times, found
