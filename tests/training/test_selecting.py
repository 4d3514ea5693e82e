"""The rows of a recipe that are drawn from a finished run."""

import numpy as np
from datasets import Dataset

from dq_multimodal import compress
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
