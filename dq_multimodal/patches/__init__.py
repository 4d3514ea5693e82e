"""The second compression of images: which patches to keep, how to store them, how to fill holes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dq_multimodal.patches.attribution import GradCamPlusPlus, patch_scores
    from dq_multimodal.patches.codec import decode_patches, encode_patches
    from dq_multimodal.patches.mae import load_mae
    from dq_multimodal.patches.store import restore

__all__ = [
    "GradCamPlusPlus",
    "decode_patches",
    "encode_patches",
    "load_mae",
    "patch_scores",
    "restore",
]

_HOMES = {
    "GradCamPlusPlus": "attribution",
    "decode_patches": "codec",
    "encode_patches": "codec",
    "load_mae": "mae",
    "patch_scores": "attribution",
    "restore": "store",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch is loaded for models only."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
