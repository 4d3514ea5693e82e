"""recipes/alpaca_20pct.py, tiny: by `accelerate launch` in two processes, and in this one."""

import json
import shutil

import pytest
from datasets import Dataset
from launching import ROOT, TWO, launch
from small_gguf import small_llama, write_gguf

RECIPE = "recipes/alpaca_20pct.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory, small_encoder):
    """A dataset and a small model from recipes/tiny_llama.py."""
    folder = tmp_path_factory.mktemp("parts")
    rows = {
        "instruction": [f"Say the number {k}" for k in range(200)],
        "input": [""] * 200,
        "output": [f"The number is {k}." for k in range(200)],
    }
    Dataset.from_dict(rows).to_parquet(folder / "rows.parquet")
    flags = ("--dataset_name", folder / "rows.parquet", "--output_dir", folder / "llama")
    flags += ("--vocab_size", 300, "--hidden_size", 64, "--num_hidden_layers", 1)
    launch("recipes/tiny_llama.py", *flags)
    return folder


def flags_of(parts, small_encoder, out, *flags):
    given = [
        *("--dataset_name", parts / "rows.parquet"),
        *("--model_name_or_path", parts / "llama", "--embedding_model", small_encoder),
        *("--output_dir", out, "--max_steps", 8, "--logging_steps", 1, "--max_length", 64),
        *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1),
        *("--learning_rate", "1e-2", "--eval_split", "train[90%:]"),
        *("--dataset_split", "train[:90%]", "--method", "adq", *flags),
    ]
    return [str(flag) for flag in given]


def train(parts, small_encoder, out, *flags, **how):
    given = flags_of(parts, small_encoder, out, *flags)
    return launch(RECIPE, *given, folder=out.parent, **how)


def selection_bytes(out):
    names = ("embeddings.npy", "selection.parquet", "bins.parquet", "subset/part-00000.parquet")
    return [(out / "selection" / name).read_bytes() for name in names]


def test_one_and_two_processes_train_on_the_same_subset(parts, small_encoder, tmp_path):
    from peft import AutoPeftModelForCausalLM

    for launcher, name, n_processes in (((), "one", 1), (TWO, "two", 2)):
        out = tmp_path / name
        done = train(parts, small_encoder, out, launcher=launcher)
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["complete"]
        assert metrics["n_processes"] == n_processes
        assert (metrics["rows_trained"], metrics["rows_cut_away"], metrics["steps"]) == (36, 0, 8)
        assert metrics["selection"]["source_rows"] == 180
        assert metrics["train_loss"]["last"] < metrics["train_loss"]["first"]
        assert metrics["held_out"]["rows"] == 20
        assert 0 < metrics["held_out"]["response_loss"] < 7
        assert metrics["parameters"]["trained"] < metrics["parameters"]["all"] / 2
        assert "held-out response loss" in done.stdout
        AutoPeftModelForCausalLM.from_pretrained(out / "model")
    assert selection_bytes(tmp_path / "one") == selection_bytes(tmp_path / "two")
    tokens = [
        json.loads((tmp_path / name / "metrics.json").read_text())["held_out"]["response_tokens"]
        for name in ("one", "two")
    ]
    assert tokens[0] == tokens[1]
    again = train(parts, small_encoder, tmp_path / "one")
    assert "is already complete" in again.stdout


def test_full_fine_tuning_on_all_rows(parts, small_encoder, tmp_path):
    from transformers import AutoModelForCausalLM

    flags = ("--method", "full", "--use_peft", "false")
    train(parts, small_encoder, tmp_path / "full", *flags)
    metrics = json.loads((tmp_path / "full" / "metrics.json").read_text())
    assert metrics["rows_trained"] == metrics["selection"]["source_rows"] == 180
    assert metrics["parameters"]["trained"] == metrics["parameters"]["all"]
    assert not (tmp_path / "full" / "selection").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model")


