"""The measuring scripts: references pick by the definition, documents hold what they promise."""

import argparse
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import figures
import label_noise
import measure
import numpy as np
import order_simulation
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import readme
import selection_benchmark as benchmark
import yaml
from PIL import Image

from dq_multimodal.core import make_bins, partition_rows


def start(script, monkeypatch, **flags):
    """Run a script in this process."""
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    script.main()


# --- the frame


def test_results_say_how_they_were_made_and_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "found.json"
    monkeypatch.setattr(sys, "argv", ["eval/some.py", "--work", str(tmp_path / "runs")])
    measure.save(path, {"lines": [1]})
    found = json.loads(path.read_text())
    assert found["command"] == "python eval/some.py --work runs" and found["lines"] == [1]
    assert {"commit", "device", "machine", "versions"} <= set(found)
    assert str(tmp_path) not in path.read_text()
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            measure.write(path, {"value": bad})
    assert json.loads(path.read_text()) == found and list(path.parent.iterdir()) == [path]


def test_wrong_input_is_one_line_and_exit_code_2(capsys):
    parser = measure.flags("What it does.", "some")
    for act in (lambda: parser.parse_args(["--strange"]), lambda: measure.need("nowhere/*.npy")):
        with pytest.raises(SystemExit) as stopped:
            act()
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_memory_of_some_work_is_its_own_peak():
    about, n_bytes = measure.gauge(lambda: np.ones(10_000_000).nbytes)
    assert n_bytes == 80_000_000 and 0.9 < about["memory_bytes"] / n_bytes < 1.3
    assert about["repeats"] == 5 and about["seconds"]["min"] <= about["seconds"]["median"]
    assert measure.gauge(lambda: None)[0]["memory_bytes"] < 10_000_000


def test_a_command_is_run_in_a_process_of_its_own(tmp_path):
    pq.write_table(pa.table({"text": [str(k) for k in range(20)]}), tmp_path / "d.parquet")
    asked = ("compress", tmp_path / "d.parquet", "--method", "random", "--no-report")
    done = measure.dq(*asked, output_dir=tmp_path / "run")
    assert done.found["kept"] == 4 and (tmp_path / "run" / "manifest.json").is_file()
    assert done.seconds > 0 and 0 < done.anonymous < done.resident
    with pytest.raises(SystemExit) as stopped:
        measure.dq(*asked, "--n-bins", 0)
    assert stopped.value.code == 2


def test_the_script_that_measures_memory_is_small():
    code = "import plan_accuracy, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=measure.ROOT / "eval", check=True)


# --- selection


