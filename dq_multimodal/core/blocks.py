"""Some rows in float64, with the operations that the greedy asks for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

TILE_ROWS, STRIP_ROWS = 512, 64
"""Rows whose pairs are multiplied out at once, and columns of these that are mirrored at once."""


class PlainRows:
    """Some rows of a matrix, float64, with the operations that the greedy asks for."""

    def __init__(self, rows: Float[ndarray, "n d"]) -> None:
        self.rows, self.shape = rows, rows.shape
        self.widths = (rows.shape[1],)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> "PlainRows":
        return PlainRows(self.rows[rows])

    def __matmul__(self, vectors: Float[ndarray, "d *k"]) -> Float[ndarray, "n *k"]:
        return self.rows @ vectors

    def sum(self) -> Float[ndarray, " d"]:
        """Give the sum of all rows."""
        return self.rows.sum(axis=0)

    def squares(self) -> Float[ndarray, " n"]:
        """Give the squared norm of every row."""
        return row_squares(self.rows)

    def pairs(self, others: "PlainRows | None" = None) -> Float[ndarray, "n m"]:
        """Give the inner products with all rows of others, or among themselves."""
        return self.rows @ (self if others is None else others).rows.T

    def narrow(self) -> "PlainRows":
        """Give the rows in float32."""
        return PlainRows(self.rows.astype(np.float32))

    def products(self, row: int) -> Float[ndarray, " n"]:
        """Give the inner products of all rows with one of them."""
        return self.rows @ self.rows[row]

    def flat(self) -> Float[ndarray, "n d"]:
        """Give the rows as a matrix."""
        return self.rows

    def parts(self) -> list[Float[ndarray, "n d"]]:
        """Give the rows, the only part."""
        return [self.rows]

    def weighted(self, weights: Float[ndarray, "n m"]) -> Float[ndarray, "d m"]:
        """Give the sums of all rows, each times its weight."""
        return self.rows.T @ weights


class OuterProducts:
    r"""Rows that are outer products $a_i b_i^T$, never multiplied out.

    $\langle a_i b_i^T, a_j b_j^T \rangle = \langle a_i, a_j \rangle \langle b_i, b_j \rangle$,
    and $\langle a_i b_i^T, V \rangle = a_i^T V b_i$, so inner products need the factors alone.
    They behave as `PlainRows` of the (n, k d) array of the flattened products.

    Args:
        left: The factors a, (n, k).
        right: The factors b, (n, d).
    """

    def __init__(self, left: Float[ndarray, "n k"], right: Float[ndarray, "n d"]) -> None:
        self.left, self.right = left, right
        self.shape = (len(left), left.shape[1] * right.shape[1])
        self.widths = (left.shape[1], right.shape[1])

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, rows: Any) -> "OuterProducts":
        return OuterProducts(self.left[rows], self.right[rows])

    def __matmul__(self, vectors: Float[ndarray, "kd *m"]) -> Float[ndarray, "n *m"]:
        if vectors.ndim == 2:
            made = np.empty((len(self), vectors.shape[1]))
            for column, vector in zip(made.T, vectors.T, strict=True):
                column[:] = self @ vector
            return made
        matrix = vectors.reshape(self.left.shape[1], self.right.shape[1])
        return np.einsum("ij,ij->i", self.left @ matrix, self.right)

    def sum(self) -> Float[ndarray, " kd"]:
        """Give the sum of all products, flattened."""
        return (self.left.T @ self.right).ravel()

    def squares(self) -> Float[ndarray, " n"]:
        """Give the squared norm of every product."""
        return row_squares(self.left) * row_squares(self.right)

    def pairs(self, others: "OuterProducts | None" = None) -> Float[ndarray, "n m"]:
        """Give the inner products with all rows of others, or among themselves."""
        others = self if others is None else others
        return (self.left @ others.left.T) * (self.right @ others.right.T)

    def narrow(self) -> "OuterProducts":
        """Give the factors in float32."""
        return OuterProducts(self.left.astype(np.float32), self.right.astype(np.float32))

    def products(self, row: int) -> Float[ndarray, " n"]:
        """Give the inner products of all rows with one of them."""
        return (self.left @ self.left[row]) * (self.right @ self.right[row])

    def flat(self) -> Float[ndarray, "n kd"]:
        """Multiply the products out."""
        return np.einsum("ni,nj->nij", self.left, self.right).reshape(self.shape)

    def parts(self) -> list[Float[ndarray, "n _"]]:
        """Give the two factors."""
        return [self.left, self.right]

    def weighted(self, weights: Float[ndarray, "n m"]) -> Float[ndarray, "kd m"]:
        """Give the sums of all products, each times its weight."""
        sums = [(self.left * weight[:, None]).T @ self.right for weight in weights.T]
        return np.stack([made.ravel() for made in sums], axis=1)


Rows = PlainRows | OuterProducts


def row_squares(rows: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
    """Give the squared norm of every row."""
    return np.vecdot(rows, rows)


def all_pairs(rows: Rows) -> Float[ndarray, "n n"]:
    """Give the inner products of all pairs of float32 rows."""
    narrow: Any = rows
    size = len(rows)
    if size <= 2 * TILE_ROWS:
        return narrow.pairs()
    made = np.empty((size, size), dtype=np.float32)
    for start in range(0, size, TILE_ROWS):
        span = slice(start, start + TILE_ROWS)
        pairs = narrow[span].pairs(narrow[start:])
        made[span, start:] = pairs
        for at in range(start + TILE_ROWS, size, STRIP_ROWS):
            strip = pairs[:, at - start : at - start + STRIP_ROWS]
            made[at : at + STRIP_ROWS, span] = strip.T
    return made


def as_rows(parts: Sequence[Float[ndarray, "n _"]]) -> Rows:
    """Give rows by their only part, or by the two factors of their products."""
    return PlainRows(parts[0]) if len(parts) == 1 else OuterProducts(parts[0], parts[1])
