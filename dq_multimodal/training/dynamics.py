"""Training dynamics: what a classifier says of every row in every epoch of its training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.files import put_in_place, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

FILE = "dynamics.npy"
ABOUT = "dynamics.json"
PARTIAL = "dynamics.partial.npy"
COLUMNS = ("probability of the label", "largest other probability", "EL2N")


def measure_rows(logits: "Tensor", classes: "Tensor") -> "Tensor":
    r"""Give what is noted of rows with softmax probabilities $p$ and class $y$.

    $p_y$, $\max_{j \ne y} p_j$ and EL2N $= \lVert p - \mathrm{onehot}(y) \rVert_2$ (Paul et al.,
    "Deep Learning on a Data Diet", arXiv:2107.07075, definition 2.2).

    Args:
        logits: (b, classes), of any floating type.
        classes: (b,).

    Returns:
        (b, 3) float32, in [0, 1], [0, 1] and [0, sqrt(2)].
    """
    import torch

    p = logits.float().softmax(dim=1)
    at = classes[:, None]
    own = p.gather(1, at)
    others = p.scatter(1, at, 0.0)
    el2n = ((1 - own).square().squeeze(1) + others.square().sum(dim=1)).sqrt()
    return torch.stack([own.squeeze(1), others.amax(dim=1), el2n], dim=1)


class Dynamics:
    """Takes down, epoch by epoch, what the net says of each row in the pass that trains on it.

    So it costs no pass of its own: pictures are augmented, the net is in training mode, and a row
    is seen at the weights of its step. Rows that are not seen are NaN. The file is (epochs, n, 3)
    float16, see `COLUMNS`; it has its name when all epochs are in it.

    Args:
        folder: Where dynamics.npy goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, first: int, n_epochs: int, n_rows: int, accelerator: "Accelerator") -> None:
        """Begin, or go on from an epoch: what was written of the later ones is written anew.

        Raises:
            InputError: If the epochs before are not there.
        """
        import torch

        self._accelerator = accelerator
        self._seen = torch.zeros(n_rows, len(COLUMNS), device=accelerator.device)
        self._table: ndarray | None = None
        if not accelerator.is_main_process:
            return
        path, whole = self.folder / PARTIAL, self.folder / FILE
        shape, kind = (n_epochs, n_rows, len(COLUMNS)), np.dtype(np.float16)
        if not first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._table = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
            return
        if not path.exists() and whole.exists():  # stopped after the last epoch
            whole.replace(path)
        try:
            self._table = np.lib.format.open_memmap(path, mode="r+")
        except (OSError, ValueError):
            self._table = None
        if self._table is None or (self._table.shape, self._table.dtype) != (shape, kind):
            raise InputError(
                f"{path} does not hold the epochs before the checkpoint: remove {self.folder} and "
                "begin anew"
            )

    def note(self, rows: "Tensor", logits: "Tensor", classes: "Tensor") -> None:
        """Take down a batch of this process.

        Args:
            rows: (b,) row numbers.
            logits: (b, classes).
            classes: (b,).
        """
        self._seen[rows.to(self._seen.device)] = measure_rows(logits, classes)

    def finish_epoch(self, epoch: int) -> None:
        """Write what all processes saw in an epoch, before any checkpoint says that it is done."""
        found = self._accelerator.reduce(self._seen, "sum")
        self._seen.zero_()
        if self._table is not None:
            # the largest of a row's probabilities is at least 1 / classes: 0 is a row not seen
            found[found[:, :2].amax(dim=1) == 0] = float("nan")
            self._table[epoch] = found.cpu().numpy()
            self._table.flush()  # type: ignore[attr-defined]

    def finish(self, about: dict[str, Any]) -> None:
        """Write dynamics.json, then give dynamics.npy its name.

        Args:
            about: What the numbers are of; the names of the columns are added.
        """
        if self._table is not None:
            said = {"columns": COLUMNS, "mode": "train", "is_augmented": True, **about}
            write_text(self.folder / ABOUT, json.dumps(said, indent=2) + "\n")
            self._table = None
            put_in_place(self.folder / PARTIAL, self.folder / FILE)
