"""What a training run was asked, and whether it is done: request.json and metrics.json."""

import json
from pathlib import Path
from typing import Any

from dq_multimodal.config import InputError
from dq_multimodal.files import write_text

REQUEST = "request.json"
METRICS = "metrics.json"

UNIMPORTANT = (
    "hub_",
    "push_",
    "report_to",
    "run_name",
    "log",
    "save_st",
    "save_total",
    "ddp_",
    "dataloader_num",
)
"""Beginnings of the names of flags that change no result."""
ELSEWHERE = {"output_dir", "disable_tqdm", "use_cpu", "local_rank", "resume_from_checkpoint"}
"""Flags that say where and how a run is made, not what comes out."""


def describe_request(*arguments: dict[str, Any]) -> dict[str, Any]:
    """Put together all flags that change the result, as JSON holds them."""
    found = {name: value for flags in arguments for name, value in flags.items()}
    kept = {
        name: value
        for name, value in sorted(found.items())
        if not name.startswith((*UNIMPORTANT, "_")) and name not in ELSEWHERE
    }
    return json.loads(json.dumps(kept, default=str))


def is_complete(output_dir: Path, asked: dict[str, Any]) -> bool:
    """Say whether the very same run has finished in a folder.

    Raises:
        InputError: If another run was started there.
    """
    try:
        before = json.loads((output_dir / REQUEST).read_text())
    except FileNotFoundError:
        return False
    differing = [
        name for name in asked.keys() | before.keys() if asked.get(name) != before.get(name)
    ]
    if differing:
        raise InputError(
            f"{output_dir} holds a run with another {', '.join(sorted(differing))}: name another "
            "--output_dir or remove it"
        )
    return (output_dir / METRICS).is_file()


def start(output_dir: Path, asked: dict[str, Any]) -> None:
    """Write down what a run was asked, before its first step."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / REQUEST, json.dumps(asked, indent=2) + "\n")


def finish(output_dir: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json, which says that the run is done."""
    write_text(output_dir / METRICS, json.dumps({"complete": True, **metrics}, indent=2) + "\n")


def last_checkpoint(folder: Path) -> str | None:
    """Find the last checkpoint of a Trainer that is whole."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if (path / "trainer_state.json").is_file() and path.name.split("-")[1].isdigit()
    ]
    found.sort(key=lambda path: int(path.name.split("-")[1]))
    return str(found[-1]) if found else None


def device_name(device: Any) -> str:
    """Name the device, as results files do."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
