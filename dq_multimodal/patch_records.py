"""The patch records of a run: made block by block, resumable, read as one column of the subset."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.atomic import write_table
from dq_multimodal.config import InputError
from dq_multimodal.patches.fields import FIELDS
from dq_multimodal.vision.pixels import decode_image, read_bytes, undecoded

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from PIL.Image import Image

FOLDER = "patches"
BLOCK_ROWS = 256
STEP_BYTES = 2_000_000
"""Images that are decoded together: about so many bytes of files."""

NOT_PLAIN = "an image that is not 8-bit grey or RGB, or cannot be read"
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
            if not path.exists():
                values = [read_bytes(value) for value in files[rows.tolist()][column]]
                made: list[dict[str, Any]] = []
                for first, last in _steps([len(value or b"") for value in values]):
                    part = values[first:last]
                    images, odd = zip(*pool.map(decode_image, part), strict=True)
                    made += drop(part, list(images), list(odd), rows[first:last])
                write_table(_to_table(rows, made), path)
            bar.update(len(rows))
    return PatchColumn(column, folder)


def _steps(sizes: list[int]) -> list[tuple[int, int]]:
    """Cut rows into runs of about STEP_BYTES bytes of files."""
    steps, first, total = [], 0, 0
    for k, size in enumerate(sizes):
        total += size
        if total >= STEP_BYTES or k + 1 == len(sizes):
            steps.append((first, k + 1))
            first, total = k + 1, 0
    return steps


def _record_type() -> "pa.DataType":
    import pyarrow as pa

    return pa.struct([(name, getattr(pa, kind)()) for name, kind in FIELDS.items()])


def _to_table(rows: Int[ndarray, " b"], made: list[dict[str, Any]]) -> "pa.Table":
    import pyarrow as pa

    types = {
        "record": _record_type(),
        "reason": pa.string(),
        "psnr": pa.float64(),
        "is_changed": pa.bool_(),
        "source_bytes": pa.int64(),
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
        import pyarrow.parquet as pq

        first, last = start // BLOCK_ROWS, -(-(start + length) // BLOCK_ROWS)
        tables = [pq.read_table(path, columns=["record"]) for path in self.files[first:last]]
        return pa.concat_tables(tables)["record"].slice(start - first * BLOCK_ROWS, length)

    def summarise(self) -> dict[str, Any]:
        """Say what manifest.json records: who kept the original and why, PSNR, answers, bytes."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = ["row", "reason", "psnr", "is_changed", "source_bytes"]
        table = pa.concat_tables([pq.read_table(path, columns=names) for path in self.files])
        reasons = np.array(table["reason"].to_pylist(), dtype=object)
        rows = table["row"].to_numpy()
        originals = {
            reason: rows[reasons == reason].tolist()
            for reason in (NOT_PLAIN, NO_SMALLER, BELOW_GATE)
            if (reasons == reason).any()
        }
        psnr = np.array([v for v in table["psnr"].to_pylist() if v is not None])
        finite = psnr[np.isfinite(psnr)]
        changed = [v for v in table["is_changed"].to_pylist() if v is not None]
        return {
            "images": len(table),
            "coded": int((reasons == None).sum()),  # noqa: E711 - element by element
            "originals": originals,
            "psnr_of_holes": {
                "mean": round(float(finite.mean()), 3) if len(finite) else None,
                "lowest": round(float(finite.min()), 3) if len(finite) else None,
            },
            "answers": {"compared": len(changed), "changed": sum(changed)},
            "source_bytes": int(np.sum(table["source_bytes"].to_numpy())),
        }


def stored_bytes(files: list[Path], column: str) -> int:
    """Count the bytes that a column takes in parquet files, masks and sizes included."""
    import pyarrow.parquet as pq

    total = 0
    for file in files:
        meta = pq.read_metadata(file)
        for group in range(meta.num_row_groups):
            for k in range(meta.num_columns):
                leaf = meta.row_group(group).column(k)
                if leaf.path_in_schema.split(".")[0] == column:
                    total += leaf.total_compressed_size
    return total


def check_smaller(source_bytes: int, stored: int, n_coded: int) -> None:
    """Raise if no image got smaller, or all together take no less than in the source."""
    if stored >= source_bytes or not n_coded:
        raise InputError(
            f"dropping patches would not make the images smaller: {source_bytes:,} bytes in the "
            f"source, {stored:,} stored, {n_coded:,} images smaller than before; so nothing was "
            "kept: use --patch-coding webp (lossy), or leave --drop-ratio out"
        )
