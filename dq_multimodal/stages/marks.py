"""What is known of rows beside their bins: what leaves rows out, puts them last or weighs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from numpy import ndarray

from dq_multimodal.config import CompressConfig, DifficultyName, InputError
from dq_multimodal.files import describe_file, expand_home, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

MARK_TYPES = {
    "unreadable": "bool",
    "aum": "float",
    "confidence": "float",
    "dual": "float",
    "difficulty": "float",
    "nearest": "list<element: int32>",
    "duplicate_of": "int64",
    "group": "int32",
    "target_rank": "int64",
    "target_row": "int32",
}
"""Columns of selection.parquet that there are where they are known, in this order."""
NONE_IS_NULL = ("duplicate_of", "target_rank", "target_row")
"""Columns of row numbers that are null where a mark is -1."""


@dataclass(frozen=True)
class Marks:
    """Columns of the rows, each of them (n,), or None where it was not asked for.

    Attributes:
        unreadable: Whether the image cannot be decoded and the row is left out of any subset.
        aum: Area under the margin; NaN where there are no dynamics of the row, as of the next two.
        confidence: Mean probability of the label.
        dual: DUAL score.
        difficulty: What the row weighs in the coverage, at least 0.
        nearest: Of coverage, (n + 1,) starts and the numbers between them: for each row the ranks,
            in its stratum, of the rows that were one after the other the nearest picked one.
        duplicate_of: Row of which it is a near-duplicate, or -1.
        group: Code of its value in the column cap_by.
        target_rank: Place among the rows picked for the target, or -1.
        target_row: Row of the target for which it was picked, or -1.
    """

    unreadable: Bool[ndarray, " n"] | None = None
    aum: Float32[ndarray, " n"] | None = None
    confidence: Float32[ndarray, " n"] | None = None
    dual: Float32[ndarray, " n"] | None = None
    difficulty: Float32[ndarray, " n"] | None = None
    nearest: tuple[Int[ndarray, " n1"], Int[ndarray, " m"]] | None = None
    duplicate_of: Int[ndarray, " n"] | None = None
    group: Int[ndarray, " n"] | None = None
    target_rank: Int[ndarray, " n"] | None = None
    target_row: Int[ndarray, " n"] | None = None

    def readable(self, n_rows: int) -> Int[ndarray, " k"]:
        """Give the numbers of the rows that a subset may take."""
        return np.arange(n_rows) if self.unreadable is None else np.flatnonzero(~self.unreadable)

    def columns(self) -> "dict[str, pa.Array]":
        """Give the columns of selection.parquet."""
        import pyarrow as pa

        found = {}
        for name, kind in MARK_TYPES.items():
            values = getattr(self, name)
            if values is not None and name == "nearest":
                starts, ranks = (part.astype(np.int32) for part in values)
                item = pa.field("element", pa.int32())
                found[name] = pa.ListArray.from_arrays(starts, ranks, type=pa.list_(item))
            elif values is not None:
                mask = values < 0 if name in NONE_IS_NULL else None
                found[name] = pa.array(values, type=kind, mask=mask)
        return found

    @classmethod
    def from_table(cls, table: "pa.Table") -> "Marks":
        """Read the marks among the columns of selection.parquet."""
        found: dict[str, Any] = {}
        for name in MARK_TYPES.keys() & {*table.column_names}:
            column = table[name].combine_chunks()
            if name == "nearest":
                parts = column.offsets, column.values
                found[name] = tuple(part.to_numpy().astype(np.int64) for part in parts)
            elif name in NONE_IS_NULL:
                found[name] = column.fill_null(-1).to_numpy().astype(np.int64)
            else:
                found[name] = column.to_numpy(zero_copy_only=False)
        return cls(**found)


def make_marks(dataset: "Dataset", request: CompressConfig, n_rows: int) -> Marks:
    """Read what the request names beside the rows: dynamics, difficulty, the column of the cap.

    Raises:
        InputError: If a file or column cannot be used.
    """
    from dq_multimodal.core.difficulty import aum, confidence, dual

    found: dict[str, Any] = {}
    if request.dynamics is not None:
        values = read_dynamics(request.dynamics, n_rows)
        known = ~np.isnan(values).any(axis=(0, 2))
        if not known.any():
            raise InputError(f"no row has dynamics in {request.dynamics}: they are all NaN")
        if request.method == "dual" and len(values) < 2:
            raise InputError(f"dual needs dynamics of 2 epochs or more, got {len(values)}")
        if values.shape[2] == 3:
            scores = {"aum": aum, "confidence": confidence}
            scores |= {"dual": dual} if len(values) > 1 else {}
            found = _score(values, scores, np.nan)
        elif request.method in ("ccs", "dual") or request.noise_ratio:
            raise InputError(
                f"{request.method} needs training dynamics, (epochs, {n_rows}, 3), and "
                f"{request.dynamics} holds losses, {values.shape}"
            )
        if request.difficulty in get_args(DifficultyName):
            found["difficulty"] = weigh_dynamics(values, request)
    if request.difficulty is not None and "difficulty" not in found:
        found["difficulty"] = read_numbers(dataset, request.difficulty)
    if "difficulty" in found and not found["difficulty"].any():
        raise InputError(f"difficulty {request.difficulty} is 0 for all rows: leave it out")
    if request.cap_by is not None:  # rows without a value are a group of their own
        column = read_column(dataset, request.cap_by, "cap_by")
        names = ["" if value is None else f"={value}" for value in column]
        groups = np.unique(names, return_inverse=True)[1]
        found["group"] = groups.reshape(-1).astype(np.int64)
    return Marks(**found)


def _score(
    values: Float[ndarray, "t n k"], scores: Mapping[Any, Callable[[Any], ndarray]], unknown: float
) -> dict[str, Any]:
    """Score the rows that have dynamics, of which one copy is made."""
    known = ~np.isnan(values).any(axis=(0, 2))
    some = values[:, known]
    found = {name: np.full(len(known), unknown, dtype=np.float32) for name in scores}
    for name, score in scores.items():
        found[name][known] = score(some)
    return found


def read_dynamics(name: str, n_rows: int) -> Float[ndarray, "t n k"]:
    """Open training dynamics, (t, n, 3), or losses of responses, (t, n, 2).

    Raises:
        InputError: If it is neither, or of another number of rows.
    """
    values = _open_array(name)
    is_good = values.ndim == 3 and values.shape[2] in (2, 3) and values.dtype.kind == "f"
    if not is_good or values.shape[1] != n_rows or not len(values):
        raise InputError(
            f"dynamics must have shape (epochs, {n_rows}, 3), or (checkpoints, {n_rows}, 2) for "
            f"losses, got {values.dtype} of shape {values.shape} in {name}"
        )
    return values


def has_epochs(name: str) -> bool:
    """Say whether a file holds training dynamics of 2 epochs or more."""
    shape = _open_array(name).shape
    return len(shape) == 3 and shape[0] > 1 and shape[2] == 3


def _open_array(name: str) -> ndarray:
    try:
        values = np.load(expand_home(name), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read the dynamics {name}: {first_line(error)}") from None
    if not isinstance(values, np.ndarray):
        raise InputError(f"dynamics must be a .npy file, and {name} holds several arrays")
    return values


def weigh_dynamics(values: Float[ndarray, "t n k"], request: CompressConfig) -> ndarray:
    """Give every row its weight in the coverage by a score of its dynamics; NaN weighs nothing."""
    from dq_multimodal.core import difficulty

    name = cast(DifficultyName, request.difficulty)
    is_of_losses = name == "ifd"
    if is_of_losses != (values.shape[2] == 2):
        wanted = "losses of responses" if is_of_losses else "training dynamics"
        raise InputError(f"difficulty {name} is of {wanted}, got dynamics of shape {values.shape}")
    scores: dict[DifficultyName, Callable[[ndarray], ndarray]] = {
        "aum": difficulty.aum,
        "cad": difficulty.cad,
        "dual": difficulty.dual,
        "dyn-unc": difficulty.dyn_unc,
        "el2n": difficulty.el2n,
        "forgetting": difficulty.forgetting,
        "ifd": lambda v: difficulty.ifd(v).mean(axis=0),
    }
    weigh = {name: lambda v: difficulty.difficulty_weights(name, scores[name](v))}
    return _score(values, weigh, 0.0)[name]


def read_numbers(dataset: "Dataset", column: str) -> Float32[ndarray, " n"]:
    """Read a column of finite numbers of at least 0, clipped as other difficulties are."""
    from dq_multimodal.core.difficulty import clip_weights

    values = read_column(dataset, column, "difficulty")
    try:
        found = np.array(values, dtype=np.float32)
    except (TypeError, ValueError):
        found = np.array([np.nan])
    if found.ndim != 1 or not np.isfinite(found).all() or (found < 0).any():
        raise InputError(f"difficulty {column} must be a column of finite numbers of at least 0")
    return clip_weights(found.astype(np.float64)).astype(np.float32)


def read_column(dataset: "Dataset", column: str, what: str) -> list[Any]:
    """Read a column whole."""
    from dq_multimodal.data.row_sizes import read_blocks

    if column not in dataset.column_names:
        names = ", ".join(dataset.column_names)
        scores = f" nor one of {', '.join(get_args(DifficultyName))}" * (what == "difficulty")
        raise InputError(f"{what} {column} is no column of the dataset ({names}){scores}")
    if type(dataset.features[column]).__name__ in ("Image", "Audio", "Video"):
        raise InputError(f"{what} {column} must be a column of plain values")
    blocks = read_blocks(dataset.select_columns([column]), 65536)
    return [value for block in blocks for value in block[column]]


def note_marks(marks: Marks) -> list[str]:
    """Say how many rows have no dynamics, where there are some."""
    n_lost = 0 if marks.aum is None else int(np.isnan(marks.aum).sum())
    verb = "row has" if n_lost == 1 else "rows have"
    line = (
        f"{n_lost:,} {verb} no training dynamics: they weigh nothing in coverage, and come last in "
        "ccs and dual"
    )
    return [line] if n_lost else []


def find_noise(marks: Marks, request: CompressConfig, n_rows: int) -> Bool[ndarray, " n"]:
    """Mark the rows that go to the end as likely to be labelled wrong: those of the lowest AUM.

    They are floor(noise_share * rows that can be read), ties by row number; a row whose AUM is not
    known is none of them.
    """
    found = np.zeros(n_rows, dtype=bool)
    if request.noise_share and marks.aum is not None:
        rows = marks.readable(n_rows)
        known = rows[~np.isnan(marks.aum[rows])]
        n_last = int(request.noise_share * len(rows))
        found[known[np.argsort(marks.aum[known], kind="stable")[:n_last]]] = True
    return found


def hash_file(name: str | None) -> str | None:
    """Give the SHA-256 of a file that a setting names; None if it names none."""
    if name is None:
        return None
    try:
        return describe_file(expand_home(name))["sha256"]
    except OSError as error:
        raise InputError(f"cannot read {name}: {first_line(error)}") from None
