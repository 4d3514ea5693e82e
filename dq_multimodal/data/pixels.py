"""Any image file to upright 8-bit RGB; what had to be changed, or could not be read, is said."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features
from datasets.fingerprint import update_fingerprint
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps

from dq_multimodal.data.row_files import TEXT_KINDS, is_file_struct
from dq_multimodal.data.row_files import read_bytes as read_bytes

NO_IMAGE = "no image"
EMPTY = "an empty image file"
UNREADABLE = "an image that cannot be read"
CUT_SHORT = "an image that is cut short"
TOO_LARGE = "an image too large to be safe"
UNDECODED = (EMPTY, UNREADABLE, CUT_SHORT, TOO_LARGE)
"""What a training loop that reads the image would break on."""
BLANK = (NO_IMAGE, *UNDECODED)
"""What leaves a row without pixels: it is embedded as zeros."""

ANIMATED = "an animation, of which the first frame counts"
SEVERAL = "several pictures in one file, of which the first counts"
ROTATED = "a rotation tag, turned upright"
TRANSPARENT = "transparency, laid on white"
GREY = "grey values, made RGB"
DEEP = "more than 8 bits a channel, scaled to 8"
OTHER_COLOURS = "colours other than RGB, converted"

ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF", "FLI")
"""Formats whose pictures are shown one after the other; those of a camera's MPO are not."""

PATH = r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif)$"

ORIENTATION_TAG = 0x0112
DEEP_MODES = re.compile(r";(10|12|16)[BLN]")
"""Pillow's names of raw samples of so many bits each; BGR;16 is 16 bits a pixel."""
BITS_PER_SAMPLE = 258

