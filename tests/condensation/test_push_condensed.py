"""Condensed sets on a Hub on loopback: pushed, loaded by plain datasets, opened again, verified."""

import json

import numpy as np
import pytest
import yaml
from condensed_sets import make_rows, stand_in
from datasets import load_dataset
from fake_hub import read_card

from dq_multimodal import InputError, compress, condense, verify
from dq_multimodal.condensation.experts import write_about
from dq_multimodal.condensation.result import open_result


@pytest.fixture
def learner(monkeypatch):
    return stand_in(monkeypatch)


def test_a_set_is_pushed_loaded_and_verified(hub, learner, cli, tmp_path):
    make_rows().to_parquet(tmp_path / "rows.parquet")
    learner.soft = True
    options = ("--method", "krr", "--learn-labels", "--images-per-class", 2)
    done = cli("condense", "rows.parquet", *options, "--output-dir", "set", "--push-to-hub", "me/x")
    assert "pushed   " in done.stdout and "/datasets/me/x/commit/" in done.stdout
    files = hub.files("me/x")
    assert {*files} == {
        *(".gitattributes", "README.md", "config.yaml", "manifest.json", "figures/pictures.png"),
        "data/train-00000.parquet",
    }
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    config = yaml.safe_load(files["config.yaml"])
    assert "path" not in config["source"] and config["source"]["name"] == "rows.parquet"
    assert read_card(files["README.md"])["tags"][0] == "dataset-condensation"
    assert b'load_dataset("me/x", split="train")' in files["README.md"]

    made = open_result(tmp_path / "set")
    loaded = load_dataset("me/x")
    assert {*loaded} == {"train"}
    rows = loaded["train"]
    assert rows.features == made.dataset.features
    assert np.float32(rows["soft_label"][:]).tolist() == learner.given.targets.tolist()
    for ours, theirs in zip(made.dataset["img"], rows["img"], strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))

    there = open_result("me/x")
    assert there.n_bytes == made.n_bytes and there.config.source.path is None
    assert there.prefix(1).num_rows == 3
    checks = json.loads(cli("verify", "me/x", "--json").stdout)
    assert [check["result"] for check in checks] == ["passed"] * 3 + ["passed", "passed"]
    assert "figures" in hub.files("me/x")["README.md"].decode()
    assert "is a condensed set" in cli("resample", "me/x", "--keep-ratio", 0.5, code=2).stderr


def test_a_later_push_is_one_commit_and_keeps_what_others_wrote(hub, learner, cli, tmp_path):
    make_rows().to_parquet(tmp_path / "rows.parquet")
    cli("condense", "rows.parquet", "--images-per-class", 2, "--output-dir", "set")
    hub.add_repo("me/x", {"README.md": b"---\ntags: [mine]\n---\n# Hello\n"})
    cli("push", "set", "me/x")
    edited = hub.files("me/x") | {"data/train-00007.parquet": b"old", "data/notes.txt": b"mine"}
    edited["README.md"] += b"\nTyped below.\n"
    hub.add_repo("me/x", edited)
    n_commits = len(hub.repos["me/x"].commits)
    (tmp_path / "experts").mkdir()
    write_about(tmp_path / "experts", {"n_experts": 1, "n_epochs": 1, "learning_rate": 0.01})
    learner.rate = 0.0125
    options = {"method": "mtt", "experts": tmp_path / "experts", "images_per_class": 3}
    condense(str(tmp_path / "rows.parquet"), output_dir=tmp_path / "other", **options).push_to_hub(
        "me/x"
    )
    assert len(hub.repos["me/x"].commits) == n_commits + 1
    files = hub.files("me/x")
    assert "data/train-00007.parquet" not in files and files["data/notes.txt"] == b"mine"
    text = files["README.md"].decode()
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    for part in ("# Hello", "Typed below.", "**9 synthetic images**", "rate **0.0125** (plain"):
        assert text.count(part) == 1
    assert {"mine", "synthetic"} <= {*read_card(files["README.md"])["tags"]}
    assert load_dataset("me/x", split="train").num_rows == 9
    assert [check.result for check in verify(open_result("me/x"))].count("failed") == 0


def test_runs_and_sets_do_not_overwrite_each_other(hub, learner, cli, tmp_path):
    made = condense(make_rows(), images_per_class=2, report=False, output_dir=tmp_path / "set")
    run = compress(make_rows(), method="random", report=False, output_dir=tmp_path / "run")
    made.push_to_hub("me/set")
    run.push_to_hub("me/run")
    before = hub.files("me/set"), hub.files("me/run")
    with pytest.raises(InputError, match="me/run holds other things than a condensed set"):
        made.push_to_hub("me/run")
    with pytest.raises(InputError, match="me/set holds other things than a run"):
        run.push_to_hub("me/set")
    make_rows().to_parquet(tmp_path / "rows.parquet")
    refused = cli("condense", "rows.parquet", "--push-to-hub", "me/run", code=2)
    assert "holds other things than a condensed set" in refused.stderr
    assert len(learner.calls) == 1  # before the work
    assert (hub.files("me/set"), hub.files("me/run")) == before
