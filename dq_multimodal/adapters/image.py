"""Images: any file that Pillow reads, embedded by pooled features or last-layer gradients."""

import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from PIL import Image, ImageEnhance
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter, Embedded, Problems
from dq_multimodal.config import Dtype, Embedding, InputError
from dq_multimodal.core.texture import image_texture
from dq_multimodal.data.columns import (
    find_image_column,
    find_label_column,
    match_classes,
    read_classes,
)
from dq_multimodal.data.pixels import BLANK, decode_image, read_bytes, undecoded
from dq_multimodal.models.image import ImageModel, load_image_model

SMALL_PIXELS = 2**16
CHECKED_ROWS = 256
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
"""ITU-R 601, of 8-bit values."""

MAX_PIXELS = 2**20
"""Larger images are halved, or divided by the next whole number, until they have no more."""

Batch = tuple[
    UInt8[ndarray, "b size size 3"],
    Bool[ndarray, " b"],
    Int[ndarray, " b"],
    Float[ndarray, "b 2"] | None,
]
"""Prepared pictures, which of them could be read, their row numbers and their texture."""


class ImageAdapter(Adapter):
    r"""Embeddings of the images of a dataset.

    `features` are the pooled penultimate features. `gradients` are those of the cross-entropy
    with respect to the weights of the last layer: the outer product of $p - onehot(y)$ and the
    features, y the label of the row, or the predicted class where it has none. Only the two
    factors are stored, side by side; `core.make_bins` multiplies their inner products.

    Args:
        image_column: The column; None finds the only one.
        label_column: The column of labels; None finds it, "none" stands for none.
        model: See `models.image.load_image_model`.
        kind: "features" or "gradients".
        is_scored: Whether texture and middle features are wanted too.
        device: Where the model runs; None is a GPU if there is one.
        dtype: Its numbers; auto is float32.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_column: str | None,
        label_column: str | None,
        model: str,
        kind: Embedding = "features",
        *,
        is_scored: bool = False,
        device: str | None = None,
        dtype: Dtype = "auto",
    ) -> None:
        super().__init__(dataset, is_scored=is_scored)
        self.column = find_image_column(dataset, image_column)
        self.label_column = find_label_column(dataset, label_column)
        self.model_name, self.kind = model, kind
        self._device, self._dtype = device, dtype
        self._files = undecoded(dataset, self.column)
        self._labels = dataset.select_columns([self.label_column]) if self.label_column else None

    @cached_property
    def model(self) -> ImageModel:
        """The model that embeds."""
        model = load_image_model(self.model_name, self._device, self._dtype)
        if self.kind == "gradients" and not model.n_classes:
            raise InputError(f"gradients need a classifier, and {self.model_name} has no classes")
        return model

    @cached_property
    def classes(self) -> Int[ndarray, " n"]:
        """Class of every row among those of the model; -1 leaves it to the model's answer."""
        if self._labels is None:
            return np.full(len(self._files), -1, dtype=np.int64)
        codes, labels = read_classes(self._labels, self.label_column)
        classes = match_classes(codes, labels, self.model.labels)
        strange = sorted({labels[code] for code in np.unique(codes[(codes >= 0) & (classes < 0)])})
        if strange:
            raise InputError(
                f"gradients need a classifier of the labels in {self.label_column}, and "
                f"{self.model_name} does not know {', '.join(strange[:5])}: train one with "
                "recipes/train_extractor.py, or use --label-column none"
            )
        return classes

    @property
    def dimension(self) -> int:
        """Size of a stored embedding: d, or classes + d for gradients."""
        n_classes = self.model.n_classes if self.kind == "gradients" else 0
        return n_classes + self.model.dimension()

    def describe(self) -> dict[str, Any]:
        """Say which column is embedded."""
        return {"modality": "image", "shape": "images", "columns": [self.column]}

    def describe_model(self) -> dict[str, Any]:
        """Say which model embeds, and how."""
        found: dict[str, Any] = {**self.model.describe(), "dimension": self.dimension}
        found["kind"] = self.kind
        if self.kind == "gradients":
            self.classes  # noqa: B018 - says now if the labels do not fit
            found["factors"] = [self.model.n_classes, self.model.dimension()]
        return found

    def lengths(self) -> Int[ndarray, " n"]:
        """Every image costs the same."""
        return np.ones(len(self._files), dtype=np.int64)

    @property
    def middle_dimension(self) -> int:
        """Size of the pooled middle features."""
        return self.model.middle_dimension

    def check_images(
        self, blocks: Iterable[Int[ndarray, " b"]] | None = None, seconds: float = math.inf
    ) -> int:
        """Find the images that cannot be decoded, for `problems`, where rows are not embedded.

        Args:
            blocks: Row numbers to look at, some at a time; None is all rows.
            seconds: When to stop.

        Returns:
            Rows that were looked at.
        """
        n_rows = len(self._files)
        blocks = blocks or np.split(np.arange(n_rows), range(CHECKED_ROWS, n_rows, CHECKED_ROWS))
        started, n_checked = time.monotonic(), 0
        with ThreadPoolExecutor() as pool, tqdm(total=n_rows, desc="check", unit="row") as bar:
            for rows in blocks:
                values = self._files[rows.tolist()][self.column]
                for row, odd in zip(rows.tolist(), pool.map(_find_fault, values), strict=True):
                    for what in set(odd) & set(BLANK):
                        self.problems.setdefault(what, []).append(row)
                n_checked += len(rows)
                bar.update(len(rows))
                if time.monotonic() - started > seconds:
                    break
        return n_checked

    def contents(self, rows: Int[ndarray, " b"]) -> Iterator[bytes]:
        """Give the image files."""
        return (read_bytes(v) or b"" for v in self._files[rows.tolist()][self.column])

    def file_names(self, rows: list[int]) -> list[str | None]:
        """Give the names of the image files of some rows, without their folders."""
        return [path.name or None for path in self._paths(rows)]

    def folder_of(self, row: int) -> str:
        """Give the name of the folder in which the image file of a row lies; empty if unknown."""
        return self._paths([row])[0].parent.name

    def _paths(self, rows: list[int]) -> list[PurePosixPath]:
        values = self._files[rows][self.column] if rows else []
        paths = [(value or {}).get("path") or "" for value in values]
        return [PurePosixPath(path.split("::")[0].replace("\\", "/")) for path in paths]

    def load(self, rows: Int[ndarray, " b"], view: int | None = None) -> tuple[Batch, Problems]:
        """Decode a batch of images, or a view of each, and scale them for the model."""
        size = self.model.size
        pixels = np.zeros((len(rows), size, size, 3), dtype=np.uint8)
        is_read = np.zeros(len(rows), dtype=bool)
        texture = np.zeros((len(rows), 2), dtype=np.float32) if self.is_scored else None
        small: dict[int, Image.Image] = {}  # measured together; large ones are not held
        problems: Problems = {}
        for k, value in enumerate(self._files[rows.tolist()][self.column]):
            image, odd = decode_image(read_bytes(value))
            for what in odd:
                problems.setdefault(what, []).append(int(rows[k]))
            if image is None:
                continue
            is_read[k] = True
            picture = self.model.prepare(image)
            pixels[k] = picture if view is None else augment(picture, (view, int(rows[k])))
            if texture is not None and view is None:
                if image.width * image.height <= SMALL_PIXELS:
                    small[k] = image
                else:
                    texture[k] = measure_texture([image])
        if small and texture is not None:
            texture[list(small)] = measure_texture(list(small.values()))
        return (pixels, is_read, rows, texture), problems

    def embed(self, batch: Batch) -> Embedded:
        """Embed prepared pictures; those that could not be read become zeros."""
        pixels, is_read, rows, texture = batch
        features, logits, middle = self.model.look(pixels, with_middle=self.is_scored)
        if self.kind == "gradients" and logits is not None:
            errors = softmax(logits)
            classes = self.classes[rows]
            classes = np.where(classes >= 0, classes, logits.argmax(axis=1))
            errors[np.arange(len(rows)), classes] -= 1
            features = np.concatenate([errors, features], axis=1)
        features[~is_read] = 0
        return Embedded(features, middle, texture)


