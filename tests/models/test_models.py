"""Image models from timm, transformers and folders of ours, built in code and read back."""

import json

import numpy as np
import pytest
import timm
import torch
from nasty_images import picture
from PIL import Image

from dq_multimodal import InputError
from dq_multimodal.config import DEFAULT_IMAGE_MODEL
from dq_multimodal.models.classifiers import (
    SHORT_NAMES,
    Classifier,
    build_classifier,
    read_classifier,
    save_classifier,
)
from dq_multimodal.models.image import find_middle, load_image_model
from dq_multimodal.models.locate import hash_weights, own_device
from dq_multimodal.models.text import load_encoder


def pictures(n=3, size=(40, 30)):
    return [picture(size, seed=k) for k in range(n)]


def look(model, images):
    return model.look(np.stack([model.prepare(image) for image in images]))[:2]


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A timm model as `local-dir:` reads it, with its own way of cutting pictures."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", pretrained=False, num_classes=5)
    config = {"input_size": (3, 64, 64), "crop_pct": 0.8, "interpolation": "bilinear"}
    net.pretrained_cfg.update({**config, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)})
    timm.models.save_for_hf(net, folder)
    return folder, net.eval()


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_timm_folders(timm_folder, prefix):
    folder, net = timm_folder
    model = load_image_model(f"{prefix}{folder}")
    assert (model.size, model.crop, model.n_classes) == (64, 0.8, 5)
    assert model.mean == (0.4, 0.5, 0.6)
    images = pictures(size=(100, 80))
    features, logits = look(model, images)
    data = timm.data.resolve_model_data_config(net)
    transform = timm.data.create_transform(**data, is_training=False)
    batch = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        want = net.forward_head(net.forward_features(batch), pre_logits=True)
        np.testing.assert_allclose(features, want, atol=0.05 * want.abs().max())
        assert np.corrcoef(logits.ravel(), net(batch).ravel())[0, 1] > 0.99
    assert features.shape == (3, model.dimension())


@pytest.mark.parametrize("kind", ["classifier", "backbone"])
def test_transformers_folders(tmp_path, kind):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=4,
    )
    torch.manual_seed(0)
    whole = ViTForImageClassification if kind == "classifier" else ViTModel
    net = whole(config).eval()
    net.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        tmp_path
    )
    model = load_image_model(str(tmp_path))
    image = picture((32, 32))
    features, logits = look(model, [image])
    batch = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        if kind == "classifier":
            want = net.vit(batch).last_hidden_state[:, 0]
            np.testing.assert_allclose(logits, net(batch).logits, atol=1e-5)
            assert model.labels == tuple(f"LABEL_{k}" for k in range(4))
        else:
            want = net(batch).pooler_output
            assert logits is None
    np.testing.assert_allclose(features, want, atol=1e-5)
    assert model.dimension() == 24


def test_a_net_that_names_stages_it_does_not_have():
    from torch import nn

    class Odd(nn.Module):
        feature_info = ({"module": "stage.0"}, {"module": "stage.1"})

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity()])

    net = Odd()
    net.feature_info = list(Odd.feature_info)
    assert find_middle(net) is net.layers[1]
    assert find_middle(nn.Linear(2, 2)) is None


