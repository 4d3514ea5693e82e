"""What scripts beside this one do alike: fail, take the time, write JSON, lay out a table."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def known_model(folder: str) -> str:
    """Read the name of the model of a folder made by recipes/train_extractor.py."""
    return json.loads((Path(folder) / "classifier.json").read_text())["model"]


def fail(message: str) -> NoReturn:
    """Say on one line of stderr what is wrong with the input, and exit with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def timed(work: Callable[[], object]) -> float:
    """Give the seconds that some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def grid(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows, the first being the head, as Markdown."""
    rule = ("---",) * len(rows[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
