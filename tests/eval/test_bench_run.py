"""eval/bench.py run: cells, workers, the budget, and the machine that has only what it needs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from harness import runner
from harness.bundle import Bundle, BundleWriter
from harness.results import key_of, read_lines
from harness.runner import Choices
from harness.suite import EVAL, Job, Suite, read_suite
from harness.texts import SCHEMA, add_model
from small_gguf import small_llama

from dq_multimodal.config import InputError

CLASSES, FEATURES = 4, 16
HEAVY = {"rows": 3000, "features": 200, "draws": 60}
"""Cells of about a third of a second."""


def make(folder, *, rows=200, features=FEATURES, draws=2, has_words=False):
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
        "tasks": {
            "toy": {"kind": "image", "dataset": "toy.parquet"},
            "words": {"kind": "text", "dataset": "words.parquet"},
        },
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
    if has_words:
        add_words(writer, folder / "llama")
    about = {"kind": "image", "rows": rows, "digests": {"image": "i", "probe": "p"}}
    words = {"words": {"digests": {"text/tiny": "t"}}} if has_words else {}
    writer.finish({"tasks": {"toy": about, **words}})


def add_words(writer, model):
    """Write the text task `words`: 12 rows of 9 tokens, and a tiny model."""
    small_llama().save_pretrained(model)
    add_model(writer, "tiny", str(model))
    rows = [{"ids": [*range(k, k + 8), 258], "n_prompt": 3} for k in range(12)]
    for name in ("train/tiny", "test/tiny/held out"):
        writer.add_table(f"words/{name}", pa.Table.from_pylist(rows, SCHEMA))
    line = {"selection": "random", "keep": "0.2", "draw": 0, "rows": [0, 3, 5], "weights": None}
    line |= {"keep_ratio": 0.25, "options": "{}", "rows_digest": "w", "bytes": None}
    line |= {"selection_seconds": 1.0, "proxy_seconds": 2.0}
    writer.add_table("words/selections", pa.Table.from_pylist([line]))


def change(folder, **changes):
    """Change keys of toy.yaml."""
    suite = yaml.safe_load((folder / "toy.yaml").read_text())
    for key, value in changes.items():
        suite[key] = value(suite[key])
    (folder / "toy.yaml").write_text(yaml.safe_dump(suite))


def words(folder, *flags):
    named = ("--bundle", folder / "bundle", "--results", folder / "toy.jsonl", "--device", "cpu")
    return ["run", str(folder / "toy.yaml"), *map(str, (*named, *flags))]


def run(folder, *flags, **environment):
    return subprocess.run(
        [sys.executable, str(EVAL / "bench.py"), *words(folder, *flags)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def run_here(folder, **options):
    """Run in this process, with workers of its own, and give the number of failed cells."""
    results = folder / "toy.jsonl"
    return runner.run_suite(
        str(folder / "toy.yaml"), folder / "bundle", results, device="cpu", **options
    )


MISSING = """
import sys
from importlib.machinery import PathFinder

