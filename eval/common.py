"""What scripts beside this one do alike: run Python, fail, take the time, lay out a table."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn


def command(*arguments: object) -> None:
    """Run a Python command; stop when it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


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
