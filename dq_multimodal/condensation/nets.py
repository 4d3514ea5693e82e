"""The nets in which real and synthetic images are compared, fresh and random each time."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dq_multimodal.condensation.config import CONVNET, MOST_BLOCKS
from dq_multimodal.config import InputError
from dq_multimodal.models.classifiers import build_classifier

if TYPE_CHECKING:
    from dq_multimodal.condensation.pictures import Real

CACHED = 32
"""Pictures that a CPU passes through together: more do not stay in its cache, which takes twice the
time."""
NORM_IMAGES = 256
"""Real pictures that batch normalisations measure."""


class ConvNet(nn.Module):
    """ConvNet-D3, or one of another depth, the net of the condensation papers.

    Depth times a 3 x 3 convolution, instance normalisation with its own scale and shift, ReLU and
    2 x 2 average pooling; then one linear layer (arXiv:2006.05929, section 4.1).

    Args:
        channels: Of the pictures.
        side: Of the pictures in pixels, at least 2^depth.
        depth: Number of convolutions.
        width: Channels of the convolutions.

    Raises:
        InputError: If the pictures are too small.
    """

    def __init__(
        self, n_classes: int, channels: int, side: int, depth: int = 3, width: int = 128
    ) -> None:
        super().__init__()
        if side < 2**depth:
            raise InputError(f"{CONVNET}-d{depth} needs at least {2**depth} px, got {side}")
        blocks: list[nn.Module] = []
        for n_in in [channels] + [width] * (depth - 1):
            blocks += [nn.Conv2d(n_in, width, 3, padding=1), nn.GroupNorm(width, width)]
            blocks += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.classifier = nn.Linear(width * (side // 2**depth) ** 2, n_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Give what the linear layer reads, (n, d)."""
        if torch.is_grad_enabled() or images.device.type != "cpu":
            return self.features(images)
        return torch.cat([self.features(part) for part in images.split(CACHED)])

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits, (n, classes), of images (n, channels, side, side)."""
        return self.classifier(self.embed(images))


class TimmNet(nn.Module):
    """A net of `build_classifier`; grey pictures are read as three equal channels."""

    def __init__(self, name: str, n_classes: int, side: int) -> None:
        super().__init__()
        self.net = build_classifier(name, n_classes, side)
        for part in self.net.modules():
            if hasattr(part, "fused_attn"):  # which has no second derivative, as dc and mtt need it
                part.fused_attn = False  # type: ignore[assignment]

    def embed(self, images: Tensor) -> Tensor:
        """Give what the last layer reads, (n, d)."""
        found = self.net.forward_features(images.expand(-1, 3, -1, -1))  # type: ignore[operator]
        return self.net.forward_head(found, pre_logits=True)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits, (n, classes), of images (n, 1 or 3, side, side)."""
        return self.net(images.expand(-1, 3, -1, -1))


Net = ConvNet | TimmNet


def find_depth(side: int) -> int:
    """Give the depth of a ConvNet for pictures of a side.

    That of the papers: 3 for 28 and 32 px, 4 for 64, 5 for 128. Below 16 px it is 2: the third
    normalisation would see four numbers or one, and gradients through it have no bounds.
    """
    return next((d for d, most in ((2, 15), (3, 47), (4, 95)) if side <= most), MOST_BLOCKS)


def build_net(name: str, n_classes: int, channels: int, side: int, width: int = 128) -> Net:
    """Build a net with random weights.

    Args:
        name: `convnet` (of a depth that fits the side), `convnet-d3` (of that depth, 1 to 5), or a
            net of `models.classifiers.build_classifier`.
        channels: 1 or 3.
        side: Of the pictures in pixels.
        width: Channels of a ConvNet.

    Raises:
        InputError: If there is no such net, or it cannot read pictures of this side.
    """
    depths = {f"{CONVNET}-d{d}": d for d in range(1, MOST_BLOCKS + 1)}
    if name != CONVNET and name not in depths:
        return TimmNet(name, n_classes, side)
    return ConvNet(n_classes, channels, side, depths.get(name) or find_depth(side), width)


def hold_norms(net: Net, real: "Real") -> None:
    """Let batch normalisations use mean and deviation of real pictures of all classes from now on.

    As in DC's code: else a batch of one class is normalised by itself, so that all classes have the
    same mean whatever their images, and a batch of one image has no deviation. A net without them
    is left as it is, and nothing is drawn.
    """
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # so they become those of the next batch
        norm.train()
    with torch.no_grad():
        net(real.draw_any(NORM_IMAGES)[0])
    for norm in norms:
        norm.eval()
