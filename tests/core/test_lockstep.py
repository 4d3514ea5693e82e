"""Strata in lockstep: the picks of the greedy of each alone. Runs on the CPU, as on a GPU."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal.core import bins, lockstep, make_bins


def check(x, n_bins, similarity, strata):
    alone = make_bins(x, n_bins, similarity, strata)
    together = make_bins(x, n_bins, similarity, strata, device="cpu")
    np.testing.assert_array_equal(together.bin, alone.bin)
    np.testing.assert_array_equal(together.rank, alone.rank)
    size = np.abs(alone.gain).max() + 1e-300
    np.testing.assert_allclose(together.gain / size, alone.gain / size, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=30),
    n_bins=st.integers(1, 6),
    n_strata=st.integers(1, 5),
    similarity=st.sampled_from(["cosine", "euclidean"]),
)
def test_equals_the_greedy_of_each_stratum_on_ties(values, n_bins, n_strata, similarity):
    x = np.array(values, dtype=np.float32)
    check(x, min(n_bins, len(x)), similarity, np.arange(len(x)) % n_strata)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20, 2**33])
def test_uneven_strata_in_chunks(similarity, chunk_bytes, monkeypatch):
    monkeypatch.setattr(lockstep, "CHUNK_BYTES", chunk_bytes)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 12)) + 0.5).astype(np.float32)
    check(x, 7, similarity, np.sort(rng.geometric(0.2, size=400)))


@pytest.mark.parametrize("max_rows", [lockstep.MAX_ROWS, 0])  # 0: by sweeps
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rows_of_extreme_size_and_of_zeros(scale, max_rows, monkeypatch):
    monkeypatch.setattr(bins, "MAX_ROWS", max_rows)
    x = np.random.default_rng(1).normal(size=(60, 4)) * scale
    x[::7] = 0
    for similarity in ("cosine", "euclidean"):
        check(x, 4, similarity, np.arange(60) % 3)


def test_large_strata_go_to_the_other_path(monkeypatch):
    monkeypatch.setattr(bins, "MAX_ROWS", 20)
    x = np.random.default_rng(2).normal(size=(90, 4))
    check(x, 3, "cosine", np.minimum(np.arange(90) // 10, 3))
