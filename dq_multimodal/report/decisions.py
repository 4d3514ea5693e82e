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
OF_BIN = "it came as number {place} of {n_rows} rows; the first {n_kept} are kept."
OF_SAMPLE = "{n_kept} of its {n_rows} rows are kept. In the order of all rows it is number {place}."
"""Instead of OF_BIN, as the place in its bin cannot be told from a sample."""
SENTENCES = {
    "draw": f"Within its bin the seeded draw decides: {OF_BIN}",
    "rank": f"Within its bin the rank decides: {OF_BIN}",
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
class Totals:
    """Rows and kept rows of every (stratum, bin) of a run, or of parts of them."""

    stratum: Int[ndarray, " g"]
    bin: Int[ndarray, " g"]  # 0 where no bins were made
    n_rows: Int[ndarray, " g"]
    n_kept: Int[ndarray, " g"]


@dataclass(frozen=True)
class Selection:
    """selection.parquet as arrays: all of it or a sample; elsewhere a row is its place in these."""

    row: Int[ndarray, " n"]  # numbers in the source
    stratum: Int[ndarray, " n"]
    bin: Int[ndarray, " n"] | None  # None where no bins were made
    order: Int[ndarray, " n"]
    kept: Bool[ndarray, " n"]
    marks: Marks
    totals: Totals  # of the whole run

    def __len__(self) -> int:
        return len(self.order)

    @property
    def is_sample(self) -> bool:
        """Whether the run has more rows."""
        return len(self) < self.n_rows

    @property
    def n_rows(self) -> int:
        """Rows of the run."""
        return int(self.totals.n_rows.sum())

    @property
    def n_kept(self) -> int:
        """Kept rows of the run."""
        return int(self.totals.n_kept.sum())

    @property
    def n_bins(self) -> int:
        """Numbers of bins in use, 0 where there are none."""
        return 0 if self.bin is None else int(self.totals.bin.max()) + 1

    def count_bins(self) -> list[Int[ndarray, " b"]]:
        """Give rows and kept rows of the run by number of bin."""
        counts = self.totals.n_rows, self.totals.n_kept
        return [np.bincount(self.totals.bin, part).astype(np.int64) for part in counts]


@dataclass(frozen=True)
class Decisions:
    """What decided that each row was kept or left out."""

    kind: Int[ndarray, " n"]  # index into KINDS
    place: Int[ndarray, " n"]  # in the order of its group, from 1; of a sample: of all rows
    group: Int[ndarray, " n"]  # its bin in its stratum, or its stratum where there are no bins
    n_rows: Int[ndarray, " g"]
    n_kept: Int[ndarray, " g"]
    marks: Marks
    cap_by: str
    stratum_name: str  # "class", "split" or "part"; empty where there is one
    is_sample: bool  # without bins all rows are then one group

    def of(self, row: int) -> str:
        """Give the kind of one row."""
        return KINDS[self.kind[row]]

    def template(self, row: int) -> str:
        """Give the sentence of one row with names in place of numbers."""
        found = SENTENCES[self.of(row)]
        return found.replace(OF_BIN, OF_SAMPLE) if self.is_sample else found

    def sentence(self, row: int) -> str:
        """Say in one sentence what decided of a row."""

        def of_row(values: ndarray | None, offset: int = 0) -> str:
            return "" if values is None else f"{int(values[row]) + offset:,}"

        return self.template(row).format(
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
    request, totals = config.request, selection.totals
    stratum, order, kept = selection.stratum, selection.order, selection.kept
    marks = selection.marks
    method, n_rows, is_sample = request.method, len(order), selection.is_sample
    is_of_bins = method in ("dq", "adq") and selection.bin is not None

    def key(of: Selection | Totals) -> Int[ndarray, " k"]:
        if is_of_bins and of.bin is not None:
            return of.stratum * selection.n_bins + of.bin
        if is_sample or method in ("ccs", "dual"):
            return np.zeros_like(of.stratum)
        return strata_to_share(of.stratum, request.partition if method == "random" else None)

    keys, of_totals = np.unique(key(totals), return_inverse=True)
    sizes, n_kept = (
        np.bincount(of_totals.reshape(-1), counts).astype(np.int64)
        for counts in (totals.n_rows, totals.n_kept)
    )
    group, place = np.searchsorted(keys, key(selection)), order + 1
    if not is_sample:
        place[np.lexsort((order, group))] = (
            1 + np.arange(n_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        )
    name = method if not is_of_bins else "rank" if request.draw == "rank" else "draw"
    kind = np.full(n_rows, KINDS.index(name))

    def mark(name: str, rows: Bool[ndarray, " n"]) -> None:
        kind[rows] = KINDS.index(name)

    if request.keep_every_class:
        kept_of_class = np.bincount(totals.stratum, totals.n_kept)
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
    stratum_name = of_splits if request.partition is None else "part"
    if is_sample or not stratum.any():
        stratum_name = ""
    cap_by = str(request.cap_by)
    return Decisions(kind, place, group, sizes, n_kept, marks, cap_by, stratum_name, is_sample)


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
