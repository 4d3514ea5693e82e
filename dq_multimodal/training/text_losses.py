"""Losses of responses under a causal language model, with and without their instructions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.models.locate import load_language_model, loading

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

ADAPTER = "adapter_config.json"
COLUMNS = ("with its instruction", "without")


def check_tokenizer(tokenizer: Any, *, is_chat: bool) -> None:
    """Raise if a tokenizer lacks what rows need to become tokens."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer of the model names no end-of-text token")
    if is_chat and not tokenizer.chat_template:
        raise InputError("the rows are chats, and the tokenizer of the model has no chat template")


def tokenise(row: dict[str, Any], tokenizer: Any, *, is_chat: bool) -> tuple[list[int], int, bool]:
    """Give the tokens of a row of `to_training_rows`, as the SFT recipe trains on them.

    Returns:
        The tokens; how many are the prompt: where those of the prompt alone and of the whole part,
        the response begins, which ends with the end-of-text token, or as the chat template has it;
        and whether the response is empty. Of a row of plain text, all is the response.
    """
    if is_chat:
        turns, last = row["prompt"], row["completion"]
        options = {"tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
        ids = tokenizer.apply_chat_template(turns + last, **options)
        is_empty = not any(turn["content"] for turn in last)
    else:
        text, response = row.get("prompt", ""), row.get("completion", row.get("text", ""))
        is_empty, end = not response, tokenizer.eos_token
        prompt = tokenizer(text)["input_ids"] if text else []
        ids = tokenizer(text + response + ("" if response.endswith(end) else end))["input_ids"]
    parts = (k for k, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b)
    return ids, next(parts, min(len(prompt), len(ids))), is_empty


def to_token_rows(
    dataset: "Dataset", tokenizer: Any, text_columns: list[str] | None, max_length: int
) -> "Dataset":
    """Turn instruction rows into tokens, cut at max_length: `ids` and `n_prompt`.

    A row without a response has n_prompt = len(ids).

    Raises:
        InputError: If the tokenizer lacks what is needed.
    """
    from dq_multimodal.training.sft import has_chats, to_training_rows

    is_chat = has_chats(dataset, text_columns)
    check_tokenizer(tokenizer, is_chat=is_chat)
    rows = to_training_rows(dataset, text_columns)
    return rows.map(
        _to_token_row,
        fn_kwargs={"tokenizer": tokenizer, "is_chat": is_chat, "max_length": max_length},
        remove_columns=rows.column_names,
        desc="tokens",
    )


def _to_token_row(row: dict[str, Any], tokenizer: Any, is_chat: bool, max_length: int) -> dict:
    ids, n_prompt, is_empty = tokenise(row, tokenizer, is_chat=is_chat)
    ids = ids[:max_length]
    return {"ids": ids, "n_prompt": len(ids) if is_empty else min(n_prompt, len(ids))}


def measure_losses(
    net: "nn.Module", rows: "Dataset", start: int, *, pass_tokens: int, device: Any
) -> ndarray:
    r"""Give the mean loss of the response tokens of rows, with and without their instructions.

    $\frac{1}{T} \sum_t -\log p(y_t \mid x, y_{<t})$ and $\frac{1}{T} \sum_t -\log p(y_t \mid
    y_{<t})$ over the same T tokens, in nats: their quotient is IFD (Li et al., "From Quantity to
    Quality", arXiv:2308.12032, equations 1 to 3). Without the instruction the response follows the
    token that begins a text, so that its first token counts in both. A row of plain text has no
    instruction: both are the same.

    Args:
        net: In evaluation mode.
        rows: From `to_token_rows`.
        start: Token that begins a text.
        pass_tokens: Tokens of a forward pass, padding included, or one row.
        device: Where the net is.

    Returns:
        (n, 2) float32; NaN where a row has no response.
    """
    import torch

    found = np.full((len(rows), len(COLUMNS)), np.nan, dtype=np.float32)
    places, texts = [], []
    for number, row in enumerate(rows):
        ids, n_prompt = row["ids"], row["n_prompt"]
        if n_prompt < len(ids):
            alone = ([start, *ids[n_prompt:]], 1)
            places += [(number, 0), (number, 1)]
            texts += [alone if n_prompt == 0 else (ids, n_prompt), alone]
    for part in cut_passes([len(ids) for ids, _ in texts], pass_tokens):
        with torch.inference_mode():
            losses, text_of = token_losses(net, [texts[k] for k in part], device)
        sums = torch.zeros(len(part), dtype=torch.float64)
        sums.index_add_(0, text_of.cpu(), losses.double().cpu())
        for k, total in zip(part, sums.tolist(), strict=True):
            ids, first = texts[k]
            found[places[k]] = total / (len(ids) - first)
    return found


def cut_passes(lengths: list[int], n_tokens: int) -> list[np.ndarray]:
    """Put rows of like length together, longest first, up to so many tokens with the padding.

    Returns:
        Positions of the rows of each pass; a row that is longer than that goes alone.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    passes, start = [], 0
    while start < len(order):
        n_rows = max(1, n_tokens // lengths[order[start]])
        passes.append(order[start : start + n_rows])
        start += n_rows
    return passes


def token_losses(
    net: "nn.Module", texts: Sequence[tuple[Any, int]], device: Any
) -> tuple["Tensor", "Tensor"]:
    """Give the negative log-likelihood of the tokens of some texts from a place on.

    Logits are made at their positions only: those of all would fill the memory.

    Args:
        net: A causal language model.
        texts: Tokens, and the place of the first that counts; the first of a text never does.
        device: Where the net is.

    Returns:
        In nats, (T,) float32, and the text of each, (T,).
    """
    import torch

    width = max(len(ids) for ids, _ in texts)
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    for k, (ids, _) in enumerate(texts):
        tokens[k, : len(ids)] = torch.as_tensor(ids)
    lengths = torch.tensor([len(ids) for ids, _ in texts])[:, None]
    firsts = torch.tensor([max(first, 1) for _, first in texts])[:, None]
    places = torch.arange(width)
    is_before = (places >= firsts - 1) & (places < lengths - 1)  # the next token counts
    number, column = is_before.nonzero(as_tuple=True)
    targets = tokens[number, column + 1].to(device)
    mask = (places < lengths).long().to(device)
    number, column = number.to(device), column.to(device)

    def choose(_: "nn.Module", inputs: tuple["Tensor"]) -> tuple["Tensor"]:
        return (inputs[0][number, column],)

    head: Any = net.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(choose)
    try:
        logits = net(input_ids=tokens.to(device), attention_mask=mask, use_cache=False).logits
    finally:
        hook.remove()
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"), number


def load_checkpoint_of(model: str, checkpoint: str, device: Any) -> "nn.Module":
    """Load a language model to be evaluated, in bf16 on a GPU.

    Args:
        model: Folder, .gguf file or Hub id.
        checkpoint: The same, or another model, or a folder with a LoRA adapter of it.
        device: Where to.

    Raises:
        InputError: If it cannot be loaded.
    """
    import torch

    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    is_adapter = (Path(checkpoint) / ADAPTER).is_file()
    net = load_language_model(model if is_adapter else checkpoint, dtype=dtype)
    if is_adapter:
        from peft import PeftModel

        with loading(checkpoint):
            net = PeftModel.from_pretrained(net, checkpoint)
    return net.to(device).eval()
