"""Names of files and folders that are unlike others, and consoles that cannot show or take them."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from datasets import Dataset

from dq_multimodal import InputError, Run, compress
from dq_multimodal.run import output_folder
from dq_multimodal.verification import verify

NAMES = ("run:1", "bin=3", "a[b]?*#1 %41\nemo🙂'\"`", "file:/x")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """rows🙂.jsonl in the working folder."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text 🙂": f"row {k}"}, ensure_ascii=False) for k in range(40)]
    (tmp_path / "rows🙂.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "rows🙂.jsonl"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_folder_may_have_any_name(rows, name):
    compress("rows🙂.jsonl", method="random", output_dir=name, report=False)
    run = Run(name)
    assert yaml.safe_load((rows.parent / name / "config.yaml").read_text()) == run.config.as_dict()
    assert len(run.subset) == 8
    assert "failed" not in [check.result for check in verify(run)]
    assert run.resample(0.1, output_dir=f"{name} smaller").subset.num_rows == 4
    assert run.write_report().is_file()


def test_a_source_may_have_any_name(rows):
    for name in ("a:b.jsonl", "x=[1]?.jsonl", "line\nbreak.jsonl", f"{'n' * 240}.jsonl"):
        (rows.parent / name).write_bytes(rows.read_bytes())
        run = compress(name, method="random", report=False)
        front = (run.path / "README.md").read_text(encoding="utf-8").split("---\n")[1]
        assert yaml.safe_load(front)["configs"]
        assert Run(run.path).resample(0.9, output_dir="all", overwrite=True).kept.size == 36
    config = run.request
    assert len(output_folder(config).name.encode()) < 255


def test_names_that_cannot_be_used_are_refused(rows):
    for name, what in (("a::b", "::"), ("$HOME", r"\$NAME")):
        with pytest.raises(InputError, match=what):
            compress("rows🙂.jsonl", method="random", output_dir=name, report=False)
        assert not (rows.parent / name).exists()
    (rows.parent / "a::b.jsonl").write_bytes(rows.read_bytes())
    with pytest.raises(InputError, match="::"):
        compress("a::b.jsonl", method="random")


def test_the_command_line_takes_names_as_a_shell_does(cli, rows):
    env = {**os.environ, "HOME": str(rows.parent), "PYTHONIOENCODING": "latin-1"}
    asked = ("compress", "rows🙂.jsonl", "--method", "random", "--no-report")
    done = cli(*asked, "--output-dir=~/🙂:1", "--json", env=env)
    assert json.loads(done.stdout)["output_dir"] == str(rows.parent / "🙂:1")
    assert "source   rows\\U0001f642.jsonl" in cli(*asked, "--output-dir=~/🙂:1", env=env).stdout
    assert cli("verify", "~/🙂:1", env=env).stdout.count("passed ") == 4
    wrong = [("x" * 300, "File name too long"), ("caf\udce9", "must be UTF-8")]
    for name, what in [*wrong, (f"{rows.name}/\x1b[31m", r"jsonl/\x1b[31m: Not a directory")]:
        done = cli(*asked, "--output-dir", name, code=2)
        assert what in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("way", ["pipe", "closed", "full"])
def test_a_console_that_takes_nothing(cli, rows, way):
    command = [sys.executable, "-m", "dq_multimodal.cli", "compress", rows.name, "--method"]
    command += ["random", "--output-dir", "run"]
    redirect = {"pipe": "| true; exit ${PIPESTATUS[0]}", "closed": ">&- 2>&-", "full": ">/dev/full"}
    script = '"$@" ' + redirect[way]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command], cwd=rows.parent, capture_output=True, text=True
    )
    assert done.returncode == (2 if way == "full" else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(Run(rows.parent / "run").subset) == 8


def test_rows_are_not_lost_in_the_subset_of_a_nested_folder(rows):
    whole = Dataset.from_json(str(rows))
    run = compress(str(rows), method="random", keep_ratio=1.0, output_dir="a=1/b:2/c", report=False)
    assert run.subset["text 🙂"][:] == whole["text 🙂"][:]
    assert run.subset.column_names == ["text 🙂", "dq_row", "dq_bin", "dq_rank"]
