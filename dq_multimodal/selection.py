"""From bins to an order by the method asked for, and the two tables that record it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from dq_multimodal.atomic import write_table
from dq_multimodal.config import Draw, InputError, Method, Similarity, count_kept
from dq_multimodal.core import Bins, make_bins, one_bin, order_rows
from dq_multimodal.vision.columns import read_classes

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BinsKind = Literal["dq", "graphcut", "none"]
"""What the bin, rank and gain columns hold: DQ's bins, one greedy run, or nothing."""

NO_LABEL = "(no label)"

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
    n_left: int = 0,
) -> Bins:
    """Make the bins that a method needs, with a progress bar; see `core.make_bins`."""
    from tqdm import tqdm

    with tqdm(total=len(strata), desc="select", unit="row") as bar:
        return make_bins(
            embeddings,
            1 if kind == "graphcut" else n_bins,
            similarity,
            strata,
            n_left=n_left,
            on_picks=bar.update,
        )


def count_left(config: dict[str, Any]) -> int:
    """Give the numbers of the left factor where embeddings are outer products, else 0."""
    return ((config["embedding"] or {}).get("factors") or [0])[0]


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
    classes, names = read_classes(dataset, column)
    present, codes = np.unique(np.where(classes < 0, len(names), classes), return_inverse=True)
    return codes.reshape(-1).astype(np.int64), [(*names, NO_LABEL)[code] for code in present]


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
