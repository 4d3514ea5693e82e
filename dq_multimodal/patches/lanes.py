"""Entropy coding for many images at once: interleaved rANS with tables of Student-t residuals.

Every image has its own bytes and one or more lanes, that is coder states which share one stream
of 16-bit words (Duda, "Asymmetric numeral systems", arXiv:1311.2540; Giesen, "Interleaved entropy
coders", arXiv:1402.3392). Lanes of all images step together, one symbol each, in numpy.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8
from numpy import ndarray

PHASES = 8
"""Predictions are known to 1/8; a table's middle lies at phase/8."""

PER_OCTAVE = 4
LOWEST_OCTAVE, N_OCTAVES = -4, 12
N_SCALES = PER_OCTAVE * N_OCTAVES
CERTAIN = N_SCALES * PHASES
"""The table after the last: symbol 0 takes everything, so coding it changes no state."""

TOTAL_BITS = 16
LOWEST_STATE = 1 << 16
"""States lie in [2^16, 2^32); every lane starts here, so decoding must end here."""

SYMBOLS_PER_LANE, MOST_LANES = 768, 32


def log_bin(
    x: Float32[ndarray, "*shape"], per_octave: int, lowest: int, n_bins: int
) -> Int[ndarray, "*shape"]:
    """Number the bins of a positive number, evenly spaced inside each octave, from 2^lowest on."""
    # A float's bits are its octave and then its place within: an exact logarithm of sorts.
    bits = x.view(np.int32) >> (23 - (per_octave.bit_length() - 1))
    return np.clip(bits - (127 + lowest) * per_octave, 0, n_bins - 1).astype(np.int64)


@lru_cache(maxsize=1)
def frequencies() -> Int[ndarray, "tables 256"]:
    r"""Give integer frequencies, of sum 2^16, of a residual modulo 256 under every table.

    Table `8 i + j` is Student's t with 4 degrees of freedom, middle j/8 and scale s_i, cut to
    [-128.5, 127.5]. Its distribution function is algebraic: with $u = x/s$ and $q = 1 + u^2/4$,
    $F = 1/2 + 3/8 \cdot u/\sqrt q \cdot (1 - u^2 / 12q)$. Only correctly rounded operations are
    used, so every machine gets the same integers. Each symbol has 1 at least.
    """
    octave, part = np.divmod(np.arange(N_SCALES), PER_OCTAVE)
    scale = np.ldexp((part + 0.5) / PER_OCTAVE + 1, octave + LOWEST_OCTAVE)[:, None, None]
    middle = (np.arange(PHASES) / PHASES)[:, None]
    u = (np.arange(-128, 129) - 0.5 - middle) / scale
    q = 1 + u * u / 4
    below = 0.375 * (u / np.sqrt(q)) * (1 - u * u / (12 * q))
    below -= below[..., :1]
    share = below / below[..., -1:]
    bound = np.floor(share * ((1 << TOTAL_BITS) - 256)).astype(np.int64)
    counts = np.diff(np.maximum.accumulate(bound, axis=-1), axis=-1) + 1
    counts = np.roll(counts, -128, axis=-1).reshape(-1, 256)
    certain = np.zeros((1, 256), dtype=np.int64)
    certain[0, 0] = 1 << TOTAL_BITS
    return np.concatenate([counts, certain])


@lru_cache(maxsize=1)
def starts() -> Int[ndarray, "tables 256"]:
    """Give the sum of the frequencies of all lower symbols."""
    counts = frequencies()
    return np.cumsum(counts, axis=1) - counts


@lru_cache(maxsize=1)
def _symbols() -> UInt8[ndarray, " slots"]:
    """Give the symbol of every slot of every table, table after table."""
    counts = frequencies()
    alphabet = np.arange(256, dtype=np.uint8)
    return np.concatenate([np.repeat(alphabet, row) for row in counts])


