"""Many pairs of rows compared, never all at once: nearest kept rows, coverage, near-duplicates."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from threadpoolctl import threadpool_limits

from dq_multimodal.config import Similarity
from dq_multimodal.core import one_bin, order_rows
from dq_multimodal.core.bins import count_threads
from dq_multimodal.core.hashing import hash_numbers, row_hash

READ_ROWS = 4096
TILE_ROWS = 512
"""Rows that are compared with all queries at once."""

N_DRAWS = 20
INTERVAL = (0.025, 0.975)
MAX_PAIRS = 1e8
"""So many pairs of up to 384 numbers are compared for coverage, before fewer rows are asked."""
MIN_ASKED = 1000
SAMPLE_SEED = 104_729
"""Set apart from the seed of the selection: kept rows may be those of the lowest hash."""
MEASURES = ("mean", "median", "p95", "max")
CURVE = np.linspace(0, 1, 201)

TEXT_THRESHOLD = 0.95
IMAGE_THRESHOLD = 0.99
"""Image features of small nets crowd together: at 0.98 whole classes of CIFAR-10 chain into one."""
SAME_PICTURE = 0.9999
"""Of image vectors of one picture, which batches of other lengths change in their last bits.

Different ones of the 4,000 pictures of easy-VQA, three shapes in few colours, reach 0.995.
"""
MAX_SEARCHED = 60_000
"""Rows of up to 384 numbers among which near-duplicates are searched; beyond, rows are sampled."""
LEFT_ROWS, RIGHT_ROWS = 512, 1024
"""Rows that a thread compares at once: their products stay in the cache of a core."""
AT_ONCE = 16
"""So many parts are compared before their pairs are merged."""
TRIED_ROWS = 512
"""Rows by which it is tried how many pairs some directions leave open."""
N_DIRECTIONS = (31, 63, 127)
"""Directions in which pairs are compared first: the fewest that leave few of them open."""
FEW = 0.001
ROUNDING = 1e-6
"""Error of a squared norm in float32, so that what is left of a row is never taken for less."""
SLACK = 1e-5
"""Rounding of float32 that the first comparison allows for."""
MANY = 0.01
"""Where more than this share of a tile might be alike, the whole tile is compared in full."""
MERGED_PAIRS = 100_000

OnPairs = Callable[[int], object]


@dataclass(frozen=True)
class Block:
    """Some rows, ready: inner products are products of the inner products of the factors."""

    factors: list[Float[ndarray, "b d"]]  # one of float32, or two where rows are outer products
    squares: Float[ndarray, " b"]  # squared norm of each row

    def __len__(self) -> int:
        return len(self.squares)

    def __getitem__(self, rows: "slice | ndarray") -> "Block":
        return Block([factor[rows] for factor in self.factors], self.squares[rows])

    def products(self, other: "Block") -> Float[ndarray, "b c"]:
        """Give the inner products of these rows with others."""
        tile = self.factors[0] @ other.factors[0].T
        for mine, theirs in zip(self.factors[1:], other.factors[1:], strict=True):
            tile *= mine @ theirs.T
        return tile

    def dots(self, other: "Block") -> Float[ndarray, " b"]:
        """Give the inner product of each row with its partner, in float64."""
        found = np.ones(len(self))
        for mine, theirs in zip(self.factors, other.factors, strict=True):
            found *= np.einsum("ij,ij->i", mine, theirs, dtype=np.float64)
        return found


class Vectors:
    """The embeddings of a run, opened for comparisons in float32.

    Cosine rows get unit norm. Euclidean ones are moved to their mean, which changes no distance
    and makes float32 precise enough; outer products are not moved, since a moved one is no
    product any more. Rows of zeros stand for rows that could not be read.

    Args:
        embeddings: (n, d) finite floats, memory-mapped or not.
        similarity: "cosine" or "euclidean".
        n_left: For outer products, how many of the d numbers are the left factor; else 0.
    """

    def __init__(self, embeddings: ndarray, similarity: Similarity, n_left: int = 0) -> None:
        self.values, self.similarity, self.n_left = embeddings, similarity, n_left
        self.is_blank = np.zeros(len(embeddings), dtype=bool)
        total, largest = np.zeros(embeddings.shape[1]), 0.0
        for start in range(0, len(embeddings), READ_ROWS):
            part = slice(start, start + READ_ROWS)
            block = np.asarray(embeddings[part])
            self.is_blank[part] = ~block.any(axis=1)
            largest = max(largest, float(block.max(initial=0)), -float(block.min(initial=0)))
            total += block.sum(axis=0, dtype=np.float64)
        is_scaled = similarity == "euclidean" and largest > 0
        self.unit = largest if is_scaled else 1.0
        is_moved = similarity == "euclidean" and not n_left
        self.centre = total / max(1, len(embeddings)) / self.unit if is_moved else 0.0 * total

    @property
    def readable(self) -> Int[ndarray, " m"]:
        """Numbers of the rows that have an embedding."""
        return np.flatnonzero(~self.is_blank)

    @property
    def dimension(self) -> int:
        """Numbers of an embedding as stored."""
        return int(self.values.shape[1])

    def take(self, rows: Int[ndarray, " b"]) -> Block:
        """Read rows, ready for `Block.products`."""
        widths = [self.n_left, self.dimension - self.n_left] if self.n_left else [self.dimension]
        factors = [np.empty((len(rows), width), dtype=np.float32) for width in widths]
        for start in range(0, len(rows), READ_ROWS):
            part = slice(start, start + READ_ROWS)
            values = np.asarray(self.values[rows[part]], dtype=np.float64)
            if self.similarity == "euclidean":
                values = values / self.unit - self.centre
            for factor, some in zip(factors, np.split(values, [widths[0]], axis=1), strict=False):
                factor[part] = _unit_norm(some) if self.similarity == "cosine" else some
        squares = np.ones(len(rows), dtype=np.float32)
        for factor in factors:
            squares *= np.einsum("ij,ij->i", factor, factor)
        return Block(factors, squares)

    def distances(self, products: ndarray, squares: ndarray, others: ndarray | float) -> ndarray:
        """Give distances, 1 - cosine or euclidean, from inner products and squared norms."""
        if self.similarity == "cosine":
            return np.maximum(1 - products, 0)
        between = np.maximum(squares + others - 2 * products, 0)
        return np.sqrt(between) * self.unit ** (2 if self.n_left else 1)


def _unit_norm(rows: Float[ndarray, "n d"]) -> Float[ndarray, "n d"]:
    """Give rows unit norm without overflow; rows of zeros stay."""
    peak = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    rows = rows / np.where(peak > 0, peak, 1.0)
    norm = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows / np.where(norm > 0, norm, 1.0)


def sample_rows(rows: Int[ndarray, " n"], size: int, seed: int) -> Int[ndarray, " k"]:
    """Draw rows, ascending, by a hash that has nothing to do with the selection."""
    if len(rows) <= size:
        return rows
    keys = row_hash(seed + SAMPLE_SEED, int(rows.max()) + 1)[rows]
    return np.sort(rows[np.lexsort((rows, keys))[:size]])


def _compare_with(
    vectors: Vectors,
    block: Block,
    queries: Int[ndarray, " q"],
    targets: Int[ndarray, " t"],
    on_pairs: OnPairs | None,
) -> Iterator[tuple[Int[ndarray, " b"], Float[ndarray, "b q"]]]:
    """Give target rows in parts, with numbers that are the larger the nearer a query is.

    A row is never near itself.
    """
    for start in range(0, len(targets), TILE_ROWS):
        rows = targets[start : start + TILE_ROWS]
        other = vectors.take(rows)
        tile = other.products(block)
        if vectors.similarity == "euclidean":
            tile -= other.squares[:, None] / 2  # of equal order: -|a - b|^2 / 2 + |a|^2 / 2
        place = np.minimum(np.searchsorted(queries, rows), len(queries) - 1)
        own = np.flatnonzero(queries[place] == rows)
        tile[own, place[own]] = -np.inf
        yield rows, tile
        if on_pairs is not None:
            on_pairs(tile.size)


def nearest(
    vectors: Vectors,
    queries: Int[ndarray, " q"],
    targets: Int[ndarray, " t"],
    *,
    on_pairs: OnPairs | None = None,
) -> tuple[Int[ndarray, " q"], Float[ndarray, " q"]]:
    """Find the nearest other target row of every query row.

    The nearest is found in float32, its distance then computed in float64. Queries ascend.

    Returns:
        Row number and distance of the nearest target; -1 and NaN where there is none.
    """
    found, distances = np.full(len(queries), -1), np.full(len(queries), np.nan)
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    block = vectors.take(queries)
    for rows, tile in _compare_with(vectors, block, queries, targets, on_pairs):
        top = tile.argmax(axis=0)
        score = tile[top, np.arange(len(queries))]
        is_better = score > best
        best[is_better] = score[is_better]
        found[is_better] = rows[top[is_better]]
    near = np.flatnonzero(found >= 0)
    mine, theirs = block[near], vectors.take(found[near])
    squares = [some.dots(some) for some in (mine, theirs)]
    products = mine.dots(theirs)
    if vectors.similarity == "cosine":  # float32 gives unit norm to seven digits only
        products /= np.sqrt(np.maximum(squares[0] * squares[1], 1e-30))
    distances[near] = vectors.distances(products, *squares)
    return found, distances


def nearest_in_sets(
    vectors: Vectors,
    queries: Int[ndarray, " q"],
    sets: Bool[ndarray, "s n"],
    *,
    on_pairs: OnPairs | None = None,
) -> Float[ndarray, "s q"]:
    """Find the distance of every query row to the nearest other row of each of several sets.

    Each pair is compared once, however many sets the row is in, in float32. Queries ascend.

    Returns:
        Distances; infinite where a set has no other row.
    """
    block = vectors.take(queries)
    best = np.full((len(sets), len(queries)), -np.inf, dtype=np.float32)
    targets = np.flatnonzero(sets.any(axis=0))
    for rows, tile in _compare_with(vectors, block, queries, targets, on_pairs):
        for top, is_in in zip(best, sets[:, rows], strict=True):
            np.maximum(top, tile[is_in].max(axis=0, initial=-np.inf), out=top)
    scores = best.astype(np.float64)  # in a euclidean one, half the square of the target is off
    return vectors.distances(scores, block.squares.astype(np.float64), 0.0)


@dataclass(frozen=True)
class Coverage:
    """Distance of every row to its nearest kept row; kept rows count, at distance 0.

    A curve says within which distance shares of the rows, from 0 to 1, have a kept row.
    """

    n_asked: int  # rows whose distance was measured, in the subset or not
    n_readable: int  # rows that have an embedding
    n_draws: int  # random subsets of the same size
    kept: dict[str, float]  # mean, median, p95 (95th percentile) and max
    random: dict[str, tuple[float, float, float]]  # mean over the draws; ends of 95 % of them
    shares: list[float]
    kept_curve: list[float]
    random_curve: list[float]  # mean of the draws
    random_low: list[float]
    random_high: list[float]
    verdict: str  # a sentence on mean and 95th percentile

    @property
    def is_sampled(self) -> bool:
        """Whether not all rows were asked."""
        return self.n_asked < self.n_readable


def draw_random(
    strata: Int[ndarray, " n"], n_kept: int, seed: int, rows: Int[ndarray, " k"]
) -> Bool[ndarray, "20 n"]:
    """Draw 20 random subsets as `--method random` does, of other seeds than that of the run.

    The draw within the bins of dq and that of random hash the same seed and row, so that the two
    keep mostly the same rows: another seed is a fair comparison.

    Args:
        strata: Stratum of every row.
        n_kept: Rows to draw.
        seed: Seed of the run.
        rows: Rows to draw from.
    """
    order = order_rows(one_bin(strata[rows]), rows=rows)
    counts = np.bincount(strata[rows[order < n_kept]])  # the same for every seed
    members = [np.flatnonzero(strata[rows] == code) for code in range(len(counts))]
    draws = np.zeros((N_DRAWS, len(strata)), dtype=bool)
    for number, drawn in enumerate(draws, 1):
        keys = hash_numbers(seed + number, rows.astype(np.uint64))
        for some, count in zip(members, counts.tolist(), strict=True):
            if count:
                drawn[rows[some[np.argpartition(keys[some], count - 1)[:count]]]] = True
    return draws


def measure_coverage(
    vectors: Vectors,
    kept: Bool[ndarray, " n"],
    draws: Bool[ndarray, "s n"],
    method: str,
    seed: int,
    *,
    max_pairs: float = MAX_PAIRS,
    on_pairs: OnPairs | None = None,
) -> Coverage | None:
    """Measure how far rows are from their nearest kept row, by the run and by random draws.

    Where all rows are too many pairs, a seeded sample is asked, the same for all subsets. Only
    rows outside a subset are compared with it; as many zeros as it holds of all rows stand for
    those inside. So a sample is as good as all rows in how many of them are kept.

    Args:
        vectors: The embeddings.
        kept: Which rows are kept.
        draws: Random subsets of the same size.
        method: For the verdict.
        seed: Of the sample.
        max_pairs: Most pairs of up to 384 numbers to compare; at least 1,000 rows are asked.
        on_pairs: Called now and then with the number of pairs compared since.

    Returns:
        None where a subset has no row with an embedding.
    """
    sets = np.vstack([kept, draws]) & ~vectors.is_blank
    if not sets.any(axis=1).all():
        return None
    readable = vectors.readable
    n_pairs = max_pairs * min(1.0, 384 / vectors.dimension)
    size = max(MIN_ASKED, int(n_pairs / len(np.flatnonzero(sets.any(axis=0)))))
    asked = sample_rows(readable, size, seed)
    distances = nearest_in_sets(vectors, asked, sets, on_pairs=on_pairs)
    found = []
    for chosen, row in zip(sets, distances, strict=True):
        outside = row[~chosen[asked]]
        n_chosen = int(chosen.sum())
        n_inside = round(len(outside) * n_chosen / max(1, len(readable) - n_chosen))
        found.append(np.concatenate([np.zeros(n_inside if len(outside) else 1), outside]))
    curves = np.array([np.quantile(part, CURVE) for part in found])
    numbers = np.array([[d.mean(), *np.quantile(d, [0.5, 0.95]), d.max()] for d in found])
    ends = np.quantile(numbers[1:], INTERVAL, axis=0)
    summary = np.vstack([numbers[1:].mean(axis=0), ends]).T.tolist()
    random = {name: tuple(three) for name, three in zip(MEASURES, summary, strict=True)}
    ours = dict(zip(MEASURES, numbers[0].tolist(), strict=True))
    low, high = np.quantile(curves[1:], INTERVAL, axis=0).tolist()
    return Coverage(
        n_asked=len(asked),
        n_readable=len(readable),
        n_draws=len(draws),
        kept=ours,
        random=random,
        shares=CURVE.tolist(),
        kept_curve=curves[0].tolist(),
        random_curve=curves[1:].mean(axis=0).tolist(),
        random_low=low,
        random_high=high,
        verdict=judge(ours, random, method),
    )


def judge(
    ours: dict[str, float], random: dict[str, tuple[float, float, float]], method: str
) -> str:
    """Say in words which covers better, random not spared and not wronged."""
    other = "other random draws" if method == "random" else "random selection"
    lines = []
    for where, name in (("On average", "mean"), ("At the 95th percentile", "p95")):
        value, (mean, low, high) = ours[name], random[name]
        best, worst = (method, other) if value < low else (other, method)
        said = f"{best} covers the data better than {worst}"
        if low <= value <= high:
            said = f"{method} and {other} cover the data equally well"
        lines.append(
            f"{where}, {said}: a distance of {value:.4f} against {mean:.4f} ({low:.4f} to "
            f"{high:.4f} in 95 % of the random draws)."
        )
    signs = [np.sign(ours[name] - random[name][0]) for name in ("mean", "p95")]
    if signs[0] * signs[1] < 0 and not any("equally" in line for line in lines):
        lines.append("The two measures disagree.")
    return " ".join(lines)


@dataclass(frozen=True)
class Groups:
    """Groups of near-duplicates, the largest first."""

    members: list[Int[ndarray, " m"]]  # row numbers of each group, ascending
    n_searched: int  # rows that were compared, all pairs of them
    n_readable: int  # rows that have an embedding
    threshold: float  # cosine from which two rows count as alike
    is_of_run: bool = False  # each is a row that stays, with those that the run put last for it


def _group(rows: Int[ndarray, " n"], codes: Int[ndarray, " n"]) -> list[Int[ndarray, " m"]]:
    """Put rows of the same code together, where there are several."""
    several = np.flatnonzero(np.bincount(codes)[codes] > 1)
    at = several[np.argsort(codes[several], kind="stable")]
    members = np.split(rows[at], np.flatnonzero(np.diff(codes[at])) + 1) if len(at) else []
    return sorted(members, key=lambda part: (-len(part), int(part[0])))


def read_groups(
    duplicate_of: Int[ndarray, " n"], is_blank: Bool[ndarray, " n"], threshold: float
) -> Groups:
    """Give the near-duplicates that the run found, see `core.duplicates.find_duplicates`."""
    rows = np.arange(len(duplicate_of))
    members = _group(rows, np.where(duplicate_of < 0, rows, duplicate_of))
    n_readable = int((~is_blank).sum())
    return Groups(members, n_readable, n_readable, threshold, is_of_run=True)


def find_groups(
    vectors: Vectors,
    threshold: float,
    seed: int,
    *,
    halves: Sequence[tuple[Vectors, float]] = (),
    max_rows: int = MAX_SEARCHED,
    on_pairs: OnPairs | None = None,
) -> Groups:
    """Find the connected components of the graph of all pairs at or above a similarity.

    Pairs are looked at tile by tile, first in some main directions, which leave few open, and only
    a component number a row is held. More than max_rows rows of up to 384 numbers are sampled.

    Where the vectors have halves, each with a least similarity of its own, pairs must reach these
    too, but in a half that neither row has.
    """
    readable = vectors.readable
    size = int(max_rows * min(1.0, (384 / vectors.dimension) ** 0.5))
    rows = sample_rows(readable, size, seed)
    component = np.arange(len(rows))
    if len(rows) > 1:
        parts = [(half.take(rows), least) for half, least in halves]
        component = _join(vectors.take(rows), threshold, parts, on_pairs)
    return Groups(_group(rows, component), len(rows), len(readable), threshold)


def find_other_words(
    images: Vectors, texts: Vectors, seed: int, *, on_pairs: OnPairs | None = None
) -> Groups:
    """Find rows of the same picture with other words, such as several questions about it.

    Groups are chained by image vectors with a cosine of at least 0.9999. Those count of which some
    row has a text vector whose cosine with that of the first row is below 0.95. Rows without a
    picture or without words are in none.
    """
    images.is_blank |= texts.is_blank
    found = find_groups(images, SAME_PICTURE, seed, on_pairs=on_pairs)
    return replace(found, members=[rows for rows in found.members if _has_other_words(texts, rows)])


def _has_other_words(texts: Vectors, rows: Int[ndarray, " m"]) -> bool:
    """Say whether the words of some row are not those of the first."""
    first = texts.take(rows[:1])
    parts = (rows[start : start + READ_ROWS] for start in range(0, len(rows), READ_ROWS))
    return any((texts.take(part).products(first) < TEXT_THRESHOLD).any() for part in parts)


def _shorten(block: Block, threshold: float) -> Float[ndarray, "n k"] | None:
    """Give rows of few numbers whose inner products are never below the true ones.

    With Q orthonormal, <a, b> = <Qa, Qb> + <a - QQ'a, b - QQ'b>, and the last term is at most the
    product of the norms of what is left of a and of b, which becomes the last number. Q is near
    the main directions, by two steps of subspace iteration on some rows; there are as few of them
    as leave few pairs open.
    """
    values = block.factors[0]
    if len(block.factors) > 1 or len(values) < READ_ROWS:
        return None
    some = values[:: max(1, len(values) // READ_ROWS)]
    for n_directions in (k for k in N_DIRECTIONS if 2 * k < values.shape[1]):
        start = np.random.default_rng(0).standard_normal((values.shape[1], n_directions))
        basis = start.astype(np.float32)
        for _ in range(2):
            basis = np.linalg.qr(some.T @ (some @ basis))[0]
        short = values @ basis
        left = block.squares - np.einsum("ij,ij->i", short, short)
        left = np.sqrt(np.maximum(left, 0) + ROUNDING)  # of what is nearly nothing, too
        short = np.concatenate([short, left[:, None]], axis=1)
        tile = short[:: max(1, len(values) // TRIED_ROWS)] @ short[:READ_ROWS].T
        if (tile >= threshold - SLACK).mean() < FEW:
            return short
    return None


def _join(
    block: Block,
    threshold: float,
    halves: list[tuple[Block, float]],
    on_pairs: OnPairs | None,
) -> Int[ndarray, " n"]:
    """Number the connected components of rows."""
    component, short = np.arange(len(block)), _shorten(block, threshold)

    def look(start: int, other: int) -> tuple[Int[ndarray, " k"], Int[ndarray, " k"]]:
        """Find alike pairs of two parts, but those that are known to be of one component."""
        left, right = slice(start, start + LEFT_ROWS), slice(other, other + RIGHT_ROWS)
        mine, theirs = component[left], component[right]
        if (mine == mine[0]).all() and (theirs == mine[0]).all():
            return mine[:0], mine[:0]
        is_sure = short is None
        if short is None:
            is_near = block[left].products(block[right]) >= threshold
        else:
            is_near = short[left] @ short[right].T >= threshold - SLACK
        if np.count_nonzero(is_near) > MANY * is_near.size:
            is_near &= mine[:, None] != theirs
            if not is_sure and np.count_nonzero(is_near) > MANY * is_near.size:
                is_near &= block[left].products(block[right]) >= threshold
                is_sure = True
        places = np.flatnonzero(is_near)  # many times faster than in two dimensions
        rows, others = np.divmod(places, is_near.shape[1])
        rows, others = rows + start, others + other
        is_open = rows < others
        if not is_sure:
            values = block.factors[0]
            is_open &= np.vecdot(values[rows], values[others]) >= threshold
        for half, least in halves:
            is_missing = half.squares[rows] + half.squares[others] == 0
            is_open &= is_missing | (half[rows].dots(half[others]) >= least)
        return rows[is_open], others[is_open]

    waiting: list[tuple[ndarray, ndarray]] = []  # alike pairs that are not merged yet
    with threadpool_limits(1), ThreadPoolExecutor(count_threads(AT_ONCE)) as pool:
        for start in range(0, len(block), LEFT_ROWS):
            for first in range(start, len(block), RIGHT_ROWS * AT_ONCE):
                stop = min(first + RIGHT_ROWS * AT_ONCE, len(block))
                found = pool.map(partial(look, start), range(first, stop, RIGHT_ROWS))
                waiting += [pairs for pairs in found if len(pairs[0])]
                if on_pairs is not None:
                    on_pairs(min(LEFT_ROWS, len(block) - start) * (stop - first))
                if sum(len(rows) for rows, _ in waiting) > MERGED_PAIRS:
                    component = _merge(component, waiting)
    return _merge(component, waiting)


def _merge(
    component: Int[ndarray, " n"], pairs: list[tuple[ndarray, ndarray]]
) -> Int[ndarray, " n"]:
    """Join the components of pairs of rows, and empty the list of pairs."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not pairs:
        return component
    rows, others = (component[np.concatenate(side)] for side in zip(*pairs, strict=True))
    pairs.clear()
    n_rows = len(component)
    graph = coo_matrix((np.ones(len(rows), dtype=bool), (rows, others)), shape=(n_rows, n_rows))
    return connected_components(graph, directed=False)[1][component].astype(np.int64)
