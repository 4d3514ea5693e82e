"""Runs with --partition: bins part by part, and every command that reads such a run."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dq_multimodal import CompressConfig, InputError, Run, compress, verify
from dq_multimodal.config import count_parts
from dq_multimodal.core import make_bins, order_rows, partition, partition_rows

N = 240


@pytest.fixture
def data(tmp_path):
    """data.parquet and emb.npy, three clouds, in the working folder of the command."""
    rng = np.random.default_rng(0)
    rows = {"text": [f"row {k}" for k in range(N)], "kind": ["x", "y"] * (N // 2)}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    values = 4 * np.eye(3, 8)[rng.integers(0, 3, N)] + rng.normal(size=(N, 8))
    np.save(tmp_path / "emb.npy", values.astype(np.float32))
    return tmp_path


ASKED = (
    "compress",
    "data.parquet",
    "--ready-embeddings",
    "emb.npy",
    "--method",
    "dq",
    "--no-report",
)


def compressed(data, name, **options):
    settings = {
        "ready_embeddings": str(data / "emb.npy"),
        "method": "dq",
        "report": False,
        **options,
    }
    return compress(str(data / "data.parquet"), output_dir=data / name, **settings)


def test_the_command_line_from_end_to_end(cli, data):
    done = cli(*ASKED, "--partition", "kmeans:3", "--output-dir", "run")
    assert "parts    3, by kmeans:3" in done.stdout
    values = np.load(data / "emb.npy")
    codes = partition_rows(values, 3)
    bins = make_bins(values, 10, strata=codes)
    order = order_rows(bins)
    selection = pq.read_table(data / "run" / "selection.parquet")
    np.testing.assert_array_equal(selection["stratum"], codes)
    np.testing.assert_array_equal(selection["bin"], bins.bin)
    np.testing.assert_array_equal(selection["order"], order)
    kept = order < N // 5
    for part in range(3):  # every part has its share, within a row
        assert abs(kept[codes == part].sum() - (codes == part).sum() / 5) < 1
    table = pq.read_table(data / "run" / "bins.parquet").to_pydict()
    assert set(table["label"]) == {"part 0", "part 1", "part 2"}
    assert sum(table["size"]) == N

    checks = json.loads(cli("verify", "run", "--json").stdout)
    assert [check["result"] for check in checks] == ["passed"] * 5
    assert "in each of the 3 parts" in checks[-2]["detail"]
    cli("resample", "run", "--keep-ratio", "0.1", "--draw", "rank", "--output-dir", "small")
    ranked = order_rows(bins, draw="rank")
    np.testing.assert_array_equal(Run(data / "small").order, ranked)
    assert cli("verify", "small").stdout.count("passed") == 4
    refused = cli(*ASKED, "--partition", "kmeans:4", "--output-dir", "run", code=2)
    assert "partition 'kmeans:3' there, 'kmeans:4' asked" in refused.stderr


def test_one_part_and_the_default_of_few_rows_are_no_partition_row_for_row(data):
    plain = compressed(data, "plain")
    for number, name in enumerate(("kmeans:1", "kmeans", "none")):
        run = compressed(data, f"run{number}", partition=name)
        for column in ("bin", "rank", "gain", "stratum"):
            np.testing.assert_array_equal(getattr(run.bins, column), getattr(plain.bins, column))
        np.testing.assert_array_equal(run.order, plain.order)
    assert run.request.partition is None
    runs = [
        compressed(data, name, method="random", partition=name) for name in ("none", "kmeans:9")
    ]
    np.testing.assert_array_equal(runs[0].order, runs[1].order)  # random selection knows no parts


def test_a_run_with_pieces_of_a_very_large_part_verifies(data, monkeypatch):
    monkeypatch.setattr(partition, "LARGE_ROWS", 40)
    values = np.load(data / "emb.npy")
    values[:200] = values[0]
    np.save(data / "emb.npy", values)
    run = compressed(data, "run", partition="kmeans:8")
    whole = partition_rows(values, 8, cut_large=False)
    sizes = np.bincount(whole)
    assert sizes.max() >= 200
    pieces = run.bins.stratum[whole == sizes.argmax()]
    assert len(np.unique(pieces)) == -(-sizes.max() // 40)
    assert run.manifest.labels == [f"part {k}" for k in range(run.bins.stratum.max() + 1)]
    assert [check.result for check in verify(run)] == ["passed"] * 5
    again = run.resample(0.1, output_dir=data / "small")
    assert "failed" not in [check.result for check in verify(again)]


def test_the_report_shows_parts(data):
    run = compressed(data, "run", partition="kmeans:3", report=True)
    page = (run.path / "report.html").read_text()
    assert "part 2" in page
    assert "kmeans:3" in page
    assert "kmeans:3" in (run.path / "README.md").read_text()
    points = pq.read_table(run.path / "map.parquet").to_pydict()
    codes = run.bins.stratum[points["row"]]
    assert points["label"] == [f"part {code}" for code in codes]


def test_adq_scores_bins_over_all_parts(data, small_encoder):
    options = {"ready_embeddings": None, "method": "adq", "embedding_model": str(small_encoder)}
    run = compressed(data, "run", partition="kmeans:3", n_bins=4, **options)
    assert run.bins.stratum.max() == 2
    table = pq.read_table(run.path / "bins.parquet").to_pandas()
    assert (table.groupby("bin").importance.nunique() == 1).all()
    assert [check.result for check in verify(run)] == ["passed"] * 5
    plain = run.resample(0.2, method="dq", output_dir=data / "dq")
    np.testing.assert_array_equal(
        run.resample(0.2, alpha=0.0, output_dir=data / "zero").order, plain.order
    )


def test_gradients_are_refused():
    with pytest.raises(InputError, match="plain embeddings, not for gradients"):
        CompressConfig("x", partition="kmeans:2", image_embedding="gradients")


def test_numbers_of_parts():
    sizes = (1, 50_000, 50_001, 1_000_000, 2_000_001)
    assert [count_parts("kmeans", n) for n in sizes] == [1, 1, 2, 20, 41]
    assert count_parts("kmeans:7", 7) == 7
    numbers = ("", "0", "-1", "1.5", "9" * 5000, "\u0663")
    for bad in ("", "faiss:3", 3, *(f"kmeans:{number}" for number in numbers)):
        with pytest.raises(InputError, match="partition must be none, kmeans or kmeans:K"):
            CompressConfig("x", partition=bad)
