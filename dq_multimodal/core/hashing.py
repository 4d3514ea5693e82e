"""Chance that is the same on every machine and in every release."""

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray


def row_hash(seed: int, n_rows: int) -> UInt64[ndarray, " n"]:
    """Hash the row numbers 0 ... n - 1 with the seed; see `hash_numbers`."""
    return hash_numbers(seed, np.arange(n_rows, dtype=np.uint64))


def hash_numbers(seed: int, numbers: UInt64[ndarray, " n"]) -> UInt64[ndarray, " n"]:
    """Hash numbers with the seed, the same on every machine.

    Two rounds of the splitmix64 finaliser (Steele, Lea and Flood 2014; public-domain constants):
    hash = mix(mix(seed) + number), all modulo 2^64. No library's permutation is used, since those
    change between releases.

    Args:
        seed: Any integer; taken modulo 2^64.
        numbers: What to hash.
    """

    def mix(z: UInt64[ndarray, " k"]) -> UInt64[ndarray, " k"]:
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    start = mix(np.array([int(seed) % 2**64], dtype=np.uint64))
    return mix(start + numbers)