@pytest.mark.slow
def test_weights_of_a_subset_are_used_and_stated(parts, small_encoder, tmp_path):
    path = tmp_path / "subset.parquet"
    rows = Dataset.from_parquet(str(parts / "rows.parquet"))
    weights = [0.9 + 0.2 * (k % 2) for k in range(len(rows))]
    rows.add_column("dq_weight", weights).to_parquet(path)
    flags = ("--method", "full", "--dataset_name", path, "--use_weights", "loss")
    done = train(parts, small_encoder, tmp_path / "out", *flags, launcher=TWO)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["use_weights"], metrics["rows_trained"]) == ("loss", 180)
    assert metrics["train_loss"]["last"] < metrics["train_loss"]["first"]
    assert "weights in the loss" in done.stdout
    (tmp_path / "no").mkdir()
    flags += ("--packing", "true")
    said = refuse(parts, small_encoder, tmp_path / "no", flags)
    assert "error: packing puts rows together that weigh differently" in said


def test_a_gguf_file_is_trained_whole_and_saved(parts, small_encoder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = small_llama()
    write_gguf(model, tmp_path / "small.gguf")
    flags = ("--method", "full", "--use_peft", "false", "--max_length", "128")
    flags += ("--model_name_or_path", tmp_path / "small.gguf")
    train(parts, small_encoder, tmp_path / "out", *flags)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["train_loss"]["last"] < metrics["train_loss"]["first"]
    assert metrics["parameters"]["trained"] == metrics["parameters"]["all"]
    assert metrics["parameters"]["all"] == sum(p.numel() for p in model.parameters())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert not torch.equal(saved.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model").eos_token == "</s>"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "best"], "error: method must be one of auto, random, blocks"),
        (["--keep_ratio", "2"], "error: keep_ratio must lie in (0, 1], got 2.0"),
        (["--model_name_or_path", "no/model"], "error: the Hub is out of reach and model no/model"),
        (["--dataset_name", "no/data"], "error: the Hub is out of reach and no/data"),
        (["--push_subset_to_hub", "me/x"], "error: cannot push to me/x"),
        (["--trust_remote_code", "true"], "error: trust_remote_code: code that comes with a model"),
        (["--config", "gone.yaml"], "error: cannot read the configuration gone.yaml"),
        (["--model_name_or_path", "gone.gguf"], "error: there is no file gone.gguf"),
        (["--model_init_kwargs", '{"gguf_file": "x.gguf"}'], "error: there is no file "),
        (["--frobnicate", "1"], "--frobnicate"),
    ],
)
def test_bad_flags_end_with_2(parts, small_encoder, tmp_path, flags, message):
    assert message in refuse(parts, small_encoder, tmp_path, flags)


def refuse(parts, small_encoder, tmp_path, flags):
    said = train(parts, small_encoder, tmp_path / "out", *flags, code=2).stderr
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "metrics.json").exists()
    return said


class Harm:
    def __reduce__(self):
        return open, ("run", "w")


def test_a_pickle_of_more_than_weights_is_not_read(parts, small_encoder, tmp_path):
    import torch

    model = shutil.copytree(parts / "llama", tmp_path / "llama")
    (model / "model.safetensors").unlink()
    torch.save({"harm": Harm()}, model / "pytorch_model.bin")
    flags = ("--model_name_or_path", model, "--method", "random")
    said = refuse(parts, small_encoder, tmp_path, flags)
    assert "a pickle of more than weights" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", sorted((ROOT / "recipes" / "configs").glob("*.yaml")))
def test_every_config_file_is_understood(config):
    from dq_multimodal.training.arguments import read_arguments
    from dq_multimodal.training.selecting import SelectionArguments

    if config.name.startswith("fsdp"):
        import yaml

        assert yaml.safe_load(config.read_text())["fsdp_config"]["fsdp_version"] == 2
        return
    if config.name.startswith("cifar10"):
        from dq_multimodal.training.classify import ClassifierArguments
        from dq_multimodal.training.image_run import ImageRunArguments
        from dq_multimodal.training.pictures import ImageDataArguments

        kinds, defaults = [ImageDataArguments, ClassifierArguments, ImageRunArguments], {}
    else:
        from trl import ModelConfig, SFTConfig

        kinds = [SelectionArguments, SFTConfig, ModelConfig]
        defaults = {"bf16": False, "use_cpu": True}
    read_arguments(kinds, defaults, ["--config", str(config)])
