"""Picks that are made in a row among some rows."""

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.core.blocks import Rows
from dq_multimodal.core.greedy import Greedy
from dq_multimodal.core.way import go_on

if TYPE_CHECKING:
    from dq_multimodal.core.held import SourceRows


class Picks:
    """Some rows, and the picks made in a row among them, which are forgotten or handed on.

    Args:
        cut: The greedy run.
        numbers: The rows.
        squares: Their squared norms.
        block: The rows themselves.

    Attributes:
        numbers: Row numbers; -1 where a row is used up.
        losses: See `Losses`; None before it is needed.
        rise: By how many squared norms of a row its gain rises with every pick.
        taken: Places of the rows picked, in order.
        picked: Their row numbers.
        made: Their gains, less the constant.
        length: While they are made, their norms together.
        sums: How far W went before each of them, and after the last; fewer while they are made.
        exact: The gains before the first; None where they are not known exactly.
    """

    def __init__(
        self,
        cut: Greedy,
        numbers: Int[ndarray, " n"],
        squares: Float[ndarray, " n"],
        block: "Rows | SourceRows",
    ) -> None:
        self.cut = weakref.proxy(cut)  # it may hold these rows
        self.numbers, self.squares, self.norms = numbers, squares, np.sqrt(squares)
        self.block: Any = block
        self.losses: Any = None
        self.rise = 0.0 if cut.is_cosine else 2.0
        self._begin(None)

    def _begin(self, exact: Float[ndarray, " n"] | None) -> None:
        """Begin a row of picks, by the gains before the first."""
        self.exact = exact
        self.taken: list[int] = []
        self.picked: list[int] = []
        self.sums, self.made = np.zeros((1, len(self.cut.sum))), np.empty(0)
        self.length = 0.0

    def __len__(self) -> int:
        return len(self.numbers)

    def work_out(self) -> Float[ndarray, " n"]:
        """Give gains in float64, less the constant; minus infinity for rows that are used up."""
        gains = self._at_first(slice(None))
        gains[self.numbers < 0] = -np.inf
        return gains

    def roll_back(self, n_kept: int) -> None:
        """Forget the picks after the first few."""
        undone = zip(self.taken[n_kept:][::-1], self.picked[n_kept:][::-1], strict=True)
        for at, number in undone:
            self._stand_for(at, number)
        self.taken, self.picked = self.taken[:n_kept], self.picked[:n_kept]
        self.made, self.sums = self.made[:n_kept], self.sums[: n_kept + 1]

    def keep(self) -> None:
        """Hand the picks to the greedy run."""
        self.cut.keep(self.picked, self.made, self.squares[self.taken], self.sums[-1])

    def _at_first(self, places: slice | Int[ndarray, " k"]) -> Float[ndarray, " k"]:
        """Give gains of rows before the first pick."""
        cut = self.cut
        gains = cut.factor * (self.block[places] @ cut.sum)
        if self.rise:
            gains += cut.tilt(cut.done) * self.squares[places]
        return gains

    def _follow(self, places: Int[ndarray, " k"], when: Int[ndarray, " k"]) -> Float[ndarray, " k"]:
        """Give the gain of each of some rows after so many of the picks."""
        rows = self.block[places].flat()
        at_first = self._at_first(places) if self.exact is None else self.exact[places]
        gains = at_first + self.cut.factor * np.vecdot(rows, self.sums[when])
        return gains + self.rise * when * self.squares[places]

    def _go(self, places: Int[ndarray, " t"]) -> None:
        """Go on with W by the last picks, up to some that are not noted yet."""
        late = np.array(self.taken[len(self.sums) - 1 :], dtype=np.int64)
        rows = self.block[np.concatenate([late, places])].flat()
        self.sums = go_on(self.sums, -2.0 * rows)

    def _note(self, places: list[int]) -> None:
        """Note rows as picked."""
        next_equal = self.cut.next_equal
        if next_equal is None or (next_equal[self.numbers[places]] < 0).all():
            self.picked += self.numbers[places].tolist()
            self.numbers[places] = -1  # and none stands for another, so no place comes twice
        else:
            for at in places:
                number = int(self.numbers[at])
                self.picked.append(number)
                self._stand_for(at, int(next_equal[number]))
        self.length += float(self.norms[places].sum())
        self.taken += places

    def _stand_for(self, at: int, number: int) -> None:
        """Let the row at a place stand for an equal one, -1 for none."""
        self.numbers[at] = number
        if self.losses is not None:
            self.losses.change_own(at, self._are_last(self.numbers[at]))

    def _are_last(self, numbers: Any) -> Any:
        """Tell of numbers whether a pick uses their rows up, or they are used up."""
        next_equal = self.cut.next_equal
        return (numbers < 0) | (True if next_equal is None else next_equal[numbers] < 0)

    def _find_numbers(self, taken: list[int]) -> Int[ndarray, " t"]:
        """Give the numbers of picks, up to the first of a row of which no equal one is left."""
        next_equal = self.cut.next_equal
        if next_equal is None:
            return self.numbers[taken]
        left: dict[int, int] = {}
        numbers: list[int] = []
        for at in taken:
            number = left.get(at, int(self.numbers[at]))
            if number < 0:
                break
            numbers.append(number)
            left[at] = int(next_equal[number])
        return np.array(numbers, dtype=np.int64)
