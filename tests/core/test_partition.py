"""partition_rows and its pieces: nearest centres, the same bits however computed, limits."""

import pickle
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal import InputError
from dq_multimodal.core import partition, partition_rows
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.core.partition import (
    GRID,
    SALT,
    SAMPLE_ROWS,
    count_pieces,
    find_centres,
    fit_parts,
    nearest,
    number_pieces,
    piece_of,
    sample_numbers,
)

SIMILARITIES = ["cosine", "euclidean"]


def clouds(seed, n_rows=300, n_clouds=5, width=6, spread=0.3):
    """Rows around a few points, and the number of the point of each."""
    rng = np.random.default_rng(seed)
    of = rng.integers(0, n_clouds, size=n_rows)
    return rng.normal(size=(n_clouds, width))[of] + spread * rng.normal(size=(n_rows, width)), of


def unit(rows):
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def same_parts(a, b):
    """Whether two partitions are one but for the numbers of their parts."""
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 7))
def test_nearest_is_the_definition_in_exact_fractions(seed, n_centres, width):
    rng = np.random.default_rng(seed)
    rows, centres = (  # coarse, so that ties are common
        rng.integers(-2, 3, size=(n, width)) * 2.0**-4 + GRID for n in (40, n_centres)
    )
    got = nearest(rows, centres)
    for row, code in zip(rows, got, strict=True):
        distances = [
            sum((Fraction(x) - Fraction(c)) ** 2 for x, c in zip(row, centre, strict=True))
            for centre in centres
        ]
        assert code == distances.index(min(distances))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.sampled_from(SIMILARITIES))
def test_every_row_is_nearest_to_the_centre_of_its_part(seed, n_parts, similarity):
    rows, _ = clouds(seed, spread=0.1)
    codes = partition_rows(rows, n_parts, similarity, seed)
    rows = unit(rows) if similarity == "cosine" else rows
    centres = np.array([rows[codes == code].mean(axis=0) for code in range(codes.max() + 1)])
    centres = unit(centres) if similarity == "cosine" else centres
    distances = np.linalg.norm(rows[:, None] - centres, axis=2)
    own = distances[np.arange(len(rows)), codes]
    assert (own <= distances.min(axis=1) + 1e-5).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=1, max_size=40),
    data=st.data(),
    similarity=st.sampled_from(SIMILARITIES),
    scale=st.sampled_from([1.0, 1e-300, 1e300, 3e-5]),
)
def test_parts_partition_the_rows(rows, data, similarity, scale):
    values = np.array(rows, dtype=np.float64) * scale
    n_parts = data.draw(st.integers(1, len(rows)))
    codes = partition_rows(values, n_parts, similarity, seed=data.draw(st.integers(-5, 2**70)))
    used = np.unique(codes)
    np.testing.assert_array_equal(used, np.arange(len(used)))
    assert len(used) <= n_parts
    equal = {}
    for row, code in zip(rows, codes, strict=True):
        assert equal.setdefault(row, code) == code, "equal rows in two parts"
    if similarity == "euclidean" and n_parts == len(rows):
        assert len(used) == len(equal), "as many parts as rows: each distinct row is one"


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_clouds_far_apart_are_found(similarity):
    rng = np.random.default_rng(3)
    of = np.arange(400) % 4
    rows = 10 * np.eye(4, 8)[of] + 0.01 * rng.normal(size=(400, 8))
    assert same_parts(partition_rows(rows, 4, similarity), of)


def test_the_bits_depend_on_no_block_size_order_of_sums_or_type(monkeypatch):
    rows, _ = clouds(1, n_rows=2000, width=40, spread=1.0)
    rows = rows.astype(np.float32)
    for similarity in SIMILARITIES:
        whole = partition_rows(rows, 7, similarity)
        turned = rows[:, ::-1]  # another order of every sum of a product
        np.testing.assert_array_equal(partition_rows(turned, 7, similarity), whole)
        np.testing.assert_array_equal(partition_rows(torch.from_numpy(rows), 7, similarity), whole)
        np.testing.assert_array_equal(partition_rows(rows * 2.0**-20, 7, similarity), whole)
        with monkeypatch.context() as patch:
            patch.setattr(partition, "BLOCK_VALUES", 400)
            np.testing.assert_array_equal(partition_rows(rows, 7, similarity), whole)


