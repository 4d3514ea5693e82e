"""Plain ways to fill dropped patches, and how far a filled image is from its original."""

import math

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.patches.grid import grid_shape, keep_pixels

Images = UInt8[ndarray, "b h w c"]
Marks = Bool[ndarray, "b l"]


def fill_mean(images: Images, keep: Marks, patch_size: int) -> Images:
    """Fill the dropped patches of each image with the mean colour of its kept pixels."""
    holes = find_holes(images, keep, patch_size)
    mean = images.mean(axis=(1, 2), keepdims=True, dtype=np.float64, where=~holes)
    return np.where(holes, np.rint(mean).astype(np.uint8), images)


def fill_zero(images: Images, keep: Marks, patch_size: int) -> Images:
    """Fill the dropped patches with black."""
    return np.where(find_holes(images, keep, patch_size), np.uint8(0), images)


def psnr_of_holes(
    originals: Images, filled: Images, keep: Marks, patch_size: int
) -> Float[ndarray, " b"]:
    """Give 10 log10(255^2 / MSE) in dB over the dropped patches of each image; inf if MSE is 0."""
    holes = find_holes(originals, keep, patch_size)
    if filled.shape != originals.shape:
        raise InputError(f"filled must be shaped {originals.shape}, got {filled.shape}")
    squares = np.square(originals.astype(np.int32) - filled)
    total = squares.sum(axis=(1, 2, 3), dtype=np.int64, where=holes)
    n_values = np.maximum(1, holes.sum(axis=(1, 2, 3)) * originals.shape[3])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / (total / n_values))


def find_holes(images: Images, keep: Marks, patch_size: int) -> Bool[ndarray, "b h w 1"]:
    """Mark the pixels of dropped patches, once images and marks fit together."""
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
        got = f"{images.dtype} {images.shape}"
        raise InputError(f"images must be uint8 (b, h, w, 1 or 3), got {got}")
    height, width = images.shape[1:3]
    wanted = (len(images), math.prod(grid_shape(height, width, patch_size)))
    if keep.shape != wanted or keep.dtype != bool:
        got = f"patches of {patch_size}, got {keep.dtype} {keep.shape}"
        raise InputError(f"keep must be bool {wanted} for {got}")
    if len(bare := np.flatnonzero(~keep.any(axis=1))):
        raise InputError(f"every image must keep a patch, but image {bare[0]} keeps none")
    return ~keep_pixels(keep, height, width, patch_size)[..., None]
