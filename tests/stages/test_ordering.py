"""Orders by method beside marks: noise, targets, near-duplicates, caps; and the weights of rows."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal.config import CompressConfig, InputError
from dq_multimodal.core import Bins, Scores, make_bins, one_bin, row_hash
from dq_multimodal.core.importance import group_rows
from dq_multimodal.core.order import place_in_all
from dq_multimodal.stages import ordering
from dq_multimodal.stages.marks import Marks, find_noise
from dq_multimodal.stages.ordering import (
    bin_by_method,
    bins_kind,
    count_subset,
    mark_duplicates,
    order_by_method,
    order_strata,
    weigh_groups,
    weigh_rows,
)

N_ROWS = 90


@pytest.fixture
def rows():
    """Embeddings and strata of three classes, some rows equal."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(N_ROWS, 6)).astype(np.float32)
    strata = np.repeat([0, 1, 2], [40, 30, 20])
    embeddings += 2 * np.eye(3, 6, dtype=np.float32)[strata]
    embeddings[[3, 17, 55]] = embeddings[[2, 2, 50]]
    return embeddings, strata


def dynamics_marks(n_rows=N_ROWS, **more):
    rng = np.random.default_rng(1)
    aum, confidence, dual = rng.uniform(size=(3, n_rows)).astype(np.float32)
    return Marks(aum=2 * aum - 1, confidence=confidence, dual=dual, **more)


def ask(**options):
    return CompressConfig("rows", **options)


METHODS = ["random", "blocks", "coverage", "dq", "graphcut", "ccs", "dual"]


def order_of(rows, marks, **options):
    embeddings, strata = rows
    request = ask(**options)
    bins = one_bin(strata)
    if request.method not in ("random", "ccs", "dual"):
        kind = bins_kind(request.method)
        bins, marks = bin_by_method(embeddings, strata, kind, request, marks)
    return bins, marks, request, order_by_method(bins, request, None, marks)


