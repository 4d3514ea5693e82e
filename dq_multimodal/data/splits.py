"""Names and slices of splits, such as train[:90%], and which rows they are."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset, ReadInstruction, SplitDict, SplitInfo, concatenate_datasets

from dq_multimodal.config import SPLIT_NAME, InputError
from dq_multimodal.files import first_line

ALL = "all"
"""Stands for all splits one after another, as in `datasets`."""


def base_split(split: str) -> str:
    """Give the name of a split without its slice: train[:90%] -> train; all is as train."""
    if split == ALL:  # the name of what is of no split alone; all is reserved
        return "train"
    return re.split(r"[\[+]", split)[0] or "train"


def rest_of_split(split: str) -> str | None:
    """Give the rows of a split behind a slice of its first ones: train[:90%] -> train[90%:]."""
    found = re.fullmatch(r"([^\[+]+)\[:(\d+%?)\]", split)
    return found and f"{found[1]}[{found[2]}:]"


def split_ranges(split: str, n_rows: int) -> list[tuple[int, int]]:
    """Give start and stop of each part of a whole split of n_rows that a slice takes, in order.

    InputError if the slice cannot be read, names several splits or does not fit n_rows.
    """
    if split == ALL:
        return [(0, n_rows)]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({base_split(split): n_rows})
    except (ValueError, AssertionError, KeyError) as error:
        reason = first_line(error) if str(error) else "no such slice"
        raise InputError(f"cannot read the split {split!r} of {n_rows:,} rows: {reason}") from error
    return [(part.from_, part.to) for part in parts]


def take_slice(dataset: Dataset, split: str) -> Dataset:
    """Give the rows of a slice of a dataset that is a whole split."""
    ranges = split_ranges(split, len(dataset))
    if ranges == [(0, len(dataset))]:
        return dataset
    return concatenate_datasets([dataset.select(range(*part)) for part in ranges])


def split_parts(split: str, splits: Iterable[str]) -> list[str]:
    """Give the slices that make up a split: train[:9]+test -> train[:9], test."""
    for name in splits if split == ALL else ():
        if name == ALL or not re.fullmatch(SPLIT_NAME, name):
            raise InputError(
                f"a split is named {name!r}: rename it to letters, digits, _ and dots, and not all"
            )
    return list(splits) if split == ALL else [part.strip() for part in split.split("+")]


def take_splits(
    load: Callable[[str], Dataset], splits: Iterable[str], split: str, name: str
) -> Dataset:
    """Give the rows of one or several slices of splits, one after another."""
    parts = split_parts(split, splits)
    if not parts:
        raise InputError(f"{name} has no rows")
    taken = [take_slice(load(name_split(splits, part, name)), part) for part in parts]
    if len(taken) == 1:
        return taken[0]
    rows = concatenate_datasets(taken)
    if split == ALL:
        sizes = zip(parts, map(len, taken), strict=True)
        rows.info.splits = SplitDict({k: SplitInfo(k, num_examples=n) for k, n in sizes})
    return rows


def count_splits(dataset: Dataset) -> dict[str, int] | None:
    """Give the rows of each split of a dataset of all splits; None if it is one, or not known."""
    sizes = {split.name: split.num_examples for split in (dataset.info.splits or {}).values()}
    sizes = {name: size for name, size in sizes.items() if size}
    return sizes if len(sizes) > 1 and sum(sizes.values()) == len(dataset) else None


def name_split(splits: Any, split: str, name: str) -> str:
    """Give the name of the split that a slice is of; InputError if there is none of that name."""
    base = base_split(split)
    if base not in splits:
        raise InputError(f"{name} has no split {base!r}, only {', '.join(map(str, splits))}")
    return base
