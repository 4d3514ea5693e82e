"""Results: one JSON line for every finished cell, in eval/results/SUITE.jsonl."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dq_multimodal.config import InputError

KEY = ("task", "selection", "keep", "protocol", "net", "draw", "seed", "digest")
"""What tells cells of one kind of device apart; `digest` is of data, rows and settings."""


def digest(*parts: Any) -> str:
    """Give 12 hexadecimal digits of what JSON can hold."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key_of(line: dict[str, Any], device_type: str | None = None) -> tuple[Any, ...]:
    """Give what a cell is known by, on one kind of device (cpu or cuda)."""
    return (*(line[name] for name in KEY), device_type or line["device"]["type"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the finished cells; a last line that was cut short by a kill does not count.

    Raises:
        InputError: If any other line is no JSON object of a cell, or the file cannot be read.
    """
    try:
        texts = whole_lines(path.read_bytes()).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            hash(key_of(line))
            [float(found["last"]) for found in line["metrics"].values()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}, line {number} is no result of a cell") from None
        lines.append(line)
    return lines


def whole_lines(data: bytes) -> bytes:
    """Leave out the last line if it has no end and is no JSON."""
    whole, end, last = data.rpartition(b"\n")
    try:
        json.loads(last)
    except ValueError:
        return whole + end
    return data


@contextmanager
def appending(path: Path) -> Iterator[Any]:
    """Open a results file for one writer at a time; gives the function that appends a line.

    Raises:
        InputError: If another process writes to it, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is being written by another run") from None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    with file:
        file.seek(0)
        whole = whole_lines(file.read())
        file.truncate(len(whole))
        if whole and not whole.endswith(b"\n"):
            file.write(b"\n")

        def append(line: dict[str, Any]) -> None:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append