MISSING = {
    "datasets", "trl", "sentence_transformers", "jaxtyping", "typer", "pandas", "sklearn",
    "matplotlib", "lm_eval", "peft",
}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in MISSING:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.mark.slow
def test_every_cell_is_trained_once_where_only_the_trainers_packages_are(tmp_path):
    make(tmp_path, has_words=True)
    short = {"like": "small", "epochs": None, "steps": 3, "batch_size": 16}
    sft = {"like": "sft_small", "steps": 2, "batch_size": 4}
    few = {"draws": 1, "keep_ratios": [0.2], "selections": ["random"]}
    change(
        tmp_path,
        protocols=lambda found: found | {"short": short, "sft": sft},
        compare=lambda groups: [
            *groups,
            {**groups[0], **few, "protocol": "short", "nets": ["resnet10-narrow"]},
            {**few, "task": "words", "protocol": "sft", "nets": ["tiny"]},
        ],
    )
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(MISSING)
    without = {"PYTHONPATH": str(tmp_path / "without")}
    probe = [sys.executable, "-c", "import datasets"]
    assert subprocess.run(probe, env={**os.environ, **without}, capture_output=True).returncode == 1
    done = run(tmp_path, "--jobs", 2, **without)
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "toy.jsonl")
    assert len({key_of(line) for line in lines}) == len(lines) == 10
    first = lines[0]
    assert (first["suite"], first["task"], first["rows"], first["draw"]) == ("toy", "toy", 40, 0)
    assert first["seconds"].keys() == {"selection", "proxy", "setup", "training"}
    assert first["device"]["type"] == "cpu" and first["versions"]["torch"]
    quick = [line for line in lines if line["protocol"] == "quick"]
    assert all(25 < line["metrics"]["test accuracy"]["last"] <= 100 for line in quick)
    held = (tmp_path / "toy.jsonl").read_bytes()
    assert run_here(tmp_path) == 0  # there is nothing left to do
    assert (tmp_path / "toy.jsonl").read_bytes() == held
    (tmp_path / "toy.jsonl").unlink()
    assert run(tmp_path, "--jobs", 1, **without).returncode == 0
    again = {key_of(line): line["metrics"] for line in read_lines(tmp_path / "toy.jsonl")}
    assert again == {key_of(line): line["metrics"] for line in lines}


@pytest.mark.slow
def test_stopped_in_the_middle_it_goes_on(tmp_path):
    make(tmp_path, **HEAVY)
    results, n_before = tmp_path / "toy.jsonl", 0
    for sent, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        with subprocess.Popen(
            [sys.executable, str(EVAL / "bench.py"), *words(tmp_path, "--jobs", 1)],
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs ignore it
        ) as process:
            while not results.is_file() or results.read_bytes().count(b"\n") < n_before + 2:
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(sent)
            assert process.wait(120) == code
        before = read_lines(results)
        n_before = len(before)
    assert 4 <= n_before < 240
    with results.open("a") as file:
        file.write('{"suite": "toy", "ta')
    draws = max(line["draw"] for line in before) + 2
    change(tmp_path, compare=lambda groups: [{**groups[0], "draws": draws}])
    assert run(tmp_path).returncode == 0
    after = read_lines(results)
    assert after[:n_before] == before
    assert len({key_of(line) for line in after}) == len(after) == 4 * draws


@pytest.mark.slow
def test_the_budget_is_kept_and_cells_that_fit_are_trained(tmp_path):
    make(tmp_path)
    endless = {"like": "small", "epochs": None, "steps": 10_000_000, "batch_size": 16}
    long = {"protocol": "endless", "nets": ["resnet10-narrow"], "draws": 1, "keep_ratios": [0.2]}
    change(
        tmp_path,
        protocols=lambda found: found | {"endless": endless},
        compare=lambda groups: [{**groups[0], **long}, *groups],
    )
    started = time.monotonic()
    done = run(tmp_path, "--budget-minutes", 0.5, "--jobs", 1)
    assert done.returncode == 0 and "failed" not in done.stderr
    assert time.monotonic() - started < 30 + 3  # and the start of Python
    lines = read_lines(tmp_path / "toy.jsonl")
    assert {line["protocol"] for line in lines} == {"quick"} and len(lines) == 8
    assert run_here(tmp_path, budget_minutes=0.001) == 0


