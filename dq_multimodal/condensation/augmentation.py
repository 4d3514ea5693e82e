"""Differentiable siamese augmentation: one operation, the same for real and synthetic images."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from dq_multimodal.condensation.config import NO_AUGMENTATION

Augment = Callable[[Tensor], Tensor]

SCALE, DEGREES, CROP, CUTOUT = 1.2, 15.0, 0.125, 0.5
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
"""Strengths of DSA (arXiv:2102.08259, appendix)."""


def draw_augmentation(operations: Sequence[str], side: int, n: int = 1) -> Augment:
    r"""Draw one operation and its parameters from the state of torch.

    DSA (Zhao and Bilen, ICML 2021, arXiv:2102.08259): at each step one operation of its strategy is
    drawn. To compare real and synthetic images the same is done to both batches, with the same
    parameters for every image; where a net is trained, each image of a batch has its own. u is
    uniform on [0, 1):

    - color: brightness $x + (u - 1/2)$, saturation $m_c + 2u (x - m_c)$ with the mean over the
      channels, contrast $m + (u + 1/2)(x - m)$ with the mean of the image;
    - crop: moved by up to an eighth of the side, zeros outside; cutout: a square of half the side
      is zero, its middle anywhere in the image; flip: mirrored, in half of the cases; scale: width
      and height each by 1 / 1.2 to 1.2; rotate: by up to 15 degrees.

    Zero is the mean colour, since images are normalised.

    Args:
        operations: Names of operations, or none.
        side: Of the images in pixels.
        n: Number of images that get parameters of their own; 1: all have the same, and the function
            takes any number of images.

    Returns:
        A function of images (b, c, side, side) that gives as many of the same shape, and can be
        differentiated.
    """
    if tuple(operations) == NO_AUGMENTATION:
        return lambda images: images
    name = operations[int(torch.randint(len(operations), ()))]
    u = torch.rand(3, n)
    if name == "color":
        return lambda images: _change_colours(images, *u.view(3, n, 1, 1, 1).to(images.device))
    if name == "cutout":
        hole, places = round(CUTOUT * side), torch.arange(side)
        first = (u[:2] * (side + 1)).floor()[..., None] - hole // 2
        above, left = (places >= first) & (places < first + hole)
        mask = ~(above[:, :, None] & left[:, None, :])[:, None]
        return lambda images: images * mask.to(images)
    matrices = torch.eye(2, 3).repeat(n, 1, 1)  # from places in the result to those in the image
    if name == "flip":
        matrices[:, 0, 0] = torch.where(u[0] < 0.5, -1.0, 1.0)
    elif name == "crop":
        pad = max(1, round(CROP * side))
        matrices[:, :, 2] = ((u[:2] * (2 * pad + 1)).floor() - pad).T * 2 / side
    elif name == "scale":
        scales = 1 / SCALE + u[:2] * (SCALE - 1 / SCALE)
        matrices[:, 0, 0], matrices[:, 1, 1] = 1 / scales
    else:
        angles = math.radians(DEGREES) * (2 * u[0] - 1)
        turned = [angles.cos(), -angles.sin(), angles.sin(), angles.cos()]
        matrices[:, :, :2] = torch.stack(turned, 1).view(n, 2, 2)
    return lambda images: _move(images, matrices)


def _move(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample the images at moved places, zero outside of them."""
    grid = affine_grid(matrices.to(images), [len(matrices), *images.shape[1:]], align_corners=False)
    return grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)


def _change_colours(
    images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor
) -> Tensor:
    images = images + BRIGHTNESS * (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + SATURATION * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + CONTRAST) * (images - mean)
