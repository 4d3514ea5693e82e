"""The real command line in worlds of 1, 2 and 4 processes: same files, one voice, no hang."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from nasty_images import image_rows, picture, save

FILES = ("config.yaml", "embeddings.npy", "selection.parquet", "bins.parquet", "README.md")


def launch(folder, *jobs):
    """Run jobs as `launch_ranks` does; give each one's exit codes, output and errors by rank."""
    script = Path(__file__).with_name("launch_ranks.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(jobs)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for job in jobs:
        ranks = range(job["size"])
        found.append(
            [
                [(folder / f"{job['name']}.{rank}.{kind}").read_text() for rank in ranks]
                for kind in ("code", "out", "err")
            ]
        )
    return found


def job(name, size, *arguments, **more):
    given = [*map(str, arguments), "--output-dir", name]
    return {"name": name, "size": size, "arguments": ["compress", *given], **more}


def content(folder):
    subset = sorted((folder / "subset").glob("*.parquet"))
    assert subset
    found = {p.name: p.read_bytes() for p in [*(folder / name for name in FILES), *subset]}
    manifest = json.loads((folder / "manifest.json").read_text())
    return found | {key: manifest[key] for key in ("notes", "problems", "rows", "kept", "labels")}


def error_lines(texts):
    lines = [line for text in texts for line in text.replace("\r", "\n").splitlines()]
    assert not [line for line in lines if "Traceback" in line], "\n".join(texts)
    return [line for line in lines if line.startswith(("error: ", "interrupted: "))]


@pytest.fixture(scope="module")
def data(tmp_path_factory, small_encoder, small_classifier):
    """Texts in unequal strata, images with odd files, and the common flags of each."""
    folder = tmp_path_factory.mktemp("data")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [" ".join(words[k % 9 - 9 :: 1 + k % 3] * (1 + k * 7 % 5)) for k in range(260)]
    rows = {"text": texts, "label": ["many" if k % 2 else f"few {k % 5}" for k in range(260)]}
    Dataset.from_dict(rows).to_parquet(folder / "text.parquet")
    files = [save(picture((16, 16), seed=k), "PNG" if k % 4 else "GIF") for k in range(90)]
    files = [file if k % 7 else b"" for k, file in enumerate(files)]
    image_rows(files).to_parquet(folder / "images.parquet")
    text = (folder / "text.parquet", "--embedding-model", small_encoder, "--batch-size", 8)
    image = (folder / "images.parquet", "--embedding-model", small_classifier, "--batch-size", 8)
    return (*text, "--no-report"), (*image, "--no-report")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """What worlds of 1, 2 and 4 make of both."""
    folder = tmp_path_factory.mktemp("runs")
    text, image = data
    adq = (*text, "--label-column", "label", "--score-rows", 9, "--n-bins", 6)
    given = (text[0], "--ready-embeddings", "adq1/embeddings.npy", "--method", "adq", "--n-bins", 4)
    given = (*given, *text[1:5], "--score-rows", 9, "--no-report")
    jobs = [job(f"adq{size}", size, *adq, "--json") for size in (1, 4)]
    jobs += [job(f"image{size}", size, *image, "--n-bins", 3) for size in (1, 2)]
    jobs += [job(f"given{size}", size, *given) for size in (1, 2)]
    return folder, dict(zip([j["name"] for j in jobs], launch(folder, *jobs), strict=True))


@pytest.mark.parametrize(
    ("name", "alone"), [("adq4", "adq1"), ("image2", "image1"), ("given2", "given1")]
)
def test_any_number_of_processes_makes_the_same_run(runs, name, alone):
    folder, said = runs
    codes, outputs, errors = said[name]
    assert set(codes) == {"0"}, errors
    assert content(folder / name) == content(folder / alone)
    assert not any(outputs[1:]), "only rank 0 speaks"
    assert outputs[0]
    left = {path.name for path in (folder / name).iterdir()}
    assert left == {path.name for path in (folder / alone).iterdir()}


def test_the_runs_are_no_empty_ones(runs):
    folder, said = runs
    document = json.loads(said["adq4"][1][0])
    assert (document["rows"], document["complete"]) == (260, True)
    assert len(content(folder / "adq1")["labels"]) == 6
    problems = content(folder / "image2")["problems"]
    assert len(problems) > 1
    assert sum(problem["count"] for problem in problems.values()) > 20


def test_bad_input_is_one_line_and_exit_code_2_everywhere(tmp_path, data):
    text, _ = data
    bad = [
        (job("column", 2, *text, "--label-column", "z"), "no column z: the dataset has text"),
        (job("ratio", 2, *text, "--keep-ratio", "3"), r"keep_ratio must lie in \(0, 1\], got 3"),
        (job("model", 2, text[0], "--embedding-model", "gone/model"), "is not in its cache"),
    ]
    started = time.monotonic()
    for (codes, outputs, errors), (_, message) in zip(
        launch(tmp_path, *(job for job, _ in bad)), bad, strict=True
    ):
        assert set(codes) == {"2"}, errors
        assert not any(outputs)
        lines = error_lines(errors)
        assert len(lines) == 1, lines
        assert re.search(message, lines[0])
    assert time.monotonic() - started < 120


@pytest.fixture
def long_data(tmp_path):
    """data.parquet with 200 batches of 4 texts; gives the flags."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [" ".join(words[: 1 + k % 9] * (1 + k % 4)) for k in range(800)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data.parquet")

    def flags(encoder):
        given = ("data.parquet", "--embedding-model", encoder, "--batch-size", 4)
        return (*given, "--method", "dq", "--no-report")

    return flags


def test_an_interrupt_of_one_ends_all(tmp_path, long_data, small_encoder):
    flags = long_data(small_encoder)
    [(codes, outputs, errors)] = launch(
        tmp_path, job("run", 2, *flags, signal=[0, "run/embeddings.npy.partial", signal.SIGINT])
    )
    assert codes == ["130", "130"], errors
    assert not any(outputs)
    assert len(error_lines(errors)) == 1
    assert "the same command goes on where it stopped" in "".join(errors)


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_the_next_one_goes_on(tmp_path, long_data, small_encoder):
    """Under the launcher of torch, which is told nothing but the number of processes."""
    flags = [*map(str, long_data(small_encoder))]
    saving = "from dq_multimodal import cli\nfrom dq_multimodal.distributed import world\n"
    saving += "from dq_multimodal.stages import embedding\n"
    saving += "embedding.SAVE_SECONDS, world.LEAVE_SECONDS = 0.2, 1.0\ncli.main()\n"
    (tmp_path / "often.py").write_text(saving)
    command = ["often.py", "compress", *flags, "--output-dir", "run"]
    launched = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *command],
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    progress = tmp_path / "run" / "embeddings.progress.json"
    while launched.poll() is None and not progress.exists():
        time.sleep(0.02)
    assert launched.poll() is None, launched.stderr.read()
    os.kill(second_rank(launched.pid), signal.SIGKILL)
    output, errors = launched.communicate(timeout=100)
    assert launched.returncode != 0
    assert output == ""
    lines = [line for line in errors.replace("\r", "\n").splitlines() if "error: " in line]
    assert len([line for line in lines if "the same command goes on" in line]) == 1, errors
    n_done = sum(stop - start for start, stop in json.loads(progress.read_text())["done"])
    assert 0 < n_done < 200

    [(codes, _, errors), _] = launch(tmp_path, job("run", 1, *flags), job("whole", 2, *flags))
    assert set(codes) == {"0"}, errors
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["resumed"] == ["embeddings"]
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def second_rank(launcher):
    """Find rank 1 among the children of a launcher."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True)
    for pid in map(int, found.stdout.split()):
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError("no rank 1")
