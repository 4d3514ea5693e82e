"""Rows of the patch store asked for one by one, decoded some at a time: many cost little more."""

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

from dq_multimodal.patches.fields import ORIGINAL, Record

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

ROW = "dq_row"
"""Column that tells a row from all others, however the dataset was selected or shuffled since."""
CACHE_BYTES = 256_000_000
"""Decoded images that a process holds, at 4 bytes a pixel."""
BLOCK_ROWS, BLOCK_PIXELS = 128, 1_000_000
"""Neighbours that are decoded together: not more rows or pixels, but one image at least."""

Decode = Callable[[list[Record | None]], "list[Image | None]"]


class Ahead:
    """Gives single images of a dataset of patch records, and decodes their neighbours with them.

    It does so where these will be wanted: when rows come one after the other, or when all images
    of the dataset can be held. Else a row is decoded alone.

    Args:
        dataset: Columns of records, and the column ROW.
        decode: Makes images of records, None of None.
    """

    def __init__(self, dataset: "Dataset", decode: Decode) -> None:
        self._rows, self._decode = dataset.with_format(None), decode
        self._blocks: OrderedDict[tuple[str, int], list[tuple[bytes, Image] | None]] = OrderedDict()
        self._last: dict[str, int] = {}
        self._lock = Lock()

    @cached_property
    def _place(self) -> dict[int, int]:
        numbers = self._rows.with_format("numpy")[ROW][:]
        return {number: place for place, number in enumerate(numbers.tolist())}

    def get(self, column: str, number: int, record: Record) -> "Image | None":
        """Give the image of the record that a column holds in the row of a number."""
        with self._lock:
            place = self._place.get(number)
            if record["coding"] != ORIGINAL and place is not None:
                found = self._find(column, place, record)
                if found is not None and found[0] == record["data"]:
                    return found[1].copy()
        return self._decode([record])[0]

    def _find(self, column: str, place: int, record: Record) -> "tuple[bytes, Image] | None":
        """Look a record up in its block; decode the block if that will pay."""
        n_pixels = max(1, record["height"] * record["width"])
        size = min(BLOCK_ROWS, max(1, BLOCK_PIXELS // n_pixels))
        last, self._last[column] = self._last.get(column), place
        number, k = divmod(place, size)
        block = self._blocks.get((column, number))
        if block is None:
            will_hold_all = 4 * n_pixels * len(self._rows) <= CACHE_BYTES
            if last is None or not (will_hold_all or last + 1 == place):
                return None
            records = self._rows[number * size : (number + 1) * size][column]
            coded = [r if r is not None and r["coding"] != ORIGINAL else None for r in records]
            block = [
                (r["data"], image) if r is not None and image is not None else None
                for r, image in zip(coded, self._decode(coded), strict=True)
            ]
            self._blocks[column, number] = block
            while len(self._blocks) > 1 and 4 * n_pixels * size * len(self._blocks) > CACHE_BYTES:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end((column, number))
        return block[k] if k < len(block) else None
