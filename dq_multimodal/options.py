"""Options that several commands share, and how their texts are read."""

from pathlib import Path
from typing import Annotated

import typer

from dq_multimodal.config import InputError, check_drop_ratio, check_keep_ratio

KeepRatio = Annotated[
    str, typer.Option(metavar="RATIO", help="Share of the rows to keep, in (0, 1].")
]
OutputDir = Annotated[
    Path | None,
    typer.Option(help="The run folder.  [default: runs/DATASET-METHOD-RATIO]", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run in that folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
PushToHub = Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Push the result there.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
RunOrId = Annotated[
    str, typer.Argument(metavar="RUN", help="Run folder, or OWNER/NAME on the Hub.")
]


def parse_ratio(text: str) -> float:
    """Read a ratio in (0, 1]."""
    try:
        ratio = float(text)
        check_keep_ratio(ratio)
    except ValueError:
        hint = " (write 0.2 for 20 %)" if "%" in str(text) else ""
        raise InputError(f"keep_ratio must lie in (0, 1], got {text}{hint}") from None
    return ratio


def parse_drop_ratio(text: str) -> float:
    """Read a ratio in [0, 1)."""
    try:
        ratio = float(text)
    except ValueError:
        raise InputError(f"drop_ratio must lie in [0, 1), got {text}") from None
    check_drop_ratio(ratio)
    return ratio


def parse_columns(text: str | None) -> tuple[str, ...] | None:
    """Read column names parted by commas."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError(f"text_columns must be names parted by commas, got {text!r}")
    return names
