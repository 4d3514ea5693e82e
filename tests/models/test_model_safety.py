"""A model is data: what it brings as code or as a pickle of more than weights is never run."""

import json
import shutil

import pytest
import torch

from dq_multimodal.config import InputError
from dq_multimodal.models.image import load_image_model
from dq_multimodal.models.text import load_encoder
from dq_multimodal.patches.mae import load_mae, make_small_mae, save_mae
from dq_multimodal.training.sft import check_model

PICKLE = "a pickle of more than weights"
CODE = "brings code of its own, which is never run here"


class Harm:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path):
    """A file that is there once something of a model was run."""
    path = tmp_path / "run"
    yield path
    assert not path.exists()


def put_code(folder, mark, auto_class, name="config.json"):
    """Let a model folder ask for a class of its own."""
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / name).read_text())
    config |= {
        "model_type": "own_type",
        "auto_map": {auto_class: "own.Own", "AutoConfig": "own.Own"},
    }
    (folder / name).write_text(json.dumps(config))


def put_pickle(folder, harm, name="pytorch_model.bin", weights=None):
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    torch.save({**(weights or {}), **({"harm": harm} if harm else {})}, folder / name)


@pytest.fixture
def text_model(small_encoder, tmp_path):
    return shutil.copytree(small_encoder, tmp_path / "text")


@pytest.fixture(params=["transformers", "timm"])
def image_model(request, tmp_path):
    """A folder of either library, whose weights are pytorch_model.bin, and these weights."""
    folder = tmp_path / "image"
    folder.mkdir()
    if request.param == "timm":
        import timm

        net = timm.create_model("resnet10t", num_classes=3)
        config = {
            "architecture": "resnet10t",
            "num_classes": 3,
            "pretrained_cfg": {"num_classes": 3},
        }
        (folder / "config.json").write_text(json.dumps(config))
    else:
        from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
        config = ViTConfig(image_size=16, patch_size=8, num_hidden_layers=1, **sizes)
        net = ViTForImageClassification(config)
        net.save_pretrained(folder)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder, net.state_dict()


def refusal(load, *arguments, **options):
    with pytest.raises(InputError) as found:
        load(*arguments, **options)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_text_models(text_model, mark, cli, tmp_path):
    put_pickle(text_model, Harm(mark))
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    given = ("--method", "dq", "--n-bins", 1, "--keep-ratio", 0.5, "--embedding-model", text_model)
    done = cli("compress", "d.jsonl", *given, code=2)
    assert PICKLE in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    put_code(text_model, mark, "AutoModel")
    assert CODE in refusal(load_encoder, str(text_model))
    modules = [{"idx": 0, "name": "0", "path": "", "type": "own.Own"}]
    (text_model / "modules.json").write_text(json.dumps(modules))
    assert CODE in refusal(load_encoder, str(text_model))


def test_image_models(image_model, mark):
    folder, weights = image_model
    put_pickle(folder, None, weights=weights)
    assert load_image_model(str(folder)).net is not None  # a pickle of weights alone is fine
    put_pickle(folder, Harm(mark), weights=weights)
    assert PICKLE in refusal(load_image_model, str(folder))
    if "architecture" in (folder / "config.json").read_text().split("architectures")[0]:
        return
    put_code(folder, mark, "AutoModelForImageClassification")
    assert CODE in refusal(load_image_model, str(folder))


def test_masked_autoencoders(tmp_path, mark):
    save_mae(make_small_mae(16, 8, 16, 1, 16, 1), [0.5] * 3, [0.5] * 3, tmp_path / "mae")
    put_pickle(tmp_path / "mae", Harm(mark))
    assert PICKLE in refusal(load_mae, tmp_path / "mae")
    put_code(tmp_path / "mae", mark, "ViTMAEForPreTraining")
    assert CODE in refusal(load_mae, tmp_path / "mae")


def test_adapters(text_model, mark):
    """An adapter beside a model is of peft, and its weights may be a pickle too."""
    config = {"peft_type": "LORA", "target_modules": ["query"], "r": 2, "task_type": None}
    config["base_model_name_or_path"] = str(text_model)
    (text_model / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"harm": Harm(mark)}, text_model / "adapter_model.bin")
    assert "cannot load the model" in refusal(load_encoder, str(text_model))


def test_models_to_train(text_model, mark):
    put_code(text_model, mark, "AutoModelForCausalLM")
    assert CODE in refusal(check_model, str(text_model), needs_chat_template=False)
