"""eval/partition_loss.py on a few rows, and the table that the docs make of it."""

import json
import subprocess
import sys
from pathlib import Path

from eval_scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


def test_measures_and_is_laid_out(real_data, tmp_path):
    output = tmp_path / "loss.json"
    arguments = ("--rows", 400, "--parts", 1, 3, "--seeds", 2, "--output", output)
    command = [sys.executable, "eval/partition_loss.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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

    table = load_script("readme").partition_loss(document).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "| 1 | 400 to 400 |" in table[2]
    assert "100 % | 100 % | 100 % |" in table[2]
    assert table[4].startswith("| random rows, no bins |")
