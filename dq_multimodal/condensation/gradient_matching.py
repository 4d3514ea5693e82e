"""Gradient matching (DC): real and synthetic images give a net the same gradient."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from dq_multimodal.condensation.augmentation import draw_augmentation
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.nets import Net, hold_norms
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.condensation.synthetic import Synthetic

NET_RATE, NET_MOMENTUM, NET_DECAY = 0.01, 0.5, 5e-4
"""With which the net is trained."""
NET_BATCH = 256


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    r"""Give the distance of two lists of gradients (arXiv:2006.05929, Eq. 10).

    $\sum_l \sum_i (1 - \cos(A_i, B_i))$ over the layers l and their output nodes i, whose rows of
    gradients are $A_i$ and $B_i$. Of layers with one number a node, biases and the scales of
    normalisations, the cosine is 1 or -1 whatever the images: they are left out.
    """
    pairs = [(a.flatten(1), b.flatten(1)) for a, b in zip(ours, theirs, strict=True) if a.ndim > 1]
    return torch.stack([(1 - cosine_similarity(a, b, dim=1)).sum() for a, b in pairs]).sum()


def match_gradients(
    real: Real, synthetic: Synthetic, config: CondenseConfig, draw_net: Callable[[], Net]
) -> Iterator[Callable[[Synthetic], Tensor]]:
    r"""Give the losses along the training of one net (Zhao et al., ICLR 2021, Algorithm 1).

    Each is $\sum_k D(\nabla_\theta L(S_k), \nabla_\theta L(B_k))$ (see `distance`), L the mean
    cross entropy, with `real_batch` real images of each class and one operation of DSA a class,
    for them and the synthetic ones (arXiv:2102.08259). Between two losses the net takes `net_steps`
    steps: on the synthetic images as they are by then, or with `multisize` on real ones
    (Multisize Dataset Condensation, ICLR 2024, Algorithm 1), each augmented in its own way.
    """
    net = draw_net()
    weights = [w for w in net.parameters() if w.ndim > 1]
    optimiser = torch.optim.SGD(
        net.parameters(), lr=NET_RATE, momentum=NET_MOMENTUM, weight_decay=NET_DECAY
    )

    def gradients(images: Tensor, k: int, *, is_learnt: bool = False) -> Sequence[Tensor]:
        labels = torch.full((len(images),), k, device=images.device)
        return torch.autograd.grad(
            cross_entropy(net(images), labels), weights, create_graph=is_learnt
        )

    for step in range(config.inner_loops or 1):
        augments, wanted = [], []
        for k in range(real.n_classes):
            augments.append(draw_augmentation(config.augment, real.side))
            wanted.append(gradients(augments[k](real.draw(k, config.real_batch)), k))

        def loss_of(some: Synthetic, augments: list = augments, wanted: list = wanted) -> Tensor:
            losses = []
            for k in range(some.n_classes):
                found = gradients(augments[k](some.of_class(k)), k, is_learnt=True)
                losses.append(distance(found, wanted[k]))
            return torch.stack(losses).sum()

        yield loss_of
        if step + 1 == config.inner_loops:
            break
        net.train()
        for _ in range(config.net_steps or 1):
            if config.multisize:
                images, labels = real.draw_any(NET_BATCH)
            else:
                rows = torch.randperm(len(synthetic.images))[:NET_BATCH]
                images, labels = synthetic.images.detach()[rows], synthetic.classes[rows]
            augment = draw_augmentation(config.augment, real.side, len(images))
            optimiser.zero_grad()
            cross_entropy(net(augment(images)), labels).backward()
            optimiser.step()
        hold_norms(net, real)
