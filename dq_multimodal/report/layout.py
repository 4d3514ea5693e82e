"""The map: some rows as points in the plane, alike rows near each other."""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.report.compare import sample_rows
from dq_multimodal.report.vectors import Vectors

N_COMPONENTS = 50
N_ITERATIONS = 500
PERPLEXITY = 30.0
N_NEIGHBOURS = 15
MIN_ROWS = 8
"""Fewer different rows than this are laid out by their main directions alone."""


def sample_points(
    readable: Bool[ndarray, " n"], kept: Bool[ndarray, " n"], size: int, seed: int
) -> Int[ndarray, " k"]:
    """Choose the rows to show: kept and left out in the proportion of the whole, within a row.

    Args:
        readable: Which rows have an embedding; the others cannot be placed.
        kept: Which rows are kept.
        size: At most so many.
        seed: Seed of the hash that draws them.

    Returns:
        Row numbers, ascending.
    """
    ours, others = np.flatnonzero(readable & kept), np.flatnonzero(readable & ~kept)
    total = len(ours) + len(others)
    if total <= size:
        return np.flatnonzero(readable)
    n_ours = min(len(ours), max(1, round(size * len(ours) / total)))
    chosen = [sample_rows(ours, n_ours, seed), sample_rows(others, size - n_ours, seed)]
    return np.sort(np.concatenate(chosen))


def gram_matrix(vectors: Vectors, rows: Int[ndarray, " k"]) -> Float[ndarray, "k k"]:
    """Give all inner products of some rows; of unit rows for cosine similarity."""
    block = vectors.take(rows)
    return block.products(block).astype(np.float64)


def place_points(gram: Float[ndarray, "k k"]) -> Float[ndarray, "k 2"]:
    """Lay rows out in the plane by t-SNE of their main directions, which inner products tell.

    Rows that are equal share a place, spread by a hair so that each can be seen. One thread, so
    that sums come out the same in every run; more of them gain little, and lose much where other
    programs want the cores.

    Args:
        gram: Inner products of all pairs.

    Returns:
        Coordinates in [0, 1].
    """
    from threadpoolctl import threadpool_limits

    squares = np.diag(gram)
    distances = squares[:, None] + squares - 2 * gram
    scale = max(float(squares.max(initial=0.0)), 1e-12)
    first = np.argmax(distances <= 1e-6 * scale, axis=1)  # the first row that is equal
    unique, where = np.unique(first, return_inverse=True)
    with threadpool_limits(1):
        directions = _main_directions(gram[np.ix_(unique, unique)])
        places = _tsne(directions) if len(unique) >= MIN_ROWS else _flat(directions)
    low, high = places.min(axis=0), places.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    places = np.where(high > low, (places - low) / span, 0.5)[where.reshape(-1)]
    return np.clip(places + _spread(where.reshape(-1)), 0.0, 1.0)


def _main_directions(gram: Float[ndarray, "k k"]) -> Float[ndarray, "k d"]:
    """Give the principal components of rows from their inner products."""
    from scipy.sparse.linalg import eigsh

    means = gram.mean(axis=0)
    centred = gram - means - means[:, None] + means.mean()
    if len(gram) <= 2 * N_COMPONENTS:
        values, vectors = np.linalg.eigh(centred)
    else:
        start = np.random.default_rng(0).standard_normal(len(gram))
        values, vectors = eigsh(centred, k=N_COMPONENTS, v0=start)
    order = np.argsort(-values)[:N_COMPONENTS]
    values, vectors = values[order], vectors[:, order]
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(len(order))]
    vectors = vectors * np.where(peaks < 0, -1, 1)  # signs are free: the same everywhere
    return vectors * np.sqrt(np.maximum(values, 0))


def _tsne(directions: Float[ndarray, "k d"]) -> Float[ndarray, "k 2"]:
    from sklearn.manifold import TSNE

    start = _flat(directions)
    deviation = float(start[:, 0].std())
    start = start / deviation * 1e-4 if deviation > 0 else start
    net = TSNE(
        n_components=2,
        perplexity=min(PERPLEXITY, (len(directions) - 1) / 3),
        init=start.astype(np.float32),
        max_iter=N_ITERATIONS,
        random_state=0,
    )
    return net.fit_transform(directions.astype(np.float32)).astype(np.float64)


def _flat(directions: Float[ndarray, "k d"]) -> Float[ndarray, "k 2"]:
    """Keep the first two directions."""
    flat = np.zeros((len(directions), 2))
    n_given = min(2, directions.shape[1])
    flat[:, :n_given] = directions[:, :n_given]
    return flat


def _spread(where: Int[ndarray, " k"]) -> Float[ndarray, "k 2"]:
    """Move rows of one place onto a small spiral around it (sunflower seeds)."""
    order = np.argsort(where, kind="stable")
    sizes = np.bincount(where)
    nth = np.empty(len(where))
    nth[order] = np.arange(len(where)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    radius = np.minimum(0.004 * np.sqrt(nth), 0.4)
    angle = nth * np.pi * (3 - 5**0.5)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def nearest_points(
    gram: Float[ndarray, "k k"], is_cosine: bool
) -> tuple[Int[ndarray, "k m"], Float[ndarray, "k m"]]:
    """Give the nearest other points of every point, nearest first, and their distances."""
    squares = np.diag(gram)
    if is_cosine:
        distances = 1 - gram
    else:
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * gram, 0))
    distances = np.maximum(distances, 0)
    np.fill_diagonal(distances, np.inf)
    size = min(N_NEIGHBOURS, len(gram) - 1)
    if not size:
        return np.zeros((len(gram), 0), dtype=np.int64), np.zeros((len(gram), 0))
    ids = np.sort(np.argpartition(distances, size - 1, axis=1)[:, :size], axis=1)
    found = np.take_along_axis(distances, ids, axis=1)
    by_distance = np.argsort(found, axis=1, kind="stable")
    ids = np.take_along_axis(ids, by_distance, axis=1)
    return ids, np.take_along_axis(found, by_distance, axis=1)
