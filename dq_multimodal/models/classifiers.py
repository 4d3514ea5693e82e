"""Image classifiers for any image size: timm models, fitted to small pictures where need be."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.files import put_in_place, write_text

if TYPE_CHECKING:
    from torch import nn

DESCRIPTION = "classifier.json"
WEIGHTS = "model.safetensors"

SMALL_SIDE = 96
"""Pictures up to this side lose too much in the stems made for 224 pixels."""

NARROW = "resnet10-narrow"
"""A residual net of 0.3 million parameters, which two CPU cores can train."""

SHORT_NAMES = {
    "vit": "vit_small_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
    "convnext": "convnext_tiny",
    "mobilenetv2": "mobilenetv2_100",
}


@dataclass(frozen=True)
class Classifier:
    """What a classifier of ours is, as classifier.json records it.

    Attributes:
        model: `resnet10-narrow`, vit, swin, convnext, mobilenetv2 or any timm model name.
        image_size: Side of the square input in pixels.
        n_classes: Number of classes.
        labels: Their names, in order.
        mean: Mean of the training pixels, (r, g, b) in [0, 1].
        std: Standard deviation of the training pixels.
        crop: Side of the central square that is looked at, as a share of the shorter side.
    """

    model: str
    image_size: int
    n_classes: int
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0


def build_classifier(
    model: str, n_classes: int, image_size: int, *, is_pretrained: bool = False
) -> "nn.Module":
    """Build a classifier whose input is square pictures of the given side.

    For pictures of up to 96 px the stems are those that the CIFAR literature uses: ResNets begin
    with a 3 x 3 convolution of stride 1 and no pooling; ViT cuts patches of 4 px and Swin of 2 px
    with windows of 4 (at 32 px, larger in proportion); ConvNeXt begins with a stride of 2;
    MobileNetV2 leaves out its first two strides.

    Args:
        model: See `Classifier`.
        image_size: Side in pixels.
        is_pretrained: Start from timm's weights (needs the Hub or its cache).

    Raises:
        InputError: If timm knows no such model, or it cannot have this size.
    """
    import timm
    from torch import nn

    if model == NARROW:
        return _narrow_resnet(n_classes, image_size)
    name = SHORT_NAMES.get(model, model)
    if not timm.is_model(name):
        raise InputError(
            f"no model {model}: wanted {NARROW}, {', '.join(SHORT_NAMES)} or a timm model name"
        )
    options: dict[str, Any] = {"num_classes": n_classes, "pretrained": is_pretrained}
    is_small = image_size <= SMALL_SIDE
    if name.startswith(("vit_", "deit")):
        options["img_size"] = image_size
        if is_small:
            options["patch_size"] = max(2, image_size // 8)
    elif name.startswith("swin_"):
        options["img_size"] = image_size
        if is_small:
            options |= {"patch_size": max(1, image_size // 16), "window_size": 4}
    elif name.startswith("convnext") and is_small:
        options["patch_size"] = 2
    try:
        net: Any = timm.create_model(name, **options)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise InputError(
            f"cannot make {model} for {image_size} px: {str(error).splitlines()[0]}"
        ) from error
    if is_small and name.startswith("resnet") and isinstance(net.conv1, nn.Conv2d):
        width = net.conv1.out_channels
        net.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    if is_small and name.startswith("mobilenetv2"):
        net.conv_stem.stride = (1, 1)
        net.blocks[1][0].conv_dw.stride = (1, 1)
    return net


def _narrow_resnet(n_classes: int, image_size: int) -> "nn.Module":
    """Four stages of one basic block, 16 to 128 channels, on a stem of three 3 x 3 convolutions."""
    from timm.models.resnet import BasicBlock, ResNet
    from torch import nn

    block: Any = BasicBlock
    net: Any = ResNet(
        block,
        layers=(1, 1, 1, 1),
        num_classes=n_classes,
        stem_width=8,
        stem_type="deep",
        channels=(16, 32, 64, 128),
    )
    if image_size <= SMALL_SIDE:
        net.conv1[0].stride = (1, 1)
        net.maxpool = nn.Identity()
    return net


def save_classifier(net: "nn.Module", description: Classifier, folder: Path) -> None:
    """Write a classifier into a folder: the weights first, then classifier.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)  # it must not describe other weights
    temporary = folder / (WEIGHTS + ".tmp")
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, temporary)
    put_in_place(temporary, folder / WEIGHTS)
    write_text(folder / DESCRIPTION, json.dumps(asdict(description), indent=2) + "\n")


def read_classifier(folder: Path) -> tuple["nn.Module", Classifier]:
    """Read what `save_classifier` wrote; InputError if it is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = json.loads((folder / DESCRIPTION).read_text())
        lists = {name: tuple(found[name]) for name in ("labels", "mean", "std")}
        description = Classifier(**{**found, **lists})
        net = build_classifier(description.model, description.n_classes, description.image_size)
        net.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} holds no classifier that can be read: {reason}") from error
    return net, description
