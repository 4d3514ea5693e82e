"""Short probes of the report: what its comparisons, map and pages will take."""

import time
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dq_multimodal.config import CompressConfig
from dq_multimodal.memory import report_sizes
from dq_multimodal.probes import stretch
from dq_multimodal.report import duplicates, layout
from dq_multimodal.report.collect import GALLERY_ROWS, MAX_GALLERY_BINS, MAX_POINTS
from dq_multimodal.report.rows import RowReader
from dq_multimodal.report.vectors import Vectors, nearest

if TYPE_CHECKING:
    from datasets import Dataset

LIBRARIES = (
    "sklearn.manifold",
    "scipy.sparse.linalg",
    "scipy.sparse.csgraph",
    "threadpoolctl",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
MAP_ROWS, MAP_GROWTH = 1000, 1.35
"""The map is timed on so many points; more of them take longer by this exponent."""
FIGURE_SECONDS = 1.5
PAIR_ROWS = 8192
SHOWN_ROWS = 128
PAGE_BYTES, POINT_BYTES, MAP_ROW_BYTES = 75_000, 70, 190
FIGURE_BYTES, FIGURE_POINT_BYTES = 90_000, 130
MOST_SHOWN_BYTES = 5_500_000


def probe_report(
    dataset: "Dataset",
    vectors: Float[ndarray, "k d"] | None,
    request: CompressConfig,
    rows: dict[str, Any] | None,
    n_kept: int,
    n_left: int = 0,
) -> tuple[float, int]:
    """Give the seconds that the report takes, and its bytes.

    Args:
        dataset: The source.
        vectors: Some embeddings; None where the run makes none.
        request: The settings.
        rows: What config.yaml says of the rows.
        n_kept: Rows that are kept.
        n_left: Numbers of the left factor where embeddings are outer products.
    """
    seconds, n_rows = _time_imports(), len(dataset)
    kind = (rows or {}).get("modality", "none")
    n_shown = n_near = 0
    has_figures = find_spec("matplotlib") is not None
    if vectors is not None:
        n_shown = min(n_rows, MAX_POINTS[kind])
        n_hit = n_kept * (1 - np.exp(-n_shown / n_kept))
        n_near = round(n_hit * (1 - n_shown / n_rows))
        seconds += _time_comparisons(vectors, request, n_rows, n_kept, kind, n_left)
    n_bins = {"random": 1, "graphcut": 1}.get(request.method, request.n_bins)
    n_wanted = n_shown + n_near + 2 * GALLERY_ROWS * min(n_bins, MAX_GALLERY_BINS)
    n_wanted = min(n_rows, n_wanted)
    each, size = _time_rows(RowReader(dataset, rows), n_rows)
    seconds += each * n_wanted + FIGURE_SECONDS * has_figures
    shown = min(MOST_SHOWN_BYTES, size * (n_shown + n_near // 2 + 2 * n_wanted // 10))
    n_bytes = PAGE_BYTES + n_shown * (POINT_BYTES + MAP_ROW_BYTES) + shown
    n_bytes += n_shown * size // 2
    n_bytes += (FIGURE_BYTES + n_shown * FIGURE_POINT_BYTES) * has_figures
    return seconds, int(n_bytes)


def _time_imports() -> float:
    started = time.perf_counter()
    for name in LIBRARIES:
        if find_spec(name.split(".")[0]) is not None:
            import_module(name)
    return time.perf_counter() - started


def _time_comparisons(
    vectors: Float[ndarray, "k d"],
    request: CompressConfig,
    n_rows: int,
    n_kept: int,
    kind: str,
    n_left: int,
) -> float:
    """Give the seconds of map, coverage and near-duplicates."""
    width = vectors.shape[1]
    shown, asked, searched = report_sizes(n_rows, n_kept, width, MAX_POINTS[kind])
    some = stretch(vectors, min(n_rows, PAIR_ROWS))
    started = time.perf_counter()
    opened = Vectors(some, request.similarity, n_left)
    scan = (time.perf_counter() - started) * n_rows / len(some)

    points = np.linspace(0, len(some) - 1, min(shown, MAP_ROWS)).astype(int)
    started = time.perf_counter()
    gram = layout.gram_matrix(opened, points)
    layout.place_points(gram)
    layout.nearest_points(gram, request.similarity == "cosine")
    of_map = (time.perf_counter() - started) * (shown / len(points)) ** MAP_GROWTH

    queries = np.arange(min(2048, len(some)))
    started = time.perf_counter()
    nearest(opened, queries, np.arange(len(some)))
    pair = (time.perf_counter() - started) / (len(queries) * len(some))
    n_pairs = 2 * asked * (1 - n_kept / n_rows) * n_kept + shown * n_kept

    opened = Vectors(some, "cosine", n_left)
    started = time.perf_counter()
    duplicates.find_groups(opened, duplicates.TEXT_THRESHOLD, request.seed)
    groups = time.perf_counter() - started
    groups *= count_tiled(searched) / count_tiled(min(searched, len(some)))
    return 2 * scan + of_map + pair * n_pairs + groups


def count_tiled(n_rows: int) -> float:
    """Give the pairs that the search for near-duplicates looks at, tile by tile."""
    starts = np.arange(0, n_rows, duplicates.LEFT_ROWS)
    return float((np.minimum(duplicates.LEFT_ROWS, n_rows - starts) * (n_rows - starts)).sum())


def _time_rows(reader: RowReader, n_rows: int) -> tuple[float, int]:
    """Give the seconds and bytes of one row that is shown."""
    if reader.kind == "none":
        return 0.0, 0
    some = np.unique(np.linspace(0, n_rows - 1, SHOWN_ROWS).astype(int)).tolist()
    started = time.perf_counter()
    if reader.kind == "image":
        pictures = reader.pictures(some).values()
        sizes = [4 * len(found.small) // 3 for found in pictures if found is not None]
    else:
        sizes = [min(400, sum(map(len, texts))) for texts in reader.texts(some).values()]
    seconds = (time.perf_counter() - started) / len(some)
    return seconds, round(float(np.mean(sizes or [0])))
