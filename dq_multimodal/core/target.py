"""Rows picked for a target: for each of its rows in turn, the nearest row that is left."""

import math
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.core.bins import as_matrix
from dq_multimodal.core.compiled import compile_loop
from dq_multimodal.core.partition import Directions

LIST_VALUES = 2 * 10**8
"""All lists of near rows together hold so many rows, 4 bytes each, where depth is not given."""
BLOCK_VALUES, COSINE_VALUES = 2**21, 2**26
COSINE_BITS = 30
ROUNDING = 1e-9


def pick_for_targets(
    embeddings: Any, targets: Any, *, depth: int | None = None
) -> tuple[Int[ndarray, " n"], Int[ndarray, " n"]]:
    r"""Pick rows for the rows of a target in turn (round-robin).

    In every round each target row, from the first to the last, takes the row of the greatest
    cosine to it that nobody took before, until all are taken. So each target row has its share of
    any prefix, and none is served by the others' neighbours alone. Xia et al. 2024, "LESS", score
    a row by the target subtask it suits best; Ivison et al. 2025, "Large-Scale Data Selection for
    Instruction Tuning", take turns.

    Cosines are worked out as in `cover_rows`, to multiples of $2^{-30}$, the same on every
    machine; ties go to the lowest row. Rows of zeros are not picked; target rows of zeros have no
    turn.

    Args:
        embeddings: (n, d), see `as_matrix`.
        targets: (t, d), the same.
        depth: Near rows that each target row lists, from 1; when its list is used up it has no
            more turns. None is all n rows, but no more than 2e8 in all lists together.

    Returns:
        The place of each row in the order of the picks, -1 if it was not reached (int64), and
        the target row that took it, or -1 (int32).

    Raises:
        InputError: If the widths differ, or depth is no whole number of at least 1.
    """
    rows, wanted = as_matrix(embeddings), as_matrix(targets)
    if rows.shape[1] != wanted.shape[1]:
        raise InputError(
            f"rows and target rows must have one width, got {rows.shape[1]} and {wanted.shape[1]}"
        )
    if depth is not None and (isinstance(depth, bool) or int(depth) != depth or depth < 1):
        raise InputError(f"depth must be a whole number of at least 1, got {depth}")
    n_rows = len(rows)
    numbers = np.flatnonzero(wanted.any(axis=1))
    if depth is None:
        depth = max(1, LIST_VALUES // max(1, len(numbers)))
    lists = _list_near(rows, wanted[numbers], min(int(depth), n_rows))
    is_taken = np.logical_not(rows.any(axis=1))
    rank, turn = compile_loop(_take_turns)(lists, is_taken)
    return rank, np.append(numbers, -1)[turn].astype(np.int32)  # a turn of -1 is the last


def mix_orders(
    first: Int[ndarray, " n"], second: Int[ndarray, " n"], share: float | int
) -> Int[ndarray, " n"]:
    """Mix two orders of the rows, so that any prefix holds a share (0 to 1) of picks by the first.

    Of the first k rows, ceil(share * k) are picked by the first order, as long as it has rows
    that are left, and the others by the second; either passes over rows that the other picked.
    Places of the first may have gaps, and are -1 where a row has none.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must lie in [0, 1], got {share}")
    by_first = np.argsort(first, kind="stable")
    by_first = by_first[first[by_first] >= 0].tolist()[::-1]
    by_second = np.argsort(second, kind="stable").tolist()[::-1]
    place = [-1] * len(second)
    n_first = 0
    for at in range(len(place)):
        while by_first and place[by_first[-1]] >= 0:
            by_first.pop()
        while place[by_second[-1]] >= 0:
            by_second.pop()
        is_first = bool(by_first) and n_first < math.ceil(share * (at + 1) - ROUNDING)
        n_first += is_first
        place[(by_first if is_first else by_second).pop()] = at
    return np.array(place, dtype=np.int64)


def _list_near(
    rows: Float[ndarray, "n d"], targets: Float[ndarray, "t d"], depth: int
) -> Int[ndarray, "t depth"]:
    """List for each target row the rows of the greatest cosines to it, nearest first."""
    n_rows, n_targets = len(rows), len(targets)
    to_unit = Directions()
    lists = np.empty((n_targets, depth), dtype=np.int32)
    step, width = max(1, COSINE_VALUES // n_rows), max(1, BLOCK_VALUES // rows.shape[1])
    for start in range(0, n_targets, step):
        some = to_unit(targets[start : start + step])[0]
        cosines = np.empty((len(some), n_rows), dtype=np.int32)
        for at in range(0, n_rows, width):
            products = some @ to_unit(rows[at : at + width])[0].T
            cosines[:, at : at + width] = np.rint(np.ldexp(products, COSINE_BITS))
        for number, own in enumerate(cosines, start):
            keys = (-own.astype(np.int64) << 32) + np.arange(n_rows)  # greatest cosine, lowest row
            if depth < n_rows:
                keys = np.partition(keys, depth - 1)[:depth]
            lists[number] = np.sort(keys) & (2**32 - 1)
    return lists


@no_type_check
def _take_turns(
    lists: Int[ndarray, "t depth"], is_taken: Bool[ndarray, " n"]
) -> tuple[Int[ndarray, " n"], Int[ndarray, " n"]]:
    """Take rows in turn; give the place of each row and whose turn it was, -1 for none."""
    n_targets, depth = lists.shape
    rank = np.full(len(is_taken), -1, dtype=np.int64)
    turn = np.full(len(is_taken), -1, dtype=np.int64)
    at = np.zeros(n_targets, dtype=np.int64)
    n_taken = before = 0
    while True:
        for target in range(n_targets):
            while at[target] < depth and is_taken[lists[target, at[target]]]:
                at[target] += 1
            if at[target] < depth:
                row = lists[target, at[target]]
                is_taken[row] = True
                rank[row], turn[row] = n_taken, target
                n_taken += 1
        if n_taken == before:
            return rank, turn
        before = n_taken
