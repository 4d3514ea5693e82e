"""What processes tell each other, as bytes: JSON, and the raw numbers of arrays behind it.

Data only. Whoever can reach the store can at most say something wrong, not run anything.
"""

import json
import math
from typing import Any

import numpy as np
from numpy import ndarray

from dq_multimodal.config import InputError

HEAD_BYTES = 8
"""The length of the JSON part stands first."""
KINDS = "biuf"
"""Arrays hold booleans, whole numbers or floats."""


def pack(message: Any) -> bytes:
    """Turn None, booleans, numbers, texts, arrays, and lists, tuples and dicts of them into bytes.

    Raises:
        TypeError: For anything else.
    """
    arrays: list[ndarray] = []

    def plain(part: Any) -> Any:
        if part is None or type(part) in (bool, int, float, str):
            return part
        if isinstance(part, list):
            return [plain(item) for item in part]
        if isinstance(part, tuple):
            return {"tuple": [plain(item) for item in part]}
        if isinstance(part, dict):  # JSON itself would make texts of all keys
            return {"dict": [[plain(key), plain(value)] for key, value in part.items()]}
        if isinstance(part, ndarray) and part.dtype.kind in KINDS:
            arrays.append(part)
            return {"array": [part.dtype.str, part.shape]}
        raise TypeError(f"a message cannot hold a {type(part).__name__}")

    head = json.dumps(plain(message)).encode()
    return b"".join([len(head).to_bytes(HEAD_BYTES), head, *(part.tobytes() for part in arrays)])


def unpack(blob: bytearray) -> Any:
    """Give back what `pack` was given; arrays share the memory of the bytes.

    Raises:
        InputError: If the bytes are no message.
    """
    place = HEAD_BYTES + int.from_bytes(blob[:HEAD_BYTES])

    def array(kind: str, shape: list[int]) -> ndarray:
        nonlocal place
        dtype, size = np.dtype(str(kind)), math.prod(shape)
        if dtype.kind not in KINDS or min(shape, default=0) < 0:
            raise ValueError("an array of another kind")
        start, place = place, place + size * dtype.itemsize
        return np.frombuffer(memoryview(blob)[start:place], dtype, size).reshape(shape)

    def value(part: Any) -> Any:
        if isinstance(part, list):
            return [value(item) for item in part]
        if not isinstance(part, dict):
            return part
        [(kind, given)] = part.items()
        if kind == "tuple":
            return tuple(value(item) for item in given)
        if kind == "dict":
            return {value(key): value(held) for key, held in given}
        if kind == "array":
            return array(*given)
        raise ValueError(f"an unknown kind {kind}")

    try:
        message = value(json.loads(blob[HEAD_BYTES:place]))
        if place != len(blob):
            raise ValueError("a wrong length")
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"got a message of another process that is none: {error}") from error
    return message
