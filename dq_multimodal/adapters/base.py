"""What the pipeline asks of one kind of data."""

from typing import Any, Protocol

from jaxtyping import Float, Int
from numpy import ndarray

Problems = dict[str, list[int]]
"""Row numbers of odd rows, by what is odd."""


class Adapter(Protocol):
    """One kind of data: which rows there are, how long they are, and how they are embedded."""

    notes: list[str]
    """What a user has to be told beside the problems, one line each."""

    problems: Problems
    """Odd rows; filled by `lengths`, or batch by batch from what `load` finds."""

    def describe(self) -> dict[str, Any]:
        """Say which columns are embedded and how, as config.yaml records it."""
        ...

    def describe_model(self) -> dict[str, Any]:
        """Say which model embeds, as config.yaml records it."""
        ...

    def lengths(self) -> Int[ndarray, " n"]:
        """Give every row's cost for the encoder, so that a batch holds rows alike."""
        ...

    @property
    def dimension(self) -> int:
        """Size d of an embedding."""
        ...

    def load(self, rows: Int[ndarray, " b"]) -> tuple[Any, Problems]:
        """Read one batch of rows and make it ready for `embed`; threads run it ahead."""
        ...

    def embed(self, batch: Any) -> Float[ndarray, "b d"]:
        """Embed what `load` made, float32."""
        ...


def note_problem(what: str, rows: list[int]) -> str:
    """Say a problem in one line, with its first row numbers."""
    shown = ", ".join(str(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    noun = "row" if len(rows) == 1 else "rows"
    return f"{len(rows):,} {noun} with {what}, kept in play: {noun} {shown}"
