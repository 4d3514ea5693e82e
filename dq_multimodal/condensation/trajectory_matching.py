r"""MTT: training on the synthetic set goes where training on the real one went.

Cazenave et al. (CVPR 2022, arXiv:2203.11932), Algorithm 1 and Eq. 2: a student begins with the
parameters $\theta^*_t$ of an expert after t epochs on the real images, takes N steps of SGD on the
synthetic ones, and is compared with the expert M epochs on,

$$\frac{\lVert \hat\theta_{t+N} - \theta^*_{t+M} \rVert^2}
{\lVert \theta^*_t - \theta^*_{t+M} \rVert^2}.$$

The images and the learning rate of the student follow from the gradient through all N steps.
Experts are made by `recipes/train_experts.py`.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from dq_multimodal.condensation.augmentation import draw_augmentation
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.experts import open_experts
from dq_multimodal.condensation.nets import Net
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.condensation.synthetic import Synthetic

STUDENT_BATCH = 256
"""Synthetic images that a step of the student takes at most: memory grows with it."""
SMALLEST_RATE = 1e-6
"""Of a student: with less it would stay where it is, or climb."""

Parameters = dict[str, Tensor]
Batch = tuple[Float[Tensor, "b c h w"], Tensor]


def match_trajectories(
    real: Real, synthetic: Synthetic, config: CondenseConfig, draw_net: Callable[[], Net]
) -> Iterator[Callable[[Synthetic], Tensor]]:
    """Give one loss: how far from an expert a student is that was trained on a set.

    The expert is drawn, and t from 0 to `max_start_epoch`.
    """
    assert config.experts is not None  # for mtt it is asked for
    experts = open_experts(config.experts)
    which = int(torch.randint(experts.n_experts, ()))
    t = int(torch.randint(config.max_start_epoch + 1, ()))
    start, goal = (
        experts.read(which, epoch, synthetic.images.device)
        for epoch in (t, t + config.expert_epochs)
    )
    net = draw_net().train()

    def loss_of(some: Synthetic) -> Tensor:
        assert some.rate is not None  # for mtt it is learnt
        targets = some.classes if some.targets is None else some.targets
        batches = draw_batches(len(targets), config.student_steps)
        drawn = ((draw_augmentation(config.augment, real.side, len(b)), b) for b in batches)
        taken = ((augment(some.images[rows]), targets[rows]) for augment, rows in drawn)
        return trajectory_loss(train_student(net, start, taken, some.rate), start, goal)

    yield loss_of
    assert synthetic.rate is not None
    with torch.no_grad():  # it has taken a step
        synthetic.rate.clamp_(min=SMALLEST_RATE)


def train_student(
    net: nn.Module, start: Parameters, batches: Iterator[Batch], rate: Float[Tensor, ""]
) -> Parameters:
    """Take a step of plain SGD a batch, with the cross-entropy; gradients go through all of them.

    Args:
        net: Whose parameters are left as they are.
        start: Parameters to begin with, by name.
        batches: Images, and their classes or the probabilities of all classes.
        rate: Learning rate.
    """
    found = {name: value.detach().requires_grad_() for name, value in start.items()}
    for images, targets in batches:
        loss = cross_entropy(functional_call(net, found, images), targets)
        slopes = torch.autograd.grad(loss, [*found.values()], create_graph=True)
        pairs = zip(found.items(), slopes, strict=True)
        found = {name: value - rate * slope for (name, value), slope in pairs}
    return found


def trajectory_loss(student: Parameters, start: Parameters, goal: Parameters) -> Float[Tensor, ""]:
    """Give the squared distance from student to goal, in units of that from start to goal."""

    def distance(some: Parameters) -> Tensor:
        return torch.stack([(some[name] - goal[name]).square().sum() for name in goal]).sum()

    return distance(student) / distance(start)


def draw_batches(n_rows: int, n_batches: int) -> Iterator[Int[Tensor, " b"]]:
    """Draw batches of rows: permutations one after another, cut into parts of equal size or less.

    A set that is no larger than a batch is taken whole at every step.
    """
    left: list[Tensor] = []
    for _ in range(n_batches):
        left = left or list(torch.randperm(n_rows).split(STUDENT_BATCH))
        yield left.pop(0)
