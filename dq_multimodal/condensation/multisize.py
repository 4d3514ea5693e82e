"""Multisize condensation (MDC): which prefix of the set learns next, and which images rest."""

from dataclasses import dataclass, field

import torch

from dq_multimodal.condensation.nets import Net
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.condensation.synthetic import Synthetic

N_NETS = 4
"""Random nets that measure the feature distance."""
MOST_REAL = 512
"""Real images a class whose mean features stand for those of all."""


@dataclass
class Prefixes:
    """The most learnable prefix of a set: (Multisize Dataset Condensation, ICLR 2024), section 3.

    Attributes:
        chosen: Images a class of the most learnable prefix; the first is 1.
        frozen: So many images of each class are not changed until the next choice.
        distances: Feature distance of each prefix 1 ... n - 1 at the last choice; empty before.
    """

    chosen: int = 1
    frozen: int = 0
    distances: list[float] = field(default_factory=list)

    def choose(self, distances: list[float]) -> None:
        r"""Choose by the feature distances of the prefixes 1 ... n - 1 by now.

        Eq. 9: the prefix whose distance changed most since the last choice,
        $\arg\max_n |F_t(S_{[n]}) - F_{t - \Delta t}(S_{[n]})|$, the smallest of equal ones.
        Eq. 10: where the prefix is larger than the one before, the images of that one are frozen,
        which would lose what they learnt; else all of the set learns.
        """
        before = self.distances
        self.distances = distances
        if not before:
            return
        changes = [abs(now - then) for now, then in zip(distances, before, strict=True)]
        chosen = 1 + changes.index(max(changes))
        self.frozen = self.chosen if chosen > self.chosen else 0
        self.chosen = chosen


class FeatureDistance:
    r"""The feature distance of the prefixes of a set.

    $F(S_{[n]}) = \sum_k \| \bar f(S_{k,[n]}) - \bar f(B_k) \|^2$, the mean over a few nets of
    random weights, f what their last layer reads. One pass over the whole set gives it for all
    prefixes (cumulative means). Departure: the paper's f is the net of the moment; here the nets
    are the same at all times, so that a distance changes only where images did.
    """

    def __init__(self, real: Real, nets: list[Net]) -> None:
        self.nets = nets
        with torch.no_grad():
            self.means = [
                torch.stack(
                    [n.embed(real.draw(k, MOST_REAL)).mean(0) for k in range(real.n_classes)]
                )
                for n in nets
            ]

    @torch.no_grad()
    def __call__(self, synthetic: Synthetic) -> list[float]:
        """Give the distances of the prefixes of 1 ... n - 1 images a class."""
        n, total = synthetic.per_class, torch.zeros(synthetic.per_class)
        for net, means in zip(self.nets, self.means, strict=True):
            found = net.embed(synthetic.images).view(n, synthetic.n_classes, -1).cumsum(0)
            found = found / torch.arange(1, n + 1, device=found.device).view(-1, 1, 1)
            total += (found - means).square().sum((1, 2)).cpu() / len(self.nets)
        return total[:-1].tolist()
