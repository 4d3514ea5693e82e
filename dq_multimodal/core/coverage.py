"""Coverage: the order in which rows are picked greedily to be near to all rows of their stratum."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.core.bins import as_matrix, count_threads, for_each, split_strata, stratum_codes
from dq_multimodal.core.compiled import compile_loop
from dq_multimodal.core.partition import Directions, partition_rows

MAX_ROWS = 20_000
"""Rows whose cosines with one another are held in one table, 1.6 GB."""
TABLE_BYTES = 2 * 10**9
"""Tables that are held side by side take no more than this."""
COSINE_BITS, WEIGHT_BITS = 30, 16
"""Cosines are whole multiples of 2^-30; weights are of 2^-16 of the largest of their stratum."""
TILE_VALUES = 2**21
PICKS_A_CALL = 256
BLOCK_ROWS = 64
"""Bounds whose largest is kept, so that the largest of all is found without reading all."""
RECORD_ROWS = 4
"""Room for so many records for each row in a call of the loop."""


@dataclass(frozen=True)
class Coverage:
    """The greedy order of every stratum, and what each pick came nearest to.

    Attributes:
        rank: Place of each row in the order of its stratum, from 0.
        gain: What F gained when the row was picked: cosine times weight, at least 0.
        nearest: The records, as (offsets, ranks): those of row i are
            `ranks[offsets[i] : offsets[i + 1]]`, ascending: the ranks of the picks that were one
            after the other the nearest to it, from 0 to its own. In a stratum of several parts
            0 is followed by picks of its part alone.
    """

    rank: Int[ndarray, " n"]
    gain: Float[ndarray, " n"]
    nearest: tuple[Int[ndarray, " n_1"], Int[ndarray, " m"]]


def cover_rows(
    embeddings: Any,
    strata: Any = None,
    weights: Any = None,
    *,
    max_rows: int = MAX_ROWS,
    on_picks: Callable[[int], object] | None = None,
) -> Coverage:
    r"""Order the rows of every stratum so that each prefix covers the stratum well.

    The rows S of a stratum cover it by facility location,

    $$F(S) = \sum_i w_i \max(0, \max_{j \in S} \cos(x_i, x_j)),$$

    (CRAIG, Mirzasoleiman et al., ICML 2020), and the next row is always the one that adds most to
    F. A prefix of any length has at least 1 - 1/e of the best F of that many rows (Nemhauser,
    Wolsey and Fisher 1978). What a row adds only falls as S grows, so it is worked out anew only
    where its last value is the largest of all (Minoux 1978): the picks are the same.

    Rows are scaled to unit length and rounded to multiples of $2^{-26}$, so products are exact
    (see `partition_rows`); cosines are rounded to multiples of $2^{-30}$ and weights to multiples
    of $2^{-16}$ of the largest of the stratum. F is then a sum of whole numbers, below $2^{62}$ for
    up to 20,000 rows, and neither threads nor machine change a pick. Ties go to the lowest row,
    so rows that add nothing come by row number; rows of zeros, whose cosines are 0, come last.

    A stratum of more than `max_rows` rows is cut into parts of similar rows by k-means. Cosines
    between parts count as 0; the greedy of that F merges the orders of the parts by falling gain.

    Args:
        embeddings: See `as_matrix`.
        strata: (n,) labels of any type that sorts; None is one stratum.
        weights: (n,) finite weights of the rows that are covered, at least 0; None is 1 for all. A
            row of weight 0 can cover others.
        max_rows: Rows of the largest table, from 1 to 20,000; it takes 4 bytes a pair.
        on_picks: Called now and then with the number of rows picked since (for progress bars).

    Raises:
        InputError: If a number is wrong or out of range.
    """
    values = as_matrix(embeddings)
    n_rows = len(values)
    codes = stratum_codes(strata, n_rows)
    units, scales = _whole_weights(weights, codes)
    if isinstance(max_rows, bool) or int(max_rows) != max_rows or not 1 <= max_rows <= MAX_ROWS:
        raise InputError(f"max_rows must be a whole number from 1 to {MAX_ROWS}, got {max_rows}")
    is_zero: ndarray = np.logical_not(values.any(axis=1))
    gain = np.zeros(n_rows, dtype=np.int64)
    records: list[tuple[ndarray, ndarray]] = []

    def cover(members: Int[ndarray, " k"], tell: Callable[[int], None]) -> None:
        members = members[np.argsort(is_zero[members], kind="stable")]
        gain[members], rows, by = _pick_all(_make_table(values, members), units[members], tell)
        records.append((members[rows], members[by]))

    parts: list[ndarray] = []
    for members in split_strata(codes):
        parts += cut_rows(values, members, int(max_rows))
    is_large = [4 * len(part) ** 2 * count_threads(len(parts)) > TABLE_BYTES for part in parts]
    for part, alone in zip(parts, is_large, strict=True):
        if alone:
            for_each(cover, [part], on_picks)
    beside = [part for part, alone in zip(parts, is_large, strict=True) if not alone]
    for_each(cover, beside, on_picks)

    order = np.lexsort((np.arange(n_rows), -gain, is_zero, codes))
    sizes = np.bincount(codes)
    rank = np.empty(n_rows, dtype=np.int64)
    rank[order] = np.arange(n_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    others = [rows[by == by[0]] for rows, by in records if rank[by[0]]]  # parts without rank 0
    recorded = np.concatenate([*others, *(rows for rows, _ in records)])
    ranks = rank[np.concatenate([by for _, by in records])].astype(np.int32)
    ranks = np.concatenate([np.zeros(len(recorded) - len(ranks), dtype=np.int32), ranks])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(recorded, minlength=n_rows))])
    by_row = np.argsort(recorded, kind="stable")
    return Coverage(rank, gain * scales[codes], (offsets.astype(np.int64), ranks[by_row]))


def weigh_by_nearest(
    nearest: tuple[Int[ndarray, " n_1"], Int[ndarray, " m"]],
    rank: Int[ndarray, " n"],
    strata: Int[ndarray, " n"],
    is_kept: Bool[ndarray, " n"],
) -> Int[ndarray, " n"]:
    """Count for every kept row the rows it stands for; 0 for rows that are not kept.

    A row is stood for by the last kept pick of its record: by itself where it is kept, and else,
    where the kept rows are the first of the order, by the nearest of them. Where no pick of its
    record is kept, it is stood for by the first kept row of its stratum. Rows that are not kept
    are counted nowhere if their record is empty or names only themselves (rows that were left out
    of the coverage), or if no row of their stratum is kept.

    Args:
        nearest: The records, see `Coverage`; ranks are within the stratum.
        rank: Place of each row in the order of its stratum.
        strata: Stratum of each row.
        is_kept: Which rows are kept; they need not be the first of the order.

    Raises:
        InputError: If a record holds a rank that no row with a record can have.
    """
    offsets, ranks = nearest
    n_rows = len(rank)
    codes = stratum_codes(strata, n_rows)
    rows = np.flatnonzero(np.diff(offsets))
    order = rows[np.lexsort((rank[rows], codes[rows]))]
    sizes = np.bincount(codes[rows], minlength=int(codes.max(initial=0)) + 1)
    recorded = np.repeat(np.arange(n_rows), np.diff(offsets))
    if (ranks < 0).any() or (ranks >= sizes[codes[recorded]]).any():
        raise InputError("records must hold ranks of rows that have a record themselves")
    picks = order[(np.cumsum(sizes) - sizes)[codes[recorded]] + ranks]

    first = np.full(len(sizes), -1)
    kept = order[is_kept[order]][::-1]
    first[codes[kept]] = kept  # of several for one place the last stays, here and below
    stands_for = np.where(np.diff(offsets) > 1, first[codes], -1)
    stands_for[recorded[is_kept[picks]]] = picks[is_kept[picks]]
    return np.bincount(stands_for[stands_for >= 0], minlength=n_rows)


def _whole_weights(
    weights: Any, codes: Int[ndarray, " n"]
) -> tuple[Int[ndarray, " n"], Float[ndarray, " strata"]]:
    """Round weights to whole numbers; gains times the scale of their stratum are in its units."""
    if weights is None:
        return np.ones_like(codes), np.full(codes.max() + 1, 2.0**-COSINE_BITS)
    given = np.asarray(weights.cpu() if hasattr(weights, "cpu") else weights, dtype=np.float64)
    if given.shape != codes.shape:
        raise InputError(
            f"weights must hold one number for each of the {len(codes)} rows, "
            f"got shape {given.shape}"
        )
    if not np.isfinite(given).all() or (given < 0).any():
        raise InputError(
            f"weights must be finite and at least 0, got {given.min()} ... {given.max()}"
        )
    top = np.zeros(codes.max() + 1)
    np.maximum.at(top, codes, given)
    shares = given / np.where(top > 0, top, 1)[codes]
    return (
        np.rint(np.ldexp(shares, WEIGHT_BITS)).astype(np.int64),
        np.ldexp(top, -COSINE_BITS - WEIGHT_BITS),
    )


def cut_rows(
    values: Float[ndarray, "n d"], members: Int[ndarray, " k"], max_rows: int
) -> list[Int[ndarray, " _"]]:
    """Cut ascending rows into parts of similar ones by k-means, of at most max_rows each."""
    n_parts = -(-len(members) // max_rows)
    if n_parts == 1:
        return [members]
    rows = values if len(members) == len(values) else values[members]
    parts = split_strata(partition_rows(rows, n_parts, cut_large=False))
    if len(parts) == 1:  # equal directions
        return np.array_split(members, n_parts)
    return [one for part in parts for one in cut_rows(values, members[part], max_rows)]


def _make_table(values: Float[ndarray, "n d"], members: Int[ndarray, " k"]) -> Int[ndarray, "k k"]:
    """Give the cosines of all pairs of some rows, in units of 2^-30."""
    size, width = len(members), values.shape[1]
    to_unit = Directions()
    rows = np.empty((size, width))
    step = max(1, TILE_VALUES // width)
    for start in range(0, size, step):
        rows[start : start + step] = to_unit(values[members[start : start + step]])[0]
    table = np.empty((size, size), dtype=np.int32)
    step = max(1, TILE_VALUES // size)
    for start in range(0, size, step):
        span = slice(start, start + step)
        products = np.ldexp(rows[span] @ rows[start:].T, COSINE_BITS)
        cosines = np.rint(products, out=products).astype(np.int32)
        table[span, start:] = cosines
        table[start:, span] = cosines.T
    return table


def _pick_all(
    table: Int[ndarray, "k k"], weights: Int[ndarray, " k"], tell: Callable[[int], None]
) -> tuple[Int[ndarray, " k"], Int[ndarray, " m"], Int[ndarray, " m"]]:
    """Pick all rows greedily, by a table of cosines and whole weights.

    Tell is called with the number of rows picked since; it may raise to stop.

    Returns:
        The gain of each row, the rows that came nearer to a pick, in the order of the picks, and
        the pick of each of them.
    """
    n_rows = len(table)
    n_blocks = -(-n_rows // BLOCK_ROWS)
    bounds = np.full(n_blocks * BLOCK_ROWS, -1, dtype=np.int64)
    bounds[:n_rows] = np.iinfo(np.int64).max
    tops = bounds.reshape(n_blocks, BLOCK_ROWS).max(axis=1)
    made_at = np.full(n_rows, -1, dtype=np.int64)
    covered = np.zeros(n_rows, dtype=np.int32)
    best = np.full(n_rows, np.iinfo(np.int32).min, dtype=np.int32)
    gain = np.zeros(n_rows, dtype=np.int64)
    recorded, by = (np.empty(RECORD_ROWS * n_rows, dtype=np.int32) for _ in range(2))
    records: list[tuple[ndarray, ndarray]] = []
    pick = compile_loop(_pick)
    n_picked = 0
    while n_picked < n_rows:
        upto = min(n_rows, n_picked + PICKS_A_CALL)
        before = n_picked
        n_picked, n_records = pick(
            *(table, weights, covered, best, bounds, tops, made_at, gain),
            *(recorded, by, n_picked, upto),
        )
        records.append((recorded[:n_records].copy(), by[:n_records].copy()))
        tell(n_picked - before)
    rows, picks = (np.concatenate(column) for column in zip(*records, strict=True))
    return gain, rows, picks


@no_type_check
def _pick(table, weights, covered, best, bounds, tops, made_at, gain, recorded, by, n_picked, upto):
    n_rows = len(table)
    n_records = 0
    while n_picked < upto and n_records + n_rows <= len(recorded):
        while True:
            block = np.argmax(tops)
            start = block * BLOCK_ROWS
            row = start + np.argmax(bounds[start : start + BLOCK_ROWS])
            if made_at[row] == n_picked or bounds[row] == 0:
                break
            total = 0
            for i in range(n_rows):
                total += weights[i] * max(np.int64(table[row, i]) - covered[i], 0)
            bounds[row] = total
            made_at[row] = n_picked
            tops[block] = bounds[start : start + BLOCK_ROWS].max()
        gain[row] = bounds[row]
        bounds[row] = -1
        tops[block] = bounds[start : start + BLOCK_ROWS].max()
        for i in range(n_rows):
            cosine = table[row, i]
            if cosine > best[i] or i == row:
                recorded[n_records] = i
                by[n_records] = row
                n_records += 1
                best[i] = cosine
            covered[i] = max(covered[i], cosine)
        best[row] = 2**31 - 1  # nothing is nearer to a row than itself
        n_picked += 1
    return n_picked, n_records
