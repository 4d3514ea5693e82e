"""Which patches of an image a classifier looks at: GradCAM++ maps and their means over patches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from dq_multimodal.config import InputError
from dq_multimodal.patches.grid import grid_shape

ToGrid = Callable[[Tensor, int, int], Tensor]
"""Turns a layer's output into (b, k, rows, columns), given height and width of the images."""


@dataclass(frozen=True)
class CamResult:
    """What GradCAM++ says of a batch.

    Attributes:
        maps: At least 0 and finite, at the size of the images, float64 for a float64 model, else
            float32. Not scaled to [0, 1]: a factor does not change the order of patches.
        logits: The model's, without a graph.
        classes: The class each map speaks of.
    """

    maps: Float[Tensor, "b h w"]
    logits: Float[Tensor, "b c"]
    classes: Int[Tensor, " b"]


class GradCamPlusPlus:
    """GradCAM++ of a classifier, as a context manager: no hook stays behind.

    The model runs as it is, with no gradients below the layer and none for its parameters:

        with GradCamPlusPlus(model) as cam:
            scores = patch_scores(cam(images).maps, patch_size=16)

    Args:
        model: Classifier in eval mode; `model(images)` gives logits or an object with `.logits`.
        layer: Submodule whose output, or first output, is explained; None asks `find_layer`.
        to_grid: Lays the layer's output out as (b, k, rows, columns), given it and the images'
            size.
        eps: Added to the denominator of alpha, see `channel_weights`.

    Raises:
        InputError: If eps is negative or not finite, or no layer was given and none is known.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | None = None,
        to_grid: ToGrid | None = None,
        eps: float = 0.0,
    ) -> None:
        if not 0 <= eps < math.inf:
            raise InputError(f"eps must be finite and at least 0, got {eps}")
        self.model, self.eps = model, eps
        self.layer, found = find_layer(model) if layer is None else (layer, None)
        self.to_grid = to_grid or found
        self._handle: RemovableHandle | None = None
        self._cuts: list[Tensor] | None = None  # a list while __call__ runs the model

    def __enter__(self) -> Self:
        self._handle = self._handle or self.layer.register_forward_hook(self._cut_graph)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __call__(
        self, images: Float[Tensor, "b 3 h w"], classes: Int[Tensor, " b"] | None = None
    ) -> CamResult:
        r"""Compute the maps $ReLU(\sum_k w_k A^k)$ of a batch, bilinearly at the images' size.

        Chattopadhay et al. 2018 (arXiv:1710.11063), with the weights of `channel_weights`. A class
        of -1, or None for all, is the predicted one.

        Raises:
            InputError: If the model is in training mode, the layer does not run exactly once or the
                logits do not depend on it, a shape or class is wrong, or a number is not finite.
        """
        if self._handle is None:
            raise InputError("open it first: with GradCamPlusPlus(model) as cam: ... cam(images)")
        if images.ndim != 4:
            raise InputError(f"images must have the shape (b, 3, h, w), got {tuple(images.shape)}")
        for name, module in self.model.named_modules():
            if module.training:  # batch norm would mix the images, dropout would draw
                raise InputError(f"the model must be in eval mode, {name or 'it'} is training")
        # What lies below the layer runs without a graph; the hook switches gradients on, and these
        # two give back the caller's modes, whatever happens.
        with torch.inference_mode(False), torch.no_grad():
            return self._explain(images, classes)

    def _explain(self, images: Tensor, classes: Tensor | None) -> CamResult:
        self._cuts = cuts = list[Tensor]()
        try:
            output = self.model(images)
        finally:
            self._cuts = None
        if not cuts:
            raise InputError("the layer did not run: it must be a submodule that the model calls")
        logits = getattr(output, "logits", output)
        shape = tuple(getattr(logits, "shape", ()))
        if len(shape) != 2 or shape[0] != len(images):
            raise InputError(f"logits must be (b, classes), got {type(logits).__name__} {shape}")
        classes = _fill_classes(classes, logits.detach())

        score = logits.gather(1, classes[:, None]).sum()
        slope = None
        if score.requires_grad:
            slope = torch.autograd.grad(score, cuts, allow_unused=True)[0]
        if slope is None:  # not used, or gradients are off in the part of the model above it
            raise InputError("the logits show no gradient at the layer: pass another layer=")
        features, gradients = self._grid(cuts[0].detach(), images), self._grid(slope, images)
        weights = channel_weights(features, gradients, self.eps)
        coarse = (weights[:, :, None, None] * features).sum(1)
        logits = logits.detach()
        is_odd = ~(coarse.flatten(1).isfinite().all(1) & logits.isfinite().all(1))
        if is_odd.any():
            raise InputError(
                "pixels that are not finite, or numbers too large for the model's type: no map "
                f"for images {is_odd.nonzero()[:8, 0].tolist()} of the batch"
            )
        maps = functional.interpolate(coarse.relu()[:, None], images.shape[2:], mode="bilinear")
        return CamResult(maps=maps[:, 0], logits=logits, classes=classes)

    def _cut_graph(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Let the graph begin at the layer's output."""
        if self._cuts is None:  # the user's own call of the model
            return None
        if self._cuts:
            raise InputError("the layer ran twice in one call: pass a layer= that runs once")
        is_tuple = type(output) is tuple  # several layers of transformers give one
        features = output[0] if is_tuple else output
        if not (isinstance(features, Tensor) and features.is_floating_point()):
            raise InputError(f"the layer must give a tensor, got {type(features).__name__}")
        torch.set_grad_enabled(True)
        leaf = features.detach().requires_grad_(True)
        self._cuts.append(leaf)
        # A copy, since an in-place activation that follows may not write into a leaf.
        return (leaf.clone(), *output[1:]) if is_tuple else leaf.clone()

    def _grid(self, tensor: Tensor, images: Tensor) -> Float[Tensor, "b k rows columns"]:
        """Lay the layer's numbers out as maps, in float32 or better."""
        grid = self.to_grid(tensor, *images.shape[2:]) if self.to_grid else tensor
        if grid.ndim != 4 or len(grid) != len(images):
            got = tuple(grid.shape)
            raise InputError(f"the layer gives {got}, not (b, k, rows, columns): pass to_grid=")
        return grid.to(torch.promote_types(grid.dtype, torch.float32))


