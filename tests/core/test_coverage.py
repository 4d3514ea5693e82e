"""cover_rows against the naive greedy of the definition, its limits, and the weights from it."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal import InputError
from dq_multimodal.core import coverage
from dq_multimodal.core.coverage import cover_rows, weigh_by_nearest
from dq_multimodal.core.partition import GRID, Directions


def cosines(rows):
    """Cosines in units of 2^-30, from rows rounded to multiples of 2^-26."""
    rows = Directions()(rows)[0] / GRID
    exact = rows.astype(np.int64).astype(object)
    return [[round(float(a @ b) / 2**22) for b in exact] for a in exact]


def naive(rows, weights=None):
    """The greedy of the definition: picks and gains, all worked out anew at every pick."""
    table, n_rows = cosines(rows), len(rows)
    weights = np.ones(n_rows) if weights is None else np.asarray(weights)
    top = max(weights) or 1.0
    whole = [round(float(w / top) * 2**16) for w in weights]
    covered, left, picks, gains = [0] * n_rows, list(range(n_rows)), [], []
    while left:
        found = {}
        for j in left:
            found[j] = sum(w * max(0, table[j][i] - covered[i]) for i, w in enumerate(whole))
        pick = min(left, key=lambda j: (-found[j], not rows[j].any(), j))
        left.remove(pick)
        picks.append(pick)
        gains.append(found[pick] * top / 2**46)
        covered = [max(c, t) for c, t in zip(covered, table[pick], strict=True)]
    return picks, gains


def hostile(seed, n_rows, width):
    """Rows with duplicates, multiples, opposites and zeros, of low rank now and then."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, size=(n_rows, width)).astype(np.float64)
    if seed % 3 == 0:
        rows = rng.normal(size=(n_rows, 1)) * rng.normal(size=(1, width))
    if seed % 3 == 1:
        rows += 1e-4 * rng.normal(size=rows.shape)
    rows[rng.random(n_rows) < 0.2] = 0
    rows[rng.random(n_rows) < 0.3] = rows[0]
    return rows * 10.0 ** rng.integers(-30, 30, size=(n_rows, 1))


def spread(seed, n_rows, width=8):
    return np.random.default_rng(seed).normal(size=(n_rows, width))


