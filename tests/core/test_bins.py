"""make_bins against the written-out definition."""

import os
import subprocess
import sys
import tracemalloc
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal import InputError
from dq_multimodal.core import bins, graph_cut, make_bins, rows


def naive_bins(x, n_bins, similarity):
    """The definition: gains from all pairs, in float64, with the tie rule."""
    x = np.asarray(x, dtype=np.float64)
    n = len(x)
    if similarity == "cosine":
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
        pairs = x @ x.T
    else:
        pairs = ((x[:, None] - x[None]) ** 2).sum(-1)
    sizes = [len(part) for part in np.array_split(np.arange(n), n_bins)]
    left = list(range(n))
    bins, ranks, all_gains = np.full(n, -1), np.full(n, -1), np.full(n, np.nan)
    for b, size in enumerate(sizes):
        pool, picked = list(left), []
        scale = len(pool) if similarity == "cosine" else ((x[pool] - x[pool].mean(0)) ** 2).sum()
        for rank in range(size):
            gains = []
            for row in left:
                if similarity == "cosine":
                    gain = pairs[row, pool].sum() - 2 * pairs[row, picked].sum()
                else:
                    rest = [p for p in pool if p not in picked]
                    gain = pairs[row, picked].sum() - pairs[row, rest].sum()
                gains.append(gain)
            best = max(gains)
            at = next(k for k, gain in enumerate(gains) if gain >= best - 1e-9 * scale)
            row = left.pop(at)
            picked.append(row)
            bins[row], ranks[row], all_gains[row] = b, rank, gains[at]
    return bins, ranks, all_gains


def assert_is_definition(x, n_bins, similarity, wanted=None):
    wanted_bin, wanted_rank, wanted_gain = wanted or naive_bins(x, n_bins, similarity)
    got = make_bins(x, n_bins, similarity)
    np.testing.assert_array_equal(got.bin, wanted_bin)
    np.testing.assert_array_equal(got.rank, wanted_rank)
    size = np.abs(wanted_gain).max() + 1e-300
    np.testing.assert_allclose(got.gain / size, wanted_gain / size, atol=1e-7)


@cache
def awkward_inputs():
    rng = np.random.default_rng(5)
    base = rng.normal(size=(40, 6)).astype(np.float32)
    return {
        "random": base,
        "offset": base + 100,
        "duplicated": np.repeat(base[:10], 4, axis=0),
        "constant": np.ones((30, 4), dtype=np.float32),
        "zeros": np.zeros((20, 3), dtype=np.float32),
        "some zeros": np.where(np.arange(40)[:, None] % 3 == 0, 0, base).astype(np.float32),
        "one row": base[:1],
        "two rows": base[:2],
        "one dimension": base[:, :1],
        "one-hot ties": np.eye(5, dtype=np.float32)[np.arange(40) % 5],
        "signs": rng.integers(-1, 2, size=(40, 3)).astype(np.float32),
        "grid": np.stack(np.meshgrid(range(6), range(6)), -1).reshape(-1, 2).astype(np.float32),
        "huge": base * np.float32(1e30),
        "tiny": base * np.float32(1e-30),
        "outlier": np.concatenate([base, 1e3 * base[:1]]),
        "half": base.astype(np.float16),
        "double": base.astype(np.float64) * 1e150,
        "lengths": base * np.exp(4 * rng.normal(size=(40, 1))).astype(np.float32),
        "parallel": np.outer(np.exp(rng.normal(size=40)), base[0]),
        "nearly equal": base[np.arange(40) % 3].astype(np.float64) + 1e-9 * base,
        "far from zero": base.astype(np.float64) + 1e6,
        "too small for float32": np.concatenate(
            [base[:3], -base[:3], 1e-21 * base[:20]], dtype=float
        ),
    }


@cache
def naive_bins_of(name, n_bins, similarity):
    return naive_bins(awkward_inputs()[name], n_bins, similarity)


SIZES = {
    "as they are": {},
    "small pools": {"POOL_ROWS": 4, "FIRST_ROWS": 3},
    "tiny pools": {"POOL_ROWS": 1, "FIRST_ROWS": 1, "MAX_ROWS": 2, "MIN_ROWS": 1}
    | {"PRODUCT_COST": 100.0},
    "read in place": {"POOL_ROWS": 3, "HELD_BYTES": 0, "POOL_BYTES": 4 * 12, "MAX_PAUSE": 16},
    "little room": {"POOL_ROWS": 5, "HELD_BYTES": 4 * 36, "ROOM_BYTES": 4 * 120},
    "one product at a time": {"POOL_ROWS": 100, "ROOM_BYTES": 4 * 42},
    "few knots": {"POOL_ROWS": 4, "MAX_KNOTS": 2, "PRODUCT_COST": 100.0},
    "no pool pays": {"POOL_ROWS": 4, "PRODUCT_COST": 0.0, "MIN_OPEN": 1.0},
}


