"""verify(): does a run hold what its config.yaml says?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dq_multimodal import embedding, subset
from dq_multimodal.atomic import read_table
from dq_multimodal.config import InputError
from dq_multimodal.core import make_bins
from dq_multimodal.patches.store import find_patch_columns, is_of_file
from dq_multimodal.row_files import embed
from dq_multimodal.run import Run
from dq_multimodal.selection import (
    BINS_FILE,
    count_left,
    count_subset,
    order_by_method,
    read_kept,
    read_scores,
    read_selection,
    tabulate_bins,
)
from dq_multimodal.source import first_line, reload_source
from dq_multimodal.vision.pixels import read_bytes, undecoded

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

BLOCK_ROWS = 1000


@dataclass(frozen=True)
class Check:
    """One thing that `verify` looked at.

    Attributes:
        name: What was compared.
        result: "passed", "failed", or "skipped" when what it needs is not there.
        detail: What was found, or why it was skipped.
    """

    name: str
    result: Literal["passed", "failed", "skipped"]
    detail: str


def verify(run: Run | str | Path) -> list[Check]:
    """Recompute what can be recomputed of a run and compare.

    - order and kept, from the bins in selection.parquet, the scores in bins.parquet and the
      settings in config.yaml; with them importance, weight and kept rows of every bin
    - the row numbers, bins and ranks of the subset, from selection.parquet
    - the rows of the subset, against the source at its recorded revision, where it can be had (of
      images with dropped patches, the kept pixels)
    - the bins, from embeddings.npy, where it is there

    Raises:
        InputError: If it is no finished run.
    """
    run = run if isinstance(run, Run) else Run(run)
    return [check(run) for check in (_check_order, _check_numbers, _check_rows, _check_bins)]


def _check_order(run: Run) -> Check:
    bins, written = read_selection(run.path)
    request, scores = run.request, read_scores(run.path)
    unreadable = written.get("unreadable")
    order = order_by_method(bins, request, scores, unreadable)
    n_kept = count_subset(bins.stratum, request, unreadable)
    n_wrong = int((order != written["order"]).sum())
    is_kept = order < n_kept
    n_wrong_kept = int((is_kept != written["kept"]).sum())
    labels = run.manifest["labels"]
    table = tabulate_bins(bins, run.config["bins"], is_kept, request, labels, scores, unreadable)
    wrong = _differing_columns(table, run.path / BINS_FILE)
    return _judge(
        "order and kept",
        n_wrong + n_wrong_kept + len(wrong),
        f"{len(order):,} rows, {n_kept:,} kept",
        f"{n_wrong:,} orders and {n_wrong_kept:,} kept marks differ"
        + (f"; in {BINS_FILE}: {', '.join(wrong)}" if wrong else ""),
    )


def _differing_columns(table: "pa.Table", path: Path) -> list[str]:
    """Name the columns of a file that are not those of a table; floats to 1e-9."""
    import pyarrow as pa

    written = read_table(path)
    wrong = [name for name in table.column_names if name not in written.column_names]
    if wrong or len(written) != len(table):
        return wrong or ["number of rows"]
    for name in table.column_names:
        ours, theirs = table[name].combine_chunks(), written[name].combine_chunks()
        if pa.types.is_floating(ours.type):
            a, b = (np.array(part.to_pylist(), dtype=np.float64) for part in (ours, theirs))
            is_same = np.allclose(a, b, rtol=1e-9, atol=0, equal_nan=True)
        else:
            is_same = ours.equals(theirs)
        wrong += [] if is_same else [name]
    return wrong


def _check_numbers(run: Run) -> Check:
    import pyarrow as pa

    name = "numbers of the subset"
    columns = list(subset.OWN_COLUMNS)
    try:
        files = subset.subset_files(run.path)
        found = pa.concat_tables([read_table(path, columns=columns) for path in files])
    except (InputError, OSError, pa.ArrowInvalid) as error:
        return Check(name, "failed", f"cannot read it: {first_line(error)}")
    wanted = read_kept(run.path).rename_columns(columns)
    is_same = found.to_pydict() == wanted.to_pydict()
    detail = f"{len(found):,} rows"
    return _judge(name, not is_same, detail, "they are not those marked as kept")


def _check_rows(run: Run) -> Check:
    name = "rows of the subset against the source"
    try:
        source = reload_source(run.config["source"], streaming=run.request.streaming).dataset
    except InputError as error:
        return Check(name, "skipped", str(error))
    try:
        held = run.subset
    except Exception as error:  # whatever a reader of broken files raises
        return Check(name, "failed", f"cannot read the subset: {first_line(error)}")
    rows = held.with_format("numpy")["dq_row"][:]
    if len(rows) and (rows.min() < 0 or rows.max() >= len(source)):
        return Check(name, "failed", "a row number lies outside the source")
    images = find_patch_columns(held)
    ours = held.remove_columns([*subset.OWN_COLUMNS, *images]).with_format("arrow")
    theirs = source.remove_columns(images).with_format("arrow")
    n_wrong = 0
    for start in range(0, len(rows) if ours.column_names else 0, BLOCK_ROWS):
        block = ours[start : start + BLOCK_ROWS]
        wanted = theirs[rows[start : start + BLOCK_ROWS].tolist()]
        n_wrong += not _is_same(block, wanted, theirs.features)
    if images and not n_wrong:
        return _check_records(name, held, source, images[0])
    return _judge(name, n_wrong, f"{len(rows):,} rows", f"{n_wrong:,} blocks of rows differ")


def _check_records(name: str, held: "Dataset", source: "Dataset", column: str) -> Check:
    """Compare the kept pixels of patch records with the images of the source."""
    n_wrong = n_lossy = 0
    for start in range(0, len(held), BLOCK_ROWS):
        part = held[start : start + BLOCK_ROWS]
        files = undecoded(source, column)[part["dq_row"]][column]
        for record, file in zip(part[column], map(read_bytes, files), strict=True):
            n_lossy += record is not None and record["coding"] == "webp"
            n_wrong += not is_of_file(record, file)
    what = "images, kept pixels bit for bit" if not n_lossy else "images, sizes only (lossy)"
    return _judge(name, n_wrong, f"{len(held):,} rows and {what}", f"{n_wrong:,} images differ")


def _is_same(block: "pa.Table", wanted: "pa.Table", features: "Features") -> bool:
    """Compare two tables value by value; NaN equals NaN."""
    if block.column_names != wanted.column_names:
        return False
    # As the subset is written, and was by releases that left more of a path.
    wanted = embed(subset.conform(wanted, block.schema), features)
    block = embed(block, features)
    return block.equals(wanted) or repr(block.to_pylist()) == repr(wanted.to_pylist())


def _check_bins(run: Run) -> Check:
    kind, request = run.config["bins"], run.request
    if kind == "none":
        return Check("bins", "skipped", "random selection makes none")
    if not (run.path / embedding.FILE).is_file():
        return Check("bins", "skipped", f"{embedding.FILE} is not there")
    written = run.bins
    n_bins = 1 if kind == "graphcut" else request.n_bins
    rows = embedding.open_embeddings(run.path)
    n_left = count_left(run.config)
    bins = make_bins(rows, n_bins, request.similarity, written.stratum, n_left=n_left)
    n_wrong = int(np.sum((bins.bin != written.bin) | (bins.rank != written.rank)))
    detail = f"{len(bins):,} rows, {n_bins} bins"
    if request.partition is not None:
        detail += f" in each of the {len(run.manifest['labels'])} parts written down"
    return _judge("bins", n_wrong, detail, f"bin or rank of {n_wrong:,} rows differs")


def _judge(name: str, n_wrong: int, detail: str, fault: str) -> Check:
    return Check(name, "failed" if n_wrong else "passed", fault if n_wrong else detail)
