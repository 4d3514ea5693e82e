"""MTT against training written out by hand, and its gradients against differences."""

import pytest
import torch
from tiny_real import make_real
from torch import nn

from dq_multimodal.condensation import trajectory_matching
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.experts import Trajectory, describe_experts, write_about
from dq_multimodal.condensation.loop import begin, run_loop
from dq_multimodal.condensation.nets import build_net
from dq_multimodal.condensation.synthetic import Synthetic
from dq_multimodal.condensation.trajectory_matching import (
    draw_batches,
    match_trajectories,
    train_student,
    trajectory_loss,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


START = {"weight": draw(3, 4), "bias": draw(3, seed=1)}
GOAL = {"weight": draw(3, 4, seed=2), "bias": draw(3, seed=3)}
CLASSES = torch.tensor([0, 1, 2, 1, 0])


def student_loss(images, rate, classes=CLASSES, n_steps=3):
    net = nn.Linear(4, 3).double()
    batches = [(images + step, classes) for step in range(n_steps)]
    return trajectory_loss(train_student(net, START, iter(batches), rate), START, GOAL)


def test_loss_is_that_of_training_by_hand():
    """The slope of the cross-entropy of a linear layer is (softmax - one-hot) times the input."""
    images, rate = draw(5, 4, seed=4), 0.1
    weight, bias = START["weight"].clone(), START["bias"].clone()
    for step in range(3):
        x = images + step
        wrong = torch.softmax(x @ weight.T + bias, dim=1) - torch.eye(3)[CLASSES]
        weight, bias = weight - rate * wrong.T @ x / 5, bias - rate * wrong.mean(0)
    far = (weight - GOAL["weight"]).square().sum() + (bias - GOAL["bias"]).square().sum()
    whole = sum((START[name] - GOAL[name]).square().sum() for name in GOAL)
    found = student_loss(images, torch.tensor(rate))
    assert found.item() == pytest.approx((far / whole).item(), rel=1e-9)
    soft = student_loss(images, torch.tensor(rate), torch.eye(3).double()[CLASSES])
    assert soft.item() == pytest.approx(found.item(), rel=1e-9)


def test_gradients_go_through_all_steps():
    images = draw(5, 4, seed=4).requires_grad_()
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(student_loss, (images, rate))


def test_batches_of_a_large_set_are_permutations_in_parts(monkeypatch):
    monkeypatch.setattr(trajectory_matching, "STUDENT_BATCH", 4)
    found = [rows.tolist() for rows in draw_batches(6, 5)]
    assert [len(rows) for rows in found] == [4, 2, 4, 2, 4]
    assert sorted(found[0] + found[1]) == sorted(found[2] + found[3]) == list(range(6))


@pytest.fixture
def experts(tmp_path):
    """Two experts of one epoch, as far from their beginnings as a random net is from another."""
    real = make_real()
    config = CondenseConfig("x", net_width=3)
    for k in range(2):
        torch.manual_seed(k)
        trajectory = Trajectory(tmp_path, k, 1)
        trajectory.begin(build_net("convnet", 3, 1, 8, 3))
        trajectory.note(build_net("convnet", 3, 1, 8, 3), 1.0)
        trajectory.save()
    about = {"n_experts": 2, "n_epochs": 1, "learning_rate": 0.01}
    write_about(tmp_path, about | describe_experts(real, config))
    return tmp_path


def match(experts, rate, **options):
    how = {"expert_epochs": 1, "max_start_epoch": 0, "student_steps": 2, "net_width": 3}
    config = CondenseConfig("x", method="mtt", experts=str(experts), **(how | options))
    some = Synthetic(torch.randn(6, 1, 8, 8).requires_grad_(), 3, rate=torch.tensor(rate))
    some.rate.requires_grad_()
    steps = match_trajectories(make_real(), some, config, lambda: build_net("convnet", 3, 1, 8, 3))
    return next(steps), some


def test_a_student_that_stays_is_as_far_off_as_the_start(experts):
    loss_of, some = match(experts, 0.0)
    assert loss_of(some).item() == loss_of(some.prefix(1)).item() == 1.0


def test_images_and_rate_learn(experts):
    loss_of, some = match(experts, 0.01)
    loss_of(some).backward()
    assert (some.images.grad != 0).flatten(1).any(1).all()
    assert some.rate.grad != 0


def test_a_run_that_goes_on_ends_with_the_same_bits(experts, tmp_path):
    """It begins with the learning rate of the experts, of which a step is a fiftieth at most."""
    how = {"net_width": 3, "images_per_class": 2, "expert_epochs": 1, "max_start_epoch": 0}
    how |= {"method": "mtt", "experts": str(experts)}

    def learn(n, name):
        return run_loop(make_real(), CondenseConfig("x", iterations=n, **how), tmp_path / name)

    wanted, history = learn(3, "whole")
    learn(2, "cut")
    found, again = learn(3, "cut")
    assert again == history
    assert torch.equal(found.images, wanted.images)
    assert found.rate == wanted.rate
    assert 0 < abs(found.rate - 0.01) <= 3 * 0.01 / 50 + 1e-6


def test_the_rate_stays_above_zero(experts):
    """Whatever its step was."""
    options = {"method": "mtt", "experts": str(experts), "images_per_class": 1, "net_width": 3}
    config = CondenseConfig("x", expert_epochs=1, max_start_epoch=0, **options)
    some = begin(make_real(), config)
    for _ in match_trajectories(
        make_real(), some, config, lambda: build_net("convnet", 3, 1, 8, 3)
    ):
        some.rate.data.fill_(-1.0)
    assert some.rate.item() == pytest.approx(1e-6)
