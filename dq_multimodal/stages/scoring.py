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
from dq_multimodal.distributed.world import ALONE, World
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
    world: World = ALONE,
) -> tuple[Scores, ScoreFacts]:
    """Score every bin, pooled over the strata by bin number (ADQ, Eq. 3-5), going on if stopped.

    Representativeness is the mean texture level over all patches of all rows of the bin (of a run
    with ready embeddings, of the sampled rows), or the mean surprisal; see
    `CompressConfig.measure_of`. Diversity is that of sampled rows: a discriminator
    is trained once on the sampled rows of all bins and one augmented view of each, and then each
    bin is measured with it.

    Args:
        adapter: What reads and embeds the rows.
        folder: The run folder, with embeddings.npy, and middle.npy and texture.npy unless the
            embeddings were given.
        bins: Bin and stratum of every row.
        request: The settings.
        n_left: Numbers of the left factor where embeddings are outer products.
        world: The processes that share the embedding.

    Returns:
        The scores, NaN where there is nothing to score, and how many rows they come from.
    """
    measure = request.measure_of(adapter.describe()["modality"])
    embeddings = embedding.open_embeddings(folder)
    is_blank = np.concatenate(
        [
            ~embeddings[start : start + BLOCK_ROWS].any(axis=1)
            for start in range(0, len(embeddings), BLOCK_ROWS)
        ]
    )
    members = np.where(is_blank, -1, bins.bin)
    numbers = np.arange(len(bins), dtype=np.uint64)
    # The draw hashes with the seed itself: the complement gives a sample that is independent of it.
    picks = sample_bins(members, hash_numbers(~request.seed, numbers), request.score_rows)
    n_bins = int(bins.bin.max()) + 1
    if not len(picks):  # not one row that could be read
        nothing = np.full(n_bins, np.nan)
        return Scores(nothing, nothing), ScoreFacts(rows=0, rows_a_bin=[0, 0], all_rows=True)
    work = folder / FOLDER
    if request.ready_embeddings is None:
        rows = _features(folder, picks, n_left)
        textures = np.load(folder / embedding.TEXTURE, mmap_mode="r")
        scored = np.arange(len(bins))
    else:
        (work / "rows").mkdir(parents=True, exist_ok=True)
        embedding.embed_rows(
            adapter,
            work / "rows",
            request.batch_size,
            rows=picks,
            name="embed sample",
            world=world,
        )
        rows = _features(work / "rows", np.arange(len(picks)), n_left)
        textures = np.load(work / "rows" / embedding.TEXTURE)
        scored = picks
    (work / "views").mkdir(parents=True, exist_ok=True)
    embedding.embed_rows(
        adapter,
        work / "views",
        request.batch_size,
        rows=picks,
        view=request.seed,
        name="embed views",
        world=world,
    )
    views = _features(work / "views", np.arange(len(picks)), n_left)

    with tqdm(total=count_steps(len(picks)), desc="score", unit="step") as bar:
        rows, views = learn_directions(rows, views, seed=request.seed, on_steps=bar.update)
    of_bin = [bins.bin[picks] == b for b in range(n_bins)]
    div = np.array([diversity(rows[part], views[part]) for part in of_bin])
    if measure == "surprisal":
        rep = adapter.surprisal(bins.bin)
    else:
        rep = mean_texture(textures, bins.bin[scored], n_bins)
    counts = [int(part.sum()) for part in of_bin]
    return Scores(rep, div), ScoreFacts(
        rows=len(picks),
        rows_a_bin=[min(counts), max(counts)],
        all_rows=measure == "surprisal" or len(scored) == len(bins),
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