def test_a_worker_ends_when_its_parent_is_gone(monkeypatch):
    watch = runner.Watch(deadline=float("inf"))
    watch(0.1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(SystemExit):
        watch(0.2)


@pytest.mark.parametrize(
    ("seconds", "shares", "is_over"),
    [
        ([10, 20, 29], [0.001, 0.001, 0.002], False),  # a slow start, which says little yet
        ([31], [0.002], True),  # 31 s for 0.2 %
        ([20], [0.1], False),  # 180 s more, and 180 are left
        ([24], [0.1], True),  # 216 s more, and 176 are left: 1.23 times
        ([8, 22], [0.1, 0.101], False),  # 196 s more of 178: less than 20 % too late
        ([100], [0.5], False),
        ([150], [0.5], True),  # 150 s more of 50
        ([199, 200.5], [0.999, 0.9999], True),  # the deadline is hard
        ([50, 80], [0, 0.2], False),  # set-up took 50 s: 120 s more, and 120 are left
    ],
)
def test_a_cell_that_would_not_end_ends_itself(monkeypatch, seconds, shares, is_over):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    watch = runner.Watch(deadline=1200.0)
    for second, share in zip(seconds, shares, strict=True):
        monkeypatch.setattr(time, "time", lambda now=1000.0 + second: now)
        if is_over and second == seconds[-1]:
            with pytest.raises(runner.OverBudget):
                watch(share)
        else:
            watch(share)


def test_seconds_of_like_cells_say_whether_another_would_end():
    line = {"task": "t", "protocol": "p", "net": "n", "keep_ratio": 0.1, "rows": 100}
    line |= {"device": {"type": "cpu"}, "seconds": {"setup": 1.0, "training": 30.0}}
    crew = runner.Crew(plan(time.time() + 40), 1, [line])
    assert crew.would_end(line) and crew.would_end({**line, "net": "other"})
    assert not crew.would_end({**line, "keep_ratio": 0.2, "rows": 200})
    assert not runner.Crew(plan(time.time() + 20), 1, [line]).would_end(line)


def plan(deadline=float("inf"), device="cpu"):
    return runner.Plan(Suite("toy", "", {}, {}, {}, []), Path(), device, 1, deadline)


class FakeProcess:
    exitcode = -9

    def join(self, timeout=0): ...

    kill = join


class FakePipe:
    """A worker that answers as a test says; `most` is what it has seen run at a time."""

    def __init__(self, crew, number):
        self.crew, self.number, self.most = crew, number, 0
        self.cell: int | None = None

    def send(self, cell):
        if self.number in self.crew.dead:
            raise BrokenPipeError
        self.cell, self.most = cell, 0
        busy = [w.pipe for w in self.crew.workers if w.pipe.cell is not None]
        for pipe in busy:
            pipe.most = max(pipe.most, len(busy))

    def recv(self):
        cell, self.cell = self.cell, None
        said = self.crew.answer(cell, self.most)
        if isinstance(said, Exception):
            raise said
        return said

    def close(self): ...


class FakeCrew(runner.Crew):
    """A crew whose first worker to be hired is always the first to answer."""

    def __init__(self, n_jobs, answer, dead=()):
        super().__init__(plan(), n_jobs, [])
        self.answer, self.dead, self.hired = answer, dead, 0

    def hire(self):
        self.hired += 1
        self.workers.append(runner.Worker(FakeProcess(), FakePipe(self, self.hired)))
        return self.workers[-1]


ABOUT = dict.fromkeys(("task", "protocol", "net", "selection", "keep", "seed"), "x")
ABOUT |= {"keep_ratio": 0.1, "rows": 10}
DONE = ("done", {"seconds": {"setup": 0.0, "training": 0.0}, "device": {"type": "cpu"}})


def finish(crew, n_cells):
    """Give the cells that are done, and what is said of those that failed."""
    left: list[Any] = [(k, {**ABOUT, "draw": k}) for k in range(n_cells)]
    lines: list[dict[str, Any]] = []
    said: list[str] = []
    bar: Any = SimpleNamespace(update=lambda: None, write=lambda text, file: said.append(text))
    assert crew.work(left, lines.append, bar) == len(said)
    return sorted(line["draw"] for line in lines), said


@pytest.fixture
def in_turn(monkeypatch):
    monkeypatch.setattr(runner, "wait", lambda pipes, timeout: pipes[:1])


@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError()])
def test_a_worker_that_dies_costs_the_cell_that_it_trained(error):
    crew = FakeCrew(2, lambda cell, most: error if cell == 0 else DONE)
    done, said = finish(crew, 5)
    assert done == [1, 2, 3, 4] and crew.hired == 3
    assert len(said) == 1 and "draw 0" in said[0] and "ended with code -9" in said[0]
    idle = FakeCrew(2, lambda cell, most: DONE, dead=(1, 3))  # these die before a cell
    assert finish(idle, 5) == ([0, 1, 2, 3, 4], []) and idle.hired == 4


