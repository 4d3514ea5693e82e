"""The map: some rows as points in the plane, alike rows near each other."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.report.compare import Block, Vectors, nearest, sample_rows

N_NEIGHBOURS = 15
AT_ONCE = 512
N_LANDMARKS = 64
MIN_ROWS = 8
"""Fewer different rows than this are laid out by their main directions alone."""
N_STEPS = 150
N_PUSHES = 20
"""Other points that push a point away in a step."""
EXAGGERATION, EXAGGERATED = 8.0, 0.25
"""In the first quarter of the steps, points are pulled so many times as strongly."""
MOMENTUM = 0.5, 0.8


@dataclass(frozen=True)
class Map:
    """The rows that are shown as points."""

    rows: Int[ndarray, " k"]  # ascending
    places: Float[ndarray, "k 2"]  # in [0, 1]
    neighbour_ids: Int[ndarray, "k m"]  # the nearest other points, as positions among the points
    neighbour_distances: Float[ndarray, "k m"]
    near: Int[ndarray, " k"]  # the nearest kept row but itself; -1 where there is none
    near_distance: Float[ndarray, " k"]
    length: Int[ndarray, " k"]  # characters, or pixels; -1 where it cannot be read


def make_map(vectors: Vectors, kept: Bool[ndarray, " n"], size: int, seed: int) -> Map | None:
    """Choose the points, lay them out, and find the nearest kept row of each.

    Returns:
        None where no row has an embedding; lengths are -1 until the rows are read.
    """
    rows = sample_points(~vectors.is_blank, kept, size, seed)
    if not len(rows):
        return None
    block = vectors.take(rows)
    first, ids, distances = nearest_points(vectors, block)
    unique, where = np.unique(first, return_inverse=True)
    some = block[unique]
    near = ids if len(unique) == len(rows) else nearest_points(vectors, some)[1]
    places = place_points(some, near)[where.reshape(-1)]
    places = np.clip(places + _spread(where.reshape(-1)), 0.0, 1.0)
    targets = np.flatnonzero(kept & ~vectors.is_blank)
    return Map(
        rows, places, ids, distances, *nearest(vectors, rows, targets), np.full(len(rows), -1)
    )


def sample_points(
    readable: Bool[ndarray, " n"], kept: Bool[ndarray, " n"], size: int, seed: int
) -> Int[ndarray, " k"]:
    """Choose rows to show, ascending: kept and left out in the proportion of all, within a row."""
    ours, others = np.flatnonzero(readable & kept), np.flatnonzero(readable & ~kept)
    total = len(ours) + len(others)
    if total <= size:
        return np.flatnonzero(readable)
    n_ours = min(len(ours), max(1, round(size * len(ours) / total)))
    chosen = [sample_rows(ours, n_ours, seed), sample_rows(others, size - n_ours, seed)]
    return np.sort(np.concatenate(chosen))


def nearest_points(
    vectors: Vectors, block: Block
) -> tuple[Int[ndarray, " k"], Int[ndarray, "k m"], Float[ndarray, "k m"]]:
    """Compare all points with one another.

    Returns:
        The first point that is equal to each, the nearest other points of each, nearest first,
        and their distances.
    """
    size, scale = min(N_NEIGHBOURS, len(block) - 1), float(block.squares.max())
    first = np.empty(len(block), dtype=np.int64)
    ids = np.empty((len(block), size), dtype=np.int64)
    distances = np.empty((len(block), size))
    for start in range(0, len(block), AT_ONCE):
        part = slice(start, min(start + AT_ONCE, len(block)))
        products = block[part].products(block)
        squares = block.squares[part, None]
        first[part] = np.argmax(squares + block.squares - 2 * products <= 1e-6 * scale, axis=1)
        apart = vectors.distances(products, squares, block.squares)
        at = np.arange(part.stop - start)
        apart[at, start + at] = np.inf
        near = np.sort(np.argpartition(apart, max(size - 1, 0), axis=1)[:, :size], axis=1)
        found = np.take_along_axis(apart, near, axis=1)
        by_distance = np.argsort(found, axis=1, kind="stable")
        ids[part] = np.take_along_axis(near, by_distance, axis=1)
        distances[part] = np.take_along_axis(found, by_distance, axis=1)
    return first, ids, distances


def place_points(block: Block, near: Int[ndarray, "k m"]) -> Float[ndarray, "k 2"]:
    r"""Lay points out in the plane by t-SNE of the graph of their nearest points.

    Neighbours pull each other with equal weight; what pushes a point away is estimated from other
    points drawn by chance, $\sum_j q_{ij}^2 (y_i - y_j) / \sum_{kl} q_{kl}$ with
    $q_{ij} = 1 / (1 + |y_i - y_j|^2)$ (van der Maaten and Hinton 2008). It starts from the two main
    directions, takes a set number of steps, and is seeded.

    Args:
        block: The points, all of them different.
        near: The nearest other points of each.

    Returns:
        Coordinates in [0, 1].
    """
    y = _main_directions(block)
    if len(block) >= MIN_ROWS:
        y = _pull_and_push(y, near)
    low, high = y.min(axis=1, keepdims=True), y.max(axis=1, keepdims=True)
    span = np.where(high > low, high - low, 1.0)
    return np.where(high > low, (y - low) / span, 0.5).T.astype(np.float64)


def _main_directions(block: Block) -> Float[ndarray, "2 k"]:
    """Give the two main directions of the inner products with some of the points."""
    marks = np.unique(np.linspace(0, len(block) - 1, N_LANDMARKS).astype(int))
    values = block.products(block[marks]).astype(np.float64)
    values -= values.mean(axis=0)
    directions = np.linalg.eigh(values.T @ values)[1][:, ::-1][:, :2]
    peaks = directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])]
    flat = np.zeros((2, len(block)))
    flat[: len(peaks)] = (values @ (directions * np.sign(peaks))).T  # signs are free
    return flat


def _pull_and_push(y: Float[ndarray, "2 k"], near: Int[ndarray, "k m"]) -> Float[ndarray, "2 k"]:
    n, size = near.shape
    pairs = np.sort(np.stack([np.repeat(np.arange(n), size), near.ravel()]), axis=0)
    (left, right), counts = np.unique(pairs, axis=1, return_counts=True)
    weights = (counts / (2 * counts.sum())).astype(np.float32)
    y = (y / max(float(y[0].std()), 1e-12) * 1e-2).astype(np.float32)
    move, rng, total = np.zeros_like(y), np.random.default_rng(0), 0.0
    n_pushes = min(N_PUSHES, n - 1)
    for step in range(N_STEPS):
        is_early = step < EXAGGERATED * N_STEPS
        apart = y[:, left] - y[:, right]
        pull = apart * (weights / (1 + np.square(apart).sum(axis=0)))
        pulls = [np.bincount(left, part, n) - np.bincount(right, part, n) for part in pull]
        order = rng.permutation(n)
        mixed = y[:, order]
        twice = np.concatenate([mixed, mixed], axis=1)
        pushes, q_sum = np.zeros_like(y), 0.0
        for shift in rng.permutation(n - 1)[:n_pushes] + 1:
            apart = mixed - twice[:, shift : shift + n]
            q = 1 / (1 + np.square(apart).sum(axis=0))
            q_sum += float(q.sum())
            pushes += q * q * apart
        total = 0.8 * total + 0.2 * q_sum if step else q_sum
        gradient = (
            np.stack(pulls) * (EXAGGERATION if is_early else 1.0)
            - pushes[:, np.argsort(order)] / total
        )
        rate = n / 10 * min(1.0, 2 * (1 - step / N_STEPS))
        move = MOMENTUM[not is_early] * move - (4 * rate * gradient).astype(np.float32)
        y = y + move
    return y


def _spread(where: Int[ndarray, " k"]) -> Float[ndarray, "k 2"]:
    """Move points of one place onto a small spiral around it (sunflower seeds)."""
    order = np.argsort(where, kind="stable")
    sizes = np.bincount(where)
    nth = np.empty(len(where))
    nth[order] = np.arange(len(where)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    radius = np.minimum(0.004 * np.sqrt(nth), 0.4)
    angle = nth * np.pi * (3 - 5**0.5)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