# What Pillow has to say of odd files is said by row number here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(
    data: bytes | None, *, is_check: bool = False
) -> tuple[Image.Image | None, list[str]]:
    """Decode an image file of any kind to upright 8-bit RGB.

    Args:
        data: The file; None for a row without one.
        is_check: Only to see whether it can be decoded: a JPEG comes at an eighth of its size,
            which reads the file to its end too.

    Returns:
        The image, None where there is nothing that can be read to its end, and what was odd, one
        of the constants of this module each.
    """
    if data is None:
        return None, [NO_IMAGE]
    if not data:
        return None, [EMPTY]
    odd = []
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if getattr(image, "n_frames", 1) > 1:
            odd.append(ANIMATED if image.format in ANIMATIONS else SEVERAL)
        if _is_deep(image, data):
            odd.append(DEEP)
        turn = image.getexif().get(ORIENTATION_TAG, 1)
        if is_check:
            image.draft(None, (1, 1))
        image.load()
        if turn in range(2, 9):
            image = ImageOps.exif_transpose(image)
            odd.append(ROTATED)
        image, remark = _to_rgb(image)
    except Image.UnidentifiedImageError:
        return None, [UNREADABLE]
    except Image.DecompressionBombError:
        return None, [TOO_LARGE]
    except (OSError, EOFError) as error:
        is_cut = "truncated" in str(error) or isinstance(error, EOFError)
        return None, [CUT_SHORT if is_cut else UNREADABLE]
    except MemoryError:
        raise
    except Exception:  # the readers of broken files raise whatever they like
        return None, [UNREADABLE]
    return image, odd + ([remark] if remark is not None and remark not in odd else [])


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Say whether a file that was opened and not yet loaded holds more than 8 bits a channel.

    Pillow tells of grey ones by their mode; those with colours it cuts to 8 bits by itself.
    """
    if image.format == "TIFF":
        return max(np.ravel(image.tag_v2.get(BITS_PER_SAMPLE, 8))) > 8  # type: ignore[attr-defined]
    if image.format == "AVIF":  # the third byte of its configuration box
        at = data.find(b"av1C")
        return at >= 0 and bool(data[at + 6] & 0x40)
    if image.format == "JPEG2000":  # count and depths of the channels, in the code stream's head
        at = data.find(b"\xff\x4f\xff\x51") + 42
        depths = data[at : at + 3 * data[at - 1] : 3]
        return any((depth & 0x7F) > 7 for depth in depths)
    tiles = [tile[3] for tile in getattr(image, "tile", [])]
    if image.format == "PPM":
        return any(isinstance(tile, tuple) and tile[-1] > 255 for tile in tiles)
    return any(DEEP_MODES.search(str(tile)) for tile in tiles)


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Convert every mode of Pillow, and say what that meant."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image, None
    is_wide = mode.startswith(("I", "F"))
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or ("transparency" in image.info and not is_wide):
        above = image.convert("RGBA")
        if above.getchannel("A").getextrema()[0] == 255:  # nothing shines through
            return above.convert("RGB"), None if mode == "RGBA" else OTHER_COLOURS
        below = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(below, above).convert("RGB"), TRANSPARENT
    if mode in ("L", "1"):
        return image.convert("RGB"), GREY
    if is_wide:
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = values.max(initial=0)
        scale = 255.0 if top <= 1 and mode == "F" else 1.0 if top <= 255 else 255.0 / 65535.0
        grey = np.clip(np.round(values * scale), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), DEEP
    return image.convert("RGB"), OTHER_COLOURS


def find_divisor(image: Image.Image, most: int) -> int:
    """Give the least whole number by which both sides have to be divided for so many pixels."""
    divisor = 1
    while (image.width // divisor) * (image.height // divisor) > most:
        divisor += 1
    return divisor


def count_pixels(data: bytes | None) -> int:
    """Give height x width of an image file by its header alone; 0 where it cannot be read."""
    try:
        width, height = Image.open(io.BytesIO(data or b"")).size
    except MemoryError:
        raise
    except Exception:
        return 0
    return width * height


def to_square(
    image: Image.Image, size: int, crop: float = 1.0, resample: int = 3
) -> UInt8[ndarray, "size size 3"]:
    """Cut out the central square of an RGB image and scale it, as evaluation transforms do.

    Args:
        size: Side of the result in pixels.
        crop: Side of the square as a share of the shorter side of the image.
        resample: Pillow's filter; 3 is bicubic.
    """
    width, height = image.size
    if (width, height) == (size, size) and crop == 1.0:
        return np.asarray(image)
    side = min(width, height) * crop
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), resample, box=box, reducing_gap=3.0))


def image_columns(dataset: Dataset) -> list[str]:
    """List the columns of images: one a row, lists of them, or chat turns that hold some.

    Plain structs of bytes and path count as images.
    """
    return [name for name, kind in dataset.features.items() if _is_of_images(kind)]


def unread_columns(dataset: Dataset) -> list[str]:
    """List the columns that hold images in another way."""
    found = image_columns(dataset)
    kinds = dataset.features.items()
    return [name for name, kind in kinds if name not in found and _holds_images(kind)]


def _is_of_images(kind: Any) -> bool:
    while hasattr(kind, "feature"):
        kind = kind.feature
    is_turn = isinstance(kind, dict) and bool({"role", "from"} & kind.keys())
    return is_image(kind) or (is_turn and _holds_images(kind))


def _holds_images(kind: Any) -> bool:
    if isinstance(kind, dict) and not is_image(kind):
        return any(map(_holds_images, kind.values()))
    return _holds_images(kind.feature) if hasattr(kind, "feature") else is_image(kind)


def read_paths(dataset: Dataset, is_there: Callable[[str], bool]) -> Dataset:
    """Read as images the columns of paths that all end as those of images do, empty ones apart.

    The first path must lead to a file, since names and addresses of images end so, too. Of rows
    that hold images already nothing is changed.
    """
    if image_columns(dataset):
        return dataset
    features, numbers, table = Features(dataset.features), dataset._indices, dataset.data
    for column, kind in dataset.features.items():
        is_list = hasattr(kind, "feature")
        if getattr(kind.feature if is_list else kind, "dtype", "") not in TEXT_KINDS:
            continue
        paths = dataset.data.column(column)
        paths = paths.take(numbers.column(0)) if numbers is not None else paths
        paths = (pc.list_flatten(paths) if is_list else paths).drop_null()
        paths = paths.filter(pc.not_equal(paths, ""))
        is_path = pc.match_substring_regex(paths, PATH, ignore_case=True)
        if len(paths) and pc.all(is_path).as_py() and is_there(paths[0].as_py()):
            file = datasets.Image()
            features[column] = replace(kind, feature=file) if is_list else file
            if not is_list:
                values = table.column(column)
                values = pc.if_else(pc.equal(values, ""), None, values)
                table = table.set_column(table.column_names.index(column), column, values)
    if features == dataset.features:
        return dataset
    info = dataset.info.copy()
    info.features = features
    mark = update_fingerprint(dataset._fingerprint, "read_paths", {})
    table = table.cast(features.arrow_schema)
    return Dataset(table, info, dataset.split, numbers, mark)


def is_image(kind: Any) -> bool:
    """Say whether a column holds one image a row."""
    return type(kind).__name__ == "Image" or is_file_struct(kind)


def _as_files(kind: Any) -> Any:
    """Give a type whose images, at any depth, come as files."""
    if is_image(kind):
        return datasets.Image(decode=False)
    if isinstance(kind, dict):
        return {name: _as_files(part) for name, part in kind.items()}
    return replace(kind, feature=_as_files(kind.feature)) if hasattr(kind, "feature") else kind


def undecoded(dataset: Dataset, *columns: str) -> Dataset:
    """Give columns whose images, at any depth, come as files, not as pictures.

    No file is copied, as `Dataset.cast_column` would copy those of lists.
    """
    found = dataset.select_columns(list(columns))
    for column in columns:
        old = dataset.features[column]
        kind = _as_files(old)
        if kind == old:
            continue
        is_same = Features({column: kind}).type == Features({column: old}).type
        if isinstance(found, Dataset) and is_same:
            info = found.info.copy()
            info.features = Features({**found.features, column: kind})
            mark = update_fingerprint(found._fingerprint, "undecoded", {"column": column})
            found = Dataset(found.data, info, found.split, found._indices, mark)
        else:
            found = found.cast_column(column, kind)
    return found


def image_files(batch: dict[str, list[Any]], columns: Sequence[str]) -> list[list[Any]]:
    """Give the image files of every row of a batch, column by column; null ones are left out."""
    rows = zip(*(batch[column] for column in columns), strict=True)
    return [[*_find_files(values)] for values in rows]


def _find_files(value: Any) -> Iterator[Any]:
    """Find the files in a value, at any depth, in their order."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _find_files(part)
