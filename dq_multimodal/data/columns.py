"""Which column holds the images, which the labels, and what the labels are."""

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Int
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.data.pixels import image_columns
from dq_multimodal.data.row_sizes import read_blocks

NO_LABEL = "none"
"""What to name as label column so that none is used."""
BLOCK_ROWS = 65536
LABEL_NAMES = ("label", "labels", "fine_label")
"""Columns that count as labels when they hold plain values without names."""


def check_columns(present: list[str], asked: Iterable[str]) -> None:
    """Raise if a column that was asked for is not there."""
    if missing := [name for name in asked if name not in present]:
        raise InputError(f"no column {', '.join(missing)}: the dataset has {', '.join(present)}")


def find_image_column(dataset: Dataset, asked: str | None = None) -> str:
    """Find the column of images; InputError if there is none, several, or another kind is named.

    It may hold a list of images a row.
    """
    found = image_columns(dataset)
    if asked is not None:
        check_columns(dataset.column_names, [asked])
        if asked not in found:
            kind = dataset.features[asked]
            raise InputError(f"the image column {asked} must hold images, got {kind}")
        return asked
    if len(found) != 1:
        what = f"several columns of images ({', '.join(found)})" if found else "no column of images"
        names = ", ".join(dataset.column_names)
        raise InputError(f"found {what} among {names}: name one with --image-column")
    return found[0]


def find_label_column(dataset: Dataset, asked: str | None = None) -> str | None:
    """Find the column of class labels of an image dataset; None where there is none.

    It is the only `ClassLabel` column, or else a column of whole numbers, texts or booleans named
    label, labels or fine_label; InputError if there are several. The name "none" stands for no
    labels.
    """
    if asked is not None:
        check_columns(dataset.column_names, [] if asked == NO_LABEL else [asked])
        return None if asked == NO_LABEL else asked
    features = dataset.features
    classes = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    if len(classes) > 1:
        raise InputError(
            f"found several columns of labels ({', '.join(classes)}): name one with --label-column "
            f"({NO_LABEL} for no strata)"
        )
    if classes:
        return classes[0]
    plain = ("int", "uint", "bool", "string", "large_string")
    named = [
        name
        for name in LABEL_NAMES
        if name in features and str(getattr(features[name], "dtype", "")).startswith(plain)
    ]
    return named[0] if named else None


def read_classes(
    dataset: Dataset, column: str | None
) -> tuple[Int[ndarray, " n"], tuple[str, ...]]:
    """Give the class of every row, -1 where it has none, and the names of the classes.

    Classes of a `ClassLabel` column keep their numbers; those of other columns are numbered in
    sorted order. InputError if a label is no plain value.
    """
    if column is None:
        return np.full(len(dataset), -1, dtype=np.int64), ()
    codes, labels = read_labels(dataset, column)
    return codes, tuple(map(str, labels))


def read_labels(dataset: Dataset, column: str) -> tuple[Int[ndarray, " n"], list[Any]]:
    """Give the class of every row, -1 where it has none, and the labels; see `read_classes`."""
    names = getattr(dataset.features[column], "names", None)
    met: dict[Any, int] = {}
    codes = array("q")
    for block in read_blocks(dataset.select_columns([column]), BLOCK_ROWS):
        for value in block[column]:
            if value is None or value != value:
                codes.append(-1)
            elif names is not None:
                codes.append(value if 0 <= value < len(names) else -1)
            elif isinstance(value, str | int | float):
                codes.append(met.setdefault(value, len(met)))
            else:
                kind = type(value).__name__
                raise InputError(f"the label column {column} must hold plain values, got {kind}")
    found = np.array(codes, dtype=np.int64)
    if names is not None:
        return found, list(names)
    present = sort_labels(met)
    place = {label: number for number, label in enumerate(present)}
    table = np.array([*(place[label] for label in met), -1], dtype=np.int64)
    return table[found], present


def sort_labels(labels: Iterable[Any]) -> list[Any]:
    """Sort labels that are plain values: numbers before texts."""
    return sorted(labels, key=lambda v: (isinstance(v, str), v))


def match_classes(
    codes: Int[ndarray, " n"], labels: tuple[str, ...], known: tuple[str, ...]
) -> Int[ndarray, " n"]:
    """Turn class numbers of a dataset into those of a model, by name; -1 for unknown ones."""
    place = {label: number for number, label in enumerate(known)}
    table = np.array([*(place.get(label, -1) for label in labels), -1], dtype=np.int64)
    return table[codes]
