"""Exact greedy GraphCut picks, far below n^2 work and in O(n) memory beside the embeddings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8
from numpy import ndarray

from dq_multimodal.config import Similarity
from dq_multimodal.core.rows import BLOCK_ROWS, Rows, find_equal

TIE_WIDTH = 1e-9
"""Gains closer than this times the scale are a tie."""

POOL_ROWS, POOL_SHARE, STRONG_SHARE = 256, 0.3, 0.8
"""Rows of the smallest pool, the part of a pool that the next one holds, and the part of that whose
picks need no check."""

HELD_BYTES, ROOM_BYTES, POOL_BYTES = 3 * 2**26, 2**27, 2**26
"""Memory for all rows of a stratum, where they fit, else they are read where they lie; for the rows
of smaller pools and for products; and for the rows of the largest of these pools."""

FIRST_ROWS, MIN_ROWS, MAX_ROWS = 64, 16, 1024
"""Rows that are multiplied with a pool at once: at first, at least and at most."""

FEW_ROWS = 48
"""Fewer rows than this are multiplied as the right factor: OpenBLAS is much faster then."""

PRODUCT_COST = 0.08
"""What an inner product made with many others takes, in units of one made alone."""

MAX_KNOTS, KNOT_VALUES = 512, 2**21
"""Knots of the trajectory, and numbers in them; where they are used up, all pools are checked."""

MIN_PAUSE, MAX_PAUSE = 16, 1024
"""Picks made in a pool itself after a check that did not pay, and by scans: at first, at most."""

LOAD_PICKS, PAIR_LOAD = 64, 1 / 3
"""Picks over which products are counted; all pairs are made if one takes that part of the rows."""

PICKS_A_CALL, CALL_VALUES = 128, 2**30
"""Picks after which the caller is told, at most, and numbers that scans read before that."""

MIN_OPEN = 0.75
"""Where fewer of the rows are left, those that are used up are forgotten."""

NO_CHECK, NO_CODES = -1, (np.empty((0, 0), dtype=np.int8), np.empty(0, dtype=np.float32), 0.0)
"""In place of the number of a pool: none has to be checked; and in place of its rows in 8 bits."""


@dataclass
class Pool:
    """Candidates: picks are made among them, or a smaller pool of the best of them is drawn.

    Attributes:
        rows: The rows, by number.
        gains: Gain of each, less the constant: as it is now in the innermost pool, in others as it
            was at their knot; minus infinity where a row is used up.
        squares: Their squared norms.
        ends: Number of the outermost pool that has to be checked after the pick of a row.
        block: Rows in float32, these among them; None where they are read where they lie.
        at: Where the rows lie in the block; None where it holds just these, in order.
        knot: The knot of the trajectory at which the next pool was drawn.
        error: How far gains may be off, and how many were worked out in float64 one by one: after
            as many as there are rows, all are, and gains are exact again.
        is_inside: Which rows the next pool holds.
        products: Inner products of some of the rows with all of them.
        slots: Place of each row among these, -1 for none.
        n_filled: Rows that have a place.
        n_wanted: Rows that are given a place at once.
        coded: The rows in 8 bits, their steps and what is lost; see `encode_rows`.
        n_scans: Picks that are made by scans when a product served one pick only.
        scan_until: Picks made when the last of these ends.
    """

    rows: Int[ndarray, " r"]
    gains: Float[ndarray, " r"]
    squares: Float[ndarray, " r"]
    ends: Int[ndarray, " r"]
    block: Float32[ndarray, "_ w"] | None
    at: Int[ndarray, " r"] | None = None
    knot: int = 0
    error: Float[ndarray, " 2"] = field(default_factory=lambda: np.zeros(2))
    is_inside: Bool[ndarray, " r"] = field(default_factory=lambda: np.empty(0, dtype=bool))
    products: Float32[ndarray, "s r"] | None = None
    slots: Int[ndarray, " r"] | None = None
    n_filled: int = 0
    n_wanted: int = 0
    coded: tuple[Int8[ndarray, "r w"], Float32[ndarray, " r"], float] = NO_CODES
    n_scans: int = MIN_PAUSE
    scan_until: int = 0


class Path(NamedTuple):
    """The trajectory of the running sum, at knots of a few picks each.

    Attributes:
        sums: The running sum at each knot.
        first: Picks made by then.
        low: What the gains of rows outside have to stay below in the picks up to the next knot.
        bend: How far the running sum leaves the chord to the next knot.
        last: Number of the last knot.
    """

    sums: Float[ndarray, "m+1 k d"]
    first: Int[ndarray, " m+1"]
    low: Float[ndarray, " m"]
    bend: Float[ndarray, " m"]
    last: Int[ndarray, " 1"]


@dataclass
class Pace:
    """What checks of a pool taught.

    Attributes:
        limit: Picks without another check, at most.
        pause: Picks that are made in the pool itself after the next check that does not pay, which
            is one that takes more products than picks in the pool would have taken.
        pause_until: Picks made in all when the last of these ends.
    """

    limit: int
    pause: int = MIN_PAUSE
    pause_until: int = 0


class GraphCut:
    r"""Greedy runs over the rows of one stratum, each from the rows that those before it left.

    With R the rows when a run begins and S those picked so far, the gain of a row is

    - cosine: $\sum_{p \in R} \langle p, x \rangle - 2 \sum_{p \in S} \langle p, x \rangle$
    - euclidean: $\sum_{p \in S} \|p-x\|^2 - \sum_{p \in R \setminus S} \|p-x\|^2$
      (Dataset Quantization, arXiv:2308.10524, Eq. 1-2)

    Up to a constant that is $f \langle x, W \rangle + c \|x\|^2$ with the running sum
    $W = \sum_R p - 2 \sum_S p$, f = 1 and c = 0 (cosine) or f = 2 and c = 2|S| - |R| (euclidean).
    Gains within 1e-9 x scale of the best are a tie, which the lowest row number wins: two equal
    rows may leave a matrix product with different last bits. The scale is |R| (cosine) or the sum
    of the squared distances of R to its mean (euclidean). The picks are those of this definition,
    but few rows are looked at for one:

    - The best 30 % of the rows are a pool, the best 30 % of these the next, down to 256 rows.
      Picks are made in the innermost pool alone, until one comes from its lower part: then a row
      outside might soon be better.
    - Each pool, from the innermost, then checks the rows that it left outside the next one, see
      `count_safe`. Picks from the first at which one of them might have won or tied are undone,
      and the smaller pools are drawn anew. Where checks do not pay, a larger pool serves a while.
    - In a pool gains follow from inner products of its rows, made in float32 for many picks at
      once. Their error is bounded, and float64 decides between all that may win or tie. Where
      every pick turns the running sum so far that a product serves one pick only, all gains of
      the pool are worked out at each pick from its rows in 8 bits, likewise with a bound.
    - Where the products of all pairs of the rows left have room, and lately a pick took products
      with more than a third of them (or there are at most 512), they are made at once and serve
      to the last row.

    Rows of equal numbers are one row that may be picked again. Float64 rounds too, so a row within
    some 1e-5 tie widths of where ties end may go either way.

    Args:
        rows: The rows.
        similarity: Which gain.
        n_beside: Strata that share the memory, this one included.

    Attributes:
        n_left: Rows that are not picked yet.
    """

    def __init__(self, rows: Rows, similarity: Similarity, n_beside: int = 1) -> None:
        from dq_multimodal.core import picking

        self.loops, self.is_cosine = picking, similarity == "cosine"
        self.factor, self.rise = (1.0, 0.0) if self.is_cosine else (2.0, 2.0)
        self.left, self.next_equal = find_equal(rows)
        self.rows, self.n_left, self.split = rows, len(rows.place), rows.n_left
        self.width = rows.values.shape[1]
        self.product_error = (self.width + 16) * picking.ROUNDING
        self.held_values = HELD_BYTES // n_beside // 4
        n_values = max(ROOM_BYTES // n_beside // 4, 2 * self.n_left)
        self.room = np.empty(n_values, dtype=np.float32)
        self.pool_values = POOL_BYTES // n_beside // 4
        self.numbers = np.full(self.n_left, -1)
        self.numbers[self.left] = self.left
        self.total = np.zeros((max(self.split, 1), self.width - self.split))
        picking.add_rows(rows, np.arange(self.n_left), 1.0, self.total)
        self.square_total = float(rows.squares.sum())
        n_knots = min(MAX_KNOTS, max(2, KNOT_VALUES // self.total.size))
        sums, first = np.empty((n_knots + 1, *self.total.shape)), np.zeros(n_knots + 1, int)
        low, bend = np.empty((2, n_knots))
        self.path = Path(sums, first, low, bend, np.zeros(1, dtype=np.int64))
        self.pools: list[Pool] = []
        self.first_gains, self.first_error = np.empty(self.n_left), 0.0
        self.is_paired, self.load, self.n_products, self.counted_at = False, 0.0, 0, 0

    def pick(
        self, n_picks: int, on_picks: Callable[[int], object] | None = None
    ) -> tuple[Int[ndarray, " picks"], Float[ndarray, " picks"]]:
        """Make a greedy run over the rows that are left.

        Args:
            n_picks: How many to pick, at most `n_left`.
            on_picks: Called now and then with the number of rows picked since, which may be 0.

        Returns:
            The row numbers in pick order, and the gain with which each was picked.
        """
        scale = float(self.n_left)
        if not self.is_cosine:
            moved = float(np.vdot(self.total, self.total)) / self.n_left
            scale = max(self.square_total - moved, 0.0)
        self.tie, self.n_start = TIE_WIDTH * scale, self.n_left
        self.sum, self.done, self.n_picks = self.total.copy(), 0, n_picks
        self.picks, self.picked = np.empty((2, n_picks), dtype=np.int64)
        self.made = np.empty(n_picks)
        self.widest = float(np.sqrt(self.rows.squares[self.left].max())) + self.loops.SHORTEST
        self.paces, self.on_picks, self.n_told = [Pace(n_picks)], on_picks, 0
        is_whole = self.is_paired or self._count_open() >= MIN_OPEN * len(self.left)
        self._take_all(not (self.pools and is_whole))
        while self.done < n_picks:
            self._choose_pairs()
            self._draw()
            end = self._pick_some()
            if end != NO_CHECK:
                self._check(end)
        if not self.is_cosine:
            squares = self.rows.squares[self.picks]
            self.made += 2 * (np.cumsum(squares) - squares) - self.square_total
            self.square_total -= float(squares.sum())
        # W of the rows left is the mean of that at both ends of this run; so are its gains
        pool, self.total = self.pools[0], (self.total + self.sum) / 2
        self.first_gains[pool.rows] = (self.first_gains[pool.rows] + pool.gains) / 2
        self.first_error = max(self.first_error, pool.error[0])
        self.n_left -= n_picks
        return self.picked, self.made

    def _count_open(self) -> int:
        """Count the rows of the outermost pool that are not used up."""
        return int(np.count_nonzero(self.numbers[self.left] >= 0))

    def _tell(self) -> None:
        """Tell the caller how many picks were made; those that were undone are told once."""
        if self.on_picks is not None:
            self.on_picks(max(self.done - self.n_told, 0))
            self.n_told = max(self.done, self.n_told)

    def _take_all(self, is_new: bool) -> None:
        """Begin with the outermost pool, made anew of all rows that are left or as it is."""
        if is_new:
            for pool in self.pools:
                pool.block, pool.products, pool.coded = None, None, NO_CODES  # room for new ones
            self.pools, self.left = [], self.left[self.numbers[self.left] >= 0]
            size, block = len(self.left), None
            if size * self.width <= self.held_values:
                block = np.empty((size, self.width), dtype=np.float32)
                self.loops.copy_rows(self.rows, self.left, block)
            squares, ends = self.rows.squares[self.left], np.full(size, NO_CHECK)
            self.pools.append(Pool(self.left, np.empty(size), squares, ends, block))
        pool = self.pools[0]
        if self.done or self.is_paired or self.n_left == len(self.numbers):
            self._work_out(pool, np.arange(len(pool.rows)))
        else:
            pool.gains = np.where(self.numbers[pool.rows] < 0, -np.inf, self.first_gains[pool.rows])
            pool.error[:] = self.first_error, 0
        if not self.done:
            self.first_gains[pool.rows], self.first_error = pool.gains, pool.error[0]
            pool.scan_until = 0

    def _choose_pairs(self) -> None:
        """Choose whether all pairs of the rows left are multiplied at once."""
        if len(self.pools) > 1 or self.is_paired:
            return
        size, n_picks = self._count_open(), len(self.numbers) - self.n_left + self.done
        if n_picks - self.counted_at >= LOAD_PICKS:
            self.load = self.n_products / (n_picks - self.counted_at)
            self.n_products, self.counted_at = 0, n_picks
        if size**2 <= len(self.room) and (size <= 2 * POOL_ROWS or self.load > PAIR_LOAD * size):
            self._take_all(True)
            self.is_paired = True

    def _draw(self) -> None:
        """Draw smaller pools from the innermost, as long as they pay."""
        while not self.is_paired:
            depth, pool = len(self.pools) - 1, self.pools[-1]
            n_open = int(np.count_nonzero(pool.gains > -np.inf))
            if not depth and n_open < MIN_OPEN * len(pool.rows):
                self._take_all(True)
                continue
            size = max(POOL_ROWS, int(POOL_SHARE * n_open))
            if not depth:
                size = min(size, max(1, self.pool_values // self.width))
            is_paused = self.done < self.paces[depth].pause_until
            has_room = self._count_used() + size * (self.width + 1) <= len(self.room)
            if is_paused or n_open <= 1.5 * size or not has_room:
                return
            if not depth:
                self._restart_path()
            pool.knot = int(self.path.last[0])
            inside = np.sort(np.argpartition(pool.gains, -size)[-size:])
            pool.is_inside = np.zeros(len(pool.rows), dtype=bool)
            pool.is_inside[inside] = True
            rows, gains, ends = pool.rows[inside], pool.gains[inside], pool.ends[inside]
            n_weak = min(int((1 - STRONG_SHARE) * size), size - 1)
            is_weak = gains <= np.partition(gains, n_weak)[n_weak]
            ends[is_weak & (ends == NO_CHECK)] = depth
            made = Pool(rows, gains, pool.squares[inside], ends, pool.block)
            made.error[:] = pool.error
            if pool.block is None:
                made.block = self._find_room(size)
                self.loops.copy_rows(self.rows, rows, made.block)
            else:
                made.at = inside if pool.at is None else pool.at[inside]
            self.pools.append(made)
            if len(self.paces) < len(self.pools):
                self.paces.append(Pace(self.n_picks))

    def _pick_some(self) -> int:
        """Pick in the innermost pool until one has to be checked; gives its number."""
        pool, depth = self.pools[-1], len(self.pools) - 1
        if pool.products is None:
            self._begin_products(pool)
        stop, end = self.n_picks, NO_CHECK
        if self.done < self.paces[depth].pause_until:
            stop = min(stop, self.paces[depth].pause_until)
        for k, outer in enumerate(self.pools[:-1]):
            limit = int(self.path.first[outer.knot]) + self.paces[k].limit
            stop, end = (limit, k) if limit < stop else (stop, end)
        n_before = self.done
        run = (self.numbers, self.picks, self.picked, self.made)
        own = (pool.rows, pool.gains, pool.squares, pool.ends)
        while True:
            if not depth:
                self._restart_path()
            begin, last, coded = self.done, min(stop, self.done + PICKS_A_CALL), NO_CODES
            if is_scanned := begin < pool.scan_until:
                n_fit = max(1, CALL_VALUES // (len(pool.rows) * self.width))
                last, coded = min(last, pool.scan_until, begin + n_fit), pool.coded
            self.done, why, what = self.loops.pick_rows(
                *(self.rows, run, own + coded, pool.products, pool.slots, self.next_equal),
                *(self.sum, self.path, self._rules(0), pool.error, begin, last),
            )
            self._tell()
            if is_scanned:
                self.n_products += (self.done - begin) * len(pool.rows)
                n_before = self.done
            if self.done == self.n_picks:
                return 0 if depth else NO_CHECK
            if why == self.loops.IS_DONE:
                if self.done == stop:
                    return end
                continue
            if why == self.loops.NEEDS_CHECK:
                return what if what != NO_CHECK else depth - 1
            if (n_served := self.done - n_before) > 0:
                pool.n_wanted = min(max(n_served, MIN_ROWS), MAX_ROWS)
                pool.n_scans = pool.n_scans if n_served == 1 else MIN_PAUSE
                n_before = self.done
            if n_served == 1 and not self.split:
                self._begin_scans(pool)
            else:
                self._add_products(pool, what)

    def _begin_products(self, pool: Pool) -> None:
        """Give room to the products of a pool: half of what is left, or all for all pairs."""
        if pool.block is not None and pool.at is not None:
            block, at = self._find_room(len(pool.rows)), pool.at
            np.take(pool.block, at, axis=0, out=block, mode="clip")
            pool.block, pool.at = block, None
        size, n_used = len(pool.rows), self._count_used()
        n_free = (len(self.room) - n_used) // (1 if self.is_paired else 2)
        n_slots = min(size, max(1, n_free // size))
        pool.products = self.room[n_used : n_used + n_slots * size].reshape(n_slots, size)
        pool.slots, pool.n_filled = np.full(size, -1), 0
        pool.n_wanted = size if self.is_paired else FIRST_ROWS

    def _begin_scans(self, pool: Pool) -> None:
        """Let gains be worked out at each pick for a while."""
        if not pool.coded[0].size:
            codes = np.empty((len(pool.rows), self.width), dtype=np.int8)
            steps = np.empty(len(pool.rows), dtype=np.float32)
            pool.coded = codes, steps, self.loops.encode_rows(self.rows, pool.rows, codes, steps)
        pool.scan_until = self.done + pool.n_scans
        pool.n_scans = min(2 * pool.n_scans, MAX_PAUSE)

    def _add_products(self, pool: Pool, place: int) -> None:
        """Multiply the row at a place, and those of the highest gains, with all rows of a pool."""
        assert pool.products is not None and pool.slots is not None
        gains = np.where(pool.slots < 0, pool.gains, -np.inf)
        gains[place] = np.inf
        n_made = min(pool.n_wanted, len(pool.products), int((gains > -np.inf).sum()))
        places = np.sort(np.argpartition(gains, -n_made)[-n_made:])
        if pool.n_filled + n_made > len(pool.products):
            pool.slots[:], pool.n_filled = -1, 0
        end = pool.n_filled + n_made
        self._multiply(pool, places, pool.products[pool.n_filled : end])
        pool.slots[places] = np.arange(pool.n_filled, end)
        pool.n_filled = end
        self.n_products += n_made * len(pool.rows)

    def _check(self, end: int) -> None:
        """Check the pools from the innermost to the one that ended, and undo picks that fail."""
        while len(self.pools) - 1 > end:
            self.pools.pop()
            pool, pace = self.pools[-1], self.paces[len(self.pools) - 1]
            begin, total = int(self.path.first[pool.knot]), self.path.sums[pool.knot]
            n_picks = self.done - begin
            if not n_picks:
                continue
            outside = np.flatnonzero(~pool.is_inside & (pool.gains > -np.inf))
            before, after = pool.gains[outside], self._project(pool, outside)
            slack = max(self._slack(self.sum), self._slack(total))
            safe, n_dots = self.loops.count_safe(
                *(self.rows, pool.rows[outside], before, after, np.array([slack, pool.error[0]])),
                *(self.path, pool.knot, self._rules(begin)),
            )
            n_safe = int(self.path.first[safe]) - begin
            if n_safe == n_picks:
                pool.gains[outside] = after
                self._work_out(pool, np.flatnonzero(pool.is_inside))
                pace.limit = max(pace.limit, int(1.1 * n_picks) + 1)
            else:
                undone = slice(begin + n_safe, self.done)
                self.sum[:], self.path.last[0] = self.path.sums[safe], safe
                self.path.low[safe] = np.inf
                self.numbers[self.picks[undone][::-1]] = self.picked[undone][::-1]
                self.done = undone.start
                self._work_out(pool, np.arange(len(pool.rows)))
                pace.limit = max(2, int(0.8 * n_safe))
            if len(pool.rows) + n_dots <= PRODUCT_COST * n_safe * len(outside):
                pace.pause = MIN_PAUSE
            else:
                pace.pause_until = self.done + pace.pause
                pace.pause = min(2 * pace.pause, MAX_PAUSE)

    def _work_out(self, pool: Pool, places: Int[ndarray, " k"]) -> None:
        """Work out gains of a pool as the running sum is now; the others are so already."""
        pool.gains[places] = self._project(pool, places)
        pool.gains[self.numbers[pool.rows] < 0] = -np.inf
        pool.error[:] = self._slack(self.sum) * self.widest, 0

    def _restart_path(self) -> None:
        """Forget the trajectory up to now."""
        self.path.sums[0], self.path.first[0] = self.sum, self.done
        self.path.low[0], self.path.last[0] = np.inf, 0

    def _slack(self, total: Float[ndarray, "k d"]) -> float:
        """Bound what float32 takes from a gain of a row of norm 1."""
        return 2.5 * self.loops.ROUNDING * self.factor * float(np.linalg.norm(total))

    def _rules(self, done: int) -> tuple[float, ...]:
        """Give the numbers that make up a gain; see `pick_rows`."""
        tilt = 0.0 if self.is_cosine else 2.0 * done - self.n_start
        return self.factor, self.rise, tilt, self.tie, self.product_error, self.widest

    def _project(self, pool: Pool, places: Int[ndarray, " k"]) -> Float[ndarray, " k"]:
        """Give the gains of some rows of a pool, less the constant."""
        found = np.empty(len(places))
        if pool.block is None:
            self.loops.project_rows(self.rows, pool.rows[places], self.sum, found)
        else:
            at = places if pool.at is None else pool.at[places]
            self.loops.project_block(pool.block, at, self.split, self.sum, found)
        return self.factor * found + self._rules(self.done)[2] * pool.squares[places]

    def _multiply(
        self, pool: Pool, places: Int[ndarray, " b"], products: Float32[ndarray, "b r"]
    ) -> None:
        """Multiply some rows of a pool with all of it."""
        batch, k = self._block(pool, slice(None) if self.is_paired else places), self.split
        step = BLOCK_ROWS if pool.block is None or k or self.is_paired else len(pool.rows)
        for start in range(0, len(pool.rows), step):
            span, stop = slice(start, start + step), start + step
            block, first = self._block(pool, span), start if self.is_paired else 0
            out = products[first:, span]
            left, right = batch[first:, k:], block[:, k:]
            if len(left) < FEW_ROWS:
                out[:] = (right @ left.T).T
            else:
                np.matmul(left, right.T, out=out)
            if k:
                out *= batch[first:, :k] @ block[:, :k].T
            for row in range(stop, len(pool.rows) if self.is_paired else 0, 256):  # symmetric
                products[span, row : row + 256] = products[row : row + 256, span].T

    def _block(self, pool: Pool, places: slice | Int[ndarray, " b"]) -> Float32[ndarray, "b w"]:
        """Give some rows of a pool in float32."""
        if pool.block is not None:
            return pool.block[places]
        rows = pool.rows[places]
        block = np.empty((len(rows), self.width), dtype=np.float32)
        self.loops.copy_rows(self.rows, rows, block)
        return block

    def _count_used(self) -> int:
        """Count the numbers of the room that pools take."""
        held = [pool.products for pool in self.pools]
        held += [pool.block for pool in self.pools[1:] if pool.at is None]
        return sum(array.size for array in held if array is not None)

    def _find_room(self, n_rows: int) -> Float32[ndarray, "r w"]:
        """Give room for the rows of one more pool."""
        start = self._count_used()
        return self.room[start : start + n_rows * self.width].reshape(n_rows, self.width)
