"""Rows that are outer products: the same picks as the multiplied-out rows, never multiplied out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bins import SIZES, set_sizes

from dq_multimodal import InputError
from dq_multimodal.core import make_bins


def factors(seed, n=60, k=3, d=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, k)) + 0.3, rng.normal(size=(n, d)) + 0.5


def multiplied(left, right):
    return np.einsum("ni,nj->nij", left, right).reshape(len(left), -1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["cosine", "euclidean"]), st.integers(1, 6))
def test_bins_are_those_of_the_multiplied_rows(seed, similarity, n_bins):
    left, right = factors(seed)
    strata = np.arange(60) % 2
    got = make_bins(np.hstack([left, right]), n_bins, similarity, strata, n_left=3)
    want = make_bins(multiplied(left, right), n_bins, similarity, strata)
    np.testing.assert_array_equal(got.bin, want.bin)
    np.testing.assert_array_equal(got.rank, want.rank)
    if similarity == "cosine":
        np.testing.assert_allclose(got.gain, want.gain, rtol=1e-9, atol=1e-9)
    else:
        scale = np.abs(want.gain).max()
        np.testing.assert_allclose(got.gain, want.gain, atol=1e-9 * scale)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("sizes", SIZES)
def test_pools_of_outer_products(similarity, sizes, monkeypatch):
    left, right = factors(1, n=120, k=2, d=3)
    want = make_bins(multiplied(left, right), 4, similarity)
    set_sizes(monkeypatch, SIZES[sizes])
    got = make_bins(np.hstack([left, right]), 4, similarity, n_left=2)
    np.testing.assert_array_equal(got.bin, want.bin)
    np.testing.assert_array_equal(got.rank, want.rank)


def test_rows_of_zeros_stay_zero():
    left, right = factors(3)
    left[5] = 0
    bins = make_bins(np.hstack([left, right]), 3, n_left=3)
    assert np.isfinite(bins.gain).all()


def test_scaling_a_factor_changes_no_cosine_pick():
    left, right = factors(4)
    scale = np.random.default_rng(0).uniform(1e-6, 1e6, size=(60, 1))
    got = make_bins(np.hstack([left * scale, right / scale]), 5, n_left=3)
    want = make_bins(np.hstack([left, right]), 5, n_left=3)
    np.testing.assert_array_equal(got.bin, want.bin)


@pytest.mark.parametrize("n_left", [-1, 8, 9])
def test_both_factors_need_a_number(n_left):
    left, right = factors(0)
    with pytest.raises(InputError, match="n_left must lie in"):
        make_bins(np.hstack([left, right]), 2, n_left=n_left)
