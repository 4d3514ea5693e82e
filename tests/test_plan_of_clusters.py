"""plan --engine ray: what is measured here, multiplied for a cluster."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from dq_multimodal import InputError, plan
from dq_multimodal.config import PlanConfig
from dq_multimodal.planning import cluster
from dq_multimodal.planning.cluster import Seen, foresee_cluster
from dq_multimodal.stages.bin_costs import BinTimes
from dq_multimodal.stages.on_shards import BIN, PLACE

STAGES = ["rows", "embeddings", "centres", "parts", "bins", "order", "subset", "joining"]
STAGES += ["report"]


@pytest.fixture
def _rates(monkeypatch):
    """Round rates in place of measured ones."""
    monkeypatch.setattr(cluster, "_time", lambda work: 1e-6)
    monkeypatch.setattr(cluster, "_time_reading", lambda table: 1e-9)
    monkeypatch.setattr(cluster, "_time_sorting", lambda record: 1e-8)
    monkeypatch.setattr(cluster, "_time_order", lambda: 1e-9)
    monkeypatch.setattr(cluster, "_time_joining", lambda: 1e-7)
    monkeypatch.setattr(cluster, "_time_parts", lambda width, n: (1e-7 * n, 3e-7 * n, 1e-6))
    monkeypatch.setattr(cluster, "count_threads", lambda n: 2)


def see(n_rows, **more):
    seconds = {"embeddings": 1e-3, "order": 2e-6, "subset": 1e-6}
    about = {
        "n_rows": n_rows,
        "n_kept": n_rows // 5,
        "sizes": np.array([float(n_rows)]),
        "width": 100,
        "value_bytes": 4,
        "is_embedded": True,
        "file_bytes": 50.0 * n_rows,
        "data_bytes": 80.0 * n_rows,
        "seconds": {name: n_rows * each for name, each in seconds.items()} | {"report": 7.0},
        "disk": {"subset": 10 * n_rows, "selection.parquet": 12 * n_rows, "report": 999},
        "bins": BinTimes(2, [(1000, 1.0), (2000, 2**1.5)]),
        "base_bytes": 10**9,
        "batch_bytes": 10**7,
        "device": "cpu, 2 threads",
        "n_threads": 2,
        "table": pa.table({"text": ["a", "b"]}),
        "is_image": False,
    }
    return Seen(**about | more)


def ask(**options):
    return PlanConfig(dataset="d", method="dq", partition="kmeans", engine="ray", **options)


@pytest.mark.usefixtures("_rates")
def test_seconds_and_bytes_are_those_of_the_definition():
    n, k, d, nodes, cores = 10**7, 200, 100, 3, 4
    found = foresee_cluster(ask(nodes=nodes, cores_per_node=cores, node_price=2.5), see(n))
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert [*stages] == STAGES
    assert (found["shards"], found["strata"], found["rows_of_largest"]) == (100, k, 80_000)
    assert found["groups"] == 100, "two parts of 50,000 rows share a task"
    sample, record = 16_384, 8 + 4 * d  # 64 rows for each of 200 parts are fewer
    part = 2**1.5 * (50_000 / 1000) ** 1.5
    seconds = {
        "rows": 1e-6 / 2**26 * 50 * n / 12,
        "embeddings": (2 * 1e-3 * n + 1e-9 * 80 * n + 100 * n * 1e-6 / 2**22) / 12,
        "centres": sample * (k * 1e-6 + 25 * 3e-7 * k * 2 / cores),
        "parts": n * (1e-7 * k + 1e-8) / 12,
        "bins": k * part / 12,
        "order": (2e-6 * n + 1e-9 * n * k) / 12,
        "subset": (1e-6 * n + 1e-9 * 80 * n) / 12,
        "joining": 1e-7 * n,
        "report": 7.0,
    }
    for name, wanted in seconds.items():
        assert stages[name]["seconds"] == pytest.approx(wanted, abs=1e-3), name
    total = sum(seconds.values())
    assert found["total_seconds"] == pytest.approx(total, abs=0.1)
    assert found["dollars"] == pytest.approx(2.5 * nodes * total / 3600, abs=0.01)
    moved = {name: (stage["read_bytes"], stage["written_bytes"]) for name, stage in stages.items()}
    assert moved["embeddings"] == (50 * n, record * n)
    assert moved["parts"] == (record * n, (record + 4 * d) * n), "and embeddings.npy"
    assert moved["bins"] == (record * n, BIN.itemsize * n)
    assert moved["order"] == (BIN.itemsize * n, PLACE.itemsize * n)
    assert moved["subset"] == ((50 + BIN.itemsize + PLACE.itemsize) * n, 22 * n)
    assert moved["joining"] == (22 * n, 22 * n)
    assert found["memory"]["sample"] == 8 * sample * d
    assert found["memory"]["counts"] == 8 * 100 * k
    assert found["memory"]["driver"] == 10**9 + 28 * sample * d


@pytest.mark.usefixtures("_rates")
def test_a_stage_takes_as_long_as_its_largest_task():
    found = foresee_cluster(ask(nodes=1000, gpus_per_node=1), see(10**6))
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["embeddings"]["n_units"] == 10 < 1000, "a shard goes to one GPU"
    assert stages["embeddings"]["unit"] == "GPU"
    assert stages["bins"]["n_units"] == 10
    longest = stages["bins"]["longest_seconds"]
    assert stages["bins"]["seconds"] == longest
    assert longest == pytest.approx(2**1.5 * max(80**1.5, 2 * 50**1.5), rel=1e-3)
    assert any("a GPU is taken to be as fast as that" in note for note in found["notes"])


@pytest.mark.usefixtures("_rates")
def test_random_rows_have_no_bins_and_no_vectors():
    asked = PlanConfig(dataset="d", method="random", engine="ray")
    found = foresee_cluster(asked, see(10**6, width=0, is_embedded=False, bins=None))
    names = [stage["name"] for stage in found["stages"]]
    assert names == [name for name in STAGES if name not in ("centres", "bins")]
    assert found["stages"][1]["written_bytes"] == 8 * 10**6
    assert found["memory"]["sample"] == 0


def test_what_is_measured_is_positive():
    assert all(x > 0 for x in cluster._time_parts(16, 40))
    assert cluster._time_order() > 0
    assert cluster._time_reading(pa.table({"text": ["some words"] * 1000})) > 0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    place = tmp_path_factory.mktemp("source")
    texts = [f"row {k} of some text" for k in range(400)]
    Dataset.from_dict({"text": texts}).to_parquet(place / "d.parquet")
    vectors = np.random.default_rng(0).normal(size=(400, 12))
    np.save(place / "e.npy", vectors.astype(np.float16))
    return place


WITHOUT_RAY = """
import json, sys
from dq_multimodal import plan
given = {"method": "dq", "partition": "kmeans", "report": False, "ready_embeddings": sys.argv[2]}
given |= {"engine": "ray", "nodes": 4, "rows": 1_000_000}
found = plan(sys.argv[1], **given)
assert "ray" not in sys.modules
print(json.dumps(found))
"""


def test_a_plan_of_a_cluster_needs_no_ray(source, tmp_path):
    command = [sys.executable, "-c", WITHOUT_RAY, source / "d.parquet", source / "e.npy"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    found = said["cluster"]
    assert said["rows"] == 400
    assert (found["rows"], found["kept"], found["strata"]) == (10**6, 200_000, 20)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert [*stages] == STAGES[:-1]
    assert all(stage["seconds"] >= 0 for stage in found["stages"])
    assert stages["parts"]["read_bytes"] == (8 + 2 * 12) * 10**6, "vectors are float16"
    assert stages["rows"]["read_bytes"] == (source / "d.parquet").stat().st_size * 2500
    assert not list(tmp_path.iterdir())


def test_the_command_line_prints_a_line_for_each_stage(cli, source):
    flags = ("--method", "random", "--rows", "5000", "--nodes", "2", "--node-price", "3")
    out = cli("plan", source / "d.parquet", *flags, "--engine", "ray", "--keep-rows", "77").stdout
    assert "cluster  2 nodes, each of 0 GPUs and" in out
    assert "rows     5,000 in 1 shard and 1 stratum, 77 kept" in out
    for name in ("rows", "embeddings", "parts", "order", "subset", "report"):
        assert f"\n         {name} " in out
    assert " dollars" in out


@pytest.mark.parametrize("name", ["nodes", "gpus_per_node", "cores_per_node", "node_price", "rows"])
def test_a_cluster_is_for_engine_ray(source, name):
    with pytest.raises(InputError, match=f"^{name} is for engine ray$"):
        plan(str(source / "d.parquet"), method="random", **{name: 3})


def test_what_is_no_cluster(source):
    with pytest.raises(InputError, match="nodes must be a whole number of at least 1, got 0"):
        plan(str(source / "d.parquet"), engine="ray", nodes=0)
    with pytest.raises(InputError, match="streaming is for engine local"):
        plan(str(source / "d.parquet"), engine="ray", streaming=True)
    with pytest.raises(InputError, match="no option node"):
        plan(str(source / "d.parquet"), engine="ray", node=2)
