"""Exact greedy GraphCut picks, far below n^2 work and in O(n) memory beside the embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.config import Similarity
from dq_multimodal.core.blocks import row_squares
from dq_multimodal.core.front import FRONT_SHARE, MAX_PLAIN_VALUES, Front, Near
from dq_multimodal.core.greedy import Greedy
from dq_multimodal.core.hashing import row_hash
from dq_multimodal.core.levels import NEAR_ROWS, RING_FACTOR, RING_ROWS, RUN_PICKS, Level
from dq_multimodal.core.losses import count_pair_bytes, has_room
from dq_multimodal.core.rows import HELD_BYTES, RowSource, find_equal
from dq_multimodal.core.whole import RACE_PICKS, RACE_VALUES, Whole

DIRECTIONS = 32
"""Directions in which the change of a gain is followed exactly, at most."""

SAMPLE_ROWS, SAMPLE_TURNS = 2048, 3
"""Rows in which these are looked for, and steps of the search."""

TABLE_BYTES = 2**28
"""Memory for the pairs of all rows left (all pairs of 8,192 rows), or half of it for some pairs and
half for these rows."""

SMALL_ROWS = 1024
"""So few rows are all looked at: hardly any bound excludes a row of these for long."""

LOAD_SHARE = 1 / 2
"""Part of all rows that bounds have to leave for a pick before all are looked at."""

WHOLE_PICKS = 512
"""Picks that are then made among all rows until bounds are tried again; each time twice as many."""


class GraphCut(Greedy):
    r"""Exact greedy runs that look at few rows for a pick, see `Greedy`.

    - W is split along a few directions (the mean of a sample and its largest variation). What a
      gain owes to them is followed exactly in k numbers a row; what it owes to the rest of W, of
      which x has the length $\|x_\perp\|$, has moved by at most $f \|x_\perp\| \|\Delta
      W_\perp\|$ since the row was last looked at. This bounds every gain.
    - The near rows are drawn by these bounds from a few thousand, and these from all rows. What
      each draw left out is bounded together; where that does not do, it is drawn anew.
    - The best of the near rows, the front, are exact, and some picks are made in a row among
      them, see `Table`. One product with the way that W went bounds the near rows at its end, and
      so what lies between its ends, but for what the way bends. Of the few that might have won or
      tied, the gains at each pick are worked out (one product of two small matrices); the picks up
      to the first at which one does so are kept, and a new front is drawn there.
    - Where the sum W is so short that this leaves most rows to look at, picks are made among all
      of them, see `Whole`: for a while, or, where all their pairs have room, to the end.

    Float32 serves to exclude rows, with its error added to the bounds; gains that are compared
    are float64. The picks are those of the plain greedy. Rows that are equal bit for bit are one
    row that may be picked again.

    Args:
        source: The rows.
        similarity: Which gain.
        table_bytes: Memory for all rows left and their pairs.

    Attributes:
        terms: What the gain of a row is bounded by, each to be weighted: what it has along the
            directions, its length across them, its squared norm (euclidean), and what it owes to W
            across them.
        n_open: Distinct rows among those left.
    """

    def __init__(
        self, source: RowSource, similarity: Similarity, table_bytes: int = TABLE_BYTES
    ) -> None:
        super().__init__(similarity, len(source), np.zeros(source.n_columns), 0.0)
        self.source, self.table_bytes = source, table_bytes
        self.whole: Whole | None = None
        self.directions = find_directions(source)
        n_directions = self.directions.shape[1]
        n_terms = n_directions + (2 if self.is_cosine else 3)
        terms = np.zeros((len(source), n_terms), dtype=np.float32, order="F")
        squares, across = np.empty(len(source)), np.empty(len(source))
        for span in source.spans():
            block = source.take(span)
            self.total += block.sum()
            along = block @ self.directions
            terms[span, :n_directions], squares[span] = along, block.squares()
            across[span] = squares[span] - row_squares(along)
        self.square_total = float(squares.sum())
        across = np.maximum(across, 0.0) + 1e-13 * squares  # more than rounding takes from it
        terms[:, n_directions] = self.factor * np.sqrt(across)
        if not self.is_cosine:
            terms[:, n_directions + 1] = squares
        self.numbers, self.next_equal = find_equal(source)
        if len(self.numbers) < len(source):
            terms, squares = keep_rows(terms, self.numbers), squares[self.numbers]
        self.terms, self.squares, self.n_open = terms, squares, len(squares)
        self.norms, self.front_share = np.sqrt(squares), float(FRONT_SHARE)

    def _run(self, on_picks: Callable[[int], object] | None) -> None:
        n_whole = WHOLE_PICKS
        self.load, self.n_multiplied = 0.0, 0
        while self.done < self.n_picks:
            if self.whole is None and not self.suits_whole:
                self._pick_near(on_picks)
            else:
                self._pick_whole(n_whole, on_picks)
                n_whole *= 2

    def _pick_whole(self, n_most: int, on_picks: Callable[[int], object] | None) -> None:
        """Pick among all rows left: so many times, or to the end if all pairs have room."""
        if self.whole is None:
            self._compact()
            self.whole = Whole(self, np.arange(len(self.numbers)), self.numbers.copy())
        end = self.n_picks if self.whole.is_full else min(self.done + n_most, self.n_picks)
        while self.done < end:
            self.whole = self.whole.without_used(self)
            n_made = len(self.whole.pick_some(end - self.done))
            if on_picks is not None:
                on_picks(n_made)
        if not self.whole.is_full:
            rows = np.flatnonzero(self.whole.numbers >= 0)
            self.n_open = len(rows)
            self.numbers[:] = -1
            self.numbers[self.whole.places[rows]] = self.whole.numbers[rows]
            self.whole, self.load = None, 0.0

    def _pick_near(self, on_picks: Callable[[int], object] | None) -> None:
        """Pick among the rows near the best, until it is less work to look at all rows."""
        self._compact()
        self.pace, self.load = float(RUN_PICKS), 0.0
        self.widest = float(self.norms.max())
        sizes = [NEAR_ROWS]
        if self.n_left > 2 * RING_ROWS:
            sizes.insert(0, max(RING_ROWS, int(RING_FACTOR * self.n_left**0.5)))
        levels = [Level(self, None, sizes[0])]
        least = np.inf
        while self.done < self.n_picks and not self.suits_whole:
            depth = next(k for k, level in enumerate(levels) if level.is_spent)
            del levels[depth + 1 :]
            for size in sizes[depth + 1 :]:
                levels.append(Level(self, levels[-1].draw(least)[0], size))
            near = Near(self, *levels[-1].draw(least))
            least = self._pick_among(near, levels, on_picks)
            del near  # or it would be held beside the next one

    def _pick_among(
        self, near: Near, levels: list[Level], on_picks: Callable[[int], object] | None
    ) -> float:
        """Pick among some near rows while they do; gives the bound of rows to draw at least."""
        while True:
            front = Front(near)
            n_made = front.run(levels)
            if n_made and on_picks is not None:
                on_picks(n_made)
            if self.done == self.n_picks or self.suits_whole or any(k.is_spent for k in levels):
                return np.inf if n_made or front.is_used_up else front.line

    @property
    def suits_whole(self) -> bool:
        """Whether all rows left have room, and looking at few of them is not less work."""
        width = self.source.values.shape[1]
        return suits_whole(self.n_open, width, self.table_bytes, self.load)

    @property
    def run_picks(self) -> int:
        """Picks that are tried in a row: twice as many as lately were kept, within limits."""
        n_tried = round(2 * self.pace) if self.pace > 1.5 else 1
        return max(1, min(RUN_PICKS, n_tried))

    def _compact(self) -> None:
        """Forget the rows that are used up."""
        is_open = self.numbers >= 0
        if not is_open.all():
            for name in ("numbers", "squares", "norms"):
                setattr(self, name, getattr(self, name)[is_open])
            self.terms = keep_rows(self.terms, np.flatnonzero(is_open))

    def weigh(self, n_picks: int) -> None:
        """Follow how many rows are multiplied for a pick."""
        self.load += (self.n_multiplied / n_picks - self.load) / 8
        self.n_multiplied = 0

    def along(self, sums: Float[ndarray, "*t d"]) -> Float[ndarray, "*t k"]:
        """Give the weights of the directions at W, the factor f included."""
        return self.factor * (sums @ self.directions)

    def across(self, sums: Float[ndarray, "*t d"]) -> Float[ndarray, "*t d"]:
        """Give what W has across the directions."""
        return sums - (sums @ self.directions) @ self.directions.T

    def rounding(self, vectors: Float[ndarray, "*t d"]) -> float:
        """Bound the error of a product with the longest vector, for a row of norm 1."""
        lengths = np.linalg.norm(vectors, axis=-1)
        return self.source.rounding * float(np.max(lengths))


def keep_rows(values: Float[ndarray, "n k"], rows: Int[ndarray, " m"]) -> Float[ndarray, "m k"]:
    """Keep some rows, ascending, in the memory of all."""
    for column in values.T:
        column[: len(rows)] = column[rows]
    return values[: len(rows)]


def suits_whole(n_rows: int, n_columns: int, table_bytes: int, load: float) -> bool:
    """Tell whether picks are made among all rows left.

    Args:
        n_rows: Rows left.
        n_columns: Numbers a row.
        table_bytes: Memory for them and their pairs.
        load: Rows that were multiplied for a pick lately.
    """
    if 8 * n_rows * n_columns > table_bytes:
        return False
    if n_rows <= SMALL_ROWS:
        return True
    is_light = n_rows * n_columns <= MAX_PLAIN_VALUES  # and near rows can be a plain front
    return load >= LOAD_SHARE * n_rows and (has_room(n_rows, table_bytes) or not is_light)


def find_directions(source: RowSource) -> Float[ndarray, "d k"]:
    """Give orthonormal directions along which a sample of the rows varies most, its mean first.

    There are few enough that n x k numbers take at most a quarter of the memory of the rows. Picks
    do not depend on them, only the time they take.
    """
    n_rows, n_columns = len(source), source.n_columns
    size = min(DIRECTIONS, -(-n_columns // 4), max(1, 2**22 // n_columns))
    if n_rows <= 2 * FRONT_SHARE * RUN_PICKS:
        return np.zeros((n_columns, 0))
    sample = source.take(np.arange(0, n_rows, -(-n_rows // SAMPLE_ROWS)))
    mean = sample.sum() / len(sample)
    hashes = row_hash(0, n_columns * size).reshape(n_columns, size)
    turned = hashes / 2.0**63 - 1.0
    narrow: Any = sample.narrow()
    for _ in range(SAMPLE_TURNS):
        turned[:, 0] = mean
        basis = np.linalg.qr(turned)[0]
        turned = narrow.weighted(narrow @ basis.astype(np.float32)).astype(np.float64)
    if mean.any():
        turned[:, 0] = mean
    return np.linalg.qr(turned)[0]


def count_working_bytes(sizes: Sequence[int], n_columns: int) -> int:
    """Bound the memory that `make_bins` takes beside the embeddings, in bytes.

    About 8 k + 220 bytes a row, k being the number of followed directions (at most 32): half of it
    for a second level, which grows to all rows where no bound excludes any. What levels hold of the
    rows themselves or, later, the pairs of rows are bounded, and the blocks.

    Args:
        sizes: Rows of each of the strata that are binned side by side.
        n_columns: Numbers a row.
    """
    n_directions = min(DIRECTIONS, -(-n_columns // 4))
    n_bytes = 2**27
    for n_rows in map(int, sizes):
        held = 2 * min(4 * n_rows * n_columns, HELD_BYTES)
        share = TABLE_BYTES // len(sizes)
        n_whole = min(n_rows, share // (8 * n_columns))
        paired = count_pair_bytes(n_whole, share) + 4 * n_whole * n_columns
        paired += min(8 * n_whole * n_columns, HELD_BYTES)
        paired += 13 * min(RACE_PICKS * n_whole, RACE_VALUES)
        n_bytes += n_rows * (8 * n_directions + 220) + max(held, paired)
    return n_bytes