def channel_weights(
    features: Float[Tensor, "b k rows columns"],
    gradients: Float[Tensor, "b k rows columns"],
    eps: float = 0.0,
) -> Float[Tensor, "b k"]:
    r"""Weigh the channels: $w_k = \sum_{ij} \alpha_{ij} ReLU(g_{ij})$ (GradCAM++, Eq. 5 and 19).

    With $Y = \exp(S)$ the derivatives of Eq. 19 are powers of g = dS/dA times Y, which cancels:
    $\alpha = g^2 / (2 g^2 + g^3 \sum_{mn} A_{mn} + eps)$. It is computed as
    $1 / (2 + g \sum A + eps / g^2)$, in which small gradients do not vanish when squared. It
    counts where g > 0 only. Features may be negative (after a layer norm they are), so the
    denominator may be too, as in other implementations; where it is exactly 0, alpha is 0. Else
    it is at least a rounding step of 2 away from 0, so that alpha is finite.
    """
    slope = gradients.relu()
    denominator = 2 + slope * features.sum((2, 3), keepdim=True)
    if eps:
        denominator = denominator + eps / slope.square()
    is_used = (slope > 0) & (denominator != 0)
    alpha = torch.where(is_used, 1 / torch.where(is_used, denominator, 1), 0)
    return (alpha * slope).sum((2, 3))


def patch_scores(maps: Float[Tensor, "b h w"], patch_size: int) -> Float[Tensor, "b l"]:
    """Take the mean of the map over each patch (DQ Eq. 24); cut-off patches over their own pixels.

    Sums of float32 numbers are as good as exact in the float64 of the scores: the order of the
    summands does not decide between patches, and equal patches tie.
    """
    if patch_size < 1:
        raise InputError(f"patch_size must be at least 1, got {patch_size}")
    height, width = maps.shape[1:]
    rows, columns = grid_shape(height, width, patch_size)
    if maps.device.type == "mps":  # has no float64
        maps = maps.cpu()
    below, right = rows * patch_size - height, columns * patch_size - width
    padded = functional.pad(maps.to(torch.float64), (0, right, 0, below))
    cells = padded.reshape(len(maps), rows, patch_size, columns, patch_size)
    heights = (height - patch_size * torch.arange(rows, device=maps.device)).clamp(max=patch_size)
    widths = (width - patch_size * torch.arange(columns, device=maps.device)).clamp(max=patch_size)
    return (cells.sum((2, 4)) / (heights[:, None] * widths)).flatten(1)


