"""Exact greedy GraphCut picks in O(n d) memory: no matrix of all pairs."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import Similarity

TIE_WIDTH = 1e-9
"""Gains closer than this times the scale of the pool of rows are a tie."""

POOL_ROWS = 1024


class OuterProducts:
    r"""Rows that are outer products $a_i b_i^T$, never multiplied out.

    $\langle a_i b_i^T, a_j b_j^T \rangle = \langle a_i, a_j \rangle \langle b_i, b_j \rangle$,
    and $\langle a_i b_i^T, V \rangle = a_i^T V b_i$, so inner products need the factors alone.
    They behave as the (n, k d) array of the flattened products as far as `greedy_picks` asks.

    Args:
        left: The factors a, (n, k).
        right: The factors b, (n, d).
    """

    def __init__(self, left: Float[ndarray, "n k"], right: Float[ndarray, "n d"]) -> None:
        self.left, self.right = left, right
        self.shape = (len(left), left.shape[1] * right.shape[1])

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, rows: ndarray) -> "OuterProducts":
        return OuterProducts(self.left[rows], self.right[rows])

    def __matmul__(self, vector: Float[ndarray, " kd"]) -> Float[ndarray, " n"]:
        matrix = vector.reshape(self.left.shape[1], self.right.shape[1])
        return np.einsum("ij,ij->i", self.left @ matrix, self.right)

    def sum(self) -> Float[ndarray, " kd"]:
        """Give the sum of all products, flattened."""
        return (self.left.T @ self.right).ravel()

    def squares(self) -> Float[ndarray, " n"]:
        """Give the squared norm of every product."""
        return _squares(self.left) * _squares(self.right)

    def products(self, row: int) -> Float[ndarray, " n"]:
        """Give the inner products of all rows with one of them."""
        return (self.left @ self.left[row]) * (self.right @ self.right[row])

    def vector(self, row: int) -> Float[ndarray, " kd"]:
        """Multiply one product out, flattened."""
        return np.outer(self.left[row], self.right[row]).ravel()


class PlainRows:
    """Rows of a matrix, with the few operations that `greedy_picks` asks for."""

    def __init__(self, rows: Float[ndarray, "n d"]) -> None:
        self.rows, self.shape = rows, rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: ndarray) -> "PlainRows":
        return PlainRows(self.rows[rows])

    def __matmul__(self, vector: Float[ndarray, " d"]) -> Float[ndarray, " n"]:
        return self.rows @ vector

    def sum(self) -> Float[ndarray, " d"]:
        """Give the sum of all rows."""
        return self.rows.sum(axis=0)

    def squares(self) -> Float[ndarray, " n"]:
        """Give the squared norm of every row."""
        return _squares(self.rows)

    def products(self, row: int) -> Float[ndarray, " n"]:
        """Give the inner products of all rows with one of them."""
        return self.rows @ self.rows[row]

    def vector(self, row: int) -> Float[ndarray, " d"]:
        """Give one row."""
        return self.rows[row]


Rows = PlainRows | OuterProducts


def _squares(rows: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
    return np.einsum("ij,ij->i", rows, rows)


def prepare_rows(
    embeddings: Float[ndarray, "n d"], similarity: Similarity, n_left: int = 0
) -> tuple["Rows", float]:
    """Widen the rows to float64 and scale (cosine) or centre (euclidean) them.

    Cosine rows get unit norm, rows of zeros stay zero. Euclidean rows are moved to their mean,
    which changes no distance and makes rounding small. Neither step overflows: rows are first
    divided by a power of two near their largest value (all rows by one, when euclidean). Outer
    products are scaled factor by factor, and not moved: a moved one is no product any more.

    Args:
        embeddings: Finite rows of any floating type.
        similarity: Which gain the rows are prepared for.
        n_left: 0 for plain rows; else a row is the outer product of its first n_left numbers and
            the others.

    Returns:
        The rows, widened, and the power of two by which euclidean rows were divided (1 for
        cosine): gains of the rows as given are those of the rows here times its square.
    """
    rows = np.array(embeddings, dtype=np.float64)
    if n_left:
        left, left_unit = _scale(rows[:, :n_left], similarity)
        right, right_unit = _scale(rows[:, n_left:], similarity)
        return OuterProducts(left, right), left_unit * right_unit
    rows, unit = _scale(rows, similarity)
    if similarity == "euclidean":
        rows -= rows.mean(axis=0)
    return PlainRows(rows), unit


def _scale(
    rows: Float[ndarray, "n d"], similarity: Similarity
) -> tuple[Float[ndarray, "n d"], float]:
    """Give rows unit norm (cosine), or divide all of them by one power of two (euclidean)."""
    if similarity == "euclidean":
        largest = float(np.abs(rows).max(initial=0.0))
        unit = float(2.0 ** np.floor(np.log2(largest))) if largest > 0 else 1.0
        return rows / unit, unit
    peak = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    rows = rows / np.where(peak > 0, peak, 1.0)
    norm = np.sqrt(_squares(rows))[:, None]
    return rows / np.where(norm > 0, norm, 1.0), 1.0


def greedy_picks(
    rows: Rows,
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
    squares = rows.squares()
    total = rows.sum()
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
            pool_gains -= 2 * factor * pool_rows.products(at)
            if not is_cosine:
                pool_gains += 2 * (pool_spread + pool_spread[at])
            pool_gains[at] = -np.inf
            since_sum += pool_rows.vector(at)
            since_spread += pool_spread[at]
            since += 1
            done += 1
        picked_sum += since_sum
        picked_spread += since_spread
        if on_picks is not None:
            on_picks(since)
    return picked, picked_gains
