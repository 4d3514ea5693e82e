"""Greedy runs of many small strata in lockstep, on an accelerator."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dq_multimodal.config import Similarity
from dq_multimodal.core.greedy import TIE_WIDTH

if TYPE_CHECKING:
    from torch import Tensor

MAX_ROWS = 8192
"""Rows of a stratum whose pairs are multiplied out; larger ones go to `Sweep`."""

CHUNK_BYTES = 2**33
"""Memory that the strata of one chunk may take on the device."""


def bin_in_lockstep(
    values: Float[ndarray, "n d"],
    strata: list[ndarray],
    n_bins: int,
    similarity: Similarity,
    device: str,
    on_picks: Callable[[int], object] | None = None,
) -> Iterator[tuple[ndarray, ndarray, ndarray, ndarray]]:
    """Part many strata into bins, one pick of each stratum at a time.

    The same picks as by `GraphCut`: gains and decisions are float64, with the same tie rule. Here
    the pairs of a stratum are multiplied out, chunk by chunk of strata, and a pick of all strata
    costs a few operations on one number a row.

    Args:
        values: Finite rows of any floating type.
        strata: Rows of each stratum, ascending, at most `MAX_ROWS`.
        n_bins: Bins in each stratum.
        similarity: Which gain.
        device: "cuda", or "cpu".
        on_picks: Called now and then with the number of rows picked since.

    Yields:
        Of each stratum its rows, their bins, ranks and gains.
    """
    import torch

    for chunk in _chunks(sorted(strata, key=len), values.shape[1]):
        sizes = torch.tensor([len(rows) for rows in chunk], device=device)
        padded = torch.zeros(len(chunk), int(sizes.max()), values.shape[1], dtype=torch.float64)
        padded = padded.to(device)
        units = []
        for place, rows in enumerate(chunk):
            given = torch.from_numpy(np.ascontiguousarray(values[rows])).to(device).double()
            padded[place, : len(rows)], unit = _prepare(given, similarity)
            units.append(unit)
        found = [part.cpu().numpy() for part in _pick(padded, sizes, n_bins, similarity)]
        for place, rows in enumerate(chunk):
            bins, ranks, gains = (part[place, : len(rows)] for part in found)
            with np.errstate(over="ignore"):
                yield rows, bins, ranks, gains * units[place] * units[place]
        if on_picks is not None:
            on_picks(sum(len(rows) for rows in chunk))


def _chunks(strata: list[ndarray], n_columns: int) -> Iterator[list[ndarray]]:
    """Cut strata, sorted by size, into chunks that fit the memory when padded to the longest."""
    chunk: list[ndarray] = []
    for rows in strata:
        longest = len(rows)
        if chunk and 8 * (len(chunk) + 1) * longest * (longest + n_columns + 16) > CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(rows)
    if chunk:
        yield chunk


def _prepare(rows: "Tensor", similarity: Similarity) -> "tuple[Tensor, float]":
    """Scale rows to unit norm (cosine), or divide by a power of two and centre (euclidean)."""
    if similarity == "euclidean":
        largest = float(rows.abs().max())
        unit = float(2.0 ** np.floor(np.log2(largest))) if largest > 0 else 1.0
        rows = rows / unit
        return rows - rows.mean(dim=0), unit
    peak = rows.abs().amax(dim=1, keepdim=True)
    rows = rows / peak.where(peak > 0, peak.new_ones(()))
    norm = rows.norm(dim=1, keepdim=True)
    return rows / norm.where(norm > 0, norm.new_ones(())), 1.0


def _pick(
    rows: "Tensor", sizes: "Tensor", n_bins: int, similarity: Similarity
) -> "tuple[Tensor, Tensor, Tensor]":
    """Make all bins of all strata; rows are (s, n, d), of which the first `sizes` count."""
    import torch

    n_strata, n_rows, _ = rows.shape
    is_cosine = similarity == "cosine"
    products = rows @ rows.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2).clone()
    places = torch.arange(n_rows, device=rows.device)
    strata = torch.arange(n_strata, device=rows.device)
    is_open = places < sizes[:, None]
    bins = torch.full((n_strata, n_rows), -1, device=rows.device)
    ranks, gains_made = torch.zeros_like(bins), torch.zeros_like(squares)
    left = sizes.clone()
    for b in range(n_bins):
        counts = -(-left // (n_bins - b))
        weights = is_open.double()
        to_all = (products @ weights[:, :, None])[:, :, 0]
        n_left = left.double()
        if is_cosine:
            gains, scale = to_all.clone(), n_left
        else:
            total = (squares * weights).sum(1)
            gains = 2 * to_all - n_left[:, None] * squares - total[:, None]
            of_mean = (to_all * weights).sum(1) / n_left.clamp(min=1)
            scale = (total - of_mean).clamp(min=0)
        gains[~is_open] = -torch.inf
        for rank in range(int(counts.max())):
            is_active = rank < counts
            best = gains.max(dim=1, keepdim=True).values
            is_tied = gains >= best - TIE_WIDTH * scale[:, None]
            at = torch.where(is_tied, places, n_rows - 1).amin(dim=1)
            is_picked = (places == at[:, None]) & is_active[:, None]
            bins.masked_fill_(is_picked, b)
            ranks.masked_fill_(is_picked, rank)
            gains_made = torch.where(is_picked, gains, gains_made)
            change = -2 * products[strata, at]
            if not is_cosine:
                change = 2 * (change + squares + squares[strata, at, None])
            gains = torch.where(is_active[:, None], gains + change, gains)
            gains.masked_fill_(is_picked, -torch.inf)
            is_open &= ~is_picked
        left -= counts
    return bins, ranks, gains_made
