"""A machine and a driver die in one run of engine ray: the same run as by the local engine."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from dq_multimodal import compress

pytest.importorskip("ray")

from ray_faults import MAP_STAGES, Case, Machines, Runner, make_vectors

OPTIONS = {"method": "dq", "keep_ratio": 0.1, "ready_embeddings": "vector", "partition": "kmeans:4"}


@pytest.mark.slow
def test_a_machine_and_a_driver_die(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")  # a death is noticed sooner
    source = make_vectors(tmp_path, 3000, n_files=3)
    words = [w for name, x in OPTIONS.items() for w in (f"--{name.replace('_', '-')}", str(x))]
    runner = Runner(Case("rows", source, (*words, "--no-report"), 600, MAP_STAGES), tmp_path)
    local = compress(source, output_dir=runner.undisturbed, report=False, **OPTIONS)
    with Machines(2) as machines:
        found = runner.run("deaths", machines, [("node", "bins"), ("driver", "subset")])
    same = ("same_selection", "same_bins", "same_subset", "verified", "is_answer_whole")
    assert all(found[name] for name in same), found
    assert found["left"] == [], found
    assert found["begun_again"] >= 2, "a task died with each"
    assert found["made_again"] == 0, found
    vectors = [
        np.load(runner.work / name / "embeddings.npy") for name in ("rows-deaths", local.path)
    ]
    assert vectors[0].any(axis=1).all()
    np.testing.assert_array_equal(*vectors)
    assert pq.read_table(local.path / "selection.parquet")["kept"].to_numpy().sum() == 300
