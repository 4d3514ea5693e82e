"""A tiny real set: 8 px noise on a ground whose shade is the class."""

import numpy as np
import torch

from dq_multimodal.condensation.pictures import Real


def make_real(n_rows=30, n_classes=3, channels=1, seed=0, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    classes = np.arange(n_rows) % n_classes
    pixels = rng.integers(0, 60, (n_rows, channels, 8, 8)) + 60 * classes[:, None, None, None]
    images = torch.from_numpy(pixels.astype(np.uint8))
    mean, spread = (torch.full((channels, 1, 1), value, dtype=dtype) for value in (0.4, 0.2))
    names = tuple(f"c{k}" for k in range(n_classes))
    labels = tuple(range(n_classes))
    return Real(images, torch.from_numpy(classes), labels, names, np.arange(n_rows), mean, spread)