@pytest.mark.parametrize("method", METHODS)
def test_an_order_is_a_permutation_and_the_same_for_the_same_seed(rows, method):
    options = {"method": method, "dynamics": "d.npy", "n_bins": 3}
    *_, first = order_of(rows, dynamics_marks(), **options)
    *_, again = order_of(rows, dynamics_marks(), **options)
    assert sorted(first) == list(range(N_ROWS))
    assert first.tolist() == again.tolist()
    *_, other = order_of(rows, dynamics_marks(), seed=1, **options)
    assert (first.tolist() == other.tolist()) == (method in ("coverage", "graphcut"))


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["random", "blocks", "dq", "adq", "graphcut", "coverage"]),
    draw=st.sampled_from(["random", "rank"]),
    data=st.data(),
)
def test_strata_ordered_alone_and_merged_are_all_rows_ordered_together(method, draw, data):
    more = {"draw": draw} if method in ("dq", "adq") else {}
    request = ask(method=method, n_bins=3, seed=data.draw(st.integers(-5, 2**60)), **more)
    sizes = np.array(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6)))
    strata = np.random.default_rng(int(sizes.sum())).permutation(
        np.repeat(range(len(sizes)), sizes)
    )
    nth = np.empty_like(strata)
    for code, size in enumerate(sizes):
        nth[strata == code] = np.random.default_rng(code).permutation(size)
    bin = nth % 3 if method in ("dq", "adq") else 0 * nth
    bins = Bins(bin, nth // 3 if bin.any() else nth, np.zeros(len(nth)), strata)
    scores = Scores(np.array([1.0, 3.0, 2.0]), np.array([-1.0, -5.0, -2.0]))
    together = order_by_method(bins, request, scores)
    of_group, numbers, counts = group_rows(bins)
    weights = weigh_groups(numbers, counts, request, scores)
    merged = np.empty_like(together)
    for code in range(len(sizes)):
        own = np.flatnonzero(strata == code)
        of_own = weights[of_group == code] if method == "adq" else None
        alone = order_strata(bins.take(own), request, of_own, own)
        merged[own] = place_in_all(sizes, code)[alone]
    np.testing.assert_array_equal(merged, together)


def test_the_rows_of_the_lowest_aum_come_last(rows):
    marks = dynamics_marks()
    _, _, request, order = order_of(rows, marks, method="coverage", dynamics="d.npy")
    lowest = np.argsort(marks.aum, kind="stable")[:4]  # floor(0.05 x 90)
    assert sorted(order[lowest]) == list(range(N_ROWS - 4, N_ROWS))
    assert np.flatnonzero(find_noise(marks, request, N_ROWS)).tolist() == sorted(lowest)
    *_, plain = order_of(rows, marks, method="random", dynamics="d.npy")
    *_, asked = order_of(rows, marks, method="random", dynamics="d.npy", noise_ratio=0.3)
    assert sorted(plain[lowest]) != list(range(N_ROWS - 4, N_ROWS))
    lowest = np.argsort(marks.aum, kind="stable")[:27]
    assert sorted(asked[lowest]) == list(range(N_ROWS - 27, N_ROWS))


def test_noise_is_counted_among_rows_that_can_be_read():
    unreadable = np.zeros(10, dtype=bool)
    unreadable[0] = True
    aum = np.array([-1, 0.1, np.nan, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.05], dtype=np.float32)
    marks = Marks(aum=aum, unreadable=unreadable)
    request = ask(method="random", dynamics="d.npy", noise_ratio=0.25)
    assert np.flatnonzero(find_noise(marks, request, 10)).tolist() == [1, 9]


def test_ccs_takes_an_even_share_of_every_stratum_of_aum():
    aum = np.concatenate([np.linspace(0.0, 0.019, 3), np.linspace(0.5, 0.519, 40), [1.0]])
    marks = Marks(aum=aum.astype(np.float32))
    request = ask(method="ccs", dynamics="d.npy", noise_ratio=0.0)
    order = order_by_method(one_bin(np.zeros(44, dtype=np.int64)), request, None, marks)
    for n_kept in (3, 6, 9):
        kept = np.flatnonzero(order < n_kept)
        n_of = [(kept < 3).sum(), ((kept >= 3) & (kept < 43)).sum(), (kept == 43).sum()]
        wanted = {3: [1, 1, 1], 6: [3, 2, 1], 9: [3, 5, 1]}[n_kept]
        assert n_of == wanted or n_of == {6: [2, 3, 1]}.get(n_kept)


def test_dual_draws_with_chances_that_grow_with_the_score():
    n_rows, hits = 40, np.zeros(40)
    dual = np.linspace(0.1, 1, n_rows).astype(np.float32)
    marks = Marks(aum=dual, confidence=np.full(n_rows, 0.5, np.float32), dual=dual)
    bins = one_bin(np.zeros(n_rows, dtype=np.int64))
    for seed in range(400):
        request = ask(method="dual", dynamics="d.npy", seed=seed, keep_ratio=0.1)
        hits += order_by_method(bins, request, None, marks) < 4
    assert hits[-10:].mean() > 3 * hits[:10].mean()


def test_target_rows_have_their_share_of_every_prefix(rows):
    rank = np.full(N_ROWS, -1)
    picked = np.arange(10, 60)
    rank[picked] = np.random.default_rng(3).permutation(50)
    marks = Marks(target_rank=rank, target_row=np.where(rank < 0, -1, rank % 7))
    *_, order = order_of(rows, marks, method="random", target="t", target_share=0.7)
    for n_kept in (10, 20, 40):
        first = np.flatnonzero(rank >= 0)[np.argsort(rank[rank >= 0])][: int(0.7 * n_kept) - 1]
        assert (order[first] < n_kept).all()


def test_of_near_duplicates_the_first_in_any_order_stays(rows):
    embeddings, strata = rows
    request = ask(method="random", drop_duplicates=0.9999)
    marks = mark_duplicates(embeddings, one_bin(strata), request, None, Marks())
    hashes = row_hash(0, N_ROWS)
    assert sorted(np.flatnonzero(marks.duplicate_of >= 0)) == sorted(
        row
        for group in ([2, 3, 17], [50, 55])
        for row in group
        if row != min(group, key=lambda k: hashes[k])
    )
    for seed in range(5):
        again = ask(method="random", drop_duplicates=0.9999, seed=seed)
        order = order_by_method(one_bin(strata), again, None, marks)
        plain = order_by_method(one_bin(strata), again, None, Marks())
        last = np.flatnonzero(order >= N_ROWS - 3)
        for group in ([2, 3, 17], [50, 55]):
            stays = set(group) - set(last)
            assert stays == {group[int(np.argmin(plain[group]))]}


def test_a_cap_holds_in_every_subset_and_is_an_error_where_it_cannot(rows):
    group = np.arange(N_ROWS) % 4
    marks = Marks(group=group)
    *_, order = order_of(rows, marks, method="random", cap_by="source", cap=0.3)
    for n_kept in range(1, N_ROWS + 1):
        counts = np.bincount(group[order < n_kept])
        assert counts.max() <= np.ceil(0.3 * n_kept - 1e-9)
    request = ask(method="random", cap_by="source", cap=5, keep_rows=21)
    with pytest.raises(InputError, match="leaves at most 20 rows, and 21 were asked"):
        count_subset(rows[1], request, marks)


def test_rows_that_coverage_left_out_weigh_as_one_row(rows):
    marks = dynamics_marks()
    bins, marks, request, _ = order_of(rows, marks, method="coverage", dynamics="d.npy")
    weights = weigh_rows(bins, request, marks, np.ones(N_ROWS, dtype=bool))
    np.testing.assert_allclose(weights, 1)
    assert np.isnan(bins.gain).sum() == 4
    assert len(marks.nearest[1]) >= N_ROWS - 4


def test_weights_of_adq_undo_its_shares(rows):
    embeddings, strata = rows
    bins = make_bins(embeddings, 3, strata=strata)
    is_kept = np.random.default_rng(0).uniform(size=N_ROWS) < 0.4
    weights = weigh_rows(bins, ask(method="adq", n_bins=3), Marks(), is_kept)
    for code in range(3):
        for number in range(3):
            of_it = (bins.stratum == code) & (bins.bin == number)
            if (of_it & is_kept).any():
                each = weights[of_it & is_kept]
                assert np.ptp(each) == 0
                ratio = each[0] * (of_it & is_kept).sum() / of_it.sum()
                assert ratio == pytest.approx(is_kept.sum() / covered(bins, is_kept), rel=1e-5)
    assert weights[is_kept].mean() == pytest.approx(1)
    assert not weights[~is_kept].any()


def covered(bins, is_kept):
    """Count the rows of the bins that keep some row."""
    groups = bins.stratum * 10 + bins.bin
    return np.isin(groups, groups[is_kept]).sum()


def test_every_class_has_a_row_though_others_go_last(rows):
    strata = rows[1]
    aum = np.where(strata == 2, -1, 1).astype(np.float32)
    marks = Marks(aum=aum)
    request = ask(method="random", dynamics="d.npy", noise_ratio=0.25, keep_every_class=True)
    order = order_by_method(one_bin(strata), request, None, marks)
    assert (order[strata == 2] < 3).sum() == 1


def test_a_long_compilation_is_said(monkeypatch, capfd):
    monkeypatch.setattr(ordering, "make_bins", lambda *_: time.sleep(0.3))
    monkeypatch.setattr(ordering, "COMPILE_SECONDS", 0.05)
    ordering.compile_picks(np.dtype(np.float16))
    assert "preparing the loops of the selection" in capfd.readouterr().err
    monkeypatch.setattr(ordering, "COMPILE_SECONDS", 5.0)
    ordering.compile_picks(np.dtype(np.float16))
    assert not capfd.readouterr().err
