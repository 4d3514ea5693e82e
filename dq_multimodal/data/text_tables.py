"""Tables that are text, .csv and .json: what parts their columns, and where their rows are."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from dq_multimodal.config import InputError

HEAD_CHARACTERS = 1 << 16
PROBED_ROWS = 20
SEPARATORS = (";", "\t", "|")


def find_separator(paths: list[str]) -> str:
    """Find what parts the columns of .csv files: a comma, unless it is clearly another.

    It is another if the header has no comma, and the first rows have as many cells as the header,
    at least two.

    Raises:
        InputError: If the files differ.
    """
    found = {_separator_of(path): path for path in paths}
    if len(found) > 1:
        shown = ", ".join(f"{sep!r} in {Path(path).name}" for sep, path in found.items())
        raise InputError(f"the columns of the files are parted in different ways: {shown}")
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


def open_text(path: str) -> IO[str]:
    """Open a UTF-8 file, compressed or not."""
    import fsspec

    return fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig", newline="").open()


def lift_rows(paths: list[str], field: str, place: Path) -> list[str]:
    """Write the list of rows that JSON files hold under a key as files of one row a line.

    Args:
        paths: The files.
        field: The key.
        place: Folder for what is written; files that are there already are kept.

    Raises:
        InputError: If there is no such list of rows.
    """
    return _rewrite(paths, place, lambda path: _rows_of(path, field))


def _rewrite(
    paths: list[str], place: Path, read: Callable[[str], Iterable[dict[str, Any]]]
) -> list[str]:
    """Write the rows of files as files of one row a line; those that are there already are kept."""
    place.mkdir(parents=True, exist_ok=True)
    made = []
    for number, path in enumerate(paths):
        target = place / f"{number:05d}.jsonl"
        made.append(str(target))
        if target.exists():
            continue
        partial = target.with_suffix(f".{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in read(path))
        partial.replace(target)
    return made


def _rows_of(path: str, field: str) -> list[dict[str, Any]]:
    try:
        with open_text(path) as file:
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


@dataclass
class Values:
    """Which kinds of values stand at one place of all rows of JSON files.

    Attributes:
        kinds: Of those that are not null: object, list, text, number or truth value.
        keys: Of the first object.
        is_uneven: Objects have different keys, or none.
        parts: Values by key; those of a list by 0.
    """

    kinds: set[str] = field(default_factory=set)
    keys: set[str] | None = None
    is_uneven: bool = False
    parts: "dict[str | int, Values]" = field(default_factory=dict)

    @property
    def is_mixed(self) -> bool:
        """Whether no type of Arrow holds them all."""
        return self.is_uneven or len(self.kinds) > 1

    def note(self, value: Any) -> None:
        """Take in one value."""
        if value is None:
            return
        self.kinds.add(_kind_of(value))
        if isinstance(value, dict):
            self.keys = self.keys or set(value)
            self.is_uneven |= not value or self.keys != value.keys()
        if self.is_mixed:
            return
        for key, part in _parts_of(value):
            self.parts.setdefault(key, Values()).note(part)

    def paths(self) -> list[list[str | int]]:
        """Give the places below this one where values are mixed."""
        if self.is_mixed:
            return [[]]
        return [[key, *path] for key, part in self.parts.items() for path in part.paths()]

    def pack(self, value: Any) -> Any:
        """Give a value whose mixed parts are texts of JSON."""
        if value is None or (not _parts_of(value) and not self.is_mixed):
            return value
        if self.is_mixed:
            return json.dumps(value)
        if isinstance(value, dict):
            return {key: self.parts[key].pack(part) for key, part in value.items()}
        return [self.parts[0].pack(part) for part in value]


def _kind_of(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "truth", int: "number"}
    return kinds.get(type(value), "number")


def _parts_of(value: Any) -> "Iterable[tuple[str | int, Any]]":
    if isinstance(value, dict):
        return value.items()
    return [(0, part) for part in value] if isinstance(value, list) else ()


def find_mixed(paths: list[str]) -> dict[str, Values] | None:
    """Look at all rows of JSON files for values that no type of Arrow holds.

    The reader of `datasets` looks at the first ten megabytes only. It keeps such values as texts of
    JSON, but takes a text that is JSON itself ("42") for one of its own, and shortens the floats
    of all columns, as it does in a file that is one list.

    Returns:
        The columns that hold such values. None where the reader does well: there are none, and no
        file is a list; or a file is one object over many lines, or holds no objects.
    """
    columns: dict[str, Values] = {}
    is_list = False
    try:
        for path in paths:
            with open_text(path) as file:
                is_list |= file.read(1) == "["
            for row in read_rows(path):
                for name, value in row.items():
                    columns.setdefault(name, Values()).note(value)
    except (json.JSONDecodeError, AttributeError):
        return None
    mixed = {name: values for name, values in columns.items() if values.paths()}
    return mixed if mixed or is_list else None


def read_rows(path: str) -> Iterator[dict[str, Any]]:
    """Read the rows of a JSON file: one a line, or one list of all."""
    with open_text(path) as file:
        first = file.read(1)
        if first == "[":
            yield from json.loads(first + file.read())
            return
        yield from (json.loads(line) for line in _lines(first, file) if line.strip())


def _lines(first: str, file: IO[str]) -> Iterator[str]:
    yield first + file.readline()
    yield from file


def pack_rows(paths: list[str], mixed: dict[str, Values], place: Path) -> list[str]:
    """Write the rows of JSON files as files of one row a line, mixed values as texts of JSON."""

    def read(path: str) -> Iterator[dict[str, Any]]:
        for row in read_rows(path):
            yield {k: mixed[k].pack(v) if k in mixed else v for k, v in row.items()}

    return _rewrite(paths, place, read)
