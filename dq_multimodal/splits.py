"""Names and slices of splits, such as train[:90%], and which rows they are."""

import re
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def base_split(split: str) -> str:
    """Give the name of a split without its slice: train[:90%] -> train."""
    return re.split(r"[\[+]", split)[0] or "train"


def rest_of_split(split: str) -> str | None:
    """Give the rows of a split behind a slice of its first ones: train[:90%] -> train[90%:]."""
    found = re.fullmatch(r"([^\[+]+)\[:(\d+%?)\]", split)
    return found and f"{found[1]}[{found[2]}:]"


def split_ranges(split: str, n_rows: int) -> list[tuple[int, int]]:
    """Say which rows of a whole split of n_rows a slice takes.

    Returns:
        Start and stop of each part, in order.

    Raises:
        InputError: If the slice cannot be read, names several splits or does not fit n_rows.
    """
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({base_split(split): n_rows})
    except (ValueError, AssertionError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no such slice"
        raise InputError(f"cannot read the split {split!r} of {n_rows:,} rows: {reason}") from error
    return [(part.from_, part.to) for part in parts]


def take_slice(dataset: "Dataset", split: str) -> "Dataset":
    """Give the rows of a slice of a dataset that is a whole split."""
    from datasets import concatenate_datasets

    ranges = split_ranges(split, len(dataset))
    if ranges == [(0, len(dataset))]:
        return dataset
    return concatenate_datasets([dataset.select(range(*part)) for part in ranges])


def name_split(splits: Any, split: str, name: str) -> str:
    """Give the name of the split that a slice is of.

    Raises:
        InputError: If there is none of that name.
    """
    base = base_split(split)
    if base not in splits:
        raise InputError(f"{name} has no split {base!r}, only {', '.join(map(str, splits))}")
    return base
