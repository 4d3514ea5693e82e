"""What the workers do: a task is one shard of the rows, or one group of strata.

Each is called with what all tasks share, its own number, and a folder of its machine. It leaves its
result in the store and returns what the driver has to know. They follow each other as here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from jaxtyping import Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal import __version__
from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.choice import choose_adapter
from dq_multimodal.adapters.image_text import image_half
from dq_multimodal.config import CompressConfig, InputError
from dq_multimodal.core import Bins, one_bin
from dq_multimodal.core.bins import count_working_bytes
from dq_multimodal.core.diversity import count_sampled
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.core.order import place_in_all
from dq_multimodal.core.partition import Parts, count_pieces, piece_of
from dq_multimodal.data.columns import read_labels
from dq_multimodal.data.local import read_parquet
from dq_multimodal.data.pixels import UNDECODED
from dq_multimodal.data.shards import Rows
from dq_multimodal.data.store import Store
from dq_multimodal.files import put_in_place
from dq_multimodal.manifest import BinsKind, Config
from dq_multimodal.stages import embedding, subset
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import bin_by_method, count_stood_for, order_strata
from dq_multimodal.stages.preparation import MAX_LISTED, MAX_NAMED, UNLABELLED, note_model
from dq_multimodal.stages.scoring import score_bins
from dq_multimodal.stages.selection import tabulate_rows

Facts = dict[str, Any]
GROUP_ROWS = 100_000
"""Small strata are binned together up to so many rows."""
BIN = np.dtype([("row", "i8"), ("stratum", "i8"), ("bin", "i8"), ("rank", "i8"), ("gain", "f8")])
RANK = np.dtype("i8")
WEIGHT = "weight"
"""Column that a table of `gather` has beside those of selection.parquet."""
PLACE = np.dtype([("order", "i8"), ("weight", "f8")])
MOST_TRIES = 10
"""A task that has begun so often and not ended is not begun again by this start of the run."""
RANDOM_BYTES = 150
"""Bytes of a row that are held where rows are put in a random order."""
LOADED: list[Adapter] = []
"""The adapter whose model this process has loaded."""


@dataclass(frozen=True)
class Work:
    """What all tasks share.

    Attributes:
        store: Where their results lie.
        rows: The source.
        request: What is asked, its method settled.
        kind: What the bins are.
        label_column: Column of strata.
        sample: Rows that the centres of k-means come from, ascending.
        npy: File of ready embeddings.
    """

    store: Store
    rows: Rows
    request: CompressConfig
    kind: BinsKind
    label_column: str | None
    sample: Int[ndarray, " s"]
    npy: Path | None


def do_once(
    release: str,
    store: Store,
    stage: str,
    task: Callable[[int, Path], Facts],
    number: int,
    place: Path,
) -> Facts:
    """Do a task of the driver's release, unless another worker has."""
    if release != __version__:
        raise InputError(f"a machine has dq-multimodal {__version__}, and the driver {release}")
    name = f"{stage}/{number:05d}"
    facts = store.find_facts(name)
    if facts is None:
        if not store.count_try(name, MOST_TRIES):
            raise InputError(
                f"task {number} of {stage} has ended {MOST_TRIES} workers, maybe for want of memory"
            )
        facts = task(number, place)
        store.put_facts(name, facts, place)
    return facts


def describe(
    config: Config, sample: Dataset, request: CompressConfig, number: int, folder: Path
) -> Facts:
    """Load the model, and give the config with what there is to say of it; one task does this."""
    adapter = choose_adapter(sample, request)
    note_model(config, adapter, request, sample.column_names)
    return {"config": config.as_dict(), "notes": adapter.notes if adapter else []}


