"""What is taken down of every row in every epoch."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dq_multimodal import InputError
from dq_multimodal.training import record
from dq_multimodal.training.classify import ClassifierArguments, train_classifier
from dq_multimodal.training.dynamics import Dynamics, measure_rows
from dq_multimodal.training.pictures import Pictures
from dq_multimodal.training.record import make_accelerator

TESTS = Path(__file__).parent
N_ROWS, N_EPOCHS, BATCH = 50, 4, 16
UNUSED = (3, 17)


def make_pictures():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (N_ROWS, 8, 8, 3)).astype(np.uint8)
    classes = np.arange(N_ROWS) % 3
    classes[UNUSED[0]] = -1

    def read(rows):
        return [None if k == UNUSED[1] else Image.fromarray(pixels[k]) for k in rows]

    return Pictures(read, classes, 8)


def small_net():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def train(folder, net=None):
    args = ClassifierArguments(
        num_train_epochs=N_EPOCHS, per_device_train_batch_size=BATCH, learning_rate=0.05, seed=5
    )
    dynamics, pictures, net = Dynamics(folder), make_pictures(), net or small_net()
    where = (make_accelerator(), folder)
    found = train_classifier(net, pictures, None, args, *where, dynamics=dynamics)
    dynamics.finish({})
    return found, np.load(folder / "dynamics.npy")


def by_definition(logits, label):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    others = [value for k, value in enumerate(p) if k != label]
    return p[label], max(others), np.linalg.norm(p - np.eye(len(p))[label])


def test_measures_of_a_row_against_the_definition():
    logits = np.array([[2.0, 1.0, -1.0], [0.0, 0.0, 0.0], [-90.0, 90.0, 0.0]])
    got = measure_rows(torch.tensor(logits), torch.tensor([1, 0, 0]))
    wanted = [by_definition(row, label) for row, label in zip(logits, (1, 0, 0), strict=True)]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(got[1], [1 / 3, 1 / 3, np.sqrt(6) / 3], rtol=1e-6)
    np.testing.assert_allclose(got[2], [0, 1, np.sqrt(2)], rtol=1e-6)


def test_every_row_is_noted_once_an_epoch_from_the_pass_that_trains_on_it(tmp_path):
    net, said = small_net(), []
    net.register_forward_hook(lambda module, inputs, logits: said.append(logits.detach().numpy()))
    found, got = train(tmp_path, net)
    pictures = make_pictures()
    n_batches = 3  # 48 rows in batches of at most 16
    assert found["steps"] == len(said) == N_EPOCHS * n_batches
    wanted = np.full((N_EPOCHS, N_ROWS, 3), np.nan)
    for epoch in range(N_EPOCHS):
        order = np.random.default_rng((5, epoch)).permutation(pictures.rows)
        for k, rows in enumerate(np.array_split(order, n_batches)):
            for row, logits in zip(rows, said[epoch * n_batches + k], strict=True):
                wanted[epoch, row] = by_definition(logits, pictures.classes[row])
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-6)
    assert np.isnan(got[:, UNUSED]).all() and np.isfinite(np.delete(got, UNUSED, axis=1)).all()


def test_no_row_is_left_over(tmp_path, monkeypatch):
    """Batches of 9, 9, 8, ... rows: 48 rows are no multiple of 10, and none of 1 row is made."""
    sizes = []
    monkeypatch.setattr(sys.modules[__name__], "BATCH", 10)
    net = small_net()
    net.register_forward_hook(lambda module, inputs, logits: sizes.append(len(logits)))
    _, got = train(tmp_path, net)
    assert sizes[:5] == [10, 10, 10, 9, 9]
    assert np.isfinite(np.delete(got, UNUSED, axis=1)).all()


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_dynamics
from dq_multimodal.training import record
record.SAVE_SECONDS = 0.0
finish_epoch = test_dynamics.Dynamics.finish_epoch
def stop(self, epoch):
    finish_epoch(self, epoch)
    if epoch == 2:  # epochs 0 and 1 are in the checkpoint
        os.kill(os.getpid(), {signal})
test_dynamics.Dynamics.finish_epoch = stop
test_dynamics.train(Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_and_ends_bit_for_bit_the_same(tmp_path):
    _, whole = train(tmp_path / "whole")
    script = KILLED.format(tests=str(TESTS), signal=int(signal.SIGKILL))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "cut")])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "dynamics.npy").exists()
    found, resumed = train(tmp_path / "cut")
    assert found["is_resumed"]
    np.testing.assert_array_equal(resumed.view(np.uint16), whole.view(np.uint16))
    assert not (tmp_path / "cut" / "dynamics.partial.npy").exists()


def test_a_run_that_stopped_after_the_last_epoch_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    _, whole = train(tmp_path)  # its last checkpoint is of the epoch before the last
    _, again = train(tmp_path)
    np.testing.assert_array_equal(again.view(np.uint16), whole.view(np.uint16))
    (tmp_path / "dynamics.npy").unlink()
    with pytest.raises(InputError, match="does not hold the epochs before the checkpoint"):
        train(tmp_path)
