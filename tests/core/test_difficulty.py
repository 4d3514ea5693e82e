"""Scores of training dynamics: hand-worked cases, plain twins of the formulas, limits, errors."""

import statistics

import numpy as np
import pytest
from scipy.stats import beta

from dq_multimodal import InputError
from dq_multimodal.core.difficulty import (
    aum,
    cad,
    ccs_strata,
    confidence,
    difficulty_weights,
    dual,
    dual_propensity,
    dyn_unc,
    el2n,
    forgetting,
    ifd,
)

P = np.array([[0.1, 0.9, 0.5], [0.3, 0.9, 0.25], [0.8, 0.9, 0.75]])
OTHER = np.array([[0.7, 0.1, 0.2], [0.2, 0.1, 0.5], [0.1, 0.1, 0.25]])
EL2N = np.array([[1.2, 0.1, 0.6], [0.9, 0.1, 1.0], [0.2, 0.1, 0.2]])
DYNAMICS = np.stack([P, OTHER, EL2N], axis=2)


def made_up(n_epochs, n_rows=5, seed=0):
    """Dynamics of softmax probabilities over four classes, in half precision."""
    rng = np.random.default_rng(seed)
    p = np.exp(rng.normal(size=(n_epochs, n_rows, 4)) * 3)
    p /= p.sum(axis=2, keepdims=True)
    distance = np.sqrt((1 - p[..., 0]) ** 2 + (p[..., 1:] ** 2).sum(axis=2))
    return np.stack([p[..., 0], p[..., 1:].max(axis=2), distance], axis=2).astype(np.float16)


def near(got, want):
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_hand_worked_scores():
    near(aum(DYNAMICS), [0.2 / 3, 0.8, (0.3 - 0.25 + 0.5) / 3])
    near(confidence(DYNAMICS), [0.4, 0.9, 0.5])
    near(el2n(DYNAMICS[:2]), [0.9, 0.1, 1.0])
    # Sample deviations: of 0.1, 0.3 it is 0.2 / sqrt(2), of 0.3, 0.8 it is 0.5 / sqrt(2).
    near(dyn_unc(DYNAMICS, window=2), [0.35 / 2**0.5, 0, 0.375 / 2**0.5])
    near(
        dual(DYNAMICS, window=2),
        np.array([(2 * 0.8 + 5 * 0.45) / 2, 0, (2.5 * 0.625 + 5 * 0.5) / 2]) / 2**0.5,
    )
    near(dual(DYNAMICS[:2]), np.array([1.6, 0, 2.5 * 0.625]) / 2**0.5)
    near(cad(DYNAMICS, window=2), np.array([0.5, 0, 0.6]) / 2**0.5)
    near(cad(DYNAMICS[:2]), np.array([0.3, 0, 0.4]) / 2**0.5)


def test_forgetting_by_hand():
    right = np.array(  # rows in columns
        [[1, 1, 0, 0, 1], [0, 1, 0, 1, 1], [1, 1, 0, 1, 1], [0, 1, 0, 1, 0]], dtype=bool
    )
    dynamics = np.zeros((4, 5, 3))
    dynamics[..., 0] = np.where(right, 0.6, 0.4)
    dynamics[..., 1] = np.where(right, 0.3, 0.4)  # equal probabilities are wrong
    near(forgetting(dynamics), [2, 0, 5, 0, 1])
    near(forgetting(dynamics[:1]), [0, 0, 2, 2, 0])


@pytest.mark.parametrize(("n_epochs", "window"), [(25, 10), (12, 5), (7, 10), (2, 2)])
def test_windows_are_those_of_the_plain_formula(n_epochs, window):
    dynamics = made_up(n_epochs).astype(np.float64)
    size = min(window, n_epochs)
    starts = range(n_epochs - size + 1)
    for row in range(dynamics.shape[1]):
        p, e = (list(dynamics[:, row, at]) for at in (0, 2))
        spans = [p[start : start + size] for start in starts]
        moved = [statistics.stdev(e[start : start + size]) for start in starts]
        unsure = [statistics.stdev(span) for span in spans]
        hard = [10 * s * (1 - statistics.mean(span)) for s, span in zip(unsure, spans, strict=True)]
        wants = (statistics.mean(unsure), statistics.mean(hard), statistics.mean(moved[-2:]))
        gots = (dyn_unc(dynamics, window), dual(dynamics, window), cad(dynamics, window))
        for got, want in zip(gots, wants, strict=True):
            assert got[row] == pytest.approx(want, rel=1e-9)


def test_dual_looks_at_the_first_epochs_only():
    dynamics = made_up(40)
    np.testing.assert_array_equal(dual(dynamics), dual(dynamics[:30]))
    assert (dual(dynamics) != dual(dynamics[10:])).all()


