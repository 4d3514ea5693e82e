"""Condensed sets as selections: made by `dq_multimodal.condense`, read as packed images."""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from dq_multimodal.config import InputError
from harness.results import digest

SOFT = "soft_label"
"""Column of the learnt labels."""
LABEL_BYTES = 4
"""Of a number of a learnt label."""
OWN = {"condense", "use_soft"}
"""Keys of a condensed selection beside the options of `condense`."""
GIVEN = {
    *("dataset", "split", "config_name", "revision", "image_column", "label_column", "method"),
    *("image_folder", "image_size", "seed", "stored_as"),
}
"""Options of `condense` that the task and the suite set."""


@dataclass(frozen=True)
class Added:
    """Packed images that are not rows of the source.

    Attributes:
        images: (n, h, w, 3) uint8.
        classes: (n,) int64.
        soft: (n, n_classes) float32, the learnt labels; None where there are none.
    """

    images: np.ndarray
    classes: np.ndarray
    soft: np.ndarray | None = None

    @property
    def digest(self) -> str:
        """What tells this from other images and labels."""
        parts = [self.images, self.classes, *([] if self.soft is None else [self.soft])]
        return digest(*(hashlib.sha256(np.ascontiguousarray(part)).hexdigest() for part in parts))


def check_condensed(name: str, options: dict[str, Any]) -> None:
    """Raise unless a selection has options that there are."""
    from dq_multimodal.condensation.config import CondenseConfig

    known = set(CondenseConfig.recorded()) - GIVEN
    if strange := ", ".join(sorted(set(options) - known - OWN)):
        raise InputError(
            f"selection {name}: no option {strange} of condense: there are "
            f"{', '.join(sorted(known))}, {', '.join(sorted(OWN))}"
        )


def request_of(options: dict[str, Any], n_images: int, draw: int, source: dict[str, Any]) -> dict:
    """Give the options of `condense` for a selection of so many images a class.

    The seed is the draw: selections of the same draw begin with the same real images.

    Args:
        options: The selection.
        n_images: Images of each class that are asked for.
        draw: Number of the draw.
        source: Options that say which rows these are.
    """
    own = {key: value for key, value in options.items() if key not in OWN}
    size = {"images_per_class": own.get("images_per_class", n_images)}
    return source | own | size | {"method": options["condense"], "seed": draw}


def settle(request: dict[str, Any]) -> dict[str, Any]:
    """Give all recorded options of a request, the defaults of its method among them."""
    from dq_multimodal.condensation.config import CondenseConfig

    return CondenseConfig.from_options(request).as_dict()


def folder_of(work: Path, request: dict[str, Any]) -> Path:
    """Give the folder of a condensed set in the work folder."""
    return work / f"{request['method']}-{digest(settle(request))}"


def make_sets(work: Path, requests: list[dict[str, Any]]) -> None:
    """Condense what the work folder does not hold: one set a core at a time, or one on a GPU."""
    import torch

    n_jobs = 1 if torch.cuda.is_available() else min(len(requests), os.cpu_count() or 1)
    if n_jobs < 2:
        for request in requests:
            make_set(work, request)
        return
    with ProcessPoolExecutor(n_jobs, get_context("spawn"), take_one_thread) as pool:
        running = [pool.submit(make_set, work, request) for request in requests]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def take_one_thread() -> None:
    """Leave the other cores to the processes beside this one."""
    import torch

    torch.set_num_threads(1)


def make_set(work: Path, request: dict[str, Any]) -> None:
    """Condense one set, or go on with it."""
    open_set(work, request)


def open_set(work: Path, request: dict[str, Any]) -> Any:
    """Give a condensed set, which is made if it is not there yet."""
    from dq_multimodal import condense

    return condense(**request, report=False, output_dir=folder_of(work, request))


def read_set(
    task: Any, work: Path, request: dict[str, Any], n_images: int | None, use_soft: bool | None
) -> dict[str, Any]:
    """Give the first images of each class of a condensed set, as a line of a bundle has them.

    Args:
        task: An image task of `harness.prepare`, which decodes the images.
        work: The work folder.
        request: What is asked of `condense`.
        n_images: Images of each class, no more than the set has.
        use_soft: Whether learnt labels are the targets; None: where there are any.
    """
    made, options = open_set(work, request), settle(request)
    kept = made.prefix(n_images)
    classes = task.classes_of(kept)
    soft = None if use_soft is False else soft_labels(kept, task.n_classes)
    if use_soft and soft is None:
        raise InputError(f"use_soft: {request['method']} learns no labels with these options")
    added = Added(task.decode(kept, None, "decode condensed"), classes, soft)
    n_bytes = int(task.file_sizes(kept).sum()) + (0 if soft is None else LABEL_BYTES * soft.size)
    about = {key: value for key, value in options.items() if key not in GIVEN - {"seed"}}
    return {
        "rows": np.zeros(0, dtype=np.int64),
        "added": added,
        "bytes": n_bytes,
        "rows_digest": added.digest,
        "is_soft": soft is not None,
        "condensed": json.dumps(about | {"learnt_rate": made.manifest.learning_rate}),
        "selection_seconds": sum(made.manifest.seconds.values()),
        "proxy_seconds": 0.0,
    }


def soft_labels(rows: Any, n_classes: int) -> np.ndarray | None:
    """Give the learnt labels of condensed rows, (n, n_classes); None where there are none."""
    if SOFT not in rows.column_names:
        return None
    found = np.array(rows[SOFT], dtype=np.float32)
    if found.shape != (len(rows), n_classes):
        raise InputError(f"wanted {n_classes} numbers a soft label, got {found.shape}")
    return found
