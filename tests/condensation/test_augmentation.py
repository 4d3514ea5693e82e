"""One operation a draw: the same for all images and batches, or each image by its own numbers."""

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


def draw(name, seed, n=1):
    torch.manual_seed(seed)
    return draw_augmentation((name,), SIDE, n)


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
def test_images_of_a_net_in_training_are_changed_each_by_its_own_numbers(name):
    image = make_images(1)
    found = draw(name, 0, 24)(image.expand(24, -1, -1, -1))
    n_different = len({tuple(each.flatten().tolist()) for each in found})
    assert n_different == 2 if name == "flip" else n_different > 12
    mixed = draw(name, 0, 3)(make_images())  # no image depends on another
    for k in range(3):
        alone = draw(name, 0, 3)(make_images()[k].expand(3, -1, -1, -1))
        torch.testing.assert_close(mixed[k], alone[k])


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
            if torch.allclose(padded[:, :, y : y + SIDE, x : x + SIDE], found, atol=1e-5)
        ]
        assert len(fits) == 1
        shifts |= {*fits}
    assert len(shifts) > 15 and {y for y, _ in shifts} == {x for _, x in shifts} == {*range(5)}


def test_the_middle_of_a_hole_is_anywhere_in_the_image():
    """So it has at least a quarter of its area; it is zero and all else stays."""
    images, corners = make_images(1), set()
    for seed in range(400):
        found = draw("cutout", seed)(images)
        rows, columns = (found[0, 0] == 0).nonzero().T
        top, left = int(rows.min()), int(columns.min())
        height, width = int(rows.max()) + 1 - top, int(columns.max()) + 1 - left
        assert len(rows) == height * width
        wanted = images.clone()
        wanted[:, :, top : top + height, left : left + width] = 0
        assert torch.equal(found, wanted)
        corners.add((top, height))
    half = SIDE // 2
    inside = {(top, half) for top in range(SIDE - half + 1)}
    edges = {(0, n) for n in range(half // 2, half)} | {
        (SIDE - n, n) for n in range(half // 2, half)
    }
    assert corners == inside | edges


def test_mirrors_half_of_the_time():
    images = make_images()
    found = [draw("flip", k)(images) for k in range(60)]
    mirrored = sum(torch.allclose(each, images.flip(3), atol=1e-5) for each in found)
    same = sum(torch.allclose(each, images, atol=1e-5) for each in found)
    assert mirrored + same == 60 and 15 < mirrored < 45


def make_ramps():
    """Give the column and the row of each pixel as two images, 0 in the middle."""
    ramp = torch.arange(SIDE, dtype=torch.float32).sub(SIDE / 2 - 0.5).expand(1, 1, SIDE, SIDE)
    return torch.cat([ramp, ramp.transpose(2, 3)])


def slopes_of(images):
    """Give by how much the numbers of images grow in their middle, to the right and downwards."""
    m = SIDE // 2
    to_right = images[:, 0, m, m] - images[:, 0, m, m - 1]
    down = images[:, 0, m, m] - images[:, 0, m - 1, m]
    return torch.stack([to_right, down], 1)


def test_width_and_height_are_scaled_by_their_own_factors():
    factors = []
    for seed in range(60):
        slopes = slopes_of(draw("scale", seed)(make_ramps()))
        torch.testing.assert_close(slopes, torch.diag(slopes.diagonal()), rtol=0, atol=1e-4)
        factors.append(1 / slopes.diagonal())
    factors = torch.stack(factors)
    assert factors.min() > 1 / 1.2 - 1e-3 and factors.max() < 1.2 + 1e-3
    assert (factors.min(0).values < 0.88).all() and (factors.max(0).values > 1.15).all()
    assert abs(torch.corrcoef(factors.T)[0, 1]) < 0.4


def test_rotations_keep_lengths_and_stay_within_15_degrees():
    angles = []
    for seed in range(60):
        slopes = slopes_of(draw("rotate", seed)(make_ramps()))
        torch.testing.assert_close(slopes @ slopes.T, torch.eye(2), rtol=0, atol=1e-3)
        angles.append(float(torch.rad2deg(torch.atan2(slopes[0, 1], slopes[0, 0]))))
    assert max(map(abs, angles)) <= 15.01 and min(angles) < -10 and max(angles) > 10


def test_none_is_nothing():
    images = make_images()
    assert draw_augmentation(("none",), SIDE)(images) is images