def embed(work: Work, number: int, folder: Path) -> Facts:
    """Embed a shard: embeddings/NUMBER.parquet has row, vector, and the code of its label."""
    request, shard, start = work.request, work.rows.read(number), work.rows.starts[number]
    method = "dq" if request.method == "adq" else request.method  # scores come later
    adapter = choose_adapter(shard, replace(request, method=method))
    image = image_half(adapter)
    columns: dict[str, Any] = {"row": np.arange(start, start + len(shard))}
    facts: Facts = {"bytes": subset.count_bytes(shard), "labels": [], "problems": {}}
    facts |= {"notes": [], "names": []}
    if request.needs_embeddings:
        vectors = embed_shard(work, shard, adapter, start, folder)
        flat = pa.array(vectors.reshape(-1))
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        facts |= {"kind": vectors.dtype.str, "width": vectors.shape[1]}
        facts["largest"] = float(np.abs(vectors).max())
        if len(work.sample):
            some = vectors[rows_of(work, number, work.sample) - start]
            work.store.write(f"centres/{number:05d}.bin", some, folder)
    elif image is not None:
        image.check_images()
    if work.label_column is not None:
        codes, labels = read_labels(shard, work.label_column)
        used, columns["label"] = np.unique(codes, return_inverse=True)
        facts["labels"] = [labels[code] for code in used if code >= 0]
        columns["label"] = columns["label"].reshape(-1) - (used[0] < 0)  # -1 for no label
        if used[0] < 0:
            rows = np.flatnonzero(codes < 0)
            facts["problems"][UNLABELLED] = len(rows), (rows[:MAX_LISTED] + start).tolist()
    if adapter is not None:
        adapter.lengths()
        for what, odd in adapter.problems.items():
            most = None if what in UNDECODED else MAX_LISTED
            facts["problems"][what] = len(odd), sorted(row + start for row in odd)[:most]
            if what in UNDECODED and image is not None:
                some = sorted(odd)[:MAX_NAMED]
                names = zip(some, image.file_names(some), strict=True)
                facts["names"] += [(row + start, name) for row, name in names]
        facts["notes"] = adapter.notes
    write_table(work, f"embeddings/{number:05d}.parquet", pa.table(columns), folder)
    return facts


def embed_shard(
    work: Work, shard: Dataset, adapter: Adapter | None, start: int, folder: Path
) -> Float[ndarray, "n d"]:
    """Give the embeddings of a shard: ready ones as they are, others in float32."""
    given = work.request.ready_embeddings
    if work.npy is not None:
        asked = str(work.npy), work.rows.n_rows, work.request.split
        return embedding.read_npy(*asked, start, start + len(shard))
    if given is not None:
        vectors = np.concatenate([*embedding.read_column(given, shard, start)])
        is_half = getattr(shard.features[given].feature, "dtype", "") == "float16"
        return vectors.astype("f2") if is_half else vectors
    assert adapter is not None
    adapter.share_model(LOADED)
    embedding.embed_rows(adapter, folder, work.request.batch_size)
    return np.array(embedding.open_embeddings(folder))


def assign(
    work: Work,
    record: np.dtype,
    parts: Parts | None,
    codes: list[Int[ndarray, " k"]],
    whole: Path | None,
    number: int,
    folder: Path,
) -> Facts:
    """Write the rows of a shard sorted by part to parts/NUMBER.bin.

    Args:
        record: Type of a row there.
        parts: Of k-means; None where labels make the parts.
        codes: For each shard, the part of each of its label codes, -1 the last of them.
        whole: File of the embeddings of all rows, on a disk that all machines see.
    """
    table = read_table(work, f"embeddings/{number:05d}.parquet")
    records = np.empty(len(table), record)
    records["row"] = table["row"].to_numpy()
    if record.names != ("row",):
        flat = table["vector"].combine_chunks().flatten()
        records["vector"] = flat.to_numpy(zero_copy_only=False).reshape(len(table), -1)
        if whole is not None:
            shape = (work.rows.n_rows, records["vector"].shape[1])
            out = embedding.RowsFile(whole, shape, np.float32)
            out[records["row"]] = records["vector"]
            out.flush()
    found = np.zeros(len(table), dtype=np.int64)
    if parts is not None:
        found = parts.assign(records["vector"].astype(np.float32))
    elif work.label_column is not None:
        found = codes[number][table["label"].to_numpy()]
    work.store.write(f"parts/{number:05d}.bin", records[np.argsort(found, kind="stable")], folder)
    present, counts = np.unique(found, return_counts=True)
    return {"parts": present.tolist(), "counts": counts.tolist()}


@dataclass(frozen=True)
class Group:
    """Strata that one task bins: those of the parts from first to last, or a piece of one part.

    The first of them has the number stratum among all strata.
    """

    first: int
    last: int
    stratum: int
    piece: int = 0
    n_pieces: int = 1


def make_groups(counts: Int[ndarray, "u p"], n_parts: int) -> list[Group]:
    """Cut the parts into groups for one task each: small ones together, pieces of very large ones.

    Args:
        counts: Rows of every part in every shard.
        n_parts: Parts by k-means that were asked for, 0 for strata that stay whole.
    """
    sizes = counts.sum(axis=0)
    pieces = count_pieces(sizes, n_parts) if n_parts else np.ones_like(sizes)
    groups: list[Group] = []
    stratum = filled = 0
    for part, (size, n_pieces) in enumerate(zip(sizes.tolist(), pieces.tolist(), strict=True)):
        is_small = n_pieces == 1 and groups and groups[-1].n_pieces == 1
        if is_small and filled + size <= GROUP_ROWS:
            groups[-1] = replace(groups[-1], last=part + 1)
        else:
            filled = 0
            groups += [Group(part, part + 1, stratum + k, k, n_pieces) for k in range(n_pieces)]
        stratum, filled = stratum + n_pieces, filled + size
    return groups


