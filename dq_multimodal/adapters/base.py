"""What the pipeline asks of one kind of data."""

from typing import Any, Protocol

from jaxtyping import Float, Int
from numpy import ndarray


class Adapter(Protocol):
    """One kind of data: which rows there are, how long they are, and how they are embedded."""

    notes: list[str]
    """What a user has to be told of the rows, one line each."""

    problems: dict[str, list[int]]
    """Row numbers of odd rows by what is odd; filled by `lengths`."""

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

    def embed(self, rows: Int[ndarray, " b"]) -> Float[ndarray, "b d"]:
        """Embed one batch of rows, float32."""
        ...