def make_rows(n, d=6, seed=0):
    """Rows with duplicates and one of zeros."""
    rows = np.random.default_rng(seed).normal(size=(n, d)) + 0.5
    rows[n // 2 : n // 2 + n // 8] = rows[: n // 8]
    rows[3] = 0
    return rows.astype(np.float32)


def picks_of(method, rows, kind="bins"):
    return benchmark.METHODS[kind][method](rows, None, "cosine")


@pytest.mark.parametrize("method", ["n-by-n", "closed form"])
@pytest.mark.parametrize("n", [10, 53, 300])
def test_references_pick_what_make_bins_picks(method, n):
    rows, own = make_rows(n), make_bins(make_rows(n), 10)
    np.testing.assert_array_equal(picks_of(method, rows), np.stack([own.bin, own.rank], axis=1))


def test_the_matrix_in_float32_nearly_does():
    rows = np.random.default_rng(1).normal(size=(200, 16))
    assert (picks_of("n-by-n, float32", rows) == picks_of("ours", rows))[:, 0].mean() > 0.95


def test_similarities_that_are_not_negative_give_the_same_picks():
    """Graph cut on the matrix that the libraries get, as they define it, by plain greedy."""

    def pick(rows, n_picks):
        matrix, picked = benchmark.similarities(rows), []
        assert matrix.min() >= 0
        for _ in range(n_picks):
            gains = matrix.sum(axis=0) - matrix.diagonal() - 2 * matrix[picked].sum(axis=0)
            gains[picked] = -np.inf
            picked.append(int(np.argmax(gains)))
        return picked

    rows = np.random.default_rng(2).normal(size=(101, 8))
    picks = benchmark.plain_greedy(rows, None, "cosine", pick=pick)
    np.testing.assert_array_equal(picks, picks_of("ours", rows))


def test_parts_are_those_of_compress(monkeypatch):
    monkeypatch.setattr("dq_multimodal.config.MAX_PART_ROWS", 150)
    rows = make_rows(400)
    own = make_bins(rows, 10, "cosine", partition_rows(rows, 3))
    picks = picks_of("ours in parts", rows)
    np.testing.assert_array_equal(picks, np.stack([own.bin, own.rank], axis=1))


def test_the_first_of_more_mixed_rows_are_the_same():
    real = make_rows(50)[4:]
    few, more = (benchmark.mix_rows(real, n, block=64) for n in (100, 150))
    np.testing.assert_array_equal(few, more[:100])
    assert len(np.unique(more, axis=0)) == 150
    np.testing.assert_allclose(np.linalg.norm(more, axis=1), 1, rtol=1e-5)


@pytest.mark.slow
def test_each_line_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    np.save(tmp_path / "alpaca_minilm_f16.npy", make_rows(300, d=8).astype(np.float16))
    monkeypatch.setenv("DQ_TEST_DATA", str(tmp_path))
    monkeypatch.setattr(measure, "DATA", tmp_path)
    monkeypatch.setattr(benchmark, "need", lambda name: None)
    output = tmp_path / "out.json"
    for kind in ("bins", "coverage"):
        monkeypatch.setitem(benchmark.SIZES, kind, (250,))
        peers = {"peers": tmp_path} if kind == "coverage" else {}
        start(benchmark, monkeypatch, kind=kind, up_to=250, output=output, **peers)
        document = json.loads(output.read_text())
        lines = {(x["method"], x["similarity"]): x for x in document["lines"]}
        assert len(lines) == len(document["lines"]) == (5 if kind == "bins" else 3)
        assert lines["ours", "cosine"]["cpu_seconds"] > 0
        if kind == "bins":
            assert all(lines[m, "cosine"]["as_ours"] == 1 for m in ("n-by-n", "closed form"))
        else:
            assert lines["apricot", "cosine"]["absent"].startswith("not installed: ")
        assert len(readme.selections(document).splitlines()) == 2 + (5 if kind == "bins" else 1)


def make_benchmark():
    """Lines of selection whose seconds and memory grow as powers of the rows."""
    of = {"data": "Alpaca", "similarity": "cosine", "repeats": 3}
    lines = [
        {**of, "method": "n-by-n", "rows": n, "as_ours": 1.0, "memory_bytes": 16.0 * n * n}
        | {"seconds": dict.fromkeys(("median", "min", "max"), 2e-11 * n**3), "cpu_seconds": 1.0}
        for n in (2000, 8000)
    ]
    lines += [{**line, "method": "ours", "memory_bytes": 0, "as_ours": None} for line in lines]
    lines += [{**lines[-1], "data": "mixed Alpaca", "repeats": 1}]
    lines += [{**of, "method": "apricot", "rows": 2000, "absent": "none"}]
    return {"kind": "bins", "n_bins": 10, "device": "cpu", "lines": lines}


def test_what_is_extrapolated_is_told_from_what_was_measured():
    far = {x["rows"]: x for x in benchmark.extrapolate(make_benchmark()["lines"])}
    assert sorted(far) == [26_000, 52_002]
    assert far[52_002]["seconds"] == pytest.approx(2e-11 * 52_002**3)
    assert far[52_002]["memory_bytes"] == pytest.approx(16 * 52_002**2)
    rows = readme.selections(make_benchmark()).splitlines()
    assert len(rows) == 2 + 5 + 2
    assert rows[2] == "| 2,000, Alpaca | n-by-n | 0.16 (0.16 to 0.16) | 1.00 | 64 MB | all |"
    assert rows[6].startswith("| 26,000, Alpaca | n-by-n | 352 (extrapolated) |  | 10,816 MB (ext")
    assert rows[8] == "| 8,000, mixed Alpaca | ours, cosine | 10.24 | 1.00 | 0 MB |  |"


# --- the others


def test_what_parts_lose_is_measured_and_laid_out(real_data, tmp_path):
    output = tmp_path / "loss.json"
    flags = ("--rows", 400, "--parts", 1, 3, "--seeds", 2, "--output", output)
    command = [sys.executable, "eval/partition_loss.py", *map(str, flags)]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    exact, parted, random = document["lines"]
    assert (document["rows"], document["kept"]) == (400, 80)
    assert exact["same_bin"] == exact["rank"]["jaccard"] == exact["dq"]["jaccard"] == 1
    assert parted["parts"] == 3 and 0 < parted["same_bin"] < 1
    assert 0 < parted["rank"]["jaccard"] < 1
    for line in (exact, parted, random):
        assert 0 < line["dq"]["coverage"]["mean"] < line["dq"]["coverage"]["p95"] < 1
    table = readme.partition_loss(document).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "| 1 | 400 to 400 |" in table[2] and "100 % | 100 % | 100 % |" in table[2]
    assert table[4].startswith("| random rows, no bins |")


def test_the_order_of_many_rows_is_compared_with_whole_numbers(tmp_path, monkeypatch):
    output = tmp_path / "order.json"
    flags = {"rows": 20_000, "strata": 60, "seed": 3, "output": output}
    start(order_simulation, monkeypatch, **flags)
    document = json.loads(output.read_text())
    sizes = order_simulation.draw_sizes(20_000, 60, 3)
    assert sizes.sum() == 20_000 and sizes.min() >= 1 and len(sizes) == 60
    for line, ratio in zip(document["lines"], (0.001, 0.01, 0.2), strict=True):
        kept = round(20_000 * ratio)
        assert line["ratio"] == ratio and line["kept"] == kept
        names = ("is_exact_number", "is_exact_order", "holds_the_smaller", "places_agree")
        assert all(line[name] for name in names)
        order = sorted((-Fraction(n, 2 * j + 1), c) for c, n in enumerate(sizes.tolist())
                       for j in range(n))  # fmt: skip
        counts = np.bincount([c for _, c in order[:kept]], minlength=60)
        away = np.abs(counts - sizes * ratio).max()
        np.testing.assert_allclose(line["greatest_deviation"], away, rtol=1e-9)
        other = counts.copy()  # a row of one stratum in place of one of another
        other[np.argmax(counts)] -= 1
        other[np.argmin(np.where(counts < sizes, counts, 10**6))] += 1
        assert not order_simulation.compare_exactly(sizes, other)["is_exact_order"]
    assert len(readme.orders(document).splitlines()) == 5


def test_wrongly_labelled_rows_of_low_margin_are_left_out(tmp_path, monkeypatch):
    n_rows, n_classes, n_wrong = 400, 4, 40
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(n_classes, 8))
    true, tests = rng.integers(0, n_classes, n_rows), rng.integers(0, n_classes, 100)
    given = true.copy()
    given[:n_wrong] = (true[:n_wrong] + 1) % n_classes
    for name, labels in (("train", true), ("test", tests)):
        values = centres[labels] + rng.normal(size=(len(labels), 8))
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    (tmp_path / "cifar10").mkdir()
    pq.write_table(pa.table({"label": tests}), tmp_path / "cifar10" / "test-0.parquet")
    own = np.where(given == true, 0.8, 0.1) + rng.uniform(-0.05, 0.05, (5, n_rows))
    other = (1 - own) / 2
    dynamics = np.stack([own, other, np.sqrt((1 - own) ** 2 + 2 * other**2)], axis=2)
    monkeypatch.setattr(label_noise, "DATA", tmp_path)
    names = {"embeddings": tmp_path / "train.npy", "test_embeddings": tmp_path / "test.npy"}
    args = argparse.Namespace(**names, draws=3)
    lines = label_noise.compare(args, dynamics.astype(np.float16), given, true)
    found = {(x["selection"], x["noise_ratio"], x["keep_ratio"]): x for x in lines}
    assert len(found) == 4 * len(label_noise.NOISE_RATIOS) * len(label_noise.KEEP_RATIOS)
    for name in ("random", "coverage", "coverage, cad", "ccs"):
        assert all(found[name, 0.1, keep]["wrong"] == 0 for keep in label_noise.KEEP_RATIOS)
        assert found[name, 0.0, 0.5]["wrong"] > 0.05
    assert found["random", 0.0, 0.5]["wrong"] == pytest.approx(n_wrong / n_rows, abs=0.03)
    assert found["random", 0.1, 0.1]["accuracy"] > 60
    assert "accuracy" not in found["random", 0.1, 0.5]
    assert found["random", 0.0, 0.5]["draws"] == 3 and found["coverage", 0.0, 0.5]["draws"] == 1


