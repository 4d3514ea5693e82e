"""Starting Accelerate, and checkpoints of epochs that are whole or not there."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS = "checkpoints"
SAVE_SECONDS = 60.0
"""So much work at most is done again after a stop, and one epoch at least."""


def make_accelerator() -> "Accelerator":
    """Start Accelerate: bf16 on a GPU unless the launcher says otherwise, all cores on a CPU."""
    import torch
    from accelerate import Accelerator

    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    on_gpu = torch.cuda.is_available() and not wants_cpu
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")
    accelerator = Accelerator(mixed_precision=asked or ("bf16" if on_gpu else "no"))
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
        torch.set_num_threads(max(torch.get_num_threads(), len(cores)))
    return accelerator


def save_checkpoint(accelerator: "Accelerator", folder: Path, epoch: int) -> None:
    """Write a checkpoint whole, then remove the one before."""
    target, partial = folder / f"epoch-{epoch:05d}", folder / "partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.replace(target)
        for old in folder.glob("epoch-*"):
            if old != target:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: "Accelerator", folder: Path) -> int:
    """Load the last checkpoint; gives the number of epochs that are done."""
    found = sorted(folder.glob("epoch-*"))
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.split("-")[1])
