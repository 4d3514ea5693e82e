"""The patch store: the kept patches of images to records and back."""

import io
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from dq_multimodal.config import InputError, PatchCoding
from dq_multimodal.patches.context_coding import decode_images, encode_images
from dq_multimodal.patches.fields import Record
from dq_multimodal.patches.grid import grid_shape, keep_pixels, pack_mask, unpack_mask


def encode_patches(
    images: UInt8[ndarray, "b h w c"],
    keep: Bool[ndarray, "b l"],
    patch_size: int,
    coding: PatchCoding = "exact",
    quality: int = 80,
) -> list[Record]:
    """Store the kept patches of images of one shape.

    - exact: our own lossless coder (`context_coding`), which skips dropped pixels altogether.
    - webp: lossy WebP of the whole picture, its holes filled smoothly from their rim so that they
      cost next to nothing.

    Args:
        images: 8-bit, grey (c = 1) or RGB (c = 3).
        keep: Which of the l patches of each are kept, row by row.
        patch_size: Side of a patch in pixels.
        coding: How.
        quality: Of WebP, 0 to 100.
    """
    height, width, n_channels = images.shape[1:]
    pixels = keep_pixels(keep, height, width, patch_size)
    if coding == "exact":
        payloads = encode_images(images, pixels)
    else:
        smooth = fill_smoothly(images, pixels)
        payloads = [_encode_webp(image, quality) for image in smooth]
    return [
        Record(
            coding=coding,
            height=height,
            width=width,
            channels=n_channels,
            patch_size=patch_size,
            mask=pack_mask(marks),
            data=payload,
        )
        for marks, payload in zip(keep, payloads, strict=True)
    ]


def decode_patches(
    records: list[Record],
) -> tuple[UInt8[ndarray, "b h w c"], Bool[ndarray, "b l"]]:
    """Read records of one shape, coding and patch size; dropped pixels are 0.

    Raises:
        InputError: If a record is broken.
    """
    first = records[0]
    height, width, size = first["height"], first["width"], first["patch_size"]
    rows, columns = grid_shape(height, width, size)
    try:
        keep = np.stack([unpack_mask(record["mask"], rows * columns) for record in records])
        pixels = keep_pixels(keep, height, width, size)
        payloads = [record["data"] for record in records]
        if first["coding"] == "exact":
            return decode_images(payloads, pixels, first["channels"]), keep
        images = np.stack([_decode_webp(data, first["channels"]) for data in payloads])
        images[~pixels] = 0
    except (ValueError, OSError) as error:
        raise InputError(f"a record of the patch store is broken: {error}") from error
    return images, keep


def shape_of(record: Record) -> tuple[Any, ...]:
    """Give what records that are decoded together have in common."""
    names = ("coding", "height", "width", "channels", "patch_size")
    return tuple(record[name] for name in names)  # type: ignore[literal-required]


def fill_smoothly(
    images: UInt8[ndarray, "b h w c"], pixels: Bool[ndarray, "b h w"]
) -> UInt8[ndarray, "b h w c"]:
    """Fill holes from coarse to fine: at each level a hole takes the mean of what is kept around.

    A pyramid of weighted means is built by halving, then read back from its top: holes come out
    smooth, kept pixels stay as they are.
    """
    weights = pixels[..., None].astype(np.float32)
    levels = [(images * weights, weights)]
    while max(levels[-1][1].shape[1:3]) > 1:
        levels.append(tuple(_halve(part) for part in levels[-1]))  # type: ignore[arg-type]
    sums, weights = levels[-1]
    below = sums / np.maximum(weights, 1e-9)
    for sums, weights in reversed(levels[:-1]):
        height, width = weights.shape[1:3]
        above = _double(below)[:, :height, :width]
        share = np.minimum(weights, 1.0)
        below = share * sums / np.maximum(weights, 1e-9) + (1 - share) * above
    smooth = np.clip(np.round(below), 0, 255).astype(np.uint8)
    return np.where(pixels[..., None], images, smooth)


def _halve(values: ndarray) -> ndarray:
    """Add up blocks of 2 x 2; an odd edge is a block of its own."""
    n, height, width, c = values.shape
    padded = np.pad(values, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    shape = (n, (height + 1) // 2, 2, (width + 1) // 2, 2, c)
    return padded.reshape(shape).sum(axis=(2, 4))


def _double(values: ndarray) -> ndarray:
    """Scale up by two, each pixel leaning to its neighbours by a quarter."""
    for axis in (1, 2):
        framed = np.concatenate(
            [values.take([0], axis), values, values.take([-1], axis)], axis=axis
        )
        n = values.shape[axis]
        before, after = framed.take(range(n), axis), framed.take(range(2, n + 2), axis)
        pair = np.stack([0.75 * values + 0.25 * before, 0.75 * values + 0.25 * after], axis + 1)
        shape = list(values.shape)
        shape[axis] *= 2
        values = pair.reshape(shape)
    return values


def _encode_webp(image: UInt8[ndarray, "h w c"], quality: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    picture.convert("RGB").save(file, "WEBP", quality=quality, method=6)
    return file.getvalue()


def _decode_webp(data: bytes, n_channels: int) -> UInt8[ndarray, "h w c"]:
    from PIL import Image

    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return pixels if n_channels == 3 else pixels[..., :1]
