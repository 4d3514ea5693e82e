"""Sizes of memory and files as people write them."""

import math
from typing import Any

from dq_multimodal.config import InputError

SIZE_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}


def parse_bytes(value: Any) -> int:
    """Read a size of memory: a number of bytes, or a text such as "8GB", "500 MB" or "2GiB".

    Raises:
        InputError: If it is none, or less than one byte.
    """
    text = str(value).strip().lower()
    number = text.rstrip("kmgtib").strip()
    unit = text[len(number) :].strip() or "b"
    try:
        size = float(number) * SIZE_UNITS[unit]
        if isinstance(value, bool) or not 1 <= size < math.inf:
            raise ValueError(value)
    except (ValueError, KeyError):
        raise InputError(
            f"max_memory must be a size such as 8GB, 500MB or 2GiB, got {value}"
        ) from None
    return int(size)


def format_bytes(size: int) -> str:
    """Write a size for people, in powers of 1,000, never below what it is."""
    for power, unit in enumerate(("bytes", "kB", "MB", "GB")):
        if size < 1000 ** (power + 1) or unit == "GB":
            break
    scaled = math.ceil(10 * size / 1000**power) / 10
    return f"{scaled:,.1f}".removesuffix(".0") + f" {unit}"
