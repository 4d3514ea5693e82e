"""kill -9 at random moments, then the same command: the same files in the end."""

import contextlib
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from forging import RUN_FILES
from nasty_images import image_rows, picture, save

from dq_multimodal import InputError, Run, compress, pipeline, verify
from dq_multimodal.folder import LOCK
from dq_multimodal.models.image import load_image_model
from dq_multimodal.models.text import load_encoder
from dq_multimodal.stages import embedding, patching

COMPARED = ("config.yaml", "embeddings.npy", "selection.parquet", "bins.parquet", "README.md")
N_ROWS = 1500
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def start(folder, name, encoder):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dq_multimodal.cli", "compress", "data.parquet"),
            *("--embedding-model", str(encoder), "--batch-size", "8", "--output-dir", name),
            *("--score-rows", "50", "--no-report"),
        ],
        cwd=folder,
        # a job in the background of a shell is born deaf to interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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


@pytest.mark.parametrize(
    "moments",
    [
        ((signal.SIGKILL, 0.3), (signal.SIGINT, 0.1)),
        pytest.param([(signal.SIGKILL, k / 6) for k in range(7)], marks=pytest.mark.slow),
        pytest.param([(signal.SIGINT, k / 3) for k in range(4)], marks=pytest.mark.slow),
    ],
    ids=["both", "kills", "interrupts"],
)
def test_a_stop_at_any_moment_then_the_same_command(tmp_path, small_encoder, moments, monkeypatch):
    """Stop by kill -9 or by an interrupt, so far into the embedding; then let it end."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(N_ROWS)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data.parquet")
    options = {"embedding_model": str(small_encoder), "batch_size": 8, "score_rows": 50}
    monkeypatch.chdir(tmp_path)
    made = compress("data.parquet", report=False, output_dir="whole", **options)
    working = made.manifest["seconds"]["embeddings"]
    wanted = content(tmp_path / "whole")

    n_stops, folder = 0, tmp_path / "run"
    for stop, moment in moments:
        process = start(tmp_path, "run", small_encoder)
        process.stderr.read(1)  # of a progress bar: it is at work
        while not (folder / "config.yaml").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moment * working)
        if process.poll() is None:
            process.send_signal(stop)
            n_stops += 1
            said = process.communicate()[1]
            if stop == signal.SIGINT and process.returncode:
                assert process.returncode == 130
                assert "the same command goes on where it stopped" in said
        if is_finished(folder):
            assert content(folder) == wanted
    assert n_stops >= 2, "no stop met a running command"
    process = start(tmp_path, "run", small_encoder)
    assert process.wait() == 0, process.stderr.read()
    assert content(folder) == wanted
    assert {path.name for path in folder.iterdir()} == RUN_FILES


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


@pytest.fixture(params=["text", "patches"])
def job(request, tmp_path, small_encoder, small_classifier, monkeypatch):
    """A small dataset and what to ask of it; the model is loaded once."""
    path = tmp_path / "data.parquet"
    if request.param == "text":
        rows = {"text": [f"the fox {k} " * (k % 9) for k in range(300)]}
        Dataset.from_dict(rows).to_parquet(path)
        encoder = load_encoder(str(small_encoder))
        monkeypatch.setattr("dq_multimodal.adapters.text.load_encoder", lambda *_: encoder)
        model = {"embedding_model": str(small_encoder), "batch_size": 40, "score_rows": 8}
        return {"dataset": str(path), "report": False, **model}
    files = [save(picture((16, 16), seed=k)) if k % 6 else b"" for k in range(40)]
    image_rows(files).to_parquet(path)
    model = load_image_model(str(small_classifier))
    monkeypatch.setattr("dq_multimodal.adapters.image.load_image_model", lambda *_: model)
    monkeypatch.setattr(patching, "BLOCK_ROWS", 6)
    options = {"embedding_model": str(small_classifier), "batch_size": 10, "n_bins": 2}
    options |= {"keep_ratio": 0.5, "drop_ratio": 0.25, "patch_coding": "webp", "method": "dq"}
    return {"dataset": str(path), "report": False, **options}


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_stop_before_any_change_of_the_folder(tmp_path, job, step, monkeypatch):
    """Stop before the k-th rename, removal or new folder, for each k; twice in a row; go on."""
    monkeypatch.setattr(embedding, "SAVE_SECONDS", 0.0)
    left = [10**9]  # changes before the stop

    def stopping(change):
        def changed(path, *args, **options):
            if tmp_path in Path(path).parents and Path(path).name != LOCK:  # at the very end
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return change(path, *args, **options)

        return changed

    for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))

    def attempt(name, n_changes, **options):
        left[0] = n_changes
        try:
            compress(**job, output_dir=tmp_path / name, **options)
        except Killed:
            assert not is_finished(tmp_path / name)
            return False
        finally:
            left[0] = 10**9
        return True

    assert attempt("whole", 10**9)
    wanted = content(tmp_path / "whole")
    for first in range(1, 100, step):
        second = 1 if first % 2 else 3
        name = f"run{first}"
        if attempt(name, first):
            assert first > 10, first
            return
        attempt(name, second)
        assert attempt(name, 10**9)
        assert content(tmp_path / name) == wanted, f"stopped at {first}, then {second}"
    pytest.fail("the run never ended")


def test_a_disk_that_is_full_at_any_moment(tmp_path, job, monkeypatch):
    """Let the k-th file that is allocated or brought to the disk find no room; then go on."""
    n_left = [10**9]

    def filling(write):
        def written(*args):
            n_left[0] -= 1
            if not n_left[0]:
                raise OSError(errno.ENOSPC, "full")
            return write(*args)

        return written

    for name in ("fsync", "posix_fallocate"):
        monkeypatch.setattr(os, name, filling(getattr(os, name)))
    compress(**job, output_dir=tmp_path / "whole")
    wanted = content(tmp_path / "whole")
    for k in range(1, 100, 3):
        n_left[0] = k
        try:
            compress(**job, output_dir=tmp_path / str(k))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert not is_finished(tmp_path / str(k))
            compress(**job, output_dir=tmp_path / str(k))
        assert content(tmp_path / str(k)) == wanted, f"full at {k}"
        if n_left[0] > 0:
            assert k > 8, k
            return
    pytest.fail("the run never ended")


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What makes a run of 3,000 rows and their embeddings, 768 kB, and what it makes."""
    monkeypatch.chdir(tmp_path)
    rows = {"text": [f"the fox {k}" for k in range(3000)]}
    Dataset.from_dict(rows).to_parquet("data.parquet")
    np.save("e.npy", np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32))
    options = {"dataset": "data.parquet", "ready_embeddings": "e.npy", "method": "dq"}
    make = partial(compress, **options, report=False)
    return make, content(make(output_dir="whole").path)


