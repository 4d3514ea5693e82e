"""Distribution matching (DM): real and synthetic images have the same mean in random nets."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dq_multimodal.condensation.augmentation import draw_augmentation
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.nets import Net
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.condensation.synthetic import Synthetic


def match_distributions(
    real: Real, synthetic: Synthetic, config: CondenseConfig, draw_net: Callable[[], Net]
) -> Iterator[Callable[[Synthetic], Tensor]]:
    r"""Give the loss of one random net (Zhao and Bilen, WACV 2023, arXiv:2110.04181, Eq. 6).

    $$\sum_k \Big\| \frac{1}{|B_k|} \sum_{x \in B_k} \psi(A(x))
      - \frac{1}{|S_k|} \sum_{s \in S_k} \psi(A(s)) \Big\|^2$$

    with $\psi$ what the last layer of a net with random weights reads, $A$ one operation of DSA a
    class, and $B_k$ `real_batch` real images of class k.
    """
    net = draw_net()
    augments, means = [], []
    for k in range(real.n_classes):
        augments.append(draw_augmentation(config.augment, real.side))
        with torch.no_grad():
            means.append(net.embed(augments[k](real.draw(k, config.real_batch))).mean(0))

    def loss_of(some: Synthetic) -> Tensor:
        images = [augments[k](some.of_class(k)) for k in range(some.n_classes)]
        found = net.embed(torch.cat(images)).view(some.n_classes, some.per_class, -1).mean(1)
        return (found - torch.stack(means)).square().sum()

    yield loss_of
