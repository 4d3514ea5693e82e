"""Images: any file that Pillow reads, embedded by pooled features or last-layer gradients."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from PIL import Image, ImageEnhance
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter, Embedded, Problems
from dq_multimodal.config import Dtype, Embedding, InputError
from dq_multimodal.core.texture import image_texture
from dq_multimodal.data.columns import find_label_column, match_classes, read_classes
from dq_multimodal.data.pixels import (
    BLANK,
    NO_IMAGE,
    decode_image,
    find_divisor,
    image_files,
    is_image,
    read_bytes,
    undecoded,
)
from dq_multimodal.models.image import load_image_model

SMALL_PIXELS = 2**16
CHECKED_ROWS = 256
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
"""ITU-R 601, of 8-bit values."""

MAX_PIXELS = 2**20
"""Larger images are halved, or divided by the next whole number, until they have no more."""

Batch = tuple[list[Any], Int[ndarray, "m 2"], Int[ndarray, " b"], Float[ndarray, "b 2"] | None]
"""Prepared pictures; pairs of a picture and the row that holds it, by their places; the row
numbers, and the texture of the rows."""


class ImageAdapter(Adapter):
    r"""Embeddings of the images of a dataset.

    `features` are the pooled penultimate features; of a row with several images their mean over
    those that can be read. `gradients` are those of the cross-entropy with respect to the weights
    of the last layer: the outer product of $p - onehot(y)$ and the features, y the label of the
    row, or the predicted class where it has none. Only the two factors are stored, side by side;
    `core.make_bins` multiplies their inner products.

    Args:
        columns: The columns of images, or of lists of them.
        label_column: The column of labels; None finds it, "none" stands for none.
        model: See `models.image.load_image_model`.
        kind: "features" or "gradients".
        is_scored: Whether texture and middle features are wanted too.
        device: Where the model runs; None is a GPU if there is one.
        dtype: Its numbers; auto is float32.

    Attributes:
        is_shared: Whether a file that several rows of a batch hold is embedded once.
    """

    is_shared = False

    def __init__(
        self,
        dataset: Dataset,
        columns: list[str],
        label_column: str | None,
        model: str,
        kind: Embedding = "features",
        *,
        is_scored: bool = False,
        device: str | None = None,
        dtype: Dtype = "auto",
    ) -> None:
        super().__init__(dataset, is_scored=is_scored)
        self.columns = columns
        self.has_lists = len(columns) > 1 or not is_image(dataset.features[columns[0]])
        if self.has_lists and kind == "gradients":
            raise InputError(f"gradients are for one image a row, got lists in {columns[0]}")
        self.label_column = find_label_column(dataset, label_column)
        self.model_name, self.kind = model, kind
        self.load_model: Callable[[], Any] = partial(load_image_model, model, device, dtype)
        self._files = undecoded(dataset, *columns)
        self._labels = dataset.select_columns([self.label_column]) if self.label_column else None

    @cached_property
    def model(self) -> Any:
        """The model that embeds: an `ImageModel` or another that is used as one."""
        model = self.load_model()
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
        return {"modality": "image", "shape": "images", "columns": self.columns}

    def describe_model(self) -> dict[str, Any]:
        """Say which model embeds, and how."""
        found: dict[str, Any] = {**self.model.describe(), "dimension": self.dimension}
        found["kind"] = self.kind
        if self.kind == "gradients":
            self.classes  # noqa: B018 - says now if the labels do not fit
            found["factors"] = [self.model.n_classes, self.model.dimension()]
        return found

    def lengths(self) -> Int[ndarray, " n"]:
        """Every row costs the same."""
        return np.ones(len(self._files), dtype=np.int64)

    def files(self, rows: Int[ndarray, " b"] | list[int]) -> list[list[Any]]:
        """Give the image files of rows, undecoded."""
        places = [int(row) for row in rows]
        return image_files(self._files[places], self.columns) if places else []

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
                found = pool.map(_find_faults, self.files(rows))
                for row, odd in zip(rows.tolist(), found, strict=True):
                    for what in odd & set(BLANK):
                        self.problems.setdefault(what, []).append(row)
                n_checked += len(rows)
                bar.update(len(rows))
                if time.monotonic() - started > seconds:
                    break
        return n_checked

    def contents(self, rows: Int[ndarray, " b"]) -> Iterator[bytes]:
        """Give the image files, one after the other."""
        return (b"".join(read_bytes(file) or b"" for file in part) for part in self.files(rows))

    def file_names(self, rows: list[int]) -> list[str | None]:
        """Give the names of the image files of some rows, without their folders."""
        return [path.name or None for path in self._paths(rows)]

    def folder_of(self, row: int) -> str:
        """Give the name of the folder in which the image file of a row lies; empty if unknown."""
        return self._paths([row])[0].parent.name

    def _paths(self, rows: list[int]) -> list[PurePosixPath]:
        firsts = (part[0] if part else {} for part in self.files(rows))
        paths = [file.get("path") or "" for file in firsts]
        return [PurePosixPath(path.split("::")[0].replace("\\", "/")) for path in paths]

    def load(self, rows: Int[ndarray, " b"], view: int | None = None) -> tuple[Batch, Problems]:
        """Decode the images of a batch, or a view of each, and prepare them for the model."""
        pictures: list[Any] = []
        pairs: list[tuple[int, int]] = []
        known: dict[bytes | None, tuple[int, list[str]]] = {}
        large: dict[int, Float[ndarray, "1 2"]] = {}
        small: dict[int, Image.Image] = {}  # measured together; large ones are not held
        problems: Problems = {}
        for k, files in enumerate(self.files(rows)):
            row, odd = int(rows[k]), set() if files else {NO_IMAGE}
            for number, file in enumerate(files):
                data, at = read_bytes(file), len(pictures)
                if data in known:
                    at, found = known[data]
                    odd |= set(found)
                    pairs += [(at, k)] if at >= 0 else []
                    continue
                image, found = decode_image(data)
                odd |= set(found)
                if self.is_shared and view is None:  # else files are not held
                    known[data] = at if image is not None else -1, found
                if image is None:
                    continue
                picture = self.model.prepare(image)
                if view is not None:
                    picture = augment(picture, (view, row, *([number] if number else [])))
                elif self.is_scored and image.width * image.height <= SMALL_PIXELS:
                    small[at] = image
                elif self.is_scored:
                    large[at] = measure_texture([image])
                pictures.append(picture)
                pairs.append((at, k))
            for what in odd:
                problems.setdefault(what, []).append(row)
        places, texture = np.array(pairs, dtype=np.int64).reshape(-1, 2), None
        if self.is_scored:
            levels = np.zeros((len(pictures), 2), dtype=np.float32)
            for at, measured in large.items():
                levels[at] = measured
            if small:
                levels[list(small)] = measure_texture(list(small.values()))
            shown, owner = places.T
            texture = pool_texture(levels[shown], owner, len(rows))
        return (pictures, places, rows, texture), problems

    def embed(self, batch: Batch) -> Embedded:
        """Embed prepared pictures; rows without one that could be read become zeros."""
        pictures, places, rows, texture = batch
        if not pictures:
            middle = np.zeros((len(rows), self.middle_dimension * self.is_scored), dtype=np.float32)
            nothing = np.zeros((len(rows), self.dimension), dtype=np.float32)
            return Embedded(nothing, middle if self.is_scored else None, texture)
        shown, place = places.T
        features, logits, middle = self.model.look(pictures, with_middle=self.is_scored)
        features = features[shown]
        if self.kind == "gradients" and logits is not None:
            logits = logits[shown]
            errors = softmax(logits)
            classes = self.classes[rows[place]]
            classes = np.where(classes >= 0, classes, logits.argmax(axis=1))
            errors[np.arange(len(place)), classes] -= 1
            features = np.concatenate([errors, features], axis=1)
        pooled = None if middle is None else pool_rows(middle[shown], place, len(rows))
        return Embedded(pool_rows(features, place, len(rows)), pooled, texture)


def _find_faults(files: list[Any]) -> set[str]:
    if not files:
        return {NO_IMAGE}
    return {what for file in files for what in decode_image(read_bytes(file), is_check=True)[1]}


def pool_rows(
    values: Float[ndarray, "m k"], place: Int[ndarray, " m"], n_rows: int
) -> Float[ndarray, "n k"]:
    """Give each row the mean of its pictures, zeros where it has none."""
    sums = np.zeros((n_rows, values.shape[1]), dtype=np.float32)
    np.add.at(sums, place, values)
    return sums / np.maximum(np.bincount(place, minlength=n_rows), 1)[:, None].astype(np.float32)


def pool_texture(
    found: Float[ndarray, "m 2"], place: Int[ndarray, " m"], n_rows: int
) -> Float[ndarray, "n 2"]:
    """Give each row the mean level of the patches of its pictures, and their number."""
    levels, counts = found.astype(np.float64).T
    totals = np.bincount(place, counts, minlength=n_rows)
    sums = np.bincount(place, levels * counts, minlength=n_rows)
    return np.stack([sums / np.maximum(totals, 1), totals], axis=1).astype(np.float32)


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
        divisor = find_divisor(images[members[0]], MAX_PIXELS)
        n_together = max(1, MAX_PIXELS // (width * height))
        for start in range(0, len(members), n_together):
            part = members[start : start + n_together]
            chosen = [images[k].reduce(divisor) if divisor > 1 else images[k] for k in part]
            luma = np.stack([np.asarray(image) for image in chosen]) @ LUMA
            found[part] = np.stack(image_texture(luma), axis=1)
    return found


def augment(pixels: UInt8[ndarray, "h w 3"], seed: tuple[int, ...]) -> UInt8[ndarray, "h w 3"]:
    """Make the positive view of the diversity score: crop, flip, rotation and colour, seeded.

    A crop of 80 to 100 % of the area, a flip in half of the cases, a rotation of up to 10 degrees,
    brightness, contrast and saturation by a factor of 0.8 to 1.2. The paper names the kinds
    ("rotations, flips, and color adjustments") and no sizes. Stronger views make the score noisy:
    a few rows whose view is taken for another row then outweigh all others in Eq. 5.

    Args:
        pixels: A picture as the model takes it.
        seed: Of the dataset and of the picture; the same seed gives the same view.
    """
    rng = np.random.default_rng([number % 2**64 for number in seed])
    height, width, _ = pixels.shape
    factor = np.sqrt(rng.uniform(0.8, 1.0))
    across, down = (max(1, round(side * factor)) for side in (width, height))
    left, top = (int(rng.integers(0, rest + 1)) for rest in (width - across, height - down))
    is_flipped = rng.random() < 0.5
    angle = rng.uniform(-10, 10)
    factors = rng.uniform(0.8, 1.2, size=3)
    n_pixels = width * height
    around = tuple((pixels.reshape(-1, 3).sum(axis=0) // n_pixels).tolist())
    image = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR, fillcolor=around)
    image = image.resize((width, height), box=(left, top, left + across, top + down))
    if is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    brightness, contrast, saturation = factors.tolist()
    image = ImageEnhance.Brightness(image).enhance(brightness)
    # as ImageEnhance.Contrast, whose mean comes from a histogram summed in Python
    mean = int(np.asarray(image.convert("L")).sum() / n_pixels + 0.5)
    image = Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, contrast)
    return np.asarray(ImageEnhance.Color(image).enhance(saturation))