def test_a_limit_of_file_size_is_one_line(tmp_path, given):
    make, wanted = given
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, hard))
    command = [sys.executable, "-m", "dq_multimodal.cli", "compress", "data.parquet", "--no-report"]
    command += ["--ready-embeddings", "e.npy", "--method", "dq", "--output-dir", "run"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in re.split("[\r\n]", done.stderr) if "rror" in line or "Trace" in line]
    said = "error: cannot write: File too large; the same command goes on when it can"
    assert errors == [said]
    assert {path.name for path in Path("run").iterdir()} == {"config.yaml", "manifest.json"}
    assert content(make(output_dir="run").path) == wanted


def test_a_folder_that_is_removed_on_the_way_is_one_line(tmp_path, given, monkeypatch):
    plain, (make, wanted) = pipeline.bin_by_method, given

    def remove(*args, **options):
        shutil.rmtree(tmp_path / "run")
        return plain(*args, **options)

    monkeypatch.setattr(pipeline, "bin_by_method", remove)
    with pytest.raises(InputError, match=r"run.* was removed while the run needed it"):
        make(output_dir="run")
    monkeypatch.setattr(pipeline, "bin_by_method", plain)
    assert content(make(output_dir="run").path) == wanted


def test_a_stop_while_another_run_is_overwritten(tmp_path, monkeypatch):
    rows = Dataset.from_dict({"text": [str(k) for k in range(50)]})
    options = {"method": "random", "report": False}
    for n_changes in range(1, 80):
        folder = tmp_path / str(n_changes)
        compress(rows, seed=1, output_dir=folder, **options)
        n_left = [n_changes]

        def unlink(path, *args, n_left=n_left, original=Path.unlink, **options):
            n_left[0] -= path.name != LOCK
            if n_left[0] < 0:
                raise Killed
            return original(path, *args, **options)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(Path, "unlink", unlink)
            compress(rows, seed=2, output_dir=folder, overwrite=True, **options)
        if n_left[0] >= 0:
            return
        with contextlib.suppress(InputError):
            assert Run(folder).request.seed == 1
        assert compress(rows, seed=2, output_dir=folder, overwrite=True, **options)
        assert {check.result for check in verify(folder)} == {"passed", "skipped"}
    pytest.fail("the run never ended")
