"""Encoders that read images, from sentence-transformers: the images alone, or rows as a whole."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from dq_multimodal.data.pixels import find_divisor
from dq_multimodal.models.image import find_middle, pool_places
from dq_multimodal.models.text import Encoder

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS, MAX_ASPECT = 2**20, 100
"""Larger pictures are made smaller first; of longer ones, which some models refuse, the middle
counts."""


class ImageTower:
    """The images of an encoder that reads images and text apart, used as an `ImageModel` is."""

    n_classes, labels = 0, ()

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.name = encoder, encoder.name

    def describe(self) -> dict[str, Any]:
        """Give what config.yaml records of the model."""
        found = self.encoder.describe()
        return {name: found[name] for name in ("model", "revision", "dtype")}

    def prepare(self, image: "Image") -> UInt8[ndarray, "h w 3"]:
        """Make one RGB picture no larger than 2^20 pixels; the model's processor does the rest."""
        return shrink(image)

    def dimension(self) -> int:
        """Size d of the features."""
        return self.encoder.dimension

    def look(
        self, pictures: Sequence[UInt8[ndarray, "h w 3"]], *, with_middle: bool = False
    ) -> tuple[Float[ndarray, "b d"], None, Float[ndarray, "b k"] | None]:
        """Give the embeddings of pictures, no logits, and pooled middle features if asked for.

        These have no columns where the model is of no known build.
        """
        rows = [{"image": to_picture(pixels)} for pixels in pictures]
        layer = find_middle(self.encoder.image_net) if with_middle else None
        if layer is None:
            found = self.encoder.encode_rows(rows)
            return found, None, found[:, :0] if with_middle else None
        import torch

        seen: list[Any] = []

        def note(_: Any, __: Any, found: dict[str, Any]) -> dict[str, Any]:
            return {**found, "middle": pool_places(seen.pop())}

        with ExitStack() as stack:
            hook = layer.register_forward_hook(lambda *x: seen.append(x[2]))
            stack.callback(hook.remove)
            stack.callback(self.encoder.model[0].register_forward_hook(note).remove)
            made = self.encoder.encode_rows(rows, output_value=None)
        names = ("sentence_embedding", "middle")
        columns = [torch.stack([row[name] for row in made]).float().cpu() for name in names]
        return columns[0].numpy(), None, columns[1].numpy()

    @cached_property
    def middle_dimension(self) -> int:
        """Size k of the middle features, found by looking at one grey picture."""
        grey = np.full((32, 32, 3), 127, dtype=np.uint8)
        middle = self.look([grey], with_middle=True)[2]
        return 0 if middle is None else middle.shape[1]


def shrink(image: "Image") -> UInt8[ndarray, "h w 3"]:
    """Cut a thin RGB picture to its middle, and divide it to at most 2^20 pixels."""
    width, height = image.size
    across, down = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - across) // 2, (height - down) // 2
    image = image.crop((left, top, left + across, top + down))
    divisor = find_divisor(image, MAX_PIXELS)
    return np.asarray(image.reduce(divisor) if divisor > 1 else image)


def to_picture(pixels: UInt8[ndarray, "h w 3"]) -> "Image":
    """Give Pillow's image of pixels."""
    from PIL import Image

    return Image.fromarray(pixels)
