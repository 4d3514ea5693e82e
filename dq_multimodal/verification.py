"""verify(): does a run hold what its config.yaml says?"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from dq_multimodal.card import CARD
from dq_multimodal.config import InputError
from dq_multimodal.core import Bins
from dq_multimodal.core.importance import group_rows
from dq_multimodal.data.pixels import undecoded
from dq_multimodal.data.row_files import NO_FILES, embed, read_bytes
from dq_multimodal.files import first_line, open_parquet
from dq_multimodal.manifest import MANIFEST, Model
from dq_multimodal.patches.codec import FIELDS, OLD_STORE
from dq_multimodal.patches.store import find_patch_columns, has_old_records, is_of_file
from dq_multimodal.report import FILE as REPORT_FILE
from dq_multimodal.run import Run
from dq_multimodal.stages import embedding, subset
from dq_multimodal.stages.ordering import (
    bin_by_method,
    count_left,
    count_subset,
    order_by_method,
)
from dq_multimodal.stages.selection import (
    BINS_FILE,
    SELECTION_FILE,
    read_kept,
    read_scores,
    read_strata,
    read_table,
    tabulate_bins,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

BLOCK_ROWS = 1000


@dataclass(frozen=True)
class Check:
    """One thing that `verify` looked at; it is skipped when what it needs is not there."""

    name: str
    result: Literal["passed", "failed", "skipped"]
    detail: str  # what was found, or why it was skipped


T = TypeVar("T")
Found = tuple[list[str], str]
"""What a comparison gives: faults, and what was compared."""


class Skipped(Exception):
    """What a comparison needs is not there."""


def verify(run: Run | str | Path) -> list[Check]:
    """Recompute what can be recomputed of a run and compare.

    - order and kept, from the bins in selection.parquet, the scores in bins.parquet and the
      settings in config.yaml; with them all of bins.parquet, and rows, kept and labels of
      manifest.json
    - the row numbers, bins and ranks of the subset, from selection.parquet
    - types, features and rows of the subset, and the strata, against the source at its recorded
      revision, where it can be had (of images with dropped patches, the kept pixels)
    - the bins: their sizes and ranks, and from embeddings.npy, where it is there, every bin, rank
      and gain; ready embeddings against their recorded SHA-256
    - all files and manifest.json, against the bytes and SHA-256 that the run recorded. The columns
      of dynamics, near-duplicates and targets are compared by these alone

    A comparison that some damage makes impossible has failed, and says why.

    Raises:
        InputError: If it is no finished run, or config.yaml or manifest.json is not that of one.
    """
    run = Run(run.path if isinstance(run, Run) else run)  # as it is now
    checks = {
        "order and kept": _check_order,
        "numbers of the subset": _check_numbers,
        "rows of the subset against the source": _check_rows,
        "bins": _check_bins,
        "files and manifest": _check_files,
    }
    return [attempt(name, check, run) for name, check in checks.items()]


def attempt(name: str, check: Callable[[T], Found], run: T) -> Check:
    """Compare one thing, whatever damaged files make of it."""
    try:
        faults, detail = check(run)
    except Skipped as error:
        return Check(name, "skipped", str(error))
    except Exception as error:  # whatever broken files make of a reader
        faults, detail = [f"cannot be compared: {first_line(error)}"], ""
    return Check(name, "failed" if faults else "passed", "; ".join(faults) or detail)


def _check_order(run: Run) -> Found:
    request, scores, labels = run.request, read_scores(run.path), run.manifest.labels
    written = read_table(run.path, SELECTION_FILE)
    order = order_by_method(run.bins, request, scores, run.marks)
    n_kept = count_subset(run.bins.stratum, request, run.marks)
    is_kept = order < n_kept
    columns = {"row": np.arange(len(order)), "order": order, "kept": is_kept}
    faults = [
        f"{name} of {n_wrong:,} rows differs"
        for name, values in columns.items()
        if (n_wrong := int((values != written[name].to_numpy()).sum()))
    ]
    kind = run.config.bins
    table = tabulate_bins(run.bins, kind, is_kept, request, labels, scores, run.marks)
    wrong = _differing_columns(table, read_table(run.path, BINS_FILE))
    faults += [f"in {BINS_FILE}: {', '.join(wrong)}"] if wrong else []
    if run.manifest.kept != n_kept:
        faults.append(f"{MANIFEST} says that {run.manifest.kept:,} rows are kept")
    return faults, f"{len(order):,} rows, {n_kept:,} kept"


def _differing_columns(table: "pa.Table", written: "pa.Table") -> list[str]:
    """Name the columns of a table that differ in another one of the same types; floats to 1e-9."""
    import pyarrow as pa

    if len(written) != len(table):
        return ["number of rows"]
    wrong = []
    for name in table.column_names:
        ours, theirs = table[name].combine_chunks(), written[name].combine_chunks()
        if pa.types.is_floating(ours.type):
            a, b = (np.array(part.to_pylist(), dtype=np.float64) for part in (ours, theirs))
            is_same = np.allclose(a, b, rtol=1e-9, atol=0, equal_nan=True)
        else:
            is_same = ours.equals(theirs)
        wrong += [] if is_same else [name]
    return wrong


def _check_numbers(run: Run) -> Found:
    wanted = read_kept(run.path, run.request)
    found = subset.read_numbers(run.path, len(wanted))
    is_same = subset.is_of_kept(found, wanted, run.request.method)
    faults = [] if is_same else ["they are not those marked as kept, with their weights"]
    return faults, f"{len(found):,} rows"


def _check_rows(run: Run) -> Found:
    if run.request.drop_ratio and has_old_records(subset.subset_files(run.path)):
        raise Skipped(OLD_STORE)
    try:
        source = run.open_source()
    except InputError as error:
        raise Skipped(error) from error
    images = _record_columns(run) if run.request.drop_ratio else {}
    faults = _differing_features(run, source, images) + _differing_strata(run, source)
    if faults:
        return faults, ""
    names = [name for name in source.column_names if name not in images]
    theirs = source.select_columns(names).with_format("arrow")
    n_rows = n_wrong = n_lossy = 0
    for table in _blocks(run):
        rows = table["dq_row"].to_pylist()
        n_rows += len(rows)
        own = [name for name in subset.OWN_COLUMNS if name in table.column_names]
        block = table.drop_columns([*own, *images])
        if block.column_names:
            n_wrong += not _is_same(block, theirs[rows], theirs.features)
        for column in images:
            files = map(read_bytes, undecoded(source, column)[rows][column])
            for record, file in zip(table[column].to_pylist(), files, strict=True):
                n_lossy += record is not None and record["coding"] == "webp"
                n_wrong += not is_of_file(record, file)
    detail = f"{n_rows:,} rows"
    if images:
        detail += " and images, " + ("sizes only (lossy)" if n_lossy else "kept pixels bit for bit")
    return [f"{n_wrong:,} blocks of rows or images differ"] if n_wrong else [], detail


def _blocks(run: Run) -> "Iterator[pa.Table]":
    """Read the subset from its files, whatever a cache may hold."""
    import pyarrow as pa

    for path in subset.subset_files(run.path):
        with open_parquet(path) as file:
            for batch in file.iter_batches(BLOCK_ROWS):
                yield pa.Table.from_batches([batch])


def _record_columns(run: Run) -> dict[str, Any]:
    """Give the columns of patch records with their types; older ones have no colour profile."""
    from datasets import Features, Value

    with open_parquet(subset.subset_files(run.path)[0]) as file:
        found = Features.from_arrow_schema(file.schema_arrow)
    return {
        name: {part: Value(FIELDS[part]) for part in found[name]}
        for name in find_patch_columns(found)
    }


def _differing_features(run: Run, source: "Dataset", images: dict[str, Any]) -> list[str]:
    """Name the columns of the subset whose types or class names are not those of the source."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    kept = subset.read_numbers(run.path, int(run.manifest.kept))
    own = subset.own_features(kept.rename_columns([n[3:] for n in kept.column_names]))
    wanted = Features({**source.features, **images, **own})
    as_file = io.BytesIO()
    pq.write_table(pa.Table.from_batches([], wanted.arrow_schema), as_file)
    schema = pq.read_schema(as_file)
    for path in subset.subset_files(run.path):
        with open_parquet(path) as file:
            written = file.schema_arrow
        found = Features.from_arrow_schema(written)
        if written.names != schema.names:
            return [f"{path.name} has the columns {', '.join(written.names)}"[:200]]
        wrong = [
            name
            for name in schema.names
            if written.field(name).type != schema.field(name).type or found[name] != wanted[name]
        ]
        if wrong or (written.metadata or {}).keys() != schema.metadata.keys():
            return [f"the type or the class names of {', '.join(wrong) or 'all columns'} differ"]
    return []


