"""KRR against the closed form by NumPy, and the tangent kernel against its definitions."""

import math

import numpy as np
import pytest
import torch
from tiny_real import make_real

from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.kernel_regression import (
    N_NETS,
    match_predictions,
    regression_loss,
    tangent_kernel,
    to_probabilities,
)
from dq_multimodal.condensation.synthetic import Synthetic


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_loss_is_the_closed_form():
    of_t, of_s, y_t, y_s = draw(7, 5), draw(4, 5, seed=1), draw(7, 3, seed=2), draw(4, 3, seed=3)
    t, s = of_t.numpy(), of_s.numpy()
    ridge = 0.3 * np.mean([row @ row for row in s])
    inverse = np.linalg.inv(s @ s.T + ridge * np.eye(4))
    wrong = y_t.numpy() - t @ s.T @ inverse @ y_s.numpy()
    found = regression_loss(of_t @ of_s.T, of_s @ of_s.T, y_t, y_s, 0.3)
    assert found.item() == pytest.approx(np.sum(wrong**2) / 2 / 7, rel=1e-12)


def test_loss_by_hand():
    """One image each: k_ts = 2, k_ss = 4, ridge 0.25 x 4 = 1, so 3 is predicted of 7.5."""
    one = [torch.tensor([[value]], dtype=torch.float64) for value in (2.0, 4.0, 5.0, 7.5)]
    assert regression_loss(*one, ridge=0.25).item() == pytest.approx((5 - 3) ** 2 / 2)


def naive_tangent(x, z, n_hidden):
    """Follow the recursion with numbers, covariance by covariance."""
    d = len(x)
    xx, xz, zz = x @ x / d, x @ z / d, z @ z / d
    tangent = xz
    for _ in range(n_hidden):
        c = np.clip(xz / math.sqrt(xx * zz), -1, 1)
        angle = math.acos(c)
        xz = math.sqrt(xx * zz) * (math.sin(angle) + (math.pi - angle) * c) / math.pi
        tangent = xz + tangent * (math.pi - angle) / math.pi
    return tangent


@pytest.mark.parametrize("n_hidden", [0, 1, 3])
def test_tangent_kernel_is_the_recursion(n_hidden):
    a, b = draw(5, 1, 2, 3), draw(4, 1, 2, 3, seed=1)
    b[0], b[1] = a[0], -a[1]
    found = tangent_kernel(a, b, n_hidden)
    flat = [x.flatten(1).numpy() for x in (a, b)]
    naive = [[naive_tangent(x, z, n_hidden) for z in flat[1]] for x in flat[0]]
    np.testing.assert_allclose(found, naive, rtol=1e-6, atol=1e-8)


def test_tangent_kernel_of_a_wide_net():
    """Of finite width w it is the inner product of gradients, as far off as 1 / sqrt(w)."""
    images, width, n_hidden = draw(4, 6).float(), 2000, 2
    weights = [draw(width, 6, seed=1), draw(width, width, seed=2), draw(1, width, seed=3)]
    weights = [w.float().requires_grad_() for w in weights]

    def net(x):
        for k, weight in enumerate(weights):
            x = weight @ x / math.sqrt(len(x)) * (math.sqrt(2) if k else 1)
            x = x.relu() if k < n_hidden else x
        return x.squeeze()

    gradients = []
    for x in images:
        found = torch.autograd.grad(net(x), weights)
        gradients.append(torch.cat([each.flatten() for each in found]))
    gradients = torch.stack(gradients)
    wanted = tangent_kernel(images, images, n_hidden).float()
    assert (gradients @ gradients.T - wanted).abs().max() < 0.1 * wanted.max()


def test_tangent_kernel_has_gradients_where_images_are_equal():
    images = draw(3, 4).requires_grad_()
    others = images.detach() + 1
    assert torch.autograd.gradcheck(lambda x: tangent_kernel(x, others), images)
    tangent_kernel(images, images).sum().backward()
    assert torch.isfinite(images.grad).all()
    other = images.detach().clone().requires_grad_()
    diagonal = (tangent_kernel(other, other).diagonal()).sum()
    (found,) = torch.autograd.grad(diagonal, other)
    # of equal points sigma is |x|^2 / d in every layer, and the tangent kernel 4 of them
    torch.testing.assert_close(found, 4 * 2 * other.detach() / 4)


