"""One operation a draw, the same for all images and batches."""

import pytest
import torch

from dq_multimodal.condensation.augmentation import (
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    draw_augmentation,
)
from dq_multimodal.condensation.config import OPERATIONS

SIDE = 16


def make_images(n=3):
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def draw(name, seed):
    torch.manual_seed(seed)
    return draw_augmentation((name,), SIDE)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_an_image_is_changed_alike_in_every_batch(name, seed):
    images, augment = make_images(), draw(name, seed)
    found = augment(images)
    assert found.shape == images.shape
    for k in range(3):
        torch.testing.assert_close(augment(images[k : k + 1])[0], found[k], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(draw(name, seed)(images), found)


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_changes_images_and_can_be_differentiated(name):
    images, changed = make_images().requires_grad_(), 0
    for seed in range(8):
        found = draw(name, seed)(images)
        changed += not torch.equal(found, images)
        (slope,) = torch.autograd.grad(found.sum(), images)
        assert slope.any()
    assert changed >= 2


def test_colours_by_the_formula():
    images = make_images()
    torch.manual_seed(3)
    torch.randint(1, ())  # which operation
    b, s, c = torch.rand(3).tolist()
    found = draw("color", 3)(images)
    for k in range(3):
        x = images[k] + BRIGHTNESS * (b - 0.5)
        grey = (x[0] + x[1] + x[2]) / 3
        x = grey + SATURATION * s * (x - grey)
        x = x.mean() + (c + CONTRAST) * (x - x.mean())
        torch.testing.assert_close(found[k], x, rtol=1e-4, atol=1e-5)


def test_crops_are_moved_and_zero_outside():
    images = make_images()
    shifts = set()
    for seed in range(60):
        found = draw("crop", seed)(images)
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
        fits = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(padded[:, :, y : y + SIDE, x : x + SIDE], found)
        ]
        assert len(fits) == 1
        shifts |= {*fits}
    assert len(shifts) > 15 and {y for y, _ in shifts} == {x for _, x in shifts} == {*range(5)}


def test_a_hole_is_at_most_half_the_side():
    images = torch.ones(1, 1, SIDE, SIDE)
    sizes = [tuple((draw("cutout", k)(images)[0, 0] == 0).nonzero().T.shape) for k in range(40)]
    areas = [n for _, n in sizes]
    assert max(areas) == (SIDE // 2) ** 2 and len({*areas}) > 5


def test_mirrors_half_of_the_time_and_scales_within_bounds():
    images = make_images()
    mirrored = sum(torch.equal(draw("flip", k)(images), images.flip(3)) for k in range(60))
    assert 15 < mirrored < 45
    ramp = torch.arange(SIDE, dtype=torch.float32).sub(SIDE / 2 - 0.5).expand(1, 1, SIDE, SIDE)
    for seed in range(30):
        row = draw("scale", seed)(ramp)[0, 0, SIDE // 2]
        factor = 1 / float(row[SIDE // 2 + 1] - row[SIDE // 2])
        assert 1 / 1.2 - 0.01 <= factor <= 1.2 + 0.01


def test_none_is_nothing():
    images = make_images()
    assert draw_augmentation(("none",), SIDE)(images) is images
