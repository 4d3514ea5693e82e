"""Differentiable siamese augmentation: one operation, the same for real and synthetic images."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from dq_multimodal.condensation.config import NO_AUGMENTATION

Augment = Callable[[Tensor], Tensor]

SCALE, DEGREES, CROP, CUTOUT = 1.2, 15.0, 0.125, 0.5
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
"""Strengths of DSA (arXiv:2102.08259, appendix)."""


def draw_augmentation(operations: Sequence[str], side: int) -> Augment:
    r"""Draw one operation and its parameters from the state of torch.

    DSA (Zhao and Bilen, ICML 2021, arXiv:2102.08259): at each step one operation of its strategy is
    drawn, and the same, with the same parameters for every image of a batch, is done to the real
    and to the synthetic batch. u is uniform on [0, 1):

    - color: brightness $x + (u - 1/2)$, saturation $m_c + 2u (x - m_c)$ with the mean over the
      channels, contrast $m + (u + 1/2)(x - m)$ with the mean of the image;
    - crop: moved by up to an eighth of the side, zeros outside; cutout: a square of half the side
      is zero; flip: mirrored, in half of the cases; scale: by 1 / 1.2 to 1.2; rotate: by up to 15
      degrees.

    Zero is the mean colour, since images are normalised. Departures: both sides are scaled alike; a
    hole lies anywhere that it meets the image, where DSA has its middle in it.

    Args:
        operations: Names of operations, or none.
        side: Of the images in pixels.

    Returns:
        A function of images (n, c, side, side) that gives as many of the same shape, and can be
        differentiated.
    """
    if tuple(operations) == NO_AUGMENTATION:
        return lambda images: images
    name = operations[int(torch.randint(len(operations), ()))]
    u = torch.rand(3).tolist()
    if name == "flip":
        return functional.horizontal_flip if u[0] < 0.5 else lambda images: images
    if name == "color":
        return lambda images: _change_colours(images, *u)
    if name in ("scale", "rotate"):
        scale = 1 / SCALE + u[0] * (SCALE - 1 / SCALE) if name == "scale" else 1.0
        angle = DEGREES * (2 * u[0] - 1) if name == "rotate" else 0.0
        bilinear = functional.InterpolationMode.BILINEAR
        return lambda images: functional.affine(
            images, angle, [0, 0], scale, [0.0, 0.0], interpolation=bilinear
        )
    if name == "crop":
        pad = max(1, round(CROP * side))
        top, left = (math.floor(each * (2 * pad + 1)) for each in u[:2])
        return lambda images: functional.crop(functional.pad(images, [pad]), top, left, side, side)
    hole = round(CUTOUT * side)
    top, left = (math.floor(each * (side + hole)) - hole for each in u[:2])
    mask = torch.ones(side, side)
    mask[max(0, top) : top + hole, max(0, left) : left + hole] = 0
    return lambda images: images * mask.to(images.device)


def _change_colours(
    images: Tensor, brightness: float, saturation: float, contrast: float
) -> Tensor:
    images = images + BRIGHTNESS * (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + SATURATION * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + CONTRAST) * (images - mean)