def find_layer(model: nn.Module) -> tuple[nn.Module, ToGrid | None]:
    """Find the layer to explain: the last features that still have a place in the image.

    Of a vision transformer it is the input of the last block's attention, without the class token:
    the patch tokens of the last output get no gradient from the class token's logits.

    Raises:
        InputError: If the model is of no known family.
    """
    for base in type(model).__mro__:  # by name, so that no library is imported for it
        name = f"{base.__module__.split('.')[0]}.{base.__name__}"
        if name in _FAMILIES:
            path, make_to_grid = _FAMILIES[name]
            to_grid = make_to_grid(model) if make_to_grid else None
            layer: Any = model
            for step in path.split("."):
                layer = layer[-1] if step == "-1" else getattr(layer, step)
            return layer, to_grid
    raise InputError(
        f"do not know the last feature map of {type(model).__qualname__}: pass layer=, the "
        "submodule whose output it is, and to_grid= if that is not (b, k, rows, columns)"
    )


def _fill_classes(classes: Tensor | None, logits: Tensor) -> Int[Tensor, " b"]:
    """Put the predicted class where none is given."""
    predicted = logits.argmax(1)
    if classes is None:
        return predicted
    fits = not classes.is_floating_point() and classes.shape == predicted.shape
    if not fits or ((classes < -1) | (classes >= logits.shape[1])).any():
        raise InputError(
            f"classes must be {len(predicted)} integers from -1 (the predicted one) to "
            f"{logits.shape[1] - 1}, got {classes.dtype} {classes.flatten()[:8].tolist()} ..."
        )
    classes = classes.to(predicted)
    return torch.where(classes == -1, predicted, classes)


def _tokens(features: Tensor, n_prefix: int, rows: int, columns: int) -> Tensor:
    """Lay patch tokens out as a grid, without the tokens before them (class, registers)."""
    return features[:, n_prefix:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def _timm_vit(model: Any) -> ToGrid:
    block = type(model.blocks[-1]).__name__
    if block != "Block":  # it may normalise after its attention
        raise InputError(f"do not know what the attention of a {block} sees: pass layer=, to_grid=")
    n_prefix, size = model.num_prefix_tokens, model.patch_embed.dynamic_feat_size
    return lambda features, height, width: _tokens(features, n_prefix, *size((height, width)))


def _vit(model: Any) -> ToGrid:
    down, right = model.vit.embeddings.patch_embeddings.patch_size
    return lambda features, height, width: _tokens(features, 1, height // down, width // right)


def _swin(model: Any) -> ToGrid:
    merged = 2 ** (len(model.swin.encoder.layers) - 1)
    down, right = (merged * size for size in model.swin.embeddings.patch_embeddings.patch_size)
    return lambda features, height, width: _tokens(  # every merging pads
        features, 0, math.ceil(height / down), math.ceil(width / right)
    )


def _channels_last(model: Any) -> ToGrid:
    return lambda features, height, width: features.permute(0, 3, 1, 2)


_FAMILIES: dict[str, tuple[str, Callable[[Any], ToGrid] | None]] = {
    "timm.ResNet": ("layer4", None),
    "timm.ConvNeXt": ("stages.-1", None),
    "timm.EfficientNet": ("bn2", None),  # MobileNetV2 is one
    "timm.MobileNetV3": ("blocks.-1", None),
    "timm.SwinTransformer": ("layers.-1", _channels_last),
    "timm.SwinTransformerV2": ("layers.-1", _channels_last),
    "timm.VisionTransformer": ("blocks.-1.norm1", _timm_vit),
    "torchvision.ResNet": ("layer4", None),
    "transformers.ResNetForImageClassification": ("resnet.encoder.stages.-1", None),
    "transformers.ConvNextForImageClassification": ("convnext.encoder.stages.-1", None),
    "transformers.ViTForImageClassification": ("vit.layers.-1.layernorm_before", _vit),
    "transformers.SwinForImageClassification": ("swin.encoder.layers.-1", _swin),
}
"""Library and class of a model: way to its layer, -1 being a last one, and what makes `to_grid`."""
