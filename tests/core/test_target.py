"""pick_for_targets against the plain round-robin, and prefixes of two mixed orders."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal import InputError
from dq_multimodal.core import target
from dq_multimodal.core.partition import Directions
from dq_multimodal.core.target import mix_orders, pick_for_targets


def plain(rows, targets, depth=None):
    """Round-robin of the definition: (row, target) in the order of the picks."""
    exact = Directions()(targets)[0] @ Directions()(rows)[0].T
    cosines = np.rint(exact * 2**30)  # of the rounded rows: equal ones must tie
    lists = [
        sorted(range(len(rows)), key=lambda row: (-cosines[t, row], row))[:depth]
        for t in range(len(targets))
    ]
    left = {row for row in range(len(rows)) if rows[row].any()}
    picks = []
    while True:
        n_before = len(picks)
        for t in range(len(targets)):
            near = [row for row in lists[t] if row in left]
            if targets[t].any() and near:
                left.remove(near[0])
                picks.append((near[0], t))
        if len(picks) == n_before:
            return picks


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=30),
    targets=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=8),
    depth=st.one_of(st.none(), st.integers(1, 40)),
)
def test_picks_are_the_plain_round_robin(rows, targets, depth):
    rows, targets = np.array(rows, dtype=float), np.array(targets, dtype=float)
    rank, of = pick_for_targets(rows, targets, depth=depth)
    picks = plain(rows, targets, depth)
    assert np.count_nonzero(rank >= 0) == len(picks)
    for place, (row, number) in enumerate(picks):
        assert (rank[row], of[row]) == (place, number)
    assert ((of < 0) == (rank < 0)).all()


def test_picks_depend_on_no_block_size_type_or_scale(monkeypatch):
    rng = np.random.default_rng(0)
    rows, targets = rng.normal(size=(500, 20)), rng.normal(size=(11, 20))
    want = pick_for_targets(rows, targets)
    assert sorted(want[0]) == list(range(500))
    monkeypatch.setattr(target, "BLOCK_VALUES", 100)
    monkeypatch.setattr(target, "COSINE_VALUES", 1500)
    turned = rows[:, ::-1] * 1e-200, targets[:, ::-1]
    for got in (pick_for_targets(torch.from_numpy(rows), targets), pick_for_targets(*turned)):
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_lists_have_a_bound(monkeypatch):
    monkeypatch.setattr(target, "LIST_VALUES", 30)
    rng = np.random.default_rng(1)
    rows, targets = rng.normal(size=(100, 4)), rng.normal(size=(10, 4))
    np.testing.assert_array_equal(
        pick_for_targets(rows, targets)[0], pick_for_targets(rows, targets, depth=3)[0]
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(0, 10))
def test_prefixes_of_mixed_orders_hold_their_share(seed, n_rows, tenths):
    rng = np.random.default_rng(seed)
    first = np.where(rng.random(n_rows) < 0.5, -1, 3 * rng.permutation(n_rows))
    second, share = rng.permutation(n_rows), tenths / 10
    order = np.argsort(mix_orders(first, second, share))
    assert sorted(order) == list(range(n_rows))
    by_first = [row for row in np.argsort(first) if first[row] >= 0]
    by_second, n_first = list(np.argsort(second)), 0
    for k, row in enumerate(order):
        if by_first and n_first < -(-tenths * (k + 1) // 10):
            assert row == by_first[0]
            n_first += 1
        else:
            assert row == by_second[0]
        for rest in (by_first, by_second):
            if row in rest:
                rest.remove(row)


def test_shares_at_the_ends():
    first, second = np.array([1, -1, 0, -1]), np.array([3, 2, 1, 0])
    np.testing.assert_array_equal(mix_orders(first, second, 0), second)
    np.testing.assert_array_equal(mix_orders(first, second, 1), [1, 3, 0, 2])
    place = mix_orders(np.arange(10_000), np.arange(10_000)[::-1].copy(), 0.7)
    for k in (10, 999, 5000):
        assert np.count_nonzero(place[:5000] < k) == math.ceil(0.7 * k)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pick_for_targets(np.eye(2), np.eye(3)), "must have one width, got 2 and 3"),
        (lambda: pick_for_targets(np.eye(2), np.eye(2), depth=0), "depth must be a whole number"),
        (lambda: pick_for_targets(np.eye(2), [[np.nan, 1]]), "embeddings must be finite"),
        (lambda: mix_orders(np.arange(2), np.arange(2), 1.5), r"share must lie in \[0, 1\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
