"""Experts: nets trained on the real pictures, with what they were after every epoch.

A folder holds a safetensors file for each expert, in which every parameter has one dimension more,
the epochs from 0 (before training) to the last, and experts.json, which says what the net and the
pictures were. That is written last: a folder that has it is whole. Numbers are float32. float16
would halve the files (65 MB for 50 epochs of a ConvNet on 32 px), but keeps three digits, and late
in training an epoch changes a parameter by not much more than the third.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dq_multimodal.condensation.config import CONVNET, CondenseConfig
from dq_multimodal.condensation.nets import Net, build_net
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.config import InputError
from dq_multimodal.files import count, expand_home, first_line, put_in_place, read_text, write_text
from dq_multimodal.options import is_number

FILE = "experts.json"
FORMAT = "dq-multimodal experts 1"
MOST_BYTES = 10_000_000
RECIPE = "recipes/train_experts.py"

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Experts:
    """A folder of experts.

    Attributes:
        path: The folder.
        about: What experts.json holds.
    """

    path: Path
    about: dict[str, Any]

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.about["n_experts"]

    @property
    def n_epochs(self) -> int:
        """Epochs that each was trained."""
        return self.about["n_epochs"]

    @property
    def learning_rate(self) -> float:
        """With which they were trained."""
        return self.about["learning_rate"]

    def read(self, k: int, epoch: int, device: torch.device | str = "cpu") -> Parameters:
        """Give the parameters of expert k after an epoch, 0 ... n_epochs, by name.

        Raises:
            InputError: If its file cannot be read.
        """
        with _reading(self.path / file_name(k)) as file:
            return {name: file.get_slice(name)[epoch].to(device) for name in file.keys()}  # noqa: SIM118

    def check(self, real: Real, config: CondenseConfig) -> None:
        """Raise unless they are of this net and these pictures, all there, and long enough.

        Raises:
            InputError: With what differs first.
        """
        for name, wanted in describe_experts(real, config).items():
            found = self.about.get(name)
            if found != wanted and name == "pictures":
                raise InputError(
                    f"the experts in {self.path} were trained on other pictures than these, or in "
                    f"another order: train some on these by {RECIPE}"
                )
            if found != wanted:
                raise InputError(
                    f"the experts in {self.path} have {name} {found}, and {wanted} is wanted: "
                    f"train others by {RECIPE}"
                )
        last = config.max_start_epoch + config.expert_epochs
        if last > self.n_epochs:
            raise InputError(
                f"max_start_epoch and expert_epochs come to {last}, and the experts in {self.path} "
                f"have {self.n_epochs} epochs"
            )
        net = build_net(config.net, real.n_classes, real.channels, real.side, config.net_width)
        shapes = {name: [self.n_epochs + 1, *p.shape] for name, p in net.named_parameters()}
        for k in range(self.n_experts):
            path = self.path / file_name(k)
            with _reading(path) as file:
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            if found != shapes:
                raise InputError(
                    f"{path} does not hold {count(self.n_epochs, 'epoch')} of {config.net}"
                )


def describe_experts(real: Real, config: CondenseConfig) -> dict[str, Any]:
    """Give what experts and those who follow them must have in common."""
    digest = hashlib.sha256(real.classes.cpu().numpy().tobytes())
    digest.update(real.images.cpu().numpy().data)
    return {
        "net": config.net,
        "net_width": config.net_width if config.net.startswith(CONVNET) else None,
        "channels": real.channels,
        "side": real.side,
        "n_classes": real.n_classes,
        "pictures": digest.hexdigest(),
        "mean": real.mean.flatten().tolist(),
        "spread": real.spread.flatten().tolist(),
    }


def open_experts(folder: str | Path) -> Experts:
    """Open a folder of experts.

    Raises:
        InputError: If it is none, or training has not finished.
    """
    path = expand_home(folder)
    try:
        about = json.loads(read_text(path / FILE, MOST_BYTES))
        is_ours = about["format"] == FORMAT
        counts, rate = [about["n_experts"], about["n_epochs"]], about["learning_rate"]
        has_counts = all(type(n) is int and n > 0 for n in counts)
        if not is_ours or not has_counts or not (is_number(rate) and rate > 0):
            raise KeyError
    except FileNotFoundError as error:
        raise InputError(
            f"{path} has no {FILE}: name a folder that {RECIPE} has finished"
        ) from error
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path / FILE} is not of {RECIPE}, or of another release") from error
    return Experts(path, about)


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write experts.json, when all experts are there."""
    write_text(folder / FILE, json.dumps({"format": FORMAT, **about}, indent=2) + "\n")


def file_name(k: int) -> str:
    """Name the file of expert k."""
    return f"expert-{k:04d}.safetensors"


class Trajectory:
    """What a net was after every epoch so far: in the file of an expert, or, until it is whole, in
    another beside it.

    Attributes:
        losses: Mean training loss of every epoch that is done.
    """

    def __init__(self, folder: Path, k: int, n_epochs: int) -> None:
        self.path, self.n_epochs = folder / file_name(k), n_epochs
        self.partial = self.path.with_suffix(".partial")
        self.losses: list[float] = []
        self._epochs: dict[str, list[Tensor]] = {}
        found = self.path if self.is_whole else self.partial
        if found.exists():
            with _reading(found) as file:
                self.losses = json.loads(file.metadata()["losses"])

    @property
    def is_whole(self) -> bool:
        """Whether all epochs are there."""
        return self.path.exists()

    def begin(self, net: Net) -> None:
        """Give a net the parameters of the last epoch that is done; or take down those it has."""
        if not self.partial.exists():
            self._note(net)
            return
        with _reading(self.partial) as file, torch.no_grad():
            for name, value in net.named_parameters():
                self._epochs[name] = list(file.get_tensor(name))
                value.copy_(self._epochs[name][-1])

    def note(self, net: Net, loss: float) -> None:
        """Take down a net after an epoch, and the loss of that."""
        self._note(net)
        self.losses.append(loss)

    def _note(self, net: Net) -> None:
        for name, value in net.named_parameters():
            self._epochs.setdefault(name, []).append(value.detach().cpu().clone())

    def save(self) -> None:
        """Write what there is; the file has the name of an expert once all epochs are in it."""
        temporary = self.path.with_suffix(".tmp")
        found = {name: torch.stack(values) for name, values in self._epochs.items()}
        save_file(found, temporary, {"losses": json.dumps(self.losses)})
        if len(self.losses) < self.n_epochs:
            put_in_place(temporary, self.partial)
        else:
            put_in_place(temporary, self.path)
            self.partial.unlink(missing_ok=True)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a safetensors file; InputError if what is looked for is not in it."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"the expert {path} cannot be read: {first_line(error)}") from error
