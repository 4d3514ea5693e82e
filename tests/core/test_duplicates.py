"""find_duplicates against the walk of its definition, hostile rows, parts, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal import InputError
from dq_multimodal.core import duplicates
from dq_multimodal.core.duplicates import find_duplicates


def plain(rows, order, threshold):
    """The walk, row by row, by the cosine as it is."""
    kept, found = [], np.full(len(rows), -1)
    for row in np.argsort(order):
        if not rows[row].any():
            continue
        unit = rows[row] / np.linalg.norm(rows[row])
        near = [k for k in kept if unit @ rows[k] / np.linalg.norm(rows[k]) >= threshold - 1e-7]
        if near:
            found[row] = near[0]
        else:
            kept.append(row)
    return found


def hostile(seed, n_rows, width=3):
    """Coarse rows with repeats, multiples, opposites and zeros."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, size=(n_rows, width)) * 10.0 ** rng.integers(-20, 20, (n_rows, 1))
    rows[rng.random(n_rows) < 0.2] = rows[0]
    return rows


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 50), st.sampled_from([0.1, 0.77, 0.9, 1, 1.0]))
def test_found_are_those_of_the_plain_walk(seed, n_rows, threshold):
    rows = hostile(seed, n_rows)
    order = np.random.default_rng(seed).permutation(n_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "BLOCK_ROWS", 1 + seed % 9)
        patch.setattr(duplicates, "KEPT_ROWS", 1 + seed % 4)
        got = find_duplicates(rows, order, threshold)
    np.testing.assert_array_equal(got, plain(rows, order, threshold))


def test_many_rows_of_few_clouds():
    rng = np.random.default_rng(0)
    middle = rng.normal(size=(400, 16))
    rows = (middle[rng.integers(0, 400, 1300)] + 0.1 * rng.normal(size=(1300, 16))).astype("f4")
    order, seen = rng.permutation(1300), []
    got = find_duplicates(rows, order, 0.97, on_pairs=seen.append)
    np.testing.assert_array_equal(got, plain(rows.astype(np.float64), order, 0.97))
    assert 200 < np.count_nonzero(got < 0) < 1100
    assert 0 < sum(seen) < 1300 * 1299 // 2
    same = find_duplicates(torch.from_numpy(rows)[:, list(range(15, -1, -1))], order, 0.97)
    np.testing.assert_array_equal(same, got)


def test_cosines_close_to_the_threshold_are_told_apart_in_double_precision(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 2)
    least = np.float64(0.9)
    angle = np.arccos(least + np.array([-4, -3, -2, 2, 3, 4]) * 1e-6)
    rows = np.concatenate([[[1.0, 0]], np.stack([np.cos(angle), np.sin(angle)], axis=1)])
    away = np.zeros((7, 4))
    away[:, :2] = rows
    got = find_duplicates(away, np.arange(7), least)
    np.testing.assert_array_equal(got[[0, 1, 4, 5, 6]], [-1, -1, 0, 0, 0])


def test_multiples_are_duplicates_at_1_and_equal_rows_are_compared_once():
    rng = np.random.default_rng(1)
    row = rng.normal(size=(1, 300)).astype(np.float32)
    rows = np.concatenate([row, 3 * row, -row, row, rng.normal(size=(5, 300)), 0 * row, 0 * row])
    seen = []
    got = find_duplicates(rows, np.arange(11), 1, on_pairs=seen.append)
    np.testing.assert_array_equal(got, [-1, 0, -1, 0] + [-1] * 7)
    assert sum(seen) <= 8 * 7 // 2


def test_parts(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_ROWS", 40)
    rng = np.random.default_rng(2)
    rows = np.repeat(rng.normal(size=(30, 40)), 4, axis=0) + 1e-4 * rng.normal(size=(120, 40))
    order = rng.permutation(120)
    got = find_duplicates(rows, order, 0.99)  # rows this close lie in one part
    np.testing.assert_array_equal(got, plain(rows, order, 0.99))


@pytest.mark.parametrize(
    ("order", "threshold", "message"),
    [
        (np.arange(2), 0.9, "order must hold one place for each of the 3 rows"),
        (np.arange(3), 0, r"threshold must lie in \(0, 1\], got 0"),
        (np.arange(3), 1.1, r"threshold must lie in \(0, 1\], got 1.1"),
    ],
)
def test_bad_input(order, threshold, message):
    with pytest.raises(InputError, match=message):
        find_duplicates(np.eye(3), order, threshold)


def test_nothing_but_zeros():
    np.testing.assert_array_equal(find_duplicates(np.zeros((3, 2)), np.arange(3), 0.5), [-1] * 3)
