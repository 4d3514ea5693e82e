"""All that the report says, collected once: the page, the map file and the figures draw on it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.report import coverage, duplicates, layout
from dq_multimodal.report.coverage import sample_rows
from dq_multimodal.report.rows import Picture, RowReader, clean_name
from dq_multimodal.report.vectors import Vectors, nearest
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import count_left, strata_to_share
from dq_multimodal.stages.selection import (
    BINS_FILE,
    SCORES,
    SELECTION_FILE,
    read_selection,
    read_table,
)

if TYPE_CHECKING:
    from datasets import Dataset

MAX_POINTS = {"text": 4000, "image": 3000, "none": 4000}
MAX_GROUPS = 20
GROUP_ROWS = 4
MAX_GALLERY_BINS = 30
GALLERY_ROWS = 6


@dataclass(frozen=True)
class Selection:
    """selection.parquet as arrays.

    Attributes:
        stratum: Code of the stratum of each row.
        bin: Bin of each row; None where no bins were made, as are rank and gain then.
        rank: Place in the greedy order of the bin.
        gain: GraphCut gain of the pick.
        order: Place in the order of the method.
        kept: Whether the row is kept.
        marks: What else is known of the rows.
    """

    stratum: Int[ndarray, " n"]
    bin: Int[ndarray, " n"] | None
    rank: Int[ndarray, " n"] | None
    gain: Float[ndarray, " n"] | None
    order: Int[ndarray, " n"]
    kept: Bool[ndarray, " n"]
    marks: Marks = field(default_factory=Marks)

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
class Map:
    """The rows that are shown as points.

    Attributes:
        rows: Row numbers, ascending.
        places: Coordinates in [0, 1].
        neighbour_ids: The nearest other points of each, as positions among the points.
        neighbour_distances: Their distances.
        near: The nearest kept row of each, itself not counted; -1 where there is none.
        near_distance: Its distance.
    """

    rows: Int[ndarray, " k"]
    places: Float[ndarray, "k 2"]
    neighbour_ids: Int[ndarray, "k m"]
    neighbour_distances: Float[ndarray, "k m"]
    near: Int[ndarray, " k"]
    near_distance: Float[ndarray, " k"]


@dataclass
class Facts:
    """What there is to say of a run; parts that cannot be had are None."""

    config: dict[str, Any]
    manifest: dict[str, Any]
    selection: Selection
    scores: dict[str, list[float | None]]
    reader: RowReader
    n_blank: int = 0
    map: Map | None = None
    coverage: dict[str, Any] | None = None
    groups: duplicates.Groups | None = None
    gallery: list[tuple[int | None, list[int], list[int]]] = field(default_factory=list)
    texts: dict[int, list[str]] = field(default_factory=dict)
    pictures: dict[int, Picture | None] = field(default_factory=dict)

    @cached_property
    def labels(self) -> list[str]:
        """Labels of the strata by code; empty where there is one stratum without a name."""
        labels = self.manifest.get("labels") or []
        return [] if labels in ([], [""]) else [clean_name(label) for label in labels]


def collect(
    folder: Path,
    config: dict[str, Any],
    manifest: dict[str, Any],
    embeddings: ndarray | None,
    dataset: "Dataset | None",
) -> Facts:
    """Read the tables of a run folder and measure all that the report shows."""
    selection = read_facts(folder)
    reader = RowReader(dataset, config["rows"])
    facts = Facts(config, manifest, selection, _read_scores(folder, selection.n_bins), reader)
    if embeddings is not None and len(embeddings) == len(selection):
        _compare(facts, embeddings)
    facts.gallery = _choose_gallery(selection, config["request"]["seed"])
    _read_rows(facts)
    return facts


def read_facts(folder: Path) -> Selection:
    """Read selection.parquet; bins of null are none."""
    bins, places, marks = read_selection(folder)
    has_bins = not read_table(folder, SELECTION_FILE)["bin"].null_count
    return Selection(
        stratum=bins.stratum,
        bin=bins.bin if has_bins else None,
        rank=bins.rank if has_bins else None,
        gain=bins.gain if has_bins else None,
        order=places["order"],
        kept=places["kept"],
        marks=marks,
    )


def _read_scores(folder: Path, n_bins: int) -> dict[str, list[float | None]]:
    """Read the scores of every bin number; empty where no bin has any."""
    table = read_table(folder, BINS_FILE)
    scores: dict[str, list[float | None]] = {name: [None] * n_bins for name in SCORES}
    for name in SCORES:
        for number, value in zip(table["bin"].to_pylist(), table[name].to_pylist(), strict=True):
            if number is not None and value is not None and np.isfinite(value):
                scores[name][number] = value
    return scores if any(v is not None for v in scores["importance"]) else {}


def _compare(facts: Facts, embeddings: ndarray) -> None:
    """Measure what needs the embeddings: map, coverage, near-duplicates."""
    request, selection = facts.config["request"], facts.selection
    seed, n_left = request["seed"], count_left(facts.config)
    vectors = Vectors(embeddings, request["similarity"], n_left)
    facts.n_blank = int(vectors.is_blank.sum())
    facts.map = _make_map(vectors, selection, MAX_POINTS[facts.reader.kind], seed)
    is_random = request["method"] == "random"
    strata = strata_to_share(selection.stratum, request.get("partition"))
    rows = selection.marks.readable(len(selection))
    other = coverage.random_kept(strata, selection.n_kept, seed, is_random, rows)
    with tqdm(desc="coverage", unit="pair", unit_scale=True) as bar:
        found = coverage.measure_coverage(vectors, selection.kept, other, seed, on_pairs=bar.update)
    if found is not None:
        facts.coverage = coverage.as_facts(found, request["method"])
    is_image = (
        facts.reader.kind == "image" or (facts.config["rows"] or {}).get("modality") == "image"
    )
    threshold = duplicates.IMAGE_THRESHOLD if is_image else duplicates.TEXT_THRESHOLD
    if vectors.similarity != "cosine":
        vectors = Vectors(embeddings, "cosine", n_left)
    with tqdm(desc="near-duplicates", unit="pair", unit_scale=True) as bar:
        facts.groups = duplicates.find_groups(vectors, threshold, seed, on_pairs=bar.update)


def _make_map(vectors: Vectors, selection: Selection, size: int, seed: int) -> Map | None:
    rows = layout.sample_points(~vectors.is_blank, selection.kept, size, seed)
    if not len(rows):
        return None
    with tqdm(total=1, desc="map", unit="map") as bar:
        gram = layout.gram_matrix(vectors, rows)
        places = layout.place_points(gram)
        ids, distances = layout.nearest_points(gram, vectors.similarity == "cosine")
        targets = np.flatnonzero(selection.kept & ~vectors.is_blank)
        near, near_distance = np.full(len(rows), -1), np.full(len(rows), np.nan)
        if len(targets):
            near, near_distance = nearest(vectors, rows, targets, is_self_allowed=False)
        bar.update()
    return Map(rows, places, ids, distances, near, near_distance)


def _choose_gallery(
    selection: Selection, seed: int
) -> list[tuple[int | None, list[int], list[int]]]:
    """Draw some kept rows and some others of every bin; of at most 30 bins, evenly spread."""
    if selection.bin is None:
        parts: list[tuple[int | None, ndarray]] = [(None, np.arange(len(selection)))]
    else:
        shown = np.arange(selection.n_bins)
        if len(shown) > MAX_GALLERY_BINS:
            shown = np.unique(np.linspace(0, len(shown) - 1, MAX_GALLERY_BINS).round().astype(int))
        parts = [(int(b), np.flatnonzero(selection.bin == b)) for b in shown]
    chosen = []
    for number, rows in parts:
        is_kept = selection.kept[rows]
        picks = [sample_rows(rows[m], GALLERY_ROWS, seed) for m in (is_kept, ~is_kept)]
        chosen.append((number, picks[0].tolist(), picks[1].tolist()))
    return chosen


def group_sample(members: Int[ndarray, " m"], kept: Bool[ndarray, " n"]) -> list[int]:
    """Choose the rows of a group to show: kept ones and others, half and half where both are."""
    ours, others = members[kept[members]], members[~kept[members]]
    n_ours = min(len(ours), max(GROUP_ROWS // 2, GROUP_ROWS - len(others)))
    return [*ours[:n_ours].tolist(), *others[: GROUP_ROWS - n_ours].tolist()]


def _read_rows(facts: Facts) -> None:
    """Read every row that is shown somewhere, in the order of the source."""
    reader = facts.reader
    if reader.kind == "none":
        return
    wanted: dict[int, None] = {}
    for _, ours, others in facts.gallery:
        wanted |= dict.fromkeys([*ours, *others])
    for members in (facts.groups.members if facts.groups else [])[:MAX_GROUPS]:
        wanted |= dict.fromkeys(group_sample(members, facts.selection.kept))
    if facts.map is not None:
        wanted |= dict.fromkeys(facts.map.rows.tolist())
        wanted |= dict.fromkeys(facts.map.near[facts.map.near >= 0].tolist())
    with tqdm(total=len(wanted), desc="rows to show", unit="row") as bar:
        if reader.kind == "image":
            facts.pictures = reader.pictures(sorted(wanted), bar.update)
        else:
            facts.texts = reader.texts(sorted(wanted), bar.update)
