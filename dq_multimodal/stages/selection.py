"""The two tables that record an order: selection.parquet and bins.parquet."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.config import CompressConfig, InputError
from dq_multimodal.core import Bins, Scores, bin_importance
from dq_multimodal.core.importance import group_rows
from dq_multimodal.data.columns import read_classes
from dq_multimodal.files import (
    count,
    first_line,
    name_some,
    open_parquet,
    show_name,
    write_table,
)
from dq_multimodal.manifest import BinsKind
from dq_multimodal.stages.marks import MARK_TYPES, NONE_IS_NULL, Marks
from dq_multimodal.stages.ordering import count_subset, weigh_groups, weigh_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

NO_LABEL = "(no label)"

SCORES = ("representativeness", "diversity", "importance")

SELECTION_FILE = "selection.parquet"
BINS_FILE = "bins.parquet"
TYPES = {
    SELECTION_FILE: {
        "row": "int64",
        "stratum": "int32",
        "bin": "int32",
        "rank": "int32",
        "gain": "double",
        "order": "int64",
        "kept": "bool",
    },
    BINS_FILE: {
        "stratum": "int32",
        "label": "string",
        "bin": "int32",
        "size": "int64",
        **dict.fromkeys(SCORES, "double"),
        "weight": "double",
        "kept": "int64",
    },
}
"""Columns of the two tables, with their types."""
MAY_BE_NULL = ("bin", "rank", "gain", *SCORES, *NONE_IS_NULL)
BELOW_ROWS = {
    SELECTION_FILE: (
        *("row", "stratum", "bin", "rank", "order"),
        *("nearest", "duplicate_of", "group", "target_rank"),
    ),
    BINS_FILE: ("bin",),
}
"""Numbers of at least 0 and less than the rows of the table."""
MAX_ROWS_A_BYTE = 4
"""An order of rows takes some two bytes a row at least: a file that claims more than this lies."""


def read_strata(
    dataset: "Dataset", column: str | None, splits: dict[str, int] | None = None
) -> tuple[Int[ndarray, " n"], list[str], Bool[ndarray, " n"] | None]:
    """Number the strata of a dataset by its label column, within each split if it has several.

    Rows without a label are the last stratum. Splits are their rows, one after the other.

    Returns:
        Code of every row, the label of every code, and which rows have no label; None where all
        have one.

    Raises:
        InputError: If there is no such column, or its values are not plain.
    """
    n_rows, labels, unlabelled = len(dataset), [""], None
    codes = np.zeros(n_rows, dtype=np.int64)
    if column is not None:
        if column not in dataset.column_names:
            known = ", ".join(dataset.column_names)
            raise InputError(f"no column {column}: the dataset has {known}")
        classes, names = read_classes(dataset, column)
        present, codes = np.unique(np.where(classes < 0, len(names), classes), return_inverse=True)
        labels = [(*names, name_unlabelled(names))[code] for code in present]
        unlabelled = classes < 0 if present[-1] == len(names) else None
        codes = codes.reshape(-1).astype(np.int64)
    if splits is None:
        return codes, labels, unlabelled
    if min(splits.values()) < 1 or sum(splits.values()) != n_rows:
        raise InputError(f"the splits {splits} are not those of {n_rows:,} rows")
    of_split = np.repeat(np.arange(len(splits)), [*splits.values()])
    pairs, codes = np.unique(of_split * len(labels) + codes, return_inverse=True)
    parts = [divmod(pair, len(labels)) for pair in pairs.tolist()]
    found = [": ".join(filter(None, ([*splits][s], labels[code]))) for s, code in parts]
    return codes, found, unlabelled


def name_unlabelled(names: Sequence[str]) -> str:
    """Give a name to the rows without a label that is none of the labels."""
    none = NO_LABEL
    while none in names:
        none = f"({none})"
    return none


def write_selection(
    folder: Path,
    bins: Bins,
    kind: BinsKind,
    order: Int[ndarray, " n"],
    request: CompressConfig,
    labels: list[str],
    scores: Scores | None,
    marks: Marks,
) -> None:
    """Write selection.parquet, one row a source row, and bins.parquet, one row a (stratum, bin).

    Kind says what the bins are, order is the place of every row; each mark is a column.
    """
    is_kept = order < count_subset(bins.stratum, request, marks)
    selection = tabulate_rows(np.arange(len(bins)), bins, kind, order, is_kept, marks)
    write_table(selection, folder / SELECTION_FILE)
    table = tabulate_bins(bins, kind, is_kept, request, labels, scores, marks)
    write_table(table, folder / BINS_FILE)


def tabulate_rows(
    rows: Int[ndarray, " n"],
    bins: Bins,
    kind: BinsKind,
    order: Int[ndarray, " n"],
    is_kept: Bool[ndarray, " n"],
    marks: Marks,
) -> "pa.Table":
    """Make the table of selection.parquet for some rows, by number."""
    import pyarrow as pa

    has_none = np.full(len(rows), kind == "none")
    selection = pa.table(
        {
            "row": pa.array(rows),
            "stratum": pa.array(bins.stratum.astype(np.int32)),
            "bin": pa.array(bins.bin.astype(np.int32), mask=has_none),
            "rank": pa.array(bins.rank.astype(np.int32), mask=has_none),
            "gain": pa.array(bins.gain, mask=has_none),
            "order": pa.array(order),
            "kept": pa.array(is_kept),
        }
    )
    for name, column in marks.columns().items():
        selection = selection.append_column(pa.field(name, column.type), column)
    return selection


def tabulate_bins(
    bins: Bins,
    kind: BinsKind,
    is_kept: Bool[ndarray, " n"],
    request: CompressConfig,
    labels: list[str],
    scores: Scores | None,
    marks: Marks,
) -> "pa.Table":
    """Make the table of bins.parquet, one row a (stratum, bin), from the bins of all rows."""
    strata, numbers, sizes = group_rows(bins)
    width = int(numbers.max()) + 1
    groups = np.searchsorted(strata * width + numbers, bins.stratum * width + bins.bin)
    held, counts = np.unique(groups[marks.readable(len(bins))], return_counts=True)
    weights = np.zeros(len(sizes))
    is_adaptive = request.method == "adq"
    weights[held] = weigh_groups(numbers[held], counts, request, scores) if is_adaptive else counts
    kept = np.bincount(groups, weights=is_kept).astype(np.int64)
    return tabulate_groups(strata, numbers, sizes, kept, weights, kind, labels, scores, request)


def tabulate_groups(
    strata: Int[ndarray, " groups"],
    numbers: Int[ndarray, " groups"],
    sizes: Int[ndarray, " groups"],
    kept: Int[ndarray, " groups"],
    weights: Float[ndarray, " groups"],
    kind: BinsKind,
    labels: list[str],
    scores: Scores | None,
    request: CompressConfig,
) -> "pa.Table":
    """Make the table of bins.parquet from stratum, bin, rows, kept rows, weight of each bin."""
    import pyarrow as pa

    found = {name: pa.nulls(len(sizes), pa.float64()) for name in SCORES}
    if scores is not None and kind == "dq":
        importance = bin_importance(scores, request.importance, request.norm)
        for name, values in {**vars(scores), "importance": importance}.items():
            found[name] = pa.array(values[numbers], from_pandas=True)  # NaN becomes null
    has_none = np.full(len(sizes), kind == "none")
    return pa.table(
        {
            "stratum": pa.array(strata.astype(np.int32)),
            "label": pa.array([labels[code] for code in strata]),
            "bin": pa.array(numbers.astype(np.int32), mask=has_none),
            "size": pa.array(sizes),
            **found,
            "weight": pa.array(weights),
            "kept": pa.array(kept),
        }
    )


def note_strata(labels: list[str], folder: Path, request: CompressConfig) -> list[str]:
    """Say which strata keep no row, or that the subset grew so that each keeps one."""
    bins, found, marks = read_selection(folder)
    held = np.bincount(bins.stratum[marks.readable(len(bins))], minlength=len(labels))
    kept = np.bincount(bins.stratum[found["kept"]], minlength=len(labels))
    return note_counts(labels, held, kept, request)


def note_counts(
    labels: list[str],
    held: Int[ndarray, " s"],
    kept: Int[ndarray, " s"],
    request: CompressConfig,
) -> list[str]:
    """Say what `note_strata` does, by the rows and the kept rows of every stratum."""
    notes = []
    blank, lost = np.flatnonzero(held == 0), np.flatnonzero((held > 0) & (kept == 0))
    if len(blank):
        notes.append(f"{_name_strata(blank, labels)} without an image that can be decoded")
    if len(lost):
        notes.append(
            f"{_name_strata(lost, labels)} of which no row is kept; "
            "compress --keep-every-class keeps at least one row of each"
        )
    asked = request.keep_rows or round(request.keep_ratio * held.sum())
    if request.keep_every_class and kept.sum() > asked:
        notes.append(
            f"{kept.sum():,} rows are kept where the keep ratio asks for {asked:,}, so that each "
            "stratum keeps one (--keep-every-class)"
        )
    return notes


def _name_strata(codes: Int[ndarray, " k"], labels: list[str]) -> str:
    """Say how many of the strata these are, and name the first of them."""
    shown = name_some(show_name(labels[code]) for code in codes)
    return f"{count(len(codes), 'stratum', 'strata')} of {len(labels):,} ({shown})"


def read_table(folder: Path, name: str) -> "pa.Table":
    """Read selection.parquet or bins.parquet, whoever wrote it.

    No row is read before the footer says that the columns have their types and that so few bytes
    can hold so many rows.

    Raises:
        InputError: If it is not what a run writes, or holds a number that no row or bin has.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    path = folder / name
    try:
        with open_parquet(path) as file:
            found = {field.name: str(field.type) for field in file.schema_arrow}
            extra = MARK_TYPES if name == SELECTION_FILE else {}
            wanted = TYPES[name] | {k: v for k, v in extra.items() if k in found}
            if list(found.items()) != list(wanted.items()):
                raise InputError(f"the columns of {path} must be {wanted}, got {found}"[:1000])
            meta, n_rows = file.metadata, file.metadata.num_rows
            groups = (meta.row_group(k) for k in range(meta.num_row_groups))
            counts = (g.column(c).num_values for g in groups for c in range(meta.num_columns))
            n_numbers, n_most = max(counts, default=0), 1000 + MAX_ROWS_A_BYTE * path.stat().st_size
            if not 1 <= n_rows <= n_most or n_numbers > n_most:
                raise InputError(f"{path} cannot hold the {n_rows:,} rows that it claims")
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    for column in found:
        if column not in MAY_BE_NULL and table[column].null_count:
            raise InputError(f"{path} has rows without {column}")
    for column in (c for c in BELOW_ROWS[name] if c in found):
        numbers = pc.list_flatten(table[column]) if column == "nearest" else table[column]
        low, high = pc.min_max(numbers).as_py().values()
        if low is not None and not 0 <= low <= high < n_rows:
            raise InputError(
                f"{column} in {path} must lie in 0 ... {n_rows - 1}, got {low}, {high}"
            )
    return table


