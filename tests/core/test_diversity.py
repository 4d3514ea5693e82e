"""The diversity score against Eq. 4-5 by hand and written naively, and its discriminator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal.core import diversity as module
from dq_multimodal.core.diversity import count_steps, diversity, learn_directions, sample_bins


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    rows, views = (unit(rng.normal(size=(11, 3))) for _ in range(2))
    want = -np.mean(
        [
            np.mean([np.exp(rows[i] @ rows[j] / 0.1) for j in range(11) if j != i])
            / np.exp(rows[i] @ views[i] / 0.1)
            for i in range(11)
        ]
    )
    for size in (1, 4, 11, 512):
        monkeypatch.setattr(module, "BLOCK_ROWS", size)
        assert diversity(rows, views) == pytest.approx(want, rel=1e-12)


def test_equal_rows_are_the_least_diverse_and_spread_ones_the_most():
    rng = np.random.default_rng(0)
    equal = np.tile(unit(rng.normal(size=(1, 8))), (20, 1))
    spread = unit(rng.normal(size=(20, 8)))
    assert diversity(equal, equal) == pytest.approx(-1)
    assert diversity(equal, equal) < diversity(spread, spread) < 0


def test_one_row_has_no_diversity():
    assert math.isnan(diversity(np.ones((1, 2)), np.ones((1, 2))))


def test_the_discriminator_learns_to_tell_rows_apart():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 30))
    views = rows + 0.3 * rng.normal(size=rows.shape)
    before = learn_directions(rows, views, seed=3, n_epochs=0)
    after = learn_directions(rows, views, seed=3, n_epochs=60)

    def hits(found):
        return np.mean((found[0] @ found[1].T).argmax(axis=1) == np.arange(200))

    gap = [np.mean((a * b).sum(1)) - np.mean(a @ b.T) for a, b in (before, after)]
    assert gap[1] > gap[0]
    assert hits(after) > 0.95
    for found in after:
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_same_seed_same_directions_and_torch_is_left_alone():
    rng = np.random.default_rng(0)
    rows, views = rng.normal(size=(2, 50, 6))
    torch.manual_seed(1)
    one = learn_directions(rows, views, seed=5, n_epochs=3)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)
    two = learn_directions(rows, views, seed=5, n_epochs=3)
    other = learn_directions(rows, views, seed=6, n_epochs=3)
    np.testing.assert_array_equal(one[0], two[0])
    assert not np.array_equal(one[0], other[0])


def test_progress_counts_to_its_end():
    seen = []
    learn_directions(*np.random.default_rng(0).normal(size=(2, 300, 4)), on_steps=seen.append)
    assert sum(seen) == count_steps(300) > 0


def test_negative_seeds_and_single_rows_are_fine():
    assert count_steps(1) == 0
    one, view = learn_directions(np.ones((1, 3)), np.ones((1, 3)), seed=-7)
    assert np.isfinite(one).all() and np.isfinite(view).all()


def test_a_sample_of_every_bin():
    members = np.repeat([0, 1, 2, -1], [1500, 40, 30000, 7])
    key = np.random.default_rng(0).permutation(len(members))
    picks = sample_bins(members, key)
    assert np.bincount(members[picks]).tolist() == [225, 40, 2000]
    assert (np.diff(picks) > 0).all()
    first = np.flatnonzero(members == 0)
    assert set(picks[members[picks] == 0]) == set(first[np.argsort(key[first])[:225]])
    assert np.bincount(members[sample_bins(members, key, 50)]).tolist() == [50, 40, 50]
    assert len(sample_bins(np.full(3, -1), np.arange(3))) == 0


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.integers(-1, 2), min_size=1, max_size=400),
    n_parts=st.integers(1, 4),
    n_rows=st.sampled_from([None, 3, 50]),
)
def test_samples_of_parts_merge_to_the_sample_of_all(members, n_parts, n_rows):
    members = np.array(members)
    rng = np.random.default_rng(len(members))
    key, of = rng.permutation(len(members)), rng.integers(0, n_parts, len(members))
    some = []
    for part in range(n_parts):
        own = np.flatnonzero(of == part)
        some.append(own[sample_bins(members[own], key[own], n_rows or 120)])
    some = np.sort(np.concatenate(some))
    sizes = np.bincount(members[members >= 0], minlength=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_ROWS", 120)
        merged = some[sample_bins(members[some], key[some], n_rows, sizes)]
        np.testing.assert_array_equal(merged, sample_bins(members, key, n_rows))
