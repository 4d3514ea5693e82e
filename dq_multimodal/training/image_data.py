"""Flags that name an image dataset, and its rows as pictures and classes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.data.columns import find_image_column, find_label_column, read_classes
from dq_multimodal.data.pixels import decode_image, read_bytes, undecoded
from dq_multimodal.models.classifiers import SMALL_SIDE
from dq_multimodal.patches.store import find_patch_columns
from dq_multimodal.training.arguments import SOURCE, flags_of
from dq_multimodal.training.pictures import Pictures, read_files, read_records

if TYPE_CHECKING:
    from datasets import Dataset

    from dq_multimodal.data.source import Source

PROBED_ROWS = 64


ImageFlags: Any = flags_of(*SOURCE, "image_column", "label_column", dataset="uoft-cs/cifar10")


@dataclass
class ImageDataArguments(ImageFlags):
    """Which images."""

    image_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels. Default: that of the images up to 96, else 224."},
    )

    def load(self) -> "Source":
        """Load the rows."""
        from dq_multimodal.data.source import load_source

        return load_source(
            self.dataset_name,
            split=self.dataset_split,
            config_name=self.dataset_config_name,
            revision=self.dataset_revision,
        )

    def find_size(self, dataset: "Dataset") -> int:
        """Give the side asked for, or that of small images, or 224."""
        if self.image_size is not None:
            return self.image_size
        column = find_image_column(dataset, self.image_column)
        files = undecoded(dataset.select(range(min(PROBED_ROWS, len(dataset)))), column)
        images = [decode_image(read_bytes(value))[0] for value in files[column]]
        sides = [max(image.size) for image in images if image is not None]
        if not sides:
            raise InputError(f"none of the first {len(files)} images can be read")
        return max(sides) if max(sides) <= SMALL_SIDE else 224

    def pictures(
        self,
        dataset: "Dataset",
        size: int,
        rows: Int[ndarray, " k"] | None = None,
        *,
        name: str = "decode",
        fill: str | None = "mean",
        mae_model: str | None = None,
    ) -> tuple[Pictures, tuple[str, ...]]:
        """Give rows (all, when None) as pictures with classes, and the names of the classes.

        Images of the patch store come back with their holes filled.
        """
        classes, labels = read_classes(dataset, find_label_column(dataset, self.label_column))
        if rows is not None:
            dataset, classes = dataset.select(rows), classes[rows]
        stored = find_patch_columns(dataset.features)
        if stored:
            read = read_records(dataset, self.image_column or stored[0], fill, mae_model)
        else:
            read = read_files(dataset, find_image_column(dataset, self.image_column))
        return Pictures(read, classes, size, name=name), labels