def _find_fault(value: Any) -> list[str]:
    return decode_image(read_bytes(value), is_check=True)[1]


def softmax(logits: Float[ndarray, "b c"]) -> Float[ndarray, "b c"]:
    """Give the probabilities of the classes."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def measure_texture(images: list[Image.Image]) -> Float[ndarray, "b 2"]:
    """Measure the texture level of RGB images at their own size; see `core.image_texture`.

    Returns:
        Level and number of patches of each image.
    """
    found = np.zeros((len(images), 2), dtype=np.float32)
    for width, height in {image.size for image in images}:
        members = [k for k, image in enumerate(images) if image.size == (width, height)]
        divisor = 1
        while (width // divisor) * (height // divisor) > MAX_PIXELS:
            divisor += 1
        n_together = max(1, MAX_PIXELS // (width * height))
        for start in range(0, len(members), n_together):
            part = members[start : start + n_together]
            chosen = [images[k].reduce(divisor) if divisor > 1 else images[k] for k in part]
            luma = np.stack([np.asarray(image) for image in chosen]) @ LUMA
            found[part] = np.stack(image_texture(luma), axis=1)
    return found


def augment(
    pixels: UInt8[ndarray, "size size 3"], seed: tuple[int, int]
) -> UInt8[ndarray, "size size 3"]:
    """Make the positive view of the diversity score: crop, flip, rotation and colour, seeded.

    A crop of 80 to 100 % of the area, a flip in half of the cases, a rotation of up to 10 degrees,
    brightness, contrast and saturation by a factor of 0.8 to 1.2. The paper names the kinds
    ("rotations, flips, and color adjustments") and no sizes. Stronger views make the score noisy:
    a few rows whose view is taken for another row then outweigh all others in Eq. 5.

    Args:
        pixels: A picture as the model takes it.
        seed: Of the dataset and of the row; the same seed gives the same view.
    """
    rng = np.random.default_rng([number % 2**64 for number in seed])
    size = len(pixels)
    side = max(1, round(size * np.sqrt(rng.uniform(0.8, 1.0))))
    left, top = (int(start) for start in rng.integers(0, size - side + 1, size=2))
    is_flipped = rng.random() < 0.5
    angle = rng.uniform(-10, 10)
    factors = rng.uniform(0.8, 1.2, size=3)
    around = tuple((pixels.reshape(-1, 3).sum(axis=0) // size**2).tolist())
    image = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR, fillcolor=around)
    image = image.resize((size, size), box=(left, top, left + side, top + side))
    if is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    brightness, contrast, saturation = factors.tolist()
    image = ImageEnhance.Brightness(image).enhance(brightness)
    # as ImageEnhance.Contrast, whose mean comes from a histogram summed in Python
    mean = int(np.asarray(image.convert("L")).sum() / size**2 + 0.5)
    image = Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, contrast)
    return np.asarray(ImageEnhance.Color(image).enhance(saturation))
