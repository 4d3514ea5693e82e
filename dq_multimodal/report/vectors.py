"""Embeddings ready for comparing many pairs: in blocks, float32, never all pairs at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.config import Similarity

SCAN_ROWS = 65536
QUERY_NUMBERS = 2**25
"""Numbers of the queries that are held at once: 128 MiB."""
QUERY_ROWS = 2048
TARGET_ROWS = 8192

OnPairs = Callable[[int], object]


@dataclass(frozen=True)
class Block:
    """Some rows, ready: inner products are products of the inner products of the factors.

    Attributes:
        factors: One (b, d) float32 array, or two where rows are outer products.
        squares: Squared norm of each row.
    """

    factors: list[Float[ndarray, "b d"]]
    squares: Float[ndarray, " b"]

    def __len__(self) -> int:
        return len(self.squares)

    def __getitem__(self, rows: "slice | ndarray") -> "Block":
        return Block([factor[rows] for factor in self.factors], self.squares[rows])

    def products(self, other: "Block") -> Float[ndarray, "b c"]:
        """Give the inner products of these rows with others."""
        tile = self.factors[0] @ other.factors[0].T
        for mine, theirs in zip(self.factors[1:], other.factors[1:], strict=True):
            tile *= mine @ theirs.T
        return tile


class Vectors:
    """The embeddings of a run, opened for comparisons.

    Cosine rows get unit norm. Euclidean ones are moved to their mean, which changes no distance
    and makes float32 precise enough; outer products are not moved, since a moved one is no
    product any more. Rows of zeros stand for rows that could not be read.

    Args:
        embeddings: (n, d) finite floats, memory-mapped or not.
        similarity: "cosine" or "euclidean".
        n_left: For outer products, how many of the d numbers are the left factor; else 0.
    """

    def __init__(self, embeddings: ndarray, similarity: Similarity, n_left: int = 0) -> None:
        self.values, self.similarity, self.n_left = embeddings, similarity, n_left
        self.is_blank = np.zeros(len(embeddings), dtype=bool)
        total, self.unit = np.zeros(embeddings.shape[1]), 1.0
        largest = 0.0
        for start in range(0, len(embeddings), SCAN_ROWS):
            block = np.asarray(embeddings[start : start + SCAN_ROWS])
            self.is_blank[start : start + SCAN_ROWS] = ~block.any(axis=1)
            largest = max(largest, float(np.abs(block).max(initial=0)))
            total += block.sum(axis=0, dtype=np.float64)
        if similarity == "euclidean" and largest > 0:
            self.unit = largest
        is_moved = similarity == "euclidean" and not n_left
        self.centre = total / max(1, len(embeddings)) / self.unit if is_moved else 0.0 * total

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dimension(self) -> int:
        """Numbers of an embedding as stored."""
        return int(self.values.shape[1])

    def _factors(self, rows: Int[ndarray, " b"]) -> list[Float[ndarray, "b d"]]:
        """Read rows as float64 factors, scaled (and, plain euclidean ones, moved)."""
        values = np.asarray(self.values[rows], dtype=np.float64)
        if self.similarity == "euclidean":
            values = values / self.unit - self.centre
        parts = [values[:, : self.n_left], values[:, self.n_left :]] if self.n_left else [values]
        if self.similarity == "euclidean":
            return parts
        return [_unit_norm(part) for part in parts]

    def take(self, rows: Int[ndarray, " b"]) -> Block:
        """Read rows, ready for `Block.products`."""
        factors = [np.ascontiguousarray(f, dtype=np.float32) for f in self._factors(rows)]
        squares = np.ones(len(rows), dtype=np.float32)
        for factor in factors:
            squares *= np.einsum("ij,ij->i", factor, factor)
        return Block(factors, squares)

    def distances(self, rows: Int[ndarray, " k"], others: Int[ndarray, " k"]) -> ndarray:
        """Give the distance of each row to its partner in float64: 1 - cosine, or euclidean."""
        found = np.zeros(len(rows))
        for start in range(0, len(rows), 4096):
            part = slice(start, start + 4096)
            mine, theirs = self._factors(rows[part]), self._factors(others[part])
            if self.similarity == "euclidean" and not self.n_left:
                found[part] = np.linalg.norm(mine[0] - theirs[0], axis=1) * self.unit
                continue
            product = _dots(mine, theirs)
            if self.similarity == "cosine":
                found[part] = 1 - product
                continue
            squares = _dots(mine, mine) + _dots(theirs, theirs) - 2 * product
            found[part] = np.sqrt(np.maximum(squares, 0)) * self.unit**2
        found[rows == others] = 0.0
        return np.maximum(found, 0.0)


def _unit_norm(rows: Float[ndarray, "n d"]) -> Float[ndarray, "n d"]:
    """Give rows unit norm without overflow; rows of zeros stay."""
    peak = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    rows = rows / np.where(peak > 0, peak, 1.0)
    norm = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows / np.where(norm > 0, norm, 1.0)


def _dots(left: list[ndarray], right: list[ndarray]) -> Float[ndarray, " n"]:
    found = np.ones(len(left[0]))
    for mine, theirs in zip(left, right, strict=True):
        found *= np.einsum("ij,ij->i", mine, theirs)
    return found


def nearest(
    vectors: Vectors,
    queries: Int[ndarray, " q"],
    targets: Int[ndarray, " t"],
    *,
    is_self_allowed: bool = True,
    on_pairs: OnPairs | None = None,
) -> tuple[Int[ndarray, " q"], Float[ndarray, " q"]]:
    """Find the nearest target row of every query row.

    The nearest is found in float32, its distance then computed in float64.

    Args:
        vectors: The embeddings.
        queries: Row numbers.
        targets: Row numbers, ascending, at least one.
        is_self_allowed: Whether a row may be its own nearest target.
        on_pairs: Called now and then with the number of pairs compared since.

    Returns:
        Row number and distance of the nearest target; -1 and NaN where there is none.
    """
    found = np.full(len(queries), -1, dtype=np.int64)
    at_once = max(QUERY_ROWS, QUERY_NUMBERS // vectors.dimension)
    for first in range(0, len(queries), at_once):
        rows = queries[first : first + at_once]
        block = vectors.take(rows)
        best = np.full(len(rows), -np.inf, dtype=np.float32)
        for start in range(0, len(targets), TARGET_ROWS):
            theirs = targets[start : start + TARGET_ROWS]
            other = vectors.take(theirs)
            for part in _parts(len(rows), QUERY_ROWS):
                tile = block[part].products(other)
                if vectors.similarity == "euclidean":
                    tile -= other.squares / 2  # of equal order: -|a - b|^2 / 2 + |a|^2 / 2
                if not is_self_allowed:
                    place = np.searchsorted(theirs, rows[part])
                    place[place == len(theirs)] = 0
                    own = np.flatnonzero(theirs[place] == rows[part])
                    tile[own, place[own]] = -np.inf
                top = tile.argmax(axis=1)
                score = tile[np.arange(len(top)), top]
                is_better = score > best[part]
                best[part][is_better] = score[is_better]
                found[first : first + at_once][part][is_better] = theirs[top[is_better]]
                if on_pairs is not None:
                    on_pairs(tile.size)
    is_found = found >= 0
    distances = np.full(len(queries), np.nan)
    distances[is_found] = vectors.distances(queries[is_found], found[is_found])
    return found, distances


def _parts(n_rows: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))


def nearest_in_sets(
    vectors: Vectors,
    queries: Int[ndarray, " q"],
    sets: Bool[ndarray, "s n"],
    *,
    on_pairs: OnPairs | None = None,
) -> Float[ndarray, "s q"]:
    """Find the distance of every query row to the nearest other row of each of several sets.

    Each pair is compared once, however many sets the row is in, in float32.

    Args:
        vectors: The embeddings.
        queries: Row numbers, ascending.
        sets: Which rows are in each set.
        on_pairs: Called now and then with the number of pairs compared since.

    Returns:
        Distances; infinite where a set has no other row.
    """
    block = vectors.take(queries)
    best = np.full((len(sets), len(queries)), -np.inf, dtype=np.float32)
    targets = np.flatnonzero(sets.any(axis=0))
    for start in range(0, len(targets), QUERY_ROWS):
        rows = targets[start : start + QUERY_ROWS]
        other = vectors.take(rows)
        tile = other.products(block)
        if vectors.similarity == "euclidean":
            tile -= other.squares[:, None] / 2  # of equal order: -|a - b|^2 / 2 + |a|^2 / 2
        place = np.minimum(np.searchsorted(queries, rows), len(queries) - 1)
        own = np.flatnonzero(queries[place] == rows)
        tile[own, place[own]] = -np.inf
        for products, is_in in zip(tile, sets[:, rows].T, strict=True):
            for number in np.flatnonzero(is_in):
                np.maximum(best[number], products, out=best[number])
        if on_pairs is not None:
            on_pairs(tile.size)
    if vectors.similarity == "cosine":
        return np.maximum(1 - best.astype(np.float64), 0)
    squares = block.squares.astype(np.float64) - 2 * best.astype(np.float64)
    return np.sqrt(np.maximum(squares, 0)) * vectors.unit ** (2 if vectors.n_left else 1)
