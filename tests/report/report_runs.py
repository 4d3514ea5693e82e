"""Small finished run folders for the tests of the report, written directly."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dq_multimodal.core import make_bins, one_bin, order_rows
from dq_multimodal.manifest import Config, Manifest, make

TEXT_ROWS = {
    "modality": "text",
    "shape": "alpaca",
    "columns": ["instruction", "output"],
    "template": "{instruction} {output}",
}


def clusters(n_rows, size=16, seed=0, n_clusters=6):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_clusters, size))
    points = centres[rng.integers(n_clusters, size=n_rows)]
    return (points + 0.4 * rng.standard_normal((n_rows, size))).astype(np.float32)


def write_run(
    folder,
    embeddings,
    *,
    keep_ratio=0.25,
    method="dq",
    n_bins=4,
    strata=None,
    labels=("",),
    similarity="cosine",
    n_left=0,
    has_scores=False,
    rows=None,
    kept=None,
    bins=None,
    name="small",
    notes=(),
):
    """Write selection.parquet and bins.parquet; give config and manifest."""
    n_rows = len(embeddings)
    codes = np.zeros(n_rows, dtype=np.int64) if strata is None else np.asarray(strata)
    is_random = method == "random"
    if is_random:
        bins = one_bin(codes)
    elif bins is None:
        bins = make_bins(embeddings, n_bins, similarity, codes, n_left=n_left)
    order = order_rows(bins)
    is_kept = order < round(keep_ratio * n_rows) if kept is None else kept
    hidden = np.full(n_rows, is_random)
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "row": pa.array(np.arange(n_rows)),
        "stratum": pa.array(codes.astype(np.int32)),
        "bin": pa.array(bins.bin.astype(np.int32), mask=hidden),
        "rank": pa.array(bins.rank.astype(np.int32), mask=hidden),
        "gain": pa.array(bins.gain, mask=hidden),
        "order": pa.array(order),
        "kept": pa.array(is_kept),
    }
    pq.write_table(pa.table(table), folder / "selection.parquet")
    groups = sorted(set(zip(codes.tolist(), bins.bin.tolist(), strict=True)))
    numbers = [b for _, b in groups]
    scores = [1 / (1 + b) for b in numbers] if has_scores else [None] * len(groups)
    members = [(codes == s) & (bins.bin == b) for s, b in groups]
    summary = {
        "stratum": pa.array([s for s, _ in groups], pa.int32()),
        "label": [labels[s] for s, _ in groups],
        "bin": pa.array([None if is_random else b for b in numbers], pa.int32()),
        "size": [int(m.sum()) for m in members],
        "representativeness": pa.array(scores, pa.float64()),
        "diversity": pa.array([s and 2 - s for s in scores], pa.float64()),
        "importance": pa.array([s and s * s for s in scores], pa.float64()),
        "weight": [float(m.sum()) for m in members],
        "kept": [int(is_kept[m].sum()) for m in members],
    }
    pq.write_table(pa.table(summary), folder / "bins.parquet")
    request = {
        "dataset": name,
        "method": method,
        "keep_ratio": keep_ratio,
        "seed": 0,
        "draw": "random",
        "n_bins": n_bins,
        "similarity": similarity,
        "drop_ratio": 0.0,
    }
    model = {"model": "owner/encoder", "dimension": embeddings.shape[1]}
    if n_left:
        model["factors"] = [n_left, embeddings.shape[1] - n_left]
    config = {
        "request": request,
        "source": {"kind": "hub", "name": name, "split": "train", "rows": n_rows},
        "rows": rows,
        "label_column": "label" if strata is not None else None,
        "embedding": None if is_random else model,
        "bins": "none" if is_random else "dq",
    }
    manifest = {
        "rows": n_rows,
        "labels": list(labels),
        "notes": list(notes),
        "bytes": {"source_data": 1000 * n_rows, "source_files": None, "subset_data": 250 * n_rows},
        "seconds": {},
    }
    return make(Config, config), make(Manifest, manifest)
