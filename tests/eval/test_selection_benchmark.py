"""eval/selection_*.py: references pick by the definition, and the figures say what was met."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from eval_scripts import load_script

from dq_multimodal import config
from dq_multimodal.core import make_bins, partition_rows

EVAL = Path(__file__).resolve().parents[2] / "eval"


piece = load_script("selection_piece")
benchmark = load_script("selection_benchmark")
goals = load_script("selection_goals")


def make_rows(n, d=6, seed=0):
    """Rows with duplicates and one of zeros."""
    rows = np.random.default_rng(seed).normal(size=(n, d)) + 0.5
    rows[n // 2 : n // 2 + n // 8] = rows[: n // 8]
    rows[3] = 0
    return rows.astype(np.float32)


@pytest.mark.parametrize("method", ["n-by-n", "closed form"])
@pytest.mark.parametrize("n", [10, 53, 300])
def test_references_pick_what_make_bins_picks(method, n):
    rows = make_rows(n)
    bins, ranks = piece.plain_greedy(rows, 10, *piece.PLAIN[method])
    own = make_bins(rows, 10)
    np.testing.assert_array_equal(bins, own.bin)
    np.testing.assert_array_equal(ranks, own.rank)


def test_the_matrix_in_float32_nearly_does():
    rows = np.random.default_rng(1).normal(size=(200, 16))
    bins, _ = piece.plain_greedy(rows, 10, *piece.PLAIN["n-by-n, float32"])
    assert (bins == make_bins(rows, 10).bin).mean() > 0.95


class FakeCut:
    """Graph cut on a given matrix, as apricot and submodlib define it, by plain greedy."""

    def __init__(self, matrix):
        assert matrix.min() >= 0
        self.matrix, self.n = matrix, len(matrix)

    def pick(self, n_picks):
        picked = []
        for _ in range(n_picks):
            s = self.matrix
            gains = s.sum(axis=0) - s.diagonal() - 2 * s[picked].sum(axis=0)
            gains[picked] = -np.inf
            picked.append(int(np.argmax(gains)))
        return picked


def test_the_libraries_are_asked_for_the_same_picks(monkeypatch):
    class GraphCutSelection:
        def __init__(self, n_samples, metric, alpha, optimizer):
            assert (metric, alpha, optimizer) == ("precomputed", 1, "lazy")
            self.n_samples = n_samples

        def fit(self, matrix):
            self.ranking = np.array(FakeCut(matrix).pick(self.n_samples))
            return self

    class GraphCutFunction:
        def __init__(self, n, mode, weight, ggsijs):
            assert (n, mode, weight) == (len(ggsijs), "dense", 1.0)
            self.cut = FakeCut(ggsijs)

        def maximize(self, budget, optimizer, show_progress):
            assert budget < self.cut.n
            return [(row, 0.0) for row in self.cut.pick(budget)]

    apricot = types.SimpleNamespace(GraphCutSelection=GraphCutSelection)
    submodlib = types.SimpleNamespace(GraphCutFunction=GraphCutFunction)
    monkeypatch.setitem(sys.modules, "apricot", apricot)
    monkeypatch.setitem(sys.modules, "submodlib", submodlib)
    rows = np.random.default_rng(2).normal(size=(101, 8))
    own = make_bins(rows, 10)
    for method in ("apricot", "submodlib"):
        bins, ranks = piece.plain_greedy(rows, 10, *piece.PLAIN[method])
        np.testing.assert_array_equal(bins, own.bin)
        np.testing.assert_array_equal(ranks, own.rank)


def measure(tmp_path, **asked):
    asked = {"similarity": "cosine", "n_bins": 10, "repeats": 2, "peers": None, **asked}
    asked |= {"file": str(tmp_path / "rows.npy"), "picks": str(tmp_path / "picks.npz")}
    script = str(EVAL / "selection_piece.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(asked)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_piece_measures_its_own_seconds_memory_and_picks(tmp_path):
    n = 1200
    rows = make_rows(n, d=4)
    np.save(tmp_path / "rows.npy", rows)
    found = measure(tmp_path, method="n-by-n", rows=n)
    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0
    assert 8 * n * n < found["memory_bytes"] < 40 * n * n  # the matrix, and what it is summed in
    own = make_bins(rows, 10)
    picks = np.load(tmp_path / "picks.npz")
    np.testing.assert_array_equal(picks["bin"], own.bin)
    np.testing.assert_array_equal(picks["rank"], own.rank)
    assert measure(tmp_path, method="ours", rows=n)["memory_bytes"] < 8 * n * n


def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apricot", None)
    np.save(tmp_path / "rows.npy", make_rows(100))
    asked = {"method": "apricot", "rows": 100, "n_bins": 10, "file": tmp_path / "rows.npy"}
    assert piece.measure(asked)["absent"].startswith("not installed: ")


def test_parts_are_those_of_compress(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "MAX_PART_ROWS", 150)
    monkeypatch.setattr(piece, "count_threads", dict)
    rows = make_rows(400)
    np.save(tmp_path / "rows.npy", rows)
    asked = {"method": "ours in parts", "rows": 400, "n_bins": 5, "similarity": "cosine"}
    asked |= {"file": tmp_path / "rows.npy", "picks": tmp_path / "picks.npz", "repeats": 1}
    assert piece.measure(asked)["seconds"]
    picks = np.load(tmp_path / "picks.npz")
    own = make_bins(rows, 5, "cosine", partition_rows(rows, 3))
    np.testing.assert_array_equal(picks["bin"], own.bin)
    np.testing.assert_array_equal(picks["rank"], own.rank)


def test_the_first_of_more_mixed_rows_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(piece, "BLOCK_ROWS", 64)
    np.save(tmp_path / "real.npy", make_rows(50)[4:].astype(np.float16))
    asked = {"make": "mixed", "from": tmp_path / "real.npy", "seed": 0}
    for n in (100, 150):
        piece.make_rows({**asked, "rows": n, "file": tmp_path / f"{n}.npy"})
    few, more = np.load(tmp_path / "100.npy"), np.load(tmp_path / "150.npy")
    np.testing.assert_array_equal(few, more[:100])
    assert len(np.unique(more, axis=0)) == 150
    np.testing.assert_allclose(np.linalg.norm(more, axis=1), 1, rtol=1e-5)


def make_line(method, rows, seconds, *, data="Alpaca", same=None, memory=1e6):
    line = {"method": method, "data": data, "rows": rows, "similarity": "cosine", "repeats": 1}
    line |= {"seconds": {"median": seconds, "min": seconds, "max": seconds}}
    line["agreement"] = None if same is None else {"same_bin": 1.0, "same_bin_and_rank": same}
    return {**line, "memory_bytes": memory, "dimension": 384, "cpu_seconds": 2 * seconds}


def test_growth_is_fitted_and_what_is_extrapolated_stands_apart():
    lines = [make_line("n-by-n", n, 2e-11 * n**3, memory=16.0 * n * n) for n in (2000, 11_495)]
    lines.append({"method": "apricot", "data": "Alpaca", "rows": 2000, "absent": "not installed"})
    found = goals.summarise(lines)
    (growth,) = found["growth"]
    assert growth["seconds"]["exponent"] == 3 and growth["memory_bytes"]["exponent"] == 2
    far = {x["rows"]: x for x in found["extrapolated"]}
    assert sorted(far) == [26_000, 52_002]
    assert far[52_002]["seconds"] == pytest.approx(2e-11 * 52_002**3)
    assert far[52_002]["memory_bytes"] == pytest.approx(16 * 52_002**2)


@pytest.mark.parametrize(
    ("seconds", "same", "is_met"), [(151.0, 1.0, True), (149.0, 1.0, False), (151.0, 0.99, False)]
)
def test_a_speedup_needs_the_same_picks(seconds, same, is_met):
    lines = [make_line("ours", 11_495, 1.0), make_line("n-by-n", 11_495, seconds, same=same)]
    first, second = goals.summarise(lines)["goals"][:2]
    assert first["is_met"] is is_met
    assert second["is_met"] is None and second["measured"] == "not measured"


def test_goals_take_the_worst_figure():
    lines = [make_line("ours", 52_002, 2.0, memory=3e8)]
    sizes = (52_002, 208_008, 1_000_000)
    lines += [make_line("ours", n, 3 * (n / 52_002) ** 1.2, data="mixed Alpaca") for n in sizes]
    lines += [make_line("ours before", n, 5.0, data="mixed Alpaca") for n in sizes[:1]]
    lines += [make_line("ours before", 52_002, 3.0), make_line("ours before", 9, 0.1)]
    held = {goal["work"]: goal for goal in goals.summarise(lines)["goals"]}
    growth = held["growth from 52,002 to 1,000,000 rows"]
    assert growth["measured"] == "1.33" and growth["is_met"] is False  # from the real rows
    half = held["Alpaca, 52,002 rows: seconds of the release before"]
    assert half["measured"] == "0.67 of them" and half["is_met"] is False
    worst = held["every line: seconds of CPU of the release before"]
    assert worst["measured"] == "0.67 of them (52,002 rows, Alpaca, cosine)" and worst["is_met"]
    assert held["Alpaca, 52,002 rows: peak above the embeddings"]["measured"] == "300 MB"
    assert held["working memory of ours, every line"]["is_met"] is True
    assert held["50,000 x 512, 10 classes"]["is_met"] is None


def test_the_whole_benchmark_and_again_from_what_is_saved(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "alpaca_minilm_f16.npy", make_rows(300, d=8).astype(np.float16))
    output, work = tmp_path / "out.json", tmp_path / "work"
    flags = ["--work", str(work), "--output", str(output), "--up_to", "250", "--peers_up_to", "0"]
    monkeypatch.setattr(sys, "argv", ["selection_benchmark.py", *flags])
    monkeypatch.setattr(benchmark, "DATA", tmp_path)
    monkeypatch.setattr(benchmark, "SIZES", (250,))
    made = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            benchmark.main()
        assert stopped.value.code == 0
        made.append(json.loads(output.read_text()))
        monkeypatch.setattr(benchmark, "piece", None)  # nothing is measured again
    assert made[0] == made[1]
    assert "\n0 of 5 to measure" in capsys.readouterr().out
    lines = {(x["method"], x["similarity"]): x for x in made[0]["lines"]}
    assert len(lines) == len(made[0]["lines"]) == 5
    for method in ("n-by-n", "closed form"):
        assert lines[method, "cosine"]["agreement"] == {"same_bin": 1.0, "same_bin_and_rank": 1.0}
    assert str(tmp_path) not in output.read_text()
    assert len(made[0]["goals"]) == 12
