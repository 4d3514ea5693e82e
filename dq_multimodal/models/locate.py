"""Where models are from: a folder, the Hub, or its cache, without minutes of retries."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from dq_multimodal.config import InputError
from dq_multimodal.data.hub_errors import HubFailed, hub_errors
from dq_multimodal.files import expand_home

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".onnx", ".gguf")


def hash_weights(name: str | None) -> str | None:
    """Hash the files of weights in a model folder: it may hold another model tomorrow.

    Returns:
        None for what is no folder and no such file; what the Hub holds is pinned by its commit.
    """
    place = expand_home(name or "")
    is_other = place.is_file() and place.suffix not in WEIGHTS
    if name is None or not place.exists() or is_other:
        return None
    hasher = hashlib.sha256()
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.suffix in WEIGHTS and path.is_file():
            with path.open("rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()[:16]


def own_device(asked: str | None = None) -> str | None:
    """Give the device of this process among those of its machine; None leaves it to the library.

    InputError if the one that is asked for is not there.
    """
    import torch

    if asked is not None:
        try:
            torch.empty(0, device=asked)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(f"no device {asked}: {str(error).splitlines()[0]}") from error
        return asked
    size, local_rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_RANK"))
    if size in ("", "1") or not local_rank.isdigit():  # else a launcher started several processes
        return None
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return "cpu"
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(local_rank) % n_devices}" if n_devices else None


def accelerator(asked: str | None = None) -> str | None:
    """Name the accelerator of this process; None where there is none, or another is asked for."""
    import torch

    device = own_device(asked) or ("cuda" if torch.cuda.is_available() else "cpu")
    return None if device == "cpu" else device


@contextmanager
def loading(name: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what the libraries raise (only `errors`, if given) at a bad model into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a broken model fails in many ways
        if errors and not isinstance(error, errors):
            raise
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UnpicklingError):
            cause = cause.__cause__ or cause.__context__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if cause is not None:
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
    """Find a model, a Hub id or a folder, without minutes of retries when there is no network.

    Returns:
        What to load it by, the id or a folder, and its commit on the Hub.

    Raises:
        ModelOutOfReach: If it could be had with a network only.
        InputError: If there is no such model.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if expand_home(name).is_dir():
        return str(expand_home(name)), None
    missing = "it is neither a folder here nor a model on the Hub"
    try:
        with hub_errors(f"find model {name}", "give a folder", missing=missing):
            return name, HfApi().model_info(name).sha
    except HubFailed:
        try:
            place = snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError as error:
            raise ModelOutOfReach(
                f"the Hub is out of reach and model {name} is not in its cache"
            ) from error
    return place, Path(place).name  # the cache names a snapshot by its commit


def find_gguf(name: str, file: str | None = None) -> tuple[str, str] | None:
    """Find the GGUF file of a language model; its weights and tokenizer are in that one file.

    Args:
        name: A .gguf file, a folder, or a model's id.
        file: Name of a .gguf file in the folder.

    Returns:
        Its folder and its name; None if `name` is a model of another kind.

    Raises:
        InputError: If there is no such file, a folder without config.json holds several, or the
            package that reads them is missing.
    """
    place = expand_home(name)
    if place.suffix == ".gguf" and not place.is_dir():
        place, file = place.parent, place.name
    elif file is None:
        if not place.is_dir() or (place / "config.json").is_file():
            return None
        files = sorted(path.name for path in place.glob("*.gguf"))
        if len(files) > 1:
            raise InputError(f"the folder {name} holds {len(files)} .gguf files: name one of them")
        if not files:
            return None
        file = files[0]
    if not (place / file).is_file():
        raise InputError(f"there is no file {place / file}")
    if find_spec("gguf") is None:
        raise InputError(f"{file} is a GGUF file, and the package gguf, which reads it, is missing")
    return str(place), file


def load_language_model(name: str, gguf_file: str | None = None, **options: Any) -> Any:
    """Load a causal language model to be trained, in float32; InputError if it cannot be loaded.

    Args:
        name: A .gguf file, or a model's folder or id.
        gguf_file: Name of a .gguf file in the folder.
        options: More for `from_pretrained`, such as another dtype.
    """
    import torch
    import transformers

    options = {"dtype": torch.float32, "trust_remote_code": False, **options}
    found = find_gguf(name, gguf_file)
    if found:
        options["gguf_file"] = found[1]
        if hasattr(transformers, "GgufConfig"):  # else quantized weights may be left as they are
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with loading(name):
        place = found[0] if found else name
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(place, **options)
    if found:  # its weights are plain numbers by now: to be trained, and saved as such
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def load_tokenizer(name: str, gguf_file: str | None = None, **options: Any) -> Any:
    """Load the tokenizer of a language model; see `load_language_model`."""
    from transformers import AutoTokenizer

    options = {"trust_remote_code": False, **options}
    found = find_gguf(name, gguf_file)
    if found:
        name, options["gguf_file"] = found
    with loading(name):
        return AutoTokenizer.from_pretrained(name, **options)
