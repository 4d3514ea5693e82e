"""Balanced samples: random, and spread evenly over the rows of every stratum at any size."""

from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Float, Int, Int32, UInt64
from numpy import ndarray

from dq_multimodal.core.bins import as_matrix, for_each, split_strata, stratum_codes
from dq_multimodal.core.compiled import compile_loop
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.core.partition import GRID, Directions

BLOCK_VALUES = 2**21
SMALL_ROWS = 2**14
"""Rows of a node whose whole subtree is made in one go."""
SALT = 0x626C6F636B73
CHANCE_BITS = 20
"""Chances are multiples of 2^-20, so that they add to row counts without rounding."""


def balance_rows(
    embeddings: Any,
    strata: Any = None,
    *,
    rows: Int[ndarray, " n"] | None = None,
    on_rows: Callable[[int], object] | None = None,
) -> Int[ndarray, " n"]:
    r"""Line up the rows of every stratum as the leaves of a tree of similar rows.

    A node of n rows is cut into a left half of $\lceil n / 2 \rceil$ rows and a right one, down to
    single rows, by the projection $x \cdot (b - a)$: a is the row farthest (lowest cosine) from a
    row that a hash of the row numbers chooses, b the row farthest from a. So any node holds
    similar rows, and `draw_balanced` gives every node its share of any sample.

    Rows are scaled to unit length and rounded to multiples of $2^{-26}$, and products are whole
    numbers of $2^{-52}$: the line is the same on every machine. Ties go to the lowest row.

    Args:
        embeddings: See `as_matrix`. Memory beside it is 4 bytes a number.
        strata: (n,) labels of any type that sorts; None is one stratum.
        rows: Row numbers that are hashed, ascending, where these are some of a dataset; None is
            0 ... n-1. With them a stratum alone has the same line as among others.
        on_rows: Called now and then with the number of rows lined up since (for progress bars).

    Returns:
        Place of each row in the line of its stratum, from 0. There is no chance in it.
    """
    values = as_matrix(embeddings)
    n_rows = len(values)
    codes = stratum_codes(strata, n_rows)
    units = whole_rows(values)
    numbers = np.arange(n_rows) if rows is None else rows
    keys = hash_numbers(SALT, numbers.astype(np.uint64))
    split = partial(compile_loop(_split_nodes), units, keys)

    def line_up(node: Int[ndarray, " k"], tell: Callable[[int], None]) -> None:
        split(node, 2)
        tell(len(node))

    lines = split_strata(codes)
    small, large = [], list(lines)
    while large:
        node = large.pop()
        if len(node) <= SMALL_ROWS:
            small.append(node)
            continue
        split(node, len(node) - 1)
        n_left = len(node) - len(node) // 2
        large += [node[:n_left], node[n_left:]]  # views: lines are changed in place
    for_each(line_up, small, on_rows)
    rank = np.empty(n_rows, dtype=np.int64)
    for line in lines:
        rank[line] = np.arange(len(line))
    return rank


def draw_balanced(
    rank: Int[ndarray, " n"],
    strata: Int[ndarray, " n"],
    seed: int,
    rows: Int[ndarray, " n"] | None = None,
) -> Int[ndarray, " n"]:
    r"""Draw the rows of every stratum in a random order whose prefixes are spread over its tree.

    Of the first k rows of a node of n, $\lfloor k n_l / n + u \rfloor$ come from its left half of
    $n_l$ rows, and the others from its right half, at every node down to single rows; u is a
    chance in [0, 1) of the node's own. This is systematic sampling (Madow and Madow 1944) at every
    node. So each row is among the first k with probability k / n, every node's share of any
    prefix is right within a few rows, and smaller samples lie inside larger ones.

    Args:
        rank: Place of each row in the line of its stratum, see `balance_rows`; some may be missing.
        strata: Stratum of each row.
        seed: Seed of the chances.
        rows: Row numbers that are hashed, where these are some of a dataset; None is 0 ... n-1.

    Returns:
        Place of each row in the drawn order of its stratum, from 0.
    """
    numbers = np.arange(len(rank)) if rows is None else rows
    line = np.lexsort((rank, strata))
    sizes = np.unique(strata, return_counts=True)[1]
    hashes = hash_numbers(seed ^ SALT, numbers[line].astype(np.uint64))
    chances = (hashes >> np.uint64(64 - CHANCE_BITS)) * 2.0**-CHANCE_BITS
    drawn = np.empty(len(rank), dtype=np.int64)
    drawn[line] = compile_loop(_draw)(sizes, chances)
    return drawn


