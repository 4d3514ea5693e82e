"""Where models are from: a folder, the Hub, or its cache, without minutes of retries."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from dq_multimodal.config import InputError
from dq_multimodal.world import is_launched

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".onnx")


def hash_weights(name: str | None) -> str | None:
    """Hash the files of weights in a model folder: it may hold another model tomorrow.

    Returns:
        None for what is no folder; what the Hub holds is pinned by its commit.
    """
    folder = Path(os.path.expanduser(name or ""))  # noqa: PTH111 - see find_model
    if name is None or not folder.is_dir():
        return None
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in WEIGHTS and path.is_file():
            with path.open("rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()[:16]


def own_device() -> str | None:
    """Give the device of this process among those of its machine; None leaves it to the library."""
    import torch

    local_rank = os.environ.get("LOCAL_RANK", "")
    if not is_launched() or not local_rank.isdigit():
        return None
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return "cpu"
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(local_rank) % n_devices}" if n_devices else None


def accelerator() -> str | None:
    """Name the accelerator of this process; None where there is none."""
    import torch

    device = own_device() or ("cuda" if torch.cuda.is_available() else "cpu")
    return None if device == "cpu" else device


@contextmanager
def loading(name: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what the libraries raise at a model that they cannot load into one line.

    Args:
        name: What the user calls the model.
        errors: Only these; by default all.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a broken model fails in many ways
        if errors and not isinstance(error, errors):
            raise
        causes: list[BaseException | None] = [error]
        while causes[-1] is not None:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if any(isinstance(cause, UnpicklingError) for cause in causes):
            reason = (
                "its weights are a pickle of more than weights, which could run any code, or "
                "broken: wanted safetensors"
            )
        elif "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is never run here"
        raise InputError(f"cannot load the model {name}: {reason}") from error


class ModelOutOfReach(InputError):
    """The Hub is out of reach, and its cache does not hold the model."""


def find_model(name: str) -> tuple[str, str | None]:
    """Find a model without minutes of retries when there is no network.

    Args:
        name: Hub id, or a folder.

    Returns:
        What to load it by, the id or a folder, and its commit on the Hub.

    Raises:
        ModelOutOfReach: If it could be had with a network only.
        InputError: If there is no such model.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import HfHubHTTPError, httpx

    folder = os.path.expanduser(name)  # noqa: PTH111 - Path.expanduser fails on ~unknown
    if Path(folder).is_dir():
        return folder, None
    try:
        return name, HfApi().model_info(name).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"no model {name}: neither a folder nor a model on the Hub") from error
    except (HfHubHTTPError, httpx.HTTPError, ConnectionError):
        try:
            place = snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError as error:
            raise ModelOutOfReach(
                f"the Hub is out of reach and model {name} is not in its cache"
            ) from error
    return place, Path(place).name  # the cache names a snapshot by its commit
