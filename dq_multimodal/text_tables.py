"""Tables that are text, .csv and .json: what parts their columns, and where their rows are."""

import csv
import io
import json
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
    place.mkdir(parents=True, exist_ok=True)
    made = []
    for number, path in enumerate(paths):
        target = place / f"{number:05d}.jsonl"
        made.append(str(target))
        if target.exists():
            continue
        with open_text(path) as file:
            rows = _rows_of(file, field, path)
        partial = target.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        partial.replace(target)
    return made


def _rows_of(file: IO[str], field: str, path: str) -> list[dict[str, Any]]:
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