class Projection(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.randn(64, 5)

    def embed(self, images):
        return images.flatten(1) @ self.weight


def match(real, some, draw_net=None, **options):
    how = {"method": "krr", "augment": ("none",), "real_batch": len(real.images)}
    config = CondenseConfig("x", **(how | options))
    (loss_of,) = match_predictions(real, some, config, draw_net)
    return loss_of


def make_set(real, per_class=2, targets=None):
    images = torch.randn(per_class * real.n_classes, 1, 8, 8).requires_grad_()
    return Synthetic(images, real.n_classes, targets)


def naive_loss(kernel, real, some, ridge):
    """Follow the formula row by row, with the same kernel of two flat images."""
    t, s = (x.flatten(1).double() for x in (real.normalise(real.images), some.images.detach()))
    eye = np.eye(real.n_classes)
    y_s = eye[[k % real.n_classes for k in range(len(s))]]
    y_s = (y_s if some.targets is None else some.targets.detach().numpy()) - 1 / real.n_classes
    k_ss = np.array([[kernel(x, z) for z in s] for x in s])
    weights = np.linalg.solve(k_ss + ridge * np.trace(k_ss) / len(s) * np.eye(len(s)), y_s)
    wrong = [
        eye[k] - 1 / real.n_classes - np.array([kernel(x, z) for z in s]) @ weights
        for x, k in zip(t, real.classes.tolist(), strict=True)
    ]
    return np.square(wrong).sum() / len(t) / 2


def test_tangent_kernel_of_real_and_synthetic_images():
    real = make_real()
    some = make_set(real)
    loss_of = match(real, some, kernel="ntk", ridge=0.01)

    def kernel(x, z):
        return naive_tangent(x.numpy(), z.numpy(), 3)

    for each in (some, some.prefix(1)):
        assert loss_of(each).item() == pytest.approx(naive_loss(kernel, real, each, 0.01), rel=1e-5)
    loss_of(some).backward()
    assert (some.images.grad != 0).flatten(1).any(1).all()


def test_features_of_some_nets():
    real, nets = make_real(), []

    def draw_net():
        nets.append(Projection())
        return nets[-1]

    some = make_set(real, targets=torch.rand(6, 3).requires_grad_())
    loss_of = match(real, some, draw_net, ridge=0.01)
    assert len(nets) == N_NETS

    def kernel(x, z):
        pairs = [(x.float() @ net.weight, z.float() @ net.weight) for net in nets]
        return float(sum(a @ b for a, b in pairs)) / (5 * N_NETS)

    for each in (some, some.prefix(1)):
        assert loss_of(each).item() == pytest.approx(naive_loss(kernel, real, each, 0.01), rel=1e-4)
    loss_of(some).backward()
    assert (some.targets.grad != 0).any(1).all()


def test_real_images_are_drawn_anew():
    real = make_real()
    some = make_set(real)
    first, second = (match(real, some, kernel="ntk", real_batch=7)(some).item() for _ in range(2))
    assert first != second


def test_the_nearest_probabilities():
    """By hand; then no other probabilities are nearer."""
    rows = torch.tensor([[0.5, 0.5, 1.0], [2.0, 0.0, 1.0], [-1.0, -1.0, -1.0], [0.2, 0.3, 0.5]])
    wanted = torch.tensor([[1 / 6, 1 / 6, 2 / 3], [1.0, 0.0, 0.0], [1 / 3] * 3, [0.2, 0.3, 0.5]])
    torch.testing.assert_close(to_probabilities(rows), wanted)
    rows = draw(20, 4)
    found = to_probabilities(rows)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(20).double())
    others = torch.softmax(3 * draw(5000, 4, seed=1), dim=1)
    assert (torch.cdist(rows, others).min(1).values >= (rows - found).norm(dim=1)).all()


def test_learnt_labels_are_probabilities_after_a_step():
    real = make_real()
    some = make_set(real, targets=torch.eye(3).repeat(2, 1).requires_grad_())
    config = CondenseConfig("x", method="krr", kernel="ntk", learn_labels=True)
    for loss_of in match_predictions(real, some, config, None):
        loss_of(some).backward()
        with torch.no_grad():
            some.targets.sub_(some.targets.grad.sign() / 10)
    assert some.targets.min() >= 0
    torch.testing.assert_close(some.targets.sum(1), torch.ones(6))
    assert not torch.equal(some.targets, torch.eye(3).repeat(2, 1))
