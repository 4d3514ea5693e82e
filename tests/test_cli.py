"""The command line: output, exit codes, one clear line for every bad input."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from datasets import Dataset

from dq_multimodal import __version__
from dq_multimodal.folder import claim_folder


@pytest.fixture
def data(tmp_path):
    """data.parquet and emb.npy in the working folder of the command."""
    rows = {"instruction": ["x"] * 40, "output": [f"{k}" for k in range(40)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    values = np.random.default_rng(0).normal(size=(40, 4))
    np.save(tmp_path / "emb.npy", values)
    (tmp_path / "corrupt.npy").write_bytes(b"not numpy")
    (tmp_path / "corrupt.parquet").write_bytes(b"PAR1 not parquet at all PAR1")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "norows.parquet")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    return tmp_path


def test_compress_resample_verify(cli, data):
    asked = ("compress", "data.parquet", "--ready-embeddings", "emb.npy", "--method", "dq")
    done = cli(*asked)
    assert "kept     8 rows (20 %) by dq, 10 bins, cosine, random draw, seed 0" in done.stdout
    assert "runs/data-dq-0.2" in done.stdout
    assert "Traceback" not in done.stderr
    assert "8 of the 40" in (data / "runs/data-dq-0.2/README.md").read_text()
    again = cli(*asked, "--json")
    document = json.loads(again.stdout)
    assert (document["rows"], document["kept"], document["complete"]) == (40, 8, True)
    drawn = cli("resample", "runs/data-dq-0.2", "--keep-ratio", "0.1", "--json")
    assert json.loads(drawn.stdout)["kept"] == 4
    checks = json.loads(cli("verify", "runs/data-dq-0.2", "--json").stdout)
    assert [check["result"] for check in checks] == ["passed"] * 5
    assert cli("verify", "runs/data-dq-0.1").stdout.count("passed") == 4


def file_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_running_again_says_so_and_writes_nothing(cli, data):
    arguments = ("compress", "data.parquet", "--method", "random")
    cli(*arguments)
    before = file_times(data / "runs")
    assert "already complete" in cli(*arguments).stdout
    assert file_times(data / "runs") == before
    refused = cli(*arguments, "--seed", "1", code=2)
    assert "holds another run (seed 0 there, 1 asked)" in refused.stderr
    cli(*arguments, "--seed", "1", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing.parquet", "no such file or folder: nothing.parquet"),
        ("no/repository", "the Hub is out of reach .* local file.* recipes/configs/demo.yaml"),
        ("data.parquet --keep-ratio 1.5", r"keep_ratio must lie in \(0, 1\], got 1.5"),
        ("data.parquet --keep-ratio 20%", r"got '20%' \(write 0.2 for 20 %\)"),
        ("data.parquet --keep-ratio 0.001 --method random", "keeps none of the 40 rows"),
        ("data.parquet --text-columns a,b", "no column a, b: the dataset has instruction, output"),
        ("data.parquet --label-column z", "no column z: the dataset has instruction, output"),
        ("data.parquet --split test", "cannot read data.parquet: Unknown split"),
        ("empty.jsonl", "empty.jsonl has no rows"),
        ("norows.parquet", "norows.parquet has no rows"),
        ("corrupt.parquet", "cannot read corrupt.parquet: Parquet"),
        ("data.parquet --ready-embeddings gone.npy", "no embeddings gone.npy"),
        (
            "data.parquet --ready-embeddings corrupt.npy",
            "corrupt.npy must be a .npy file .* got another file",
        ),
        ("data.parquet --ready-embeddings output", "column output must hold lists of numbers"),
        (
            "data.parquet --ready-embeddings emb.npy --method dq --n-bins 41",
            "most the 40 rows, got 41",
        ),
        ("data.parquet --n-bins many", "n_bins must be a whole number of at least 1, got 'many'"),
        ("data.parquet --method random --output-dir file", "the output folder file is a file"),
        ("data.parquet --method random --output-dir file/x", "cannot write to the output folder"),
        ("data.parquet --method random --output-dir /proc/x", "cannot write to the output folder"),
        ("data.parquet --method random --output-dir full", "holds other files .thesis.txt."),
        ("data.parquet --frobnicate", "no such option: --frobnicate$"),
        ("data.parquet --keep-rations=3", r"no such option: --keep-rations; .* --keep-ratio\?"),
        ("data.parquet --keep", "no such option: --keep"),
        ("data.parquet short.npy", "unexpected extra argument short.npy: put a glob in quotes"),
        ("data.parquet --split", "--split: expected one argument"),
        ("data.parquet --embedding-model gone/model", "model gone/model is not in its cache"),
        ("--drop-duplicates data.parquet --keep-ratio 2", "keep_ratio must"),
        ("data.parquet --drop-duplicates -1", "drop_duplicates must .*, got -1.0"),
        ("data.parquet --drop-duplicates -o", "no such option: -o"),
        ("", "the following arguments are required: DATASET"),
    ],
)
def test_bad_input_is_one_clear_line(cli, data, arguments, message):
    done = cli("compress", *arguments.split(), code=2)
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert not list(data.glob("runs/*"))
    assert (data / "full" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("resample gone --keep-ratio 0.1", "gone"),
        ("resample full --keep-ratio 0.1", "is not a run folder"),
        ("verify full", "is not a run folder"),
        ("push full me/x", "is not a run folder"),
        ("resample full", "is not a run folder"),
        ("unknown", "invalid choice: 'unknown' (choose from 'compress', 'condense', 'plan', "),
        ("plan data.parquet --overwrite", "no such option: --overwrite"),
        ("plan data.parquet --push-to-hub me/x", "no such option: --push-to-hub"),
        ("plan data.parquet --private", "no such option: --private"),
    ],
)
def test_bad_use_of_the_other_commands(cli, data, arguments, message):
    assert message in cli(*arguments.split(), code=2).stderr


def test_a_folder_in_use_is_left_alone(cli, data):
    asked = ("compress", "data.parquet", "--method", "random", "--output-dir", "run")
    with claim_folder(data / "run"):
        assert "another process is writing to run" in cli(*asked, code=2).stderr
        assert [path.name for path in (data / "run").iterdir()] == ["run.lock"]
    (data / "run").mkdir()
    (data / "run" / "run.lock").touch()  # of a process that was killed
    cli(*asked)
    assert not (data / "run" / "run.lock").exists()


def test_help_is_quick_and_loads_neither_torch_nor_numba():
    script = "import sys, dq_multimodal.cli as c\ntry: c.main(['compress', '--help'])\n"
    script += "except SystemExit as e: assert not e.code\n"
    script += "assert not {'torch', 'numba'} & set(sys.modules)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--keep-ratio" in done.stdout
    assert time.perf_counter() - started < 20  # hangs only; the second is a goal, not a test


def test_help_has_groups_and_hides_old_names(cli):
    found = cli("compress", "--help").stdout
    groups = ("What to read:", "How to choose:", "Models:", "Images:", "Output:")
    places = [found.index(f"\n{group}\n") for group in groups]
    assert places == sorted(places)
    assert "--ready-embeddings" in found
    for old in ("--embeddings", "--embedding "):
        assert old not in found
    assert cli("--version").stdout == f"dq-multimodal {__version__}\n"
    assert cli().stdout == cli("--help").stdout


def test_old_names_of_flags_still_work(cli, data):
    given = ("compress", "data.parquet", "--no-report", "--method", "random")
    found = cli(*given, "--embeddings", "emb.npy")
    assert found.stderr.startswith("note: embeddings is now ready_embeddings; the old name goes")
    assert "already complete" in cli(*given, "--ready-embeddings", "emb.npy").stdout


def test_options_beside_a_preset_win(cli, data):
    given = ("--preset", "adq-aaai25", "--method", "random", "--no-report", "--json")
    made = json.loads(cli("compress", "data.parquet", *given).stdout)["request"]
    assert (made["norm"], made["method"]) == ("softmax-z", "random")


def test_an_interrupt_exits_130(monkeypatch, cli):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dq_multimodal.pipeline.compress", stop)
    assert "goes on where it stopped" in cli("compress", "x", code=130).stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("compress", ", with --engine ray for several GPUs or machines"),
        ("plan", ", with --engine ray for several GPUs or machines"),
        *((other, "") for other in ("resample", "push")),
    ],
)
def test_several_processes_of_a_launcher_are_refused(cli, data, monkeypatch, name, hint):
    monkeypatch.setattr("dq_multimodal.cli.LAST_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        done = cli(name, "data.parquet", code=2)
        line = f"error: {name} was started 3 times by a launcher: start it once{hint}\n"
        assert (done.stdout, done.stderr) == ("", line if rank == "0" else "")
    assert not (data / "runs").exists()


@pytest.mark.slow
def test_torchrun_is_refused_by_one_line(data):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "dq_multimodal.cli", "compress", "data.parquet"]
    done = subprocess.run(command, cwd=data, capture_output=True, text=True)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert said == [
        "error: compress was started 2 times by a launcher: start it once, with --engine ray for "
        "several GPUs or machines"
    ]
    assert not (data / "runs").exists()


def test_one_process_of_a_launcher_works(cli, data, monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "kept     8 rows" in cli("compress", "data.parquet", "--method", "random").stdout
