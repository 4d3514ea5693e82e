"""The patch records of a run: made block by block, resumable, read as one column of the subset."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.config import InputError
from dq_multimodal.data.pixels import count_pixels, decode_image, read_bytes, undecoded
from dq_multimodal.files import open_parquet, write_table
from dq_multimodal.patches.codec import FIELDS
from dq_multimodal.patches.store import has_old_records

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from PIL.Image import Image

FOLDER = "patches"
BLOCK_ROWS = 64
"""So much work at most is done again after a stop."""
STEP_PIXELS = 4_000_000
"""Images that are worked on together have at most so many pixels, or are one."""
LARGEST_PIXELS = 25_000_000
"""Larger images keep their original: the coder takes about 70 bytes a pixel."""

NOT_PLAIN = "an image that is not 8-bit grey or RGB, or cannot be read"
TOO_LARGE = "an image of more than 25 million pixels"
OWN_COLOURS = "an image with a gamma or primaries of its own"
NO_SMALLER = "an image that would not get smaller"
BELOW_GATE = "a filled image below min_psnr"

Drop = Callable[
    [list[bytes | None], "list[Image | None]", list[list[str]], Int[ndarray, " b"]],
    list[dict[str, Any]],
]
"""Makes records of some rows, given files, pictures, what is odd about them, and row numbers."""


def note_original(what: str, rows: list[int]) -> str:
    """Say in one line which rows keep their original file, and why."""
    shown = ", ".join(str(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    noun = "row keeps its" if len(rows) == 1 else "rows keep their"
    return f"{len(rows):,} {noun} original, {what}: {shown}"


def drop_patches(
    dataset: "Dataset", column: str, kept: Int[ndarray, " k"], drop: Drop, folder: Path
) -> "PatchColumn":
    """Write the records of the kept rows to folder/patches, a file a block; done ones are left."""
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    files = undecoded(dataset, column)
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=len(kept), desc="patches", unit="row") as bar,
    ):
        for number, start in enumerate(range(0, len(kept), BLOCK_ROWS)):
            rows = kept[start : start + BLOCK_ROWS]
            path = target / f"{number:06d}.parquet"
            if path.exists() and not has_old_records([path]):
                bar.update(len(rows))
                continue
            values = [read_bytes(value) for value in files[rows.tolist()][column]]
            made: list[dict[str, Any]] = []
            for first, last in _steps([count_pixels(value) for value in values]):
                part = values[first:last]
                images, odd = zip(*pool.map(_decode, part), strict=True)
                made += drop(part, list(images), list(odd), rows[first:last])
                bar.update(last - first)
            write_table(_to_table(rows, made), path)
    return PatchColumn(column, folder)


def _decode(file: bytes | None) -> "tuple[Image | None, list[str]]":
    if count_pixels(file) > LARGEST_PIXELS:
        return None, [TOO_LARGE]
    return decode_image(file)


def _steps(sizes: list[int]) -> list[tuple[int, int]]:
    """Cut images into runs of at most STEP_PIXELS pixels, or of one image."""
    steps, first, total = [], 0, 0
    for k, size in enumerate(sizes):
        if k > first and total + size > STEP_PIXELS:
            steps.append((first, k))
            first, total = k, 0
        total += size
    return [*steps, (first, len(sizes))]


def _record_type() -> "pa.DataType":
    import pyarrow as pa

    return pa.struct([(name, getattr(pa, kind)()) for name, kind in FIELDS.items()])


def _to_table(rows: Int[ndarray, " b"], made: list[dict[str, Any]]) -> "pa.Table":
    import pyarrow as pa

    types = {
        "record": _record_type(),
        "reason": pa.string(),
        "psnr": pa.float64(),
        "psnr_of_kept": pa.float64(),
        "is_changed": pa.bool_(),
        "kept_share": pa.float64(),
        "source_bytes": pa.int64(),
        "lost": pa.list_(pa.string()),
    }
    columns = {name: pa.array([m[name] for m in made], kind) for name, kind in types.items()}
    return pa.table({"row": pa.array(rows), **columns})


class PatchColumn:
    """The records of folder/patches as one column, read block by block."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.files = sorted((folder / FOLDER).glob("*.parquet"))

    @property
    def feature(self) -> dict[str, Any]:
        """The column's type for `datasets`."""
        from datasets import Value

        return {name: Value(kind) for name, kind in FIELDS.items()}

    def slice(self, start: int, length: int) -> "pa.ChunkedArray":
        """Give the records of kept rows start ... start + length."""
        import pyarrow as pa

        first, last = start // BLOCK_ROWS, -(-(start + length) // BLOCK_ROWS)
        table = pa.concat_tables(_read(self.files[first:last], ["record"]))
        return table["record"].slice(start - first * BLOCK_ROWS, length)

    def summarise(self) -> dict[str, Any]:
        """Say what manifest.json records: who kept the original and why, PSNR, answers, bytes.

        PSNR and answers are those of the images that lost patches.
        """
        import pyarrow as pa

        table = pa.concat_tables([part.drop_columns(["record"]) for part in _read(self.files)])
        reasons = np.array(table["reason"].to_pylist(), dtype=object)
        rows = table["row"].to_numpy()
        is_coded = np.array([reason is None for reason in reasons])
        coded = table.filter(pa.array(is_coded))
        changed = [value for value in coded["is_changed"].to_pylist() if value is not None]
        return {
            "images": len(table),
            "coded": int(is_coded.sum()),
            "originals": {
                reason: rows[reasons == reason].tolist()
                for reason in (NOT_PLAIN, TOO_LARGE, OWN_COLOURS, NO_SMALLER, BELOW_GATE)
                if (reasons == reason).any()
            },
            "kept_share": float(np.mean(table["kept_share"].to_numpy())),
            "psnr_of_holes": _mean_and_lowest(coded["psnr"].to_pylist()),
            "psnr_of_kept": _mean_and_lowest(coded["psnr_of_kept"].to_pylist()),
            "answers": {"compared": len(changed), "changed": sum(changed)},
            "source_bytes": int(np.sum(table["source_bytes"].to_numpy())),
            "lost": dict(Counter(what for lost in coded["lost"].to_pylist() for what in lost)),
        }