def test_a_process_that_cannot_begin_is_a_failed_cell():
    crew = runner.Crew(plan(), 1, [])  # whose bundle is none
    done, said = finish(crew, 1)
    assert not done and "its process ended with code 1" in said[0] and not crew.workers


@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize(("kind", "n_hired"), [("broken", 3), ("failed", 1), ("over", 1)])
def test_only_wrong_input_leaves_a_worker_as_it_was(kind, n_hired):
    crew = FakeCrew(1, lambda cell, most: (kind, "why") if cell in (1, 3) else DONE)
    done, said = finish(crew, 5)
    assert done == [0, 2, 4] and crew.hired == n_hired
    assert len(said) == (0 if kind == "over" else 2)


@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize(("n_jobs", "n_fit"), [(4, 3), (4, 2), (4, 1), (2, 1), (1, 1)])
def test_fewer_run_at_a_time_where_more_have_no_memory(n_jobs, n_fit):
    tried: list[tuple[int, int]] = []

    def answer(cell, most):
        tried.append((cell, most))
        return ("memory", "none") if most > n_fit else DONE

    crew = FakeCrew(n_jobs, answer)
    assert finish(crew, 9) == (list(range(9)), [])
    assert crew.n_jobs == n_fit
    # each number that is too many is given up at once: no cell fails twice with it
    too_many = [(cell, most) for cell, most in tried if most > n_fit]
    assert len(set(too_many)) == len(too_many) <= sum(range(n_fit + 1, n_jobs + 1))
    alone = FakeCrew(n_jobs, lambda cell, most: ("memory", "none") if cell == 2 else DONE)
    done, said = finish(alone, 5)
    assert done == [0, 1, 3, 4] and len(said) == 1 and "draw 2" in said[0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (runner.OverBudget(), "over"),
        (InputError("no net"), "failed"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (RuntimeError("CUDA error: out of memory\nmore"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "broken"),
        (ValueError("out of memory"), "broken"),
    ],
)
def test_the_kinds_of_failures(error, kind):
    found, text = runner.failure(error)
    assert found == kind and "\n" not in text


@pytest.mark.parametrize(
    ("free", "peaks", "has_room"),
    [(50, [], True), (34, [], False), (31, [20, 5], True), (29, [20, 5], False)],
)
def test_a_cell_more_has_room_beside_a_tenth(monkeypatch, free, peaks, has_room):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 100))
    of = {"device": {"type": "cuda"}}
    lines = [{**ABOUT, **of, "device": {"type": "cuda", "peak_bytes": peak}} for peak in peaks]
    other = {**ABOUT, "net": "y", "device": {"type": "cuda", "peak_bytes": 1}}
    crew = runner.Crew(plan(device="cuda"), 4, [*lines, other])
    assert crew.has_room(ABOUT)  # the first one always runs
    crew.workers.append(runner.Worker(FakeProcess(), None, cell=0))
    assert crew.has_room(ABOUT) is has_room


