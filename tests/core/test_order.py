"""order_rows: sizes, proportions, nesting, and the fixed hash."""

import math
from bisect import bisect_left
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dq_multimodal import InputError
from dq_multimodal.core import Bins, one_bin, order_rows, put_one_of_each_first, row_hash
from dq_multimodal.core.order import (
    _count_before,
    cap_rows,
    count_capped,
    kept_per_stratum,
    place_in_all,
    put_last,
)


def bins_of(sizes_by_stratum, seed=0):
    """Bins of the given sizes, the rows shuffled."""
    bin_, rank, stratum = [], [], []
    for code, sizes in enumerate(sizes_by_stratum):
        for b, size in enumerate(sizes):
            bin_ += [b] * size
            rank += list(range(size))
            stratum += [code] * size
    shuffle = np.random.default_rng(seed).permutation(len(bin_))
    columns = [np.array(c, dtype=np.int64)[shuffle] for c in (bin_, rank, stratum)]
    return Bins(bin=columns[0], rank=columns[1], gain=np.zeros(len(bin_)), stratum=columns[2])


def naive_order(bins, weights, draw, seed):
    """METHOD: Sainte-Lague inside each stratum, then across strata, in exact fractions."""
    groups = sorted({(int(s), int(b)) for s, b in zip(bins.stratum, bins.bin, strict=True)})
    hashes = [int(h) for h in row_hash(seed, len(bins))]
    final = []
    for code in sorted({s for s, _ in groups}):
        ranked = []
        for (s, b), weight in zip(groups, weights, strict=True):
            if s != code:
                continue
            rows = np.flatnonzero((bins.stratum == s) & (bins.bin == b)).tolist()
            rows.sort(key=lambda r: (int(bins.rank[r]) if draw == "rank" else hashes[r], r))
            for k, row in enumerate(rows):
                share = Fraction(weight) if weight else Fraction(len(rows))
                ranked.append((weight == 0, -share / (2 * k + 1), b, k, row))
        ranked.sort()
        for j, entry in enumerate(ranked):
            final.append((-Fraction(len(ranked), 2 * j + 1), code, entry[-1]))
    final.sort(key=lambda e: e[:2])
    order = np.empty(len(bins), dtype=np.int64)
    for place, entry in enumerate(final):
        order[entry[-1]] = place
    return order


sizes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, draw=st.sampled_from(["random", "rank"]), seed=st.integers(-3, 2**70))
def test_equals_the_definition(sizes, draw, seed):
    bins = bins_of(sizes)
    n_per_group = [s for stratum in sizes for s in stratum]
    wanted = naive_order(bins, n_per_group, draw, seed)
    np.testing.assert_array_equal(order_rows(bins, draw=draw, seed=seed), wanted)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, data=st.data())
def test_weights_follow_the_definition(sizes, data):
    bins = bins_of(sizes)
    n_groups = sum(len(stratum) for stratum in sizes)
    drawn = data.draw(st.lists(st.integers(0, 7), min_size=n_groups, max_size=n_groups))
    wanted = naive_order(bins, drawn, "random", 1)
    got = order_rows(bins, np.array(drawn, dtype=np.float64), seed=1)
    np.testing.assert_array_equal(got, wanted)


@settings(max_examples=50, deadline=None)
@given(sizes=sizes)
def test_an_order_is_a_permutation_and_every_prefix_is_in_proportion(sizes):
    bins = bins_of(sizes)
    order = order_rows(bins)
    n = len(bins)
    assert sorted(order) == list(range(n))
    for k in range(1, n + 1):
        kept = order < k
        for code, stratum in enumerate(sizes):
            in_stratum = kept[bins.stratum == code].sum()
            assert abs(in_stratum - k * sum(stratum) / n) < len(sizes) / 2 + 1
            for b, size in enumerate(stratum):
                got = kept[(bins.stratum == code) & (bins.bin == b)].sum()
                assert abs(got - in_stratum * size / sum(stratum)) < len(stratum) / 2 + 1


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, draw=st.sampled_from(["random", "rank"]), data=st.data())
def test_some_rows_are_ordered_as_if_the_others_were_not_there(sizes, draw, data):
    bins = bins_of(sizes)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(bins), max_size=len(bins)))
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return
    some = bins.take(rows)
    order = order_rows(some, draw=draw, seed=5, rows=rows)
    hashes = row_hash(5, len(bins))[rows]
    for s, b in {(int(s), int(b)) for s, b in zip(some.stratum, some.bin, strict=True)}:
        members = np.flatnonzero((some.stratum == s) & (some.bin == b))
        key = some.rank[members] if draw == "rank" else hashes[members]
        assert (np.argsort(order[members]) == np.lexsort((members, key))).all()
    # How many each bin gives does not hang on which of its rows are drawn.
    groups = some.stratum * 9 + some.bin
    plain = order_rows(some, seed=0)
    assert (groups[np.argsort(order)] == groups[np.argsort(plain)]).all()


