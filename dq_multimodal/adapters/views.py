"""What the scores of the bins take from an image: its texture, and an augmented view."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from dq_multimodal.core.texture import image_texture

if TYPE_CHECKING:
    from PIL.Image import Image

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
"""ITU-R 601, of 8-bit values."""

MAX_PIXELS = 2**20
"""Larger images are halved, or divided by the next whole number, until they have no more."""


def measure_texture(images: "list[Image]") -> Float[ndarray, "b 2"]:
    """Measure the texture level of RGB images at their own size; see `core.image_texture`.

    Returns:
        Level and number of patches of each image.
    """
    found = np.zeros((len(images), 2), dtype=np.float32)
    by_size: dict[tuple[int, int], list[int]] = {}
    for k, image in enumerate(images):
        by_size.setdefault(image.size, []).append(k)
    for (width, height), members in by_size.items():
        divisor = 1
        while (width // divisor) * (height // divisor) > MAX_PIXELS:
            divisor += 1
        n_together = max(1, MAX_PIXELS // (width * height))
        for start in range(0, len(members), n_together):
            part = members[start : start + n_together]
            chosen = [images[k].reduce(divisor) if divisor > 1 else images[k] for k in part]
            luma = np.stack([np.asarray(image) for image in chosen]) @ LUMA
            found[part] = np.stack(image_texture(luma), axis=1)
    return found


def augment(
    pixels: UInt8[ndarray, "size size 3"], seed: tuple[int, int]
) -> UInt8[ndarray, "size size 3"]:
    """Make the positive view of the diversity score: crop, flip, rotation and colour, seeded.

    A crop of 80 to 100 % of the area, a flip in half of the cases, a rotation of up to 10 degrees,
    brightness, contrast and saturation by a factor of 0.8 to 1.2. The paper names the kinds
    ("rotations, flips, and color adjustments") and no sizes. Stronger views make the score noisy:
    a few rows whose view is taken for another row then outweigh all others in Eq. 5.

    Args:
        pixels: A picture as the model takes it.
        seed: Of the dataset and of the row; the same seed gives the same view.
    """
    from PIL import Image, ImageEnhance

    rng = np.random.default_rng([number % 2**64 for number in seed])
    size = len(pixels)
    side = max(1, round(size * np.sqrt(rng.uniform(0.8, 1.0))))
    left, top = (int(start) for start in rng.integers(0, size - side + 1, size=2))
    is_flipped = rng.random() < 0.5
    angle = rng.uniform(-10, 10)
    factors = rng.uniform(0.8, 1.2, size=3)
    around = tuple((pixels.reshape(-1, 3).sum(axis=0) // size**2).tolist())
    image = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR, fillcolor=around)
    image = image.resize((size, size), box=(left, top, left + side, top + side))
    if is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    brightness, contrast, saturation = factors.tolist()
    image = ImageEnhance.Brightness(image).enhance(brightness)
    # as ImageEnhance.Contrast, whose mean comes from a histogram summed in Python
    mean = int(np.asarray(image.convert("L")).sum() / size**2 + 0.5)
    image = Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, contrast)
    return np.asarray(ImageEnhance.Color(image).enhance(saturation))
