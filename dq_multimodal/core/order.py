"""A method is an order of the rows; a subset of any size is a prefix of it."""

import heapq
import math
from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.config import Draw, InputError
from dq_multimodal.core.bins import Bins
from dq_multimodal.core.compiled import compile_loop
from dq_multimodal.core.hashing import hash_numbers

ROUNDING = 1e-9
"""By so much a cap times a number of rows may be above a whole number."""
BLOCK_PLACES = 1024


def order_rows(
    bins: Bins,
    weights: Float[ndarray, " groups"] | Int[ndarray, " groups"] | None = None,
    *,
    draw: Draw = "random",
    seed: int = 0,
    rows: Int[ndarray, " n"] | None = None,
) -> Int[ndarray, " n"]:
    r"""Put all rows in the order in which a growing subset takes them.

    The k-th row (from 0) of a bin of weight $w$ has priority $w / (2k + 1)$, and the j-th row of a
    stratum of $n_c$ rows has priority $n_c / (2j + 1)$ (Sainte-Lague). So any prefix shares its
    rows among the bins in proportion to their weights, within about a row, full bins drop out by
    themselves, and every smaller subset lies inside every larger one. ADQ's Eq. 10 floors each
    bin alone, which loses rows and nests nothing (arXiv:2412.16895). Ties go to the lower bin
    and the lower stratum. Bins of weight 0 come after all others of their stratum, by size.

    Args:
        bins: Bin, rank and stratum of every row.
        weights: Share of each (stratum, bin) that holds rows, sorted by stratum and then bin, at
            least 0; None gives DQ, the sizes.
        draw: Within a bin, by a hash of (seed, row number), or by rank.
        seed: Seed of the hash.
        rows: Row numbers that are hashed, where these are some rows of a dataset; None is
            0 ... n-1.

    Returns:
        Place of every row, a permutation of 0 ... n-1: a subset of k rows is `order < k`.

    Raises:
        ValueError: If a weight is negative or not finite, or the wrong number of them came.
    """
    if draw not in ("random", "rank"):
        raise InputError(f"draw must be random or rank, got {draw!r}")
    n_rows = len(bins)
    numbers = np.arange(n_rows) if rows is None else rows
    key = bins.rank if draw == "rank" else hash_numbers(seed, numbers.astype(np.uint64))
    drawn = np.lexsort((np.arange(n_rows), key, bins.bin, bins.stratum))
    group, sizes = _runs(bins.stratum[drawn], bins.bin[drawn])
    shares = sizes.astype(np.float64) if weights is None else np.asarray(weights, dtype=np.float64)
    if shares.shape != sizes.shape:
        raise InputError(
            f"weights must hold one number for each of the {len(sizes)} bins, got {shares.shape}"
        )
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise InputError(
            f"weights must be finite and at least 0, got {shares.min()} ... {shares.max()}"
        )

    is_empty = shares == 0
    nth = np.arange(n_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    priority = np.where(is_empty, sizes, shares)[group] / (2 * nth + 1)
    by_stratum = np.lexsort((group, -priority, is_empty[group], bins.stratum[drawn]))
    drawn = drawn[by_stratum]

    stratum, stratum_sizes = _runs(bins.stratum[drawn])
    nth = np.arange(n_rows) - np.repeat(np.cumsum(stratum_sizes) - stratum_sizes, stratum_sizes)
    interleaved = np.lexsort((stratum, -(stratum_sizes[stratum] / (2 * nth + 1))))
    order = np.empty(n_rows, dtype=np.int64)
    order[drawn[interleaved]] = np.arange(n_rows)
    return order


def place_in_all(sizes: Int[ndarray, " c"], stratum: int) -> Int[ndarray, " k"]:
    r"""Give the places of the rows of one stratum among all rows, in the order of `order_rows`.

    They follow from the sizes of the strata alone. Before the j-th row of a stratum of n rows come
    the rows of another of n' with $n' / (2j' + 1) > n / (2j + 1)$, all quotients in float64, or
    equal and of a lower stratum. All j' below $k = \lfloor n' (2j + 1) / 2n \rfloor$ are so, and
    none above k; of k itself the two quotients are compared.

    Args:
        sizes: Rows of each stratum, below $2^{40}$; 0 is a stratum without rows.
        stratum: Which one, from 0.

    Returns:
        Place of its j-th row, ascending. Time is that of its rows times the distinct sizes.
    """
    values, codes = np.unique(sizes, return_inverse=True)
    n_all = np.bincount(codes)
    n_lower = np.bincount(codes[:stratum], minlength=len(values))
    columns = (column.astype(np.float64) for column in (values, n_all - n_lower, n_lower))
    size = int(sizes[stratum])
    places = compile_loop(_count_before)(*columns, float(size), 2.0 * np.arange(size) + 1)
    return places.astype(np.int64)


@no_type_check
def _count_before(sizes, n_higher, n_lower, own, odd):
    """Count the rows of all strata, so many of each size, before rows of priority own / odd."""
    places = np.zeros(len(odd))
    half, priority = 0.5 * odd / own, own / odd
    for start in range(0, len(odd), BLOCK_PLACES):
        block = slice(start, start + BLOCK_PLACES)
        halves, priorities, before = half[block], priority[block], places[block]
        for c in range(len(sizes)):
            size, higher, lower = sizes[c], n_higher[c], n_lower[c]
            for j in range(len(before)):
                k = np.floor(size * halves[j])
                other = np.divide(size, 2 * k + 1)  # raises nothing, so many are made at once
                n_before = (higher + lower) * k
                n_before += higher if other > priorities[j] else 0.0
                n_before += lower if other >= priorities[j] else 0.0
                before[j] += n_before
    return places


def kept_per_stratum(sizes: Int[ndarray, " c"], n_kept: int) -> Int[ndarray, " c"]:
    """Count the rows of each stratum that are among the first n_kept in the order of `order_rows`.

    They follow from the sizes of the strata alone: the priority of the last row kept is found by
    bisection, and of the rows of that very priority those of the lowest strata are kept.

    Args:
        sizes: See `place_in_all`.
        n_kept: Rows kept of all, from 0 to their number.
    """

    def count(priority: float) -> tuple[Int[ndarray, " c"], Bool[ndarray, " c"]]:
        """Count the rows of each stratum above a priority; say whether one more is at it."""
        k = np.minimum(sizes / (2 * priority) // 1, np.maximum(sizes - 1, 0))
        of_k = sizes / (2 * k + 1)
        return (k + (of_k > priority)).astype(np.int64), of_k == priority

    low, high = np.array([0.5, 2.0 * sizes.max()]).view(np.int64).tolist()
    while high - low > 1:  # the largest number that enough rows reach
        middle = (low + high) // 2
        n_above, is_at = count(float(np.int64(middle).view(np.float64)))
        low, high = (middle, high) if n_above.sum() + is_at.sum() >= n_kept else (low, middle)
    n_above, is_at = count(float(np.int64(low).view(np.float64)))
    return n_above + (is_at & (np.cumsum(is_at) <= n_kept - n_above.sum()))


def put_one_of_each_first(
    order: Int[ndarray, " n"], strata: Int[ndarray, " n"]
) -> Int[ndarray, " n"]:
    """Move the first row of every stratum to the front, where each stays before the next.

    All other rows follow as they were. It is an order still: subsets nest, and any of at least as
    many rows as there are strata holds a row of each.
    """
    return put_last(order, find_repeated(order, strata))


def find_repeated(order: Int[ndarray, " n"], groups: Int[ndarray, " n"]) -> Bool[ndarray, " n"]:
    """Mark all but the first row of every group."""
    rows = np.argsort(order)
    found = np.ones(len(rows), dtype=bool)
    found[rows[np.unique(groups[rows], return_index=True)[1]]] = False
    return found


def put_last(order: Int[ndarray, " n"], is_last: Bool[ndarray, " n"]) -> Int[ndarray, " n"]:
    """Move some rows behind all others; among themselves both stay as they were."""
    moved = np.empty_like(order)
    moved[np.lexsort((order, is_last))] = np.arange(len(order))
    return moved


def cap_rows(
    order: Int[ndarray, " n"], groups: Int[ndarray, " n"], cap: float
) -> Int[ndarray, " n"]:
    """Let no group have more rows than its cap in any subset, as far as that can be.

    Place by place, the first row in the order comes whose group has room: of the first k rows at
    most `cap` may be of one group, or ceil(cap * k) where cap is below 1. So subsets still nest.
    When no group has room, the rows that are left follow as they were.

    Args:
        order: Place of every row.
        groups: Code of every row's group, from 0.
        cap: A number of rows, from 1, or a share below 1.
    """
    rows = np.argsort(order)
    by_group = np.argsort(groups[rows], kind="stable")  # places of each group, ascending
    ends = np.cumsum(np.bincount(groups))
    next_of = np.concatenate([[0], ends[:-1]])
    starts, counts = next_of.copy(), np.zeros(len(ends), dtype=np.int64)
    moved = np.empty_like(order)
    is_left = np.ones(len(rows), dtype=bool)
    waiting = [(int(by_group[at]), code) for code, at in enumerate(next_of) if at < ends[code]]
    heapq.heapify(waiting)
    held: list[tuple[int, int]] = []  # groups that have no room now
    room = 0.0
    for place in range(len(rows)):
        before, room = room, math.ceil(cap * (place + 1) - ROUNDING) if cap < 1 else cap
        if room > before:
            for item in held:
                heapq.heappush(waiting, item)
            held = []
        while waiting and counts[waiting[0][1]] >= room:
            held.append(heapq.heappop(waiting))
        if not waiting:
            moved[rows[is_left]] = np.arange(place, len(rows))
            break
        at, code = heapq.heappop(waiting)
        moved[rows[at]], is_left[at] = place, False
        counts[code] += 1
        following = starts[code] + counts[code]
        if following < ends[code]:
            heapq.heappush(waiting, (int(by_group[following]), code))
    return moved


def count_capped(groups: Int[ndarray, " n"], cap: float) -> int:
    """Give the rows of the largest subset in which no group has more than its cap."""
    sizes = np.bincount(groups)
    if cap >= 1:
        return int(np.minimum(sizes, cap).sum())
    room = np.ceil(cap * np.arange(1, len(groups) + 1) - ROUNDING)
    levels, at = np.unique(room, return_inverse=True)  # few, where the groups are many
    totals = np.array([np.minimum(sizes, level).sum() for level in levels])[at]
    is_short = totals < np.arange(1, len(groups) + 1)
    return int(np.argmax(is_short)) if is_short.any() else len(groups)


def one_bin(strata: Int[ndarray, " n"]) -> Bins:
    """Give every stratum a single bin with no greedy run: its order is random selection."""
    n_rows = len(strata)
    zeros = np.zeros(n_rows, dtype=np.int64)
    return Bins(bin=zeros, rank=zeros, gain=np.full(n_rows, np.nan), stratum=strata)


def _runs(*sorted_keys: Int[ndarray, " n"]) -> tuple[Int[ndarray, " n"], Int[ndarray, " groups"]]:
    """Number the runs of equal keys in sorted columns, and give their lengths."""
    is_first: Bool[ndarray, " n"] = np.zeros(len(sorted_keys[0]), dtype=bool)
    is_first[:1] = True
    for column in sorted_keys:
        is_first[1:] |= column[1:] != column[:-1]
    group = np.cumsum(is_first) - 1
    return group, np.bincount(group)
