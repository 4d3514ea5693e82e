"""eval/bench.py run: cells, workers, the budget, and the machine that has only what it needs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from eval_scripts import EVAL, load_script

load_script("common")  # puts eval/ on the path

from harness import runner  # noqa: E402
from harness.bundle import BundleWriter  # noqa: E402
from harness.results import key_of, read_lines  # noqa: E402

CLASSES, FEATURES = 4, 16
HEAVY = {"rows": 3000, "features": 200, "draws": 60}
"""Cells of about a third of a second."""


def make(folder: Path, *, rows: int = 200, features: int = FEATURES, draws: int = 2) -> None:
    """Write toy.yaml and the bundle of a toy task: images, features, and rows drawn by chance."""
    group = {
        "task": "toy",
        "protocol": "quick",
        "nets": ["logistic regression"],
        "keep_ratios": [0.2, 0.5],
        "selections": ["random", "dq"],
        "draws": draws,
    }
    suite = {
        "decides": "Whether it works.",
        "tasks": {"toy": {"kind": "image", "dataset": "toy.parquet"}},
        "protocols": {"quick": {"trainer": "probe", "penalties": {1: 0.001}}},
        "selections": {"random": {"method": "random"}, "dq": {"method": "dq"}},
        "compare": [group],
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(suite))
    writer, rng = BundleWriter(folder / "bundle"), np.random.default_rng(0)
    lines = [
        {
            "selection": name,
            "keep": str(keep),
            "draw": draw,
            "rows": np.sort(rng.permutation(rows)[: round(keep * rows)]).tolist(),
            "weights": None,
            "keep_ratio": keep,
            "options": json.dumps({"method": name}),
            "rows_digest": f"{name}{keep}{draw}",
            "bytes": 100,
            "selection_seconds": 1.0,
            "proxy_seconds": 2.0,
        }
        for name in ("random", "dq")
        for keep in (0.2, 0.5)
        for draw in range(draws)
    ]
    writer.add_table("toy/selections", pa.Table.from_pylist(lines))
    centres = rng.normal(size=(CLASSES, features))
    for part, n in (("train", rows), ("test", 100)):
        labels = rng.integers(0, CLASSES, n)
        noisy = centres[labels] + 2 * rng.normal(size=(n, features))
        writer.add_array(f"toy/{part}/labels", labels)
        writer.add_array(f"toy/{part}/features", noisy.astype(np.float32))
        pixels = 60 * labels[:, None, None, None] + rng.integers(0, 60, (n, 8, 8, 3))
        writer.add_array(f"toy/{part}/images", pixels.astype(np.uint8))
    writer.finish(
        {"suite": "toy", "tasks": {"toy": {"kind": "image", "rows": rows, "digest": "d"}}}
    )


def command(folder: Path, *flags: object) -> list[str]:
    script, suite = str(EVAL / "bench.py"), str(folder / "toy.yaml")
    named = ("--bundle", folder / "bundle", "--results", folder / "toy.jsonl", "--device", "cpu")
    return [sys.executable, script, "run", suite, *map(str, (*named, *flags))]


def run(folder: Path, *flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *flags),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_every_cell_is_trained_once_and_twice_to_the_same_number(tmp_path: Path) -> None:
    make(tmp_path)
    done = run(tmp_path, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "toy.jsonl")
    assert len({key_of(line) for line in lines}) == len(lines) == 8
    first = lines[0]
    assert (first["suite"], first["task"], first["rows"], first["draw"]) == ("toy", "toy", 40, 0)
    assert first["seconds"].keys() == {"selection", "proxy", "setup", "training"}
    assert first["device"]["type"] == "cpu" and first["versions"]["torch"]
    assert all(25 < line["metrics"]["test accuracy"]["last"] <= 100 for line in lines)
    held = (tmp_path / "toy.jsonl").read_bytes()
    assert run(tmp_path).returncode == 0
    assert (tmp_path / "toy.jsonl").read_bytes() == held
    (tmp_path / "toy.jsonl").unlink()
    assert run(tmp_path, "--jobs", 1).returncode == 0
    again = {key_of(line): line["metrics"] for line in read_lines(tmp_path / "toy.jsonl")}
    assert again == {key_of(line): line["metrics"] for line in lines}


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_in_the_middle_it_goes_on(tmp_path: Path, sent: int, code: int) -> None:
    make(tmp_path, **HEAVY)
    results = tmp_path / "toy.jsonl"
    with subprocess.Popen(command(tmp_path, "--jobs", 1), stderr=subprocess.DEVNULL) as process:
        while not results.is_file() or results.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(sent)
        assert process.wait(30) == code
    before = read_lines(results)
    assert 2 <= len(before) < 240
    with results.open("a") as file:
        file.write('{"suite": "toy", "ta')
    make_few = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    make_few["compare"][0]["draws"] = draws = max(line["draw"] for line in before) + 2
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(make_few))
    assert run(tmp_path).returncode == 0
    after = read_lines(results)
    assert after[: len(before)] == before
    assert len({key_of(line) for line in after}) == len(after) == 4 * draws


def test_the_budget_is_kept_and_cells_that_fit_are_trained(tmp_path: Path) -> None:
    make(tmp_path)
    suite = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    endless = {"like": "small", "epochs": None, "steps": 10_000_000, "batch_size": 16}
    suite["protocols"]["endless"] = endless
    long = {**suite["compare"][0], "protocol": "endless", "nets": ["resnet10-narrow"]}
    suite["compare"] = [{**long, "draws": 1, "keep_ratios": [0.2]}, *suite["compare"]]
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(suite))
    started = time.monotonic()
    done = run(tmp_path, "--budget-minutes", 0.5, "--jobs", 1)
    assert done.returncode == 0 and "failed" not in done.stderr
    assert time.monotonic() - started < 30 + 3  # and the start of Python
    lines = read_lines(tmp_path / "toy.jsonl")
    assert {line["protocol"] for line in lines} == {"quick"} and len(lines) == 8
    assert run(tmp_path, "--budget-minutes", 0.001).returncode == 0


def test_a_worker_ends_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = runner.Watch(deadline=float("inf"))
    watch(0.1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(SystemExit):
        watch(0.2)


def test_a_cell_that_would_not_end_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    watch = runner.Watch(deadline=20.0)  # begins at 0
    watch(0.0)  # at 1: set up
    watch(0.4)  # at 7: 0.4 in 6 s, all in 15 s, ends at 16
    watch(0.45)  # at 8: ends at 16.6
    with pytest.raises(runner.OverBudget):
        watch(0.4)  # at 9: 0.4 in 8 s, all in 20 s, would end at 21


def test_seconds_of_like_cells_say_whether_another_would_end() -> None:
    line = {"task": "t", "protocol": "p", "net": "n", "keep_ratio": 0.1, "rows": 100}
    line |= {"device": {"type": "cpu"}, "seconds": {"setup": 1.0, "training": 30.0}}
    plan = runner.Plan("s", Path(), "cpu", 1, time.time() + 40)
    crew = runner.Crew(plan, 1, [line])
    assert crew.would_end(line) and crew.would_end({**line, "net": "other"})
    assert not crew.would_end({**line, "keep_ratio": 0.2, "rows": 200})
    assert not runner.Crew(
        runner.Plan("s", Path(), "cpu", 1, time.time() + 20), 1, [line]
    ).would_end(line)


def test_a_failed_cell_is_named_and_stops_no_other(tmp_path: Path) -> None:
    make(tmp_path)
    suite = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    suite["protocols"]["broken"] = {"like": "small"}
    wrong = {"protocol": "broken", "nets": ["no_such_net"], "draws": 1, "keep_ratios": [0.2]}
    suite["compare"].insert(0, {**suite["compare"][0], **wrong})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(suite))
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("failed: toy, ") == 2 and "no_such_net" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(read_lines(tmp_path / "toy.jsonl")) == 8


def test_what_cannot_be_used_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "bundle" / "bundle.json").rename(tmp_path / "kept.json")
    for done, said in (
        (run(tmp_path), "is no bundle"),
        (run(tmp_path, "--jobs", 0), "--jobs must be above 0, got 0"),
        (run(tmp_path, "--device", "cuda"), "no bundle"),
    ):
        assert done.returncode == 2 and said in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    (tmp_path / "kept.json").rename(tmp_path / "bundle" / "bundle.json")
    suite = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    suite["compare"][0]["draws"] = 3
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(suite))
    done = run(tmp_path)
    assert done.returncode == 2 and "prepare it anew" in done.stderr


MISSING = """
import sys
from importlib.machinery import PathFinder

MISSING = {
    "datasets", "trl", "sentence_transformers", "jaxtyping", "typer", "pandas", "sklearn",
    "matplotlib", "lm_eval",
}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in MISSING:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def test_it_runs_where_only_the_trainers_packages_are(tmp_path: Path) -> None:
    make(tmp_path)
    suite: dict[str, Any] = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    suite["protocols"]["short"] = {"like": "small", "epochs": None, "steps": 3, "batch_size": 16}
    suite["compare"].append(
        {**suite["compare"][0], "protocol": "short", "nets": ["resnet10-narrow"]}
    )
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(suite))
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(MISSING)
    without = {"PYTHONPATH": str(tmp_path / "without")}
    probe = [sys.executable, "-c", "import datasets"]
    assert subprocess.run(probe, env={**os.environ, **without}, capture_output=True).returncode == 1
    done = run(tmp_path, **without)
    assert done.returncode == 0, done.stderr
    assert len(read_lines(tmp_path / "toy.jsonl")) == 16