def set_sizes(monkeypatch, sizes):
    for name, value in sizes.items():
        found = [module for module in (graph_cut, rows, bins) if hasattr(module, name)]
        assert found, name
        for module in found:
            monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", awkward_inputs())
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_definition(name, similarity, sizes, monkeypatch):
    set_sizes(monkeypatch, SIZES[sizes])
    x = awkward_inputs()[name]
    for n_bins in {min(k, len(x)) for k in ((1, 7) if SIZES[sizes] else (1, 3, 10, 99))}:
        wanted = naive_bins_of(name, n_bins, similarity)
        assert_is_definition(x, n_bins, similarity, wanted)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=24),
    n_bins=st.integers(1, 6),
    similarity=st.sampled_from(["cosine", "euclidean"]),
)
def test_equals_the_definition_on_ties(values, n_bins, similarity):
    x = np.array(values, dtype=np.float32)
    assert_is_definition(x, min(n_bins, len(x)), similarity)


def closed_form_greedy(x, n_bins, similarity):
    """The same greedy with running sums: every gain anew at every pick, in float64."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if similarity == "cosine" else x - x.mean(0)
    squares = (x**2).sum(1)
    bins, ranks, left = np.zeros(len(x), int), np.zeros(len(x), int), np.arange(len(x))
    for b in range(n_bins):
        size, total, n_left = -(-len(left) // (n_bins - b)), x[left].sum(0), len(left)
        scale = n_left if similarity == "cosine" else squares[left].sum() - total @ total / n_left
        picked = np.zeros(x.shape[1])
        for rank in range(size):
            if similarity == "cosine":
                gains = x[left] @ (total - 2 * picked)
            else:
                gains = 2 * x[left] @ (total - 2 * picked) + (2 * rank - n_left) * squares[left]
            at = int(np.argmax(gains >= gains.max() - 1e-9 * scale))
            bins[left[at]], ranks[left[at]] = b, rank
            picked += x[left[at]]
            left = np.delete(left, at)
    return bins, ranks


def many_rows(shift):
    return (np.random.default_rng(0).normal(size=(2500, 24)) + shift).astype(np.float32)


def uneven_rows():
    """Rows of unequal lengths, some of them twice: picks are undone when others turn out better."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(900, 24)) * np.exp(0.5 * rng.normal(size=(900, 1)))
    return np.concatenate([x, x[:200]]).astype(np.float32)


MANY = {
    f"{shift}, {held} held": (
        many_rows(shift),
        {"POOL_ROWS": 40, "HELD_BYTES": 96 * held, "POOL_BYTES": 96 * 300, "ROOM_BYTES": 2**20},
    )
    for shift in (0.0, 0.5)
    for held in (0, 700, 2500)
}
MANY["uneven"] = (uneven_rows(), {"POOL_ROWS": 8, "PRODUCT_COST": 100.0, "ROOM_BYTES": 2**19})
MANY["scanned"] = (many_rows(0.0)[:2000, :20].astype(np.float16), {"ROOM_BYTES": 2**19})


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", MANY)
def test_thousands_of_rows_are_picked_as_by_the_plain_greedy(similarity, name, monkeypatch):
    x, sizes = MANY[name]
    set_sizes(monkeypatch, sizes)
    got = make_bins(x, 5, similarity)
    wanted_bin, wanted_rank = closed_form_greedy(x.astype(np.float64), 5, similarity)
    np.testing.assert_array_equal(got.bin, wanted_bin)
    np.testing.assert_array_equal(got.rank, wanted_rank)


@pytest.mark.parametrize("name", ["uneven", "scanned"])
def test_of_these_rows_picks_are_undone_and_rows_are_scanned(name, monkeypatch):
    x, sizes = MANY[name]
    set_sizes(monkeypatch, sizes)
    greedy, n_picks = graph_cut.GraphCut(prepare(x), "cosine"), len(x) // 5
    greedy.pick(n_picks)
    assert min(pace.limit for pace in greedy.paces) < n_picks  # only an undone pick lowers it
    assert any(pool.coded[0].size for pool in greedy.pools)


def prepare(x):
    return rows.prepare_rows(x, np.arange(len(x)), "cosine")