def _read(files: list[Path], columns: list[str] | None = None) -> "Iterator[pa.Table]":
    for path in files:
        with open_parquet(path) as file:
            yield file.read(columns=columns)


def _mean_and_lowest(values: list[float | None]) -> dict[str, float | None]:
    """Summarise PSNRs in dB; images without any loss (infinite ones) do not count."""
    finite = [value for value in values if value is not None and np.isfinite(value)]
    if not finite:
        return {"mean": None, "lowest": None}
    return {"mean": round(float(np.mean(finite)), 3), "lowest": round(min(finite), 3)}


def stored_bytes(files: list[Path], column: str) -> int:
    """Count the bytes that a column takes in parquet files, masks and sizes included."""
    leaves = {f"{column}.{name}" for name in FIELDS}
    total = 0
    for file in files:
        with open_parquet(file) as opened:
            meta = opened.metadata
        for group in range(meta.num_row_groups):
            for k in range(meta.num_columns):
                leaf = meta.row_group(group).column(k)
                if leaf.path_in_schema in leaves:
                    total += leaf.total_compressed_size
    return total


ADVICE = {
    NO_SMALLER: "use --patch-coding webp (lossy), or leave --drop-ratio out",
    BELOW_GATE: "lower --min-psnr, or leave --drop-ratio out",
}


def check_smaller(found: dict[str, Any], stored: int) -> None:
    """Raise if no image got smaller, or all together take no less than in the source.

    Args:
        found: From `PatchColumn.summarise`.
        stored: Bytes that the images take in the subset.
    """
    if found["coded"] and stored < found["source_bytes"]:
        return
    originals = found["originals"]
    reason = max(originals, key=lambda what: len(originals[what]), default=NO_SMALLER)
    kept = sum(map(len, originals.values()))
    raise InputError(
        f"dropping patches would not make the images smaller: {found['source_bytes']:,} bytes in "
        f"the source, {stored:,} stored, and {kept:,} of {found['images']:,} images keep their "
        f"original (mostly {reason}); nothing was kept: "
        + ADVICE.get(reason, "leave --drop-ratio out")
    )
