"""The real set that a synthetic one is to stand for: all its pictures, on one device."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dq_multimodal.condensation.config import SMALLEST_SIDE, CondenseConfig
from dq_multimodal.config import InputError
from dq_multimodal.data.columns import find_label_column, read_labels
from dq_multimodal.data.pixels import (
    ANIMATED,
    DEEP,
    OTHER_COLOURS,
    SEVERAL,
    TRANSPARENT,
    image_columns,
)
from dq_multimodal.data.source import Source
from dq_multimodal.files import count, name_some
from dq_multimodal.models.classifiers import SMALL_SIDE
from dq_multimodal.patches.store import find_patch_columns
from dq_multimodal.training.pictures import ImageDataArguments, Remarks

if TYPE_CHECKING:
    from datasets import Dataset

USUAL_SIDE = 64
"""Side of the synthetic pictures where the real ones are large."""
BLOCK_ROWS = 1024
LOSSY = (ANIMATED, SEVERAL, TRANSPARENT, DEEP, OTHER_COLOURS)
"""Of what is in such files the 8-bit squares do not have all."""


@dataclass(frozen=True)
class Real:
    """The real pictures.

    Attributes:
        images: (n, c, h, w); c is 1 where all pictures are grey, else 3.
        classes: 0 ... C - 1, of the classes that have pictures.
        labels: What the source has as the label of each class.
        names: The names of the classes.
        rows: Number of each picture's row in the source.
        mean: Mean of the pixels in [0, 1], (c, 1, 1).
        spread: Their standard deviation.
        unused: Rows without a class or a picture that can be read.
        empty: Names of the classes that have no pictures.
        reduced: Numbers of the rows of whose files not all was read, by what that is (`LOSSY`).
    """

    images: UInt8[Tensor, "n c h w"]
    classes: Int[Tensor, " n"]
    labels: tuple[Any, ...]
    names: tuple[str, ...]
    rows: Int[np.ndarray, " n"]
    mean: Float[Tensor, "c 1 1"]
    spread: Float[Tensor, "c 1 1"]
    unused: tuple[int, ...] = ()
    empty: tuple[str, ...] = ()
    reduced: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        of = [torch.nonzero(self.classes == k).flatten() for k in range(self.n_classes)]
        object.__setattr__(self, "_of", of)

    @property
    def n_classes(self) -> int:
        """Number of classes that have pictures."""
        return len(self.labels)

    @property
    def side(self) -> int:
        """Side of the square pictures in pixels."""
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        """1 for grey pictures, else 3."""
        return self.images.shape[1]

    def to(self, device: torch.device | str) -> "Real":
        """Give the same pictures on a device."""
        tensors = ("images", "classes", "mean", "spread")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def of_class(self, k: int) -> Int[Tensor, " m"]:
        """Give the places of the pictures of a class."""
        return self._of[k]  # type: ignore[attr-defined]

    def normalise(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Bring pixels of 0 ... 255 to mean 0 and deviation 1."""
        return (images.float() / 255 - self.mean) / self.spread

    def to_pixels(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Bring normalised images back to pixels; those of real images lie in [0, 1]."""
        return images * self.spread + self.mean

    def draw(self, k: int, n: int) -> Float[Tensor, "m c h w"]:
        """Draw n different pictures of a class, or all if they are fewer, normalised."""
        places = self.of_class(k)
        drawn = torch.randperm(len(places))[:n].to(places.device)
        return self.normalise(self.images[places[drawn]])

    def draw_any(self, n: int) -> tuple[Float[Tensor, "m c h w"], Int[Tensor, " m"]]:
        """Draw n different pictures of any class, or all if they are fewer, and their classes."""
        drawn = torch.randperm(len(self.images))[:n].to(self.classes.device)
        return self.normalise(self.images[drawn]), self.classes[drawn]


def _images_of(config: CondenseConfig) -> ImageDataArguments:
    return ImageDataArguments(
        config.dataset,
        image_column=config.image_column,
        label_column=config.label_column,
        image_size=config.image_size,
    )


def find_columns(source: Source, config: CondenseConfig) -> tuple[str, str]:
    """Find the column of pictures and that of classes.

    Raises:
        InputError: If there are none, or several that could be meant.
    """
    dataset, name = source.dataset, source.origin["name"]
    if not image_columns(dataset) and not find_patch_columns(dataset.features):
        raise InputError(
            f"condense makes pictures, and {name} has none: its columns are "
            f"{', '.join(dataset.column_names)}; text is made smaller by compress"
        )
    label = find_label_column(dataset, config.label_column)
    if label is None:
        raise InputError(f"condense needs classes, and {name} has none: name --label-column")
    return _images_of(config).find_column(dataset), label


def read_real(source: Source, config: CondenseConfig) -> Real:
    """Decode all pictures of a dataset to squares, on the CPU.

    Raises:
        InputError: If the dataset has no images or no classes; if fewer than two classes have any.
    """
    dataset: Dataset = source.dataset
    name = source.origin["name"]
    _, column = find_columns(source, config)
    data = _images_of(config)
    side = data.find_size(dataset)
    if config.image_size is None and side > SMALL_SIDE:
        side = USUAL_SIDE
    if side < SMALLEST_SIDE:
        raise InputError(f"the pictures of {name} have {side} px: give --image-size of at least 8")
    remarks: Remarks = {}
    pictures, names = data.pictures(dataset, side, name="decode", remarks=remarks)
    starts = range(0, len(pictures.rows), BLOCK_ROWS)
    blocks = [pictures.rows[start : start + BLOCK_ROWS].tolist() for start in starts]
    read = zip(*map(pictures.__getitems__, blocks), strict=True)  # without what is unreadable
    pixels, rows = (np.concatenate(parts) for parts in read)
    present, classes = np.unique(pictures.classes[rows], return_inverse=True)
    if len(present) < 2:
        raise InputError(f"condense needs two classes, and {name} has pictures of {len(present)}")
    if (pixels[..., :1] == pixels).all():
        pixels = pixels[..., :1]
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    mean, spread = _measure(images)
    _, values = read_labels(dataset, column)
    named = getattr(dataset.features[column], "names", None) is not None
    unused = np.setdiff1d(np.arange(len(dataset)), rows)
    return Real(
        images=images,
        classes=torch.from_numpy(classes),
        labels=tuple(int(k) if named else values[k] for k in present),
        names=tuple(names[k] for k in present),
        rows=rows,
        mean=mean,
        spread=spread,
        unused=tuple(unused.tolist()),
        empty=tuple(names[k] for k in np.setdiff1d(np.arange(len(names)), present)),
        reduced={what: sorted(remarks[what]) for what in LOSSY if what in remarks},
    )


def _measure(images: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and deviation of each channel over all pixels, in [0, 1]."""
    values = torch.arange(256, dtype=torch.float64) / 255
    found = []
    for channel in images.transpose(0, 1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = share @ values
        found.append((mean, (share @ (values - mean) ** 2).sqrt().clamp(min=1 / 255)))
    mean, spread = (torch.stack(each).float().view(-1, 1, 1) for each in zip(*found, strict=True))
    return mean, spread


def check_sizes(real: Real, per_class: int) -> None:
    """Raise unless every class has as many real pictures as are to be made of it."""
    sizes = [len(real.of_class(k)) for k in range(real.n_classes)]
    small = [f"{real.names[k]} ({size:,})" for k, size in enumerate(sizes) if size < per_class]
    if small:
        raise InputError(
            f"{count(per_class, 'image')} of each class were asked for, and these classes have "
            f"fewer real ones: {name_some(small)}"
        )
