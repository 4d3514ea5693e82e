"""The rows of a recipe that are drawn from a finished run."""

import numpy as np
import pytest
from datasets import Dataset

from dq_multimodal import compress
from dq_multimodal.training.arguments import SelectionArguments, read_arguments
from dq_multimodal.training.image_data import ImageDataArguments
from dq_multimodal.training.image_run import ImageRunArguments
from dq_multimodal.training.selecting import AdaptiveArguments, select_rows


def test_settings_of_adq_do_not_stand_in_the_way_of_other_methods(tmp_path):
    path = str(tmp_path / "rows.parquet")
    Dataset.from_dict({"text": [f"row {k}" for k in range(60)]}).to_parquet(path)
    np.save(tmp_path / "emb.npy", np.random.default_rng(0).normal(size=(60, 4)))
    given = {"embeddings": str(tmp_path / "emb.npy"), "report": False}
    run = compress(path, method="dq", output_dir=tmp_path / "run", **given)
    for method in ("dq", "random"):
        options = AdaptiveArguments().options() | {"method": method, "keep_ratio": 0.5, "seed": 3}
        origin = run.config["source"]
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
