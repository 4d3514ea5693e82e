"""Reading a patch store back: a dataset whose images are whole again, lazily."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dq_multimodal.config import Fill, InputError, check_choice
from dq_multimodal.data.pixels import decode_image
from dq_multimodal.files import open_parquet
from dq_multimodal.patches.codec import (
    FIELDS,
    OLD,
    ORIGINAL,
    PROFILE,
    Record,
    decode_patches,
    shape_of,
)
from dq_multimodal.patches.fill import Images, Marks, fill_mean, fill_zero
from dq_multimodal.patches.grid import keep_pixels
from dq_multimodal.patches.mae import load_mae

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from PIL.Image import Image

Filler = Callable[[Images, Marks, int], Images]
"""Fills the holes of images of one shape, given marks of kept patches and the patch size."""


def restore(dataset: "Dataset", fill: Fill = "mean", *, mae_model: str | None = None) -> "Dataset":
    """Give a dataset of the patch store its images back, when rows are read and not before.

    A mae fills a batch in little more time than one image, so read batches with it, as a DataLoader
    over the dataset does by itself.

    Args:
        dataset: With one or several columns of patch records, as `compress --drop-ratio` writes.
        fill: What holes hold: the "mean" colour of the kept pixels of the image, "zero" (black),
            or what a masked autoencoder makes of them ("mae").
        mae_model: For mae: a ViTMAE model id or folder.

    Returns:
        The same rows; the columns hold RGB or grey `PIL.Image`s, other columns are as they were.

    Raises:
        InputError: If there is no such column, the fill cannot be had, or, when rows are read, if
            version 0.1 stored them.
    """
    columns = find_patch_columns(dataset.features)
    if not columns:
        raise InputError(
            f"no column of patch records among {', '.join(dataset.column_names)}: the images "
            "are whole already"
        )
    return dataset.with_transform(_Restore(columns, fill, mae_model))


class _Restore:
    """The transform of `restore`; another process that gets it loads the model anew."""

    def __init__(self, columns: list[str], fill: Fill, mae_model: str | None) -> None:
        self._columns, self._asked = columns, (fill, mae_model)
        self._filler = make_filler(fill, mae_model)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            name: restore_images(values, self._filler) if name in self._columns else values
            for name, values in batch.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _Restore, (self._columns, *self._asked)

    def __deepcopy__(self, _: dict[int, Any]) -> "_Restore":
        return self  # datasets copies its formats at every step


def find_patch_columns(features: "Features") -> list[str]:
    """List the columns that hold patch records."""
    return [
        name
        for name, kind in features.items()
        if isinstance(kind, dict) and {*kind, PROFILE} == FIELDS.keys()
    ]


def has_old_records(files: list[Path]) -> bool:
    """Say whether a column of parquet files holds images in the lossless coding of version 0.1."""
    from datasets import Features

    for path in files:
        with open_parquet(path) as file:
            columns = find_patch_columns(Features.from_arrow_schema(file.schema_arrow))
            codings = file.read(columns=[f"{name}.coding" for name in columns])
        if any({"coding": OLD} in codings[name].to_pylist() for name in columns):
            return True
    return False


def make_filler(fill: Fill, mae_model: str | None = None, device: str | None = None) -> Filler:
    """Give the function that fills holes.

    Raises:
        InputError: If there is no such fill, or its model cannot be had.
    """
    check_choice("fill", fill, Fill)
    if fill != "mae":
        return fill_mean if fill == "mean" else fill_zero
    if mae_model is None:
        raise InputError("fill mae needs a mae_model: a ViTMAE model id or folder")
    autoencoder = load_mae(mae_model, device)

    def fill_mae(images: Images, keep: Marks, patch_size: int) -> Images:
        if patch_size != autoencoder.patch_size:
            raise InputError(
                f"{mae_model} fills patches of {autoencoder.patch_size} px, "
                f"and these have {patch_size}"
            )
        return autoencoder.fill(images, keep)

    return fill_mae


def restore_images(records: list[Record | None], fill: Filler) -> "list[Image | None]":
    """Decode and fill a batch of records; None stays None, and so does a file nobody can read."""
    from PIL import Image

    made: list[Image.Image | None] = [None] * len(records)
    together: dict[Any, list[tuple[int, Record]]] = defaultdict(list)
    for k, record in enumerate(records):
        if record is not None and record["coding"] == ORIGINAL:
            made[k] = decode_image(record["data"])[0]
        elif record is not None:
            together[shape_of(record)].append((k, record))
    for group in together.values():
        images, keep = decode_patches([record for _, record in group])
        filled = images if keep.all() else fill(images, keep, group[0][1]["patch_size"])
        for (k, record), image in zip(group, filled, strict=True):
            made[k] = picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
            if profile := record.get(PROFILE):
                picture.info[PROFILE] = profile
    return made


def is_of_file(record: Record | None, file: bytes | None) -> bool:
    """Say whether a record comes from an image file: the same file, or the same kept pixels.

    Of lossy records the size is compared.
    """
    if record is None or file is None:
        return record is None and file is None
    if record["coding"] == ORIGINAL:
        return record["data"] == file
    image, _ = decode_image(file)
    if image is None or (image.height, image.width) != (record["height"], record["width"]):
        return False
    if PROFILE in record and record[PROFILE] != (image.info.get(PROFILE) or None):
        return False
    try:
        pixels, keep = decode_patches([record])
    except InputError:
        return False
    if record["coding"] == "webp":
        return True
    is_kept = keep_pixels(keep, image.height, image.width, record["patch_size"])
    wanted = np.asarray(image)[None, ..., : record["channels"]]
    return bool(np.array_equal(pixels[is_kept], wanted[is_kept]))
