"""Losses of gradient and distribution matching against naive versions."""

import numpy as np
import pytest
import torch
from tiny_real import make_real
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.distribution_matching import match_distributions
from dq_multimodal.condensation.gradient_matching import (
    NET_DECAY,
    NET_MOMENTUM,
    NET_RATE,
    distance,
    match_gradients,
)
from dq_multimodal.condensation.loop import run_loop
from dq_multimodal.condensation.nets import ConvNet, build_net, find_depth, hold_norms
from dq_multimodal.condensation.synthetic import Synthetic
from dq_multimodal.config import InputError


def make_config(method, **options):
    return CondenseConfig("x", method=method, augment=("none",), images_per_class=2, **options)


def make_set(real, per_class=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    n = per_class * real.n_classes
    images = torch.randn(n, *real.images.shape[1:], generator=generator)
    return Synthetic(images.requires_grad_(), real.n_classes)


def make_net(seed=0):
    torch.manual_seed(seed)
    return ConvNet(3, 1, 8, depth=2, width=4)


def naive_distance(ours, theirs):
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.ndim == 1:
            continue
        for i in range(len(a)):
            x, y = a[i].flatten(), b[i].flatten()
            total = total + 1 - (x @ y) / (x.norm() * y.norm())
    return total


def test_distance_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 2, 3, 3), (4,), (5, 4)]
    ours, theirs = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    torch.testing.assert_close(distance(ours, theirs), naive_distance(ours, theirs))
    assert distance(ours, ours).abs() < 1e-5
    assert distance(ours, [-a for a in ours]).item() == pytest.approx(2 * 9, rel=1e-5)


@pytest.mark.parametrize("per_class", [1, 2])
def test_gradients_are_matched_as_naively(per_class):
    """The loss, and its gradient by the images, of the whole set and of a prefix of it."""
    real, net = make_real(), make_net()
    whole = make_set(real)
    loss_of = next(match_gradients(real, whole, make_config("dc"), make_net))
    part = whole.prefix(per_class)
    loss = loss_of(part)

    def naive(images):
        total = 0.0
        for k in range(3):
            x = real.normalise(real.images[real.classes == k])

            def loss_at(weights, x, k=k):
                labels = torch.full((len(x),), k)
                return cross_entropy(functional_call(net, weights, x), labels)

            weights = dict(net.named_parameters())
            of_real = grad(loss_at)(weights, x).values()
            of_ours = grad(loss_at)(weights, images[k::3]).values()
            total = total + naive_distance(of_ours, [g.detach() for g in of_real])
        return total

    images = part.images.detach().clone().requires_grad_()
    wanted = naive(images)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(loss, whole.images)
    (slope,) = torch.autograd.grad(wanted, images)
    torch.testing.assert_close(found[: len(images)], slope, rtol=1e-3, atol=1e-4)
    assert not found[len(images) :].any()


