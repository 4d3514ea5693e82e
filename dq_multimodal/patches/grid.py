"""Patches of an image: how many there are, where they lie, how many of them are dropped.

An image of H x W pixels and square patches of P pixels make a grid of ceil(H / P) rows and
ceil(W / P) columns, numbered row by row. Patches at the right and lower edge may be cut off.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

SMALL_SIDE = 64


def default_patch_size(side: int) -> int:
    """Give the side of a patch for images of a side: 4 px up to 64 px, else 16."""
    return 4 if side <= SMALL_SIDE else 16


def grid_shape(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Give rows and columns of the patch grid of an image."""
    return math.ceil(height / patch_size), math.ceil(width / patch_size)


def count_dropped(n_patches: int, drop_ratio: float) -> int:
    """Give the number of patches to drop, round(drop_ratio * n_patches); one stays at least."""
    return min(round(drop_ratio * n_patches), n_patches - 1)


def drop_lowest(scores: Float[ndarray, "b l"], n_dropped: int) -> Bool[ndarray, "b l"]:
    """Mark the patches that are kept: all but the n lowest scores; ties drop the lower number."""
    keep = np.ones(scores.shape, dtype=bool)
    lowest = np.argsort(scores, axis=1, kind="stable")[:, :n_dropped]
    np.put_along_axis(keep, lowest, False, axis=1)
    return keep


def keep_pixels(
    keep: Bool[ndarray, "b l"], height: int, width: int, patch_size: int
) -> Bool[ndarray, "b height width"]:
    """Spread the marks of the patches over their pixels."""
    marks = keep.reshape(len(keep), *grid_shape(height, width, patch_size))
    rows, columns = np.arange(height) // patch_size, np.arange(width) // patch_size
    return marks[:, rows][:, :, columns]


def pack_mask(keep: Bool[ndarray, " l"]) -> bytes:
    """Pack the marks of one image into bits, first patch first."""
    return np.packbits(keep).tobytes()


def unpack_mask(packed: bytes, n_patches: int) -> Bool[ndarray, " l"]:
    """Read what `pack_mask` wrote.

    Raises:
        ValueError: If it is of another number of patches.
    """
    if len(packed) != -(-n_patches // 8):
        raise ValueError(f"a mask of {len(packed)} bytes for {n_patches} patches")
    bits: Int[ndarray, " k"] = np.unpackbits(np.frombuffer(packed, np.uint8), count=n_patches)
    return bits.astype(bool)
