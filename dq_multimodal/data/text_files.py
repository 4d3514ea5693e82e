"""Data files that are text, .csv and .json: their encoding, their separator, their rows."""

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import fsspec

from dq_multimodal.config import InputError

CHUNK_BYTES = 1 << 20
HEAD_CHARACTERS = 1 << 16
PROBED_ROWS = 20
SEPARATORS = (";", "\t", "|")
KINDS = {list: "list", str: "text", bool: "truth value"}

Place = tuple[str | int, ...]
"""Where a value stands in a row: keys of objects, 0 for any item of a list."""


def check_utf8(path: str) -> None:
    """Raise for a file, compressed or not, that is not UTF-8 text."""
    if path.lower().endswith(".zst") and "zstd" not in fsspec.available_compressions():
        raise InputError(f"{path} needs the package zstandard to be read: install or unpack it")
    decoder, n_seen, wrong, other = codecs.getincrementaldecoder("utf-8")(), 0, "", "LATIN1"
    with fsspec.open(path, compression="infer") as file:
        chunk = file.read(CHUNK_BYTES)
        if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in chunk[:1000]:
            wrong, other = "NUL bytes", "UTF-16"
        while not wrong:
            start = n_seen - len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                wrong = f"byte {error.object[error.start]:#04x} at {start + error.start:,}"
            if not chunk:
                break
            n_seen += len(chunk)
            chunk = file.read(CHUNK_BYTES)
    if wrong:
        raise InputError(
            f"{path} is not UTF-8 text ({wrong}): convert it, for example by "
            f"iconv -f {other} -t UTF-8"
        )


def open_text(path: str) -> IO[str]:
    """Open a UTF-8 file, compressed or not."""
    return fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig", newline="").open()


def find_separator(paths: list[str]) -> str:
    """Find what separates the columns of .csv files: a comma, unless it is clearly another.

    It is another if the header has no comma, and the first rows have as many cells as the header,
    at least two. InputError if the files differ.
    """
    found = {_separator_of(path): path for path in paths}
    if len(found) > 1:
        shown = ", ".join(f"{sep!r} in {Path(path).name}" for sep, path in found.items())
        raise InputError(f"the columns of the files are separated in different ways: {shown}")
    return next(iter(found))


def _separator_of(path: str) -> str:
    with open_text(path) as file:
        head = file.read(HEAD_CHARACTERS)
    if len(head) == HEAD_CHARACTERS:
        head = head[: head.rfind("\n") + 1]  # the last line is cut off
    for separator in SEPARATORS:
        rows = list(islice(csv.reader(io.StringIO(head), delimiter=separator), PROBED_ROWS))
        widths = {len(row) for row in rows if row}
        if rows and len(widths) == 1 and widths.pop() > 1 and "," not in "".join(rows[0]):
            return separator
    return ","


def read_rows(path: str, field: str | None = None) -> Iterator[dict[str, Any]]:
    """Read the rows of a JSON file: one a line, one list of all, or the list under a key.

    The list under a key may hold texts in place of objects; InputError if there is none.
    """
    with open_text(path) as file:
        if field is not None:
            yield from _rows_under(path, field, file)
        elif (first := file.read(1)) == "[":
            yield from json.loads(first + file.read())
        else:
            lines = chain([first + file.readline()], file)
            yield from map(json.loads, filter(str.strip, lines))


def _rows_under(path: str, field: str, file: IO[str]) -> list[dict[str, Any]]:
    try:
        content = json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not one JSON object, which --field is for: {error}") from error
    if not isinstance(content, dict) or field not in content:
        held = f"only {', '.join(map(str, content))}" if isinstance(content, dict) else "no object"
        raise InputError(f"{path} has no key {field!r}, {held}")
    rows = content[field]
    if isinstance(rows, list):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{field!r} of {path} must be a list of rows, such as [{{...}}, {{...}}]")
    return rows


def find_mixed(paths: list[str], field: str | None = None) -> set[Place] | None:
    """Find the places in the rows of JSON files whose values no type of Arrow can hold.

    These are values of different kinds, and objects with different keys or none. The reader of
    `datasets` looks at the first ten megabytes only. It keeps such values as texts of JSON, but
    takes a text that is JSON itself ("42") for one of its own, and shortens the floats of all
    columns, as it does in a file that is one list.

    Returns:
        The places. None where that reader does well: there are none, and no file is a list or read
        by a key; or a file is one object over many lines, or holds no objects.
    """
    kinds: dict[Place, Any] = {}
    mixed: set[Place] = set()

    def note(value: Any, place: Place) -> None:
        if value is None or place in mixed:
            return
        kind = frozenset(value) if isinstance(value, dict) else KINDS.get(type(value), "number")
        if not kind or kinds.setdefault(place, kind) != kind:
            mixed.add(place)
        elif isinstance(value, dict):
            for key, part in value.items():
                note(part, (*place, key))
        elif isinstance(value, list):
            for part in value:
                note(part, (*place, 0))

    is_list = False
    try:
        for path in paths:
            if field is None:
                with open_text(path) as file:
                    is_list |= file.read(1) == "["
            for row in read_rows(path, field):
                for name, value in row.items():
                    note(value, (name,))
    except (json.JSONDecodeError, AttributeError):
        return None
    mixed = {place for place in mixed if not any(place[:k] in mixed for k in range(len(place)))}
    return mixed if mixed or is_list or field is not None else None


def write_rows(paths: list[str], mixed: set[Place], folder: Path, field: str | None) -> list[str]:
    """Write the rows of JSON files as files of one row a line, mixed values as texts of JSON.

    Files that are in the folder already are kept; see `find_mixed` and `read_rows`.
    """

    def pack(value: Any, place: Place) -> Any:
        if value is None or place in mixed:
            return value if value is None else json.dumps(value)
        if isinstance(value, dict):
            return {key: pack(part, (*place, key)) for key, part in value.items()}
        return [pack(part, (*place, 0)) for part in value] if isinstance(value, list) else value

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, path in enumerate(paths):
        target = folder / f"{number:05d}.jsonl"
        made.append(str(target))
        if target.exists():
            continue
        partial = target.with_suffix(f".{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as lines:
            for row in read_rows(path, field):
                lines.write(json.dumps(pack(row, ())) + "\n")
        partial.replace(target)
    return made