def value(rows, picks, weights=None):
    """F of the definition, in float64."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    near = np.maximum(0, (unit @ unit[list(picks)].T).max(axis=1))
    return near.sum() if weights is None else weights @ near


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 24), st.integers(1, 5), st.booleans())
def test_picks_and_gains_are_the_naive_greedy(seed, n_rows, width, is_weighted):
    rows = hostile(seed, n_rows, width)
    rng = np.random.default_rng(seed + 1)
    weights = rng.choice([0.0, 0.3, 1.0, 7.5], size=n_rows) if is_weighted else None
    found = cover_rows(rows, weights=weights)
    picks, gains = naive(rows, weights)
    np.testing.assert_array_equal(np.argsort(found.rank), picks)
    np.testing.assert_allclose(found.gain[picks], gains, rtol=1e-12)
    assert (np.diff(found.gain[picks]) <= 0).all(), "gains only fall"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 4))
def test_records_name_the_nearest_pick_of_every_prefix(seed, n_rows, width):
    rows = hostile(seed, n_rows, width)
    found = cover_rows(rows)
    table, picks = np.array(cosines(rows)), np.argsort(found.rank)
    offsets, ranks = found.nearest
    for row in range(n_rows):
        record = ranks[offsets[row] : offsets[row + 1]]
        assert record[-1] == found.rank[row]
        for size in range(1, n_rows + 1):
            last = record[record < size][-1]
            if found.rank[row] < size:
                assert last == found.rank[row]
            else:
                assert last == np.argmax(table[picks[:size], row])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_prefixes_have_their_share_of_the_best(seed, n_rows, is_weighted):
    rows = spread(seed, n_rows, 3)
    weights = np.random.default_rng(seed).random(n_rows) if is_weighted else None
    picks = np.argsort(cover_rows(rows, weights=weights).rank)
    for size in range(1, min(n_rows, 4) + 1):
        best = max(value(rows, some, weights) for some in combinations(range(n_rows), size))
        assert value(rows, picks[:size], weights) >= (1 - 1 / np.e) * best


def test_gains_sum_to_the_value_of_every_prefix():
    rows, weights = spread(0, 200), np.random.default_rng(1).random(200)
    for given_weights, scale in ((None, 1), (weights, 1), (1e6 * weights, 1e6)):
        found = cover_rows(rows, weights=given_weights)
        picks = np.argsort(found.rank)
        for size in (1, 7, 60, 200):
            want = scale * value(rows, picks[:size], None if given_weights is None else weights)
            assert found.gain[picks[:size]].sum() == pytest.approx(want, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 200))
def test_permuted_rows_give_permuted_picks(seed, n_rows):
    rng = np.random.default_rng(seed)
    rows, weights, turn = spread(seed, n_rows), rng.random(n_rows), rng.permutation(n_rows)
    found = cover_rows(rows, weights=weights)  # with equal weights, pairs of rows tie
    turned = cover_rows(rows[turn], weights=weights[turn])
    is_gaining = found.gain[turn] > 0
    np.testing.assert_array_equal(turned.rank[is_gaining], found.rank[turn][is_gaining])


def test_strata_are_covered_each_for_itself():
    rows, weights = spread(3, 400), np.random.default_rng(3).random(400)
    strata = np.random.default_rng(4).choice(["b", "a", "c"], size=400)
    strata[17] = "of one row"
    seen = []
    found = cover_rows(rows, strata, weights, on_picks=seen.append)
    assert sum(seen) == 400
    offsets, ranks = found.nearest
    for name in np.unique(strata):
        members = np.flatnonzero(strata == name)
        alone = cover_rows(rows[members], weights=weights[members])
        np.testing.assert_array_equal(found.rank[members], alone.rank)
        np.testing.assert_array_equal(found.gain[members], alone.gain)
        records = [ranks[offsets[i] : offsets[i + 1]] for i in members]
        np.testing.assert_array_equal(np.concatenate(records), alone.nearest[1])


def test_large_strata_are_merged_from_parts():
    rng = np.random.default_rng(5)
    middle = np.repeat(np.eye(4), 30, axis=0)
    rows = middle + 0.05 * rng.normal(size=middle.shape)
    found = cover_rows(rows, max_rows=31)
    table = np.array(cosines(rows), dtype=np.int64)
    part = np.empty(120, dtype=int)
    for number, members in enumerate(coverage.cut_rows(rows, np.arange(120), 31)):
        assert len(members) <= 31
        part[members] = number
    assert part.max() >= 3
    table[part[:, None] != part] = 0
    covered = np.zeros(120, dtype=np.int64)
    for size, pick in enumerate(np.argsort(found.rank)):
        gains = np.maximum(0, table - covered).sum(axis=1)
        gains[found.rank < size] = -1
        assert pick == np.argmax(gains)
        covered = np.maximum(covered, table[pick])
    offsets, ranks = found.nearest
    own = np.repeat(part, np.diff(offsets))
    assert (ranks[offsets[:-1]] == 0).all()
    assert ((part[np.argsort(found.rank)[ranks]] == own) | (ranks == 0)).all()
    assert (np.diff(ranks)[np.diff(np.repeat(np.arange(120), np.diff(offsets))) == 0] > 0).all()
    assert (ranks[offsets[1:] - 1] == found.rank).all()


@pytest.mark.parametrize("rows", [np.ones((10, 2)), np.zeros((10, 2))])
def test_parts_of_rows_that_no_centre_parts(rows):
    found = cover_rows(rows, max_rows=3)
    assert sorted(found.rank) == list(range(10))
    assert np.count_nonzero(found.gain) == (4 if rows.any() else 0)


def test_the_picks_depend_on_no_type_block_size_thread_or_order_of_sums(monkeypatch):
    rows = spread(6, 700, 40).astype(np.float32)
    strata = np.arange(700) % 3
    want = cover_rows(rows, strata)
    monkeypatch.setattr(coverage, "TILE_VALUES", 900)
    monkeypatch.setattr(coverage, "PICKS_A_CALL", 7)
    monkeypatch.setattr(coverage, "RECORD_ROWS", 1)
    monkeypatch.setattr(coverage, "TABLE_BYTES", 0)
    for same in (rows[:, ::-1], torch.from_numpy(rows), rows.astype(np.float64) * 2.0**-300):
        found = cover_rows(same, strata, np.ones(700))
        np.testing.assert_array_equal(found.rank, want.rank)
        np.testing.assert_array_equal(found.gain, want.gain)
        np.testing.assert_array_equal(found.nearest[1], want.nearest[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40))
def test_weights_count_the_rows_whose_nearest_kept_row_it_is(seed, n_rows, n_keep):
    rows = spread(seed, n_rows, 4)
    strata = np.random.default_rng(seed).integers(0, 3, size=n_rows)
    found = cover_rows(rows, strata)
    is_kept = found.rank < n_keep
    got = weigh_by_nearest(found.nearest, found.rank, strata, is_kept)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    want = np.zeros(n_rows, dtype=int)
    for row in range(n_rows):
        kept = np.flatnonzero(is_kept & (strata == strata[row]))
        want[kept[np.argmax(unit[kept] @ unit[row])]] += 1
    np.testing.assert_array_equal(got, want)
    assert got.sum() == n_rows


def test_weights_of_kept_rows_that_are_no_prefix():
    rank = np.array([0, 1, 2, 3, 9, 0, 1])
    strata = np.array([4, 4, 4, 4, 7, 7, 7])
    offsets = np.array([0, 1, 3, 5, 6, 6, 7, 9])  # row 3 was left out, row 4 has no record
    nearest = (offsets, np.array([0, 0, 1, 0, 2, 3, 0, 0, 1], dtype=np.int32))

    def weigh(*kept):
        return weigh_by_nearest(nearest, rank, strata, np.isin(np.arange(7), kept)).tolist()

    assert weigh(0, 5) == [3, 0, 0, 0, 0, 2, 0]
    assert weigh(1) == [0, 2, 0, 0, 0, 0, 0], "row 2 has no kept pick in its record"
    assert weigh(2, 3, 4, 6) == [0, 0, 2, 1, 0, 0, 1]
    assert weigh() == [0] * 7
    assert weigh(*range(7)) == [1, 1, 1, 1, 0, 1, 1]
    with pytest.raises(InputError, match="records must hold ranks"):
        weigh_by_nearest((offsets, nearest[1] + 1), rank, strata, rank < 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "weights must hold one number for each of the 3 rows"),
        ({"weights": [1.0, -1, 0]}, "weights must be finite and at least 0"),
        ({"weights": [1.0, np.inf, 0]}, "weights must be finite and at least 0"),
        ({"max_rows": 0}, "max_rows must be a whole number from 1 to 20000"),
        ({"max_rows": 20_001}, "max_rows must be a whole number from 1 to 20000"),
        ({"strata": [1]}, "strata must hold one label for each of the 3 rows"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        cover_rows(np.eye(3), **options)
