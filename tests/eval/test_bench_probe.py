"""The linear probe against its definition and against scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from harness.bundle import Bundle, BundleWriter
from harness.probe import Protocol, fit, train
from harness.suite import Job
from sklearn.linear_model import LogisticRegression

from dq_multimodal.config import InputError

CPU = torch.device("cpu")
SETTINGS = {"tolerance": 1e-7, "max_iterations": 1000}


def make_rows(n, d=20, k=4, seed=0):
    """Features with spread scales, and classes that follow from them in part."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d)) * np.geomspace(0.3, 3, d)
    plan = np.random.default_rng(99).normal(size=(d, k))
    return rows.astype(np.float32), (rows @ plan + 2 * rng.gumbel(size=(n, k))).argmax(axis=1)


def fitted(rows, classes, weights=None, **options):
    weights = np.ones(len(rows)) if weights is None else weights
    tensors = (torch.from_numpy(x) for x in (rows.astype(np.float64), classes, weights))
    return fit(*tensors, **(SETTINGS | options))


@pytest.mark.parametrize("penalty", [300.0, 30.0, 1.0])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_it_agrees_with_scikit_learn(penalty, is_weighted):
    rows, classes = make_rows(300)
    weights = np.ones(300)
    if is_weighted:
        weights = np.random.default_rng(1).uniform(0.1, 5, size=300)
        weights /= weights.mean()
    ours = fitted(rows, classes, weights, penalty=penalty)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=10_000)
    theirs.fit(rows.astype(np.float64), classes, sample_weight=weights)
    np.testing.assert_allclose(ours.matrix.numpy().T, theirs.coef_, atol=2e-5)
    shift = theirs.intercept_ - theirs.intercept_.mean()
    np.testing.assert_allclose(ours.bias.numpy() - ours.bias.numpy().mean(), shift, atol=2e-5)


def test_more_columns_than_rows_converge_too():
    rows, classes = make_rows(40, d=300)
    found = fitted(rows, classes, penalty=0.04)
    assert found.gradient <= 1e-7
    scores = rows @ found.matrix.numpy() + found.bias.numpy()
    assert (scores.argmax(axis=1) == classes).all()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    writer = BundleWriter(folder)
    for part, n, seed in (("train", 600, 0), ("test", 400, 1)):
        rows, classes = make_rows(n, seed=seed)
        rows = np.concatenate([50 + 10 * rows, np.full((n, 1), 0.1)], axis=1).astype(np.float32)
        if part == "test":
            rows[0, -1] = 0.3  # does not vary in the training rows
        writer.add_array(f"toy/{part}/features", rows)
        writer.add_array(f"toy/{part}/labels", classes.astype(np.int64))
    writer.finish({"tasks": {}})
    return Bundle(folder)


def job(rows, **changes):
    settings = {"penalties": {0.5: 15.0, 1: 1.0}, "tolerance": 1e-6}
    found = {"keep_ratio": 0.5, "seed": 0, "weights": None, "settings": settings} | changes
    protocol = Protocol(**found.pop("settings"))
    return Job("toy", protocol, "logistic regression", rows, **found)


def accuracy(found):
    metric = found["metrics"]["test accuracy"]
    assert metric["best"] is None
    return metric["last"]


def run(bundle, job):
    return train(job, bundle, CPU, lambda share: None)


@pytest.mark.parametrize(("keep_ratio", "penalty"), [(0.2, 15), (0.5, 15), (0.51, 1)])
def test_the_accuracy_is_that_of_scikit_learn_on_standardised_features(bundle, keep_ratio, penalty):
    rows = np.random.default_rng(3).permutation(600)[:150]
    x, y = bundle.array("toy/train/features").astype(float), bundle.array("toy/train/labels")
    test_x, test_y = bundle.array("toy/test/features"), bundle.array("toy/test/labels")
    mean, deviation = x.mean(axis=0), x[:, :-1].std(axis=0)
    scale = np.append(deviation, 1)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=10_000)
    theirs.fit((x[rows] - mean) / scale, y[rows])
    wanted = 100 * theirs.score((test_x - mean) / scale, test_y)
    found = run(bundle, job(rows, keep_ratio=keep_ratio))
    assert accuracy(found) == pytest.approx(wanted, abs=0.26)  # one row of 400
    assert 40 < wanted < 95
    assert found["gradient"] <= 1e-6
    assert found["steps"] > 3


def test_neither_seed_nor_order_changes_the_result(bundle):
    rows = np.arange(0, 600, 5)
    first = run(bundle, job(rows))
    assert run(bundle, job(rows, seed=7)) == first
    assert accuracy(run(bundle, job(rows[::-1].copy()))) == accuracy(first)


def test_weights_change_the_result(bundle):
    rows = np.arange(0, 600, 5)
    ones = run(bundle, job(rows, weights=np.ones(120, dtype=np.float32)))
    assert ones == run(bundle, job(rows))
    classes = bundle.array("toy/train/labels")[rows]
    weights = np.where(classes == 0, 20.0, 1.0)
    assert accuracy(run(bundle, job(rows, weights=weights / weights.mean()))) != accuracy(ones)


def test_weights_are_not_chances_here(bundle):
    with pytest.raises(InputError, match="use_weights sample is for image and text"):
        run(bundle, job(np.arange(50), weights=np.ones(50, dtype=np.float32), is_sampled=True))


def test_a_class_without_rows_is_never_right(bundle):
    classes, tests = bundle.array("toy/train/labels"), bundle.array("toy/test/labels")
    only = np.flatnonzero(classes == 2)[:20]
    assert accuracy(run(bundle, job(only))) == pytest.approx(100 * (tests == 2).mean())
    without = np.flatnonzero(classes != 2)
    share = 100 * (tests != 2).mean()
    assert 0.5 * share < accuracy(run(bundle, job(without))) < share


def test_progress_goes_from_0_to_1_and_may_stop_it(bundle):
    shares: list[float] = []
    train(job(np.arange(300)), bundle, CPU, shares.append)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert all(a <= b for a, b in itertools.pairwise(shares))

    class Over(Exception):
        pass

    def stop(share):
        raise Over

    with pytest.raises(Over):
        train(job(np.arange(300)), bundle, CPU, stop)
