"""What the pipeline asks of one kind of data."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset
from jaxtyping import Float, Int
from numpy import ndarray

Problems = dict[str, list[int]]
"""Row numbers of odd rows, by what is odd."""
LONGER = "longer than the encoder reads"
"""How that problem begins which is no fault of the rows."""


@dataclass(frozen=True)
class Embedded:
    """What one pass over a batch gives.

    Attributes:
        embedding: One vector a row, float32.
        middle: Pooled features of a middle layer; None unless the adapter is scored.
        texture: Texture level of each row and the number of patches (or windows) it is the mean
            of, 0 for a row without any; None unless the adapter is scored. Of a row with images
            and text these two numbers of the images, then those of the text.
    """

    embedding: Float[ndarray, "b d"]
    middle: Float[ndarray, "b k"] | None = None
    texture: Float[ndarray, "b t"] | None = None


class Part(NamedTuple):
    """The columns of each array of `Embedded` that are scored together."""

    embedding: slice = slice(None)
    middle: slice = slice(None)
    texture: slice = slice(None)


class Adapter(ABC):
    """One kind of data: which rows there are, how long they are, and how they are embedded.

    Another kind of data has to write the six abstract members.

    Args:
        dataset: The rows, or a stream of them.
        is_scored: Whether `embed` gives what the scores of the bins need beside the embedding.

    Attributes:
        notes: What a user has to be told beside the problems, one line each.
        problems: Odd rows; filled by `lengths`, or batch by batch from what `load` finds.
        chunk_rows: Rows of a chunk, where the rows come as a stream: a batch is of one chunk.
    """

    MODEL_PARTS = ("model", "encoder")
    """Attributes that hold a loaded model."""

    def __init__(self, dataset: Dataset, *, is_scored: bool = False) -> None:
        self.is_scored = is_scored
        self.notes: list[str] = []
        self.problems: Problems = {}
        self.chunk_rows: int | None = getattr(dataset, "chunk_rows", None)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Say which columns are embedded and how, as config.yaml records it."""

    @abstractmethod
    def describe_model(self) -> dict[str, Any]:
        """Say which model embeds, as config.yaml records it."""

    @abstractmethod
    def lengths(self) -> Int[ndarray, " n"]:
        """Give every row's cost for the encoder, so that a batch holds rows alike."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Size d of an embedding."""

    @abstractmethod
    def load(self, rows: Int[ndarray, " b"], view: int | None = None) -> tuple[Any, Problems]:
        """Read one batch of rows and make it ready for `embed`; threads run it ahead.

        Args:
            rows: Row numbers.
            view: Seed of an augmented view of each row; None is the row itself.
        """

    @abstractmethod
    def embed(self, batch: Any) -> Embedded:
        """Embed what `load` made."""

    def share_model(self, loaded: "list[Adapter]") -> None:
        """Use the model of the adapter that is loaded, of the same settings, and be that one."""
        if loaded:
            self.__dict__ |= {k: v for k, v in vars(loaded[0]).items() if k in self.MODEL_PARTS}
        loaded[:] = [self]

    @property
    def middle_dimension(self) -> int:
        """Size k of the middle features, 0 where the model has none."""
        return 0

    @property
    def parts(self) -> list[Part]:
        """What is scored on its own, text last; the scores of the parts are summed."""
        return [Part()]

    def contents(self, rows: Int[ndarray, " b"]) -> Iterator[bytes]:
        """Give the text, white space apart, or the image file of rows, empty if there is none."""
        raise NotImplementedError

    def surprisal(self, bins: Int[ndarray, " n"]) -> Float[ndarray, " m"]:
        """Give the mean surprisal of the tokens of each bin, in bits; text only."""
        raise NotImplementedError


def note_problem(
    what: str,
    rows: list[int],
    n_rows: int | None = None,
    fate: str = "still candidates",
    n_odd: int | None = None,
) -> str:
    """Say a problem in one line, with its first row numbers.

    Args:
        what: The problem.
        rows: The rows that have it.
        n_rows: How many rows there are.
        fate: What becomes of them.
        n_odd: How many have it, where only some are given.
    """
    n_odd = len(rows) if n_odd is None else n_odd
    noun = "row" if n_odd == 1 else "rows"
    if what.startswith(LONGER):
        return f"{n_odd:,} {noun} of {n_rows:,} {'is' if n_odd == 1 else 'are'} {what}"
    shown = ", ".join(str(row) for row in rows[:8]) + (", ..." if n_odd > 8 else "")
    return f"{n_odd:,} {noun} with {what}, {fate}: {noun} {shown}"