# --- figures


def make_results(folder):
    folder.mkdir()
    scores = {key: [[1, 2, 3], [2, 2, 2]] for key in ("representativeness", "diversity")}
    one = {"seeds": [0, 4], "scores": scores | {"importance": [[0.5, 0.1, 2.0], [1, 2, 0]]}}
    one["costs"] = [{"model": "model"}]
    (folder / "adq_scores.json").write_text(json.dumps({"sets": {"alpaca": one, "cifar10": one}}))
    (folder / "selection_benchmark.json").write_text(json.dumps(make_benchmark()))
    return folder


def make_run(folder, labels, n=60):
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "embeddings.npy", rng.normal(size=(n, 4)).astype(np.float32))
    columns = {
        "row": np.arange(n),
        "stratum": np.arange(n, dtype=np.int32) % len(labels),
        "bin": np.arange(n, dtype=np.int32) % 5,
        "kept": rng.permutation(n) < n // 10,
    }
    pq.write_table(pa.table(columns), folder / "selection.parquet")
    request = {"similarity": "cosine", "keep_ratio": 0.1, "method": "adq", "seed": 0}
    config = {"request": request, "embedding": {"model": "some/encoder"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_every_figure_and_the_same_bytes_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = make_results(tmp_path / "results")
    pictures = make_run(tmp_path / "pictures", ["cat", "dog"])
    text = make_run(tmp_path / "text", [""])
    runs = ["--run", f"cifar10={pictures}", "--run", f"alpaca={text}", "--results", str(results)]
    made = []
    for name in ("a", "b"):
        words = ["figures.py", *runs, "--output_dir", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", words)
        figures.main()
        made.append({path.stem: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert sorted(made[0]) == ["bins_alpaca", "bins_cifar10", "scores", "selection"]
    assert made[0] == made[1]
    for name, content in made[0].items():
        assert len(content) < 150_000, name
        assert Image.open(tmp_path / "a" / f"{name}.png").width == 1200, name
    assert capsys.readouterr().err == ""
    (results / "adq_scores.json").unlink()
    start(figures, monkeypatch, results=results, output_dir=tmp_path / "c")
    assert [path.stem for path in (tmp_path / "c").iterdir()] == ["selection"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("scores.png: no ") and "by `python eval/adq_scores.py`" in first
    assert second.startswith("bins_NAME.png: no --run")
    with pytest.raises(SystemExit) as stopped:
        start(figures, monkeypatch, run=f"alpaca={Path('none')}")
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
