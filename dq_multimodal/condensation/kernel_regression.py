r"""KRR: a kernel ridge regression on the synthetic set predicts the classes of real images.

KIP (Nguyen et al., arXiv:2011.00050, Eq. 3; arXiv:2107.13034) minimises over the synthetic images,
and over their labels where these are learnt,

$$\frac{1}{2 n_t} \lVert y_t - K_{ts} (K_{ss} + \lambda\, \overline{\mathrm{diag}}(K_{ss})\, I)^{-1}
y_s \rVert^2$$

with n_t real images t and the synthetic images s. Targets are those of the paper: 1 for the class
and 0 for the others, minus 1 / n_classes. Images are normalised channel by channel; the papers'
ZCA whitening is left out, because a set is stored as pictures. Learnt labels stay probabilities, at
least 0 with the sum 1, so that a net can be trained on them by the cross-entropy; those of KIP may
be any numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from dq_multimodal.condensation.augmentation import draw_augmentation
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.nets import Net
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.condensation.synthetic import Synthetic

N_NETS = 2
"""Random nets that one estimate of the conv net's kernel takes. RFAD (arXiv:2210.12067) takes 8; as
they are drawn anew in every iteration, fewer in more iterations learn more in the same time."""
N_HIDDEN = 3
"""Hidden layers of the infinitely wide net."""
NEAR = 1e-12
"""Cosines within this of 1 or -1 are taken for it: there the slope of arccos is infinite."""


def match_predictions(
    real: Real, synthetic: Synthetic, config: CondenseConfig, draw_net: Callable[[], Net]
) -> Iterator[Callable[[Synthetic], Tensor]]:
    """Give one loss: how far off the regression from a set is on a batch of real images.

    The `real_batch` images are drawn from all rows alike, so a class counts as often as it is met.
    """
    augment = draw_augmentation(config.augment, real.side)
    images, classes = real.draw_any(config.real_batch)
    t, y_t = augment(images), _centre(one_hot(classes, real.n_classes))
    nets = [draw_net() for _ in range(N_NETS)] if config.kernel == "features" else []
    with torch.no_grad():
        of_t = features(nets, t) if nets else t

    def loss_of(some: Synthetic) -> Tensor:
        hard = one_hot(some.classes, some.n_classes)
        y_s = _centre(hard if some.targets is None else some.targets)
        s = augment(some.images)
        if nets:
            of_s = features(nets, s)
            k_ts, k_ss = of_t @ of_s.T, of_s @ of_s.T
        else:
            k_ts, k_ss = tangent_kernel(t, s), tangent_kernel(s, s)
        return regression_loss(k_ts, k_ss, y_t, y_s, config.ridge)

    yield loss_of
    if synthetic.targets is not None:  # they have taken a step
        with torch.no_grad():
            synthetic.targets.copy_(to_probabilities(synthetic.targets))


def regression_loss(
    k_ts: Float[Tensor, "t s"],
    k_ss: Float[Tensor, "s s"],
    y_t: Float[Tensor, "t classes"],
    y_s: Float[Tensor, "s classes"],
    ridge: float,
) -> Float[Tensor, ""]:
    """Give the loss above; float64, as a ridge of 1e-6 leaves float32 no digit."""
    ridges = ridge * k_ss.diagonal().mean() * torch.eye(len(k_ss)).to(k_ss)
    predicted = k_ts @ torch.linalg.solve(k_ss + ridges, y_s)
    return (y_t - predicted).square().sum() / (2 * len(y_t))


def features(nets: Sequence[Net], images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    r"""Embed images by random nets, so that inner products estimate a kernel (RFAD, Eq. 5).

    With d features of all nets together, k(x, x') = <f(x), f(x')> / d; the wider and the more the
    nets, the nearer it is to the kernel of the Gaussian process that infinitely wide ones are.
    """
    found = torch.cat([net.embed(images) for net in nets], dim=1).double()
    return found / math.sqrt(found.shape[1])


def tangent_kernel(
    a: Float[Tensor, "n ..."], b: Float[Tensor, "m ..."], n_hidden: int = N_HIDDEN
) -> Float[Tensor, "n m"]:
    r"""Give the neural tangent kernel of an infinitely wide fully connected ReLU net, in float64.

    Jacot et al. (arXiv:1806.07572), Theorem 1, with the arc-cosine kernels of Cho and Saul (2009):
    $\Sigma_0 = \Theta_0 = x^\top x' / d$, and for every hidden layer, with the cosine c of
    $\Sigma_{l-1}$ and $\alpha = \arccos c$,

    $$\Sigma_l = \frac{\lVert x \rVert \lVert x' \rVert}{\pi d} (\sin \alpha + (\pi - \alpha) c),
    \qquad \Theta_l = \Sigma_l + \Theta_{l-1} \frac{\pi - \alpha}{\pi}.$$

    Weights have the variance 2 / width, so that $\Sigma_l(x, x)$ is the same in every layer;
    there are no biases (KIP has small ones).

    Args:
        a: Images, flattened here.
        b: Others.
        n_hidden: Hidden layers; 0 gives the linear kernel.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    tiny = torch.finfo(a.dtype).tiny
    lengths = [x.square().sum(1).clamp_min(tiny).sqrt() for x in (a, b)]
    scale = lengths[0][:, None] * lengths[1] / a.shape[1]
    cosine = tangent = (a / lengths[0][:, None]) @ (b / lengths[1][:, None]).T
    for _ in range(n_hidden):
        is_same, is_opposite = cosine > 1 - NEAR, cosine < NEAR - 1
        inner = torch.where(is_same | is_opposite, 0.0, cosine)  # no infinite slope, so no NaN
        angle = inner.arccos()
        slope = torch.where(is_same, 1.0, torch.where(is_opposite, 0.0, 1 - angle / math.pi))
        sine = torch.where(is_same | is_opposite, 0.0, (1 - inner.square()).sqrt())
        cosine = sine / math.pi + slope * cosine
        tangent = cosine + tangent * slope
    return scale * tangent


def to_probabilities(targets: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
    """Give the nearest rows that are at least 0 and sum to 1 (Duchi et al., ICML 2008, fig. 1)."""
    ordered = targets.sort(dim=1, descending=True).values
    counts = torch.arange(1, targets.shape[1] + 1, device=targets.device)
    excess = (ordered.cumsum(1) - 1) / counts
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (targets - excess.gather(1, last)).clamp_min(0)


def _centre(targets: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
    """Take 1 / n_classes off targets that are 1 for the class and 0 for the others."""
    return targets.double() - 1 / targets.shape[1]
