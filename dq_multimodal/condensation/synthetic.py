"""The set that is learnt: images, and where a method learns them labels and a learning rate."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Synthetic:
    """A synthetic set; row j * n_classes + k is the j-th image of class k.

    So the first m * n_classes rows are a set of m images a class.

    Attributes:
        images: (n, c, h, w), normalised like the real ones.
        n_classes: n is a multiple of it.
        targets: Learnt labels, (n, n_classes) float32; None: the labels are the classes.
        rate: The learning rate with which a net is to be trained on the set, (), where it is
            learnt.
    """

    images: Float[Tensor, "n c h w"]
    n_classes: int
    targets: Float[Tensor, "n classes"] | None = None
    rate: Float[Tensor, ""] | None = None

    @property
    def classes(self) -> Int[Tensor, " n"]:
        """Class of every row."""
        return torch.arange(len(self.images), device=self.images.device) % self.n_classes

    @property
    def per_class(self) -> int:
        """Images of each class."""
        return len(self.images) // self.n_classes

    def of_class(self, k: int) -> Float[Tensor, "m c h w"]:
        """Give the images of a class, in their order."""
        return self.images[k :: self.n_classes]

    def prefix(self, per_class: int) -> "Synthetic":
        """Give the set of the first so many images of each class."""
        n = per_class * self.n_classes
        targets = None if self.targets is None else self.targets[:n]
        return replace(self, images=self.images[:n], targets=targets)

    @property
    def learnt(self) -> dict[str, Tensor]:
        """What is learnt, by name."""
        found = {"images": self.images, "targets": self.targets, "rate": self.rate}
        return {name: value for name, value in found.items() if value is not None}

    def detach(self) -> "Synthetic":
        """Give the set as it is now, without gradients and without sharing memory."""
        copies: dict[str, Any] = {k: v.detach().clone() for k, v in self.learnt.items()}
        return replace(self, **copies)
