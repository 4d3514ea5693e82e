"""Parts of similar rows, by k-means on a sample: bins of very many rows are made part by part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import InputError, Similarity
from dq_multimodal.core.bins import as_matrix
from dq_multimodal.core.hashing import hash_numbers

SAMPLE_ROWS = 16_384
ROWS_A_PART = 64
"""The sample holds so many rows, or so many for each part if that is more."""
MAX_STEPS = 25
"""Steps of Lloyd's algorithm, if it is not stable before."""
GRID = 2.0**-26
BLOCK_VALUES = 2**18
HASH_ROWS = 2**20
"""Row numbers that are hashed at a time."""
LARGE_ROWS, LARGE_MEANS = 500_000, 4
"""A part of more rows, and of more than so many times the mean, is cut into pieces."""
SALT, PIECE_SALT = 0x70617274, 0x7069656365
"""Set the hashes of the sample and of the pieces apart from that of the draw."""


def partition_rows(
    embeddings: Any,
    n_parts: int,
    similarity: Similarity = "cosine",
    seed: int = 0,
    *,
    cut_large: bool = True,
    on_rows: Callable[[int], object] | None = None,
) -> Int[ndarray, " n"]:
    r"""Part the rows by k-means: every row goes to the nearest of n_parts centres.

    It is `sample_numbers`, `fit_parts`, `Parts.assign` block by block, `count_pieces` and
    `number_pieces`. A part that loses all its rows is dropped, so fewer parts than asked come back
    where there are fewer distinct rows. Very large parts, such as the many rows of one direction,
    are cut into pieces by chance (see `count_pieces`), so that no part takes far more memory and
    time than the others.

    Args:
        embeddings: See `as_matrix`. Read block by block; memory beside it is that of the sample
            (16,384 rows, or 64 for each part if that is more) and one number a row.
        n_parts: Number of parts K, from 1 to n.
        similarity: "cosine" or "euclidean".
        seed: Seed of the sample and of the first centres.
        cut_large: Whether very large parts are cut.
        on_rows: Called with the number of rows done since (for progress bars).

    Returns:
        Part of every row, 0 ... k - 1, none of them empty; k is at most n_parts, but for pieces.

    Raises:
        InputError: If n_parts or similarity is none of these, or a row is not finite.
    """
    values = as_matrix(embeddings)
    n_rows, width = values.shape
    if isinstance(n_parts, bool) or int(n_parts) != n_parts or not 1 <= n_parts <= n_rows:
        raise InputError(
            f"n_parts must be a whole number from 1 to the {n_rows} rows, got {n_parts}"
        )
    n_parts = int(n_parts)
    largest = None
    if similarity == "euclidean":
        step = _block_rows(width, 1)
        starts = range(0, n_rows, step)
        largest = max(float(np.abs(values[start : start + step]).max()) for start in starts)
    sample = values[sample_numbers(n_rows, n_parts, seed)]
    parts = fit_parts(sample, n_parts, similarity, seed=seed, largest=largest)
    codes = np.zeros(n_rows, dtype=np.int64)
    if n_parts == 1:
        return codes
    step = _block_rows(width, len(parts.centres))
    for start in range(0, n_rows, step):
        block = values[start : start + step]
        codes[start : start + len(block)] = parts.assign(block)
        if on_rows is not None:
            on_rows(len(block))
    n_pieces = count_pieces(np.bincount(codes), n_parts)
    if cut_large and n_pieces.max() > 1:
        for start in range(0, n_rows, HASH_ROWS):
            rows = np.arange(start, min(start + HASH_ROWS, n_rows))
            codes[rows] = number_pieces(codes[rows], rows, n_pieces)
    return np.unique(codes, return_inverse=True)[1].reshape(-1).astype(np.int64)