def count_lanes(n_symbols: Int[ndarray, " b"]) -> Int[ndarray, " b"]:
    """Give the number of lanes of images with so many symbols; a lane costs 2 bytes."""
    return np.clip(n_symbols // SYMBOLS_PER_LANE, n_symbols > 0, MOST_LANES)


def plan_rounds(
    keep: Bool[ndarray, "*shape b"], n_lanes: Int[ndarray, " b"]
) -> Int[ndarray, "rounds lanes b"]:
    """Deal the kept places of every image out to its lanes.

    Returns:
        For each round and lane a place in the flattened array; its size stands for none.
    """
    n_images, most = len(n_lanes), int(n_lanes.max())
    flat = keep.reshape(-1, n_images)
    places = np.flatnonzero(flat)
    image = places % n_images
    nth = (np.cumsum(flat, axis=0) - 1).ravel()[places]
    turn, lane = np.divmod(nth, n_lanes[image])
    plan = np.full((int(turn.max(initial=-1)) + 1, most, n_images), keep.size)
    plan[turn, lane, image] = places
    return plan


def write_lanes(
    tables: Int[ndarray, "rounds lanes b"],
    symbols: Int[ndarray, "rounds lanes b"],
    n_lanes: Int[ndarray, " b"],
) -> list[bytes]:
    """Code the rounds, last first, and give each image its states and words."""
    n_rounds, most, n_images = tables.shape
    which = (tables.astype(np.int32) * 256 + symbols).reshape(n_rounds, -1)
    frequency, start = frequencies().ravel(), starts().ravel()
    state = np.full(most * n_images, LOWEST_STATE)
    out_lane, out_word = [], []
    for row in which[::-1]:
        count = frequency.take(row)
        full = np.flatnonzero(state >= count << 16)
        high = state[full]
        out_lane.append(full)
        out_word.append(high & 0xFFFF)
        state[full] = high >> 16
        state += state // count * ((1 << TOTAL_BITS) - count) + start.take(row)
    image = np.concatenate([*out_lane[::-1], np.empty(0, np.int64)]) % n_images
    words = np.concatenate([*out_word[::-1], np.empty(0, np.int64)]).astype("<u2")
    by_image = words[np.argsort(image, kind="stable")]
    ends = np.cumsum(np.bincount(image, minlength=n_images))[:-1]
    heads = state.astype("<u4").reshape(most, n_images).T
    return [
        heads[i, : n_lanes[i]].tobytes() + part.tobytes()
        for i, part in enumerate(np.split(by_image, ends))
    ]


class LaneReader:
    """The states of all lanes of several images while they are decoded."""

    def __init__(self, payloads: list[bytes], n_lanes: Int[ndarray, " b"]):
        self.state = np.full((int(n_lanes.max(initial=0)), len(payloads)), LOWEST_STATE)
        parts = []
        for i, (payload, n) in enumerate(zip(payloads, n_lanes.tolist(), strict=True)):
            if len(payload) < 4 * n or len(payload) % 2:
                raise ValueError(f"payload {i} has a wrong length")
            self.state[:n, i] = np.frombuffer(payload, "<u4", n)
            parts.append(np.frombuffer(payload, "<u2", offset=4 * n))
        self._end = np.cumsum([len(part) for part in parts])
        self._next = self._end - [len(part) for part in parts]
        self._words = np.concatenate([*parts, np.zeros(1, "<u2")]).astype(np.int64)

    def read(self, tables: Int[ndarray, "rounds lanes b"]) -> UInt8[ndarray, "rounds lanes b"]:
        """Decode one symbol of every lane in every round."""
        symbols = np.empty(tables.shape, dtype=np.uint8)
        symbol_at, frequency, start = _symbols(), frequencies().ravel(), starts().ravel()
        state, following = self.state, self._next
        for row, slot, symbol in zip(tables << 8, tables << TOTAL_BITS, symbols, strict=True):
            low = state & ((1 << TOTAL_BITS) - 1)
            symbol_at.take(slot + low, out=symbol, mode="clip")
            which = row + symbol
            low -= start.take(which)
            state = state >> TOTAL_BITS
            state *= frequency.take(which)
            state += low
            # The lanes of an image that have become small take the next words in turn.
            is_small = state < LOWEST_STATE
            taken = np.cumsum(is_small, axis=0)
            taken += following
            word = self._words.take(taken - 1, mode="clip")
            state = np.where(is_small, (state << 16) | word, state)
            following = taken[-1]
        self.state, self._next = state, following
        return symbols

    def finish(self) -> None:
        """Raise unless all words were read and every lane is back where encoding began."""
        is_bad = (self._next != self._end) | (self.state != LOWEST_STATE).any(axis=0)
        if is_bad.any():
            raise ValueError(f"payload {int(np.argmax(is_bad))} is damaged or has another mask")
