"""A large stratum on an accelerator: the picks of the greedy. Runs on the CPU, as on a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal.core import bins, make_bins, sweep


def check(x, n_bins, similarity, strata=None, device="cpu"):
    alone = make_bins(x, n_bins, similarity, strata)
    swept = make_bins(x, n_bins, similarity, strata, device=device)
    np.testing.assert_array_equal(swept.bin, alone.bin)
    np.testing.assert_array_equal(swept.rank, alone.rank)
    size = np.abs(alone.gain).max() + 1e-300
    np.testing.assert_allclose(swept.gain / size, alone.gain / size, atol=1e-7)


@pytest.fixture(autouse=True)
def every_stratum_is_large(monkeypatch):
    monkeypatch.setattr(bins, "MAX_ROWS", 0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=40),
    n_bins=st.integers(1, 6),
    similarity=st.sampled_from(["cosine", "euclidean"]),
    sizes=st.sampled_from([(512, 128), (8, 4), (2, 1)]),
)
def test_equals_the_greedy_on_ties_and_equal_rows(values, n_bins, similarity, sizes):
    x = np.array(values, dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bins, "MAX_ROWS", 0)
        patch.setattr(sweep, "FRONT_ROWS", sizes[0])
        patch.setattr(sweep, "RUN_PICKS", sizes[1])
        check(x, min(n_bins, len(x)), similarity)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("swept_values", [2**27, 3000])
def test_more_rows_than_the_front_holds(similarity, shift, swept_values, monkeypatch):
    monkeypatch.setattr(sweep, "SWEPT_VALUES", swept_values)
    monkeypatch.setattr(sweep, "FRONT_ROWS", 100)
    monkeypatch.setattr(sweep, "MAX_FRONT_ROWS", 150)
    x = (np.random.default_rng(0).normal(size=(900, 12)) + shift).astype(np.float32)
    check(x, 7, similarity)


def test_all_rows_tie():
    check(np.eye(40, dtype=np.float32), 3, "cosine")
    check(np.ones((700, 3), dtype=np.float32), 3, "euclidean")


def test_a_run_makes_many_picks_at_once(monkeypatch):
    kept = []
    pick_some = sweep.Sweep._pick_some
    monkeypatch.setattr(
        sweep.Sweep, "_pick_some", lambda self: kept.append(pick_some(self)) or kept[-1]
    )
    x = (np.random.default_rng(0).normal(size=(4000, 48)) + 0.5).astype(np.float32)
    check(x, 4, "cosine")
    assert sum(kept) == 4000
    assert np.mean(kept) > 30


def test_rows_that_have_no_room_stay_on_the_processor(monkeypatch):
    monkeypatch.setattr(bins, "fits_device", lambda *asked: False)
    monkeypatch.delattr(sweep.Sweep, "__init__")
    check(np.random.default_rng(2).normal(size=(90, 4)), 3, "cosine")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_equals_the_greedy_on_a_gpu(similarity):
    x = (np.random.default_rng(0).normal(size=(20_000, 96)) + 0.3).astype(np.float32)
    check(x, 10, similarity, device="cuda")
