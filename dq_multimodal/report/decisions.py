"""What decided of every row that it was kept or left out."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from dq_multimodal.manifest import Config
from dq_multimodal.stages.marks import Marks, find_noise
from dq_multimodal.stages.ordering import strata_to_share

OF_ALL = "of {n_rows} rows{of_stratum}; the first {n_kept} are kept"
SENTENCES = {
    "draw": "Within its bin the seeded draw decides: it came as number {place} of {n_rows} rows; "
    "the first {n_kept} are kept.",
    "rank": "Within its bin the rank decides: it came as number {place} of {n_rows} rows; the "
    "first {n_kept} are kept.",
    "graphcut": f"The greedy GraphCut run picked it as number {{place}} {OF_ALL}.",
    "coverage": f"Coverage picked it as number {{place}} {OF_ALL}.",
    "random": f"The seeded draw took it as number {{place}} {OF_ALL}.",
    "blocks": f"The balanced draw took it as number {{place}} {OF_ALL}.",
    "ccs": f"The seeded draw among rows of its difficulty: number {{place}} {OF_ALL}.",
    "dual": f"The draw by difficulty and uncertainty took it as number {{place}} {OF_ALL}.",
    "target": "It was picked for target row {target_row}, as number {target_place} of the rows "
    "picked for the target.",
    "class": "It is the one row kept of its class: every class keeps one.",
    "cap": "As many rows as the cap allows were kept of its value in the column {cap_by}.",
    "duplicate": "It says nearly the same as row {duplicate_of}, which comes before it: "
    "near-duplicates come last.",
    "noise": "It is likely to be labelled wrong (low area under the margin): such rows come last.",
    "unknown": "It has no training dynamics: such rows come last.",
    "unreadable": "Its image cannot be decoded.",
}
KINDS = tuple(SENTENCES)


@dataclass(frozen=True)
class Selection:
    """selection.parquet as arrays."""

    stratum: Int[ndarray, " n"]
    bin: Int[ndarray, " n"] | None  # None where no bins were made
    order: Int[ndarray, " n"]
    kept: Bool[ndarray, " n"]
    marks: Marks

    def __len__(self) -> int:
        return len(self.order)

    @property
    def n_kept(self) -> int:
        """Kept rows."""
        return int(self.kept.sum())

    @property
    def n_bins(self) -> int:
        """Numbers of bins in use, 0 where there are none."""
        return 0 if self.bin is None else int(self.bin.max()) + 1


@dataclass(frozen=True)
class Decisions:
    """What decided that each row was kept or left out."""

    kind: Int[ndarray, " n"]  # index into KINDS
    place: Int[ndarray, " n"]  # in the order of its group, from 1; the first are kept
    group: Int[ndarray, " n"]  # its bin in its stratum, or its stratum where there are no bins
    n_rows: Int[ndarray, " g"]
    n_kept: Int[ndarray, " g"]
    marks: Marks
    cap_by: str
    stratum_name: str  # "class", "split" or "part"; empty where there is one

    def of(self, row: int) -> str:
        """Give the kind of one row."""
        return KINDS[self.kind[row]]

    def sentence(self, row: int) -> str:
        """Say in one sentence what decided of a row."""

        def of_row(values: ndarray | None, offset: int = 0) -> str:
            return "" if values is None else f"{int(values[row]) + offset:,}"

        return SENTENCES[self.of(row)].format(
            place=of_row(self.place),
            n_rows=f"{self.n_rows[self.group[row]]:,}",
            n_kept=f"{self.n_kept[self.group[row]]:,}",
            of_stratum=f" of its {self.stratum_name}" if self.stratum_name else "",
            target_row=of_row(self.marks.target_row),
            target_place=of_row(self.marks.target_rank, 1),
            cap_by=self.cap_by,
            duplicate_of=of_row(self.marks.duplicate_of),
        )


def decide(selection: Selection, config: Config) -> Decisions:
    """Find what decided of every row."""
    request = config.request
    stratum, order, kept = selection.stratum, selection.order, selection.kept
    marks = selection.marks
    method, n_rows = request.method, len(order)
    is_of_bins = method in ("dq", "adq") and selection.bin is not None
    keys = strata_to_share(stratum, request.partition) if method == "random" else stratum
    if method in ("ccs", "dual"):
        keys = np.zeros_like(stratum)
    elif is_of_bins and selection.bin is not None:
        keys = stratum * selection.n_bins + selection.bin
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    by_group = np.lexsort((order, group))
    place = np.empty(n_rows, dtype=np.int64)
    place[by_group] = 1 + np.arange(n_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    name = method if not is_of_bins else "rank" if request.draw == "rank" else "draw"
    kind = np.full(n_rows, KINDS.index(name))

    def mark(name: str, rows: Bool[ndarray, " n"]) -> None:
        kind[rows] = KINDS.index(name)

    n_kept = np.bincount(group[kept], minlength=len(sizes))
    if request.keep_every_class:
        kept_of_class = np.bincount(stratum[kept], minlength=stratum.max() + 1)
        mark("class", kept & (kept_of_class[stratum] == 1))
    cap = request.cap
    if marks.group is not None and cap is not None:
        most = cap if cap >= 1 else math.ceil(cap * int(kept.sum()) - 1e-9)
        is_full = np.bincount(marks.group[kept], minlength=int(marks.group.max()) + 1) >= most
        mark("cap", ~kept & is_full[marks.group])
    if marks.duplicate_of is not None:
        mark("duplicate", ~kept & (marks.duplicate_of >= 0))
    if marks.aum is not None and method in ("ccs", "dual"):
        mark("unknown", ~kept & np.isnan(marks.aum))
    if marks.aum is not None:
        mark("noise", ~kept & find_noise(marks, request, n_rows))
    if marks.target_rank is not None:
        mark("target", picked_rows(marks.target_rank, kept, request.target_share))
    if marks.unreadable is not None:
        mark("unreadable", marks.unreadable)
    of_splits = "split" if config.source.splits and not config.label_column else "class"
    stratum_name = "" if not stratum.any() else of_splits if request.partition is None else "part"
    return Decisions(kind, place, group, sizes, n_kept, marks, str(request.cap_by), stratum_name)


def picked_rows(
    rank: Int[ndarray, " n"], kept: Bool[ndarray, " n"], share: float
) -> Bool[ndarray, " n"]:
    """Say which kept rows are there for the target: the first by rank, a share of all kept rows."""
    n_first = math.ceil(share * int(kept.sum()) - 1e-9)  # as core.target.mix_orders counts
    rows = np.flatnonzero(kept & (rank >= 0))
    first = rows[np.argsort(rank[rows], kind="stable")][:n_first]
    is_picked = np.zeros(len(rank), dtype=bool)
    is_picked[first] = True
    return is_picked
