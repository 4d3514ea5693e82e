"""A method is an order of the rows; a subset of any size is a prefix of it."""

import heapq
import math

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.config import Draw, InputError
from dq_multimodal.core.bins import Bins
from dq_multimodal.core.hashing import hash_numbers

ROUNDING = 1e-9
"""By so much a cap times a number of rows may be above a whole number."""


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
