"""Question answering on pictures: a small net reads a picture and the words of a question.

The training is that of `harness.images`: settings, augmentation, schedule. A row is a question, and
several rows may share a picture; a bundle holds every picture once. Answers are classes.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dq_multimodal.config import InputError
from harness import images
from harness.bundle import Bundle
from harness.images import Protocol as Protocol
from harness.suite import Job

PIXELS, FEATURES = "cnn and words", "features and words"
"""Nets: one that learns to see from scratch, and one on the frozen features of an encoder."""
WIDTH = 128
"""Numbers in the vector of a picture and in that of a question."""
LEAST_SPREAD = 1e-6
"""Is added to the deviation of a feature, which may be 0."""
DROPPED = 0.3
"""Share of the features that a training row does not see."""


def split_words(text: str) -> list[str]:
    """Give the words of a question in lower case, without marks."""
    return re.findall(r"\w+", text.lower())


def number_words(texts: Iterable[str], known: dict[str, int]) -> np.ndarray:
    """Give the numbers of the words of each text, (n, w) int16; 0 is no word, or an unknown one.

    Args:
        texts: n questions; w is the number of words of the longest one.
        known: Numbers of words, from 1.
    """
    rows = [[known.get(word, 0) for word in split_words(text)] for text in texts]
    found = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int16)
    for row, numbers in zip(found, rows, strict=True):
        row[: len(numbers)] = numbers
    return found


@dataclass(frozen=True)
class Questions(images.Pictures):
    """Pictures and the questions on them.

    `train` and `test` hold every picture once: its pixels, (m, h, w, 3) uint8, or its features,
    (m, d) float32.

    Attributes:
        train_places: (n,) int64, which picture of `train` a row asks about.
        train_words: (n, w) int64, what `number_words` gave.
        test_places: The same of the test rows.
        test_words: The same of the test rows.
        n_words: How many numbers of words there are, 0 among them.
    """

    train_places: Tensor
    train_words: Tensor
    test_places: Tensor
    test_words: Tensor
    n_words: int

    def start(
        self,
        name: str,
        rows: Tensor,
        batch: int,
        protocol: Protocol,
        generator: torch.Generator,
        chances: Tensor | None,
    ) -> tuple[nn.Module, Iterator[tuple[tuple[Tensor, ...], Tensor]]]:
        """Build a net by its name, and give the batches that it reads: pictures and words."""
        places, words = self.train_places[rows], self.train_words[rows]
        sizes = (self.n_words, self.n_classes)
        drawn: Iterator[tuple[Tensor, Tensor]]
        if name == PIXELS:
            mean, spread = images.measure_colours(self.train, places)
            net: nn.Module = images.Colours(PictureAndWords(make_cnn(), 64, *sizes), mean, spread)
            fill = mean.round().to(torch.uint8).to(rows.device)
            drawn = images.make_batches(self, places, batch, protocol, fill, generator, chances)
        else:
            net = PictureAndWords(nn.Dropout(DROPPED), self.train.shape[1], *sizes)
            drawn = self._read_features(places, batch, generator, chances)
        return net, (((seen, words[own]), own) for seen, own in drawn)

    def _read_features(
        self, places: Tensor, batch: int, generator: torch.Generator, chances: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the features of batches of rows, and the places of the rows."""
        while True:
            order = images.draw_order(len(places), batch, generator, chances).to(places.device)
            yield from ((self.train[places[own]], own) for own in order.split(batch))

    def tests(self, n_together: int) -> Iterator[tuple[Tensor, ...]]:
        """Give pictures and words of all test rows, so many at a time."""
        parts = (self.test_places.split(n_together), self.test_words.split(n_together))
        return ((self.test[places], words) for places, words in zip(*parts, strict=True))

    def measure(self, is_right: Tensor) -> dict[str, float]:
        """Give the accuracy of all rows, and the mean of the accuracies of each answer."""
        answers = self.test_labels.unique()
        shares = [is_right[self.test_labels == answer].double().mean() for answer in answers]
        mean = 100 * float(torch.stack(shares).mean())
        return super().measure(is_right) | {"accuracy, mean over answers": mean}


def make_cnn() -> nn.Module:
    """Build three convolutions for pictures of 32 px, which end with the largest of each channel.

    There are 64 channels, and 0.04 million parameters.
    """
    stem = nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False)
    return nn.Sequential(
        *(stem, nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(images._conv(32, 48, pool=True), images._conv(48, 64)),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    )


class PictureAndWords(nn.Module):
    """A net that answers from the vector of a picture, the mean vector of the words, and both.

    A hidden layer reads the picture's vector v, the question's q, and their product, by which the
    first nets for such questions joined them (arXiv:1505.00468).

    Args:
        look: Makes a vector of each picture.
        n_seen: Numbers in it.
        n_words: Numbers of words, 0 among them.
        n_classes: Of answers.
    """

    def __init__(self, look: nn.Module, n_seen: int, n_words: int, n_classes: int) -> None:
        super().__init__()
        self.look = look
        self.words = nn.EmbeddingBag(n_words, 64, mode="mean", padding_idx=0)
        self.from_picture, self.from_words = nn.Linear(n_seen, WIDTH), nn.Linear(64, WIDTH)
        self.answer = nn.Sequential(
            nn.Linear(3 * WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, n_classes)
        )

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        """Give the logits, (n, classes), of n pictures and of their (n, k) words."""
        v = torch.relu(self.from_picture(self.look(pictures)))
        q = torch.tanh(self.from_words(3 * self.words(words)))
        return self.answer(torch.cat([v, q, v * q], dim=1))


@functools.lru_cache(maxsize=2)
def load_questions(bundle: Bundle, task: str, net: str, device: torch.device) -> Questions:
    """Move pictures and questions of a task onto a device, once for all cells of a net.

    Features are shifted and scaled by TASK/train/scale. Neither it nor the number of words depends
    on what else the bundle holds.
    """
    if net not in (PIXELS, FEATURES):
        raise InputError(f"the net of trainer vqa must be {PIXELS!r} or {FEATURES!r}, got {net!r}")
    seen = "images" if net == PIXELS else "features"

    def read(split: str, part: str) -> np.ndarray:
        return np.asarray(bundle.array(f"{task}/{split}/{part}"))

    train, test = read("train", seen), read("test", seen)
    if net == FEATURES:
        mean, spread = read("train", "scale")
        train, test = ((part - mean) / (spread + LEAST_SPREAD) for part in (train, test))
    labels = [read(split, "labels") for split in ("train", "test")]
    asked = [read(split, part) for split in ("train", "test") for part in ("places", "words")]
    numbers = [torch.tensor(a.astype(np.int64), device=device) for a in (*labels, *asked)]
    pictures = [torch.tensor(a, device=device) for a in (train, test)]
    n_words = bundle.array(f"{task}/n_words").item()
    return Questions(pictures[0], numbers[0], pictures[1], *numbers[1:], n_words)


def train(
    job: Job, bundle: Bundle, device: torch.device, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Train a net on the kept rows of a task, and test it on all test rows.

    Args:
        job: The cell; `job.rows` are positions in the packed rows.
        bundle: Holds TASK/train/images and features, of every picture once, and labels, places and
            words of every row (see `Questions`), and the same of test; TASK/train/scale, (2, d),
            mean and deviation of the features of all training pictures; and TASK/n_words.
        device: Where it trains.
        progress: Is told the share of the work that is done, rising to 1; what it raises passes.

    Returns:
        What `harness.images.train` gives, and a second metric: the accuracies of the answers,
        averaged.
    """
    data = load_questions(bundle, job.task, job.net, device)
    return images.train_on(job, data, device, progress)
