"""Which kind of data a dataset is, and so which adapter reads it."""

import re
from typing import Any

from datasets import Dataset

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.adapters.text import TextAdapter, detect_layout, holds_turns
from dq_multimodal.config import (
    DEFAULT_IMAGE_MODEL,
    DEFAULT_TEXT_MODEL,
    CompressConfig,
    InputError,
)
from dq_multimodal.data.columns import NO_LABEL
from dq_multimodal.data.pixels import image_columns

NAME_PARTS = {
    *("id", "ids", "uid", "uuid", "key", "index", "file", "filename", "path", "filepath", "name"),
    *("url", "uri", "link", "source", "split", "hash", "sha", "md", "license", "licence"),
    *("dataset", "date", "time", "timestamp", "created"),
    *("label", "labels", "class", "category", "type"),
}
"""Words in the names of columns whose text names a row or its kind, and says nothing of it."""


def choose_adapter(dataset: Dataset, request: CompressConfig) -> Adapter | None:
    """Choose by the features of the dataset: images where it has a column of them, else text.

    InputError if what has to be embedded, or was named, is not there; None where nothing has to be
    and neither was found.
    """
    if is_image(dataset, request):
        if request.text_columns is not None:
            raise InputError("text_columns are for text, and this dataset is read as images")
        if request.method == "adq" and request.representativeness == "surprisal":
            raise InputError("representativeness surprisal is for text: images have texture")
        adapter = ImageAdapter(
            dataset,
            request.image_column,
            request.label_column,
            request.embedding_model or DEFAULT_IMAGE_MODEL,
            request.image_embedding,
            is_scored=request.method == "adq",
            device=request.device,
            dtype=request.dtype,
        )
        if request.needs_embeddings and request.ready_embeddings is None:
            adapter.notes += note_text(dataset, adapter)
        return adapter
    if request.drop_ratio:
        raise InputError("drop_ratio is for images, and this dataset is read as text")
    if request.image_embedding == "gradients":
        raise InputError("embedding gradients is for images, and this dataset is read as text")
    needs_text = request.needs_embeddings and request.ready_embeddings is None
    try:
        layout = detect_layout(dataset.column_names, request.text_columns)
        model = request.embedding_model or DEFAULT_TEXT_MODEL
        where: dict[str, Any] = {"device": request.device, "dtype": request.dtype}
        return TextAdapter(dataset, layout, model, is_scored=request.method == "adq", **where)
    except InputError:
        if needs_text or request.text_columns is not None or request.modality == "text":
            raise
        return None


def is_image(dataset: Dataset, request: CompressConfig) -> bool:
    """Say whether the rows are to be read as images."""
    if request.modality != "auto":
        return request.modality == "image"
    if request.image_column is not None:
        return True
    return request.text_columns is None and bool(image_columns(dataset))


def label_column_of(adapter: Adapter | None, request: CompressConfig) -> str | None:
    """Give the column of strata: that of the images, or the one that was named."""
    if isinstance(adapter, ImageAdapter):
        return adapter.label_column
    return None if request.label_column == NO_LABEL else request.label_column


def note_text(dataset: Dataset, adapter: ImageAdapter) -> list[str]:
    """Say which text beside the images does not count, if there is any."""
    names = [
        name
        for name, kind in dataset.features.items()
        if name != adapter.label_column
        and not NAME_PARTS & set(re.split(r"[^a-z]+", name.lower()))
        and _is_text(kind)
    ]
    if not names:
        return []
    instead = "--modality text"
    try:
        detect_layout(dataset.column_names)
    except InputError:
        instead += f" --text-columns {','.join(names)}"
    return [
        f"rows are chosen by the image in {adapter.column} alone: the text in {', '.join(names)} "
        f"does not count ({instead} chooses by the text alone)"
    ]


def _is_text(kind: Any) -> bool:
    """Say whether a column holds texts, lists of them, or chat turns."""
    if hasattr(kind, "feature"):
        return _is_text(kind.feature)
    return holds_turns(kind) or getattr(kind, "dtype", "") in ("string", "large_string")
