"""From embeddings to bins, to an order of the rows by the method asked for, to their weights."""

import sys
from dataclasses import replace
from functools import partial
from threading import Timer
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from numpy import ndarray

from dq_multimodal.adapters.image_text import raise_threshold
from dq_multimodal.config import (
    CompressConfig,
    InputError,
    Method,
    Similarity,
    count_kept,
    count_parts,
)
from dq_multimodal.core import (
    Bins,
    Scores,
    bin_importance,
    make_bins,
    one_bin,
    order_rows,
    partition_rows,
    put_one_of_each_first,
)
from dq_multimodal.core.balance import balance_rows, draw_balanced
from dq_multimodal.core.coverage import cover_rows, weigh_by_nearest
from dq_multimodal.core.difficulty import ccs_strata, dual_propensity
from dq_multimodal.core.duplicates import find_duplicates
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.core.importance import blend_weights, group_rows
from dq_multimodal.core.order import cap_rows, count_capped, find_repeated, put_last
from dq_multimodal.core.target import mix_orders
from dq_multimodal.manifest import BinsKind
from dq_multimodal.stages.marks import Marks, find_noise

COMPILE_SECONDS = 1.0
"""Where compilation takes longer, a line says so."""


def bins_kind(method: Method) -> BinsKind:
    """Say what the bin, rank and gain of a method are.

    DQ's bins, one greedy run by the gains of GraphCut or of coverage, the leaves of a tree from
    left to right, or nothing.
    """
    if method in ("graphcut", "coverage", "blocks"):
        return method
    return "dq" if method in ("dq", "adq") else "none"


def part_rows(
    embeddings: ndarray, partition: str, similarity: Similarity
) -> tuple[Int[ndarray, " n"], list[str]]:
    """Part the rows by k-means into strata: give the part of every row, and the label of each.

    They do not depend on the seed of the run: another seed is another draw from the same bins.
    """
    from tqdm import tqdm

    n_parts = count_parts(partition, len(embeddings))
    with tqdm(total=len(embeddings), desc="partition", unit="row") as bar:
        codes = partition_rows(embeddings, n_parts, similarity, on_rows=bar.update)
    return codes, [f"part {code}" for code in range(int(codes.max()) + 1)]


def strata_to_share(strata: Int[ndarray, " n"], partition: str | None) -> Int[ndarray, " n"]:
    """Give the strata among which random selection shares its rows: parts by k-means are none."""
    return strata if partition is None else np.zeros_like(strata)


def compile_picks(dtype: np.dtype) -> None:
    """Have the loops of the greedy compiled for a type of embeddings; says so where it takes long.

    They are kept, so this takes a moment from the second run on. Enough rows are binned for pools
    to be drawn and checked.
    """
    line = (
        "preparing the loops of the selection: compiled once for a type of embeddings, about 20 s"
    )
    slow = Timer(COMPILE_SECONDS, partial(print, line, file=sys.stderr, flush=True))
    slow.start()
    try:
        rows = np.cos(np.outer(np.arange(1500), np.arange(1, 41)))
        make_bins(rows.astype(dtype), 10)
    finally:
        slow.cancel()


def count_left(config: Any, model: str = "embedding") -> int:
    """Give the numbers of the left factor where embeddings are outer products, else 0."""
    return ((config[model] or {}).get("factors") or [0])[0]


