"""kill -9 at random moments, then the same command: the same files in the end."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from datasets import Dataset

COMPARED = ("config.yaml", "embeddings.npy", "selection.parquet", "bins.parquet", "README.md")
N_ROWS = 3000


def start(folder, name, encoder):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dq_multimodal.cli", "compress", "data.parquet"),
            *("--embedding-model", str(encoder), "--batch-size", "8", "--output-dir", name),
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def content(folder):
    subset = sorted((folder / "subset").glob("*.parquet"))
    assert subset
    return {p.name: p.read_bytes() for p in [*(folder / name for name in COMPARED), *subset]}


def is_finished(folder):
    manifest = folder / "manifest.json"
    return manifest.exists() and '"complete": true' in manifest.read_text()


def test_kill_at_any_moment_then_the_same_command(tmp_path, small_encoder):
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(N_ROWS)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data.parquet")

    started = time.monotonic()
    whole = start(tmp_path, "whole", small_encoder)
    assert whole.wait() == 0, whole.stderr.read()
    duration = time.monotonic() - started
    wanted = content(tmp_path / "whole")

    n_kills, n_partial = 0, 0
    for name in ("a", "b"):
        for _ in range(3):
            process = start(tmp_path, name, small_encoder)
            time.sleep(rng.uniform(0.3, 1.0) * duration)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                n_kills += 1
            process.wait()
            n_partial += (tmp_path / name / "embeddings.progress.json").exists()
            assert is_finished(tmp_path / name) == (process.returncode == 0)
        process = start(tmp_path, name, small_encoder)
        assert process.wait() == 0, process.stderr.read()
        assert content(tmp_path / name) == wanted
        left = {path.name for path in (tmp_path / name).iterdir()}
        assert left == {*COMPARED, "manifest.json", "subset"}
    assert n_kills >= 2, "no kill met a running command"


def test_an_interrupt_says_how_to_go_on(tmp_path, small_encoder):
    Dataset.from_dict({"text": ["the fox"] * 20_000}).to_parquet(tmp_path / "data.parquet")
    process = start(tmp_path, "run", small_encoder)
    progress = tmp_path / "run" / "embeddings.progress.json"
    for _ in range(600):
        if progress.exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the embedding never started")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "the same command goes on where it stopped" in process.stderr.read()
    assert not is_finished(tmp_path / "run")
