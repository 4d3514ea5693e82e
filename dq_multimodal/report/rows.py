"""What a reader sees of a row: its texts, cut and cleaned, and a small picture."""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dq_multimodal.adapters.text import field_texts, share_out
from dq_multimodal.config import InputError
from dq_multimodal.data.pixels import decode_image, image_files, read_bytes, undecoded
from dq_multimodal.data.row_sizes import cut_rows, measure_rows
from dq_multimodal.manifest import Columns

if TYPE_CHECKING:
    from datasets import Dataset

MAX_FIELDS = 12
"""So many columns of a row are shown."""
MAX_CHARACTERS = 500
READ_ROWS = 64
"""Rows may be large: so many are read at once, and cut before the next."""
SMALL_SIDE = 48
LARGE_SIDE = 96
NAME_CHARACTERS = 60
UNREADABLE = "(this row cannot be read)"

Split = Callable[[dict[str, list[Any]], Sequence[str]], list[list[Any]]]
"""Takes a batch of rows and its columns apart, row by row."""

BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
"""Control characters become their pictures: pages cannot hold some of them."""


@dataclass(frozen=True)
class Picture:
    """The first picture of a row that can be read, in two sizes, WebP; both empty without one."""

    small: bytes = b""  # at most 48 px wide and high, for the map
    large: bytes = b""  # at most 96 px
    is_tiny: bool = False  # whether the picture itself is no larger than 48 px
    n_pixels: int = -1  # of the picture itself
    note: str = ""  # said below it, or in its place


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
        columns: Those of the texts of a row.
        has_texts: Whether rows have texts to show.
        has_pictures: Whether they have pictures.
        lengths: Of the rows that were read, characters of the texts, or pixels of the picture
            where rows have no texts.

    Args:
        dataset: The source in row order; None where it cannot be had.
        rows: Modality and columns of what is embedded; None where nothing is.
    """

    def __init__(self, dataset: "Dataset | None", rows: Columns | None) -> None:
        present = [] if dataset is None else dataset.column_names
        texts, images = ([], []) if rows is None else (rows.columns, rows.image_columns or [])
        if rows is not None and rows.modality == "image":
            texts, images = [], rows.columns[:1]
        self.columns = [column for column in texts if column in present][:MAX_FIELDS]
        images = [column for column in images if column in present]
        self.has_texts, self.has_pictures = bool(self.columns), bool(images)
        self.lengths: dict[int, int] = {}
        if dataset is not None and self.has_texts:
            self._texts = undecoded(dataset, *self.columns)  # chat turns may hold images
        if dataset is not None and self.has_pictures:
            self._files = undecoded(dataset, *images)

    @property
    def column_names(self) -> list[str]:
        """Names of the shown columns, cleaned."""
        return [clean_name(column, 40) for column in self.columns]

    def texts(
        self, rows: Iterable[int], on_rows: Callable[[int], object] | None = None
    ) -> dict[int, list[str]]:
        """Read the texts of rows, one for each column, cut to 500 characters together."""
        found = {}
        for part, read in self._blocks(self._texts, rows, on_rows, _values):
            for row, values in zip(part, read, strict=True):
                found[row], self.lengths[row] = _fields(values)
        return found

    def pictures(
        self, rows: Iterable[int], on_rows: Callable[[int], object] | None = None
    ) -> dict[int, Picture]:
        """Read the pictures of rows, small: of each row the first that can be read."""
        found: dict[int, Picture] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for part, read in self._blocks(self._files, rows, on_rows, image_files):
                found |= dict(zip(part, pool.map(_draw_small, read), strict=True))
        if not self.has_texts:
            self.lengths |= {row: shown.n_pixels for row, shown in found.items()}
        return found

    def _blocks(
        self,
        source: "Dataset",
        rows: Iterable[int],
        on_rows: Callable[[int], object] | None,
        split: Split,
    ) -> Iterator[tuple[list[int], list[list[Any] | None]]]:
        """Read rows in blocks."""
        rows = list(rows)
        sizes = np.zeros(len(rows), dtype=np.int64)
        if hasattr(source, "data"):
            sizes = measure_rows(source)[rows]
        for start, stop in cut_rows(sizes, READ_ROWS):
            yield rows[start:stop], _read(source, rows[start:stop], split)
            if on_rows is not None:
                on_rows(stop - start)


def _values(batch: dict[str, list[Any]], columns: Sequence[str]) -> list[list[Any]]:
    """Give the values of every row of a batch, column by column."""
    return [list(values) for values in zip(*(batch[c] for c in columns), strict=True)]


def _read(source: "Dataset", rows: list[int], split: Split) -> list[list[Any] | None]:
    """Read the values or the image files of rows; None for a row that cannot be read."""
    try:
        return [*split(source[rows], source.column_names)]
    except InputError:  # a stream that broke off
        raise
    except Exception:  # whatever it is that the one odd row among them holds
        if len(rows) == 1:
            return [None]
        return [_read(source, [row], split)[0] for row in rows]


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


def _draw_small(files: list[Any] | None) -> Picture:
    """Decode the first image file of a row that can be read, and scale it down."""
    if not files:
        return Picture(note=UNREADABLE if files is None else "no picture")
    image = next(filter(None, (decode_image(read_bytes(file))[0] for file in files)), None)
    if image is None:
        return Picture(note="no picture that can be read")
    is_tiny = max(image.size) <= SMALL_SIDE
    sizes = []
    for side in (SMALL_SIDE, LARGE_SIDE):
        copy = image.copy()
        copy.thumbnail((side, side), reducing_gap=2.0)
        file = io.BytesIO()
        copy.save(file, "WEBP", quality=90 if is_tiny else 75, method=4)
        sizes.append(file.getvalue())
    note = f"1 of {len(files)} pictures" if len(files) > 1 else ""
    return Picture(sizes[0], sizes[1], is_tiny, image.width * image.height, note)
