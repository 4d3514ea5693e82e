"""Files that are there whole or not at all, whatever happens on the way, and how they are named."""

import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_VALUE = 10_000
"""Characters of a value of YAML. It has numbers to base 60, and a long one takes minutes."""
MAX_DEPTH = 20
"""Levels of YAML; its readers go one call deeper for every level."""
MAX_KEY = 15
"""Characters of a key of YAML that is no text: many long numbers can be made to collide."""
MAX_NUMBER = 400
"""Characters of a whole number of YAML: more than any seed, and Python writes no 4,301 digits."""


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Give a path as a shell reads it: ~ is the home folder. Path.expanduser fails on ~unknown."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def show_name(name: str) -> str:
    """Bring a name that data gave, of a label or a file, into one line of at most 60 characters."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= 60 else text[:57] + "..."


def count(n: int, one: str, many: str | None = None) -> str:
    """Give a number with its noun: "1 row", "2,000 rows", or with many "2 classes"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def name_some(values: Iterable[object], most: int = 8) -> str:
    """Name the first of some values: "1, 2, 3, ..."."""
    shown = [*map(str, itertools.islice(values, most + 1))]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


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


def parse_yaml(text: str) -> Any:
    """Give the plain values of YAML that anybody may have written.

    Raises:
        InputError: If it is no YAML, or has what no file of ours has: anchors, tags, deep nesting,
            very long values or numbers, long keys that are no text.
    """
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # compiled, it is much faster

    class Loader(base):  # type: ignore[misc, valid-type]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            for key, _ in node.value:
                if not key.tag.endswith(":str") and len(key.value) > MAX_KEY:
                    raise InputError("it has keys that are no text")
            return super().construct_mapping(node, deep)

    def construct_int(loader: Any, node: Any) -> int:
        if len(node.value) > MAX_NUMBER:
            raise InputError(f"it has a number of more than {MAX_NUMBER} characters")
        return loader.construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:int", construct_int)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=base):
            for name in ("anchor", "tag"):
                if getattr(event, name, None) is not None:
                    raise InputError(f"it has YAML {name}s")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(f"it is nested more than {MAX_DEPTH} deep")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_VALUE:
                raise InputError(f"it has a value of more than {MAX_VALUE:,} characters")
        return yaml.load(text, Loader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # as of a date
        raise InputError("it is no YAML") from error


def describe_file(path: Path) -> dict[str, Any]:
    """Give the bytes and the SHA-256 of a file, as a manifest records them."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


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


def first_line(error: BaseException) -> str:
    """Give the first line of the deepest message in a chain of exceptions."""
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
