"""All that the report says, collected once: the page, the map file and the figures draw on it."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.config import InputError
from dq_multimodal.files import read_text
from dq_multimodal.manifest import Config, Manifest, Model, check_type
from dq_multimodal.report.compare import (
    IMAGE_THRESHOLD,
    TEXT_THRESHOLD,
    Coverage,
    Groups,
    Vectors,
    draw_random,
    find_groups,
    find_other_words,
    measure_coverage,
    read_groups,
    sample_rows,
)
from dq_multimodal.report.decisions import Decisions, Selection, Totals, decide, picked_rows
from dq_multimodal.report.layout import Map, make_map
from dq_multimodal.report.patched import Example, show_examples
from dq_multimodal.report.rows import Picture, RowReader, clean_name
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import count_left, strata_to_share
from dq_multimodal.stages.selection import BINS_FILE, SCORES, read_selection, read_table
from dq_multimodal.stages.targeting import FOLDER as TARGET_FOLDER
from dq_multimodal.stages.targeting import PICKS

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

MAX_POINTS, MAX_PICTURES = 4000, 3000
MAX_GROUPS = 20
GROUP_ROWS = 4
MAX_GALLERY_BINS = 30
GALLERY_ROWS = 6
MAX_PICKS_BYTES = 50_000_000
MAX_TARGETS = 200
TARGET_PICKS = 3


@dataclass(frozen=True)
class TargetRow:
    """A target row and the rows that were picked for it."""

    number: int
    text: str  # cut; empty for an image
    n_kept: int  # kept rows that were picked for it
    picks: list[tuple[int, float]]  # the nearest of them, at most three: row number and cosine


@dataclass(frozen=True)
class Target:
    """What was picked for a target."""

    rows: list[TargetRow]  # the first 200
    n_rows: int  # all
    n_leaks: int  # rows of the source that equal a target row or are very near one


@dataclass
class Facts:
    """What there is to say of a run; parts that cannot be had are None."""

    config: Config
    manifest: Manifest
    selection: Selection
    scores: dict[str, list[float | None]]  # of the bins by name; empty where there are none
    reader: RowReader
    decisions: Decisions
    n_blank: int = 0  # rows without an embedding
    map: Map | None = None
    coverage: Coverage | None = None
    groups: Groups | None = None
    other_words: Groups | None = None
    """Rows of the same picture with other words; None where that cannot be told."""
    gallery: list[tuple[int | None, list[int], list[int]]] = field(default_factory=list)
    """Bin, some kept rows and some that were left out, of each bin."""
    target: Target | None = None
    examples: list[Example] = field(default_factory=list)  # of dropped patches
    texts: dict[int, list[str]] = field(default_factory=dict)  # of the rows shown somewhere
    pictures: dict[int, Picture] = field(default_factory=dict)

    @property
    def length_name(self) -> str:
        """What `Map.length` counts: "characters", "pixels", or "" where no rows can be read."""
        if self.reader.has_texts:
            return "characters"
        return "pixels" if self.reader.has_pictures else ""

    def label(self, row: int) -> str:
        """Label of a row; empty where there are none."""
        return self.labels[self.selection.stratum[row]] if self.labels else ""

    @cached_property
    def labels(self) -> list[str]:
        """Labels of the strata by code; empty where there is one stratum without a name."""
        labels = self.manifest.labels
        return [] if labels in ([], [""]) else [clean_name(label) for label in labels]


def collect(
    folder: Path,
    config: Config,
    manifest: Manifest,
    embeddings: ndarray | None,
    dataset: "Dataset | None",
    sample: "pa.Table | None" = None,
) -> Facts:
    """Read the tables of a run folder, or a sample, and measure all that the report shows."""
    table = read_table(folder, BINS_FILE)
    if sample is None:
        found, places, marks = read_selection(folder)
        stratum, bins, order, kept = found.stratum, found.bin, places["order"], places["kept"]
        rows = np.arange(len(kept))
        totals = [stratum, bins, np.ones_like(rows), kept.astype(np.int64)]
    else:
        rows, stratum, bins, order = _read_numbers(sample, "row", "stratum", "bin", "order")
        kept, marks = sample["kept"].to_numpy(), Marks.from_table(sample)
        totals = _read_numbers(table, "stratum", "bin", "size", "kept")
    numbers = None if config.bins == "none" else bins
    selection = Selection(rows, stratum, numbers, order, kept, marks, Totals(*totals))
    decisions = decide(selection, config)
    scores = _read_scores(table, selection.n_bins)
    facts = Facts(config, manifest, selection, scores, RowReader(dataset, config.rows), decisions)
    facts.target = _read_target(folder, selection, config.request.target_share)
    if manifest.patches is not None and sample is None:
        facts.examples = show_examples(folder, config, dataset, selection.kept)
    if embeddings is not None and len(embeddings) == len(selection):
        _compare(facts, embeddings)
    facts.gallery = _choose_gallery(selection, config.request.seed)
    _read_rows(facts)
    return facts


def _read_numbers(table: "pa.Table", *names: str) -> list[Int[ndarray, " n"]]:
    """Read columns of whole numbers, 0 where they are null."""
    return [table[name].fill_null(0).to_numpy().astype(np.int64) for name in names]


def _read_scores(table: "pa.Table", n_bins: int) -> dict[str, list[float | None]]:
    """Read the scores of every bin number; empty where no bin has any."""
    scores: dict[str, list[float | None]] = {name: [None] * n_bins for name in SCORES}
    for name in SCORES:
        for number, value in zip(table["bin"].to_pylist(), table[name].to_pylist(), strict=True):
            if number is not None and value is not None and np.isfinite(value):
                scores[name][number] = value
    return scores if any(v is not None for v in scores["importance"]) else {}


def _compare(facts: Facts, embeddings: ndarray) -> None:
    """Measure what needs the embeddings: map, coverage, near-duplicates."""
    request, selection = facts.config.request, facts.selection
    seed, n_left, kept = request.seed, count_left(facts.config), selection.kept
    vectors = Vectors(embeddings, request.similarity, n_left)
    facts.n_blank = int(vectors.is_blank.sum())
    n_points = MAX_PICTURES if facts.reader.has_pictures else MAX_POINTS
    facts.map = make_map(vectors, kept, n_points, seed)
    strata = strata_to_share(selection.stratum, request.partition)
    draws = draw_random(strata, int(kept.sum()), seed, selection.marks.readable(len(selection)))
    with tqdm(desc="coverage", unit="pair", unit_scale=True) as bar:
        facts.coverage = measure_coverage(
            vectors, kept, draws, request.method, seed, on_pairs=bar.update
        )
    duplicate_of = selection.marks.duplicate_of
    share = share_of_text(facts.config)
    threshold = (1 - share) * IMAGE_THRESHOLD + share * TEXT_THRESHOLD
    found = split_halves(embeddings, facts.config.embedding)
    images, texts = [Vectors(half, "cosine") for half in found] if found else (None, None)
    halves = [(images, IMAGE_THRESHOLD), (texts, TEXT_THRESHOLD)] if images and texts else []
    with tqdm(desc="near-duplicates", unit="pair", unit_scale=True) as bar:
        if duplicate_of is not None and request.drop_duplicates is not None:
            facts.groups = read_groups(duplicate_of, vectors.is_blank, request.drop_duplicates)
        else:
            if vectors.similarity != "cosine":
                vectors = Vectors(embeddings, "cosine", n_left)
            facts.groups = find_groups(vectors, threshold, seed, halves=halves, on_pairs=bar.update)
        if images and texts:
            facts.other_words = find_other_words(images, texts, seed, on_pairs=bar.update)


def share_of_text(config: Config) -> float:
    """Give the share of the text in the cosine of two rows; half where it is not known."""
    if config.rows is None or config.rows.modality != "image-text":
        return float(config.rows is None or config.rows.modality == "text")
    share = config.embedding.text_share if config.embedding else None
    return 0.5 if share is None else share


def split_halves(
    embeddings: Float[ndarray, "n d"], model: Model | None
) -> tuple[Float[ndarray, "n a"], Float[ndarray, "n b"]] | None:
    """Give the image vectors and the text vectors of rows; None where a row is one vector."""
    if model is None or model.image is None or model.text is None:
        return None
    n_image, n_text = model.image.dimension or 0, model.text.dimension or 0
    if min(n_image, n_text) < 1 or n_image + n_text != embeddings.shape[1]:
        return None
    return embeddings[:, :n_image], embeddings[:, n_image:]


class TargetDict(TypedDict):
    """What picks.json holds of a target row."""

    text: str
    picks: list[list[float]]


class PicksDict(TypedDict):
    """What picks.json holds."""

    targets: list[TargetDict]
    n_leaks: int


def _read_target(folder: Path, selection: Selection, share: float) -> Target | None:
    """Read what was picked for each target row; None where the run had no target.

    Of K kept rows the first ceil(share * K) in the targeted order were picked for the target; the
    others are there by the untargeted order.
    """
    path = folder / TARGET_FOLDER / PICKS
    rank, row = selection.marks.target_rank, selection.marks.target_row
    if rank is None or row is None:
        return None
    try:
        found = json.loads(read_text(path, MAX_PICKS_BYTES))
        check_type(PICKS, found, PicksDict)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not what a run writes: {error}") from error
    is_picked = picked_rows(rank, selection.kept, share)
    targets = found["targets"]
    counts = np.bincount(row[is_picked], minlength=len(targets))
    rows = []
    for number, target in enumerate(targets[:MAX_TARGETS]):
        near = [
            (int(k), float(cosine))
            for k, cosine in (pick for pick in target["picks"] if len(pick) == 2)
            if 0 <= k < len(is_picked) and is_picked[int(k)]
        ]
        rows.append(TargetRow(number, target["text"], int(counts[number]), near[:TARGET_PICKS]))
    return Target(rows, len(targets), found["n_leaks"])


def _choose_gallery(
    selection: Selection, seed: int
) -> list[tuple[int | None, list[int], list[int]]]:
    """Draw some kept rows and some others of every bin; of at most 30 bins, evenly spread."""
    shown = np.arange(max(1, selection.n_bins))
    if len(shown) > MAX_GALLERY_BINS:
        shown = np.unique(np.linspace(0, len(shown) - 1, MAX_GALLERY_BINS).round().astype(int))
    chosen: list[tuple[int | None, list[int], list[int]]] = []
    for number in shown.tolist():
        is_in = True if selection.bin is None else selection.bin == number
        ours, others = (
            sample_rows(np.flatnonzero(is_in & rows), GALLERY_ROWS, seed).tolist()
            for rows in (selection.kept, ~selection.kept)
        )
        chosen.append((None if selection.bin is None else number, ours, others))
    return chosen


def group_sample(members: Int[ndarray, " m"], kept: Bool[ndarray, " n"]) -> list[int]:
    """Choose the rows of a group to show: kept ones and others, half and half where both are."""
    ours, others = members[kept[members]], members[~kept[members]]
    n_ours = min(len(ours), max(GROUP_ROWS // 2, GROUP_ROWS - len(others)))
    return [*ours[:n_ours].tolist(), *others[: GROUP_ROWS - n_ours].tolist()]


def _read_rows(facts: Facts) -> None:
    """Read every row that is shown somewhere, in the order of the source."""
    reader = facts.reader
    found = {row for _, ours, others in facts.gallery for row in (*ours, *others)}
    for groups in filter(None, (facts.groups, facts.other_words)):
        for members in groups.members[:MAX_GROUPS]:
            found.update(group_sample(members, facts.selection.kept))
    if facts.map is not None:
        found.update(facts.map.rows.tolist(), facts.map.near[facts.map.near >= 0].tolist())
    for target in facts.target.rows if facts.target else []:
        found.update(row for row, _ in target.picks)
    wanted = sorted(found)
    n_reads = len(wanted) * (reader.has_texts + reader.has_pictures)
    with tqdm(total=n_reads, desc="rows to show", unit="row", disable=not n_reads) as bar:
        if reader.has_pictures:
            facts.pictures = reader.pictures(wanted, bar.update)
        if reader.has_texts:
            facts.texts = reader.texts(wanted, bar.update)
    if facts.map is not None:
        for at, row in enumerate(facts.map.rows.tolist()):
            facts.map.length[at] = reader.lengths.get(row, -1)