def _differing_strata(run: Run, source: "Dataset") -> list[str]:
    """Compare strata and their labels with the labels of the source, or those of a partition."""
    labels = run.manifest.labels
    if run.request.partition is not None and run.config.bins != "none":
        is_same = labels == [f"part {number}" for number in range(len(labels))]
    else:
        strata, found, _ = read_strata(source, run.config.label_column, run.config.source.splits)
        is_same = found == labels and np.array_equal(strata, run.bins.stratum)
    return [] if is_same else ["strata or labels differ from those of the source"]


def _is_same(block: "pa.Table", wanted: "pa.Table", features: "Features") -> bool:
    """Compare two tables value by value; NaN equals NaN."""
    if block.column_names != wanted.column_names:
        return False
    # As the subset is written, and was by releases that left more of a path.
    wanted = embed(subset.conform(wanted, block.schema), features)
    block = embed(block, features, NO_FILES, "the subset")
    return block.equals(wanted) or repr(block.to_pylist()) == repr(wanted.to_pylist())


def _check_bins(run: Run) -> Found:
    kind, request, written = run.config.bins, run.request, run.bins
    if kind == "none":
        raise Skipped(f"{request.method} makes none")
    n_bins = request.n_bins if kind == "dq" else 1
    if not _is_parted(written, n_bins):
        return ["sizes of the bins or ranks in them are not those of a run"], ""
    if not (run.path / embedding.FILE).is_file():
        raise Skipped(f"{embedding.FILE} is not there: only sizes and ranks fit")
    rows, facts = run.open_embeddings(), run.config.embedding or Model()
    recorded = facts.sha256_of_float32
    if facts.dimension not in (None, rows.shape[1]):
        return [f"{embedding.FILE} has {rows.shape[1]:,} numbers a row"], ""
    if recorded is not None and hashlib.sha256(rows.data).hexdigest() != recorded:
        return [f"{embedding.FILE} does not hold the embeddings that were given"], ""
    n_left = count_left(run.config)
    bins, marks = bin_by_method(rows, written.stratum, kind, request, run.marks, n_left)
    n_wrong = int(np.sum((bins.bin != written.bin) | (bins.rank != written.rank)))
    close = 1e-7 * np.abs(np.nan_to_num(bins.gain)).max()  # another device adds in another order
    is_near = np.isclose(bins.gain, written.gain, rtol=1e-6, atol=close, equal_nan=True)
    n_off = int((~is_near).sum())
    detail = f"{len(bins):,} rows, {n_bins} bins"
    if request.partition is not None:
        detail += f" in each of the {len(run.manifest.labels)} parts written down"
    faults = [f"bin or rank of {n_wrong:,} rows differs"] if n_wrong else []
    record = run.marks.nearest or (np.zeros(0), np.zeros(0))
    if not all(map(np.array_equal, marks.nearest or (), record)):
        faults.append("the record of nearest rows differs")
    if n_off and not faults:
        faults.append(f"gain of {n_off:,} rows differs")
    return faults, detail


