"""Weights of rows: read, drawn by, and in the loss of classifiers."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from dq_multimodal import InputError
from dq_multimodal.training.classify import ClassifierArguments, train_classifier
from dq_multimodal.training.pictures import Pictures, draw_shifts, shift_and_flip
from dq_multimodal.training.record import make_accelerator
from dq_multimodal.training.weights import draw_rows, find_use, read_weights

N_ROWS, RATE = 24, 0.05


def test_weights_are_read_row_by_row():
    rows = Dataset.from_dict({"dq_weight": [0.5, 2.0, 0.0], "text": ["a", "b", "c"]})
    assert read_weights(rows).tolist() == [0.5, 2.0, 0.0]
    assert read_weights(rows.select([2, 1])).tolist() == [0.0, 2.0]
    assert read_weights(rows.remove_columns("dq_weight")) is None


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [1.0, None], ["a", "b"]])
def test_bad_weights(weights):
    with pytest.raises(InputError, match="dq_weight must"):
        read_weights(Dataset.from_dict({"dq_weight": weights}))


def test_how_weights_are_used():
    some = np.ones(3)
    asked = (None, "loss", "sample", "none")
    assert [find_use(each, some) for each in asked] == ["none", "loss", "sample", "none"]
    assert {find_use(each, None) for each in asked} == {"none"}


def test_draws_are_in_proportion_to_the_weights_and_follow_from_seed_and_epoch():
    weights = np.array([1.0, 0.0, 3.0, 4.0])
    rows = draw_rows(weights, 80_000, seed=1, epoch=2)
    counts = np.bincount(rows, minlength=4)
    np.testing.assert_allclose(counts, weights * 10_000, atol=500)  # four standard deviations
    np.testing.assert_array_equal(rows, draw_rows(weights, 80_000, seed=1, epoch=2))
    assert (rows != draw_rows(weights, 80_000, seed=1, epoch=3)).any()


def make_pictures():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (N_ROWS, 8, 8, 3)).astype(np.uint8)

    def read(rows):
        return [Image.fromarray(pixels[k]) for k in rows]

    return Pictures(read, np.arange(N_ROWS) % 3, 8), torch.from_numpy(pixels)


def linear_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def train(folder, weights=None, *, batch_size=N_ROWS, is_sampled=False):
    """Train for one epoch by plain gradient descent."""
    args = ClassifierArguments(
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        learning_rate=RATE,
        momentum=0.0,
        weight_decay=0.0,
        seed=7,
    )
    net, pictures = linear_net(), make_pictures()[0]
    pictures.statistics = [0.5] * 3, [0.25] * 3
    train_classifier(
        *(net, pictures, None, args, make_accelerator(), folder),
        weights=weights,
        is_sampled=is_sampled,
    )
    return net[1].weight.detach()


def step_by_definition(order, factors):
    """Give the weights of the linear net after one step on the mean of factor x loss."""
    net, (_, pixels) = linear_net(), make_pictures()
    draws = torch.Generator().manual_seed(7 * 1_000_003)
    moved = shift_and_flip(pixels[order], *draw_shifts(N_ROWS, draws, 1), 1)
    inputs = ((moved / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    log_p = net(inputs).log_softmax(dim=1)
    total = -sum(f * log_p[k, row % 3] for k, (row, f) in enumerate(zip(order, factors)))  # noqa: B905
    (gradient,) = torch.autograd.grad(total / len(order), net[1].weight)
    return net[1].weight.detach() - RATE * gradient


def test_the_loss_of_a_row_is_multiplied_by_its_weight_of_mean_1(tmp_path):
    weights = np.random.default_rng(1).uniform(0, 3, N_ROWS)
    order = np.random.default_rng((7, 0)).permutation(N_ROWS)
    wanted = step_by_definition(order, weights[order] / weights.mean())
    torch.testing.assert_close(train(tmp_path / "a", weights), wanted)
    plain = step_by_definition(order, np.ones(N_ROWS))
    torch.testing.assert_close(train(tmp_path / "b"), plain)
    torch.testing.assert_close(train(tmp_path / "c", np.full(N_ROWS, 3.0)), plain)
    assert (wanted - plain).abs().max() > 1e-3


def test_a_batch_is_not_brought_to_mean_1(tmp_path):
    """Else weights would do nothing in batches of one row."""
    weights = np.r_[np.full(12, 0.5), np.full(12, 1.5)]
    got = train(tmp_path / "a", weights, batch_size=1)
    plain = train(tmp_path / "b", batch_size=1)
    assert (got - plain).abs().max() > 1e-3


def test_rows_are_drawn_by_their_weights(tmp_path):
    weights = np.zeros(N_ROWS)
    weights[[4, 9]] = 1.0, 3.0
    order = draw_rows(weights, N_ROWS, seed=7, epoch=0)
    assert set(order) == {4, 9}
    wanted = step_by_definition(order, np.ones(N_ROWS))
    torch.testing.assert_close(train(tmp_path, weights, is_sampled=True), wanted)
