"""The command line: what it says, its exit codes, and a set that is killed on its way."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from condensed_sets import NAMES, make_rows, stand_in
from datasets import Dataset

from dq_multimodal import Condensed, InputError, verify

SMALL = ("--images-per-class", "2", "--net-width", "4", "--real-batch", "4", "--device", "cpu")


@pytest.fixture
def learner(monkeypatch):
    return stand_in(monkeypatch)


@pytest.fixture
def data(tmp_path):
    """rows.parquet and texts.parquet in the working folder of the command."""
    make_rows().to_parquet(tmp_path / "rows.parquet")
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "texts.parquet")
    return tmp_path


def test_condense_report_verify(learner, cli, data):
    asked = ("condense", "rows.parquet", "--images-per-class", 2)
    done = cli(*asked)
    made = Condensed(data / "runs/rows-dm-2")
    n_bytes, real_bytes = made.n_bytes, made.manifest.bytes.real_images
    for line in (
        "set      6 pictures, 2 of each of 3 classes, by dm, 20,000 iterations, seed 0",
        f"bytes    {real_bytes:,} -> {n_bytes:,} ({100 * n_bytes / real_bytes:.3g} %): pictures",
        "folder   runs/rows-dm-2",
        "report   runs/rows-dm-2/report.html",
        "the first m x 3 rows are a set of m a class",
    ):
        assert line in done.stdout
    code = re.search(r"load_dataset\(.*\)", done.stdout)[0]
    assert "runs/rows-dm-2/data/train-00000.parquet" in code
    again = cli(*asked)
    assert again.stdout.startswith("already complete: nothing was done\n")
    document = json.loads(cli(*asked, "--json").stdout)
    assert document["was_complete"] and document["classes"] == NAMES
    assert (document["rows"], document["real_rows"], document["n_bytes"]) == (6, 24, n_bytes)
    assert document["request"]["iterations"] == 20_000
    (made.path / "report.html").unlink()
    assert "report   runs/rows-dm-2/report.html" in cli("report", "runs/rows-dm-2").stdout
    assert "Real picture" in (made.path / "report.html").read_text()
    checks = json.loads(cli("verify", "runs/rows-dm-2", "--json").stdout)
    assert [check["result"] for check in checks] == ["passed", "passed", "skipped", *["passed"] * 2]
    (made.path / "data/train-00000.parquet").write_bytes(b"PAR1")
    done = cli("verify", "runs/rows-dm-2", code=2)
    assert "failed   rows: cannot be compared" in done.stdout
    assert "is not what it says: rows, pictures, soft labels, files" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "condense texts.parquet",
            "makes pictures, and texts.parquet has none: its columns are text; ",
        ),
        ("condense rows.parquet --method mtt", "mtt needs experts: train them"),
        ("condense rows.parquet --augment jump", "augment must be none or some of color, crop"),
        ("condense rows.parquet --images-per-classes 3", "no such option: .* --images-per-class"),
        ("condense rows.parquet --seed 1 --output-dir set", "seed 0 there, 1 asked"),
        ("condense rows.parquet --output-dir .", r"holds other files"),
        ("condense rows.parquet --images-per-class 9", "classes have fewer real ones: ant"),
        ("condense gone.parquet", "no such file or folder: gone.parquet"),
        ("resample set --keep-ratio 0.5", "set is a condensed set: smaller ones are its first ro"),
        ("report set --embeddings-of set", "--embeddings-of is for runs, and set is a condensed"),
        ("report data", "data is not a run folder"),
    ],
)
def test_bad_use_is_one_clear_line(cli, data, monkeypatch, arguments, message):
    if "--images-per-class 9" not in arguments:
        stand_in(monkeypatch)
        cli("condense", "rows.parquet", *SMALL, "--output-dir", "set", "--no-report")
    done = cli(*arguments.split(), code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stdout == "" and len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert not (data / "runs").exists()


def test_help_lists_every_option_and_loads_no_torch(cli, data):
    text = cli("condense", "--help").stdout
    for flag in ("--method dm|dc|krr|mtt", "--multisize", "--init", "--push-to-hub", "--stored-as"):
        assert flag in text
    script = "import sys; from dq_multimodal.cli import make_parser; make_parser()"
    script += "; assert not {'torch', 'datasets'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], check=True)


def start(folder, name, *prelude):
    """Run the command line in a process of its own, after some lines of Python."""
    words = ["condense", "rows.parquet", *SMALL, "--multisize", "--multisize-period", "3"]
    words += ["--iterations", "24", "--output-dir", name]
    lines = [*prelude, "from dq_multimodal import cli", f"cli.main({words!r})"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        # a job in the background of a shell is born deaf to interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )


SLOWLY = (
    "import time; from dq_multimodal.condensation import loop",
    "loop.SAVE_SECONDS = 0; write = loop._write_state",
    "loop._write_state = lambda *given: (write(*given), time.sleep(0.2))",
)
"""A state after every iteration, and time to kill between two."""


def stop(process, how, state):
    """Stop a process some iterations after it has written another state."""
    before = state.stat().st_mtime_ns if state.exists() else 0
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if state.exists() and state.stat().st_mtime_ns > before:
            break
        time.sleep(0.02)
    time.sleep(0.9)
    process.send_signal(how)


def test_a_kill_on_the_way_then_the_same_command(data):
    """A set that was interrupted, then killed, ends with the bytes of one that was not."""
    state = data / "killed" / "state.safetensors"
    killed, whole = start(data, "killed", *SLOWLY), start(data, "whole")
    stop(killed, signal.SIGINT, state)
    assert killed.wait(60) == 130
    assert "the same command goes on where it stopped" in killed.stderr.read()
    killed.stderr.close()
    killed = start(data, "killed", *SLOWLY)
    stop(killed, signal.SIGKILL, state)
    assert killed.wait(60) == -signal.SIGKILL and state.exists()
    with pytest.raises(InputError, match="has not finished"):
        Condensed(data / "killed")
    again = start(data, "killed")
    for process in (again, whole):
        assert process.wait(300) == 0, process.stderr.read()
        process.stderr.close()
    killed.stderr.close()
    made, wanted = Condensed(data / "killed"), Condensed(data / "whole")
    assert made.manifest.resumed == ["loop"] and not wanted.manifest.resumed
    assert made.manifest.digest == wanted.manifest.digest
    for path in (path for path in wanted.path.rglob("*") if path.is_file()):
        name = path.relative_to(wanted.path)
        if name.name != "manifest.json":  # tells what the work took
            assert (made.path / name).read_bytes() == path.read_bytes(), name
    assert not state.exists()
    assert {check.result for check in verify(made)} == {"passed", "skipped"}
    assert len(made.manifest.choices) == 8