many_sizes = st.one_of(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.lists(st.sampled_from([0, 3, 6, 9, 15, 30, 45]), min_size=1, max_size=20),  # many ties
    st.tuples(st.integers(2000, 9000), *[st.integers(0, 4)] * 5).map(list),
    st.permutations([1, 2, 3, 5, 7, 2047, 2048, 4096]),
).filter(any)


@settings(max_examples=100, deadline=None)
@given(sizes=many_sizes, data=st.data())
def test_places_and_counts_follow_from_the_sizes_of_strata(sizes, data):
    sizes = np.array(sizes)
    strata = np.repeat(np.arange(len(sizes)), sizes)
    nth = np.concatenate([np.arange(size) for size in sizes])
    order = order_rows(Bins(0 * nth, nth, np.zeros(len(nth)), strata), draw="rank")
    for stratum in range(len(sizes)):
        np.testing.assert_array_equal(place_in_all(sizes, stratum), order[strata == stratum])
    for n_kept in {0, 1, len(order), *data.draw(st.lists(st.integers(0, len(order)), max_size=9))}:
        wanted = np.bincount(strata[order < n_kept], minlength=len(sizes))
        np.testing.assert_array_equal(kept_per_stratum(sizes, n_kept), wanted)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 2**40 - 1), st.integers(-3, 3).map(lambda k: 2**30 + k)),
        min_size=2,
        max_size=5,
    ),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    own=st.sampled_from([1, 7, 2**30 - 1, 2**30, 10**9 + 7, 2**40 - 1]),
)
def test_places_in_strata_of_very_many_rows_are_those_of_float64_quotients(sizes, shares, own):
    nth = [*(int(share * (own - 1)) for share in shares), own - 1]
    n_lower = np.arange(len(sizes)) % 2
    odd = 2.0 * np.array(nth) + 1
    got = _count_before(np.array(sizes, dtype=float), 1.0 - n_lower, 1.0 * n_lower, own, odd)
    for j, n_before in zip(nth, got, strict=True):
        wanted, priority = 0, own / (2 * j + 1)
        for size, is_lower in zip(sizes, n_lower, strict=True):

            def is_after(k, size=size, is_lower=is_lower, priority=priority):
                other = size / (2 * k + 1)
                return not (other > priority or (is_lower and other == priority))

            wanted += bisect_left(range(size), True, key=is_after)
        assert n_before == wanted


def test_quotients_that_float64_cannot_tell_apart_are_ties():
    n = 2**30
    assert Fraction(n, 2 * n - 1) > Fraction(n + 1, 2 * n + 1)
    assert n / (2 * n - 1) == (n + 1) / (2 * n + 1)
    last = _count_before(np.array([n + 1.0]), np.zeros(1), np.ones(1), n, np.array([2.0 * n - 1]))
    assert last.tolist() == [n + 1]
    assert kept_per_stratum(np.array([n + 1, n]), 2 * n).tolist() == [n + 1, n - 1]
    assert kept_per_stratum(np.array([n, n + 1]), 2 * n).tolist() == [n, n]


