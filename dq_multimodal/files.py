"""Files that are there whole or not at all, whatever happens on the way, and how they are named."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dq_multimodal.config import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Give a path as a shell reads it: ~ is the home folder. Path.expanduser fails on ~unknown."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def show_name(name: str) -> str:
    """Bring a name that data gave, of a label or a file, into one line of at most 60 characters."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    put_in_place(temporary, path)


def write_table(table: "pa.Table", path: Path) -> None:
    """Write a parquet file."""
    import pyarrow.parquet as pq

    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
    put_in_place(temporary, path)


def read_text(path: Path, most_bytes: int) -> str:
    """Read a text file that anybody may have written.

    Raises:
        FileNotFoundError: If there is none.
        InputError: If it is no plain file (a pipe has no end), too large, or not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path} is no plain file")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise InputError(f"{path} is larger than {most_bytes:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be text in UTF-8, and it is not") from error


@contextmanager
def open_parquet(path: Path) -> "Iterator[pq.ParquetFile]":
    """Open a parquet file; by its name, pyarrow would read `a:b` as an address.

    Raises:
        OSError: If it cannot be read, or is no plain file: to open a pipe would wait for ever.
        ValueError: If it is no parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with pa.OSFile(str(path)) as source, pq.ParquetFile(source) as file:
        yield file


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once it is on the disk and not only on its way there."""
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
