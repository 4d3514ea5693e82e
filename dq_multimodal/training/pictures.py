"""Pictures to train on: flags that name them, and how they are decoded.

They are decoded once into memory when they are small, else as they are needed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.config import InputError
from dq_multimodal.data.columns import find_image_column, find_label_column, read_classes
from dq_multimodal.data.pixels import decode_image, is_image, read_bytes, to_square, undecoded
from dq_multimodal.models.classifiers import SMALL_SIDE
from dq_multimodal.patches.store import find_patch_columns
from dq_multimodal.training.arguments import SOURCE, flags_of

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

MEMORY_BYTES = 4_000_000_000
"""Pictures that take no more than this as 8-bit squares are decoded once."""
BLOCK_ROWS = 512
STATISTICS_ROWS = 10_000
PROBED_ROWS = 64

Reader = Callable[[list[int]], "list[Image | None]"]
"""Gives RGB pictures by row number, None where there is none that can be read."""
Remarks = dict[str, set[int]]
"""What was odd about image files, by the words of `data.pixels`: the numbers of their rows."""


def read_files(dataset: "Dataset", column: str, remarks: Remarks | None = None) -> Reader:
    """Read pictures from a column of image files; add to the remarks what is odd about them."""
    files = undecoded(dataset, column)

    def read(rows: list[int]) -> "list[Image | None]":
        found = [decode_image(read_bytes(value)) for value in files[rows][column]]
        if remarks is not None:
            for row, (_, odd) in zip(rows, found, strict=True):
                for what in odd:
                    remarks.setdefault(what, set()).add(row)
        return [image for image, _ in found]

    return read


def read_records(dataset: "Dataset", column: str, fill: Any, mae_model: str | None) -> Reader:
    """Read pictures from a column of the patch store, their holes filled."""
    from dq_multimodal.patches.store import make_filler, restore_images

    records, filler = dataset.select_columns([column]), make_filler(fill, mae_model)

    def read(rows: list[int]) -> "list[Image | None]":
        images = restore_images(records[rows][column], filler)
        return [None if image is None else image.convert("RGB") for image in images]

    return read


class Pictures:
    """A map-style dataset of (8-bit squares, row numbers) batches.

    Args:
        read: Where the pictures come from.
        classes: Class of every row, -1 where it has none.
        size: Side of the squares in pixels.
        name: What the progress bar and messages call them.

    Attributes:
        rows: Rows that can be used: they have a class and, as far as known, a picture.
        unused: Numbers of the others.
    """

    def __init__(
        self, read: Reader, classes: Int[ndarray, " n"], size: int, *, name: str = "pictures"
    ) -> None:
        self.read, self.size, self.classes = read, size, classes
        self.is_augmented, self.seed = False, (0, 0)
        usable = classes >= 0
        self._pixels: UInt8[ndarray, "n size size 3"] | None = None
        if size <= SMALL_SIDE and len(classes) * size * size * 3 <= MEMORY_BYTES:
            self._pixels, found = self._decode_all(name)
            usable &= found
        self.rows = np.flatnonzero(usable)
        self.unused = np.flatnonzero(~usable).tolist()
        if not len(self.rows):
            raise InputError(f"no row of {name} has both a class and a picture")

    def __len__(self) -> int:
        return len(self.classes)

    def _decode_all(self, name: str) -> tuple[UInt8[ndarray, "n size size 3"], ndarray]:
        n_rows = len(self.classes)
        pixels = np.zeros((n_rows, self.size, self.size, 3), dtype=np.uint8)
        found = np.zeros(n_rows, dtype=bool)
        starts = range(0, n_rows, BLOCK_ROWS)
        blocks = [list(range(start, min(start + BLOCK_ROWS, n_rows))) for start in starts]
        with ThreadPoolExecutor(2) as pool, tqdm(total=n_rows, desc=name, unit="row") as bar:
            for rows, images in zip(blocks, pool.map(self.read, blocks), strict=True):
                for row, image in zip(rows, images, strict=True):
                    if image is not None:
                        pixels[row], found[row] = to_square(image, self.size), True
                bar.update(len(rows))
        return pixels, found

    def __getitems__(
        self, rows: list[int]
    ) -> tuple[UInt8[ndarray, "b size size 3"], Int[ndarray, " b"]]:
        """Give the pictures of some rows, and which rows: unreadable pictures are left out."""
        if self._pixels is not None:
            return self._pixels[rows], np.asarray(rows, dtype=np.int64)
        read = zip(rows, self.read(rows), strict=True)
        there = [(row, image) for row, image in read if image is not None]
        pixels = np.zeros((len(there), self.size, self.size, 3), np.uint8)
        for k, (row, image) in enumerate(there):
            if self.is_augmented:
                pixels[k] = self._random_square(image, row)
            else:
                pixels[k] = to_square(image, self.size)
        return pixels, np.array([row for row, _ in there], dtype=np.int64)

    @cached_property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of r, g, b in [0, 1], of evenly spaced rows."""
        rows = self.rows[:: max(1, len(self.rows) // STATISTICS_ROWS)][:STATISTICS_ROWS]
        sums, squares, n_pixels = np.zeros(3), np.zeros(3), 0
        for start in range(0, len(rows), BLOCK_ROWS):
            pixels, _ = self.__getitems__(rows[start : start + BLOCK_ROWS].tolist())
            values = pixels.reshape(-1, 3).astype(np.float64) / 255
            sums, squares = sums + values.sum(axis=0), squares + np.square(values).sum(axis=0)
            n_pixels += len(values)
        mean = sums / max(1, n_pixels)
        std = np.sqrt(np.maximum(squares / max(1, n_pixels) - mean**2, 1e-6))
        return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())

    def standardiser(self, device: Any) -> Any:
        """Give the function that makes (b, 3, h, w) inputs of a net from (b, h, w, 3) pixels."""
        import torch

        mean, std = self.statistics
        scale = torch.tensor([1 / (255 * s) for s in std], device=device)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
        return lambda pixels: (pixels.float() * scale + shift).permute(0, 3, 1, 2)

    def _random_square(self, image: "Image", row: int) -> UInt8[ndarray, "size size 3"]:
        """Cut out 8 to 100 % of the area at a random place, as ImageNet training does."""
        rng = np.random.default_rng((*self.seed, row))
        width, height = image.size
        for _ in range(10):
            area = width * height * rng.uniform(0.08, 1.0)
            ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
                box = (left, top, left + w, top + h)
                size = (self.size, self.size)
                return np.asarray(image.resize(size, 3, box=box, reducing_gap=3.0))
        return to_square(image, self.size)


def draw_shifts(n: int, generator: Any, padding: int) -> tuple[Any, Any]:
    """Draw (2, n) shifts down and right, from 0 to 2 x padding, and (n,) whether to mirror.

    The torch.Generator is one of the CPU: the same draws on every device.
    """
    import torch

    moves = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    return moves, torch.rand(n, generator=generator) < 0.5


def shift_and_flip(images: Any, moves: Any, is_mirrored: Any, padding: int) -> Any:
    """Move pictures, (b, h, w, 3), over a black border of so many pixels, and mirror some."""
    import torch

    n, height, width, _ = images.shape
    framed = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    rows, columns = torch.arange(height).expand(n, height), torch.arange(width).expand(n, width)
    columns = torch.where(is_mirrored[:, None], columns.flip(1), columns)
    rows, columns = moves[0][:, None] + rows, moves[1][:, None] + columns
    rows, columns = rows.to(images.device), columns.to(images.device)
    at = torch.arange(n, device=images.device)[:, None, None]
    return framed[at, rows[:, :, None], columns[:, None, :]]


ImageFlags: Any = flags_of(*SOURCE, "image_column", "label_column", dataset="uoft-cs/cifar10")


@dataclass
class ImageDataArguments(ImageFlags):
    """Which images."""

    image_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels. Default: that of the images up to 96, else 224."},
    )

    def find_size(self, dataset: "Dataset") -> int:
        """Give the side asked for, or that of small images, or 224."""
        if self.image_size is not None:
            return self.image_size
        rows = [*range(min(PROBED_ROWS, len(dataset)))]
        images = self.read(dataset)(rows)
        sides = [max(image.size) for image in images if image is not None]
        if not sides:
            raise InputError(f"none of the first {len(rows)} images can be read")
        return max(sides) if max(sides) <= SMALL_SIDE else 224

    def find_column(self, dataset: "Dataset") -> str:
        """Find the column of images, files or records of the patch store.

        Raises:
            InputError: If there is none, several, another kind is named, or rows have several.
        """
        stored = find_patch_columns(dataset.features)
        asked = self.image_column or (stored[0] if stored else None)
        if asked in stored:
            return asked
        column = find_image_column(dataset, asked)
        if not is_image(dataset.features[column]):
            raise InputError(f"{column} holds several images a row: one is wanted")
        return column

    def read(
        self,
        dataset: "Dataset",
        fill: str | None = "mean",
        mae_model: str | None = None,
        remarks: Remarks | None = None,
    ) -> Reader:
        """Open the column of images; those of the patch store come with their holes filled."""
        column = self.find_column(dataset)
        if column in find_patch_columns(dataset.features):
            return read_records(dataset, column, fill, mae_model)
        return read_files(dataset, column, remarks)

    def pictures(
        self,
        dataset: "Dataset",
        size: int,
        rows: Int[ndarray, " k"] | None = None,
        *,
        name: str = "decode",
        fill: str | None = "mean",
        mae_model: str | None = None,
        remarks: Remarks | None = None,
    ) -> tuple[Pictures, tuple[str, ...]]:
        """Give rows (all, when None) as pictures with classes, and the names of the classes.

        Images of the patch store come back with their holes filled. To the remarks is added what is
        odd about the files that are read.
        """
        classes, labels = read_classes(dataset, find_label_column(dataset, self.label_column))
        if rows is not None:
            dataset, classes = dataset.select(rows), classes[rows]
        reader = self.read(dataset, fill, mae_model, remarks)
        return Pictures(reader, classes, size, name=name), labels
