"""The training loop of classifiers and its pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from dq_multimodal import InputError
from dq_multimodal.models.classifiers import build_classifier
from dq_multimodal.training import record
from dq_multimodal.training.classify import ClassifierArguments, train_classifier
from dq_multimodal.training.pictures import (
    Pictures,
    draw_shifts,
    shift_and_flip,
)
from dq_multimodal.training.record import make_accelerator

COLOURS = np.array([(200, 60, 60), (60, 180, 70), (70, 70, 210)])


def make_pictures(n=96, size=8, seed=0, missing=()):
    rng = np.random.default_rng(seed)
    classes = np.arange(n) % 3
    pixels = COLOURS[classes][:, None, None] + rng.integers(-40, 40, (n, size, size, 3))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)

    def read(rows):
        return [None if k in missing else Image.fromarray(pixels[k]) for k in rows]

    return Pictures(read, classes, size), pixels


def arguments(**more):
    settings = {"num_train_epochs": 6, "per_device_train_batch_size": 16, "learning_rate": 0.05}
    return ClassifierArguments(**{**settings, **more})


def train(folder, args, **more):
    pictures, _ = make_pictures(**more)
    test, _ = make_pictures(n=60, seed=1)
    torch.manual_seed(0)
    net = build_classifier("resnet10-narrow", 3, 8)
    found = train_classifier(net, pictures, test, args, make_accelerator(), folder)
    return net, found


def test_it_learns_and_counts(tmp_path):
    _, found = train(tmp_path, arguments())
    assert found["accuracy"] > 0.9
    assert found["rows_tested"] == 60
    assert found["steps"] == 36
    assert not found["is_resumed"]


def test_max_steps_wins_over_epochs(tmp_path):
    assert train(tmp_path / "a", arguments(max_steps=7))[1]["steps"] == 7
    assert train(tmp_path / "b", arguments(max_steps=-1, num_train_epochs=1))[1]["steps"] == 6


def test_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    short = arguments(num_train_epochs=4)
    whole, _ = train(tmp_path / "whole", short)
    monkeypatch.setattr(record, "SAVE_SECONDS", 0.0)
    save = record.Checkpoints.save

    def stop_after_third(self, n_done):
        save(self, n_done)
        if n_done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(record.Checkpoints, "save", stop_after_third)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", short)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["epoch-00003"]
    monkeypatch.setattr(record.Checkpoints, "save", save)
    resumed, found = train(tmp_path / "cut", short)
    assert found["is_resumed"]
    assert found["steps"] == 24
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_rows_without_picture_or_class_are_named(tmp_path):
    pictures, _ = make_pictures(missing=(4, 9))
    pictures.classes[7] = -1
    again = Pictures(pictures.read, pictures.classes, 8)
    assert again.unused == [4, 7, 9]
    assert len(again.rows) == 93
    with pytest.raises(InputError, match="has both a class and a picture"):
        Pictures(pictures.read, np.full(96, -1), 8)


def test_pictures_from_memory_and_from_disk_are_the_same(monkeypatch):
    cached, pixels = make_pictures()
    monkeypatch.setattr("dq_multimodal.training.pictures.MEMORY_BYTES", 0)
    fresh = Pictures(cached.read, cached.classes, 8)
    for made in (cached, fresh):
        got, rows = made.__getitems__([5, 2, 80])
        np.testing.assert_array_equal(got, pixels[[5, 2, 80]])
        assert rows.tolist() == [5, 2, 80]
    fresh.is_augmented, fresh.seed = True, (0, 1)
    first = fresh.__getitems__([5])[0]
    np.testing.assert_array_equal(first, fresh.__getitems__([5])[0])
    fresh.seed = (0, 2)
    assert (first != fresh.__getitems__([5])[0]).any()


def test_shift_and_flip_against_a_loop():
    images = torch.randint(0, 256, (40, 6, 5, 3), dtype=torch.uint8)
    moves, mirrors = draw_shifts(40, torch.Generator().manual_seed(0), padding=2)
    got = shift_and_flip(images, moves, mirrors, padding=2)
    for k, (image, made) in enumerate(zip(images, got, strict=True)):
        framed = torch.zeros(10, 9, 3, dtype=torch.uint8)
        framed[2:8, 2:7] = image
        y, x = moves[:, k].tolist()
        crop = framed[y : y + 6, x : x + 5]
        assert torch.equal(made, crop.flip(1) if mirrors[k] else crop)
    assert set(moves.flatten().tolist()) == set(range(5))
    assert 8 < int(mirrors.sum()) < 32


def test_statistics_against_numpy():
    pictures, pixels = make_pictures()
    mean, std = pictures.statistics
    values = pixels.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, values.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(std, values.std(axis=0), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs must be a whole number"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(InputError, match=message):
        arguments(**change)


def test_divergence_is_said(tmp_path):
    with pytest.raises(InputError, match="training diverged"):
        train(tmp_path, arguments(learning_rate=1e6, num_train_epochs=2))
