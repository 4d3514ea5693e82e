"""The scores of the bins: which rows stand for a bin, and what the encoder says of them."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter, Part
from dq_multimodal.config import CompressConfig
from dq_multimodal.core import Bins, Scores
from dq_multimodal.core.diversity import count_steps, diversity, learn_directions, sample_bins
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.core.importance import sum_scores
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

    Images and text of one row are scored apart, and their scores summed, each brought to one scale
    first as `core.importance.normalise` does: their units are not the same.

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

    if request.ready_embeddings is None:
        source, places, scored = folder, picks, np.arange(len(bins))
    else:
        source, scored = embed("rows", "embed sample", None), picks
        places = np.arange(len(picks))
    shown = embed("views", "embed views", request.seed)
    is_surprisal = request.measure_of(adapter.describe()["modality"]) == "surprisal"
    textures = np.load(source / embedding.TEXTURE, mmap_mode="r")
    found, numbers, parts = [], bins.bin[picks], adapter.parts
    with tqdm(total=len(parts) * count_steps(len(picks)), desc="score", unit="step") as bar:
        for part in parts:
            rows = _features(source, places, part, n_left)
            views = _features(shown, np.arange(len(picks)), part, n_left)
            there = rows.any(axis=1)  # other rows have no such half
            div = np.full(n_bins, np.nan)
            if there.any():
                rows, views = learn_directions(
                    rows[there], views[there], seed=request.seed, on_steps=bar.update
                )
                of_bin = [numbers[there] == b for b in range(n_bins)]
                div = np.array([diversity(rows[b], views[b]) for b in of_bin])
            if is_surprisal and part is parts[-1]:
                rep = adapter.surprisal(bins.bin)
            else:
                rep = mean_texture(textures[:, part.texture], bins.bin[scored], n_bins)
            found.append(Scores(rep, div))
    counts = [int((numbers == b).sum()) for b in range(n_bins)]
    return sum_scores(found, request.norm), ScoreFacts(
        rows=len(picks),
        rows_a_bin=[min(counts), max(counts)],
        all_rows=(is_surprisal and len(found) == 1) or len(scored) == len(bins),
    )


def mean_texture(
    textures: Float[ndarray, "k 2"], members: Int[ndarray, " k"], n_bins: int
) -> Float[ndarray, " m"]:
    """Give the mean over the patches of each bin; NaN for a bin without any."""
    levels, counts = np.asarray(textures, dtype=np.float64).T
    sums = np.bincount(members, weights=levels * counts, minlength=n_bins)
    totals = np.bincount(members, weights=counts, minlength=n_bins)
    return np.where(totals > 0, sums / np.maximum(totals, 1), np.nan)


def _features(
    folder: Path, rows: Int[ndarray, " k"], part: Part, n_left: int
) -> Float[ndarray, "k f"]:
    """Read [embedding, middle features] of some rows; of outer products, the right factor."""
    vectors, middle = (
        np.load(folder / file, mmap_mode="r")[rows][:, columns].astype(np.float32)
        for file, columns in ((embedding.FILE, part.embedding), (embedding.MIDDLE, part.middle))
    )
    return np.concatenate([vectors[:, n_left:], middle], axis=1)
