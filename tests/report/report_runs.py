"""Small finished run folders for the tests of the report, written directly."""

import numpy as np

from dq_multimodal.core import Scores, make_bins, one_bin, order_rows
from dq_multimodal.manifest import Config, Manifest, make
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.selection import write_selection

TEXT_ROWS = {
    "modality": "text",
    "shape": "alpaca",
    "columns": ["instruction", "output"],
    "template": "{instruction} {output}",
}

PAIR_ROWS = {
    "modality": "image-text",
    "shape": "columns",
    "columns": ["question", "answer"],
    "image_columns": ["image", "more"],
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
    marks=None,
    halves=None,
    **request,
):
    """Write selection.parquet and bins.parquet; give config and manifest.

    halves: how many of the numbers of a row are of its image, and the share of its text.
    """
    n_rows, kind = len(embeddings), "none" if method == "random" else "dq"
    codes = np.zeros(n_rows, dtype=np.int64) if strata is None else np.asarray(strata)
    if method == "random":
        bins = one_bin(codes)
    elif bins is None:
        bins = make_bins(embeddings, n_bins, similarity, codes, n_left=n_left)
    order = order_rows(bins)
    request |= {"dataset": name, "method": method, "keep_ratio": keep_ratio, "n_bins": n_bins}
    if kept is not None:
        order = np.argsort(np.lexsort((order, ~kept)))
        request["keep_rows"] = int(kept.sum())
    folder.mkdir(parents=True, exist_ok=True)
    model = {"model": "owner/encoder", "dimension": embeddings.shape[1]}
    if n_left:
        model["factors"] = [n_left, embeddings.shape[1] - n_left]
    if halves:
        n_image, share = halves
        model = {"dimension": embeddings.shape[1], "text_share": share}
        model["image"] = {"model": "/home/me/eye", "dimension": n_image}
        model["text"] = {"model": "owner/ear", "dimension": embeddings.shape[1] - n_image}
    config = {
        "request": {**request, "similarity": similarity},
        "source": {"kind": "hub", "name": name, "split": "train", "rows": n_rows},
        "rows": rows,
        "label_column": "label" if strata is not None else None,
        "embedding": None if method == "random" else model,
        "bins": kind,
    }
    manifest = {
        "rows": n_rows,
        "labels": list(labels),
        "notes": list(notes),
        "bytes": {"source_data": 1000 * n_rows, "source_files": None, "subset_data": 250 * n_rows},
    }
    config, manifest = make(Config, config), make(Manifest, manifest)
    numbers = 1 / (1 + np.arange(int(bins.bin.max()) + 1))
    scores = Scores(numbers, 2 - numbers) if has_scores else None
    write_selection(
        folder, bins, kind, order, config.request, list(labels), scores, marks or Marks()
    )
    return config, manifest
