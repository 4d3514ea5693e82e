"""Files that are there whole or not at all, whatever happens on the way."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    put_in_place(temporary, path)


def write_table(table: "pa.Table", path: Path) -> None:
    """Write a parquet file."""
    import pyarrow.parquet as pq

    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once it is on the disk and not only on its way there."""
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