def bin_by_method(
    embeddings: ndarray,
    strata: Int[ndarray, " n"],
    kind: BinsKind,
    request: CompressConfig,
    marks: Marks,
    n_left: int = 0,
    rows: Int[ndarray, " n"] | None = None,
) -> tuple[Bins, Marks]:
    """Make the bins that a method needs, and for coverage the record of the nearest rows.

    Rows that cannot be read or are likely to be labelled wrong are left out of coverage: they are
    not covered, cover nothing, have a gain of NaN and the last ranks of their stratum.

    Kind says which bins; n_left is that of `make_bins`, and rows is that of `balance_rows`.
    """
    from tqdm import tqdm

    n_rows, marks = len(strata), replace(marks, nearest=None)
    is_greedy = kind in ("dq", "graphcut")
    if is_greedy:
        compile_picks(embeddings.dtype)
    with tqdm(total=n_rows, desc="select", unit="row") as bar:
        if is_greedy:
            n_bins = 1 if kind == "graphcut" else request.n_bins
            how: dict[str, Any] = {"n_left": n_left, "on_picks": bar.update}
            return make_bins(embeddings, n_bins, request.similarity, strata, **how), marks
        zeros, gain = np.zeros(n_rows, dtype=np.int64), np.full(n_rows, np.nan)
        if kind == "blocks":
            rank = balance_rows(embeddings, strata, rows=rows, on_rows=bar.update)
            return Bins(zeros, rank, gain, strata), marks
        is_out = find_noise(marks, replace(request, method="coverage"), n_rows)
        is_out |= False if marks.unreadable is None else marks.unreadable
        known = np.flatnonzero(~is_out)
        weights = None if marks.difficulty is None else marks.difficulty[known].astype(np.float64)
        some = embeddings if len(known) == n_rows else embeddings[known]
        place, rank, counts, ranks = np.arange(n_rows), zeros.copy(), zeros.copy(), zeros[:0]
        if len(known):
            found = cover_rows(some, strata[known], weights, on_picks=bar.update)
            gain[known], place[known], ranks = found.gain, found.rank, found.nearest[1]
            counts[known] = np.diff(found.nearest[0])
    at = np.lexsort((place, is_out, strata))  # those left out come last, by row number
    rank[at] = np.arange(n_rows) - np.searchsorted(strata[at], strata[at])
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Bins(zeros, rank, gain, strata), replace(marks, nearest=(starts, ranks))


def mark_duplicates(
    embeddings: ndarray,
    bins: Bins,
    request: CompressConfig,
    scores: Scores | None,
    marks: Marks,
    text_share: float | None = None,
) -> Marks:
    """Find the near-duplicates of every row that comes before it in the order of the method.

    The share of the text is that of vectors with two halves, which both have to be near.
    """
    from tqdm import tqdm

    assert request.drop_duplicates is not None
    threshold = raise_threshold(request.drop_duplicates, text_share)
    order = order_by_method(bins, request, scores, marks)
    with tqdm(desc="duplicates", unit="pair", unit_scale=True) as bar:
        found = find_duplicates(embeddings, order, threshold, on_pairs=bar.update)
    return replace(marks, duplicate_of=found)


def order_by_method(
    bins: Bins,
    request: CompressConfig,
    scores: Scores | None,
    marks: Marks | None = None,
) -> Int[ndarray, " n"]:
    """Put the rows in the order of a method; bins must be of its kind.

    Rows that are likely to be labelled wrong come after the others, which are shared out as if
    these were not there. Then the rows picked for a target are mixed in, near-duplicates go to
    the end (of each group the first in this order stays), and no value of the column cap_by goes
    over its cap. Rows that cannot be read come last of all.

    Raises:
        InputError: If scores (adq) or dynamics (ccs, dual) are needed and missing.
    """
    marks, n_rows = marks or Marks(), len(bins)
    readable, is_last = marks.readable(n_rows), find_noise(marks, request, n_rows)
    if request.method in ("ccs", "dual"):
        is_last |= np.isnan(_known(marks.aum, request))
    first, last = readable[~is_last[readable]], readable[is_last[readable]]
    place = np.full(n_rows, -1, dtype=np.int64)
    place[first] = _order_rows(bins.take(first), request, scores, marks, first)
    by_chance = order_rows(one_bin(bins.stratum[last]), seed=request.seed, rows=last)
    place[last] = len(first) + by_chance
    found = place[readable]
    if marks.target_rank is not None:
        picked = np.where(is_last, -1, marks.target_rank)[readable]
        found = mix_orders(picked, found, request.target_share)
    if marks.duplicate_of is not None:
        own = np.where(marks.duplicate_of < 0, np.arange(n_rows), marks.duplicate_of)[readable]
        found = put_last(found, find_repeated(found, own))
    if marks.group is not None and request.cap is not None:
        found = cap_rows(found, marks.group[readable], request.cap)
    if request.keep_every_class:
        found = put_one_of_each_first(found, bins.stratum[readable])
    order = np.empty(n_rows, dtype=np.int64)
    order[readable] = found
    if marks.unreadable is not None:
        order[marks.unreadable] = np.arange(len(readable), n_rows)
    return order


