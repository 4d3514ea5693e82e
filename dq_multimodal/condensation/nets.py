"""The nets in which real and synthetic images are compared, fresh and random each time."""

import torch
from torch import Tensor, nn

from dq_multimodal.condensation.config import CONVNET, SMALLEST_SIDE
from dq_multimodal.config import InputError
from dq_multimodal.models.classifiers import build_classifier

CACHED = 32
"""Pictures that a CPU passes through together: more do not stay in its cache, which takes twice the
time."""


class ConvNet(nn.Module):
    """ConvNet-D3, the net of the condensation papers.

    Three times a 3 x 3 convolution, instance normalisation with its own scale and shift, ReLU and
    2 x 2 average pooling; then one linear layer (arXiv:2006.05929, section 4.1).

    Args:
        channels: Of the pictures.
        side: Of the pictures in pixels, at least 8.
        width: Channels of the convolutions.
    """

    def __init__(self, n_classes: int, channels: int, side: int, width: int = 128) -> None:
        super().__init__()
        if side < SMALLEST_SIDE:
            raise InputError(f"{CONVNET} needs pictures of at least {SMALLEST_SIDE} px, got {side}")
        blocks: list[nn.Module] = []
        for n_in in (channels, width, width):
            blocks += [nn.Conv2d(n_in, width, 3, padding=1), nn.GroupNorm(width, width)]
            blocks += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.classifier = nn.Linear(width * (side // 8) ** 2, n_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Give what the linear layer reads, (n, width * (side // 8)^2)."""
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

    def embed(self, images: Tensor) -> Tensor:
        """Give what the last layer reads, (n, d)."""
        found = self.net.forward_features(images.expand(-1, 3, -1, -1))  # type: ignore[operator]
        return self.net.forward_head(found, pre_logits=True)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits, (n, classes), of images (n, 1 or 3, side, side)."""
        return self.net(images.expand(-1, 3, -1, -1))


Net = ConvNet | TimmNet


def build_net(name: str, n_classes: int, channels: int, side: int, width: int = 128) -> Net:
    """Build `convnet-d3`, or a net of `models.classifiers.build_classifier`, with random weights.

    Raises:
        InputError: If there is no such net, or it cannot read pictures of this side.
    """
    if name == CONVNET:
        return ConvNet(n_classes, channels, side, width)
    return TimmNet(name, n_classes, side)
