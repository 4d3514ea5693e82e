"""Where data and pretrained models are, and what an encoder makes of rows; used by `prepare`.

A place is text: a path or glob, in which `{data}` stands for the folder of test data
(DQ_TEST_DATA); `package:NAME/GLOB`, files inside an installed Python package; `made:NAME`, a set
of `harness.made`; or a name that a library resolves (a Hub id, a timm model). A list of places
stands for the first that is there.
"""

import glob
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from measure import DATA

from dq_multimodal.config import InputError
from dq_multimodal.files import describe_file, write_text
from harness.made import make_pictures
from harness.results import digest

PACKAGE, MADE = "package:", "made:"
WEIGHT_KEYS = {"timm", "weights", "image_size", "mean", "std", "crop"}
NEEDED_KEYS = {"timm", "weights", "image_size"}
HALVES = {"image", "text"}
IMAGENET_HALF = (0.5, 0.5, 0.5)


def find_place(wanted: str | Sequence[str]) -> str:
    """Find the first place that is there.

    A package is found without importing it. A library's name counts as there: nothing is asked of
    the network. Where a package before it is missing, stderr says how to get that.

    Returns:
        The path of the only file or folder that fits, the absolute glob where several do, or the
        library's name as it is.

    Raises:
        InputError: If nothing is there; it says what would bring it.
    """
    places = wanted if isinstance(wanted, list | tuple) else [wanted]
    missing = []
    for place in places:
        if not isinstance(place, str) or not place:
            raise InputError(f"a place must be text, got {place!r}")
        found, hint = _look(place)
        if found:
            if missing:
                print(f"note: {'; '.join(missing)}: taking {found}", file=sys.stderr)
            return found
        missing.append(hint)
    raise InputError("; ".join(missing) or "no place was given")


def _look(place: str) -> tuple[str | None, str]:
    """Give what is at a place, or None and a line that says what would bring it."""
    if place.startswith(MADE):
        return make_pictures(place.removeprefix(MADE)), ""
    if place.startswith(PACKAGE):
        name, _, inside = place.removeprefix(PACKAGE).partition("/")
        if not name.isidentifier() or not inside:
            raise InputError(f"wanted package:NAME/GLOB, got {place}")
        spec = find_spec(name)
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not folders:
            return None, f"no package {name} (pip install {name.replace('_', '-')})"
        return _match(f"{glob.escape(folders[0])}/{inside}"), f"no {inside} in the package {name}"
    pattern = place.replace("{data}", glob.escape(str(DATA))) if "{data}" in place else place
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - Path.expanduser fails on ~unknown
    found = _match(pattern)
    is_path = "{data}" in place or place.startswith(("/", ".", "~")) or set(place) & set("*?[")
    if found is None and not is_path and place.count("/") < 2:
        return place, ""
    return found, f"no {pattern}" + (" (set DQ_TEST_DATA)" if "{data}" in place else "")


def _match(pattern: str) -> str | None:
    """Give the absolute path that a glob means, or the glob where it means several."""
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute ones
    place = found[0] if len(found) == 1 else pattern
    return str(Path(place).absolute()) if found else None


def find_encoder(wanted: str | Sequence[str] | Mapping[str, Any], work_folder: Path) -> str:
    """Give what `compress(embedding_model=...)` takes for the `encoder` of a suite's task.

    Args:
        wanted: A place or a list of them; or `image` and `text`, an encoder for each half of a
            row; or, for weights that are stored under other names, the keys `timm` (architecture),
            `weights` (place of a .pth file), `image_size` (pixels), and, if other than 0.5 a
            channel and 1, `mean`, `std` and `crop` (share of the shorter side of an image that is
            looked at).
        work_folder: Where a folder for timm is made of such weights.

    Raises:
        InputError: If nothing is there, or the weights are not of that architecture.
    """
    if not isinstance(wanted, Mapping):
        return find_place(wanted)
    if set(wanted) == HALVES:
        return ",".join(find_encoder(wanted[half], work_folder) for half in ("image", "text"))
    if not NEEDED_KEYS <= set(wanted) <= WEIGHT_KEYS:
        raise InputError(
            f"encoder must have the keys {', '.join(sorted(NEEDED_KEYS))} and may have "
            f"{', '.join(sorted(WEIGHT_KEYS - NEEDED_KEYS))}, got {', '.join(map(str, wanted))}"
        )
    return str(make_timm_folder(wanted, work_folder))


def make_timm_folder(wanted: Mapping[str, Any], work_folder: Path) -> Path:
    """Write weights with other names into a folder that timm reads; see `find_encoder`.

    The tensors are matched by their order: the k-th of the file becomes the k-th of the
    architecture. Both must have as many, of the same shapes.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    name, weights = str(wanted["timm"]), find_place(wanted["weights"])
    if not timm.is_model(name):
        raise InputError(f"timm knows no model {name}")
    net = timm.create_model(name, pretrained=False)
    try:
        tensors = list(torch.load(weights, map_location="cpu", weights_only=True).values())
        shapes = [tensor.shape for tensor in tensors]
    except Exception as error:  # files that are no weights fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{weights} must hold named tensors and nothing else: {reason}") from None
    own = net.state_dict()
    if shapes != [tensor.shape for tensor in own.values()]:
        raise InputError(
            f"{weights} is not {name}: wanted {len(own)} tensors, got {len(shapes)}, and their "
            "shapes differ"
        )
    side = wanted["image_size"]
    config = {
        "architecture": name,
        "num_classes": net.num_classes,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "mean": list(wanted.get("mean", IMAGENET_HALF)),
            "std": list(wanted.get("std", IMAGENET_HALF)),
            "crop_pct": float(wanted.get("crop", 1)),
            "interpolation": "bicubic",
        },
    }
    asked = hashlib.sha256(
        json.dumps([dict(wanted), describe_file(Path(weights))["sha256"]]).encode()
    ).hexdigest()
    folder = work_folder / f"{name}-{asked[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # it must not describe other weights
    named = {key: tensor.contiguous() for key, tensor in zip(own, tensors, strict=True)}
    save_file(named, folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


def embed(dataset: str, encoder: str, work_folder: Path, **options: Any) -> np.ndarray:
    """Embed all rows by the embedding stage of `compress`, (n, d) float32.

    A run in a folder of its own below the work folder holds them; asked for again, they are read.

    Args:
        dataset: Path, glob or Hub id.
        encoder: What `find_encoder` gave.
        work_folder: Where to.
        **options: Of `compress`: split, configuration, columns.

    Raises:
        InputError: If the rows or the encoder cannot be read.
    """
    from dq_multimodal import compress
    from dq_multimodal.models.locate import hash_weights

    asked = digest(dataset, encoder, hash_weights(encoder), options)
    one_bin = {"method": "dq", "n_bins": 1, "keep_ratio": 1.0, "report": False}
    options |= {"embedding_model": encoder, "output_dir": work_folder / f"embed-{asked}"}
    return np.load(compress(dataset, **options, **one_bin).path / "embeddings.npy")
