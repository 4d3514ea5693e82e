"""The folder of experts: what goes in comes out, and what does not fit is said in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_real import make_real

from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.experts import (
    FILE,
    Trajectory,
    describe_experts,
    file_name,
    open_experts,
    write_about,
)
from dq_multimodal.condensation.nets import build_net
from dq_multimodal.config import InputError
from dq_multimodal.training.experts import ExpertArguments, train_expert

N_EPOCHS = 3


class Bar:
    """Counts epochs, and stops training after some."""

    def __init__(self, most=99):
        self.n, self.most = 0, most

    def set_postfix(self, **_):
        pass

    def update(self):
        self.n += 1
        if self.n == self.most:
            raise KeyboardInterrupt


def config(folder=None, **options):
    how = {"augment": ("crop",), "net_width": 3}
    if folder:
        how |= {"method": "mtt", "experts": str(folder), "expert_epochs": 1, "max_start_epoch": 2}
    return CondenseConfig("x", **(how | options))


def train(folder, k, bar=None):
    args = ExpertArguments(num_train_epochs=N_EPOCHS, per_device_train_batch_size=8)
    trajectory = Trajectory(folder, k, N_EPOCHS)
    train_expert(trajectory, k, make_real(), config(), args, bar or Bar())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts")
    for k in range(2):
        train(path, k)
    about = {"n_experts": 2, "n_epochs": N_EPOCHS, "learning_rate": 0.01}
    write_about(path, about | describe_experts(make_real(), config()))
    return path


def test_experts_are_read_as_they_were_trained(folder):
    experts = open_experts(folder)
    experts.check(make_real(), config(folder))
    shapes = {n: p.shape for n, p in build_net("convnet", 3, 1, 8, 3).named_parameters()}
    found = [[experts.read(k, epoch) for epoch in range(N_EPOCHS + 1)] for k in range(2)]
    for of_one in found:
        assert all({n: p.shape for n, p in each.items()} == shapes for each in of_one)
    whole = load_file(folder / file_name(1))
    assert torch.equal(whole["classifier.weight"][2], found[1][2]["classifier.weight"])
    steps = [found[0][k]["classifier.bias"] - found[0][k + 1]["classifier.bias"] for k in range(3)]
    assert all(step.abs().max() > 0 for step in steps)
    assert not torch.equal(found[0][0]["classifier.weight"], found[1][0]["classifier.weight"])
    losses = Trajectory(folder, 0, N_EPOCHS).losses
    assert len(losses) == N_EPOCHS
    assert losses[-1] < losses[0]


def test_one_that_was_stopped_goes_on_to_the_same_numbers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dq_multimodal.training.record.SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 1, Bar(2))
    assert [path.name for path in tmp_path.iterdir()] == ["expert-0001.partial"]
    rest = Bar()
    train(tmp_path, 1, rest)
    assert rest.n == 1
    assert [path.name for path in tmp_path.iterdir()] == [file_name(1)]
    once, twice = load_file(folder / file_name(1)), load_file(tmp_path / file_name(1))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize(
    ("real", "options", "message"),
    [
        ({}, {"net_width": 4}, "have net_width 3, and 4 is wanted"),
        ({}, {"net": "resnet10-narrow"}, "have net convnet, and resnet10-narrow"),
        ({"channels": 3}, {}, "have channels 1, and 3"),
        ({"n_classes": 2}, {}, "have n_classes 3, and 2"),
        ({"seed": 1}, {}, "were trained on other pictures"),
        ({"dtype": torch.float64}, {}, "have mean"),
        ({}, {"max_start_epoch": 3}, "come to 4, and the experts in .* have 3 epochs"),
    ],
)
def test_experts_of_something_else(folder, real, options, message):
    with pytest.raises(InputError, match=message):
        open_experts(folder).check(make_real(**real), config(folder, **options))


def test_folders_that_hold_no_experts(folder, tmp_path):
    with pytest.raises(InputError, match=r"has no experts\.json"):
        open_experts(tmp_path)
    about = json.loads((folder / FILE).read_text())
    for text in ("{", "[1]", "null", json.dumps(about | {"n_experts": "2"}), '{"format": 1}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(InputError, match=r"is not of recipes/train_experts\.py"):
            open_experts(tmp_path)
    (tmp_path / FILE).write_text(json.dumps(about))
    with pytest.raises(InputError, match="cannot be read"):
        open_experts(tmp_path).check(make_real(), config(tmp_path))
    (tmp_path / file_name(0)).write_bytes((folder / file_name(0)).read_bytes()[:-5])
    with pytest.raises(InputError, match="cannot be read"):
        open_experts(tmp_path).read(0, 0)
    (tmp_path / file_name(0)).write_bytes((folder / file_name(0)).read_bytes())
    (tmp_path / FILE).write_text(json.dumps(about | {"n_epochs": 4}))
    with pytest.raises(InputError, match="does not hold 4 epochs"):
        open_experts(tmp_path).check(make_real(), config(tmp_path))
