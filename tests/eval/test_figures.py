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

FIGURES = ["scores", "ablation", "keep_ratio", "alpha", "trajectories", "selection"]


script = load_script("figures")


def make_line(name, ratio=0.1, alpha=None, n_seeds=3):
    values = [50 + 10 * ratio + (alpha or 0) + 0.5 * k for k in range(n_seeds)]
    half = 1.2 if n_seeds > 1 else None
    about = {"line": name, "keep_ratio": ratio, "alpha": alpha, "rows": 10, "steps": 5}
    return {**about, "values": values, "mean": float(np.mean(values)), "half_of_95": half}


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
    ablation = [make_line("random"), make_line("dq"), make_line("+ IS", alpha=0.6)]
    sweeps = [
        make_line(name, ratio, alpha, n_seeds=1 if name == "random" else 3)
        for ratio in (0.1, 0.2)
        for name, alpha in [("random", None), ("dq", None), ("+ IS", 0.6), ("+ IS", 1.0)]
    ]
    scores = {key: [[1, 2, 3], [2, 2, 2]] for key in ("representativeness", "diversity")}
    scores["importance"] = [[0.5, 0.1, 2.0], [1, 2, 0]]
    one = {"rows": 30, "rows_a_bin": [5, 5], "seeds": [0, 4], "scores": scores}
    one["costs"] = [{"model": "model"}]
    student = {
        "equal_epochs": [{"epochs": k, "distance": 1.0 / k} for k in (1, 2)],
        "equal_steps": [{"steps": 5 * k, "distance": 2.0 / k} for k in (1, 2)],
        "accuracy": 0.4,
    }
    runs = [
        {
            "seed": seed,
            "expert": {"accuracy_at_steps_of_students": 0.5},
            "students": dict.fromkeys(("High", "Medium", "Low", "Random"), student),
        }
        for seed in (0, 1)
    ]
    documents = {
        "adq_scores": {"sets": {"alpaca": one, "cifar10": one}},
        "adq_images": {"what": "test accuracy, %", "lines": ablation},
        "adq_text": {"what": "held-out response loss, nats", "lines": ablation},
        "adq_sweeps": {"what": "test accuracy, %", "lines": sweeps},
        "selection_benchmark": make_benchmark(),
        "trajectories": {"dataset": "CIFAR-10", "model": "resnet10-narrow", "runs": runs},
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
    for name in ("adq_scores", "adq_text", "adq_sweeps"):
        (results / f"{name}.json").unlink()
    draw(monkeypatch, "--results", results, "--output_dir", tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == [
        "ablation",
        "selection",
        "trajectories",
    ]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    assert said[0].startswith("scores.png: no ")
    assert "adq_scores.json, made by `python eval/adq_scores.py`" in said[0]
    assert "python eval/adq_ablation.py text" in said[1]
    assert "--output eval/results/adq_sweeps.json" in said[2]
    assert said[3].startswith("alpha.png: no ")
    assert said[4].startswith("bins_NAME.png: no --run")


def test_results_of_one_point_draw_no_line(tmp_path, monkeypatch, capsys):
    results = make_results(tmp_path / "results")
    lines = [make_line("dq"), make_line("+ IS", alpha=0.6)]
    document = {"what": "test accuracy, %", "lines": lines}
    (results / "adq_sweeps.json").write_text(json.dumps(document))
    draw(monkeypatch, "--results", results, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "alpha.png").exists()
    assert not (tmp_path / "out" / "keep_ratio.png").exists()
    assert capsys.readouterr().err.count("too few lines in adq_sweeps.json") == 2


def test_a_run_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        draw(monkeypatch, "--run", f"alpaca={tmp_path / 'none'}")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_tables_of_the_benchmark_tell_measured_from_extrapolated():
    readme = load_script("readme")
    rows = readme.selections(make_benchmark()).splitlines()
    assert len(rows) == 2 + 5 + 1
    assert rows[2] == "| 2,000, Alpaca | n-by-n | 2.00 (2.00 to 2.00) | 4 MB | all |"
    assert rows[6] == "| 26,000, Alpaca | n-by-n | 900 (extrapolated) | 4 MB (extrapolated) |  |"
    goal = {"work": "w", "goal": "g", "measured": "m"}
    made = readme.goals({"goals": [{**goal, "is_met": met} for met in (True, False, None)]})
    assert [row.split(" | ")[-1] for row in made.splitlines()[2:]] == ["yes |", "**no** |", " |"]