@pytest.mark.parametrize("is_multisize", [False, True])
def test_between_two_losses_the_net_is_trained(is_multisize):
    """On the synthetic images as they are by then; with multisize on real ones."""
    real, whole = make_real(), make_set(make_real())
    config = make_config("dc", inner_loops=2, net_steps=3, multisize=is_multisize)
    made = []

    def draw_net():
        made.append(make_net())
        return made[-1]

    steps = match_gradients(real, whole, config, draw_net)
    next(steps)
    with torch.no_grad():
        whole.images.add_(0.5)  # the step of the images
    next(steps)
    twin = make_net()
    weights = [*twin.parameters()]
    moments = [torch.zeros_like(w) for w in weights]
    pictures = (real.normalise(real.images), real.classes)
    images, labels = pictures if is_multisize else (whole.images.detach(), whole.classes)
    for _ in range(3):
        slopes = torch.autograd.grad(cross_entropy(twin(images), labels), weights)
        with torch.no_grad():
            for w, slope, moment in zip(weights, slopes, moments, strict=True):
                moment.mul_(NET_MOMENTUM).add_(slope + NET_DECAY * w)
                w -= NET_RATE * moment
    for found, wanted in zip(made[0].parameters(), weights, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert next(steps, None) is None  # two inner loops


def test_images_that_train_a_net_are_changed_each_in_its_own_way():
    """And those that are compared all in the same way."""
    some = Synthetic(torch.ones(24, 1, 8, 8, requires_grad=True), 3)
    config = CondenseConfig(
        "x", method="dc", augment=("cutout",), images_per_class=8, inner_loops=2, net_steps=1
    )
    net, seen = make_net(), []
    net.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    steps = match_gradients(make_real(), some, config, lambda: net)
    next(steps)(some)
    n_holes = [len({tuple(each.flatten().tolist()) for each in images}) for images in seen[3:]]
    assert n_holes == [1, 1, 1]  # one class after the other, after those of the real images
    seen.clear()
    next(steps)
    assert len(seen[0]) == 24 and len({tuple(each.flatten().tolist()) for each in seen[0]}) > 12


@pytest.mark.parametrize("per_class", [1, 2])
def test_means_are_matched_as_naively(per_class):
    real, net = make_real(), make_net()
    whole = make_set(real)
    steps = match_distributions(real, whole, make_config("dm"), make_net)
    loss_of = next(steps)
    part = whole.prefix(per_class)
    loss = loss_of(part)
    images = part.images.detach().clone().requires_grad_()
    wanted = 0.0
    for k in range(3):
        of_real = net.embed(real.normalise(real.images[real.classes == k])).mean(0)
        wanted = wanted + (net.embed(images[k::3]).mean(0) - of_real).square().sum()
    torch.testing.assert_close(loss, wanted)
    (found,) = torch.autograd.grad(loss, whole.images)
    (slope,) = torch.autograd.grad(wanted, images)
    torch.testing.assert_close(found[: len(images)], slope)
    assert next(steps, None) is None


@pytest.mark.parametrize("match", [match_distributions, match_gradients])
@pytest.mark.parametrize("seed", range(4))
def test_the_real_images_themselves_match_under_any_augmentation(match, seed):
    """Class by class real and synthetic images are changed alike, or the loss would not be 0."""
    real = make_real(channels=3)
    some = Synthetic(real.normalise(real.images).requires_grad_(), 3)  # rows have classes in turn
    torch.manual_seed(seed)
    config = CondenseConfig("x", method="dc", images_per_class=10)
    loss_of = next(match(real, some, config, lambda: ConvNet(3, 3, 8, depth=2, width=4)))
    assert loss_of(some).item() < 1e-4 < loss_of(some.prefix(1)).item()


def test_a_draw_is_of_the_class_and_without_repeats():
    real = make_real(n_rows=31)
    torch.manual_seed(0)
    found = real.draw(1, 6)
    of_class = real.normalise(real.images[real.classes == 1])
    places = [[torch.equal(x, y) for y in of_class].index(True) for x in found]
    assert len(set(places)) == 6 < len(of_class)
    images, classes = real.draw_any(1000)
    assert len(images) == 31 and np.bincount(classes).tolist() == [11, 10, 10]


def test_convnet_is_that_of_the_papers():
    net = build_net("convnet", 10, 3, 32)
    assert sum(p.numel() for p in net.parameters()) == 320_010  # as the papers count it
    assert net.embed(torch.zeros(2, 3, 32, 32)).shape == (2, 2048)
    assert [find_depth(side) for side in (8, 15, 16, 28, 32, 64, 128)] == [2, 2, 3, 3, 3, 4, 5]
    with pytest.raises(InputError, match="convnet-d4 needs at least 16 px, got 8"):
        build_net("convnet-d4", 10, 3, 8)


def test_a_net_reads_many_images_without_gradients_as_with_them():
    net = make_net()
    images = torch.randn(70, 1, 8, 8)
    with torch.no_grad():
        found = net.embed(images)
    torch.testing.assert_close(found, net.embed(images))


def test_timm_nets_read_grey_images():
    net = build_net("resnet10-narrow", 3, 1, 8).eval()
    images = torch.randn(2, 1, 8, 8)
    assert net(images).shape == (2, 3)
    torch.testing.assert_close(net(images), net.net.get_classifier()(net.embed(images)))


def test_batch_normalisation_reads_an_image_alike_beside_any_others():
    real, net = make_real(channels=3), build_net("resnet10-narrow", 3, 3, 8)
    images = real.normalise(real.images)
    hold_norms(net, real)
    with torch.no_grad():
        found = net.embed(images)
        torch.testing.assert_close(found[:1], net.embed(images[:1]))
        torch.testing.assert_close(found, net.train().embed(images), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("net", ["resnet10-narrow", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", ["dm", "dc", "krr"])
def test_any_net_matches_one_image_a_class(net, method, tmp_path):
    how = {"images_per_class": 1, "iterations": 1, "net": net, "real_batch": 1}
    how |= {"inner_loops": 2} if method == "dc" else {}
    _, history = run_loop(make_real(), CondenseConfig("x", method=method, **how), tmp_path / "x")
    assert 0 < history.losses[0] < 1e6
