"""The report as users meet it: with compress, by its own command, in the card, on the Hub."""

import numpy as np
import pytest
from datasets import Dataset

from dq_multimodal import InputError, compress
from dq_multimodal.report import FILES

N = 120


@pytest.fixture
def run(tmp_path):
    rows = {"text": [f"the fox number {k}" for k in range(N)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    np.save(tmp_path / "emb.npy", np.random.default_rng(0).normal(size=(N, 6)))
    return compress(
        str(tmp_path / "data.parquet"),
        method="dq",
        embeddings=str(tmp_path / "emb.npy"),
        output_dir=tmp_path / "run",
    )


def test_compress_leaves_a_report_and_the_card_shows_its_figures(run):
    assert all((run.path / name).exists() for name in FILES)
    page = (run.path / "report.html").read_text()
    assert "24 of 120 rows kept by dq" in page
    card = (run.path / "README.md").read_text()
    for name in ("map", "bins", "coverage"):
        assert f"](figures/{name}.png)" in card
        assert (run.path / "figures" / f"{name}.png").is_file()
    assert "report" in run.manifest["seconds"]


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
    np.save(tmp_path / "run" / "embeddings.npy", np.ones((3, 2), dtype=np.float32))
    with pytest.raises(InputError, match=r"holds 3 embeddings, and the source of .* 120 rows"):
        small.write_report(run.path)
    with pytest.raises(InputError, match=r"has no embeddings\.npy"):
        small.write_report(small.path)


def test_a_run_whose_source_is_gone_still_has_a_report(run, tmp_path):
    (tmp_path / "data.parquet").unlink()
    assert run.write_report().read_text().count("the fox number") == 0


def test_no_report(cli, tmp_path, run):
    flags = ("--method", "random", "--no-report", "--output-dir", "bare")
    cli("compress", "data.parquet", *flags)
    assert not {path.name for path in (tmp_path / "bare").iterdir()} & set(FILES)
    done = cli("compress", "data.parquet", *flags[:2], "--output-dir", "bare")
    assert "already complete" not in done.stdout
    assert (tmp_path / "bare" / "report.html").is_file()


def test_a_report_that_was_cut_short_is_written_again(run, tmp_path, monkeypatch):
    options = {
        "method": "dq",
        "embeddings": str(tmp_path / "emb.npy"),
        "output_dir": tmp_path / "run",
        "dataset": str(tmp_path / "data.parquet"),
    }

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dq_multimodal.pipeline.write_report", stop)
        compress(**options, seed=1, overwrite=True)
    with pytest.raises(InputError, match="has not finished"):
        type(run)(run.path)
    again = compress(**options, seed=1)
    assert (again.path / "report.html").is_file()
