"""The recipe of experts, tiny: once by its launcher, then killed and gone on with."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from launching import ONE, TWO, launch
from PIL import Image as Pictures
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from dq_multimodal.condensation.experts import Trajectory, open_experts
from dq_multimodal.training import record

FILES = ["expert-0000.safetensors", "expert-0001.safetensors"]


def train(work, out, *flags, launcher=(), code=0):
    how = {"n_experts": 2, "num_train_epochs": 3, "per_device_train_batch_size": 16}
    how |= {
        "learning_rate": 0.1,
        "net_width": 4,
        "dataset_name": work / "digits.parquet",
        "output_dir": out,
    }
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    script = "recipes/train_experts.py"
    return launch(script, *words, *flags, launcher=launcher, code=code)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    digits = load_digits()
    images = [
        Pictures.fromarray((image * 16).clip(0, 255).astype("uint8"))
        for image in digits.images[:60]
    ]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    rows = {"image": images, "label": digits.target[:60].tolist()}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "digits.parquet")
    done = train(folder, folder / "whole", "--augment", "crop", "rotate", launcher=ONE)
    assert "2 experts of convnet, each of 3 epochs" in done.stdout
    return folder


def test_a_folder_of_experts(work):
    about = open_experts(work / "whole").about
    assert (about["n_experts"], about["n_epochs"], about["side"]) == (2, 3, 8)
    assert (about["net"], about["net_width"], about["channels"]) == ("convnet", 4, 1)
    assert about["asked"]["learning_rate"] == 0.1
    names = {path.name for path in (work / "whole").iterdir()}
    assert names == {*FILES, "experts.json", "metrics.json", "request.json"}
    losses = json.loads((work / "whole" / "metrics.json").read_text())["losses"]
    assert all(each[-1] < each[0] for each in losses)
    assert load_file(work / "whole" / FILES[0])["classifier.bias"].shape == (4, 10)
    again = train(work, work / "whole", "--augment", "crop", "rotate")
    assert "is already complete" in again.stdout
    assert "another augment" in train(work, work / "whole", code=2).stderr


def test_training_that_was_killed_goes_on(work, tmp_path, monkeypatch):
    note, noted = Trajectory.note, []

    def stop(self, net, loss):
        note(self, net, loss)
        noted.append(loss)
        if len(noted) == 5:
            raise SystemExit(9)

    monkeypatch.setattr(record, "SAVE_SECONDS", 0)
    flags = ("--augment", "crop", "rotate")
    with monkeypatch.context() as patch:
        patch.setattr(Trajectory, "note", stop)
        train(work, tmp_path, *flags, code=9)
    assert {path.name for path in tmp_path.glob("expert*")} == {FILES[0], "expert-0001.partial"}
    train(work, tmp_path, *flags)
    for name in FILES:  # the launcher's had one thread
        found, wanted = (load_file(folder / name) for folder in (tmp_path, work / "whole"))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_make_the_same_experts(work, tmp_path):
    train(work, tmp_path, "--augment", "crop", "rotate", launcher=TWO)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (work / "whole" / name).read_bytes()


def test_flags_that_are_wrong(work, tmp_path):
    for flags in (("--augment", "blur"), ("--net_width", 0), ("--n_experts", 0)):
        done = train(work, tmp_path, *flags, code=2)
        assert done.stderr.strip().count("\n") == 0
        assert done.stderr.startswith(f"error: {flags[0][2:]} must")