def test_few_rows_are_multiplied(monkeypatch):
    n_rows, counts = 30_000, []
    project, multiply = graph_cut.GraphCut._project, graph_cut.GraphCut._multiply

    def watch_project(self, pool, places):
        counts.append(len(places))
        return project(self, pool, places)

    def watch_multiply(self, pool, places, products):
        counts.append(products.size)
        multiply(self, pool, places, products)

    monkeypatch.setattr(graph_cut.GraphCut, "_project", watch_project)
    monkeypatch.setattr(graph_cut.GraphCut, "_multiply", watch_multiply)
    x = (np.random.default_rng(0).normal(size=(n_rows, 48)) + 1).astype(np.float32)
    graph_cut.GraphCut(prepare(x), "cosine").pick(3000)
    assert 0 < sum(counts) < 50 * n_rows  # the plain greedy multiplies all rows 3,000 times


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_float16_is_read_as_numpy_reads_it(similarity):
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = bits[np.isfinite(bits)].reshape(-1, 64)
    got, want = (make_bins(x.astype(kind), 5, similarity) for kind in (np.float16, np.float64))
    np.testing.assert_array_equal(got.bin, want.bin)
    np.testing.assert_array_equal(got.rank, want.rank)
    np.testing.assert_allclose(got.gain, want.gain, rtol=1e-9, atol=1e-9 * abs(want.gain).max())


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_many_equal_rows_are_picked_by_number(similarity):
    x = np.repeat(np.random.default_rng(0).normal(size=(3, 8)), 2000, axis=0)
    got = make_bins(x, 4, similarity)
    order = np.lexsort((got.rank, got.bin))
    for k in range(3):
        own = order[order // 2000 == k]
        np.testing.assert_array_equal(own, np.sort(own))


def test_a_row_that_is_used_up_hides_no_tie():
    n = 400
    axes = iter(range(4, n + 10))
    rows = [np.eye(n + 10)[k] for k in (0, 1, 2, 2)]  # the last two are equal

    def add(axis, total):
        """Rows that lie partly along an axis, by so much in all."""
        whole, rest = divmod(total, 0.1)
        for part in [0.1] * int(whole) + [rest]:
            row = np.zeros(n + 10)
            row[axis], row[next(axes)] = part, np.sqrt(1 - part**2)
            rows.append(row)

    add(2, 4.03)  # used up by its two picks, with a gain that stays above the others'
    add(1, 1.03 - 2.2e-7)
    add(0, 1.03 - 5.2e-7)  # ties with the row before, not with the one that is used up
    rows += [np.eye(n + 10)[next(axes)] for _ in range(n - len(rows))]
    x = np.array(rows)
    got, wanted = make_bins(x, 1), closed_form_greedy(x, 1, "cosine")[1]
    np.testing.assert_array_equal(got.rank, wanted)


@pytest.mark.parametrize(("n_bins", "held"), [(1, True), (10, False)])
def test_memory_mapped_rows_are_not_copied(held, n_bins, tmp_path, monkeypatch):
    set_sizes(monkeypatch, {"HELD_BYTES": 2**23 if held else 2**20, "POOL_BYTES": 2**20})
    set_sizes(monkeypatch, {"ROOM_BYTES": 2**21, "BLOCK_ROWS": 256})
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5_000, 256)) + 1).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    make_bins(mapped[:2000], 3)  # compiles
    tracemalloc.start()
    got = make_bins(mapped, n_bins)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = bins.count_working_bytes([5_000], 256) - 2**26  # what is there for any rows
    assert said < 2**22 + (2**23 if held else 2**20) + (300 + 2 * 256) * 5_000
    assert peak < said
    np.testing.assert_array_equal(got.bin, make_bins(x, n_bins).bin)


@pytest.mark.slow  # compiles every loop with checks
def test_no_loop_reads_beyond_an_array(tmp_path):
    code = """
import numpy as np
from dq_multimodal.core import graph_cut, make_bins
graph_cut.POOL_ROWS, graph_cut.HELD_BYTES = 20, 4 * 12 * 400
x = np.random.default_rng(0).normal(size=(500, 12))
x = np.concatenate([x, x[:50]])
for kind in (np.float16, np.float32, np.float64):
    for similarity in ("cosine", "euclidean"):
        for n_left in (0, 3):
            make_bins(x.astype(kind), 3, similarity, n_left=n_left)
        graph_cut.ROOM_BYTES = 2**13  # no pairs: products of single rows, and scans
        make_bins(x.astype(kind), 3, similarity)
        graph_cut.ROOM_BYTES = 2**20
print("done")
"""
    env = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "done", done.stderr