def _order_rows(
    bins: Bins,
    request: CompressConfig,
    scores: Scores | None,
    marks: Marks,
    rows: Int[ndarray, " k"],
) -> Int[ndarray, " k"]:
    """Put some rows in the order of the method alone."""
    method, seed = request.method, request.seed
    if method == "random":
        bins = one_bin(strata_to_share(bins.stratum, request.partition))
    if method == "ccs":
        strata = ccs_strata(_known(marks.aum, request)[rows].astype(np.float64))
        found = replace(one_bin(np.zeros_like(rows)), bin=strata)
        return order_rows(found, np.ones(len(np.unique(strata))), seed=seed, rows=rows)
    if method == "dual":
        chance = dual_propensity(
            _known(marks.dual, request)[rows].astype(np.float64),
            _known(marks.confidence, request)[rows].astype(np.float64),
            request.keep_ratio,
        )
        return _draw_by_chance(chance, seed, rows)
    is_adaptive = method == "adq"
    weights = weigh_groups(*group_rows(bins)[1:], request, scores) if is_adaptive else None
    return order_strata(bins, request, weights, rows)


def order_strata(
    bins: Bins,
    request: CompressConfig,
    weights: Float[ndarray, " groups"] | None,
    rows: Int[ndarray, " k"],
) -> Int[ndarray, " k"]:
    """Put the rows of one or more strata in the order of a method that needs no marks.

    These are random, blocks, dq, adq, graphcut and coverage. The order of a stratum alone is that
    of its rows among others, and `place_in_all` gives their places there.

    Args:
        bins: Bins of the method, of these rows.
        request: Settings of the run.
        weights: Weights of adq, of each (stratum, bin) that holds rows; see `order_rows`.
        rows: Row numbers in the dataset, ascending.

    Returns:
        Place of every row, from 0.
    """
    method, seed = request.method, request.seed
    if method == "random":
        return order_rows(one_bin(bins.stratum), seed=seed, rows=rows)
    if method == "blocks":
        rank = draw_balanced(bins.rank, bins.stratum, seed, rows)
        return order_rows(replace(bins, rank=rank), draw="rank")
    draw = "rank" if method in ("graphcut", "coverage") else request.draw
    return order_rows(bins, weights, draw=draw, seed=seed, rows=rows)


def _known(column: ndarray | None, request: CompressConfig) -> ndarray:
    if column is None:
        raise InputError(
            f"{request.method} needs the training dynamics of the rows, of 2 epochs or more, and "
            "this run has none: compress the source with --dynamics"
        )
    return column


def _draw_by_chance(
    chance: Float[ndarray, " n"], seed: int, rows: Int[ndarray, " n"]
) -> Int[ndarray, " n"]:
    """Draw rows one after the other, each with a chance in proportion to its number.

    The order of -log(u) / chance with u uniform is such a sample without replacement (Efraimidis
    and Spirakis 2006). Rows of chance 0 come last.
    """
    uniform = ((hash_numbers(seed, rows.astype(np.uint64)) >> np.uint64(11)) + 0.5) * 2.0**-53
    with np.errstate(divide="ignore"):
        keys = np.log(-np.log(uniform)) - np.log(chance)
    place = np.empty(len(rows), dtype=np.int64)
    place[np.lexsort((uniform, keys))] = np.arange(len(rows))
    return place


def weigh_rows(
    bins: Bins, request: CompressConfig, marks: Marks, is_kept: Bool[ndarray, " n"]
) -> Float32[ndarray, " n"] | None:
    r"""Give every kept row its weight in the loss, mean 1 over the kept rows; 0 for the others.

    Coverage: how many rows of its stratum a kept row stands for, those whose nearest kept row it
    is (CRAIG, arXiv:1906.01827). In a row's record of nearest rows the last one that is kept
    counts. Rows that coverage left out stand for themselves only. adq and ccs: rows over kept rows
    of its bin, or of its stratum of AUM, which is the inverse of the share that was kept.

    Returns:
        None where all kept rows weigh the same: for the other methods, and with a target, whose
        rows are more than they stand for on purpose.
    """
    weights = count_stood_for(bins, request, marks, is_kept)
    return None if weights is None else (weights / weights[is_kept].mean()).astype(np.float32)


