"""The report as users meet it: with compress, by its own command, in the card, on the Hub."""

import shutil

import numpy as np
import pytest
from datasets import Dataset

from dq_multimodal import InputError, Run, compress
from dq_multimodal.report import FILES

N = 120


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a source, its embeddings, and a run of them."""
    folder = tmp_path_factory.mktemp("finished")
    rows = {"text": [f"the fox number {k}" for k in range(N)]}
    Dataset.from_dict(rows).to_parquet(folder / "data.parquet")
    np.save(folder / "emb.npy", np.random.default_rng(0).normal(size=(N, 6)))
    compress(**options(folder), output_dir=folder / "run")
    return folder


def options(folder):
    source, embeddings = folder / "data.parquet", folder / "emb.npy"
    return {"dataset": str(source), "method": "dq", "ready_embeddings": str(embeddings)}


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run that a test may change."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return Run(tmp_path / "run")


def test_compress_leaves_a_report_and_the_card_shows_its_figures(run):
    assert all((run.path / name).exists() for name in FILES)
    page = (run.path / "report.html").read_text()
    assert "24 of 120 rows kept by dq" in page
    card = (run.path / "README.md").read_text()
    for name in ("map", "bins", "coverage"):
        assert f"](figures/{name}.png)" in card
        assert (run.path / "figures" / f"{name}.png").is_file()
    assert "report" in run.manifest.seconds


def test_the_command_writes_it_again(run, cli):
    page = (run.path / "report.html").read_bytes()
    (run.path / "report.html").unlink()
    done = cli("report", run.path)
    assert "report.html" in done.stdout
    assert (run.path / "report.html").read_bytes() == page


def test_a_resampled_run_borrows_the_embeddings_of_another(run, cli, tmp_path):
    small = run.resample(0.1, output_dir=tmp_path / "small")
    assert not (small.path / "report.html").exists()
    small.write_report()
    without = (small.path / "report.html").read_text()
    assert not (small.path / "map.parquet").exists()
    cli("report", small.path, "--embeddings-of", run.path)
    assert (small.path / "map.parquet").exists()
    assert len((small.path / "report.html").read_text()) > len(without)
    np.save(run.path / "embeddings.npy", np.ones((3, 2), dtype=np.float32))
    with pytest.raises(InputError, match=r"holds 3 embeddings, and the source of .* 120 rows"):
        small.write_report(run.path)
    with pytest.raises(InputError, match=r"has no embeddings\.npy"):
        small.write_report(small.path)


def test_a_run_whose_source_is_gone_still_has_a_report(run, finished):
    (finished / "data.parquet").rename(finished / "away")
    try:
        assert run.write_report().read_text().count("the fox number") == 0
    finally:
        (finished / "away").rename(finished / "data.parquet")


def test_no_report(cli, tmp_path, finished):
    flags = ("--method", "random", "--output-dir", tmp_path / "bare")
    done = cli("compress", finished / "data.parquet", *flags, "--no-report")
    assert "report.html" not in done.stdout
    assert not {path.name for path in (tmp_path / "bare").iterdir()} & set(FILES)
    done = cli("compress", finished / "data.parquet", *flags)
    assert "already complete" not in done.stdout
    assert f"report   {tmp_path / 'bare' / 'report.html'}" in done.stdout
    assert (tmp_path / "bare" / "report.html").is_file()


def test_a_report_that_was_cut_short_is_written_again(finished, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    asked = options(finished) | {"output_dir": tmp_path / "run"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dq_multimodal.pipeline.write_report", stop)
        compress(**asked)
    with pytest.raises(InputError, match="has not finished"):
        Run(tmp_path / "run")
    again = compress(**asked)
    assert (again.path / "report.html").is_file()
