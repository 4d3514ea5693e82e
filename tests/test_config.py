"""Options are declared once, and checked when they are set."""

import inspect
from argparse import ArgumentParser
from dataclasses import dataclass, fields

import numpy as np
import pytest
from datasets import Dataset

import dq_multimodal
from dq_multimodal import CompressConfig, InputError, Run, compress, plan, resample
from dq_multimodal.config import PlanConfig, ResampleConfig, choose, count_kept
from dq_multimodal.options import add_options, takes, whole_number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0}, r"keep_ratio must lie in \(0, 1\], got 0"),
        ({"keep_ratio": True}, "keep_ratio must lie in"),
        ({"keep_ratio": "0.2"}, "keep_ratio must lie in"),
        ({"keep_ratio": float("nan")}, "got nan"),
        ({"method": "best"}, "method must be one of auto, random, blocks, coverage, dq, adq, "),
        ({"draw": "best"}, "draw must be one of random, rank"),
        ({"similarity": "dot"}, "similarity must be one of cosine, euclidean"),
        ({"n_bins": 1.5}, "n_bins must be a whole number of at least 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"patch_quality": 101}, "patch_quality must be a whole number from 0 to 100, got 101"),
        ({"patch_size": 40_000}, "patch_size must be .* from 1 to 1024, got 40000"),
        ({"drop_ratio": 1.0}, r"drop_ratio must lie in \[0, 1\), got 1.0"),
        ({"min_psnr": float("nan")}, "min_psnr must be a number, got nan"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"text_columns": "a"}, "text_columns must be a list of names"),
        ({"text_columns": ()}, "text_columns must be a list of names"),
        ({"revision": 3}, "revision must be a name or a path, got 3"),
        ({"streaming": 1}, "streaming must be true or false, got 1"),
        ({"min_psnr": "high"}, "min_psnr must be a number, got 'high'"),
        ({"max_memory": "much"}, "max_memory must be a size such as 8GB"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        CompressConfig("x", **options)


@pytest.mark.parametrize(
    ("options", "modality", "measure"),
    [
        ({}, "text", "texture"),
        ({"ready_embeddings": "x.npy"}, "text", "surprisal"),
        ({"ready_embeddings": "x.npy"}, "image", "texture"),
        ({"ready_embeddings": "x.npy", "representativeness": "texture"}, "text", "texture"),
        ({"representativeness": "surprisal"}, "text", "surprisal"),
    ],
)
def test_representativeness_is_chosen_by_the_data(options, modality, measure):
    assert CompressConfig(dataset="x", **options).measure_of(modality) == measure


def test_settings_survive_a_round_trip(tmp_path):
    given = {"keep_ratio": np.float32(0.5), "seed": np.int64(3), "text_columns": ["a"]}
    config = CompressConfig(tmp_path, **given)
    assert (type(config.dataset), type(config.seed), type(config.keep_ratio)) == (str, int, float)
    assert CompressConfig.from_dict(config.as_dict()) == config
    for name in ("later", "output_dir"):
        with pytest.raises(InputError, match=f"does not know: {name}"):
            CompressConfig.from_dict({**config.as_dict(), name: 1})


def test_old_names_still_work_and_say_so(capsys):
    old = {"dataset": "x", "embeddings": "e.npy", "embedding": "gradients"}
    made = CompressConfig.from_dict(old)
    assert (made.ready_embeddings, made.image_embedding) == ("e.npy", "gradients")
    assert capsys.readouterr().err == ""  # a file says what it says
    assert CompressConfig.from_options(old) == made
    assert "note: embeddings is now ready_embeddings" in capsys.readouterr().err
    with pytest.raises(InputError, match="embeddings is the old name of ready_embeddings"):
        CompressConfig.from_options({**old, "ready_embeddings": "e.npy"})


def test_the_size_is_the_rounded_product():
    assert [count_kept(52_002, r) for r in (0.2, 0.1, 0.05, 1)] == [10_400, 5_200, 2_600, 52_002]


def test_other_objects_and_options_are_one_clear_line(tmp_path):
    rows = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(InputError, match=r"datasets\.Dataset, got list"):
        compress([rows], output_dir=tmp_path / "run")
    with pytest.raises(InputError, match=r"no option keep_ration; did you mean keep_ratio\?"):
        compress(rows, keep_ration=0.2, output_dir=tmp_path / "run")
    with pytest.raises(InputError, match="streaming is for a name or a path"):
        compress(rows, streaming=True, output_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("function", "config", "missing"),
    [
        (compress, CompressConfig, {"dataset"}),
        (plan, PlanConfig, {"dataset", "overwrite"}),
        (resample, ResampleConfig, {"run"}),
        (Run.resample, ResampleConfig, {"run"}),
    ],
)
def test_functions_show_every_option_with_its_default_and_help(function, config, missing):
    shown = list(inspect.signature(function).parameters.values())[1:]
    told = {each.name: each for each in fields(config) if each.name not in missing}
    assert {p.name: p.default for p in shown} == {n: each.default for n, each in told.items()}
    doc = " ".join(inspect.getdoc(function).split())
    for name, each in told.items():
        assert f"{name}: {' '.join(each.metadata['help'].split())}" in doc
    assert "Raises:" not in doc or doc.index("Args:") < doc.index("Raises:")


def test_editors_see_the_public_names():
    assert {"compress", "resample", "plan", "Run"} <= set(dir(dq_multimodal))


def test_a_new_option_is_one_field():
    @dataclass(frozen=True, kw_only=True)
    class Own(CompressConfig):
        n_rounds: int = choose(3, "How often to look.", whole_number(1))

    @takes(Own)
    def look(dataset, **options):
        """Look at the rows.

        Args:
            dataset: What to look at.

        Raises:
            InputError: If there is nothing to see.
        """
        return Own.from_options({"dataset": dataset, **options})

    assert look("x", n_rounds=4).as_dict()["n_rounds"] == 4
    with pytest.raises(InputError, match="n_rounds must be a whole number of at least 1, got 0"):
        look("x", n_rounds=0)
    assert inspect.signature(look).parameters["n_rounds"].default == 3
    assert "    n_rounds: How often to look.\n\nRaises:" in look.__doc__
    parser = ArgumentParser()
    add_options(parser, Own, ("dataset",))
    assert "How often to look. [default: 3]" in " ".join(parser.format_help().split())
    assert vars(parser.parse_args(["--n-rounds", "5"])) == {"n_rounds": 5}
    assert vars(parser.parse_args([])) == {}
