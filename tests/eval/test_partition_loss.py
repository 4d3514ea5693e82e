"""eval/partition_loss.py on a few rows, and the table that README makes of it."""

import json
import subprocess
import sys
from pathlib import Path

from eval_scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


def test_measures_and_is_laid_out(real_data, tmp_path):
    output, work = tmp_path / "loss.json", tmp_path / "work"
    arguments = ("--rows", 400, "--parts", 1, 3, "--seeds", 2, "--work_dir", work)

    def run(*more):
        command = [sys.executable, "eval/partition_loss.py", *arguments, "--output", output, *more]
        return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    exact, parted, random = document["lines"]
    assert (document["rows"], document["kept"]) == (400, 80)
    assert exact["same_bin"] == exact["rank"]["jaccard"] == exact["dq"]["jaccard"] == 1
    assert parted["parts"] == 3
    assert 0 < parted["same_bin"] < 1
    assert 0 < parted["rank"]["jaccard"] < 1
    for line in (exact, parted, random):
        assert 0 < line["dq"]["coverage"]["mean"] < line["dq"]["coverage"]["p95"] < 1
    again = run()
    assert json.loads(output.read_text()) == document, again.stderr
    refused = run("--keep_ratio", "0.1")
    assert refused.returncode == 2
    assert "is of other settings" in refused.stderr

    module = load_script("readme")
    for number, line in enumerate(document["lines"]):
        line["response_loss"] = [5.0 + number, 5.5]
    table = module.partition_loss(document).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "| 1 | 400 to 400 |" in table[2]
    assert "100 % | 100 % | 100 % |" in table[2]
    assert "5.7500 ± 0.3536 (2 seeds)" in table[3]
    assert table[4].startswith("| random rows, no bins |")
