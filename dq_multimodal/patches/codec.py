"""The patch store: kept patches and a bit mask, one small self-contained record an image.

A record is a struct column of the dataset, so plain `datasets` loads it:

| field | what it is |
| --- | --- |
| coding | "jxl" or "webp", see `encode_patches`, or "original": the file of the source, untouched |
| height, width, channels | of the upright image, in pixels; 1 channel is grey |
| patch_size | side of a patch in pixels |
| mask | one bit a patch, row by row, 1 = kept |
| data | the kept pixels in that coding, or the file |
| icc_profile | the colour profile of the image, none for most; older stores lack it |

Version 0.1 had a lossless coder of its own, whose records say "exact". They are refused.
"""

import io
from typing import Any, Final, NotRequired, TypedDict

import numpy as np
from imagecodecs import jpegxl_decode, jpegxl_encode
from jaxtyping import Bool, Shaped, UInt8
from numpy import ndarray

from dq_multimodal.config import InputError, PatchCoding
from dq_multimodal.patches.grid import SMALL_SIDE, grid_shape, keep_pixels, pack_mask, unpack_mask

PROFILE: Final = "icc_profile"
FIELDS = {
    "coding": "string",
    "height": "int32",
    "width": "int32",
    "channels": "int8",
    "patch_size": "int16",
    "mask": "binary",
    "data": "binary",
    PROFILE: "binary",
}
"""Fields of a record and their types."""
ORIGINAL, OLD = "original", "exact"
OLD_STORE = (
    "the images were stored by dq-multimodal 0.1, whose lossless coding this version cannot read: "
    "read them with dq-multimodal 0.1, or compress the source again (--overwrite)"
)
LARGEST_PIXELS = 25_000_000
"""Larger images keep their original: several copies of an image are in memory at a time."""
MAX_PATCH_SIZE = 1024
ERRORS = (ArithmeticError, ValueError, OSError, TypeError, IndexError, MemoryError, RuntimeError)
"""What a broken record raises; the last is JPEG XL's."""
FAST, SMALL = 3, 7
"""Efforts of JPEG XL. Images of up to 64 px are coded fast enough by the second."""


class Record(TypedDict):
    """One image in the patch store; see the head of this module."""

    coding: str
    height: int
    width: int
    channels: int
    patch_size: int
    mask: bytes
    data: bytes
    icc_profile: NotRequired[bytes | None]


