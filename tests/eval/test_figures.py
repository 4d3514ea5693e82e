"""eval/figures.py draws every figure from made results, the same bytes each time."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from eval_scripts import load_script

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("sklearn", reason="scikit-learn comes with the extra `demo`")
from PIL import Image

FIGURES = ["scores", "selection"]


script = load_script("figures")


def make_benchmark():
    of = {"method": "n-by-n", "data": "Alpaca", "similarity": "cosine", "memory_bytes": 4e6}
    far = {**of, "rows": 26_000, "seconds": 900.0}
    of |= {"repeats": 3, "agreement": {"same_bin_and_rank": 1.0}}
    lines = [
        {**of, "rows": n, "seconds": dict.fromkeys(("median", "min", "max"), n / 1e3)}
        for n in (2000, 4000)
    ]
    lines += [{**line, "method": "ours", "memory_bytes": 0, "agreement": None} for line in lines]
    lines += [{**lines[-1], "data": "mixed Alpaca"}, {**of, "rows": 2000, "absent": "none"}]
    return {"n_bins": 10, "device": "cpu", "lines": lines, "extrapolated": [far]}


def make_results(folder):
    folder.mkdir()
    scores = {key: [[1, 2, 3], [2, 2, 2]] for key in ("representativeness", "diversity")}
    scores["importance"] = [[0.5, 0.1, 2.0], [1, 2, 0]]
    one = {"rows": 30, "rows_a_bin": [5, 5], "seeds": [0, 4], "scores": scores}
    one["costs"] = [{"model": "model"}]
    documents = {
        "adq_scores": {"sets": {"alpaca": one, "cifar10": one}},
        "selection_benchmark": make_benchmark(),
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def make_run(folder, labels, n=60):
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "embeddings.npy", rng.normal(size=(n, 4)).astype(np.float32))
    order = rng.permutation(n)
    columns = {
        "row": np.arange(n),
        "stratum": np.arange(n, dtype=np.int32) % len(labels),
        "bin": np.arange(n, dtype=np.int32) % 5,
        "kept": order < n // 10,
    }
    pq.write_table(pa.table(columns), folder / "selection.parquet")
    request = {"similarity": "cosine", "keep_ratio": 0.1, "method": "adq", "seed": 0}
    config = {"request": request, "embedding": {"model": "some/encoder"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(json.dumps({"labels": labels}))
    return folder


def draw(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, flags)])
    script.main()


def test_every_figure_and_the_same_bytes_again(tmp_path, monkeypatch, capsys):
    results = make_results(tmp_path / "results")
    pictures = make_run(tmp_path / "pictures", ["cat", "dog"])
    text = make_run(tmp_path / "text", [""])
    runs = ("--run", f"cifar10={pictures}", "--run", f"alpaca={text}")
    made = []
    for name in ("a", "b"):
        draw(monkeypatch, "--results", results, "--output_dir", tmp_path / name, *runs)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert sorted(made[0]) == sorted(
        f"{name}.png" for name in [*FIGURES, "bins_cifar10", "bins_alpaca"]
    )
    assert made[0] == made[1]
    for name, content in made[0].items():
        assert len(content) < 150_000, name
        assert Image.open(tmp_path / "a" / name).width == 1200, name
    assert capsys.readouterr().err == ""


def test_missing_results_are_named_with_their_command(tmp_path, monkeypatch, capsys):
    results = make_results(tmp_path / "results")
    (results / "adq_scores.json").unlink()
    draw(monkeypatch, "--results", results, "--output_dir", tmp_path / "out")
    assert [path.stem for path in (tmp_path / "out").iterdir()] == ["selection"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("scores.png: no ")
    assert "adq_scores.json, made by `python eval/adq_scores.py`" in first
    assert second.startswith("bins_NAME.png: no --run")


def test_a_run_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        draw(monkeypatch, "--run", f"alpaca={tmp_path / 'none'}")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_tables_of_the_benchmark_tell_measured_from_extrapolated():
    readme = load_script("readme")
    rows = readme.selections(make_benchmark()).splitlines()
    assert len(rows) == 2 + 5 + 1
    assert rows[2] == "| 2,000, Alpaca | n-by-n | 2.00 (2.00 to 2.00) |  | 4 MB | all |"
    assert rows[6] == "| 26,000, Alpaca | n-by-n | 900 (extrapolated) |  | 4 MB (extrapolated) |  |"
    goal = {"work": "w", "goal": "g", "measured": "m"}
    made = readme.goals({"goals": [{**goal, "is_met": met} for met in (True, False, None)]})
    assert [row.split(" | ")[-1] for row in made.splitlines()[2:]] == ["yes |", "**no** |", " |"]
