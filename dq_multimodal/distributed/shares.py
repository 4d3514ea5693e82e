"""Bins by several processes: whole strata are dealt, since each stands by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal.config import Similarity
from dq_multimodal.core import Bins, make_bins
from dq_multimodal.core.bins import as_matrix, stratum_codes
from dq_multimodal.distributed.world import ALONE, World


def make_bins_together(
    embeddings: ndarray,
    n_bins: int,
    similarity: Similarity,
    strata: Int[ndarray, " n"],
    *,
    n_left: int = 0,
    on_picks: Callable[[int], object] | None = None,
    folder: Path | None = None,
    world: World = ALONE,
) -> Bins:
    """Make the bins that `core.make_bins` makes, by all processes where there are several strata.

    Args:
        embeddings: (n, d) numbers.
        n_bins: Bins of a stratum.
        similarity: "cosine" or "euclidean".
        strata: Stratum of every row.
        n_left: Numbers of the left factor where embeddings are outer products.
        on_picks: Called now and then with the number of rows picked since.
        folder: Where the others find the embeddings.
        world: The processes; the others have to be in `bin_share`.
    """
    codes = stratum_codes(strata, len(embeddings))
    shares = deal_strata(codes, world.size)
    settings: dict[str, Any] = {"n_bins": n_bins, "similarity": similarity, "n_left": n_left}
    n_busy = sum(len(rows) > 0 for rows in shares)
    if n_busy == 1 or folder is None:
        return make_bins(embeddings, strata=strata, on_picks=on_picks, **settings)
    as_matrix(embeddings)  # an error is to name the row of the whole
    world.post("bins", folder=str(folder.absolute()), codes=codes.astype(np.int32), **settings)
    found = {0: _bin_some(embeddings, shares[0], codes, on_picks=on_picks, **settings)}
    while len(found) < n_busy:
        for rank, theirs in world.receive(wait=True):
            found[rank] = theirs
            if on_picks is not None:
                on_picks(len(shares[rank]))
    numbers, ranks, gains = (
        np.empty(len(codes), dtype=kind) for kind in (np.int64, np.int64, np.float64)
    )
    for share, parts in found.items():
        for column, part in zip((numbers, ranks, gains), parts, strict=True):
            column[shares[share]] = part
    return Bins(bin=numbers, rank=ranks, gain=gains, stratum=codes)


def bin_share(
    embeddings: ndarray, world: World, *, codes: Int[ndarray, " n"], **settings: Any
) -> None:
    """Bin the strata that fall to this process of those that `make_bins_together` shares."""
    rows = deal_strata(codes, world.size)[world.rank]
    if len(rows):
        world.send(_bin_some(embeddings, rows, codes, **settings))


def deal_strata(codes: Int[ndarray, " n"], n_shares: int) -> list[Int[ndarray, " k"]]:
    """Deal whole strata, the largest first, each to the share that has the fewest rows so far.

    Returns:
        Rows of each share, ascending.
    """
    sizes = np.bincount(codes)
    owner = np.zeros(len(sizes), dtype=np.int64)
    totals = np.zeros(n_shares, dtype=np.int64)
    for code in np.argsort(-sizes, kind="stable"):
        owner[code] = np.argmin(totals)
        totals[owner[code]] += sizes[code]
    return [np.flatnonzero(owner[codes] == share) for share in range(n_shares)]


def _bin_some(
    embeddings: ndarray,
    rows: Int[ndarray, " k"],
    codes: Int[ndarray, " n"],
    *,
    n_bins: int,
    similarity: Similarity,
    n_left: int,
    on_picks: Callable[[int], object] | None = None,
) -> tuple[ndarray, ndarray, ndarray]:
    """Give bin, rank and gain of the rows of some whole strata."""
    bins = make_bins(
        embeddings[rows],
        min(n_bins, len(rows)),  # a stratum with fewer rows than bins fills its first ones only
        similarity,
        codes[rows],
        n_left=n_left,
        on_picks=on_picks,
    )
    return bins.bin, bins.rank, bins.gain