@pytest.mark.parametrize(
    ("similarity", "sizes", "first"),
    [
        ("cosine", [89, 74, 61, 86, 75, 109, 106], [6, 6, 5, 5, 1, 6, 1, 6, 1, 2, 3, 5]),
        ("euclidean", [64, 83, 102, 100, 64, 80, 107], [6, 2, 3, 3, 1, 0, 1, 0, 1, 5, 4, 6]),
    ],
)
def test_the_parts_are_those_of_release_0_1(similarity, sizes, first):
    """Coverage of more than 20,000 rows does not record its parts: verify makes them anew."""
    rows = np.arange(600 * 5).reshape(600, 5) ** 2 * 7919 % 1009 - 504.0
    codes = partition_rows(rows, 7, similarity)
    assert np.bincount(codes).tolist() == sizes
    assert codes[:12].tolist() == first


def test_products_of_prepared_rows_are_exact():
    rows, _ = clouds(2, n_rows=50, width=30)
    for place in (partition.Directions(), partition.Places.around(rows, np.abs(rows).max())):
        on_grid, _ = place(rows)
        assert (np.rint(on_grid / GRID) == on_grid / GRID).all()
        exact = sum(Fraction(x) * Fraction(y) for x, y in zip(*on_grid[:2], strict=True))
        assert Fraction(float(on_grid[0] @ on_grid[1])) == exact
        assert np.linalg.norm(on_grid, axis=1).max() < 1.001


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_centres_of_a_sample_serve_rows_outside_it(similarity, tmp_path):
    rng = np.random.default_rng(0)
    n_rows = SAMPLE_ROWS + 5000
    of = rng.integers(0, 6, size=n_rows)
    rows = (5 * np.eye(6, 7)[of] + 0.1 * rng.normal(size=(n_rows, 7))).astype(np.float32)
    last = np.argmax(hash_numbers(SALT, np.arange(n_rows, dtype=np.uint64)))
    rows[last] *= 1e6  # not in the sample and far beyond it, in the direction of its cloud
    np.save(tmp_path / "rows.npy", rows)
    seen = []
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    codes = partition_rows(mapped, 6, similarity, on_rows=seen.append)
    assert same_parts(codes, of)
    assert sum(seen) == n_rows
    np.testing.assert_array_equal(codes, partition_rows(rows, 6, similarity))


@settings(max_examples=50, deadline=None)
@given(
    n_rows=st.integers(1, 300),
    n_parts=st.integers(1, 12),
    seed=st.integers(-5, 2**70),
    block=st.integers(20, 310),
)
def test_the_sample_is_the_rows_of_the_lowest_hashes(n_rows, n_parts, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "SAMPLE_ROWS", 40)
        patch.setattr(partition, "ROWS_A_PART", 9)
        patch.setattr(partition, "HASH_ROWS", block)
        got = sample_numbers(n_rows, n_parts, seed)
    hashes = hash_numbers(seed ^ SALT, np.arange(n_rows, dtype=np.uint64)).tolist()
    wanted = sorted(sorted(range(n_rows), key=hashes.__getitem__)[: max(40, 9 * n_parts)])
    assert got.tolist() == wanted


def test_the_sample_of_many_rows_needs_no_number_a_row():
    tracemalloc.start()
    n_rows = 2**23
    got = sample_numbers(n_rows, 9, 5)
    assert tracemalloc.get_traced_memory()[1] < 60e6 < 8 * n_rows
    tracemalloc.stop()
    assert len(got) == SAMPLE_ROWS
    assert (np.diff(got) > 0).all()
    np.testing.assert_allclose(got.mean(), n_rows / 2, rtol=0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.sampled_from(SIMILARITIES), st.data())
def test_a_cluster_that_calls_the_pieces_apart_has_the_same_parts(seed, n_parts, similarity, data):
    rows, _ = clouds(seed)
    rows[:150] = rows[0]
    rows = rows.astype(np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "SAMPLE_ROWS", 90)
        patch.setattr(partition, "ROWS_A_PART", 8)
        patch.setattr(partition, "LARGE_ROWS", data.draw(st.sampled_from([20, 500])))
        whole = partition_rows(rows, n_parts, similarity, seed)
        sample = rows[sample_numbers(len(rows), n_parts, seed)]
        largest = float(np.abs(rows).max())
        parts = fit_parts(sample, n_parts, similarity, seed=seed, largest=largest)
        parts = pickle.loads(pickle.dumps(parts))
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, 300), max_size=4))), 300]
        blocks = [np.arange(a, b) for a, b in pairwise(cuts)]
        of = [parts.assign(rows[block]) for block in blocks]
        sizes = sum(np.bincount(codes, minlength=len(parts.centres)) for codes in of)
        n_pieces = count_pieces(sizes, n_parts)
        found = [number_pieces(codes, at, n_pieces) for codes, at in zip(of, blocks, strict=True)]
    used = np.unique(np.concatenate(found))
    np.testing.assert_array_equal(np.searchsorted(used, np.concatenate(found)), whole)