def test_the_key_of_a_cell_goes_by_all_that_changes_its_result(tmp_path):
    make(tmp_path)
    suite = read_suite(str(tmp_path / "toy.yaml"))
    cell, choices = suite.cells[0], Choices(Bundle(tmp_path / "bundle"))
    digests = choices.bundle.about["tasks"]["toy"]["digests"]

    def key(cell=cell):
        return key_of(runner.describe(cell, suite, choices), "cpu")

    keys = [key()]
    digests["image"] = "other"
    assert key() == keys[0]
    digests["probe"] = "other"
    keys.append(key())
    choices.of(cell)["rows_digest"] = "other"
    keys.append(key())
    choices.of(cell)["options"] = '{"method": "random", "by_class": false}'
    keys.append(key())
    suite.settings["quick"]["penalties"] = {1: 0.002}
    keys.append(key())
    suite.settings["quick"]["trainer"] = "text"
    for net in ("a", "b"):
        digests[f"text/{net}"] = net
        keys.append(key(replace(cell, net=net)))
    assert len(set(keys)) == len(keys)
    assert runner.describe(replace(cell, net="b"), suite, choices)["data"] == "b"
    with pytest.raises(InputError, match="of another version: prepare it anew"):
        key(replace(cell, net="c"))
    choices.bundle.about["tasks"] = {"toy": {"digest": "d"}}
    with pytest.raises(InputError, match="of another version: prepare it anew"):
        key()


def test_a_trainer_is_told_the_ratio_that_was_asked_for_and_the_use_of_weights(
    tmp_path, monkeypatch
):
    make(tmp_path)
    suite, choices = read_suite(str(tmp_path / "toy.yaml")), Choices(Bundle(tmp_path / "bundle"))
    (tmp_path / "toy.yaml").unlink()  # what is trained is what was read
    cell, listed = suite.cells[0], replace(suite.cells[0], keep="list")
    line = choices.of(cell)
    choices.lines["toy", cell.selection, "list", 0] = line
    line["keep_ratio"] = 0.2004  # of the rows that there are
    seen: list[Job] = []
    probe = runner.trainer_of("probe")
    monkeypatch.setattr(probe, "train", lambda job, *_: seen.append(job) or {"metrics": {}})
    of_run = replace(plan(), suite=suite)
    uses = (None, "loss", "sample")
    for use in uses:
        if use:
            line.update(weights=[1.0] * 40, use_weights=use)
        assert runner.describe(cell, suite, choices)["use_weights"] == (use or "none")
        assert runner.train_cell(cell, choices, of_run)["seconds"]["training"] >= 0
    runner.train_cell(listed, choices, of_run)
    assert [job.keep_ratio for job in seen] == [0.2, 0.2, 0.2, 0.2004]
    assert [job.weights is None for job in seen] == [True, False, False, False]
    assert [job.is_sampled for job in seen] == [False, False, True, True]
    assert seen[0].protocol.penalties == {1: 0.001}


def test_a_failed_cell_is_named_and_stops_no_other(tmp_path):
    make(tmp_path)
    wrong = {"protocol": "broken", "nets": ["no_such_net"], "draws": 1, "keep_ratios": [0.2]}
    change(
        tmp_path,
        protocols=lambda found: found | {"broken": {"like": "small"}},
        compare=lambda groups: [{**groups[0], **wrong}, *groups],
    )
    done = run(tmp_path, "--jobs", 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("failed: toy, ") == 2 and "no_such_net" in done.stderr
    assert len(read_lines(tmp_path / "toy.jsonl")) == 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "is no bundle"),
        (("--jobs", 0), "--jobs must be a number above 0, got 0"),
        (("--budget-minutes", "nan"), "--budget-minutes must be a number above 0"),
        (("--budget-minutes", "inf"), "got inf"),
        (("--device", "cuda"), "no bundle"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    tmp_path, monkeypatch, capsys, flags, said
):
    make(tmp_path)
    change(tmp_path, compare=lambda groups: [{**groups[0], "draws": 3}])
    for given, wanted in (((), "prepare it anew"), (flags, said)):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words(tmp_path, *given)])
        with pytest.raises(SystemExit) as stopped:
            bench.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and wanted in error
        assert error.startswith("error: ") and error.count("\n") == 1
        (tmp_path / "bundle" / "bundle.json").unlink(missing_ok=True)
