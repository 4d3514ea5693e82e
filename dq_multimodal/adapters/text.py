"""Instruction data: which columns hold the text, and its sentence embeddings."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Looks, Problems
from dq_multimodal.adapters.encoder import load_encoder
from dq_multimodal.config import InputError
from dq_multimodal.row_sizes import cut_rows, read_blocks

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK_ROWS = 4096
TOKENIZED = 1_000_000
"""Characters that become tokens together to be counted: each takes about 100 bytes."""
LONG_WORD = 20
"""Letters a word on average, above which a text is taken for one without white space."""

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

    def __init__(
        self, dataset: "Dataset", layout: TextLayout, model: str, *, is_scored: bool = False
    ) -> None:
        self.layout, self.is_scored = layout, is_scored
        self.model = model
        self.notes: list[str] = []
        self.problems: Problems = {}
        check_features(dataset, layout)
        self.chunk_rows: int | None = getattr(dataset, "chunk_rows", None)
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

    @property
    def middle_dimension(self) -> int:
        """Size of the pooled middle layer."""
        return self._encoder.middle_dimension

    def load(self, rows: Int[ndarray, " b"], view: int | None = None) -> tuple[list[str], Problems]:
        """Give the strings that stand for rows, or a view of each with spans left out."""
        texts = self.texts(rows)
        if view is not None:
            texts = [drop_spans(t, (view, int(row))) for t, row in zip(texts, rows, strict=True)]
        return texts, {}

    def embed(self, batch: list[str]) -> Looks:
        """Embed strings."""
        if self.is_scored:
            return self._encoder.look(batch)
        return Looks(self._encoder.encode(batch))

    def surprisal(self, bins: Int[ndarray, " n"]) -> Float[ndarray, " m"]:
        r"""Give the mean surprisal of the tokens of each bin, in bits.

        $-\sum_v c_b(v) \log_2 p(v) / \sum_v c_b(v)$, with $c_b(v)$ the count of token v in bin b
        and p its share of all tokens: a unigram model of the whole dataset, read as far as the
        encoder reads.
        """
        from tqdm import tqdm

        counts = np.zeros((int(bins.max()) + 1, self._encoder.n_tokens))
        with tqdm(total=len(bins), desc="count tokens", unit="row") as bar:
            for start, stop in cut_rows(self.lengths(), BLOCK_ROWS, TOKENIZED):
                rows = np.arange(start, stop)
                ids = self._encoder.token_ids(self.texts(rows))
                at = np.repeat(bins[rows], [len(part) for part in ids])
                np.add.at(counts, (at, np.concatenate(ids)), 1)
                bar.update(len(rows))
        totals = counts.sum(axis=0)
        bits = -np.log2(np.where(totals > 0, totals, 1) / max(1, totals.sum()))
        sizes = counts.sum(axis=1)
        return np.where(sizes > 0, counts @ bits / np.maximum(sizes, 1), np.nan)


def drop_spans(text: str, seed: tuple[int, int], share: float = 0.15, longest: int = 5) -> str:
    """Leave out random spans of words, a share of all: an augmented view for the diversity score.

    Args:
        text: Words parted by white space; a text without (as Chinese is written) counts by letters.
        seed: Of the dataset and of the row; the same seed leaves out the same words.
        share: Share of the words to leave out, rounded, at least one word of two or more.
        longest: Longest span in words.
    """
    words, glue = text.split(), " "
    if len(text) > LONG_WORD * len(words):
        words, glue = list(text), ""
    n_left_out = max(1, round(share * len(words))) if len(words) > 1 else 0
    rng = np.random.default_rng([number % 2**64 for number in seed])
    is_kept = np.ones(len(words), dtype=bool)
    while n_left_out > 0:
        size = min(int(rng.integers(1, longest + 1)), n_left_out)
        start = int(rng.integers(0, len(words) - size + 1))
        n_left_out -= int(is_kept[start : start + size].sum())
        is_kept[start : start + size] = False
    return glue.join(word for word, kept in zip(words, is_kept, strict=True) if kept)


def scan_rows(dataset: "Dataset", layout: TextLayout) -> tuple[Int[ndarray, " n"], Problems]:
    """Measure every row and find the odd ones; none is dropped.

    Returns:
        Characters of every row, and the row numbers of each problem: an empty field, a field
        that is not text, or a row without any text.
    """
    parts = []
    problems: Problems = {}
    start = 0
    for block in read_blocks(dataset, BLOCK_ROWS):
        part = np.zeros(len(block[layout.columns[0]]), dtype=np.int64)
        for column in layout.columns:
            for row, value in enumerate(block[column], start):
                size = sum(len(text) + 1 for text in field_texts(value))
                part[row - start] += size
                if not size and column not in layout.optional:
                    problems.setdefault(f"an empty {column}", []).append(row)
                elif not is_text(value):
                    problems.setdefault(f"a {column} that is not text", []).append(row)
        parts.append(part)
        start += len(part)
    lengths = np.concatenate(parts)
    without = np.flatnonzero(lengths == 0).tolist()
    if without:
        problems["no text at all"] = without
    return np.maximum(lengths - 1, 0), problems
