"""Exact greedy GraphCut picks in O(n d) memory: no matrix of all pairs."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import Similarity

TIE_WIDTH = 1e-9
"""Gains closer than this times the scale of the pool of rows are a tie."""

POOL_ROWS = 1024


def prepare_rows(
    embeddings: Float[ndarray, "n d"], similarity: Similarity
) -> tuple[Float[ndarray, "n d"], float]:
    """Widen the rows to float64 and scale (cosine) or centre (euclidean) them.

    Cosine rows get unit norm, rows of zeros stay zero. Euclidean rows are moved to their mean,
    which changes no distance and makes rounding small. Neither step overflows: rows are first
    divided by a power of two near their largest value (all rows by one, when euclidean).

    Args:
        embeddings: Finite rows of any floating type.
        similarity: Which gain the rows are prepared for.

    Returns:
        A new float64 array, and the power of two by which euclidean rows were divided (1 for
        cosine): gains of the rows as given are those of the array times its square.
    """
    rows = np.array(embeddings, dtype=np.float64)
    unit = 1.0
    if similarity == "cosine":
        peak = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
        rows /= np.where(peak > 0, peak, 1.0)
        norm = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
        rows /= np.where(norm > 0, norm, 1.0)
    else:
        largest = float(np.abs(rows).max(initial=0.0))
        unit = float(2.0 ** np.floor(np.log2(largest))) if largest > 0 else 1.0
        rows /= unit
        rows -= rows.mean(axis=0)
    return rows, unit


def greedy_picks(
    rows: Float[ndarray, "n d"],
    n_picks: int,
    similarity: Similarity,
    on_picks: Callable[[int], object] | None = None,
) -> tuple[Int[ndarray, " picks"], Float[ndarray, " picks"]]:
    r"""Pick rows one after the other, each time the one of largest GraphCut gain.

    With R all rows given and S those picked so far:

    - cosine: $\sum_{p \in R} \langle p, x \rangle - 2 \sum_{p \in S} \langle p, x \rangle$
    - euclidean: $\sum_{p \in S} \|p-x\|^2 - \sum_{p \in R \setminus S} \|p-x\|^2$
      (Dataset Quantization, arXiv:2308.10524, Eq. 1-2)

    Both are linear in the running sum of the picked rows. A pick s moves the gain of x by
    $-2\langle x,s \rangle$ (cosine) or $2\|x-s\|^2$ (euclidean), so after several picks of sum u
    it lies within $2\|x\|\|u\|$, or $4\|x\|\|u\|$ around a known shift, of where it was. Only a
    pool of the best rows is therefore kept exact; it is drawn anew when a row outside could win.
    The picks are those of the plain greedy.

    Gains within 1e-9 x scale of the best are a tie, which the lowest row number wins: two equal
    rows may leave a matrix product with different last bits. The scale is n (cosine) or the
    sum of the squared distances of the rows to their mean (euclidean).

    Args:
        rows: From `prepare_rows`, or a selection of its rows.
        n_picks: How many to pick, at most n.
        similarity: Which gain.
        on_picks: Called now and then with the number of rows picked since its last call.

    Returns:
        The row numbers in pick order, and the gain with which each was picked.
    """
    n_rows = len(rows)
    is_cosine = similarity == "cosine"
    factor = 1.0 if is_cosine else 2.0
    squares = np.einsum("ij,ij->i", rows, rows)
    total = rows.sum(axis=0)
    if is_cosine:
        scale, spread = float(n_rows), np.zeros(n_rows)
    else:
        scale = max(float(squares.sum() - total @ total / n_rows), 0.0)
        spread = squares
    tie = TIE_WIDTH * scale
    norms = np.sqrt(squares)
    widest, widest_spread = norms.max(), spread.max()

    picked = np.empty(n_picks, dtype=np.int64)
    picked_gains = np.empty(n_picks)
    is_open = np.ones(n_rows, dtype=bool)
    picked_sum = np.zeros(rows.shape[1])
    picked_spread = 0.0
    done = 0
    while done < n_picks:
        gains = factor * (rows @ (total - 2 * picked_sum))
        gains += (2 * done - n_rows) * spread + 2 * picked_spread - spread.sum()
        gains[~is_open] = -np.inf
        least = -np.inf
        if n_rows > POOL_ROWS:
            least = min(np.partition(gains, -POOL_ROWS)[-POOL_ROWS], gains.max() - 2 * tie)
        pool = np.flatnonzero(is_open & (gains >= least))
        pool_rows, pool_gains, pool_spread = rows[pool], gains[pool], spread[pool]
        gains[pool] = -np.inf
        best_outside = gains.max()
        since_sum, since_spread, since = np.zeros_like(picked_sum), 0.0, 0
        while done < n_picks:
            best = pool_gains.max()
            if since:
                drift = 2 * factor * float(np.linalg.norm(since_sum))
                line = best - 2 * tie - 2 * since_spread
                loose_bound = best_outside + 2 * since * widest_spread + drift * widest
                if loose_bound > line and np.max(gains + 2 * since * spread + drift * norms) > line:
                    break
            at = int(np.argmax(pool_gains >= best - tie))
            picked[done], picked_gains[done] = pool[at], pool_gains[at]
            is_open[pool[at]] = False
            row = pool_rows[at]
            pool_gains -= 2 * factor * (pool_rows @ row)
            if not is_cosine:
                pool_gains += 2 * (pool_spread + pool_spread[at])
            pool_gains[at] = -np.inf
            since_sum += row
            since_spread += pool_spread[at]
            since += 1
            done += 1
        picked_sum += since_sum
        picked_spread += since_spread
        if on_picks is not None:
            on_picks(since)
    return picked, picked_gains
