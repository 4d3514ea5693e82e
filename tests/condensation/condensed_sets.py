"""Drawn pictures, and condensed sets that nobody had to learn."""

import io

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from dq_multimodal.condensation import pipeline
from dq_multimodal.condensation.loop import History
from dq_multimodal.condensation.synthetic import Synthetic

NAMES = ["ant", "bee", "cow"]


def png(pixels):
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def draw_pictures(n_rows=24, side=8, is_grey=False, seed=0):
    """Squares of noise, the brighter the higher the class; grey ones without a last axis."""
    shape = (n_rows, side, side) if is_grey else (n_rows, side, side, 3)
    noise = np.random.default_rng(seed).integers(0, 60, shape)
    brightness = 60 * (np.arange(n_rows) % len(NAMES))
    return (noise + brightness.reshape(-1, *[1] * (len(shape) - 1))).astype(np.uint8)


def make_rows(n_rows=24, label=None, labels=None, **pictures):
    """A dataset of drawn pictures, `img`, with the class of each, `kind`."""
    files = [{"bytes": png(p), "path": None} for p in draw_pictures(n_rows, **pictures)]
    values = [k % len(NAMES) for k in range(n_rows)]
    values = values if labels is None else [labels[k] for k in values]
    features = Features({"img": Image(), "kind": label or ClassLabel(names=NAMES)})
    return Dataset.from_dict({"img": files, "kind": values}, features)


class Learner:
    """Stands for the loop: gives a set of noise at once.

    Attributes:
        calls: What it was given, call by call.
        soft: Whether it learns labels; rate: the learning rate that it learns.
        choices: Of multisize.
    """

    def __init__(self):
        self.calls, self.soft, self.rate, self.choices = [], False, None, []
        self.n_losses, self.given = 5, None

    def __call__(self, real, config, state, first=None):
        self.calls.append((real, config, first))
        n = config.images_per_class * real.n_classes
        drawn = torch.Generator().manual_seed(config.seed)
        images = torch.randn(n, *real.images.shape[1:], generator=drawn)
        targets = torch.rand(n, real.n_classes, generator=drawn) if self.soft else None
        rate = None if self.rate is None else torch.tensor(self.rate)
        self.given = Synthetic(images, real.n_classes, targets, rate)
        state.write_bytes(b"a state")
        return self.given, History([1 / (k + 1) for k in range(self.n_losses)], self.choices)


def stand_in(monkeypatch):
    """Let condense() learn nothing; gives the learner."""
    learner = Learner()
    monkeypatch.setattr(pipeline, "run_loop", learner)
    return learner


LABELS = {
    "names": (ClassLabel(names=["none", *NAMES]), [1, 2, 3]),
    "numbers": (Value("int64"), [7, 30, 200]),
    "texts": (Value("string"), ["x", "y", "é | z"]),
    "truth": (Value("bool"), [False, True, True]),
}
"""Types of labels, and the values of the three classes; of the last, two are one."""
