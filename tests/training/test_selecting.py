"""Flags of the recipes, and the rows that they choose, anew or from a finished run."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from datasets import Dataset

from dq_multimodal import InputError, compress
from dq_multimodal.training import arguments
from dq_multimodal.training.arguments import read_arguments
from dq_multimodal.training.image_run import ImageRunArguments
from dq_multimodal.training.pictures import ImageDataArguments
from dq_multimodal.training.selecting import SelectionArguments, describe_selection, select_rows
from dq_multimodal.training.weights import read_weights


def test_settings_of_adq_do_not_stand_in_the_way_of_other_methods(tmp_path):
    path = str(tmp_path / "rows.parquet")
    Dataset.from_dict({"text": [f"row {k}" for k in range(60)]}).to_parquet(path)
    np.save(tmp_path / "emb.npy", np.random.default_rng(0).normal(size=(60, 4)))
    given = {"ready_embeddings": str(tmp_path / "emb.npy"), "report": False}
    run = compress(path, method="dq", output_dir=tmp_path / "run", **given)
    for method in ("dq", "random"):
        options = SelectionArguments().options() | {"method": method, "keep_ratio": 0.5, "seed": 3}
        origin = run.config.source.as_dict()
        drawn = select_rows(path, tmp_path / method, options, str(run.path), origin)
        straight = run.resample(0.5, method=method, seed=3, output_dir=tmp_path / f"{method}2")
        np.testing.assert_array_equal(drawn.kept, straight.kept)


def test_a_run_names_its_dataset_and_what_it_left_to_be_held_out(tmp_path, capsys):
    path = str(tmp_path / "rows.parquet")
    rows = Dataset.from_dict({"text": [f"row {k}" for k in range(60)]})
    rows.to_parquet(path)
    made = {"method": "random", "report": False}
    run = compress(path, split="train[:90%]", output_dir=tmp_path / "run", **made)
    whole = compress(path, output_dir=tmp_path / "whole", **made)
    memory = compress(rows, output_dir=tmp_path / "memory", **made)

    def read(*flags):
        return read_arguments([SelectionArguments], {}, list(map(str, flags)))[0]

    found = read("--from_run", run.path)
    assert (found.dataset_name, found.dataset_split, found.eval_split) == (
        *(path, "train[:90%]"),
        "train[90%:]",
    )
    found = read("--from_run", run.path, "--dataset_name", path, "--eval_dataset_name", "x.jsonl")
    assert (found.dataset_split, found.eval_split) == ("train[:90%]", None)
    found = read("--from_run", whole.path)
    assert (found.dataset_name, found.dataset_split, found.eval_split) == (path, "train", None)
    images = [ImageDataArguments, ImageRunArguments]
    data, _ = read_arguments(images, {"dataset_name": "some/images"}, ["--from_run", str(run.path)])
    assert (data.dataset_name, data.dataset_split) == (path, "train[:90%]")
    for folder, message in ((memory.path, "save the dataset"), (tmp_path, "not a run folder")):
        with pytest.raises(SystemExit) as stop:
            read("--from_run", folder)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_what_decides_the_order_reaches_compress(tmp_path):
    """A number of rows, dynamics and a difficulty: the run has them, the weights and its name."""
    rng = np.random.default_rng(0)
    path = str(tmp_path / "rows.parquet")
    rows = {"text": [f"row {k}" for k in range(60)], "source": ["a", "b"] * 30}
    Dataset.from_dict(rows).to_parquet(path)
    np.save(tmp_path / "emb.npy", rng.normal(size=(60, 4)).astype(np.float32))
    np.save(tmp_path / "dyn.npy", rng.uniform(size=(4, 60, 3)).astype(np.float16))
    flags = ("--dataset_name", path, "--dataset_split", "train", "--keep_rows", "12")
    flags += ("--ready_embeddings", tmp_path / "emb.npy", "--dynamics", tmp_path / "dyn.npy")
    flags += ("--difficulty", "aum", "--cap_by", "source", "--cap", "0.5")
    (found,) = read_arguments([SelectionArguments], {}, list(map(str, flags)))
    run = select_rows(path, tmp_path / "run", {**found.options(), "report": False}, None, {})
    request = run.request
    assert (len(run.subset), request.method, request.difficulty) == (12, "coverage", "aum")
    assert sorted(run.subset["source"]) == ["a"] * 6 + ["b"] * 6
    about = describe_selection(run)
    assert (about["method"], about["rows"], about["keep_ratio"]) == ("coverage", 12, 0.2)
    weights = read_weights(run.subset)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)
    asked = {**found.options(), "keep_rows": 6}
    drawn = select_rows(path, tmp_path / "less", asked, str(run.path), run.config.source.as_dict())
    assert (len(drawn.subset), drawn.request.method) == (6, "coverage")
    other = asked | {"difficulty": "el2n"}
    with pytest.raises(InputError, match="difficulty el2n was asked, and the run"):
        select_rows(path, tmp_path / "no", other, str(run.path), run.config.source.as_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "ccs"}, "ccs needs the training dynamics"),
        ({"keep_rows": 0}, "keep_rows must be"),
        ({"target_share": 0.0}, "target_share must lie in"),
        ({"use_weights": "both"}, "use_weights must be one of loss, sample, none"),
    ],
)
def test_bad_settings_are_said_before_the_work(change, message):
    for kind in (SelectionArguments, ImageRunArguments):
        with pytest.raises(InputError, match=message):
            kind(**change)


def test_flags_have_the_help_of_their_options_and_old_names(capsys):
    kinds = [ImageDataArguments, ImageRunArguments]
    flags = ["--test_split", "valid", "--test-dataset-name=x", "--embeddings", "e.npy"]
    _, run = read_arguments(kinds, {"keep_ratio": 0.3}, flags)
    assert (run.eval_split, run.eval_dataset_name, run.ready_embeddings) == ("valid", "x", "e.npy")
    assert (run.keep_ratio, run.fill) == (0.3, "mean")
    told = capsys.readouterr().err.splitlines()
    assert (
        told[0] == "note: --test_split is now --eval_split; the old name goes with the next release"
    )
    assert len(told) == 3


@dataclass
class Foreign:
    """Flags of another library."""

    eta: float = field(default=1.0, metadata={"help": "The rate."})
    beta: float = field(default=1.0, metadata={"help": "Hidden."})


def test_help_shows_flags_of_other_libraries_where_a_recipe_sets_them(monkeypatch, capsys):
    monkeypatch.setattr(Foreign, "__module__", "trl.trainer")
    with pytest.raises(SystemExit):
        read_arguments([SelectionArguments, Foreign], {"eta": 2.0}, ["--help"])
    found = " ".join(capsys.readouterr().out.split())
    assert "--keep_ratio RATIO Share of the rows to keep, in (0, 1]. [default: 0.2]" in found
    assert "--eta ETA The rate. [default: 2.0]" in found
    assert "--beta" not in found
    assert "All fields of trl.Foreign are flags too." in found
    _, foreign = read_arguments([SelectionArguments, Foreign], {"eta": 2.0}, ["--beta", "3"])
    assert (foreign.eta, foreign.beta) == (2.0, 3.0)


def test_one_process_says_what_is_wrong(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(arguments.time, "sleep", waited.append)
    assert arguments.fail("bad\n  input") == 2
    monkeypatch.setenv("RANK", "3")
    assert arguments.fail("bad input") == 2
    assert waited == [arguments.LAST_SECONDS]
    assert capsys.readouterr().err == "error: bad input\nerror: rank 3: bad input\n"
