"""Picks raced in float32 and decided in float64."""

import numpy as np
import pytest

from dq_multimodal.core import graph_cut, table


def plain_picks(x, n_picks, cut):
    """The definition, from all pairs in float64."""
    pairs, picked = x @ x.T, []
    gains = cut.factor * pairs.sum(1) + cut.tilt(0) * pairs.diagonal()
    for _ in range(n_picks):
        best = max(gain for row, gain in enumerate(gains) if row not in picked)
        tied = np.flatnonzero(gains >= best - cut.tie)
        picked.append(next(int(row) for row in tied if row not in picked))
        gains -= 2 * cut.factor * pairs[picked[-1]]
        gains += (0.0 if cut.is_cosine else 2.0) * pairs.diagonal()
    return picked


def close_rows(seed, similarity):
    """Rows whose gains differ by about what float32 loses of them."""
    rng = np.random.default_rng(seed)
    noise = 10.0 ** rng.uniform(-5, -2)
    rows = rng.normal(size=12) + noise * rng.normal(size=(80, 12))
    if similarity == "cosine":
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    signs = np.where(rng.random(80) < 0.5, 1.0, -1.0)  # the mean is near zero, the norms are not
    return rows * signs[:, None]


@pytest.fixture(params=["cosine", "euclidean"])
def similarity(request):
    return request.param


def run(x, similarity, monkeypatch):
    """All rows as one table; the greedy run it belongs to, and its picks."""
    monkeypatch.setattr(table, "LEAST_RACED", 1)
    source = graph_cut.RowSource(x, None, similarity)
    cut = graph_cut.GraphCut(source, similarity)
    cut.pick(0)  # begins a run
    made = table.Table(cut, cut.numbers.copy(), cut.squares, source.take(slice(None)))
    made.pick(60, made.work_out())
    return cut, made


def test_rounding_decides_no_pick(similarity, monkeypatch):
    races, n_other = [], 0
    race = table.Table._race

    def watched(self, start, n_most):
        before = len(self.taken)
        gains = race(self, start, n_most)
        races.append((before, len(self.taken)))
        return gains

    monkeypatch.setattr(table.Table, "_race", watched)
    for seed in range(40):
        x = close_rows(seed, similarity)
        cut, made = run(x, similarity, monkeypatch)
        flat = cut.source.take(slice(None)).flat()
        wanted = plain_picks(flat, 60, cut)
        assert made.picked == wanted
        n_other += made.n_lost
    begun_anew = [before for before, after in races if before and after > before]
    assert n_other > 20, "float32 is never wrong here"
    assert len(begun_anew) > 20, "no race begins anew"


def test_errors_are_bounded_by_all_picks_made(similarity, monkeypatch):
    asked = []
    window = table.Table._window

    def watched(self, best, n_made, length):
        asked.append((np.atleast_1d(n_made), np.atleast_1d(length)))
        return window(self, best, n_made, length)

    monkeypatch.setattr(table.Table, "_window", watched)
    n_raced_anew = 0
    for seed in range(10):
        asked.clear()
        _, made = run(close_rows(seed, similarity), similarity, monkeypatch)
        norms = np.concatenate([[0.0], np.cumsum(made.norms[made.taken])])
        for n_made, length in asked:
            assert n_made[0] < len(norms)
            np.testing.assert_allclose(length[0], norms[n_made[0]], rtol=1e-12)
            np.testing.assert_array_equal(np.diff(n_made), 1)
            n_raced_anew += len(n_made) > 1 and n_made[0] > 0
    assert n_raced_anew > 5