def sample_numbers(n_rows: int, n_parts: int, seed: int = 0) -> Int[ndarray, " s"]:
    """Choose the rows from which the centres come: those of the lowest hashes.

    Row numbers are hashed block by block, so memory is that of the sample.

    Args:
        n_rows: Rows of the dataset.
        n_parts: Number of parts that are asked for.
        seed: Any integer.

    Returns:
        Numbers of 16,384 rows, or 64 for each part if that is more, or all; ascending.
    """
    size = max(SAMPLE_ROWS, ROWS_A_PART * n_parts)
    if n_rows <= size:
        return np.arange(n_rows)
    picks = np.zeros(0, dtype=np.uint64)
    keys, limit = picks, np.uint64(2**64 - 1)
    for start in range(0, n_rows, HASH_ROWS):
        block = np.arange(start, min(start + HASH_ROWS, n_rows), dtype=np.uint64)
        hashes = hash_numbers(seed ^ SALT, block)
        is_low = hashes <= limit
        picks, keys = np.append(picks, block[is_low]), np.append(keys, hashes[is_low])
        if len(picks) > size:
            lowest = np.argpartition(keys, size - 1)[:size]
            picks, keys = picks[lowest], keys[lowest]
            limit = keys.max()
    return np.sort(picks).astype(np.int64)


def fit_parts(
    sample: Any,
    n_parts: int,
    similarity: Similarity = "cosine",
    *,
    seed: int = 0,
    largest: float | None = None,
) -> "Parts":
    r"""Find the centres of k-means in a sample of the rows.

    It is k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's algorithm until no row of the
    sample changes its part, at most 25 steps. For "euclidean" a centre is the mean of its rows. For
    "cosine" rows and centres have unit length (spherical k-means), and rows of zeros, which have no
    direction, go to part 0.

    Rows and centres are rounded to multiples of $2^{-26}$ at a length of at most 1, so products
    are multiples of $2^{-52}$ and their sums are exact in float64, in whatever order they are
    made. So the parts do not depend on the block size, the number of threads, the BLAS or the
    machine. Ties go to the lower part. `verify` makes the parts of coverage anew, so they must
    not change with a release either: no library's k-means promises that.

    Args:
        sample: (s, d) embeddings of the rows of `sample_numbers`, see `as_matrix`.
        n_parts: Number of parts that are asked for.
        similarity: "cosine" or "euclidean".
        seed: Seed of the first centres.
        largest: Greatest absolute value in the embeddings of all rows; for "euclidean" alone.

    Raises:
        InputError: If similarity is none of these, or "euclidean" comes without largest.
    """
    values = as_matrix(sample)
    if similarity not in ("cosine", "euclidean"):
        raise InputError(f"similarity must be cosine or euclidean, got {similarity!r}")
    place: Directions | Places = Directions()
    if similarity == "euclidean":
        if largest is None:
            raise InputError(
                "euclidean parts need largest, the greatest absolute value of all rows"
            )
        place = Places.around(values, largest)
    uniform = hash_numbers(seed ^ SALT, ~np.arange(n_parts, dtype=np.uint64)) >> np.uint64(11)
    rows = place(values)[0]
    return Parts(find_centres(rows, uniform * 2.0**-53, is_spherical=similarity == "cosine"), place)


@dataclass(frozen=True)
class Parts:
    """Centres of parts, and how rows are brought to their grid.

    Attributes:
        centres: Centre of each part, of length at most 1.
        place: Brings a block of embeddings to the grid of the centres.
    """

    centres: Float[ndarray, "c d"]
    place: "Directions | Places"

    def assign(self, block: ndarray) -> Int[ndarray, " b"]:
        """Give the number of the nearest centre of each row of a block of embeddings."""
        codes = np.empty(len(block), dtype=np.int64)
        step = _block_rows(block.shape[1], len(self.centres))
        for start in range(0, len(block), step):
            rows, unit = self.place(block[start : start + step])
            codes[start : start + step] = nearest(rows, self.centres, unit)
        return codes


