"""balance_rows and draw_balanced: the tree, chances of rows, shares of nodes, the variance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal import InputError
from dq_multimodal.core import balance
from dq_multimodal.core.balance import SALT, balance_rows, draw_balanced
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.core.partition import GRID, Directions


def nodes(start, stop):
    """All nodes of the tree over a line, the root first, as (start, middle, stop)."""
    if stop - start > 1:
        middle = stop - (stop - start) // 2
        yield start, middle, stop
        yield from nodes(start, middle)
        yield from nodes(middle, stop)


def plain_line(rows):
    """The tree of the definition: sort by the projection, halve, go on."""
    units = np.rint(Directions()(rows)[0] / GRID).astype(np.int64)
    keys = hash_numbers(SALT, np.arange(len(rows), dtype=np.uint64))

    def line_up(members):
        if len(members) <= 2:
            return members
        some = units[members]
        far = some[np.argmin(some @ some[np.argmin(keys[members])])]
        along = some @ some[np.argmin(some @ far)] - some @ far
        middle = len(members) - len(members) // 2
        by = np.argsort(along, kind="stable")
        halves = np.sort(by[:middle]), np.sort(by[middle:])
        return np.concatenate([line_up(members[half]) for half in halves])

    return line_up(np.arange(len(rows)))


def clouds(seed, n_rows=400, n_clouds=8, width=6):
    rng = np.random.default_rng(seed)
    of = rng.integers(0, n_clouds, size=n_rows)
    return rng.normal(size=(n_clouds, width))[of] + 0.1 * rng.normal(size=(n_rows, width)), of


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 4), st.sampled_from([2, 9, 99]))
def test_the_line_is_that_of_the_plain_tree(seed, n_rows, width, small):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, size=(n_rows, width)) * 10.0 ** rng.integers(-9, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "SMALL_ROWS", small)
        np.testing.assert_array_equal(np.argsort(balance_rows(rows)), plain_line(rows))


def test_strata_have_a_line_each():
    rows, _ = clouds(0)
    strata = np.random.default_rng(0).choice(["b", "a", "lone"], size=400, p=[0.5, 0.49, 0.01])
    strata[7] = "of one row"
    seen = []
    rank = balance_rows(rows, strata, on_rows=seen.append)
    assert sum(seen) == 400
    for name in np.unique(strata):
        assert sorted(rank[strata == name]) == list(range(np.count_nonzero(strata == name)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_rows=st.integers(1, 120),
    n_strata=st.integers(1, 5),
    chance=st.integers(-5, 2**70),
)
def test_a_stratum_alone_has_its_line_and_its_draw_among_others(seed, n_rows, n_strata, chance):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, size=(n_rows, 3)).astype(np.float16)
    strata = rng.integers(0, n_strata, size=n_rows)
    numbers = np.sort(rng.choice(10**9, n_rows, replace=False))
    rank = balance_rows(rows, strata, rows=numbers)
    drawn = draw_balanced(rank, strata, chance, numbers)
    for code in np.unique(strata):
        own = np.flatnonzero(strata == code)
        alone = balance_rows(rows[own], rows=numbers[own])
        np.testing.assert_array_equal(alone, rank[own])
        order = draw_balanced(alone, np.zeros_like(own), chance, numbers[own])
        np.testing.assert_array_equal(order, drawn[own])
    np.testing.assert_array_equal(balance_rows(rows, rows=np.arange(n_rows)), balance_rows(rows))


def test_the_line_depends_on_no_type_block_size_scale_or_order_of_sums(monkeypatch):
    rows, _ = clouds(1, width=40)
    rows = rows.astype(np.float32)
    want = balance_rows(rows)
    monkeypatch.setattr(balance, "BLOCK_VALUES", 100)
    for same in (torch.from_numpy(rows), rows[:, ::-1], rows.astype(np.float64) * 2.0**-200):
        np.testing.assert_array_equal(balance_rows(same), want)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(1, 4), st.integers(-5, 2**70))
def test_prefixes_give_every_node_its_share(seed, n_rows, n_strata, chance):
    rng = np.random.default_rng(seed)
    strata = rng.integers(0, n_strata, size=n_rows)
    rank = 3 * rng.permutation(n_rows)  # some ranks may be missing
    drawn = draw_balanced(rank, strata, chance)
    for code in np.unique(strata):
        members = np.flatnonzero(strata == code)
        size = len(members)
        assert sorted(drawn[members]) == list(range(size))
        along = drawn[members[np.argsort(rank[members])]]
        for start, middle, stop in nodes(0, size):
            order = np.argsort(along[start:stop])
            is_left = order < middle - start
            share = (middle - start) / (stop - start)
            k = np.arange(1, stop - start + 1)
            assert (np.abs(np.cumsum(is_left) - k * share) < 1).all(), "of its own node"
            got = np.cumsum(np.bincount(along[start:stop], minlength=size))
            want = np.arange(1, size + 1) * (stop - start) / size
            assert (np.abs(got - want) < 2).all(), "of the whole: 1 + 1/2 + 1/4 + ..."


@pytest.mark.parametrize(("n_rows", "k"), [(13, 3), (13, 7), (32, 5)])
def test_every_row_is_among_the_first_with_the_same_chance(n_rows, k):
    n_samples = 20_000  # strata of the same size, each with chances of its own
    rank = np.tile(np.random.default_rng(0).permutation(n_rows), n_samples)
    drawn = draw_balanced(rank, np.repeat(np.arange(n_samples), n_rows), 5)
    counts = (drawn.reshape(n_samples, n_rows) < k).sum(axis=0)
    p = k / n_rows
    z = (counts - n_samples * p) / np.sqrt(n_samples * p * (1 - p))
    assert np.abs(z).max() < 4
    assert z.std() > 0.2, "each row by chance"


def test_seeds_and_row_numbers():
    rank, strata = np.arange(300), np.arange(300) % 2
    draw = [draw_balanced(rank, strata, seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()
    some = np.flatnonzero(strata == 1)
    got = draw_balanced(rank[some], strata[some], 1, rows=some)
    np.testing.assert_array_equal(got, draw[0][some])
    assert (draw_balanced(rank[some], strata[some], 1) != got).any()


def test_the_kernel_mean_varies_less_than_that_of_random_prefixes():
    rows, _ = clouds(2)
    distance = ((rows[:, None] - rows) ** 2).sum(axis=2)
    kernel = np.exp(-distance / np.median(distance))
    rank, strata = balance_rows(rows), np.zeros(400, dtype=np.int64)

    def spread(draw):
        """Mean squared distance of the sample's kernel mean from that of all rows."""
        made = []
        for seed in range(60):
            weights = np.where(draw(seed) < 40, 1 / 40, 0) - 1 / 400
            made.append(weights @ kernel @ weights)
        return np.mean(made)

    balanced = spread(lambda seed: draw_balanced(rank, strata, seed))
    random = spread(lambda seed: np.random.default_rng(seed).permutation(400))
    assert balanced < 0.35 * random


def test_bad_input():
    with pytest.raises(InputError, match="row 1 holds NaN"):
        balance_rows(np.array([[1.0], [np.nan]]))
    with pytest.raises(InputError, match="strata must hold one label"):
        balance_rows(np.eye(3), [1])
