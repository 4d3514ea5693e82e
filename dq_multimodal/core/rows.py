"""The rows of one stratum as the greedy sees them: scaled or centred, and which are equal."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from dq_multimodal.config import Similarity
from dq_multimodal.core.hashing import row_hash

BLOCK_ROWS = 1024
"""Rows that are copied or multiplied at once."""


class Rows(NamedTuple):
    """Rows where they lie, and what prepares them: (numbers x unit - mean) x factor.

    Attributes:
        values: (N, w) floats of any width, float16 as its bits; may be memory-mapped.
        is_half: Whether they are float16.
        place: (n,) where the rows lie among the values.
        n_left: Numbers of the left factor of an outer product; 0 for plain rows.
        units: (2, n) power of two for the left factor, and for the other numbers.
        factors: (2, n) factor for the same.
        mean: (w - n_left,) mean of the other numbers.
        squares: (n,) squared norms of the prepared rows.
        unit: Gains of the rows as given are those of the prepared rows times its square.
    """

    values: Shaped[ndarray, "N w"]
    is_half: bool
    place: Int[ndarray, " n"]
    n_left: int
    units: Float[ndarray, "2 n"]
    factors: Float[ndarray, "2 n"]
    mean: Float[ndarray, " d"]
    squares: Float[ndarray, " n"]
    unit: float


def prepare_rows(
    values: Float[ndarray, "N w"],
    members: Int[ndarray, " n"],
    similarity: Similarity,
    n_left: int = 0,
) -> Rows:
    """Find what prepares some rows; none of them is copied.

    Cosine rows get unit norm, rows of zeros stay zero. Euclidean rows are divided by a power of two
    near the largest value and moved to their mean, which changes no distance and makes rounding
    small. Both factors of outer products are scaled, and they are not moved: a moved one is no
    product any more. If their mean is far longer than they are from one another, rounding decides
    more of the euclidean picks.

    Args:
        values: Finite floats of any width.
        members: Which of its rows, ascending.
        similarity: Which gain the rows are prepared for.
        n_left: Numbers of the left factor, where rows are outer products; else 0.
    """
    from dq_multimodal.core import picking

    size, is_half, unit = len(members), values.dtype == np.float16, 1.0
    numbers = values.view(np.uint16 if is_half else values.dtype)
    numbers.flags.writeable = False  # as where they are mapped: one compilation serves both
    units, factors, mean = (
        np.ones((2, size)),
        np.ones((2, size)),
        np.zeros(values.shape[1] - n_left),
    )
    rows = Rows(numbers, is_half, members, n_left, units, factors, mean, np.empty(size), unit)
    for part in (0, 1) if n_left else (1,):
        picking.scale_rows(rows, part)
        if similarity == "euclidean":
            units[part], factors[part] = units[part].min(), 1.0
            unit /= float(units[part, 0])
    if similarity == "euclidean" and not n_left:
        total = np.zeros((1, len(mean)))
        picking.add_rows(rows, np.arange(size), 1.0, total)
        mean[:] = total[0] / size
    picking.square_rows(rows)
    return rows._replace(unit=unit)


def find_equal(rows: Rows) -> tuple[Int[ndarray, " firsts"], Int[ndarray, " _"]]:
    """Find rows of equal numbers.

    Returns:
        The first row of every group of equal rows, ascending, and for every row the next one that
        is equal to it, -1 where there is none; empty where all rows differ.
    """
    from dq_multimodal.core import picking

    size, width = len(rows.place), rows.values.shape[1]
    hashes = np.empty(size, dtype=np.uint64)
    picking.hash_rows(rows, row_hash(0, width) | np.uint64(1), hashes)
    order = np.argsort(hashes, kind="stable")
    is_same = hashes[order[1:]] == hashes[order[:-1]]
    follows = np.flatnonzero(is_same)
    values = rows.values.view(np.float16) if rows.is_half else rows.values
    for start in range(0, len(follows), BLOCK_ROWS):
        at = follows[start : start + BLOCK_ROWS]
        pairs = (values[rows.place[order[at + k]]] for k in (0, 1))
        is_same[at] = np.equal(*pairs).all(axis=1)
    if not is_same.any():
        return np.arange(size), np.empty(0, dtype=np.int64)
    next_equal = np.full(size, -1)
    next_equal[order[:-1][is_same]] = order[1:][is_same]
    is_first = np.ones(size, dtype=bool)
    is_first[order[1:][is_same]] = False
    return np.flatnonzero(is_first), next_equal
