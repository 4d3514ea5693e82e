"""What dropping patches did to the images of a run, with some of them to look at."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.data.pixels import decode_image, read_bytes, undecoded
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
    """A kept row of which patches were dropped; WebP files of at most 224 px a side.

    Attributes:
        row: Row number.
        original: The picture; None where the source cannot be read.
        holed: With dropped patches transparent.
        filled: With holes filled.
        kept_share: Share of its patches that were kept.
        psnr: PSNR in dB over the dropped patches; None where the source cannot be read.
    """

    row: int
    original: bytes | None
    holed: bytes
    filled: bytes
    kept_share: float
    psnr: float | None


@dataclass(frozen=True)
class Patches:
    """What dropping patches did.

    Attributes:
        n_images: Images of the kept rows.
        n_coded: Images that lost patches; the others keep their original file.
        originals: Why some keep their original, and how many.
        patch_size: Side of a patch in pixels.
        fill: How holes were filled for PSNR and answers: "mean", "zero" or "mae".
        dropped_share: Share of all patches that was dropped.
        psnr: Mean and lowest PSNR in dB over the dropped patches, in that order.
        psnr_of_kept: The same over the kept patches; None where they are exact.
        n_compared: Images on which the classifier was asked before and after.
        n_changed: Images of those to which it gives another answer.
        source_bytes: Bytes of the image files in the source.
        stored_bytes: Bytes of the images in the subset, masks included.
        examples: Some rows to look at.
    """

    n_images: int
    n_coded: int
    originals: dict[str, int]
    patch_size: int
    fill: str
    dropped_share: float
    psnr: tuple[float, float] | None
    psnr_of_kept: tuple[float, float] | None
    n_compared: int
    n_changed: int
    source_bytes: int
    stored_bytes: int
    examples: list[Example]


def describe_patches(
    folder: Path,
    config: dict[str, Any],
    manifest: dict[str, Any],
    dataset: "Dataset | None",
    kept: Bool[ndarray, " n"],
) -> Patches | None:
    """Say what dropping patches did; None where none were dropped."""
    found = manifest.get("patches")
    if not found:
        return None
    return Patches(
        n_images=found["images"],
        n_coded=found["coded"],
        originals=found["originals"],
        patch_size=config["patches"]["patch_size"],
        fill=found["fill"],
        dropped_share=1 - found["kept_share"],
        psnr=_pair(found["psnr_of_holes"]),
        psnr_of_kept=_pair(found["psnr_of_kept"]),
        n_compared=found["answers"]["compared"],
        n_changed=found["answers"]["changed"],
        source_bytes=manifest["bytes"]["source_images"],
        stored_bytes=manifest["bytes"]["stored_images"],
        examples=_show_examples(folder, config, dataset, kept),
    )


def _pair(found: dict[str, float | None]) -> tuple[float, float] | None:
    mean, lowest = found["mean"], found["lowest"]
    return None if mean is None or lowest is None else (mean, lowest)


def _show_examples(
    folder: Path, config: dict[str, Any], dataset: "Dataset | None", kept: Bool[ndarray, " n"]
) -> list[Example]:
    """Decode some records of the subset, drawn by a seeded hash."""
    request = config["request"]
    try:
        subset = open_subset(folder)
        fill = make_filler(config["patches"]["fill"], request.get("mae_model"))
    except InputError:
        return []
    column = find_patch_columns(subset.features)[0]
    zero = make_filler("zero")
    examples: list[Example] = []
    rows = np.flatnonzero(kept)
    for at in sample_rows(np.arange(len(rows)), 4 * N_EXAMPLES, request["seed"]).tolist():
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
