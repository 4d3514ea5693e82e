"""Requests are checked when they are made."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from dq_multimodal import CompressConfig, InputError, compress
from dq_multimodal.config import count_kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0}, r"keep_ratio must lie in \(0, 1\], got 0"),
        ({"keep_ratio": True}, "keep_ratio must lie in"),
        ({"keep_ratio": "0.2"}, "keep_ratio must lie in"),
        ({"keep_ratio": float("nan")}, "got nan"),
        (
            {"method": "best"},
            "method must be one of auto, random, blocks, coverage, dq, adq, graphcut, ccs, dual, ",
        ),
        ({"draw": "best"}, "draw must be one of random, rank"),
        ({"similarity": "dot"}, "similarity must be one of cosine, euclidean"),
        ({"n_bins": 1.5}, "n_bins must be a whole number of at least 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"text_columns": "a"}, "text_columns must be a list of names"),
        ({"text_columns": ()}, "text_columns must be a list of names"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        CompressConfig("x", **options)


@pytest.mark.parametrize(
    ("options", "modality", "measure"),
    [
        ({}, "text", "texture"),
        ({"embeddings": "x.npy"}, "text", "surprisal"),
        ({"embeddings": "x.npy"}, "image", "texture"),
        ({"embeddings": "x.npy", "representativeness": "texture"}, "text", "texture"),
        ({"representativeness": "surprisal"}, "text", "surprisal"),
    ],
)
def test_representativeness_is_chosen_by_the_data(options, modality, measure):
    assert CompressConfig(dataset="x", **options).measure_of(modality) == measure


def test_settings_survive_a_round_trip():
    config = CompressConfig("x", keep_ratio=np.float32(0.5), seed=np.int64(3), text_columns=["a"])
    assert type(config.seed) is int
    assert CompressConfig.from_dict(config.as_dict()) == config
    with pytest.raises(InputError, match="does not know: later"):
        CompressConfig.from_dict({**config.as_dict(), "later": 1})


def test_the_size_is_the_rounded_product():
    assert [count_kept(52_002, r) for r in (0.2, 0.1, 0.05, 1)] == [10_400, 5_200, 2_600, 52_002]


def test_other_objects_and_options_are_one_clear_line(tmp_path):
    rows = DatasetDict(train=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(InputError, match=r"datasets\.Dataset, got DatasetDict"):
        compress(rows, output_dir=tmp_path / "run")
    with pytest.raises(InputError, match="unexpected keyword argument 'ratio'"):
        compress(rows["train"], ratio=0.2, output_dir=tmp_path / "run")