def count_task_bytes(groups: list[Group], counts: Int[ndarray, "u p"], record: np.dtype) -> int:
    """Bound the memory that the task of the largest group takes, in bytes."""
    found = [0]
    for group in groups:
        sizes = counts[:, group.first : group.last].sum(axis=0) // group.n_pieces
        if record.names == ("row",):  # of a random order
            found.append(RANDOM_BYTES * int(sizes.sum()))
            continue
        working = count_working_bytes(sizes.tolist(), record.itemsize // 4)
        found.append(4 * record.itemsize * int(sizes.sum()) + working)
    return max(found)


def make_bins(
    work: Work,
    record: np.dtype,
    groups: list[Group],
    counts: Int[ndarray, "u p"],
    unreadable: Int[ndarray, " k"],
    number: int,
    folder: Path,
) -> Facts:
    """Make the bins of a group: bins/NUMBER.bin has a record for each row, by row number.

    Args:
        counts: Rows of every part in every shard.
        unreadable: Rows that no subset takes, ascending.
    """
    request, group = work.request, groups[number]
    units, strata, sizes = [], [], []
    for shard, size in enumerate(counts):
        mine = size[group.first : group.last]
        where = int(size[: group.first].sum()), int(mine.sum())
        found = work.store.read(f"parts/{shard:05d}.bin", record, *where)
        is_mine = piece_of(found["row"], group.n_pieces) == group.piece
        units.append(found[is_mine])
        strata.append(np.repeat(np.arange(len(mine)), mine)[is_mine] + group.stratum)
        sizes.append(len(units[-1]))
    records, stratum = np.concatenate(units), np.concatenate(strata)
    at = np.argsort(records["row"])
    records, bins = records[at], one_bin(stratum[at])
    rows, is_blank = records["row"], np.zeros(len(at), dtype=bool)
    is_out = np.isin(rows, unreadable)
    if work.kind != "none":
        vectors = records["vector"].astype(np.float32)
        is_blank |= ~vectors.any(axis=1)
        some = replace(request, n_bins=min(request.n_bins, len(rows)))
        asked = vectors, bins.stratum, work.kind, some, Marks(is_out)
        found_bins, marks = bin_by_method(*asked, rows=rows)
        bins = replace(found_bins, stratum=bins.stratum)
        for k, part in enumerate(marks.nearest or ()):
            work.store.write(f"nearest/{number:05d}-{k}.bin", part.astype(np.int64), folder)
    made = np.empty(len(rows), BIN)
    made["row"] = rows
    for name, column in vars(bins).items():
        made[name] = column
    work.store.write(f"bins/{number:05d}.bin", made, folder)
    pairs, of_row, n_rows = pair_up(made)
    n_out = np.bincount(of_row, is_out).astype(int)
    facts = {"units": sizes, "pairs": pairs, "sizes": n_rows.tolist(), "out": n_out.tolist()}
    if request.method == "adq":  # about twice as many rows as the scores need, of the lowest keys
        expected = max(1, work.rows.n_rows // request.n_bins)
        chance = (2 * count_sampled(expected, request.score_rows) + 100) / expected
        keys = hash_numbers(~request.seed, rows.astype(np.uint64)) * 2.0**-64
        picks = np.flatnonzero(~is_blank & (keys < chance))
        facts["picks"] = rows[picks].tolist(), bins.bin[picks].tolist()
        facts["filled"] = np.bincount(bins.bin[~is_blank], minlength=request.n_bins).tolist()
    return facts


def take(work: Work, picks: Int[ndarray, " k"], number: int, folder: Path) -> Facts:
    """Copy some rows of a shard for the scores of adq: scores/NUMBER-0.parquet, and so on."""
    rows = rows_of(work, number, picks)
    if not len(rows):
        return {"files": 0}
    kept = pa.table({"row": rows})
    return put_rows(work, "scores", number, work.rows.read(number), kept, folder)


def score(
    work: Work, files: list[str], bins: Int[ndarray, " k"], number: int, folder: Path
) -> Facts:
    """Score the bins by rows that were copied; one task does all."""
    places = [folder / name.replace("/", "-") for name in files]
    sample = read_parquet([*map(work.store.fetch, files, places)])
    request = replace(work.request, ready_embeddings=None, score_rows=max(2, len(sample)))
    adapter = choose_adapter(sample, request)
    assert adapter is not None
    embedding.embed_rows(adapter, folder, request.batch_size)
    of_rows = replace(one_bin(np.zeros_like(bins)), bin=bins)
    scores, facts = score_bins(adapter, folder, of_rows, request, 0)
    return {**{name: v.tolist() for name, v in vars(scores).items()}, "facts": facts.as_dict()}


def order(
    work: Work,
    unreadable: Int[ndarray, " k"],
    sizes: Int[ndarray, " s"],
    weights: Float[ndarray, "s m"] | None,
    n_kept: int,
    number: int,
    folder: Path,
) -> Facts:
    """Give the rows of a group their places in the order of all: order/NUMBER.bin.

    Args:
        sizes: Rows of every stratum without those that no subset takes.
        weights: Of the bins of every stratum, for adq.
    """
    records = work.store.read(f"bins/{number:05d}.bin", BIN)
    rows, is_out = records["row"], np.isin(records["row"], unreadable)
    places = sizes.sum() + np.searchsorted(unreadable, rows)
    for stratum in np.unique(records["stratum"][~is_out]).tolist():
        at = np.flatnonzero((records["stratum"] == stratum) & ~is_out)
        bins = Bins(*(records[name][at] for name in ("bin", "rank", "gain", "stratum")))
        some = None if weights is None else weights[stratum, np.unique(bins.bin)]
        nth = order_strata(bins, work.request, some, rows[at])
        places[at] = place_in_all(sizes, stratum)[nth]
    is_kept = places < n_kept
    bins = Bins(*(records[name] for name in ("bin", "rank", "gain", "stratum")))
    nearest = read_nearest(work, number, 0, len(rows)) if work.kind == "coverage" else None
    weights = count_stood_for(bins, work.request, Marks(is_out, nearest=nearest), is_kept)
    made = np.zeros(len(rows), PLACE)
    made["order"], made["weight"] = places, 1 if weights is None else weights
    work.store.write(f"order/{number:05d}.bin", made, folder)
    kept = np.bincount(pair_up(records)[1], is_kept).astype(int)
    return {"kept": kept.tolist(), "weight": float(made["weight"][is_kept].sum())}


def read_nearest(
    work: Work, group: int, start: int, size: int
) -> tuple[Int[ndarray, " k1"], Int[ndarray, " m"]]:
    """Read the record of the nearest rows of some rows of a group; see `Marks`."""
    starts = work.store.read(f"nearest/{group:05d}-0.bin", np.dtype("i8"), start, size + 1)
    where = int(starts[0]), int(starts[-1] - starts[0])
    return starts - starts[0], work.store.read(f"nearest/{group:05d}-1.bin", RANK, *where)


def gather(
    work: Work,
    units: Int[ndarray, "g u"],
    unreadable: Int[ndarray, " k"] | None,
    n_kept: int,
    number: int,
    folder: Path,
) -> Facts:
    """Put together selection/NUMBER.parquet, the rows of a shard with their places.

    Args:
        units: Rows of every group in every shard.
        unreadable: Rows that no subset takes; None where none is looked for.
    """
    found, lengths, ranks = [], [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for group in np.flatnonzero(units[:, number]).tolist():
        where = int(units[group, :number].sum()), int(units[group, number])
        parts = ("bins", BIN), ("order", PLACE)
        found.append([work.store.read(f"{p}/{group:05d}.bin", k, *where) for p, k in parts])
        if work.kind == "coverage":
            starts, some = read_nearest(work, group, *where)
            lengths.append(np.diff(starts))
            ranks.append(some)
    records, places = (np.concatenate(part) for part in zip(*found, strict=True))
    at = np.argsort(records["row"])
    records, places, nearest = records[at], places[at], None
    start, stop = work.rows.starts[number : number + 2]
    if not np.array_equal(records["row"], np.arange(start, stop)):
        raise OSError(f"rows {start} to {stop} are not all in the parts of the run")
    if work.kind == "coverage":
        size, rank = np.concatenate(lengths), np.concatenate(ranks)
        first = np.cumsum(size) - size
        starts = np.concatenate([[0], np.cumsum(size[at])])
        nearest = starts, rank[np.repeat(first[at] - starts[:-1], size[at]) + np.arange(len(rank))]
    bins = Bins(*(records[name] for name in ("bin", "rank", "gain", "stratum")))
    is_out = None if unreadable is None else np.isin(records["row"], unreadable)
    is_kept, marks = places["order"] < n_kept, Marks(is_out, nearest=nearest)
    table = tabulate_rows(records["row"], bins, work.kind, places["order"], is_kept, marks)
    table = table.append_column(WEIGHT, pa.array(places["weight"]))
    write_table(work, f"selection/{number:05d}.parquet", table, folder)
    return {}


def join_tables(work: Work, path: Path) -> None:
    """Write selection.parquet, piece by piece; the driver does this."""
    temporary = path.with_name(path.name + ".tmp")
    names = [f"selection/{number:05d}.parquet" for number in range(len(work.rows.shards))]
    schema = read_table(work, names[0]).drop_columns([WEIGHT]).schema
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for name in tqdm(names, desc="join", unit="file"):
            writer.write_table(read_table(work, name).drop_columns([WEIGHT]))
    put_in_place(temporary, path)


def write(
    work: Work, weight: float | None, shown: Int[ndarray, " k"], number: int, folder: Path
) -> Facts:
    """Write the kept rows of a shard, and those that the report shows: subset/ and shown/.

    Weight is the mean of those of the kept rows; None where all weigh the same.
    """
    table = read_table(work, f"selection/{number:05d}.parquet")
    some = table.filter(table["kept"])
    kept = some.select(["row", "bin", "rank"])
    if weight is not None:
        found = (some[WEIGHT].to_numpy() / weight).astype(np.float32)
        kept = kept.append_column("weight", pa.array(found))
    table = table.drop_columns([WEIGHT])
    shard, rows = work.rows.read(number), rows_of(work, number, shown)
    facts = put_rows(work, "subset", number, shard, kept, folder)
    facts["shown"] = put_rows(work, "shown", number, shard, pa.table({"row": rows}), folder)
    places = rows - work.rows.starts[number]
    table = table.take(places)
    if work.request.needs_embeddings:
        vectors = read_table(work, f"embeddings/{number:05d}.parquet")["vector"]
        table = table.append_column("vector", vectors.take(places))
    write_table(work, f"shown/{number:05d}.parquet", table, folder)
    return facts


def pair_up(records: ndarray) -> tuple[list[list[int]], Int[ndarray, " n"], Int[ndarray, " k"]]:
    """Give the pairs of stratum and bin of some records, the one of each, and their rows."""
    both = np.stack([records["stratum"], records["bin"]], axis=1)
    pairs, of_row, counts = np.unique(both, axis=0, return_inverse=True, return_counts=True)
    return pairs.tolist(), of_row.reshape(-1), counts


def rows_of(work: Work, number: int, picks: Int[ndarray, " k"]) -> Int[ndarray, " m"]:
    """Give those of some rows, ascending, that lie in a shard."""
    first, last = np.searchsorted(picks, work.rows.starts[number : number + 2])
    return picks[first:last]


def read_table(work: Work, name: str) -> pa.Table:
    """Read a parquet file of the store."""
    with work.store.open(name) as file:
        return pq.read_table(file)


def write_table(work: Work, name: str, table: pa.Table, folder: Path) -> None:
    """Write a parquet file to the store."""
    pq.write_table(table, folder / "table.parquet", compression="zstd")
    work.store.put(name, folder / "table.parquet")


def put_rows(
    work: Work, stage: str, number: int, shard: Dataset, kept: pa.Table, folder: Path
) -> Facts:
    """Write rows of a shard as files stage/NUMBER-0.parquet, and so on; see `write_subset`."""
    if not len(kept):
        return {"files": 0, "rows": 0, "bytes": 0, "named": False}
    picks = kept["row"].to_numpy() - work.rows.starts[number]
    n_bytes = subset.write_subset(shard, picks, kept, folder)
    files = subset.subset_files(folder)
    for k, file in enumerate(files):
        work.store.put(f"{stage}/{number:05d}-{k}.parquet", file)
    names = folder / subset.FOLDER / subset.FILE_NAMES
    if names.exists():
        work.store.put(f"{stage}/{number:05d}.txt", names)
    facts = {"files": len(files), "rows": len(kept), "bytes": n_bytes}
    return {**facts, "named": names.exists()}


def name_files(stage: str, found: list[Facts]) -> list[str]:
    """Give the names of the files that `put_rows` wrote, by what is known of every shard."""
    numbers = ((number, int(facts["files"])) for number, facts in enumerate(found))
    return [f"{stage}/{number:05d}-{k}.parquet" for number, n in numbers for k in range(n)]
