"""From bins to an order by the method asked for, and the two tables that record it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from dq_multimodal.atomic import write_table
from dq_multimodal.config import Draw, InputError, Method, Similarity, count_kept
from dq_multimodal.core import Bins, make_bins, one_bin, order_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BinsKind = Literal["dq", "graphcut", "none"]
"""What the bin, rank and gain columns hold: DQ's bins, one greedy run, or nothing."""

SELECTION_FILE = "selection.parquet"
BINS_FILE = "bins.parquet"


def bins_kind(method: Method) -> BinsKind:
    """Say which bins a method needs."""
    return "none" if method == "random" else "graphcut" if method == "graphcut" else "dq"


def bin_rows(
    embeddings: ndarray,
    strata: Int[ndarray, " n"],
    kind: BinsKind,
    n_bins: int,
    similarity: Similarity,
) -> Bins:
    """Make the bins that a method needs, with a progress bar."""
    from tqdm import tqdm

    with tqdm(total=len(strata), desc="select", unit="row") as bar:
        return make_bins(
            embeddings, 1 if kind == "graphcut" else n_bins, similarity, strata, on_picks=bar.update
        )


def order_by_method(bins: Bins, method: Method, draw: Draw, seed: int) -> Int[ndarray, " n"]:
    """Put the rows in the order of a method; bins must be of its kind."""
    if method == "random":
        return order_rows(one_bin(bins.stratum), seed=seed)
    return order_rows(bins, draw="rank" if method == "graphcut" else draw, seed=seed)


def read_strata(dataset: "Dataset", column: str | None) -> tuple[Int[ndarray, " n"], list[str]]:
    """Number the strata of a dataset by its label column; rows without a label are the last one.

    Returns:
        Code of every row, and the label of every code.

    Raises:
        InputError: If there is no such column, or its values are not plain.
    """
    if column is None:
        return np.zeros(len(dataset), dtype=np.int64), [""]
    if column not in dataset.column_names:
        raise InputError(f"no column {column}: the dataset has {', '.join(dataset.column_names)}")
    values = [None if value != value else value for value in dataset[column]]
    odd = next((v for v in values if v is not None and not isinstance(v, str | int | float)), None)
    if odd is not None:
        raise InputError(
            f"the label column {column} must hold plain values, got {type(odd).__name__}"
        )
    labels = sorted(
        set(values), key=lambda v: (v is None, isinstance(v, str), v if v is not None else 0)
    )
    code = {label: number for number, label in enumerate(labels)}
    names = ["(no label)" if label is None else str(label) for label in labels]
    return np.array([code[value] for value in values], dtype=np.int64), names


def write_selection(
    folder: Path,
    bins: Bins,
    kind: BinsKind,
    order: Int[ndarray, " n"],
    keep_ratio: float,
    labels: list[str],
) -> None:
    """Write selection.parquet, one row a source row, and bins.parquet, one row a (stratum, bin)."""
    import pyarrow as pa

    n_rows = len(bins)
    is_kept = order < count_kept(n_rows, keep_ratio)
    has_none = np.full(n_rows, kind == "none")
    selection = pa.table(
        {
            "row": pa.array(np.arange(n_rows)),
            "stratum": pa.array(bins.stratum.astype(np.int32)),
            "bin": pa.array(bins.bin.astype(np.int32), mask=has_none),
            "rank": pa.array(bins.rank.astype(np.int32), mask=has_none),
            "gain": pa.array(bins.gain, mask=has_none),
            "order": pa.array(order),
            "kept": pa.array(is_kept),
        }
    )
    write_table(selection, folder / SELECTION_FILE)
    write_table(_summarise(bins, kind, is_kept, labels), folder / BINS_FILE)


def _summarise(
    bins: Bins, kind: BinsKind, is_kept: Bool[ndarray, " n"], labels: list[str]
) -> "pa.Table":
    import pyarrow as pa

    width = int(bins.bin.max()) + 1
    groups, member = np.unique(bins.stratum * width + bins.bin, return_inverse=True)
    sizes = np.bincount(member)
    has_none = np.full(len(groups), kind == "none")
    no_score = pa.nulls(len(groups), pa.float64())
    return pa.table(
        {
            "stratum": pa.array((groups // width).astype(np.int32)),
            "label": pa.array([labels[code] for code in groups // width]),
            "bin": pa.array((groups % width).astype(np.int32), mask=has_none),
            "size": pa.array(sizes),
            "representativeness": no_score,
            "diversity": no_score,
            "importance": no_score,
            "weight": pa.array(sizes.astype(np.float64)),
            "kept": pa.array(np.bincount(member, weights=is_kept).astype(np.int64)),
        }
    )


def read_selection(folder: Path) -> tuple[Bins, dict[str, ndarray]]:
    """Read selection.parquet: the bins (zeros where there are none), and order and kept."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(folder / SELECTION_FILE)
        columns: dict[str, Any] = {
            name: (table[name].fill_null(0) if table[name].null_count else table[name]).to_numpy()
            for name in ("stratum", "bin", "rank", "gain", "order", "kept")
        }
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"cannot read {folder / SELECTION_FILE}: {error}") from error
    bins = Bins(
        bin=columns["bin"].astype(np.int64),
        rank=columns["rank"].astype(np.int64),
        gain=columns["gain"],
        stratum=columns["stratum"].astype(np.int64),
    )
    return bins, {"order": columns["order"], "kept": columns["kept"].astype(bool)}


def read_kept(folder: Path) -> "pa.Table":
    """Read row, bin and rank of the kept rows, by row number."""
    import pyarrow.parquet as pq

    return pq.read_table(
        folder / SELECTION_FILE, columns=["row", "bin", "rank"], filters=[("kept", "=", True)]
    )
