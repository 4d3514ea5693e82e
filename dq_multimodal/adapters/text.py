"""Instruction data: which columns hold the text, and its sentence embeddings."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.adapters.base import LONGER, Adapter, Embedded, Problems
from dq_multimodal.config import Dtype, InputError
from dq_multimodal.data.columns import check_columns
from dq_multimodal.data.pixels import undecoded
from dq_multimodal.data.row_sizes import cut_rows, read_blocks
from dq_multimodal.models.text import Encoder, load_encoder

BLOCK_ROWS = 4096
TOKENIZED = 1_000_000
"""Characters that become tokens together to be counted: each takes about 100 bytes."""
LONG_WORD = 20
"""Letters a word on average, above which a text is taken for one without white space."""

Shape = Literal[
    "alpaca", "prompt_completion", "messages", "conversations", "preference", "text", "columns"
]

KNOWN_SHAPES: dict[Shape, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # shape: (columns in template order, those of them that may be missing)
    "messages": (("messages",), ()),
    "conversations": (("system", "conversations"), ("system",)),
    "alpaca": (("instruction", "input", "output"), ("input",)),
    "prompt_completion": (("prompt", "completion"), ()),
    "preference": (("input", "preferred_output"), ()),
    "text": (("text",), ()),
}
TURN_TEXT = {"content", "value"}
"""Keys of a chat turn that hold its text: `messages` say content, ShareGPT says value."""
TURN_BESIDE = {"refusal", "tool_calls", "function_call"}
"""Keys of what a turn says that has no such text."""
TURN_ROLE = {"role", "from"}
SYSTEM = {"system", "developer"}
ANSWER = {"assistant", "gpt", "chatgpt", "model", "bot"}
SHARED_ROWS, SHARED_RATIO = 10, 0.01
"""A system turn is left out where at least so many rows and this share of all have the same."""
CHAT_TEMPLATE = (
    "; chats, version 2: without system turns that at least 10 rows and 1 % of all share, a turn "
    "without content by its refusal or tool calls, and of chats too long for the encoder the "
    "beginning of each turn, answers and the rest with half of the tokens each where both need it"
)
"""What the recorded template says beside the columns; other rules need another version."""
MISREAD = 'a turn whose content is no text (beside lists, datasets reads a text like "42" as JSON)'

IMAGE_MARK = re.compile(r"<image(?:_\d+)?>")
"""What stands in a text for an image of its row."""

NO_TEXT = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")

NAME_PARTS = {
    *("id", "uid", "uuid", "key", "index", "file", "filename", "path", "filepath", "name"),
    *("url", "uri", "link", "source", "split", "hash", "sha", "md", "license", "licence"),
    *("dataset", "date", "time", "timestamp", "created", "no", "number", "sentid", "confidence"),
    *("label", "class", "classes", "category", "categories", "type"),
}
"""Words in the names of columns beside images whose text names a row or its kind, no more."""

Turn = tuple[str, str]
"""Role ("" for text outside a chat) and text."""


@dataclass(frozen=True)
class TextLayout:
    """Which columns are read, and how a row becomes one string.

    The string of a row is its texts in column order, joined by single spaces, empty ones left
    out. A column of chat turns gives the text of every turn; roles are not part of it, and see
    CHAT_TEMPLATE.

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
            prompt/completion, OpenAI's preferences (input, preferred_output), then `text`.

    Raises:
        InputError: If a named column does not exist or no known shape fits.
    """
    if text_columns is not None:
        check_columns(columns, text_columns)
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
    them. Of a chat turn, the content counts, or else its refusal, or else the names and arguments
    of its tool calls; of content in parts, the parts of type text; of any other mapping, all
    values.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return []  # an image
        keys = set(TURN_TEXT & value.keys() or {"text"} & value.keys())
        if not keys and not TURN_BESIDE & value.keys() and "type" not in value:
            keys = set(value)  # a plain mapping, neither a turn nor a part such as an image
        texts = [text for key in value if key in keys for text in field_texts(value[key])]
        return texts or field_texts(value.get("refusal")) or _call_texts(value)
    if isinstance(value, list | tuple):
        return [text for part in value for text in field_texts(part)]
    return [str(value)]


def _call_texts(turn: dict[str, Any]) -> list[str]:
    """Give the names and arguments of the tool calls of a turn."""
    calls = [turn.get("function_call"), *(turn.get("tool_calls") or [])]
    texts = []
    for call in calls:
        if isinstance(call, dict):
            called = call.get("function") or call.get("custom") or call
            arguments = called.get("arguments") or called.get("input")
            if isinstance(arguments, dict | list):
                arguments = json.dumps(arguments, ensure_ascii=False)
            texts += field_texts(called.get("name")) + field_texts(arguments)
    return texts


def split_turns(column: str, value: Any) -> list[tuple[str, list[str]]]:
    """Give role and texts of every chat turn in one field; other fields are one turn, role ""."""
    if isinstance(value, dict):  # the input of a preference; or turns as columns
        value = value["messages"] if isinstance(value.get("messages"), list) else value
    if isinstance(value, list) and any(_is_turn(part) for part in value):
        return [
            (str(part.get("role") or part.get("from")) if _is_turn(part) else "", field_texts(part))
            for part in value
        ]
    return [("system" if column == "system" else "", field_texts(value))]


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and bool(TURN_ROLE & value.keys())


def _is_misread(turn: Any) -> bool:
    return _is_turn(turn) and isinstance(turn.get("content"), int | float | dict)


def holds_turns(feature: Any) -> bool:
    """Say whether a column holds, or may hold, chat turns."""
    if isinstance(feature, dict):
        return bool((TURN_ROLE | {"messages"}) & feature.keys())
    if type(feature).__name__ == "Json":
        return True
    return hasattr(feature, "feature") and holds_turns(feature.feature)


def share_out(sizes: list[int], total: int) -> list[int]:
    """Share a total out: everyone gets as much, or its size; small ones leave room to large."""
    left, waiting = total, len(sizes)
    shares = [0] * len(sizes)
    for at in sorted(range(len(sizes)), key=lambda k: sizes[k]):
        shares[at] = min(sizes[at], left // waiting)
        left, waiting = left - shares[at], waiting - 1
    return shares


def share_tokens(roles: list[str], sizes: list[int], total: int) -> list[int]:
    """Share the tokens that an encoder reads out among turns: half for answers, half for others."""
    sides = [[k for k, role in enumerate(roles) if (role in ANSWER) == own] for own in (0, 1)]
    parts = share_out([sum(sizes[k] for k in side) for side in sides], total)
    shares = [0] * len(sizes)
    for side, part in zip(sides, parts, strict=True):
        for k, share in zip(side, share_out([sizes[k] for k in side], part), strict=True):
            shares[k] = share
    return shares


def _digest(text: str) -> int:
    found = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(found, "big", signed=True)


def leave_out_shared(turns: Int[ndarray, "k 3"], lengths: Int[ndarray, " n"]) -> frozenset[int]:
    """Find the system turns that many rows share, and take their characters from the lengths.

    A row that has no other text keeps its own.

    Args:
        turns: Row, characters and digest of every system turn.
        lengths: Characters of every row, changed in place.

    Returns:
        The digests of the shared turns.
    """
    rows, sizes, digests = turns.T
    found, counts = np.unique(np.unique(turns[:, [2, 0]], axis=0)[:, 0], return_counts=True)
    shared = found[counts >= max(SHARED_ROWS, SHARED_RATIO * len(lengths))]
    sizes = np.where(np.isin(digests, shared), sizes, 0)
    left_out = np.bincount(rows, sizes, minlength=len(lengths)).astype(np.int64)
    lengths -= np.where(left_out <= lengths, left_out, 0)
    return frozenset(shared.tolist())


class TextAdapter(Adapter):
    """Sentence embeddings of the rows of an instruction dataset.

    Beside images (`has_images`) the marks that stand for them, such as <image>, are no text.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: TextLayout,
        model: str,
        *,
        has_images: bool = False,
        is_scored: bool = False,
        device: str | None = None,
        dtype: Dtype = "auto",
    ) -> None:
        super().__init__(dataset, is_scored=is_scored)
        self.layout, self.model, self._has_images = layout, model, has_images
        self._device, self._dtype = device, dtype
        features = [dataset.features[column] for column in layout.columns]
        for column, feature in zip(layout.columns, features, strict=True):
            if (kind := type(feature).__name__) in NO_TEXT:
                raise InputError(f"column {column} holds {kind}, not text: name others")
        self.is_chat = layout.shape != "columns" and any(map(holds_turns, features))
        self._shared: frozenset[int] = frozenset()
        self._columns = undecoded(dataset, *layout.columns)  # turns may hold images
        self._lengths: Int[ndarray, " n"] | None = None
        self._hashes = array("q")

    @cached_property
    def encoder(self) -> Encoder:
        """The model that embeds."""
        encoder = load_encoder(self.model, self._device, self._dtype)
        if encoder.note:
            self.notes.append(encoder.note)
        return encoder

    @property
    def dimension(self) -> int:
        """Size d of an embedding."""
        return self.encoder.dimension

    def describe(self) -> dict[str, Any]:
        """Say which columns are embedded and how."""
        return {
            "modality": "text",
            "shape": self.layout.shape,
            "columns": list(self.layout.columns),
            "template": self.layout.template + (CHAT_TEMPLATE if self.is_chat else ""),
        }

    def describe_model(self) -> dict[str, Any]:
        """Say which model embeds."""
        return self.encoder.describe()

    def turns(self, rows: Int[ndarray, " b"]) -> list[list[Turn]]:
        """Give what stands for rows, turn by turn; text outside a chat is one turn."""
        self.lengths()  # finds the shared system turns
        batch = self._columns[rows.tolist()]
        found = []
        for values in zip(*(batch[c] for c in self.layout.columns), strict=True):
            turns = [
                (role, make_valid(" ".join(texts)))
                for column, value in zip(self.layout.columns, values, strict=True)
                for role, texts in self._split(column, value)
                if texts
            ]
            kept = turns
            if self._shared:
                kept = [t for t in turns if t[0] not in SYSTEM or _digest(t[1]) not in self._shared]
            found.append(kept or turns)
        return found

    def _split(self, column: str, value: Any) -> list[tuple[str, list[str]]]:
        """Give role and texts of every turn in one field."""
        if not self._has_images:
            return split_turns(column, value)
        turns = split_turns(column, _prune(value))
        bare = ((role, (IMAGE_MARK.sub(" ", t).strip() for t in texts)) for role, texts in turns)
        return [(role, [*filter(None, texts)]) for role, texts in bare]

    def texts(self, rows: Int[ndarray, " b"]) -> list[str]:
        """Give the strings that stand for rows, however long."""
        return [" ".join(text for _, text in turns) for turns in self.turns(rows)]

    def contents(self, rows: Int[ndarray, " b"]) -> Iterator[bytes]:
        """Give the texts, white space apart."""
        return (" ".join(text.split()).encode() for text in self.texts(rows))

    def lengths(self) -> Int[ndarray, " n"]:
        """Read all rows once: characters of every row, and the problems; none is dropped."""
        if self._lengths is None:
            self._lengths = self._scan()
        return self._lengths

    def _scan(self) -> Int[ndarray, " n"]:
        """Measure every row, hash its text, and note odd ones.

        Odd is an empty field, a field that is not text, or a row without any text.
        """
        layout, start = self.layout, 0
        sizes, systems = array("q"), array("q")
        for block in read_blocks(self._columns, BLOCK_ROWS):
            columns = [block[column] for column in layout.columns]
            for row, values in enumerate(zip(*columns, strict=True), start):
                found: list[str] = []
                for column, value in zip(layout.columns, values, strict=True):
                    n_found = len(found)
                    for role, texts in self._split(column, value):
                        found += texts
                        if self.is_chat and role in SYSTEM and texts:
                            text = make_valid(" ".join(texts))
                            systems.extend((row, len(text) + 1, _digest(text)))
                    what = None
                    if len(found) == n_found and column not in layout.optional:
                        what = f"an empty {column}"
                    elif not isinstance(value, str | list | tuple | dict | None):
                        what = f"a {column} that is not text"
                    elif isinstance(value, list) and any(map(_is_misread, value)):
                        what = MISREAD
                    if what is not None:
                        self.problems.setdefault(what, []).append(row)
                sizes.append(sum(len(text) + 1 for text in found))
                self._hashes.append(hash(" ".join(" ".join(found).split())))
            start = len(sizes)
        lengths = np.array(sizes, dtype=np.int64)
        without = np.flatnonzero(lengths == 0).tolist()
        if without:
            self.problems["no text at all"] = without
        lengths = np.maximum(lengths - 1, 0)
        if systems:
            turns = np.array(systems, dtype=np.int64).reshape(-1, 3)
            self._shared = leave_out_shared(turns, lengths)
        return lengths

    @property
    def text_hashes(self) -> Int[ndarray, " n"]:
        """Hashes that are equal for equal texts, white space apart; each process has its own."""
        self.lengths()
        return np.array(self._hashes, dtype=np.int64)

    @property
    def middle_dimension(self) -> int:
        """Size of the pooled middle layer."""
        return self.encoder.middle_dimension

    def load(self, rows: Int[ndarray, " b"], view: int | None = None) -> tuple[list[str], Problems]:
        """Give the strings that stand for rows, or a view of each with spans left out.

        The turns of a chat that is too long for the encoder are cut, each to its share.
        """
        turns = self.turns(rows)
        texts = [" ".join(text for _, text in row) for row in turns]
        problems: Problems = {}
        n_read = self.encoder.n_read
        if n_read is not None:
            # No token is shorter than a byte.
            may = [k for k, text in enumerate(texts) if len(text.encode()) > n_read]
            sizes = self.encoder.count_tokens([texts[k] for k in may])
            long = [k for k, size in zip(may, sizes, strict=True) if size > n_read]
            if long:
                part = "the beginning of each long turn" if self.is_chat else "their beginning"
                limit = self.encoder.model.max_seq_length
                what = f"{LONGER} ({limit:,} tokens): only {part} counts"
                problems[what] = rows[long].tolist()
            for k in long if self.is_chat else ():
                roles, parts = zip(*turns[k], strict=True)
                ends = self.encoder.token_ends(list(parts))
                shares = share_tokens(list(roles), [len(e) for e in ends], n_read)
                texts[k] = " ".join(
                    part[: end[share - 1]]
                    for part, end, share in zip(parts, ends, shares, strict=True)
                    if share
                )
        if view is not None:
            texts = [drop_spans(t, (view, int(row))) for t, row in zip(texts, rows, strict=True)]
        return texts, problems

    def embed(self, batch: list[str]) -> Embedded:
        """Embed strings."""
        if self.is_scored:
            return self.encoder.encode_scored(batch)
        return Embedded(self.encoder.encode(batch))

    def surprisal(self, bins: Int[ndarray, " n"]) -> Float[ndarray, " m"]:
        r"""Give the mean surprisal of the tokens of each bin, in bits.

        $-\sum_v c_b(v) \log_2 p(v) / \sum_v c_b(v)$, with $c_b(v)$ the count of token v in bin b
        and p its share of all tokens: a unigram model of the whole dataset, read as far as the
        encoder reads.
        """
        counts = np.zeros((int(bins.max()) + 1, self.encoder.n_tokens))
        with tqdm(total=len(bins), desc="count tokens", unit="row") as bar:
            for start, stop in cut_rows(self.lengths(), BLOCK_ROWS, TOKENIZED):
                rows = np.arange(start, stop)
                ids = self.encoder.token_ids(self.load(rows)[0])
                at = np.repeat(bins[rows], [len(part) for part in ids])
                np.add.at(counts, (at, np.concatenate(ids)), 1)
                bar.update(len(rows))
        totals = counts.sum(axis=0)
        bits = -np.log2(np.where(totals > 0, totals, 1) / max(1, totals.sum()))
        sizes = counts.sum(axis=1)
        return np.where(sizes > 0, counts @ bits / np.maximum(sizes, 1), np.nan)


def may_say(name: str) -> bool:
    """Say whether a column of this name, or a part of a struct, may hold what a row says."""
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    parts = {*re.split(r"[^a-z]+", words)}
    return not NAME_PARTS & (parts | {part.removesuffix("s") for part in parts})


def _prune(value: Any) -> Any:
    """Leave numbers, and what only names a thing, out of plain structs; turns stay as they are."""
    if isinstance(value, list | tuple):
        return [_prune(part) for part in value]
    if not isinstance(value, dict) or (TURN_ROLE | TURN_TEXT | {"type", "messages"}) & value.keys():
        return value
    is_number = {name: isinstance(part, int | float) for name, part in value.items()}
    return {n: _prune(part) for n, part in value.items() if may_say(n) and not is_number[n]}


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


def make_valid(text: str) -> str:
    """Give text that a tokenizer takes: JSON may hold halves of surrogate pairs."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
