"""Rows with images and text: both halves embedded, or each row whole by one model."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter, Embedded, Part, Problems
from dq_multimodal.adapters.image import Batch, ImageAdapter
from dq_multimodal.adapters.text import TextAdapter
from dq_multimodal.config import TEXT_SHARE, InputError
from dq_multimodal.models.image_text import ImageTower, to_picture

LENGTHS = 2
"""Lengths that batches tell apart until the length doubles."""


class ImageTextAdapter(Adapter):
    r"""Embeddings of rows with images and text.

    An adapter for each half does the work. With a model for each, or with one whose images and
    texts are apart (CLIP, SigLIP), a row is embedded as the two unit vectors side by side, that of
    the image times $\sqrt{1 - s}$ and that of the text times $\sqrt{s}$, s the share of the text:
    the cosine of two rows is then the mean of their two cosines, with these weights. A model that
    reads images and text together (Qwen3-VL-Embedding) gives one vector. A half that is not there
    is zeros, or left out; no row is dropped.

    Args:
        dataset: The rows, or a stream of them.
        image: Reads the images.
        text: Reads the text. Where its model is that of the images, that model embeds both.
        text_share: Share s of the text in (0, 1); None is the default.
    """

    def __init__(
        self, dataset: Dataset, image: ImageAdapter, text: TextAdapter, text_share: float | None
    ) -> None:
        super().__init__(dataset, is_scored=text.is_scored)
        self.image, self.text, self._asked_share = image, text, text_share
        self.text_share = TEXT_SHARE if text_share is None else text_share
        for half in (image, text):
            half.problems, half.notes = self.problems, self.notes
        image.is_shared = True
        self._is_one = image.model_name == text.model
        if self._is_one:
            image.load_model = self._load_tower

    @cached_property
    def is_joint(self) -> bool:
        """Whether one model reads images and text together."""
        return self._is_one and self._load_tower().encoder.is_joint

    def _load_tower(self) -> ImageTower:
        """Load the one model of images and text."""
        advice = "name IMAGE_MODEL,TEXT_MODEL, or --modality image or text"
        try:
            encoder = self.text.encoder
        except InputError as error:
            raise InputError(f"{error}; of rows with images and text {advice}") from error
        if not encoder.reads_images:
            raise InputError(f"{self.text.model} reads no images beside text: {advice}")
        if encoder.is_joint and self._asked_share is not None:
            raise InputError(f"text_share is for two halves, and {self.text.model} joins them")
        if encoder.is_joint and self.is_scored:
            raise InputError(
                f"adq scores images and text apart, and {self.text.model} joins them: name "
                "IMAGE_MODEL,TEXT_MODEL, or use --method dq"
            )
        return ImageTower(encoder)

    def share_model(self, loaded: list[Adapter]) -> None:
        """Use the models of the adapter that is loaded, of the same settings, and be that one."""
        for other in loaded:
            assert isinstance(other, ImageTextAdapter)
            self.image.share_model([other.image])
            self.text.share_model([other.text])
        loaded[:] = [self]

    def describe(self) -> dict[str, Any]:
        """Say which columns are embedded and how."""
        found = {"modality": "image-text", "image_columns": self.image.columns}
        return {**self.text.describe(), **found}

    def describe_model(self) -> dict[str, Any]:
        """Say which models embed, and how."""
        if self.is_joint:
            return self.text.describe_model()
        try:
            image, text = self.image.describe_model(), self.text.describe_model()
        except InputError as error:
            hint = "" if self._is_one else " (two models are IMAGE_MODEL,TEXT_MODEL)"
            raise InputError(f"{error}{hint}") from error
        share, size = self.text_share, self.dimension
        return {"dimension": size, "text_share": share, "image": image, "text": text}

    def lengths(self) -> Int[ndarray, " n"]:
        """Give the characters of every row and one more, up to the next of a few lengths.

        Rows of one length stay in their order: those of a picture often lie side by side, and a
        batch embeds each of its pictures once.
        """
        sizes = np.log2(self.text.lengths() + 1) * LENGTHS
        return np.rint(2 ** (np.ceil(sizes) / LENGTHS)).astype(np.int64)

    @property
    def dimension(self) -> int:
        """Size d of an embedding."""
        return self.text.dimension + (0 if self.is_joint else self.image.dimension)

    @property
    def middle_dimension(self) -> int:
        """Size of the middle features of both halves."""
        return self.image.middle_dimension + self.text.middle_dimension

    @property
    def parts(self) -> list[Part]:
        """Both halves."""
        at, middle = self.image.dimension, self.image.middle_dimension
        return [
            Part(slice(at), slice(middle), slice(2)),
            Part(slice(at, None), slice(middle, None), slice(2, None)),
        ]

    def load(
        self, rows: Int[ndarray, " b"], view: int | None = None
    ) -> tuple[tuple[Batch, list[str]], Problems]:
        """Prepare images and texts of rows, or a view of each."""
        images, odd = self.image.load(rows, view)
        texts, more = self.text.load(rows, view)
        return (images, texts), odd | more

    def embed(self, batch: tuple[Batch, list[str]]) -> Embedded:
        """Embed what `load` made."""
        images, texts = batch
        if self.is_joint:
            return Embedded(self._embed_whole(images, texts))
        image, text = self.image.embed(images), self.text.embed(texts)
        is_empty = [not part.strip() for part in texts]
        for values in (text.embedding, text.middle):
            if values is not None:
                values[is_empty] = 0
        middle = texture = None
        if image.middle is not None and text.middle is not None:
            middle = np.concatenate([image.middle, text.middle], axis=1)
        if image.texture is not None and text.texture is not None:
            texture = np.concatenate([image.texture, text.texture], axis=1)
        whole = join_halves(image.embedding, text.embedding, self.text_share)
        return Embedded(whole, middle, texture)

    def _embed_whole(self, images: Batch, texts: list[str]) -> Float[ndarray, "b d"]:
        """Embed rows by a model that reads images and text together."""
        rows: list[dict[str, Any]] = [{} for _ in texts]
        pictures = [*map(to_picture, images[0])]
        for picture, at in images[1].tolist():
            rows[at].setdefault("image", []).append(pictures[picture])
        tokens = self.text.encoder.media_tokens
        for row, text in zip(rows, texts, strict=True):
            for token in tokens:
                text = text.replace(token, " ")
            row |= {"text": text} if text.strip() else {}
        found = np.zeros((len(rows), self.dimension), dtype=np.float32)
        there = [k for k, row in enumerate(rows) if row]
        if there:
            found[there] = self.text.encoder.encode_rows([rows[k] for k in there])
        return found

    def contents(self, rows: Int[ndarray, " b"]) -> Iterator[bytes]:
        """Give the text, white space apart, and the image files; empty if there is neither."""
        pairs = zip(self.text.contents(rows), self.image.contents(rows), strict=True)
        return (b"\0".join(pair) if any(pair) else b"" for pair in pairs)

    def surprisal(self, bins: Int[ndarray, " n"]) -> Float[ndarray, " m"]:
        """Give the mean surprisal of the tokens of each bin, in bits."""
        return self.text.surprisal(bins)


def join_halves(
    image: Float[ndarray, "n d"], text: Float[ndarray, "n k"], text_share: float
) -> Float[ndarray, "n m"]:
    r"""Put vectors of images and of texts side by side, so that cosines become a weighted mean.

    Args:
        image: A vector a row, of any norm; zeros where there is no image.
        text: The same of the text.
        text_share: Share s of the text in (0, 1).

    Returns:
        The unit vectors, those of images times $\sqrt{1 - s}$, those of texts times $\sqrt{s}$.
    """
    halves = ((image, 1 - text_share), (text, text_share))
    norms = [np.linalg.norm(half, axis=1, keepdims=True) for half, _ in halves]
    return np.concatenate(
        [
            half * (np.sqrt(share) / np.where(norm > 0, norm, 1)).astype(np.float32)
            for (half, share), norm in zip(halves, norms, strict=True)
        ],
        axis=1,
    )


def raise_threshold(threshold: float, text_share: float | None) -> float:
    """Give the cosine of rows of two halves that both halves have at least a threshold of.

    One half of share s can lower the cosine of two rows by s (1 - t) at most while its own is at
    least t. The share is None where rows are one vector.
    """
    if text_share is None:
        return threshold
    return 1 - min(text_share, 1 - text_share) * (1 - threshold)


def image_half(adapter: Adapter | None) -> ImageAdapter | None:
    """Give the adapter that reads the images of rows, if there is one."""
    adapter = adapter.image if isinstance(adapter, ImageTextAdapter) else adapter
    return adapter if isinstance(adapter, ImageAdapter) else None


def text_half(adapter: Adapter | None) -> TextAdapter | None:
    """Give the adapter that reads the text of rows, if there is one."""
    adapter = adapter.text if isinstance(adapter, ImageTextAdapter) else adapter
    return adapter if isinstance(adapter, TextAdapter) else None