def test_an_error_of_the_caller_ends_all_strata():
    calls = []

    def stop(n_picks):
        calls.append(n_picks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_bins(
            np.random.default_rng(0).normal(size=(4000, 4)),
            4,
            strata=np.arange(4000) % 8,
            on_picks=stop,
        )
    assert len(calls) <= 16


def test_strata_are_binned_each_on_its_own():
    rng = np.random.default_rng(1)
    x, strata = rng.normal(size=(60, 5)), rng.choice(["b", "a", "c"], size=60)
    got = make_bins(x, 4, "cosine", strata)
    for code, label in enumerate("abc"):
        members = np.flatnonzero(strata == label)
        alone = make_bins(x[members], 4)
        assert (got.stratum[members] == code).all()
        np.testing.assert_array_equal(got.bin[members], alone.bin)
        np.testing.assert_array_equal(got.rank[members], alone.rank)


def test_a_stratum_with_fewer_rows_than_bins_fills_the_first_bins():
    got = make_bins(np.eye(13), 10, strata=[0] * 3 + [1] * 10)
    assert sorted(got.bin[:3]) == [0, 1, 2]
    assert sorted(got.bin[3:]) == list(range(10))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 80), n_bins=st.integers(1, 12), seed=st.integers(0, 5))
def test_bins_partition_the_rows_larger_ones_first(n, n_bins, seed):
    n_bins = min(n, n_bins)
    got = make_bins(np.random.default_rng(seed).normal(size=(n, 3)), n_bins)
    sizes = np.bincount(got.bin, minlength=n_bins)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(sizes) <= 0).all()
    for b in range(n_bins):
        assert sorted(got.rank[got.bin == b]) == list(range(sizes[b]))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_permuting_the_rows_permutes_the_picks(similarity):
    x = np.random.default_rng(2).normal(size=(200, 6))
    shuffle = np.random.default_rng(3).permutation(200)
    straight, shuffled = make_bins(x, 5, similarity), make_bins(x[shuffle], 5, similarity)
    np.testing.assert_array_equal(straight.bin[shuffle], shuffled.bin)
    np.testing.assert_array_equal(straight.rank[shuffle], shuffled.rank)


def test_the_first_pick_is_the_row_nearest_the_mean():
    x = np.random.default_rng(4).normal(size=(500, 7)) + 3
    got = make_bins(x, 10, "euclidean")
    nearest = np.argmin(((x - x.mean(0)) ** 2).sum(1))
    assert (got.bin[nearest], got.rank[nearest]) == (0, 0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_tensors_and_arrays_give_the_same(kind):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).to(kind).requires_grad_()
    np.testing.assert_array_equal(
        make_bins(x, 5).rank, make_bins(x.detach().float().numpy(), 5).rank
    )


@pytest.mark.parametrize(
    ("embeddings", "options", "message"),
    [
        (np.ones((3, 2)), {"n_bins": 4}, "n_bins must be .* from 1 to the 3 rows, got 4"),
        (np.ones((3, 2)), {"n_bins": 0}, "n_bins must be"),
        (np.ones((3, 2)), {"strata": [0, 1]}, "one label for each of the 3 rows"),
        (np.array([[1.0], [np.nan]]), {}, "row 1 holds NaN"),
        (np.array([[np.inf], [1.0]]), {}, "row 0 holds NaN or infinity"),
        (np.ones(3), {}, "must be an"),
        (np.ones((0, 2)), {}, "must be an"),
        (np.array([["a"]]), {}, "must be an"),
    ],
)
def test_bad_input(embeddings, options, message):
    with pytest.raises(InputError, match=message):
        make_bins(embeddings, **{"n_bins": 1, **options})


def pairwise_greedy_bins(x, n_bins):
    """GraphCut as published: a matrix of all pairs of 0.5 + 0.5 cos, re-scored at every pick."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    left, bins = np.arange(len(x)), []
    for size in (len(part) for part in np.array_split(left, n_bins)):
        pairs = 0.5 + 0.5 * (x[left] @ x[left].T)
        to_all, to_picked = pairs.sum(1), np.zeros(len(left))
        is_open, picks = np.ones(len(left), dtype=bool), []
        for _ in range(size):
            gain = np.where(is_open, to_all - 2 * to_picked, -np.inf)
            best = int(np.argmax(gain))
            picks.append(best)
            is_open[best] = False
            to_picked += pairs[:, best]
        bins.append(set(left[picks].tolist()))
        left = left[is_open]
    return bins


def test_bins_of_real_embeddings_are_those_of_the_published_method(real_data):
    x = np.load(real_data / "alpaca_minilm_f16.npy", mmap_mode="r")[:3000].astype(np.float64)
    got = make_bins(x, 10)
    for b, wanted in enumerate(pairwise_greedy_bins(x, 10)):
        assert set(np.flatnonzero(got.bin == b).tolist()) == wanted
