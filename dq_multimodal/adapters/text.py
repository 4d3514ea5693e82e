"""Instruction data: which columns hold the text, and its sentence embeddings."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Problems
from dq_multimodal.adapters.encoder import load_encoder
from dq_multimodal.config import InputError

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK_ROWS = 4096

Shape = Literal["alpaca", "prompt_completion", "messages", "conversations", "text", "columns"]

KNOWN_SHAPES: dict[Shape, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # shape: (columns in template order, those of them that may be missing)
    "messages": (("messages",), ()),
    "conversations": (("system", "conversations"), ("system",)),
    "alpaca": (("instruction", "input", "output"), ("input",)),
    "prompt_completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
}
TURN_TEXT = {"content", "value"}
"""Keys of a chat turn that hold its text: `messages` say content, ShareGPT says value."""


@dataclass(frozen=True)
class TextLayout:
    """Which columns are read, and how a row becomes one string.

    The string of a row is its texts in column order, joined by single spaces, empty ones left
    out. A column of chat turns gives the text of every turn; roles are not part of it.

    Attributes:
        shape: The known shape, or "columns" when the user named them.
        columns: Columns in the order of the template.
        optional: Those that are often empty, and so are not reported when they are.
    """

    shape: Shape
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        """The exact template, as config.yaml records it."""
        parts = []
        for column in self.columns:
            is_chat = self.shape in ("messages", "conversations") and column == self.shape
            key = "content" if self.shape == "messages" else "value"
            parts.append(f"{{{column}[*].{key}}}" if is_chat else f"{{{column}}}")
        return " ".join(parts)


def detect_layout(columns: list[str], text_columns: tuple[str, ...] | None = None) -> TextLayout:
    """Find out which columns hold the text.

    Args:
        columns: All columns of the dataset.
        text_columns: The user's choice, in template order; None looks for a known shape: chat
            `messages`, ShareGPT `conversations`, Alpaca (instruction, input, output),
            prompt/completion, then `text`.

    Raises:
        InputError: If a named column does not exist or no known shape fits.
    """
    if text_columns is not None:
        missing = [c for c in text_columns if c not in columns]
        if missing:
            raise InputError(
                f"no column {', '.join(missing)}: the dataset has {', '.join(columns)}"
            )
        return TextLayout("columns", text_columns)
    for shape, (wanted, optional) in KNOWN_SHAPES.items():
        if all(c in columns for c in wanted if c not in optional):
            present = tuple(c for c in wanted if c in columns)
            return TextLayout(shape, present, tuple(c for c in optional if c in present))
    raise InputError(
        "found none of messages, conversations, instruction + output, prompt + completion or text "
        f"among the columns {', '.join(columns)}: name the text with --text-columns a,b"
    )


def field_texts(value: Any) -> list[str]:
    """Give the texts in one field: a string, a list of chat turns or of parts, or a number.

    None, blank strings and empty lists give none. Numbers and booleans give what `str` makes of
    them. Of a chat turn, the content counts; of content in parts, the parts of type text; of any
    other mapping, all values.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        keys = set(TURN_TEXT & value.keys() or {"text"} & value.keys())
        if not keys and "type" not in value:  # a plain mapping, not a part such as an image
            keys = set(value)
        return [text for key in value if key in keys for text in field_texts(value[key])]
    if isinstance(value, list | tuple):
        return [text for part in value for text in field_texts(part)]
    return [str(value)]


def check_features(dataset: "Dataset", layout: TextLayout) -> None:
    """Raise if a column that is to be read as text holds pictures, sound or the like."""
    for column in layout.columns:
        kind = type(dataset.features[column]).__name__
        if kind in ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh"):
            raise InputError(f"column {column} holds {kind}, not text: name others")


def is_text(value: Any) -> bool:
    """Say whether a field has a type in which text is expected."""
    return value is None or isinstance(value, str | list | tuple | dict)


class TextAdapter:
    """Sentence embeddings of the rows of an instruction dataset."""

    def __init__(self, dataset: "Dataset", layout: TextLayout, model: str) -> None:
        self.layout = layout
        self.model = model
        self.notes: list[str] = []
        self.problems: Problems = {}
        check_features(dataset, layout)
        self._columns = dataset.select_columns(list(layout.columns))
        self._lengths: Int[ndarray, " n"] | None = None

    @cached_property
    def _encoder(self) -> Any:
        encoder = load_encoder(self.model)
        if encoder.note:
            self.notes.append(encoder.note)
        return encoder

    @property
    def dimension(self) -> int:
        """Size d of an embedding."""
        return self._encoder.dimension

    def describe(self) -> dict[str, Any]:
        """Say which columns are embedded and how."""
        return {
            "modality": "text",
            "shape": self.layout.shape,
            "columns": list(self.layout.columns),
            "template": self.layout.template,
        }

    def describe_model(self) -> dict[str, Any]:
        """Say which model embeds."""
        return self._encoder.describe()

    def texts(self, rows: Int[ndarray, " b"]) -> list[str]:
        """Give the strings that stand for rows."""
        batch = self._columns[rows.tolist()]
        return [
            " ".join(text for value in values for text in field_texts(value))
            for values in zip(*(batch[c] for c in self.layout.columns), strict=True)
        ]

    def lengths(self) -> Int[ndarray, " n"]:
        """Read all rows once: characters of every row, and the notes on odd rows."""
        if self._lengths is None:
            self._lengths, self.problems = scan_rows(self._columns, self.layout)
        return self._lengths

    def load(self, rows: Int[ndarray, " b"]) -> tuple[list[str], Problems]:
        """Give the strings that stand for rows."""
        return self.texts(rows), {}

    def embed(self, batch: list[str]) -> Float[ndarray, "b d"]:
        """Embed strings, float32."""
        return self._encoder.encode(batch)


def scan_rows(dataset: "Dataset", layout: TextLayout) -> tuple[Int[ndarray, " n"], Problems]:
    """Measure every row and find the odd ones; none is dropped.

    Returns:
        Characters of every row, and the row numbers of each problem: an empty field, a field
        that is not text, or a row without any text.
    """
    lengths = np.zeros(len(dataset), dtype=np.int64)
    problems: Problems = {}
    for start in range(0, len(dataset), BLOCK_ROWS):
        block = dataset[start : start + BLOCK_ROWS]
        for column in layout.columns:
            for row, value in enumerate(block[column], start):
                size = sum(len(text) + 1 for text in field_texts(value))
                lengths[row] += size
                if not size and column not in layout.optional:
                    problems.setdefault(f"an empty {column}", []).append(row)
                elif not is_text(value):
                    problems.setdefault(f"a {column} that is not text", []).append(row)
    without = np.flatnonzero(lengths == 0).tolist()
    if without:
        problems["no text at all"] = without
    return np.maximum(lengths - 1, 0), problems
