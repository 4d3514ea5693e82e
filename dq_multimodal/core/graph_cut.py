"""Exact greedy GraphCut picks, far below n^2 work and in O(n) memory beside the embeddings."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import Similarity
from dq_multimodal.core.rows import Rows, RowSource, find_equal

TIE_WIDTH = 1e-9
"""Gains closer than this times the scale of the pool of rows are a tie."""

MARGIN = 1.01
"""A row more than this many tie widths below the best can neither win nor tie: the hundredth is
far above what rounding does to a gain."""

POOL_ROWS, RING_ROWS = 256, 4096
"""Rows among which picks are made, and rows from which such pools are drawn; at least."""

MAX_POOL_ROWS = 4096
"""Where more rows than this may tie, they are picked one by one."""

MAX_ENDANGERED = 1024
RUN_PICKS = 32
"""Picks that are made in a pool before the rows outside are looked at."""

DIRECTIONS = 32
"""Directions in which the change of a gain is followed exactly, at most."""

SAMPLE_ROWS = 2048
NEVER = -1e300
"""Bound of a row that is used up; finite, so that it may be multiplied by zero."""


class GraphCut:
    r"""Greedy runs over the rows of one stratum, each from the rows that those before it left.

    With R the rows when a run begins and S those picked so far, the gain of a row is

    - cosine: $\sum_{p \in R} \langle p, x \rangle - 2 \sum_{p \in S} \langle p, x \rangle$
    - euclidean: $\sum_{p \in S} \|p-x\|^2 - \sum_{p \in R \setminus S} \|p-x\|^2$
      (Dataset Quantization, arXiv:2308.10524, Eq. 1-2)

    Up to a constant that is $f \langle x, W \rangle + c \|x\|^2$ with $W = \sum_R p - 2 \sum_S p$,
    f = 1 and c = 0 (cosine) or f = 2 and c = 2|S| - |R| (euclidean). A pool of the best rows is
    kept exact in float64, and few others need a look:

    - W is split along a few directions (the mean of a sample and its largest variation). What a
      gain owes to them is followed exactly in k numbers a row; what it owes to the rest of W, of
      which x has the length $\|x_\perp\|$, has moved by at most $f \|x_\perp\| \|\Delta
      W_\perp\|$ since the row was last looked at. This bounds every gain.
    - Picks are made in the pool, some in a row. Then the bounds of the rows of a ring around it
      say which of them might have won or tied at one of these picks, their gains at each of them
      are worked out (one product of two small matrices), and the picks up to the first at which
      one does so are kept. A new pool is drawn from the ring there.
    - All other rows are bounded together; where that does not do, a new ring is drawn.

    Float32 serves to exclude rows, with its error added to the bounds; gains that are compared
    are float64. The picks are those of the plain greedy. Gains within 1e-9 x scale of the best
    are a tie, which the lowest row number wins: two equal rows may leave a matrix product with
    different last bits. The scale is |R| (cosine) or the sum of the squared distances of R to
    its mean (euclidean). Rows that are equal bit for bit are one row that may be picked again.

    Args:
        source: The rows.
        similarity: Which gain.

    Attributes:
        n_left: Rows that are not picked yet.
    """

    def __init__(self, source: RowSource, similarity: Similarity) -> None:
        self.source, self.n_left = source, len(source)
        self.is_cosine = similarity == "cosine"
        self.factor = 1.0 if self.is_cosine else 2.0
        self.directions = find_directions(source)
        n_directions = self.directions.shape[1]
        self.total = np.zeros(source.n_columns)
        followed, squares = np.empty((len(source), n_directions)), np.empty(len(source))
        for span in source.spans():
            block = source.take(span)
            self.total += block.sum()
            followed[span] = block @ self.directions
            squares[span] = block.squares()
        self.square_total = float(squares.sum())
        self.numbers, self.next_equal = find_equal(source)
        if len(self.numbers) < len(source):
            followed, squares = followed[self.numbers], squares[self.numbers]
        self.followed, self.squares = followed, squares
        self.norms = np.sqrt(squares)
        within = np.einsum("ij,ij->i", followed, followed)
        self.slack = self.factor * np.sqrt(np.maximum(squares - within, 0.0))
        self.ring_size = RING_ROWS

    def pick(
        self, n_picks: int, on_picks: Callable[[int], object] | None = None
    ) -> tuple[Int[ndarray, " picks"], Float[ndarray, " picks"]]:
        """Make a greedy run over the rows that are left.

        Args:
            n_picks: How many to pick, at most `n_left`.
            on_picks: Called now and then with the number of rows picked since its last call.

        Returns:
            The row numbers in pick order, and the gain with which each was picked.
        """
        self._compact()
        scale = float(self.n_left)
        if not self.is_cosine:
            scale = max(self.square_total - float(self.total @ self.total) / self.n_left, 0.0)
        self.tie = TIE_WIDTH * scale
        self.widest = float(self.norms.max())
        self.sum, self.n_start, self.n_picks = self.total.copy(), self.n_left, n_picks
        self.picked, self.gains = np.empty(n_picks, dtype=np.int64), np.empty(n_picks)
        self.picked_squares = np.zeros(n_picks)
        self.done = 0
        ring = None
        while self.done < n_picks:
            before = self.done
            ring = _Pool(self, ring).run()
            if on_picks is not None:
                on_picks(self.done - before)
        if not self.is_cosine:
            before = np.cumsum(self.picked_squares) - self.picked_squares
            self.gains += 2 * before - self.square_total
        self.total = (self.total + self.sum) / 2
        self.square_total -= float(self.picked_squares.sum())
        self.n_left -= n_picks
        return self.picked, self.gains

    def _compact(self) -> None:
        """Forget the rows that are used up."""
        is_open = self.numbers >= 0
        if not is_open.all():
            for name in ("numbers", "followed", "squares", "norms", "slack"):
                setattr(self, name, getattr(self, name)[is_open])

    def tilt(self, done: int) -> float:
        """Give the weight c of the squared norm after so many picks."""
        return 0.0 if self.is_cosine else 2.0 * done - self.n_start


class _Ring:
    """The rows with the highest gains when it was drawn, and a bound of all others.

    Attributes:
        rows: Places of the rows among the rows left.
        block: The rows, prepared, float32.
        picks: Picks made since it was drawn.
    """

    def __init__(self, cut: GraphCut, least: float) -> None:
        self.cut, self.picks, self.is_spent = cut, 0, False
        self.across = cut.sum - cut.directions @ (cut.directions.T @ cut.sum)
        rows = np.flatnonzero(cut.numbers >= 0)
        found, error = cut.source.screen(cut.numbers[rows], self.across)
        self.others = np.full(len(cut.numbers), NEVER)
        self.others[rows] = cut.factor * (found + error * (cut.norms[rows] + cut.source.offset))
        bounds = self._bound(cut.sum, cut.done)
        if len(rows) > cut.ring_size:
            least = min(least, np.partition(bounds, -cut.ring_size)[-cut.ring_size])
            rows = np.flatnonzero((bounds >= least) & (cut.numbers >= 0))
        self.rows = rows
        self.others[rows] = NEVER
        bounds[rows] = NEVER
        self._refer(bounds, cut.sum, cut.done)
        self.block = cut.source.take(cut.numbers[rows]).narrow()
        self.norms, self.squares = cut.norms[rows], cut.squares[rows]
        # a bound is one row of this times [weights, 1, movement of W across, c, -line]
        self.table = np.empty((len(rows), cut.directions.shape[1] + 4))
        self.table[:, :-4] = cut.followed[rows]
        self.table[:, -3] = cut.slack[rows]
        self.table[:, -2] = self.squares
        self.table[:, -1] = 1.0

    def _bound(self, now: Float[ndarray, " d"], done: int) -> Float[ndarray, " n"]:
        """Bound the gains of all others at some W."""
        cut = self.cut
        along = cut.directions.T @ now
        bounds = cut.followed @ (cut.factor * along)
        bounds += self.others
        moved = float(np.linalg.norm(now - cut.directions @ along - self.across))
        if moved:
            bounds += moved * cut.slack
        if not cut.is_cosine:
            bounds += cut.tilt(done) * cut.squares
        return bounds

    def _refer(self, bounds: Float[ndarray, " n"], now: Float[ndarray, " d"], done: int) -> None:
        self.most, self.then, self.done_then = float(bounds.max()), now.copy(), done

    def count_safe(
        self, sums: Float[ndarray, "t d"], done: int, lines: Float[ndarray, " t"]
    ) -> int:
        """Count the picks before the first at which a row that is not in the ring might matter.

        Args:
            sums: W before each pick.
            done: Picks before the first of them.
            lines: Gain below which a row does not matter, of each pick.
        """
        if self.most <= NEVER / 2:
            return len(lines)
        n_safe = self._count_safe(sums, done, lines)
        if n_safe < len(lines) and done > self.done_then:
            self._refer(self._bound(sums[0], done), sums[0], done)
            n_safe = self._count_safe(sums, done, lines)
        self.is_spent = n_safe < min(len(lines), RUN_PICKS // 2)
        return n_safe

    def _count_safe(
        self, sums: Float[ndarray, "t d"], done: int, lines: Float[ndarray, " t"]
    ) -> int:
        cut = self.cut
        drift = cut.factor * np.linalg.norm(sums - self.then, axis=1) * cut.widest
        if not cut.is_cosine:
            drift += 2 * (done - self.done_then + np.arange(len(lines))) * cut.widest**2
        is_bad = self.most + drift >= lines
        return int(is_bad.argmax()) if is_bad.any() else len(lines)


class _Pool:
    """The best rows of a ring, exact in float64, and what bounds the others of the ring."""

    def __init__(self, cut: GraphCut, ring: _Ring | None) -> None:
        self.cut = cut
        along = cut.directions.T @ cut.sum
        self.across = cut.sum - cut.directions @ along
        self.start, self.sum = cut.done, cut.sum
        self.is_single = self.is_overtaken = False
        least = np.inf
        while True:
            ring = ring if ring and not ring.is_spent else _Ring(cut, least)
            found = (ring.block @ self.across.astype(np.float32)).astype(np.float64)
            error = (cut.source.n_columns + 8) * 2.0**-23 * float(np.linalg.norm(self.across))
            found += error * ring.norms
            found *= cut.factor
            found[cut.numbers[ring.rows] < 0] = NEVER
            ring.table[:, -4] = found
            bounds = ring.table @ np.concatenate(
                [cut.factor * along, [1.0, 0.0, cut.tilt(cut.done), 0.0]]
            )
            places, gains, block = self._highest(ring, bounds)
            best = float(gains.max())
            line = best - MARGIN * cut.tie
            if ring.count_safe(cut.sum[None], cut.done, np.array([line])):
                break
            if ring.picks < 2 * RUN_PICKS and least == np.inf:
                cut.ring_size = min(2 * cut.ring_size, len(cut.numbers))
            ring, least = None, line
        self.ring, self.places, self.gains, self.block = ring, places, gains, block
        self.base = bounds - cut.tilt(cut.done) * ring.squares
    def _highest(
        self, ring: _Ring, bounds: Float[ndarray, " r"]
    ) -> tuple[Int[ndarray, " b"], Float[ndarray, " b"], Rows]:
        """Take the rows of the highest bounds, and all others that might be the best or tie."""
        cut = self.cut
        places = highest(bounds, POOL_ROWS)
        while True:
            block = cut.source.take(cut.numbers[ring.rows[places]])
            gains = self._gains(block, ring.squares[places])
            gains[cut.numbers[ring.rows[places]] < 0] = NEVER
            near = np.flatnonzero(bounds >= float(gains.max()) - MARGIN * cut.tie)
            joined = np.union1d(places, near)
            if len(joined) == len(places):
                return places, gains, block
            if len(joined) > MAX_POOL_ROWS:
                return self._lowest(ring, near)
            places = joined

    def _lowest(
        self, ring: _Ring, places: Int[ndarray, " k"]
    ) -> tuple[Int[ndarray, " one"], Float[ndarray, " one"], Rows]:
        """Take only the row to be picked next, of many that may tie."""
        cut = self.cut
        gains = np.empty(len(places))
        step = cut.source.block_rows
        for start in range(0, len(places), step):
            part = places[start : start + step]
            block = cut.source.take(cut.numbers[ring.rows[part]])
            gains[start : start + step] = self._gains(block, ring.squares[part])
        tied = np.flatnonzero(gains >= gains.max() - cut.tie)
        at = tied[np.argmin(cut.numbers[ring.rows[places[tied]]])]
        one = places[at : at + 1]
        self.is_single = True
        return one, gains[at : at + 1], cut.source.take(cut.numbers[ring.rows[one]])

    def _gains(self, block: Rows, squares: Float[ndarray, " b"]) -> Float[ndarray, " b"]:
        """Work out gains, less the constant, in float64."""
        gains = self.cut.factor * (block @ self.cut.sum)
        if not self.cut.is_cosine:
            gains += self.cut.tilt(self.cut.done) * squares
        return gains

    def run(self) -> _Ring:
        """Pick until a row outside might have won or tied; gives the ring for the next pool."""
        cut, ring = self.cut, self.ring
        rows = ring.rows[self.places]
        numbers, squares = cut.numbers[rows], ring.squares[self.places]
        ring.table[self.places, -4] = NEVER
        while True:
            n_most = 1 if self.is_single else min(RUN_PICKS, cut.n_picks - cut.done)
            taken, before, made, lines = self._speculate(numbers, squares, n_most)
            kept, n_endangered = (1, 0) if self.is_single else self._count_kept(taken, lines)
            for at, number in list(zip(taken, before, strict=True))[kept:][::-1]:
                numbers[at] = number
            span = slice(cut.done, cut.done + kept)
            cut.picked[span], cut.gains[span] = before[:kept], made[:kept]
            cut.picked_squares[span] = squares[taken[:kept]]
            cut.sum = cut.sum - 2 * self.block[taken[:kept]].sum()
            cut.done += kept
            ring.picks += kept
            is_over = self.is_overtaken or cut.done == cut.n_picks or len(taken) < n_most
            if is_over or ring.is_spent or self.is_single or n_endangered > MAX_ENDANGERED:
                break
            if kept < len(taken):
                self.gains = self._gains(self.block, squares)
                self.gains[numbers < 0] = NEVER
        cut.numbers[rows] = numbers
        return ring

    def _speculate(
        self, numbers: Int[ndarray, " b"], squares: Float[ndarray, " b"], n_most: int
    ) -> tuple[list[int], list[int], list[float], list[float]]:
        """Make picks in the pool alone.

        Returns:
            Places in the pool, row numbers, gains (less the constant), and of each pick the line
            below which no row mattered.
        """
        cut, block, gains = self.cut, self.block, self.gains
        tie, step, next_equal = cut.tie, -2 * cut.factor, cut.next_equal
        rise = None if cut.is_cosine else 2 * squares
        taken, before, made, lines = [], [], [], []
        for _ in range(n_most):
            best = float(gains.max())
            if best <= NEVER / 2:
                break
            tied = (gains >= best - tie).nonzero()[0]
            at = int(tied[0]) if len(tied) == 1 else int(tied[numbers[tied].argmin()])
            number = int(numbers[at])
            taken.append(at)
            before.append(number)
            made.append(float(gains[at]))
            lines.append(best - MARGIN * tie)
            change = block.products(at)
            change *= step
            gains += change
            if rise is not None:
                gains += rise
            numbers[at] = -1 if next_equal is None else next_equal[number]
            if numbers[at] < 0:
                gains[at] = NEVER
        return taken, before, made, lines

    def _count_kept(self, taken: list[int], lines: list[float]) -> tuple[int, int]:
        """Count the picks before the first at which a row outside might have won or tied.

        Returns:
            That number, and how many rows of the ring had to be looked at.
        """
        cut, ring = self.cut, self.ring
        steps = self.block[taken].flat()
        gone = np.cumsum(steps, axis=0)
        sums = cut.sum - 2 * np.concatenate([np.zeros_like(steps[:1]), gone[:-1]])
        limits = np.array(lines)
        is_first = cut.done == self.start
        self.is_overtaken = False
        kept = max(ring.count_safe(sums, cut.done, limits), int(is_first))
        sums, limits = sums[:kept], limits[:kept]
        if not kept:
            return 0, 0
        along = sums @ cut.directions
        moved = np.linalg.norm(sums - along @ cut.directions.T - self.across, axis=1)
        tilts = cut.tilt(cut.done) + (0.0 if cut.is_cosine else 2.0) * np.arange(kept)
        ones = np.ones(kept)
        excess = ring.table @ np.vstack([cut.factor * along.T, ones, moved, tilts, -limits])
        places = np.flatnonzero(excess.max(axis=1) >= 0)
        if not len(places):
            return kept, 0
        # what each of them had before each pick: the way W went since the pool was drawn
        ways = np.concatenate([sums[:1] - self.sum, np.diff(sums, axis=0)])
        lengths = np.cumsum(np.linalg.norm(ways, axis=1))
        moves = (ring.block[places] @ ways.astype(np.float32).T).cumsum(axis=1, dtype=np.float64)
        error = (cut.source.n_columns + 8) * 2.0**-23 * lengths
        gains = self.base[places, None] + cut.factor * (moves + error * ring.norms[places, None])
        gains += tilts * ring.squares[places, None]
        is_bad = (gains >= limits).any(axis=0)
        if is_first:
            is_bad[0] = False  # so the pool was drawn
        self.is_overtaken = bool(is_bad.any())
        return int(is_bad.argmax()) if self.is_overtaken else kept, len(places)


def highest(values: Float[ndarray, " n"], size: int) -> Int[ndarray, " k"]:
    """Give the places of the largest values, ascending."""
    if len(values) <= size:
        return np.arange(len(values))
    return np.sort(np.argpartition(values, -size)[-size:])


def find_directions(source: RowSource) -> Float[ndarray, "d k"]:
    """Give orthonormal directions along which a sample of the rows varies most, its mean first.

    There are few enough that n x k numbers take at most a quarter of the memory of the rows. Picks
    do not depend on them, only the time they take.
    """
    n_rows, n_columns = len(source), source.n_columns
    size = min(DIRECTIONS, -(-n_columns // 8), max(1, 2**22 // n_columns))
    if n_rows <= POOL_ROWS:
        return np.zeros((n_columns, 0))
    sample = source.take(np.arange(0, n_rows, -(-n_rows // SAMPLE_ROWS)))
    mean = sample.sum() / len(sample)
    turned = np.random.default_rng(0).normal(size=(n_columns, size))
    for _ in range(4):
        if mean.any():
            turned[:, 0] = mean
        basis = np.linalg.qr(turned)[0]
        turned = sample.weighted(sample @ basis)
    return basis
