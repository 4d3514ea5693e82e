"""Groups of rows that nearly say the same, found among all pairs without holding them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.report.compare import sample_rows
from dq_multimodal.report.vectors import Block, OnPairs, Vectors

TEXT_THRESHOLD = 0.95
IMAGE_THRESHOLD = 0.99
"""Image features of small nets crowd together: at 0.98 whole classes of CIFAR-10 chain into one."""

MAX_ROWS = 60_000
"""Of up to 384 numbers each; beyond, rows are sampled."""
LEFT_ROWS = 2048
RIGHT_ROWS = 8192
N_DIRECTIONS = 96
"""Directions in which pairs are compared first."""
SLACK = 1e-5
"""Rounding of float32 that the first comparison allows for."""
MANY = 0.02
"""Where more than this share of a tile might be alike, the whole tile is compared in full."""
STRIP_ROWS = 128
"""In such a tile, pairs are listed for so many rows at a time."""
VERIFY_PAIRS = 32768


@dataclass(frozen=True)
class Groups:
    """Groups of near-duplicates, the largest first.

    Attributes:
        members: Row numbers of each group, ascending.
        n_searched: Rows that were compared, all pairs of them.
        n_readable: Rows that have an embedding.
        threshold: Cosine similarity from which two rows count as alike.
    """

    members: list[Int[ndarray, " m"]]
    n_searched: int
    n_readable: int
    threshold: float


def find_groups(
    vectors: Vectors,
    threshold: float,
    seed: int,
    *,
    max_rows: int = MAX_ROWS,
    on_pairs: OnPairs | None = None,
) -> Groups:
    """Find the connected components of the graph of all pairs at or above a similarity.

    Rows that are equal to the last bit are one node, so a dataset of one row over and over costs
    nothing. Pairs are looked at tile by tile, and only a component number a row is held.

    Args:
        vectors: The embeddings, opened for cosine similarity.
        threshold: Cosine similarity from which two rows count as alike.
        seed: Seed of the sample.
        max_rows: More rows than this mean a seeded sample.
        on_pairs: Called now and then with the number of pairs compared since.
    """
    readable = np.flatnonzero(~vectors.is_blank)
    size = int(max_rows * min(1.0, (384 / vectors.dimension) ** 0.5))
    rows = sample_rows(readable, size, seed)
    if len(rows) < 2:
        return Groups([], len(rows), len(readable), threshold)
    first, same = _collapse(vectors, rows)
    component = _join(vectors.take(rows[first]), threshold, on_pairs)[same]
    by_component = np.argsort(component, kind="stable")
    sizes = np.bincount(component)
    parts = np.split(rows[by_component], np.cumsum(sizes)[:-1])
    members = [part for part in parts if len(part) > 1]
    members.sort(key=lambda part: (-len(part), int(part[0])))
    return Groups(members, len(rows), len(readable), threshold)


def _collapse(
    vectors: Vectors, rows: Int[ndarray, " n"]
) -> tuple[Int[ndarray, " u"], Int[ndarray, " n"]]:
    """Find the rows that differ in some bit: where each stands first, and which one a row is."""
    values = np.ascontiguousarray(vectors.values[rows])
    keys = values.view(np.dtype((np.void, values.itemsize * values.shape[1]))).ravel()
    _, first, same = np.unique(keys, return_index=True, return_inverse=True)
    return first, same.reshape(-1)


def _directions(block: Block) -> Float[ndarray, "n k"] | None:
    """Give rows of few numbers whose inner products are never below the true ones.

    With Q orthonormal, <a, b> = <Qa, Qb> + <a - QQ'a, b - QQ'b>, and the last term is at most the
    product of the norms of what is left of a and of b, which becomes the last number. Q is near
    the main directions, by two steps of subspace iteration on some rows.
    """
    values = block.factors[0]
    if len(block.factors) > 1 or values.shape[1] < 2 * N_DIRECTIONS or len(values) < RIGHT_ROWS:
        return None
    some = values[:: max(1, len(values) // 4096)]
    basis = np.random.default_rng(0).standard_normal((values.shape[1], N_DIRECTIONS))
    basis = basis.astype(np.float32)
    for _ in range(2):
        basis = np.linalg.qr(some.T @ (some @ basis))[0]
    short = values @ basis
    left = np.sqrt(np.maximum(block.squares - np.einsum("ij,ij->i", short, short), 0))
    return np.concatenate([short, left[:, None]], axis=1)


def _join(block: Block, threshold: float, on_pairs: OnPairs | None) -> Int[ndarray, " n"]:
    """Number the connected components of rows that are all different."""
    n_rows = len(block)
    component = np.arange(n_rows)
    short = _directions(block)
    for start in range(0, n_rows, LEFT_ROWS):
        for other in range(start, n_rows, RIGHT_ROWS):
            left, right = slice(start, start + LEFT_ROWS), slice(other, other + RIGHT_ROWS)
            size = len(component[left]) * len(component[right])
            if on_pairs is not None:
                on_pairs(size)
            if (
                component[left].min()
                == component[left].max()
                == component[right].min()
                == (component[right].max())
            ):
                continue  # all of them are one group already
            is_sure, line = short is None, threshold - (0 if short is None else SLACK)
            if short is None:
                tile = block[left].products(block[right])
            else:
                tile = short[left] @ short[right].T
            is_near = tile >= line
            is_crowded = np.count_nonzero(is_near) > MANY * size
            if is_crowded and not is_sure:
                is_near, is_sure = block[left].products(block[right]) >= threshold, True
            height = STRIP_ROWS if is_crowded else LEFT_ROWS
            for top in range(0, len(tile), height):
                is_alike = is_near[top : top + height]
                if is_crowded:  # leaves out what is joined already, before it is listed
                    ours = component[start + top : start + top + len(is_alike)]
                    is_alike &= ours[:, None] != component[right]
                places = np.flatnonzero(is_alike)  # many times faster than in two dimensions
                rows, others = np.divmod(places, is_alike.shape[1])
                rows, others = rows + start + top, others + other
                is_open = (rows < others) & (component[rows] != component[others])
                rows, others = rows[is_open], others[is_open]
                if not is_sure:
                    is_true = _verify(block, rows, others, threshold)
                    rows, others = rows[is_true], others[is_true]
                if len(rows):
                    component = _merge(component, rows, others)
    return component


def _verify(
    block: Block, rows: Int[ndarray, " k"], others: Int[ndarray, " k"], threshold: float
) -> Bool[ndarray, " k"]:
    """Compute the similarity of single pairs in full."""
    values = block.factors[0]
    found = np.zeros(len(rows), dtype=bool)
    for start in range(0, len(rows), VERIFY_PAIRS):
        part = slice(start, start + VERIFY_PAIRS)
        products = np.einsum("ij,ij->i", values[rows[part]], values[others[part]])
        found[part] = products >= threshold
    return found


def _merge(
    component: Int[ndarray, " n"], rows: Int[ndarray, " k"], others: Int[ndarray, " k"]
) -> Int[ndarray, " n"]:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n_rows = len(component)
    edges = (component[rows], component[others])
    graph = coo_matrix((np.ones(len(rows), dtype=bool), edges), shape=(n_rows, n_rows))
    joined = connected_components(graph, directed=False)[1]
    return joined[component].astype(np.int64)
