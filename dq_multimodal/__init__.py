"""Make training sets smaller without making models worse: Dataset Quantization."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from dq_multimodal.condensation.pipeline import condense
    from dq_multimodal.condensation.result import Condensed
    from dq_multimodal.condensation.verification import verify
    from dq_multimodal.config import CompressConfig, InputError
    from dq_multimodal.pipeline import compress, plan
    from dq_multimodal.run import Run, open_run, push, resample

__all__ = [
    "CompressConfig",
    "Condensed",
    "InputError",
    "Run",
    "compress",
    "condense",
    "open_run",
    "plan",
    "push",
    "resample",
    "verify",
]

_HOMES = {
    "CompressConfig": "config",
    "Condensed": "condensation.result",
    "InputError": "config",
    "Run": "run",
    "compress": "pipeline",
    "condense": "condensation.pipeline",
    "open_run": "run",
    "plan": "pipeline",
    "push": "run",
    "resample": "run",
    "verify": "condensation.verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Show the public names before they are used, as to an editor."""
    return sorted({*globals(), *__all__})