def count_pieces(sizes: Int[ndarray, " k"], n_parts: int) -> Int[ndarray, " k"]:
    """Count the pieces into which each part is cut: 1, but for very large parts.

    A part is very large when it has more than 500,000 rows and more than four times the mean. Its
    pieces have about 500,000 rows, or the mean if that is more. K-means cannot part equal rows,
    and one part of most rows would not fit in the memory of a machine.

    Args:
        sizes: Rows of each part.
        n_parts: Number of parts that were asked for, which makes the mean.
    """
    n_rows = int(sizes.sum())
    is_large = (sizes > LARGE_ROWS) & (sizes * n_parts > LARGE_MEANS * n_rows)
    return np.where(is_large, -(-sizes // max(LARGE_ROWS, -(-n_rows // n_parts))), 1)


def piece_of(rows: Int[ndarray, " b"], n_pieces: int | Int[ndarray, " b"]) -> Int[ndarray, " b"]:
    """Draw the piece of each row by a hash of its number.

    Args:
        rows: Row numbers.
        n_pieces: Pieces of the part of all rows, or of each.

    Returns:
        Numbers from 0 to n_pieces - 1.
    """
    hashes = hash_numbers(PIECE_SALT, rows.astype(np.uint64))
    return (hashes % np.asarray(n_pieces, dtype=np.uint64)).astype(np.int64)


def number_pieces(
    parts: Int[ndarray, " b"], rows: Int[ndarray, " b"], n_pieces: Int[ndarray, " k"]
) -> Int[ndarray, " b"]:
    """Number the pieces of all parts one after the other, the empty ones too.

    Args:
        parts: Part of each row.
        rows: Row numbers.
        n_pieces: Pieces of each part, see `count_pieces`.

    Returns:
        Number of the piece of each row, from 0 to the sum of n_pieces - 1.
    """
    return (np.cumsum(n_pieces) - n_pieces)[parts] + piece_of(rows, n_pieces[parts])


def find_centres(
    sample: Float[ndarray, "s d"], uniform: Float[ndarray, " k"], *, is_spherical: bool
) -> Float[ndarray, "c d"]:
    """Find the centres of k-means, at most one for each number in [0, 1) that draws a first centre.

    Rows lie on the grid, of length at most 1; spherical centres have unit length, and rows of zeros
    are left out then.
    """
    if is_spherical:
        sample = sample[sample.any(axis=1)]
    if not len(sample):
        return np.zeros((1, sample.shape[1]))
    centres = _first_centres(sample, uniform)
    codes = np.full(len(sample), -1)
    for _ in range(MAX_STEPS):
        before, codes = codes, nearest(sample, centres)
        if np.array_equal(before, codes):
            break
        used, codes = np.unique(codes, return_inverse=True)
        centres = centres[used]
        means = average_parts(sample, codes, len(used))
        if is_spherical:
            length = np.sqrt(np.vecdot(means, means))[:, None]
            has_one = length > 0  # opposite rows have none: their centre stays where it was
            means = np.where(has_one, _to_grid(means / np.where(has_one, length, 1)), centres)
        centres = means
    return centres


def _first_centres(
    sample: Float[ndarray, "s d"], uniform: Float[ndarray, " k"]
) -> Float[ndarray, "c d"]:
    """Draw centres one by one, each with a chance that grows as its squared distance (k-means++).

    The draw ends early when every row is a centre.
    """
    squares = np.vecdot(sample, sample)
    picks = [int(uniform[0] * len(sample))]
    distance = np.full(len(sample), np.inf)
    for number in uniform[1:]:
        last = picks[-1]
        others = squares + squares[last] - 2 * (sample @ sample[last])
        distance = np.minimum(distance, others)
        total = np.cumsum(distance)
        if total[-1] <= 0:
            break
        at = np.searchsorted(total, number * total[-1], side="right")
        picks.append(int(min(at, np.searchsorted(total, total[-1]))))
    return sample[picks]


def average_parts(
    sample: Float[ndarray, "s d"], codes: Int[ndarray, " s"], n_centres: int
) -> Float[ndarray, "c d"]:
    """Give the mean of the rows of each code, on the grid."""
    sums = np.zeros((n_centres, sample.shape[1]))
    step = _block_rows(sample.shape[1], n_centres)
    for start in range(0, len(sample), step):
        block = slice(start, start + step)
        is_of = codes[block] == np.arange(n_centres)[:, None]
        sums += is_of.astype(np.float64) @ sample[block]
    return _to_grid(sums / np.bincount(codes, minlength=n_centres)[:, None])


def nearest(
    rows: Float[ndarray, "b d"],
    centres: Float[ndarray, "c d"],
    unit: Float[ndarray, " b"] | None = None,
) -> Int[ndarray, " b"]:
    """Give the number of the nearest centre of each row, the lowest of those equally near.

    Both lie on the grid, of length at most 1; unit is the power of two by which each row was
    divided beyond the centres, None is 1 for all.
    """
    half = np.vecdot(centres, centres) / 2
    codes = np.empty(len(rows), dtype=np.int64)
    step = _block_rows(rows.shape[1], len(centres))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        halves = half if unit is None else half / unit[block, None]
        codes[block] = np.argmin(halves - rows[block] @ centres.T, axis=1)
    return codes


class Directions:
    """Gives rows unit length, on the grid; rows of zeros stay zero."""

    def __call__(self, block: ndarray) -> tuple[Float[ndarray, "b d"], Float[ndarray, " b"]]:
        """Give the rows of a block, and the power of two by which each was divided: 1."""
        rows = block.astype(np.float64)
        rows = _to_grid(_shift(rows, -_exponent(rows)))
        length = np.sqrt(np.vecdot(rows, rows))[:, None]
        return _to_grid(rows / np.where(length > 0, length, 1)), np.ones(len(rows))


@dataclass(frozen=True)
class Places:
    """Moves rows to the mean of the sample and divides by powers of two, onto the grid.

    All are divided by the same one, by which no row of the sample is longer than 1, and longer
    rows once more by their own.

    Attributes:
        unit: Exponent of the power of two by which all are multiplied first.
        middle: Mean of the sample then.
        exponent: Exponent of the power of two by which what is left is divided.
    """

    unit: Int[ndarray, " 1"]
    middle: Float[ndarray, " d"]
    exponent: int

    @classmethod
    def around(cls, sample: Float[ndarray, "s d"], largest: float) -> "Places":
        """Fit to a sample of rows none of whose numbers is larger than the largest."""
        unit = np.array([-int(np.frexp(largest)[1])])
        rows = _shift(sample.astype(np.float64), unit)
        middle = rows.mean(axis=0)
        return cls(unit, middle, int(_exponent(rows - middle).max()))

    def __call__(self, block: ndarray) -> tuple[Float[ndarray, "b d"], Float[ndarray, " b"]]:
        """Give the rows of a block, and the power of two by which each was divided beyond that."""
        rows = _shift(block.astype(np.float64), self.unit) - self.middle
        exponent = np.maximum(_exponent(rows), self.exponent)
        return _to_grid(_shift(rows, -exponent)), np.ldexp(1.0, exponent - self.exponent)


def _exponent(rows: Float[ndarray, "b d"]) -> Int[ndarray, " b"]:
    """Give for each row an e for which its length is below 2^e; low enough for zeros."""
    peak = np.abs(rows).max(axis=1)
    root = ((rows.shape[1] - 1).bit_length() + 1) // 2  # sqrt(d) <= 2^root
    return np.where(peak > 0, np.frexp(peak)[1], -1074) + root


def _shift(rows: Float[ndarray, "b d"], exponent: Int[ndarray, " e"]) -> Float[ndarray, "b d"]:
    """Multiply rows by 2^exponent in place, in two steps: one factor could leave the range."""
    half = exponent // 2
    rows *= np.ldexp(1.0, half)[:, None]
    rows *= np.ldexp(1.0, exponent - half)[:, None]
    return rows


def _to_grid(values: Float[ndarray, "*shape"]) -> Float[ndarray, "*shape"]:
    values = values / GRID
    np.rint(values, out=values)
    values *= GRID
    return values


def _block_rows(width: int, n_centres: int) -> int:
    return max(1, BLOCK_VALUES // max(width, n_centres))
