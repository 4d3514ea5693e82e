"""What is said of the bins of many rows, against the definitions and against what they take."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dq_multimodal.config import CompressConfig
from dq_multimodal.core.bins import count_threads
from dq_multimodal.stages import bin_costs
from dq_multimodal.stages.bin_costs import BinTimes, count_working, cut_strata, time_bins

ROWS = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)


@pytest.mark.parametrize("power", [1.0, 1.4, 2.0])
def test_times_are_a_power_of_the_rows_of_each_stratum(power):
    times = BinTimes(2, [(size, 2 * (size / 2) ** power) for size in (1000, 4000)])
    sizes = np.array([9000.0, 500.0, 12.0])
    assert times.scale(sizes) == pytest.approx((sizes**power).sum())
    assert times.scale(np.array([2000.0, 2000.0])) == pytest.approx(times.seconds[-1][1])


def test_growth_is_believed_within_bounds():
    assert BinTimes(1, [(100, 3.0), (400, 1.0)]).growth == 1.0
    assert BinTimes(1, [(100, 1e-6), (400, 1.0)]).growth == 2.5
    assert BinTimes(1, [(100, 3.0)]).growth == 1.0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"method": "dq"}, [45_000, 60_000]),
        ({"method": "dq", "partition": "kmeans:3"}, [22_500, 22_500, 30_000, 30_000]),
        ({"method": "coverage"}, [15_000, 15_000, 15_000, 20_000, 20_000, 20_000]),
        ({"method": "random", "drop_duplicates": 0.9}, [52_500, 52_500]),
    ],
)
def test_strata_are_cut_as_the_methods_cut_them(options, parts):
    sizes = np.array([60_000, 0, 45_000])
    found = cut_strata(sizes, CompressConfig("d", **options))
    assert sorted(found.tolist()) == parts


@pytest.mark.parametrize("method", ["dq", "graphcut", "coverage", "blocks", "random"])
def test_trials_are_of_more_and_more_rows(monkeypatch, method):
    monkeypatch.setattr(bin_costs, "TRIAL_ROWS", (20, 50, 10_000))
    monkeypatch.setattr(bin_costs, "TRIAL_SECONDS", 1e3)
    asked = CompressConfig("d", method=method, drop_duplicates=0.9)
    found = time_bins(ROWS, np.array([100, 0, 60]), asked)
    assert [rows for rows, _ in found.seconds] == [20, 50, 160]
    assert all(seconds > 0 for _, seconds in found.seconds)
    assert found.n_strata == count_threads(2)


def test_long_bins_are_foreseen(monkeypatch):
    strata, asked = np.zeros(300, dtype=np.int64), CompressConfig("d", method="dq", n_bins=3)
    foresee = bin_costs.foresee_bins
    assert foresee(ROWS, strata, asked, 0, can_part=True) is None, "few rows"
    monkeypatch.setattr(bin_costs, "MANY_ROWS", 300)
    assert foresee(ROWS, strata, asked, 0, can_part=True) is None, "quick"
    monkeypatch.setattr(bin_costs, "LONG_SECONDS", 0.0)
    line = foresee(ROWS, strata, asked, 0, can_part=True)
    assert line.startswith("the selection will take about 0 minutes")
    assert "--partition kmeans" in line
    assert "partition" not in foresee(ROWS, strata, asked, 0, can_part=False)


MEASURE = """
import numpy as np
from dq_multimodal.core.balance import balance_rows
from dq_multimodal.core.coverage import cover_rows
from dq_multimodal.core.duplicates import find_duplicates
few = np.eye(8)
cover_rows(few), balance_rows(few), find_duplicates(few, np.arange(8), 0.9)  # loads numba

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

for shape, work in WORK:
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    eval(work)
    print(resident("VmHWM") - before)
"""
WORK = [
    ((8000, 64), "cover_rows(rows)", {"method": "coverage"}),
    ((40_000, 256), "balance_rows(rows)", {"method": "blocks"}),
    (
        (20_000, 256),
        "find_duplicates(rows, np.arange(20_000), 0.95)",
        {"method": "random", "drop_duplicates": 0.95},
    ),
]


def test_bytes_are_near_what_is_held():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not say what a process held at most")
    code = f"WORK = {[made[:2] for made in WORK]}\n{MEASURE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this process may not ask what it held at most")
    assert done.returncode == 0, done.stderr
    for (shape, work, options), held in zip(WORK, done.stdout.split(), strict=True):
        said = count_working(CompressConfig("d", **options), np.array([shape[0]]), shape[1])
        assert said / 2.5 < int(held) < said + 100e6, work