def test_folders_of_ours(small_classifier):
    model = load_image_model(str(small_classifier))
    net, found = read_classifier(small_classifier)
    image = picture((16, 16))
    features, logits = look(model, [image])
    batch = (torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    with torch.no_grad():
        np.testing.assert_allclose(logits, net.eval()(batch), atol=1e-5)
    assert features.shape == (1, 128) == (1, model.dimension())
    assert model.labels == found.labels == ("cat", "dog", "emu")
    assert not any(module._forward_pre_hooks for module in model.net.modules())


def test_a_folder_is_pinned_by_its_weights(small_classifier, tmp_path):
    net, found = read_classifier(small_classifier)
    save_classifier(net, found, tmp_path / "same")
    with torch.no_grad():
        net.fc.bias[0] += 1
    save_classifier(net, found, tmp_path / "other")
    same, other, first = (
        hash_weights(str(f)) for f in (tmp_path / "same", tmp_path / "other", small_classifier)
    )
    assert same == first != other
    assert hash_weights("resnet18") is hash_weights(None) is None


SMALL = [(name, 32) for name in ("resnet10-narrow", "resnet18", "resnet50", *SHORT_NAMES)]


@pytest.mark.parametrize(("name", "size"), [*SMALL, ("resnet10-narrow", 8), ("resnet18", 8)])
def test_classifiers_take_small_pictures(name, size):
    net = build_classifier(name, 7, size).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_small_stems_keep_the_resolution_of_the_literature():
    net = build_classifier("resnet18", 10, 32).eval()
    with torch.no_grad():
        assert net.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    n_parameters = sum(p.numel() for p in net.parameters())
    assert n_parameters == 11_173_962  # the CIFAR ResNet-18 of 10 classes
    large = build_classifier("resnet18", 10, 224).eval()
    assert large.conv1.kernel_size == (7, 7)


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no model: it has no config\.json"):
        load_image_model(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="neither a folder, a timm model nor a Hub id"):
        load_image_model("no-such-net")
    with pytest.raises(InputError, match=r"the Hub is out of reach.*train_extractor"):
        load_image_model(DEFAULT_IMAGE_MODEL)
    with pytest.raises(InputError, match="no model nope: wanted resnet10-narrow, vit"):
        build_classifier("nope", 2, 32)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "classifier.json").write_text(json.dumps({"model": "resnet10-narrow"}))
    with pytest.raises(InputError, match="holds no classifier that can be read"):
        load_image_model(str(broken))


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_weights_are_one_line(small_classifier, tmp_path, damage):
    net, found = read_classifier(small_classifier)
    save_classifier(net, found, tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "other":
        save_classifier(build_classifier("resnet10-narrow", 9, 16), found, tmp_path)
    else:
        weights.write_bytes(weights.read_bytes()[: 1000 if damage == "cut" else 0])
    with pytest.raises(InputError, match="holds no classifier that can be read"):
        load_image_model(str(tmp_path))


def test_grey_and_wide_pictures_are_cut_to_squares(small_classifier):
    model = load_image_model(str(small_classifier))
    wide = Image.fromarray(np.zeros((10, 50, 3), dtype=np.uint8))
    assert model.prepare(wide).shape == (16, 16, 3)
    assert Classifier("x", 8, 2, ("a", "b"), (0.5,), (0.5,)).crop == 1.0


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_numbers_of_the_encoder(small_encoder, small_classifier, dtype):
    texts, pixels = ["the quick fox"], np.full((1, 16, 16, 3), 99, dtype=np.uint8)
    encoder = load_encoder(str(small_encoder), "cpu", dtype)
    model = load_image_model(str(small_classifier), "cpu", dtype)
    wanted = "float32" if dtype == "auto" else dtype
    assert encoder.describe()["dtype"] == model.describe()["dtype"] == wanted
    plain = load_encoder(str(small_encoder)).encode(texts)
    plain = plain, *load_image_model(str(small_classifier)).look(pixels)[:2]
    found = encoder.encode(texts), *model.look(pixels)[:2]
    for is_like, exact in zip(found, plain, strict=True):
        assert is_like.dtype == np.float32
        np.testing.assert_allclose(is_like, exact, atol=0.05)
        assert np.array_equal(is_like, exact) == (wanted == "float32")


def test_a_device_that_is_not_there_is_one_clear_line(small_encoder, small_classifier):
    for load, place in ((load_encoder, small_encoder), (load_image_model, small_classifier)):
        with pytest.raises(InputError, match=r"^no device gpu: .+"):
            load(str(place), "gpu")


def test_a_rank_has_its_own_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for size, local_rank, wanted in (
        *(("", "", None), ("1", "0", None), ("8", "", None)),
        *(("8", "3", "cuda:3"), ("8", "6", "cuda:2")),
    ):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert own_device() == wanted
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert own_device() == "cpu"