def count_stood_for(
    bins: Bins, request: CompressConfig, marks: Marks, is_kept: Bool[ndarray, " n"]
) -> Float[ndarray, " n"] | None:
    """Give how many rows every kept row stands for, 0 for the others; see `weigh_rows`.

    Of whole strata it does not depend on other strata.
    """
    if marks.target_rank is not None or request.method not in ("coverage", "adq", "ccs"):
        return None
    if request.method == "coverage":
        assert marks.nearest is not None
        counts = weigh_by_nearest(marks.nearest, bins.rank, bins.stratum, is_kept)
        return np.where(is_kept, np.maximum(counts, 1), 0).astype(np.float64)
    else:
        groups = bins.stratum * (int(bins.bin.max()) + 1) + bins.bin
        if request.method == "ccs":
            groups = np.full(len(bins), -1)
            aum = _known(marks.aum, request)
            is_first = ~find_noise(marks, request, len(bins)) & ~np.isnan(aum)
            if marks.unreadable is not None:
                is_first &= ~marks.unreadable
            groups[is_first] = ccs_strata(aum[is_first].astype(np.float64))
        codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
        readable = marks.readable(len(bins))
        held = np.bincount(codes[readable], minlength=int(codes.max()) + 1)
        kept = np.bincount(codes, weights=is_kept, minlength=len(held))
        return np.where(is_kept, held[codes] / np.maximum(kept[codes], 1), 0.0)


def count_subset(
    strata: Int[ndarray, " n"],
    request: CompressConfig,
    marks: Marks | None = None,
) -> int:
    """Give the rows of the subset: keep_rows, or round(keep_ratio * those that can be read).

    With keep_every_class at least as many as there are strata with such a row.

    Raises:
        InputError: If that is none, or more than there are or the cap allows.
    """
    marks = marks or Marks()
    rows = marks.readable(len(strata))
    n_kept = count_asked(len(rows), len(strata), request)
    if request.keep_every_class:
        n_kept = max(n_kept, len(np.unique(strata[rows])))
    if marks.group is not None and request.cap is not None:
        n_most = count_capped(marks.group[rows], request.cap)
        if n_kept > n_most:
            raise InputError(
                f"a cap of {request.cap:g} on {request.cap_by} leaves at most {n_most:,} rows, and "
                f"{n_kept:,} were asked for"
            )
    return n_kept


def count_asked(n_readable: int, n_rows: int, request: CompressConfig) -> int:
    """Give the rows that are asked for of those that can be read among all; see `count_subset`."""
    what = "rows" if n_readable == n_rows else "rows whose image can be decoded"
    if not n_readable:
        raise InputError(
            f"none of the {n_rows:,} images can be decoded, so there is nothing to keep "
            "(--keep-unreadable keeps such rows)"
        )
    if request.keep_rows is not None:
        if request.keep_rows > n_readable:
            raise InputError(
                f"keep_rows must be at most the {n_readable:,} {what}, got {request.keep_rows:,}"
            )
        return request.keep_rows
    if request.keep_every_class:
        return round(request.keep_ratio * n_readable)
    return count_kept(n_readable, request.keep_ratio, what)


def check_scores(scores: Scores | None) -> Scores:
    """Raise if there are no scores."""
    if scores is None:
        raise InputError(
            "adq needs the scores of the bins, and this run has none (its method was another): "
            "compress the source with --method adq, or draw by another method, such as --method dq"
        )
    return scores


def weigh_groups(
    numbers: Int[ndarray, " groups"],
    sizes: Int[ndarray, " groups"],
    request: CompressConfig,
    scores: Scores | None,
) -> Float[ndarray, " groups"]:
    """Give the weight of every (stratum, bin) that the settings of adq ask for.

    Numbers and sizes are the bin number and the rows of each that holds rows.
    """
    importance = bin_importance(check_scores(scores), request.importance, request.norm)
    return blend_weights(numbers, sizes, importance, request.alpha)
