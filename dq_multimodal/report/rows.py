"""What a reader sees of a row: its texts, cut and cleaned, or a small picture."""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dq_multimodal.adapters.text import field_texts, share_out
from dq_multimodal.config import InputError
from dq_multimodal.data.pixels import decode_image, read_bytes, undecoded
from dq_multimodal.data.row_sizes import cut_rows, measure_rows
from dq_multimodal.manifest import Columns

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["text", "image", "none"]

MAX_FIELDS = 12
"""So many columns of a row are shown."""
MAX_CHARACTERS = 500
READ_ROWS = 64
"""Rows may be large: so many are read at once, and cut before the next."""
SMALL_SIDE = 48
LARGE_SIDE = 96
NAME_CHARACTERS = 60
UNREADABLE = "(this row cannot be read)"

BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
"""Control characters become their pictures: pages cannot hold some of them."""


@dataclass(frozen=True)
class Picture:
    """Two sizes of one picture, WebP."""

    small: bytes  # at most 48 px wide and high, for the map
    large: bytes  # at most 96 px
    is_tiny: bool  # whether the picture itself is no larger than 48 px
    n_pixels: int  # of the picture itself


def clean(text: str) -> str:
    """Give text that any page and file can hold: no lone surrogates, no control characters."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\r\n", "\n").translate(CONTROL)


def shorten(text: str, limit: int) -> str:
    """Cut text to some characters, the last one an ellipsis where something was cut off."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def clean_name(name: Any, limit: int = NAME_CHARACTERS) -> str:
    """Clean the name of a column, a label or a dataset: one line, short, in plain direction."""
    text = BIDI.sub("", clean(str(name)[: 4 * limit]))
    return shorten(" ".join(text.split()), limit) or "(no name)"


def cut_fields(fields: list[str], limit: int) -> list[str]:
    """Cut the texts of a row to some characters together; short ones leave room to long ones."""
    room = share_out([len(text) for text in fields], limit)
    return [shorten(text, max(1, size)) for text, size in zip(fields, room, strict=True)]


class RowReader:
    """Reads what is shown of the rows of the source.

    Attributes:
        lengths: Of the rows that were read, characters of the texts or pixels of the picture.

    Args:
        dataset: The source in row order; None where it cannot be had.
        rows: Modality and columns of what is embedded; None where nothing is.
    """

    def __init__(self, dataset: "Dataset | None", rows: Columns | None) -> None:
        present = dataset.column_names if dataset is not None else []
        wanted = [c for c in (rows.columns if rows else []) if c in present]
        self.kind: Kind = "none"
        self.lengths: dict[int, int] = {}
        self.columns: list[str] = []
        if dataset is None or rows is None or not wanted:
            return
        self.kind = "text" if rows.modality == "image-text" else rows.modality
        self.columns = wanted[:1] if self.kind == "image" else wanted[:MAX_FIELDS]
        if self.kind == "image":
            self._source = undecoded(dataset, wanted[0])
        else:
            self._source = dataset.select_columns(self.columns)

    @property
    def column_names(self) -> list[str]:
        """Names of the shown columns, cleaned."""
        return [clean_name(column, 40) for column in self.columns]

    def texts(
        self, rows: Iterable[int], on_rows: Callable[[int], object] | None = None
    ) -> dict[int, list[str]]:
        """Read the texts of rows, one for each column, cut to 500 characters together."""
        found = {}
        for part, read in self._blocks(list(rows), on_rows):
            for row, values in zip(part, read, strict=True):
                found[row], self.lengths[row] = _fields(values)
        return found

    def pictures(
        self, rows: Iterable[int], on_rows: Callable[[int], object] | None = None
    ) -> dict[int, Picture | None]:
        """Read the pictures of rows, small; None for what cannot be read."""
        found: dict[int, Picture | None] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for part, read in self._blocks(list(rows), on_rows):
                files = [None if values is None else values[0] for values in read]
                found |= dict(zip(part, pool.map(_draw_small, files), strict=True))
        self.lengths |= {row: shown.n_pixels for row, shown in found.items() if shown is not None}
        return found

    def _blocks(
        self, rows: list[int], on_rows: Callable[[int], object] | None
    ) -> Iterator[tuple[list[int], list[list[Any] | None]]]:
        """Read rows in blocks."""
        sizes = np.zeros(len(rows), dtype=np.int64)
        if self.kind != "none" and hasattr(self._source, "data"):
            sizes = measure_rows(self._source)[rows]
        for start, stop in cut_rows(sizes, READ_ROWS):
            yield rows[start:stop], self._read(rows[start:stop])
            if on_rows is not None:
                on_rows(stop - start)

    def _read(self, rows: list[int]) -> list[list[Any] | None]:
        """Read the columns of rows; None for a row that cannot be read."""
        try:
            batch = self._source[rows]
            return [list(values) for values in zip(*(batch[c] for c in self.columns), strict=True)]
        except InputError:  # a stream that broke off
            raise
        except Exception:  # whatever it is that the one odd row among them holds
            if len(rows) == 1:
                return [None]
            return [self._read([row])[0] for row in rows]


def _fields(values: list[Any] | None) -> tuple[list[str], int]:
    """Give the texts of a row, cut, and the characters of all of them."""
    if values is None:
        return [UNREADABLE], -1
    texts, length = [], 0
    for value in values:
        length += sum(map(len, field_texts(value)))
        parts, size = [], 0
        for text in field_texts(value):
            parts.append(clean(text[: 2 * MAX_CHARACTERS]))
            size += len(parts[-1])
            if size > MAX_CHARACTERS:
                parts.append("…" if len(text) > 2 * MAX_CHARACTERS else "")
                break
        texts.append("\n".join(part for part in parts if part).strip())
    return cut_fields(texts, MAX_CHARACTERS), length


def _draw_small(value: Any) -> Picture | None:
    """Decode an image file and scale it down; None where that cannot be done."""
    image, _ = decode_image(read_bytes(value))
    if image is None:
        return None
    is_tiny = max(image.size) <= SMALL_SIDE
    files = []
    for side in (SMALL_SIDE, LARGE_SIDE):
        copy = image.copy()
        copy.thumbnail((side, side), reducing_gap=2.0)
        file = io.BytesIO()
        copy.save(file, "WEBP", quality=90 if is_tiny else 75, method=4)
        files.append(file.getvalue())
    return Picture(files[0], files[1], is_tiny, image.width * image.height)
