"""A run that version 0.1 made: version_0_1/run, of rows.parquet and vectors.npy."""

import json
import shutil
from pathlib import Path

import pytest
from forging import change_document

from dq_multimodal import InputError, Run, compress, open_run, resample, verify

PASSED = ["passed"] * 5


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of it in the working folder."""
    shutil.copytree(Path(__file__).parent / "version_0_1", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Run("run")


def test_a_run_of_version_0_1_is_verified_resampled_and_made_again(old):
    assert (old.manifest.kept, old.manifest.versions["dq-multimodal"]) == (12, "0.1.0")
    assert old.manifest.labels == ["a", "b"] and len(old.subset) == 12
    assert [check.result for check in verify(old)] == PASSED
    less = resample(old, 0.1, output_dir="less")
    assert set(less.kept) <= set(old.kept) and len(less.kept) == 3
    more = resample(old, 0.5, method="graphcut", output_dir="more")
    assert len(more.subset) == 15
    for run in (less, more):
        assert {check.result for check in verify(run)} <= {"passed", "skipped"}
    options = {
        "method": "dq",
        "ready_embeddings": "vectors.npy",
        "n_bins": 3,
        "label_column": "label",
    }
    again = compress("rows.parquet", keep_ratio=0.4, report=False, output_dir="run", **options)
    assert again.was_complete
    shutil.rmtree("run/subset")
    again = compress("rows.parquet", keep_ratio=0.4, report=False, output_dir="run", **options)
    assert not again.was_complete and [check.result for check in verify(again)] == PASSED
    assert again.kept.tolist() == old.kept.tolist()
    old.write_report()
    assert [check.result for check in verify("run")] == PASSED


def test_it_is_pushed_and_opened_from_the_hub(old, hub):
    old.push_to_hub("me/old")
    found = open_run("me/old")
    assert found.kept.tolist() == old.kept.tolist()
    assert found.subset["dq_row"] == old.subset["dq_row"]
    assert {check.result for check in verify(found)} <= {"passed", "skipped"}


def test_a_run_of_another_format_says_so(old):
    for form in (None, "dq-multimodal run 0", "dq-multimodal run 2"):
        change_document(
            old.path / "manifest.json", lambda found, form=form: found.update(format=form)
        )
        with pytest.raises(InputError, match=r"run 1': this release cannot read it$"):
            Run("run")
    assert json.loads((old.path / "manifest.json").read_text())["complete"]
