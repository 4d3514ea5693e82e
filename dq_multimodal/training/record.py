"""What a training run was asked, how far it came, and whether it is done, in its folder."""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

REQUEST = "request.json"
METRICS = "metrics.json"
CHECKPOINTS = "checkpoints"
SAVE_SECONDS = 60.0
"""So much work at most is done again after a stop, and one epoch at least."""
WAIT_SECONDS = 86_400
"""So long other processes wait while the first one selects; by default it is 10 or 30 minutes."""

UNIMPORTANT = (
    *("hub_", "push_", "report_to", "run_name", "log", "save_st", "save_total"),
    *("ddp_", "dataloader_num"),
)
"""Beginnings of the names of flags that change no result."""
ELSEWHERE = {"output_dir", "disable_tqdm", "use_cpu", "local_rank", "resume_from_checkpoint"}
"""Flags that say where and how a run is made, not what comes out."""


def describe_request(*arguments: Mapping[str, Any]) -> dict[str, Any]:
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


def begin(output_dir: Path, asked: dict[str, Any], accelerator: "Accelerator") -> bool:
    """Write down what a run was asked; False, and say so, where the very same has finished."""
    if is_complete(output_dir, asked):
        accelerator.print(f"{output_dir} is already complete")
        return False
    if accelerator.is_main_process:
        start(output_dir, asked)
    return True


def finish(output_dir: Path, asked: dict[str, Any], device: Any, **found: Any) -> None:
    """Write metrics.json, which says that the run is done."""
    about = {"device": device_name(device), "command": sys.argv}
    text = json.dumps({"complete": True, "asked": asked, **found, **about}, indent=2)
    write_text(output_dir / METRICS, text + "\n")


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


def make_accelerator() -> "Accelerator":
    """Start Accelerate: bf16 on a GPU unless the launcher says otherwise, all cores on a CPU."""
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    on_gpu = torch.cuda.is_available() and not wants_cpu
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")
    accelerator = Accelerator(
        mixed_precision=asked or ("bf16" if on_gpu else "no"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=WAIT_SECONDS))],
    )
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
        torch.set_num_threads(max(torch.get_num_threads(), len(cores)))
    return accelerator


class Checkpoints:
    """Checkpoints of epochs in output_dir/checkpoints, whole or not there; the last one is loaded.

    Attributes:
        first: The first epoch that is not done.
    """

    def __init__(self, accelerator: "Accelerator", output_dir: Path, n_epochs: int) -> None:
        self.accelerator, self.n_epochs = accelerator, n_epochs
        self.folder = output_dir / CHECKPOINTS
        found = sorted(self.folder.glob("epoch-*"))
        if found:
            accelerator.load_state(str(found[-1]))
        self.first = int(found[-1].name.split("-")[1]) if found else 0
        self.saved = time.perf_counter()

    def note(self, epoch: int) -> None:
        """Save after an epoch where one is due, as rank 0 says: clocks of processes differ."""
        from accelerate.utils import broadcast_object_list

        is_due = time.perf_counter() - self.saved >= SAVE_SECONDS
        if epoch + 1 < self.n_epochs and broadcast_object_list([is_due])[0]:
            self.save(epoch + 1)
            self.saved = time.perf_counter()

    def save(self, n_done: int) -> None:
        """Write a checkpoint whole, then remove the one before."""
        accelerator, partial = self.accelerator, self.folder / "partial"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            before = list(self.folder.glob("epoch-*"))
            partial.replace(self.folder / f"epoch-{n_done:05d}")
            for old in before:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
