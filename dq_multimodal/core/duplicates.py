"""Near-duplicates: which rows repeat a row that comes before them in an order."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.core.balance import whole_rows
from dq_multimodal.core.bins import as_matrix
from dq_multimodal.core.coverage import cut_rows
from dq_multimodal.core.hashing import row_hash
from dq_multimodal.core.partition import GRID

MAX_ROWS = 100_000
"""Rows that are all compared with one another."""
BLOCK_ROWS = 1024
KEPT_ROWS = 8192
"""Rows of a block and of the rows before it whose cosines are worked out at once."""
COSINE_BITS = 20


def find_duplicates(
    embeddings: Any,
    order: Int[ndarray, " n"],
    threshold: float | int,
    *,
    on_pairs: Callable[[int], object] | None = None,
) -> Int[ndarray, " n"]:
    r"""Find the row that each row repeats, where there is one; -1 else.

    The rows are gone through in an order. A row is a duplicate of the first row before it that is
    no duplicate itself and has a cosine with it of at least the threshold. So of rows that
    resemble one another the first stays, rows that only a chain of others joins are no duplicates,
    and each duplicate resembles the row that stays for it.

    Cosines count in multiples of $2^{-20}$, so that equal directions have a cosine of 1, and are
    worked out in float64 from rows on a grid (see `partition_rows`) wherever float32 leaves a
    doubt: they are the same on every machine. Rows of equal direction are compared once. Rows of
    zeros are nobody's duplicates. More than 100,000 rows are compared within parts of similar rows
    by k-means; pairs between two parts are missed.

    Args:
        embeddings: See `as_matrix`. Memory beside it is 8 bytes a number of the largest part.
        order: Place of each row.
        threshold: Least cosine, in (0, 1].
        on_pairs: Called now and then with the number of pairs compared since (for progress bars).

    Raises:
        InputError: If order has another length, or the threshold is out of range.
    """
    values = as_matrix(embeddings)
    if order.shape != (len(values),):
        raise InputError(
            f"order must hold one place for each of the {len(values)} rows, got {order.shape}"
        )
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must lie in (0, 1], got {threshold}")
    found = np.full(len(values), -1, dtype=np.int64)
    rows = np.flatnonzero(values.any(axis=1))
    for part in cut_rows(values, rows, MAX_ROWS) if len(rows) else []:
        part = part[np.argsort(order[part], kind="stable")]
        units = whole_rows(values, part)
        first = _first_equal(units)
        distinct = np.flatnonzero(first == np.arange(len(part)))
        same = np.arange(len(part))
        units = units[distinct]
        same[distinct] = distinct[_walk_rows(units, float(threshold), on_pairs)]
        same = same[first]
        is_duplicate = same != np.arange(len(part))
        found[part[is_duplicate]] = part[same[is_duplicate]]
    return found


def _first_equal(units: Int32[ndarray, "n d"]) -> Int[ndarray, " n"]:
    """Give for each row the first that is equal to it; a collision of hashes may hide one."""
    odd = row_hash(0, units.shape[1]) | np.uint64(1)
    hashes = np.empty(len(units), dtype=np.uint64)
    for start in range(0, len(units), BLOCK_ROWS):
        bits = units[start : start + BLOCK_ROWS].view(np.uint32)
        hashes[start : start + BLOCK_ROWS] = np.einsum("ij,j->i", bits, odd)
    order = np.argsort(hashes, kind="stable")
    is_new = np.ones(len(units), dtype=bool)
    is_new[1:] = hashes[order[1:]] != hashes[order[:-1]]
    for at in np.flatnonzero(~is_new):
        is_new[at] = (units[order[at]] != units[order[at - 1]]).any()
    first = np.empty(len(units), dtype=np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def _walk_rows(
    units: Int32[ndarray, "n d"], threshold: float, on_pairs: Callable[[int], object] | None
) -> Int[ndarray, " n"]:
    """Go through distinct rows in their order; give the row that stays for each, or itself."""
    n_rows, width = units.shape
    same = np.arange(n_rows)
    kept = np.empty(n_rows, dtype=np.int64)
    narrow = np.empty((n_rows, width), dtype=np.float32)  # of the rows that stay
    slack = np.float32(threshold - (width + 4) * 2.0**-24 - 2.0**-COSINE_BITS)
    n_kept = 0
    for start in range(0, n_rows, BLOCK_ROWS):
        block = np.arange(start, min(start + BLOCK_ROWS, n_rows))
        rows = units[block] * GRID
        rows32 = rows.astype(np.float32)
        for at in range(0, n_kept, KEPT_ROWS):
            upto = min(at + KEPT_ROWS, n_kept)
            may_be = rows32 @ narrow[at:upto].T >= slack
            may_be[same[block] != block] = False
            _settle(may_be, rows, units, kept[at:upto], block, threshold, same)
        left = block[same[block] == block]
        rows = rows[left - start]
        is_near = _cosines(rows @ rows.T) >= threshold
        for i in np.flatnonzero(np.tril(is_near, -1).any(axis=1)):
            earlier = is_near[i, :i] & (same[left[:i]] == left[:i])
            if earlier.any():
                same[left[i]] = left[np.argmax(earlier)]
        is_kept = same[left] == left
        stay = left[is_kept]
        kept[n_kept : n_kept + len(stay)] = stay
        narrow[n_kept : n_kept + len(stay)] = rows[is_kept]
        if on_pairs is not None:
            on_pairs(len(block) * n_kept + len(left) * (len(left) - 1) // 2)
        n_kept += len(stay)
    return same


def _settle(
    may_be: Bool[ndarray, "b k"],
    rows: Float[ndarray, "b d"],
    units: Int32[ndarray, "n d"],
    kept: Int[ndarray, " k"],
    block: Int[ndarray, " b"],
    threshold: float,
    same: Int[ndarray, " n"],
) -> None:
    """Write down the first row that stays for each row of a block, of those that may be it."""
    open_rows = np.flatnonzero(may_be.any(axis=1))
    while len(open_rows):
        column = np.argmax(may_be[open_rows], axis=1)
        products = np.vecdot(rows[open_rows], units[kept[column]] * GRID)
        is_it = _cosines(products) >= threshold
        same[block[open_rows[is_it]]] = kept[column[is_it]]
        open_rows, column = open_rows[~is_it], column[~is_it]
        may_be[open_rows, column] = False
        open_rows = open_rows[may_be[open_rows].any(axis=1)]


def _cosines(products: Float[ndarray, "*shape"]) -> Float[ndarray, "*shape"]:
    return np.rint(np.ldexp(products, COSINE_BITS)) * 2.0**-COSINE_BITS
