"""Which kind of data a dataset is, and so which adapter reads it."""

from typing import Any

from datasets import Dataset

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.adapters.image_text import ImageTextAdapter, image_half
from dq_multimodal.adapters.text import (
    TextAdapter,
    TextLayout,
    detect_layout,
    holds_turns,
    may_say,
)
from dq_multimodal.config import (
    DEFAULT_IMAGE_MODEL,
    DEFAULT_TEXT_MODEL,
    CompressConfig,
    InputError,
    NamedModality,
    split_models,
)
from dq_multimodal.data.columns import NO_LABEL, find_image_column
from dq_multimodal.data.pixels import image_columns, unread_columns
from dq_multimodal.data.row_files import TEXT_KINDS, is_file_struct


def choose_adapter(dataset: Dataset, request: CompressConfig) -> Adapter | None:
    """Choose by the features of the dataset: rows have images, text, or both.

    InputError if what has to be embedded, or was named, is not there; None where nothing has to be
    and neither was found.
    """
    adapter = _choose(dataset, request)
    if adapter is not None and (names := unread_columns(dataset)):
        adapter.notes.append(f"images are not read where they lie in {', '.join(names)}")
    return adapter


def _choose(dataset: Dataset, request: CompressConfig) -> Adapter | None:
    modality = find_modality(dataset, request)
    check_modality(modality, request)
    image_model, text_model = name_models(request.embedding_model, modality)
    options: dict[str, Any] = {"device": request.device, "dtype": request.dtype}
    options["is_scored"] = request.method == "adq"
    is_needed = request.needs_embeddings and request.ready_embeddings is None
    image = None
    if modality != "text":
        columns = image_columns(dataset) if modality == "image-text" else []
        if request.image_column is not None or not columns:
            columns = [find_image_column(dataset, request.image_column)]
        how = (request.label_column, image_model, request.image_embedding)
        image = ImageAdapter(dataset, columns, *how, **options)
        if modality == "image":
            return image
    try:
        layout = find_text(dataset, request) if image_columns(dataset) else None
        layout = layout or detect_layout(dataset.column_names, request.text_columns)
        text = TextAdapter(dataset, layout, text_model, has_images=image is not None, **options)
    except InputError:
        if is_needed or request.text_columns is not None or request.modality != "auto":
            raise
        return image
    if image is None:
        return text
    adapter = ImageTextAdapter(dataset, image, text, request.text_share)
    if is_needed:
        adapter.notes.append(
            f"rows are chosen by the images in {', '.join(image.columns)} and the text in "
            f"{', '.join(layout.columns)} (--modality image or text chooses by one of them alone)"
        )
    return adapter


def check_modality(modality: str, request: CompressConfig) -> None:
    """Raise if something is asked that such rows do not have."""
    read = f"this dataset is read as {modality}"
    if modality == "image":
        if request.text_columns is not None:
            raise InputError("text_columns are for text, and this dataset is read as images")
        if request.method == "adq" and request.representativeness == "surprisal":
            raise InputError("representativeness surprisal is for text: images have texture")
    elif request.image_embedding == "gradients":
        raise InputError(f"embedding gradients is for images, and {read}")
    if modality == "text" and request.drop_ratio:
        raise InputError("drop_ratio is for images, and this dataset is read as text")
    if modality != "image-text" and request.text_share is not None:
        raise InputError(f"text_share is for images with text, and {read}")


def name_models(asked: str | None, modality: str) -> tuple[str, str]:
    """Give the model of the images and that of the text.

    InputError if there are two for rows of one kind, or more.
    """
    models = split_models(asked)
    if len(models) > (2 if modality == "image-text" else 1) or not all(models):
        wanted = "one model or IMAGE_MODEL,TEXT_MODEL" if modality == "image-text" else "one model"
        raise InputError(f"embedding_model must be {wanted} for {modality} rows, got {asked}")
    if not models:
        return DEFAULT_IMAGE_MODEL, DEFAULT_TEXT_MODEL
    return models[0], models[-1]


def find_modality(dataset: Dataset, request: CompressConfig) -> NamedModality:
    """Say what the rows are to be read as."""
    if request.modality != "auto":
        return request.modality
    if request.image_column is None and not image_columns(dataset):
        return "text"
    is_image = request.image_embedding == "gradients" or find_text(dataset, request) is None
    return "image" if is_image else "image-text"


def find_text(dataset: Dataset, request: CompressConfig) -> TextLayout | None:
    """Find the text beside images: a known shape, or all columns of text with no other name."""
    if request.text_columns is not None:
        return detect_layout(dataset.column_names, request.text_columns)
    texts = [name for name, kind in dataset.features.items() if _is_text(kind)]
    try:
        return detect_layout(texts)
    except InputError:
        pass
    named = [name for name in texts if name != request.label_column and may_say(name)]
    return TextLayout("columns", tuple(named)) if named else None


def label_column_of(adapter: Adapter | None, request: CompressConfig) -> str | None:
    """Give the column of strata: that of the images, or the one that was named."""
    image = image_half(adapter)
    if image is not None:
        return image.label_column
    return None if request.label_column == NO_LABEL else request.label_column


def _is_text(kind: Any) -> bool:
    """Say whether a column holds texts, chat turns, translations, or lists or structs of them."""
    if hasattr(kind, "feature"):
        return _is_text(kind.feature)
    if isinstance(kind, dict) and not is_file_struct(kind):
        return holds_turns(kind) or any(_is_text(kind[name]) for name in kind if may_say(name))
    is_translation = type(kind).__name__.startswith("Translation")
    return is_translation or holds_turns(kind) or getattr(kind, "dtype", "") in TEXT_KINDS
