"""Some images of a run that lost patches, to look at."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.data.pixels import decode_image, read_bytes, undecoded
from dq_multimodal.manifest import Config
from dq_multimodal.patches.codec import OLD, ORIGINAL, Record
from dq_multimodal.patches.grid import grid_shape, keep_pixels, unpack_mask
from dq_multimodal.patches.store import find_patch_columns, make_filler, restore_images
from dq_multimodal.report.compare import sample_rows
from dq_multimodal.stages.subset import open_subset

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

N_EXAMPLES = 6
SIDE = 224


@dataclass(frozen=True)
class Example:
    """A kept row of which patches were dropped; WebP files of at most 224 px a side."""

    row: int
    original: bytes | None  # None where the source cannot be read
    holed: bytes  # dropped patches are transparent
    filled: bytes
    kept_share: float  # of its patches
    psnr: float | None  # in dB over the dropped patches; None where the source cannot be read


def show_examples(
    folder: Path, config: Config, dataset: "Dataset | None", kept: Bool[ndarray, " n"]
) -> list[Example]:
    """Decode some records of the subset, drawn by a seeded hash."""
    assert config.patches is not None
    try:
        subset = open_subset(folder)
        fill = make_filler(config.patches.fill, config.request.mae_model)
    except InputError:
        return []
    column = find_patch_columns(subset.features)[0]
    zero = make_filler("zero")
    examples: list[Example] = []
    rows = np.flatnonzero(kept)
    for at in sample_rows(np.arange(len(rows)), 4 * N_EXAMPLES, config.request.seed).tolist():
        record: Record | None = subset[at][column]
        if record is None or record["coding"] in (ORIGINAL, OLD) or len(examples) == N_EXAMPLES:
            continue
        holed, filled = (restore_images([record], how)[0] for how in (zero, fill))
        if holed is None or filled is None:
            continue
        size, shape = record["patch_size"], (record["height"], record["width"])
        n_rows, n_columns = grid_shape(*shape, size)
        keep = unpack_mask(record["mask"], n_rows * n_columns)
        is_kept = keep_pixels(keep[None], *shape, size)[0]
        row, original = int(rows[at]), None
        if dataset is not None:
            files = undecoded(dataset, column)
            original, _ = decode_image(read_bytes(files[[row]][column][0]))
        examples.append(
            Example(
                row=row,
                original=None if original is None else _as_webp(original),
                holed=_as_webp(_with_holes(holed, is_kept)),
                filled=_as_webp(filled),
                kept_share=float(keep.mean()),
                psnr=None if original is None else _psnr(original, filled, ~is_kept),
            )
        )
    return examples


def _with_holes(image: "Image", is_kept: Bool[ndarray, "h w"]) -> "Image":
    from PIL import Image

    image = image.convert("RGB")
    image.putalpha(Image.fromarray(np.where(is_kept, np.uint8(255), np.uint8(0))))
    return image


def _psnr(original: "Image", filled: "Image", is_hole: Bool[ndarray, "h w"]) -> float | None:
    """Give 10 log10(255^2 / MSE) in dB over the holes; None where it is infinite."""
    pixels = [np.asarray(image.convert("RGB"), dtype=np.int32) for image in (original, filled)]
    if pixels[0].shape != pixels[1].shape or not is_hole.any():
        return None
    error = float(np.square(pixels[0] - pixels[1])[is_hole].mean())
    return 10 * float(np.log10(255**2 / error)) if error else None


def _as_webp(image: "Image") -> bytes:
    copy = image.copy()
    is_tiny = max(copy.size) <= 48
    if not is_tiny:
        copy.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    copy.save(file, "WEBP", quality=80, lossless=is_tiny)
    return file.getvalue()