def whole_rows(
    values: Float[ndarray, "n d"], rows: Int[ndarray, " k"] | None = None
) -> Int32[ndarray, "k d"]:
    """Give some rows unit length, in whole units of 2^-26; None is all."""
    to_unit = Directions()
    n_rows = len(values) if rows is None else len(rows)
    units = np.empty((n_rows, values.shape[1]), dtype=np.int32)
    step = max(1, BLOCK_VALUES // values.shape[1])
    for start in range(0, n_rows, step):
        span = slice(start, start + step)
        units[span] = to_unit(values[span if rows is None else rows[span]])[0] / GRID
    return units


@no_type_check
def _split_nodes(
    units: Int32[ndarray, "n d"], keys: UInt64[ndarray, " n"], line: Int[ndarray, " k"], least: int
) -> None:
    """Split ascending rows, and the halves, down to nodes of at most so many rows, in place."""
    n_rows, width = len(line), units.shape[1]
    before = np.empty(n_rows, dtype=np.int64)
    products = np.empty(n_rows, dtype=np.int64)
    right = np.empty(n_rows, dtype=np.int64)
    nodes = [(0, n_rows)]
    while nodes:
        start, stop = nodes.pop()
        size = stop - start
        if size <= least:
            continue
        pivot = line[start]
        for at in range(start, stop):
            if keys[line[at]] < keys[pivot]:
                pivot = line[at]
        for turn in range(3):
            lowest = 0
            for i in range(size):
                row, product = line[start + i], 0
                for column in range(width):
                    product += np.int64(units[pivot, column]) * np.int64(units[row, column])
                before[i], products[i] = products[i], product
                if product < products[lowest]:
                    lowest = i
            if turn < 2:
                pivot = line[start + lowest]
        n_left = size - size // 2
        along = products[:size] - before[:size]
        edge = np.partition(along, n_left - 1)[n_left - 1]
        n_equal = n_left - (along < edge).sum()
        at = n_right = 0
        for i in range(size):
            row = line[start + i]
            is_equal = along[i] == edge and n_equal > 0
            n_equal -= is_equal
            if along[i] < edge or is_equal:
                line[start + at] = row
                at += 1
            else:
                right[n_right] = row
                n_right += 1
        line[start + n_left : stop] = right[:n_right]
        nodes.append((start, start + n_left))
        nodes.append((start + n_left, stop))


@no_type_check
def _draw(sizes: Int[ndarray, " s"], chances: Float[ndarray, " n"]) -> Int[ndarray, " n"]:
    """Give every leaf its place in the drawn order.

    The places of a node's rows are handed down to its halves. The chance of a node is that of the
    first row of its right half, which no other node has.
    """
    places = np.empty(len(chances), dtype=np.int64)
    right = np.empty(len(chances), dtype=np.int64)
    first = 0
    for n_rows in sizes:
        places[first : first + n_rows] = np.arange(n_rows)
        nodes = [(first, first + n_rows)]
        first += n_rows
        while nodes:
            start, stop = nodes.pop()
            size = stop - start
            if size < 2:
                continue
            n_left = size - size // 2
            n_given = n_right = 0
            for i in range(size):
                place = places[start + i]
                if int((i + 1) * n_left / size + chances[start + n_left]) > n_given:
                    places[start + n_given] = place
                    n_given += 1
                else:
                    right[n_right] = place
                    n_right += 1
            places[start + n_left : stop] = right[:n_right]
            nodes.append((start, start + n_left))
            nodes.append((start + n_left, stop))
    return places