def test_counts_of_a_billion_rows_in_many_strata():
    sizes = np.random.default_rng(0).integers(0, 100_001, 20_000)
    before = np.zeros_like(sizes)
    for n_kept in (0, 10**7, 10**7 + 1, int(sizes.sum()) // 3, int(sizes.sum())):
        kept = kept_per_stratum(sizes, n_kept)
        assert kept.sum() == n_kept
        assert (before <= kept).all()
        assert (np.abs(kept - sizes * (n_kept / sizes.sum())) < 2).all()
        before = kept
    np.testing.assert_array_equal(kept, sizes)


@settings(max_examples=100, deadline=None)
@given(strata=st.lists(st.integers(0, 6), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_one_of_each_stratum_comes_first_and_the_rest_as_before(strata, seed):
    strata = np.array(strata)
    order = np.random.default_rng(seed).permutation(len(strata))
    got = put_one_of_each_first(order, strata)
    rows = np.argsort(order).tolist()
    first = [r for k, r in enumerate(rows) if strata[r] not in strata[rows[:k]]]
    assert np.argsort(got).tolist() == first + [r for r in rows if r not in first]
    n_strata = len(set(strata.tolist()))
    assert sorted(got) == list(range(len(strata)))
    assert set(strata[got < n_strata].tolist()) == set(strata.tolist())


def test_sizes_weights_are_dq_row_for_row():
    bins = bins_of([[5, 7, 3], [4, 4]])
    weights = np.array([5, 7, 3, 4, 4], dtype=np.float64)
    np.testing.assert_array_equal(order_rows(bins, weights), order_rows(bins))
    np.testing.assert_array_equal(order_rows(bins, weights * 0.5), order_rows(bins))


def test_the_hash_is_fixed_for_ever():
    """splitmix64 has published outputs: from state 0 the first is e220a8397b1dcdaf."""
    seed_state = 0xE220A8397B1DCDAF

    def mix(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    assert mix(0) == seed_state
    assert row_hash(0, 3).tolist() == [mix((seed_state + row) % 2**64) for row in range(3)]
    assert row_hash(7, 100).tolist() != row_hash(8, 100).tolist()
    assert len(set(row_hash(0, 100_000).tolist())) == 100_000


def test_random_selection_is_uniform():
    """Of 1,000 rows at 20 %, over 400 seeds, every row is kept about 80 times."""
    times = sum(
        (order_rows(one_bin(np.zeros(1000, dtype=np.int64)), seed=seed) < 200).astype(int)
        for seed in range(400)
    )
    assert times.mean() == 80
    assert times.std() == pytest.approx(8, rel=0.15)  # binomial: sqrt(400 x 0.2 x 0.8)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one number for each of the 2 bins"),
        ([1.0, -1.0], "finite and at least 0"),
        ([1.0, np.nan], "finite and at least 0"),
        ([1.0, np.inf], "finite and at least 0"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(InputError, match=message):
        order_rows(bins_of([[2, 2]]), np.array(weights))


def test_bad_draw():
    with pytest.raises(Exception, match="draw"):
        order_rows(bins_of([[2, 2]]), draw="best")


def cap_slowly(order, groups, cap):
    """Take, place by place, the first row whose group has room."""
    left, taken = list(np.argsort(order)), []
    while left:
        room = math.ceil(cap * (len(taken) + 1) - 1e-9) if cap < 1 else cap
        counts = np.bincount(groups[taken], minlength=groups.max() + 1)
        fits = [row for row in left if counts[groups[row]] < room]
        if not fits:
            break
        taken.append(fits[0])
        left.remove(fits[0])
    place = np.empty_like(order)
    place[np.array(taken + left, dtype=int)] = np.arange(len(order))
    return place, len(taken)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.one_of(st.floats(0.05, 0.95), st.integers(1, 9)),
    st.integers(0, 5),
)
@example([0] * 25 + [1] * 15, 0.56, 0)  # 0.56 x 25 is above 14 in floats
@example([0] * 25 + [1] * 10, 0.56, 0)
def test_caps_follow_the_definition(groups, cap, seed):
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    order = np.random.default_rng(seed).permutation(len(codes))
    wanted, n_within = cap_slowly(order, codes, cap)
    assert cap_rows(order, codes, float(cap)).tolist() == wanted.tolist()
    assert count_capped(codes, float(cap)) == n_within


def test_last_rows_keep_their_order():
    order = np.array([3, 0, 2, 1, 4])
    is_last = np.array([False, True, False, False, True])
    assert put_last(order, is_last).tolist() == [2, 3, 1, 0, 4]
