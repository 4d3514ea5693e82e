"""Importance of the bins and the adaptive order, against Eq. 6-8 by hand and in the limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal.core import Bins, Scores, adaptive_weights, bin_importance, order_rows
from dq_multimodal.core.importance import blend_weights, group_rows, normalise


def make(bin, stratum=None):
    bin = np.asarray(bin)
    stratum = np.zeros_like(bin) if stratum is None else np.asarray(stratum)
    rank = np.zeros_like(bin)
    for group in {*zip(stratum.tolist(), bin.tolist(), strict=True)}:
        member = (stratum == group[0]) & (bin == group[1])
        rank[member] = np.arange(member.sum())
    return Bins(bin, rank, np.zeros(len(bin)), stratum)


@pytest.mark.parametrize(
    ("norm", "scores", "wanted"),
    [
        ("minmax", [2.0, 4.0, 3.0], [0, 1, 0.5]),
        ("minmax", [1.0, np.nan, 3.0], [0, 0.5, 1]),  # without a score: the mean of the others
        # mean 0, standard deviation 1: weights e^-1, e, times 2 over their sum
        ("softmax-z", [-1.0, 1.0], 2 * np.exp([-1, 1]) / np.exp([-1, 1]).sum()),
        *(
            (norm, [value] * 4, [1] * 4)  # a constant score
            for norm in ("minmax", "softmax-z")
            for value in (0.0, -3.5, 1e-300, 7e12, np.nan)
        ),
    ],
)
def test_scores_are_normalised_as_by_hand(norm, scores, wanted):
    np.testing.assert_allclose(normalise(np.array(scores), norm), wanted)


def test_importance_by_hand():
    scores = Scores(np.array([0.1, 0.3, 0.2]), np.array([-4.0, -4.0, -2.0]))
    assert bin_importance(scores).tolist() == pytest.approx([0.0, 1.0, 1.5])
    assert bin_importance(scores, "representativeness").tolist() == pytest.approx([0, 1, 0.5])
    assert bin_importance(scores, "diversity").tolist() == [0.0, 0.0, 1.0]


def test_weights_by_hand():
    # sizes 2 and 4, importances 1 and 2.5: mean (2 * 1 + 4 * 2.5) / 6 = 2
    bins = make([0, 0, 1, 1, 1, 1])
    got = adaptive_weights(bins, np.array([1.0, 2.5]), 0.6)
    np.testing.assert_allclose(got, [2 * (0.6 * 0.5 + 0.4), 4 * (0.6 * 1.25 + 0.4)])
    assert got.sum() == pytest.approx(6)


def test_weights_need_only_the_number_and_the_size_of_each_bin():
    # of 10^9 rows and more: half of them in bin 0 of importance 1, half in bin 1 of 3: mean 2
    got = blend_weights(
        np.array([0, 1, 0]), np.array([10**9, 3 * 10**9, 2 * 10**9]), np.array([1.0, 3]), 0.5
    )
    np.testing.assert_allclose(got, [10**9 * 0.75, 3 * 10**9 * 1.25, 2 * 10**9 * 0.75])


def test_weights_of_strata_share_the_importance_of_a_bin_number():
    bins = make([0, 1, 0, 1, 1], [0, 0, 1, 1, 1])
    got = adaptive_weights(bins, np.array([1.0, 3.0]), 1.0)
    mean = (2 * 1 + 3 * 3) / 5
    np.testing.assert_allclose(got, np.array([1, 3, 1, 2 * 3]) / mean)


def test_adaptive_order_by_hand():
    # two bins of four rows, all importance in the second, alpha 0.5: weights 2 and 6, so of four
    # rows the second bin gives three (priorities 6, 2 | 2, 6/5 | 2/3 ... the tie to the lower bin)
    bins = make([0, 0, 0, 0, 1, 1, 1, 1])
    weights = adaptive_weights(bins, np.array([0.0, 1.0]), 0.5)
    assert weights.tolist() == [2.0, 6.0]
    order = order_rows(bins, weights, draw="rank")
    assert np.argsort(order).tolist() == [4, 0, 5, 6, 7, 1, 2, 3]


def test_alpha_1_with_a_bin_of_no_importance_takes_it_last():
    bins = make([0, 0, 1, 1])
    weights = adaptive_weights(bins, np.array([0.0, 1.0]), 1.0)
    assert np.argsort(order_rows(bins, weights, draw="rank")).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got"):
        adaptive_weights(make([0, 1]), np.ones(2), alpha)


def test_bad_importance():
    with pytest.raises(ValueError, match="each of the 2 bins, got 1"):
        adaptive_weights(make([0, 1]), np.ones(1))
    with pytest.raises(ValueError, match="at least 0"):
        adaptive_weights(make([0, 1]), np.array([1.0, -1.0]))


uneven = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(uneven, st.data())
def test_alpha_0_and_constant_importance_are_dq_row_for_row(rows, data):
    bins = make(*np.array(rows).T)
    m = int(bins.bin.max()) + 1
    importance = np.array(data.draw(st.lists(st.floats(0, 9), min_size=m, max_size=m)))
    seed = data.draw(st.integers(-5, 5))
    want = order_rows(bins, seed=seed)
    for weights in (
        adaptive_weights(bins, importance, 0.0),
        adaptive_weights(bins, np.full(m, data.draw(st.floats(0, 9))), data.draw(st.floats(0, 1))),
    ):
        np.testing.assert_array_equal(order_rows(bins, weights, seed=seed), want)


@settings(max_examples=60, deadline=None)
@given(uneven, st.data())
def test_prefixes_are_in_proportion_to_the_weights_until_a_bin_is_empty(rows, data):
    bins = make([b for b, _ in rows])
    m = int(bins.bin.max()) + 1
    importance = np.array(data.draw(st.lists(st.floats(0.1, 2), min_size=m, max_size=m)))
    weights = adaptive_weights(bins, importance, data.draw(st.floats(0, 1)))
    _, numbers, sizes = group_rows(bins)
    order = order_rows(bins, weights)
    for k in range(1, len(bins) + 1):
        taken = np.bincount(bins.bin[order < k], minlength=m)[numbers]
        if (taken >= sizes).any():
            break
        fair = k * weights / weights.sum()
        assert (np.abs(taken - fair) <= len(numbers)).all()
        # Sainte-Lague: no row taken had a lower priority than the next row of another bin
        assert (weights / (2 * taken - 1))[taken > 0].min() >= (weights / (2 * taken + 1)).max() * (
            1 - 1e-12
        )
