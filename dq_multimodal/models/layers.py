"""Where to look inside an image model: its last linear layer, and a layer in the middle."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

if TYPE_CHECKING:
    from torch import Tensor, nn


def find_middle(net: "nn.Module") -> "nn.Module | None":
    """Find a layer in the middle: of timm's stages, else of the longest list of layers."""
    from torch import nn

    stages = getattr(net, "feature_info", None)
    if stages is not None:
        infos = stages if isinstance(stages, list) else stages.info
        names = [info["module"] for info in infos]
        with suppress(AttributeError, IndexError):  # some of timm's nets name what is not there
            return net.get_submodule(names[(len(names) - 1) // 2])
    lists = [part for part in net.modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    longest = max(lists, key=len, default=None)
    return longest[(len(longest) - 1) // 2] if longest is not None else None


def pool_places(output: Any) -> "Float[Tensor, 'b k']":
    """Take the mean over the places of a feature map or the tokens of a sequence."""
    if isinstance(output, tuple | list):
        output = output[0]
    if output.ndim == 3:
        return output.mean(dim=1)
    if output.ndim == 4:
        is_last = output.shape[1] == output.shape[2] != output.shape[3]  # Swin's (b, h, w, k)
        return output.mean(dim=(1, 2) if is_last else (2, 3))
    return output.flatten(1)


def find_head(net: "nn.Module") -> "nn.Linear | None":
    """Find the last linear layer of a classifier; None where there is none."""
    from torch import nn

    found: Any = net
    head = (
        found.get_classifier() if hasattr(net, "get_classifier") else getattr(net, "classifier", 0)
    )
    if isinstance(head, nn.Sequential):
        head = next((layer for layer in reversed(head) if isinstance(layer, nn.Linear)), None)
    return head if isinstance(head, nn.Linear) else None
