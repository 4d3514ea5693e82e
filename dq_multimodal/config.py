"""What can be asked for, checked when it is made. Standard library only."""

import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any, Literal, get_args

Method = Literal["dq", "graphcut", "random"]
Draw = Literal["random", "rank"]
Similarity = Literal["cosine", "euclidean"]

DEFAULT_TEXT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class InputError(ValueError):
    """Wrong use or bad input: the message is one clear line for the user."""


@dataclass(frozen=True)
class CompressConfig:
    """One request to compress a dataset.

    Attributes:
        dataset: Hub id, or a local path: .parquet, .json, .jsonl or .csv file or glob, or a folder.
        split: Split of the source, slices such as "train[:90%]" included.
        config_name: Configuration of a Hub dataset.
        revision: Branch, tag or commit of a Hub dataset.
        keep_ratio: Share of the rows to keep, in (0, 1].
        method: "dq" (bins, uniform sample), "graphcut" (one greedy run) or "random".
        draw: Within a bin, rows by seeded hash ("random", the papers) or by greedy rank ("rank").
        seed: Seed of the draw.
        text_columns: Columns that are embedded, in this order; None detects them.
        label_column: Column whose values become strata: every stratum is binned on its own.
        embedding_model: sentence-transformers model id or folder.
        embeddings: .npy file of (n, d) ready embeddings, or the name of a column that holds them.
        similarity: "cosine" or "euclidean".
        n_bins: Bins of a stratum, at least 1.
        batch_size: Rows that go through the encoder together.
    """

    dataset: str
    split: str = "train"
    config_name: str | None = None
    revision: str | None = None
    keep_ratio: float = 0.2
    method: Method = "dq"
    draw: Draw = "random"
    seed: int = 0
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    embedding_model: str = DEFAULT_TEXT_MODEL
    embeddings: str | None = None
    similarity: Similarity = "cosine"
    n_bins: int = 10
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("dataset", "embedding_model", "embeddings"):
            value = getattr(self, name)
            if isinstance(value, PathLike):
                object.__setattr__(self, name, fspath(value))
            elif value is not None and not isinstance(value, str):
                raise InputError(f"{name} must be a name or a path, got {type(value).__name__}")
        check_keep_ratio(self.keep_ratio)
        check_choice("method", self.method, Method)
        check_choice("draw", self.draw, Draw)
        check_choice("similarity", self.similarity, Similarity)
        check_count("n_bins", self.n_bins)
        check_count("batch_size", self.batch_size)
        check_seed(self.seed)
        for name, kind in (
            ("keep_ratio", float),
            ("n_bins", int),
            ("batch_size", int),
            ("seed", int),
        ):
            object.__setattr__(self, name, kind(getattr(self, name)))  # NumPy's numbers included
        if self.text_columns is not None:
            if isinstance(self.text_columns, str) or not self.text_columns:
                raise InputError(f"text_columns must be a list of names, got {self.text_columns!r}")
            object.__setattr__(self, "text_columns", tuple(self.text_columns))

    def as_dict(self) -> dict[str, Any]:
        """Give the settings as plain values that YAML can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompressConfig":
        """Rebuild from `as_dict`; settings that this release does not know are an error."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise InputError(f"settings this release does not know: {', '.join(unknown)}")
        return cls(**values)


def check_keep_ratio(keep_ratio: Any) -> None:
    """Raise unless the ratio is a number in (0, 1]."""
    is_number = isinstance(keep_ratio, Real) and not isinstance(keep_ratio, bool)
    if not is_number or math.isnan(keep_ratio) or not 0 < keep_ratio <= 1:
        raise InputError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise unless the value is one of the names of a Literal type."""
    if value not in get_args(choices):
        raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise unless the value is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_seed(seed: Any) -> None:
    """Raise unless the seed is a whole number."""
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise InputError(f"seed must be a whole number, got {seed!r}")


def count_kept(n_rows: int, keep_ratio: float) -> int:
    """Give the size of a subset, round(keep_ratio * n_rows).

    Raises:
        InputError: If not even one row would be kept.
    """
    n_kept = round(keep_ratio * n_rows)
    if n_kept < 1:
        raise InputError(f"keep_ratio {keep_ratio} keeps none of the {n_rows} rows: ask for more")
    return n_kept
