"""What memory.py says of methods, near-duplicates and targets, against what they take."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_gguf import small_llama, write_gguf
from small_language_model import write_language_model

from dq_multimodal import memory
from dq_multimodal.memory import balance_bytes, coverage_bytes, target_bytes, weight_bytes

BEGIN = """
import numpy as np
from dq_multimodal.core.balance import balance_rows
from dq_multimodal.core.coverage import cover_rows
from dq_multimodal.core.duplicates import find_duplicates
from dq_multimodal.core.target import pick_for_targets
few = np.eye(8)
cover_rows(few), balance_rows(few), pick_for_targets(few, few)  # loads numba
rng = np.random.default_rng(0)

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
"""
END = """
print(resident("VmHWM") - before)
"""


def measure(rows, work):
    """Give what some work takes at its highest, of a process of its own."""
    before = '\nopen("/proc/self/clear_refs", "w").write("5")\nbefore = resident("VmRSS")\n'
    code = f"{BEGIN}\nrows = rng.normal(size={rows}).astype(np.float32){before}{work}{END}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not say what a process held at most")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("rows", "work", "said"),
    [
        (
            (12_000, 256),
            "cover_rows(rows, np.arange(12_000) % 4)",
            lambda: coverage_bytes([3000] * 4, 256),
        ),
        ((8000, 64), "cover_rows(rows)", lambda: coverage_bytes([8000], 64)),
        ((40_000, 256), "balance_rows(rows)", lambda: balance_bytes([40_000], 256)),
        (
            (20_000, 256),
            "find_duplicates(rows, np.arange(20_000), 0.95)",
            lambda: 8 * 20_000 * 256 + memory.PASS,
        ),
        (
            (100_000, 32),
            "pick_for_targets(rows, rows[:300])",
            lambda: target_bytes(100_000, 300, 32),
        ),
    ],
    ids=["strata", "one stratum", "blocks", "duplicates", "target"],
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_is_not_above_what_was_said(monkeypatch, rows, work, said):
    monkeypatch.setattr(memory, "LOOPS", 0)
    assert said() / 2 < measure(rows, work) < 1.05 * said()


def test_coverage_grows_with_tables_rows_and_records(monkeypatch):
    monkeypatch.setattr(memory, "LOOPS", 0)
    monkeypatch.setattr(memory, "count_threads", lambda n: max(1, min(n, 2)))
    assert coverage_bytes([5000] * 10, 512) > 2 * (4 * 5000**2 + 8 * 5000 * 512)
    assert 1.6e9 < coverage_bytes([20_000] * 2, 64) < 2e9, "such tables are held one at a time"
    assert coverage_bytes([60_000], 64) < coverage_bytes([20_000], 64) + 20 * 40_000 * 12
    assert coverage_bytes([1, 0, 2], 8) > 0
    many = coverage_bytes([100] * 100_000, 8)  # the records of all rows are more than the tables
    assert many > 48 * 10**7 * 5


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_weights_of_a_language_model(tmp_path, kind):
    n_numbers = sum(weight.numel() for weight in small_llama().parameters())
    if kind == "folder":
        place = write_language_model(tmp_path / "model")
    else:
        pytest.importorskip("gguf")
        place = tmp_path / "model.gguf"
        write_gguf(small_llama(), place)
    assert weight_bytes(str(place)) == 4 * n_numbers