def test_largest_is_for_euclidean_alone():
    rows, _ = clouds(0)
    plain, given_too = fit_parts(rows, 3), fit_parts(rows, 3, largest=9.0)
    np.testing.assert_array_equal(plain.assign(rows), given_too.assign(rows))
    with pytest.raises(InputError, match="need largest"):
        fit_parts(rows, 3, "euclidean")
    with pytest.raises(Exception, match="similarity"):
        fit_parts(rows, 3, "dot")


@pytest.mark.parametrize(
    ("sizes", "n_parts", "wanted"),
    [
        ([500_000, 0, 0, 1], 50, [1, 1, 1, 1]),  # not more than 500,000
        ([500_001, 0, 0, 1], 50, [2, 1, 1, 1]),
        ([1_600_000, 0, 1], 4, [1, 1, 1]),  # of a mean of 400,000.25: not more than four times
        ([1_600_001, 0, 0], 4, [1, 1, 1]),
        ([1_600_001, 0, 0], 5, [4, 1, 1]),  # 1,600,001 / 500,000
        ([9_000_000, 1_000_000, 0], 10, [9, 1, 1]),  # the mean is 1,000,000
        ([9_000_001, 1_000_000, 0], 10, [9, 1, 1]),  # 1,000,000.1, up
    ],
)
def test_numbers_of_pieces(sizes, n_parts, wanted):
    assert count_pieces(np.array(sizes), n_parts).tolist() == wanted


def test_the_piece_of_a_row_is_a_hash_of_its_number():
    rows = np.arange(10**9, 10**9 + 60_000)
    got = piece_of(rows, 7)
    assert np.abs(np.bincount(got) / 60_000 - 1 / 7).max() < 0.01
    each = np.where(rows % 2, 7, 3)
    both = piece_of(rows, each)
    np.testing.assert_array_equal(both[each == 7], got[each == 7])
    np.testing.assert_array_equal(both[each == 3], piece_of(rows[each == 3], 3))
    assert piece_of(np.arange(12), 5).tolist() == [4, 1, 4, 3, 4, 4, 1, 0, 2, 4, 0, 1]


def test_a_part_of_equal_rows_is_cut(monkeypatch):
    monkeypatch.setattr(partition, "LARGE_ROWS", 50)
    rows = np.ones((3000, 2))
    codes = partition_rows(rows, 20)
    assert np.bincount(codes).size == 20  # of 150 rows, the mean
    np.testing.assert_array_equal(codes, piece_of(np.arange(3000), 20))
    assert not partition_rows(rows, 20, cut_large=False).any()
    assert not partition_rows(rows, 4).any()  # 3,000 rows are four times the mean and no more


def test_rows_of_zeros_and_opposite_rows():
    rows = np.array([[1.0, 0], [-1, 0], [0, 0], [0, 0], [0, 1]])
    codes = partition_rows(rows, 3)
    assert codes[2] == codes[3] == 0
    assert len(set(codes[[0, 1, 4]])) == 3
    assert not partition_rows(np.zeros((5, 2)), 3).any()
    lone = find_centres(np.array([[1.0, 0], [-1, 0]]), np.zeros(1), is_spherical=True)
    np.testing.assert_array_equal(np.abs(lone), [[1, 0]])  # their mean has no direction


def test_seeds():
    rows, _ = clouds(5, spread=2.0)
    found = [partition_rows(rows, 6, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert not same_parts(found[0], found[2])


@pytest.mark.parametrize("n_parts", [0, 301, True])
def test_bad_numbers_of_parts(n_parts):
    with pytest.raises(InputError, match="n_parts must be a whole number from 1 to the 300 rows"):
        partition_rows(clouds(0)[0], n_parts)


def test_rows_must_be_finite():
    with pytest.raises(InputError, match="row 1 holds NaN"):
        partition_rows(np.array([[1.0], [np.nan]]), 2)