def test_scores_of_half_precision_are_those_of_the_same_numbers_in_double():
    dynamics = made_up(12)
    for score in (aum, confidence, forgetting, dyn_unc, dual):
        np.testing.assert_array_equal(score(dynamics), score(dynamics.astype(np.float64)))
    assert (el2n(np.full((1, 2, 3), [0.0, 1.0, 2**0.5]).astype(np.float16)) > 1.41).all()


def test_ifd():
    losses = np.array([[[1.0, 2.0], [3.0, 2.0], [0.5, 0.0]], [[2.0, 2.0], [0.0, 1.0], [0.0, 0.0]]])
    near(ifd(losses), [[0.5, 1.5, 1], [1, 0, 1]])
    near(ifd(losses[0]), [0.5, 1.5, 1])


def test_difficulty_weights_are_clipped_and_grow_with_difficulty():
    scores = np.arange(101) / 100
    near(difficulty_weights("el2n", scores), np.minimum(scores, 0.95))
    near(difficulty_weights("aum", scores), np.minimum(1 - scores, 0.95))
    assert difficulty_weights("aum", np.array([1.0 + 1e-12])) == [0]
    with pytest.raises(InputError, match="weights by cad must be finite and at least 0, got -3"):
        difficulty_weights("cad", np.array([1.0, -3]))


def test_dual_propensity_is_the_score_times_the_beta_density():
    rng = np.random.default_rng(3)
    scores, means = rng.random(40), rng.uniform(0.05, 0.95, size=40)
    for keep_ratio in (0.1, 0.5, 1.0):
        mu = means[np.argsort(-scores)[:10]].mean()
        b = 15 * (1 - mu) * (1 - (1 - keep_ratio) ** 4)
        want = scores * beta(16 - b, b).pdf(means)
        got = dual_propensity(scores, means, keep_ratio)
        np.testing.assert_allclose(got, want / want.sum(), rtol=1e-9)


def test_fewer_rows_are_easier_rows():
    means = np.linspace(0.05, 0.95, 50)
    expected = [dual_propensity(np.ones(50), means, r) @ means for r in (0.9, 0.5, 0.1)]
    assert expected == sorted(expected)


def test_chances_stay_finite_at_the_ends():
    ends = np.array([0.0, 1.0, 1.0, 0.5])
    for scores in (np.zeros(4), np.array([0.0, 0, 0, 1e-300]), np.array([1.0, 1, 1, 1])):
        chances = dual_propensity(scores, ends, 0.01)
        assert np.isfinite(chances).all()
        assert chances.sum() == pytest.approx(1)
    assert np.isfinite(dual_propensity(np.ones(3), np.ones(3), 1.0)).all()


def test_ccs_strata_have_equal_width():
    np.testing.assert_array_equal(
        ccs_strata(np.array([-0.5, -0.49, -0.47, 0.0, 0.485, 0.5])), [0, 0, 1, 25, 49, 49]
    )
    np.testing.assert_array_equal(ccs_strata(np.full(3, 0.2)), [0, 0, 0])
    codes = ccs_strata(np.random.default_rng(0).uniform(-1, 1, size=20_000))
    assert codes.max() == 49
    assert np.bincount(codes).std() < 30


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (DYNAMICS[:, :, :2], r"dynamics must be floats of shape \(epochs, n, 3\)"),
        (DYNAMICS[:0], r"dynamics must be floats of shape \(epochs, n, 3\)"),
        (DYNAMICS.astype(int), r"dynamics must be floats"),
        (DYNAMICS * [1.5, 1, 1], r"the probability of the label must lie in \[0, 1\]"),
        (DYNAMICS * [1, -1, 1], "the largest other probability must lie in"),
        (DYNAMICS * [1, 1, 2], r"EL2N must lie in \[0, 1.414\], got 2.4"),
        (DYNAMICS * [1, 1, np.nan], "EL2N must lie in .* got nan"),
    ],
)
def test_wrong_dynamics(wrong, message):
    for score in (aum, confidence, forgetting, dyn_unc, dual):
        with pytest.raises(InputError, match=message):
            score(wrong)


def test_one_epoch_has_no_deviation():
    for score in (dyn_unc, dual, cad):
        with pytest.raises(InputError, match="needs dynamics of at least 2 epochs"):
            score(DYNAMICS[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ifd(np.ones((2, 3))), r"losses must be floats of shape \(..., 2\)"),
        (lambda: ifd(-np.ones((2, 2))), "losses must be finite and at least 0"),
        (lambda: ccs_strata(np.array([np.nan])), r"AUM must lie in \[-1, 1\]"),
        (lambda: dual_propensity(-np.ones(2), np.ones(2), 0.5), "DUAL scores must be finite"),
        (lambda: dual_propensity(np.ones(2), 2 * np.ones(2), 0.5), "confidence must lie in"),
    ],
)
def test_numbers_out_of_range(call, message):
    with pytest.raises(InputError, match=message):
        call()
