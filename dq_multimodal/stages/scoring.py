"""The scores of the bins: which rows stand for a bin, and what the encoder says of them."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.config import CompressConfig
from dq_multimodal.core import Bins, Scores
from dq_multimodal.core.diversity import count_steps, diversity, learn_directions, sample_bins
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.manifest import ScoreFacts
from dq_multimodal.stages import embedding

FOLDER = "scores"
"""What has been embedded for the scores so far; gone when the run is finished."""

BLOCK_ROWS = 65536


def score_bins(
    adapter: Adapter,
    folder: Path,
    bins: Bins,
    request: CompressConfig,
    n_left: int,
) -> tuple[Scores, ScoreFacts]:
    """Score every bin, pooled over the strata by bin number (ADQ, Eq. 3-5), going on if stopped.

    Representativeness is the mean texture level over all patches of all rows of the bin (of a run
    with ready embeddings, of the sampled rows), or the mean surprisal; see
    `CompressConfig.measure_of`. Diversity is that of sampled rows: a discriminator is trained once
    on the sampled rows of all bins and one augmented view of each, and then each bin is measured
    with it.

    The folder holds embeddings.npy, and middle.npy and texture.npy unless the embeddings were
    given; n_left is that of their bins, see `make_bins`.

    Returns:
        The scores, NaN where there is nothing to score, and how many rows they come from.
    """
    embeddings = embedding.open_embeddings(folder)
    blocks = (embeddings[k : k + BLOCK_ROWS] for k in range(0, len(embeddings), BLOCK_ROWS))
    is_blank = np.concatenate([~block.any(axis=1) for block in blocks])
    members = np.where(is_blank, -1, bins.bin)
    numbers = np.arange(len(bins), dtype=np.uint64)
    # The draw hashes with the seed itself: the complement gives a sample that is independent of it.
    picks = sample_bins(members, hash_numbers(~request.seed, numbers), request.score_rows)
    n_bins = int(bins.bin.max()) + 1
    if not len(picks):  # not one row that could be read
        nothing = np.full(n_bins, np.nan)
        return Scores(nothing, nothing), ScoreFacts(rows=0, rows_a_bin=[0, 0], all_rows=True)

    def embed(what: str, name: str, view: int | None) -> Path:
        place = folder / FOLDER / what
        place.mkdir(parents=True, exist_ok=True)
        embedding.embed_rows(adapter, place, request.batch_size, rows=picks, view=view, name=name)
        return place

    places = np.arange(len(picks))
    if request.ready_embeddings is None:
        rows, source, scored = _features(folder, picks, n_left), folder, np.arange(len(bins))
    else:
        source, scored = embed("rows", "embed sample", None), picks
        rows = _features(source, places, n_left)
    views = _features(embed("views", "embed views", request.seed), places, n_left)

    with tqdm(total=count_steps(len(picks)), desc="score", unit="step") as bar:
        rows, views = learn_directions(rows, views, seed=request.seed, on_steps=bar.update)
    of_bin = [bins.bin[picks] == b for b in range(n_bins)]
    div = np.array([diversity(rows[part], views[part]) for part in of_bin])
    is_all = request.measure_of(adapter.describe()["modality"]) == "surprisal"
    if is_all:
        rep = adapter.surprisal(bins.bin)
    else:
        textures = np.load(source / embedding.TEXTURE, mmap_mode="r")
        rep = mean_texture(textures, bins.bin[scored], n_bins)
    counts = [int(part.sum()) for part in of_bin]
    return Scores(rep, div), ScoreFacts(
        rows=len(picks),
        rows_a_bin=[min(counts), max(counts)],
        all_rows=is_all or len(scored) == len(bins),
    )


def mean_texture(
    textures: Float[ndarray, "k 2"], members: Int[ndarray, " k"], n_bins: int
) -> Float[ndarray, " m"]:
    """Give the mean over the patches of each bin; NaN for a bin without any."""
    levels, counts = np.asarray(textures, dtype=np.float64).T
    sums = np.bincount(members, weights=levels * counts, minlength=n_bins)
    totals = np.bincount(members, weights=counts, minlength=n_bins)
    return np.where(totals > 0, sums / np.maximum(totals, 1), np.nan)


def _features(folder: Path, rows: Int[ndarray, " k"], n_left: int) -> Float[ndarray, "k f"]:
    """Read [embedding, middle features] of some rows; of outer products, the right factor."""
    parts = [
        np.load(folder / file, mmap_mode="r")[rows].astype(np.float32)
        for file in (embedding.FILE, embedding.MIDDLE)
    ]
    return np.concatenate([parts[0][:, n_left:], parts[1]], axis=1)
