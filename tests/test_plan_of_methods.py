"""plan of coverage and blocks, near-duplicates and targets."""

import numpy as np
import pytest
from datasets import Dataset

from dq_multimodal import InputError, compress, plan, probes
from dq_multimodal.probes import time_balance, time_coverage, time_duplicates

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
ROWS = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)


@pytest.fixture
def clock(monkeypatch):
    """Work takes what a function of the number of rows says, on two cores."""
    monkeypatch.setattr(probes, "count_threads", lambda n: max(1, min(n, 2)))

    def set_cost(cost):
        monkeypatch.setattr(probes, "_clock", lambda work, rows: cost(len(rows)))

    return set_cost


def test_coverage_is_timed_by_its_growth_within_parts(clock):
    clock(lambda k: 1e-6 * k**2)
    strata = np.repeat([0, 1, 3], [6000, 3000, 1000])
    wanted = 1e-6 * (6000**2 + 3000**2 + 1000**2) / 2
    assert time_coverage(ROWS, strata) == pytest.approx(wanted)
    found = time_coverage(ROWS, np.repeat([0, 1], [34_000, 17_000]))
    assert found == pytest.approx(1e-6 * 3 * 17_000**2), "such tables are held one at a time"
    twice = time_coverage(ROWS, np.zeros(800_000, dtype=int))
    assert twice == pytest.approx(2 * time_coverage(ROWS, np.zeros(400_000, dtype=int)))
    clock(lambda k: 1.0)  # no time is lost on believing that more rows cost nothing
    assert time_coverage(ROWS, np.zeros(16_384, dtype=int)) == pytest.approx(2**1.5)


def test_trees_are_timed_by_their_levels(clock):
    clock(lambda k: 1e-6 * k * np.log2(k))
    n = 2**17
    wanted = 1e-6 * (n * 14 / 2 + n * 3)  # halves of up to 2^14 rows go side by side
    assert time_balance(ROWS, np.zeros(n, dtype=int)) == pytest.approx(wanted)
    small = time_balance(ROWS, np.repeat([0, 1, 5], [1024, 1024, 1]))
    assert small == pytest.approx(1e-6 * 1024 * 10)
    assert time_balance(ROWS, np.arange(5)) == 0


def test_duplicates_are_timed_by_their_pairs(clock):
    clock(lambda k: 1e-6 * k**2)
    assert time_duplicates(ROWS, 50_000, 0.9) == pytest.approx(1e-6 * 50_000**2)
    assert time_duplicates(ROWS, 300_000, 0.9) == pytest.approx(3 * 1e-6 * 100_000**2)
    assert time_duplicates(ROWS, 100, 0.9) == pytest.approx(1e-6 * 100**2)


def test_the_real_clock():
    strata = np.arange(300) % 3
    seconds = [time_coverage(ROWS, strata), time_balance(ROWS, strata)]
    seconds.append(time_duplicates(ROWS, 300, 0.9))
    assert all(0 < value < 30 for value in seconds)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) + f" {k}" for k in range(300)]
    Dataset.from_dict({"text": texts, "kind": ["x", "y", "z"] * 100}).to_parquet(
        folder / "texts.parquet"
    )
    Dataset.from_dict({"text": texts[:20]}).to_parquet(folder / "target.parquet")
    np.save(folder / "emb.npy", ROWS)
    return folder


@pytest.mark.parametrize("method", ["coverage", "blocks"])
def test_plan_says_what_compress_makes(monkeypatch, place, tmp_path, method):
    def refuse(*_arguments, **_options):
        raise AssertionError("these methods have no bins of GraphCut")

    monkeypatch.setattr(probes, "make_bins", refuse)
    options = {"method": method, "embeddings": str(place / "emb.npy"), "report": False}
    options |= {"label_column": "kind", "drop_duplicates": 0.95}
    said = plan(str(place / "texts.parquet"), **options)
    run = compress(str(place / "texts.parquet"), output_dir=tmp_path / "run", **options)
    assert (said["rows"], said["kept"]) == (300, run.manifest["kept"])
    size = (run.path / "selection.parquet").stat().st_size
    assert said["disk"]["selection.parquet"] == pytest.approx(size, rel=0.35)
    stages = said["memory"]["stages"]
    assert stages["duplicates"] > 8 * ROWS.size
    assert stages["selection"] > 4 * ROWS.size


def test_duplicates_and_targets_of_a_random_order_need_no_bins(monkeypatch, place):
    monkeypatch.setattr(probes, "make_bins", None)
    options = {"method": "random", "embeddings": str(place / "emb.npy"), "report": False}
    said = plan(str(place / "texts.parquet"), drop_duplicates=0.9, **options)
    assert said["seconds"]["selection"] > 0


def test_a_target_is_checked_and_what_is_not_counted_is_said(place, small_encoder):
    options = {"method": "random", "embedding_model": str(small_encoder), "report": False}
    source, target = str(place / "texts.parquet"), str(place / "target.parquet")
    said = plan(source, target=target, **options)
    assert said["notes"][-1].startswith("the seconds do not count embedding the target rows")
    assert said["memory"]["stages"]["target"] > 4 * 20 * 300
    with pytest.raises(InputError, match="missing"):
        plan(source, target=str(place / "missing.parquet"), **options)
    with pytest.raises(InputError, match="leaves at most"):
        plan(source, method="random", report=False, cap_by="kind", cap=2)