def encode_patches(
    images: UInt8[ndarray, "b h w c"],
    keep: Bool[ndarray, "b l"],
    patch_size: int,
    coding: PatchCoding = "exact",
    quality: int = 80,
) -> list[Record]:
    """Store the kept patches of images of one shape, 8-bit, grey (c = 1) or RGB (c = 3).

    - exact: lossless JPEG XL of the kept patches alone, laid side by side (see `_lay_out`).
    - exact-small: the same in fewer bytes, at about ten times the time.
    - webp: lossy WebP of the whole picture, its holes filled smoothly from their rim so that they
      cost next to nothing; the quality is 0 to 100.
    """
    height, width, n_channels = images.shape[1:]
    if coding == "webp":
        smooth = fill_smoothly(images, keep_pixels(keep, height, width, patch_size))
        payloads = [_encode_webp(image, quality) for image in smooth]
    else:
        is_small = max(height, width) <= SMALL_SIDE
        effort = SMALL if is_small or coding == "exact-small" else FAST
        grids = keep.reshape(len(keep), *grid_shape(height, width, patch_size))
        pairs = zip(images, grids, strict=True)
        payloads = [_encode_exact(image, marks, patch_size, effort) for image, marks in pairs]
    return [
        Record(
            coding="webp" if coding == "webp" else "jxl",
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
        InputError: If a record is broken, or of version 0.1.
    """
    first = records[0]
    if first["coding"] == OLD:
        raise InputError(OLD_STORE)
    height, width, size = first["height"], first["width"], first["patch_size"]
    try:
        for record in records:
            _check(record)
        rows, columns = grid_shape(height, width, size)
        keep = np.stack([unpack_mask(record["mask"], rows * columns) for record in records])
        if first["coding"] == "jxl":
            grids = keep.reshape(-1, rows, columns)
            pairs = zip(records, grids, strict=True)
            return np.stack([_decode_exact(record, marks) for record, marks in pairs]), keep
        images = np.stack([_decode_webp(record) for record in records])
        images[~keep_pixels(keep, height, width, size)] = 0
    except ERRORS as error:
        raise InputError(f"a record of the patch store is broken: {error}") from error
    return images, keep


def _check(record: Record) -> None:
    """Raise before anything is decoded unless a record can be one of ours."""
    sizes = [record["height"], record["width"], record["patch_size"]]
    if record["coding"] not in ("jxl", "webp") or record["channels"] not in (1, 3):
        raise ValueError(f"coding {record['coding']!r:.50}, {record['channels']} channels")
    if min(sizes) < 1 or sizes[0] * sizes[1] > LARGEST_PIXELS or sizes[2] > MAX_PATCH_SIZE:
        raise ValueError(f"{sizes[0]} x {sizes[1]} px, patches of {sizes[2]} px")
    if not isinstance(record["data"], bytes) or not isinstance(record["mask"], bytes):
        raise ValueError("no data or no mask")


def shape_of(record: Record) -> tuple[Any, ...]:
    """Give what records that are decoded together have in common."""
    names = ("coding", "height", "width", "channels", "patch_size")
    return tuple(record[name] for name in names)  # type: ignore[literal-required]


def _encode_exact(
    image: UInt8[ndarray, "h w c"],
    marks: Bool[ndarray, "rows columns"],
    size: int,
    effort: int,
) -> bytes:
    """Code the patches; of small images by rows and by columns, and take what is smaller.

    Only by columns where the shape would not tell which: a single patch, and patches of 1 px, since
    imagecodecs takes a line of pixels for a column.
    """
    is_small, pictures = max(image.shape[:2]) <= SMALL_SIDE, []
    if is_small:
        pictures = [_lay_out(image.swapaxes(0, 1), marks.T, size, is_small).swapaxes(0, 1)]
    if not is_small or (marks.sum() > 1 and size > 1):
        pictures.append(_lay_out(image, marks, size, is_small))
    how: dict[str, Any] = {
        "lossless": True,
        "effort": effort,
        "usecontainer": False,
        "numthreads": 1,
    }
    planes = (p[..., 0] if p.shape[2] == 1 else p for p in pictures)
    files = [jpegxl_encode(np.ascontiguousarray(plane), **how) for plane in planes]
    return bytes(min(files, key=len))


def _decode_exact(record: Record, marks: Bool[ndarray, "rows columns"]) -> UInt8[ndarray, "h w c"]:
    height, width, size = record["height"], record["width"], record["patch_size"]
    is_small = max(height, width) <= SMALL_SIDE
    lines, per_line = _count_lines(marks, is_small)
    shape = (lines * size, per_line * size)
    if is_small:
        try:
            upright = _read_picture(record, shape[::-1]).swapaxes(0, 1)
        except ValueError:  # it has another shape
            if shape[0] == shape[1] or size == 1:
                raise
        else:
            return _put_back(upright, marks.T, size, is_small).swapaxes(0, 1)[:height, :width]
    return _put_back(_read_picture(record, shape), marks, size, is_small)[:height, :width]


def _read_picture(record: Record, shape: tuple[int, int]) -> UInt8[ndarray, "h w c"]:
    """Decode a picture that must have this shape: nothing is allocated for another one."""
    picture = np.empty((*shape, record["channels"]), dtype=np.uint8)
    is_grey = record["channels"] == 1
    jpegxl_decode(record["data"], numthreads=1, out=picture[..., 0] if is_grey else picture)
    return picture


def _lay_out(
    image: UInt8[ndarray, "h w c"], marks: Bool[ndarray, "rows columns"], size: int, is_small: bool
) -> UInt8[ndarray, "h2 w2 c"]:
    """Lay the kept patches side by side, in lines as `_count_lines` says.

    Patches that the edge cuts are filled up, and the last line with black. In a small image every
    second row of patches is mirrored and read from its end: so patches that touch in the image
    mostly touch in the one line too, by the same pixels.
    """
    (rows, columns), (height, width, c) = marks.shape, image.shape
    extra = ((0, rows * size - height), (0, columns * size - width), (0, 0))
    bands = np.pad(image, extra, mode="edge").reshape(rows, size, columns * size, c)
    if is_small:
        bands, marks = _turn(bands, axis=2), _turn(marks, axis=1)
    patches = bands.reshape(rows, size, columns, size, c).swapaxes(1, 2)[marks]
    lines, per_line = _count_lines(marks, is_small)
    n_empty = lines * per_line - len(patches)
    filled = np.pad(patches, ((0, n_empty), (0, 0), (0, 0), (0, 0)))
    filled = filled.reshape(lines, per_line, size, size, c).swapaxes(1, 2)
    return filled.reshape(lines * size, per_line * size, c)


def _put_back(
    picture: UInt8[ndarray, "h2 w2 c"],
    marks: Bool[ndarray, "rows columns"],
    size: int,
    is_small: bool,
) -> UInt8[ndarray, "h w c"]:
    """Undo `_lay_out`, up to the edge; dropped patches are 0."""
    (rows, columns), c, n_kept = marks.shape, picture.shape[2], int(marks.sum())
    lines, per_line = _count_lines(marks, is_small)
    patches = picture.reshape(lines, size, per_line, size, c).swapaxes(1, 2)
    grid = np.zeros((rows, columns, size, size, c), dtype=np.uint8)
    grid[_turn(marks, axis=1) if is_small else marks] = patches.reshape(-1, size, size, c)[:n_kept]
    bands = grid.swapaxes(1, 2).reshape(rows, size, columns * size, c)
    if is_small:
        bands = _turn(bands, axis=2)
    return bands.reshape(rows * size, columns * size, c)


def _count_lines(marks: Bool[ndarray, "rows columns"], is_small: bool) -> tuple[int, int]:
    """Give the number of lines and of patches in each: one line, or about those of the grid."""
    n_kept = int(marks.sum())
    per_line = n_kept if is_small else -(-n_kept // len(marks))
    return -(-n_kept // per_line), per_line


def _turn(rows: Shaped[ndarray, "rows ..."], axis: int) -> Shaped[ndarray, "rows ..."]:
    """Mirror every second row along an axis."""
    turned = rows.copy()
    turned[1::2] = np.flip(rows[1::2], axis)
    return turned


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
        n = values.shape[axis]
        framed = values.take([0, *range(n), n - 1], axis)
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


def _decode_webp(record: Record) -> UInt8[ndarray, "h w c"]:
    from PIL import Image

    picture = Image.open(io.BytesIO(record["data"]), formats=["WEBP"])
    if picture.size != (record["width"], record["height"]):  # before its pixels are decoded
        raise ValueError(f"a picture of {picture.size[0]} x {picture.size[1]} px")
    pixels = np.array(picture.convert("RGB"))
    return pixels if record["channels"] == 3 else pixels[..., :1]