def read_scores(folder: Path) -> Scores | None:
    """Read the scores of the bins from bins.parquet; None where there are none."""
    table = read_table(folder, BINS_FILE)
    if table["importance"].null_count == len(table) or table["bin"].null_count:
        return None
    numbers = table["bin"].to_numpy()
    columns = []
    for name in ("representativeness", "diversity"):
        values = np.full(int(numbers.max()) + 1, np.nan)
        values[numbers] = table[name].to_numpy()
        columns.append(values)
    return Scores(*columns)


def read_selection(folder: Path) -> tuple[Bins, dict[str, ndarray], Marks]:
    """Read selection.parquet: the bins (zeros where there are none), order and kept, the marks.

    Raises:
        InputError: If some rows have bins and some have none, or it cannot be read.
    """
    return _parse(read_table(folder, SELECTION_FILE), folder)


def _parse(table: "pa.Table", folder: Path) -> tuple[Bins, dict[str, ndarray], Marks]:
    n_null = {table[name].null_count for name in ("bin", "rank", "gain")}
    if len(n_null) > 1 or n_null - {0, len(table)}:
        raise InputError(f"all rows of {folder / SELECTION_FILE} must have a bin, or none")

    def read(name: str, kind: type) -> ndarray:
        column = table[name].fill_null(0) if table[name].null_count else table[name]
        return column.to_numpy().astype(kind, copy=False)

    bins = Bins(
        *(read("bin", np.int64), read("rank", np.int64), read("gain", np.float64)),
        stratum=read("stratum", np.int64),
    )
    found = {"order": read("order", np.int64), "kept": read("kept", np.bool_)}
    return bins, found, Marks.from_table(table)


def read_kept(folder: Path, request: CompressConfig) -> "pa.Table":
    """Read row, bin and rank of the kept rows, by row number, and their weight if they have one."""
    import pyarrow as pa

    table = read_table(folder, SELECTION_FILE)
    kept = table.filter(table["kept"]).select(["row", "bin", "rank"])
    bins, found, marks = _parse(table, folder)
    weights = weigh_rows(bins, request, marks, found["kept"])
    if weights is None:
        return kept
    return kept.append_column("weight", pa.array(weights[found["kept"]]))