def _is_parted(bins: Bins, n_bins: int) -> bool:
    """Say whether every stratum has bins of equal size, larger ones first, ranked from 0."""
    strata, numbers, sizes = group_rows(bins)
    for stratum in np.unique(strata):
        of_it = strata == stratum
        n_rows = int(sizes[of_it].sum())
        wanted = n_rows // n_bins + (np.arange(min(n_bins, n_rows)) < n_rows % n_bins)
        is_numbered = np.array_equal(numbers[of_it], np.arange(len(wanted)))
        if not is_numbered or not np.array_equal(sizes[of_it], wanted):
            return False
    at = np.lexsort((bins.rank, bins.bin, bins.stratum))
    firsts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.array_equal(bins.rank[at], np.arange(len(bins)) - firsts)


def _check_files(run: Run) -> Found:
    sizes, files, record = run.manifest.bytes, run.config.source.files, run.manifest.files
    found = {
        "subset_files": sum(path.stat().st_size for path in subset.subset_files(run.path)),
        "source_files": sum(file.bytes for file in files) if files else None,
    }
    faults = [
        f"{MANIFEST} says {sizes[key]} bytes of {key}, and not {value}"
        for key, value in found.items()
        if sizes[key] != value
    ]
    faults += [f"{name} {what}" for name, what in run.find_damage().items()]
    gone = [name for name in record if not (run.path / name).is_file()]
    rest = [CARD, REPORT_FILE, *(f"{name} (not here)" for name in gone)]
    detail = (
        f"{len(record) - len(gone)} files and {MANIFEST} are as they were written, its "
        "notes and versions by nothing but its digest; not compared: its seconds, "
    )
    return faults, detail + ", ".join(rest)
