"""Supervised fine-tuning on instruction rows, through TRL; the loss counts responses only."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.adapters.text import TextLayout, detect_layout, field_texts
from dq_multimodal.config import InputError
from dq_multimodal.models.locate import (
    ModelOutOfReach,
    find_gguf,
    find_model,
    load_tokenizer,
    loading,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTTrainer

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""ShareGPT names of the chat roles."""


def to_training_rows(dataset: "Dataset", text_columns: list[str] | None = None) -> "Dataset":
    """Turn instruction rows into the `prompt` and `completion` columns that TRL trains on.

    - Alpaca: the prompt is `### Instruction: ... ### Input: ... ### Response:` (no input part
      where the input is empty), the completion is the output.
    - prompt/completion: as they are.
    - messages, conversations: the last assistant turn is the completion, all before it the
      prompt (its earlier answers are not trained on), rendered by the chat template of the
      tokenizer. Only roles and texts are kept: tool calls are not.
    - columns named by the user: the last is the completion, the others the prompt.
    - text: one `text` column, every token of which counts.

    No row is dropped here.

    Raises:
        InputError: If no shape fits, or a chat has no assistant turn.
    """
    from datasets import Features, Value

    layout = detect_layout(dataset.column_names, tuple(text_columns) if text_columns else None)
    features = None  # those of chats are found out from the rows
    if layout.shape == "text":
        features = Features({"text": Value("string")})
    elif all(isinstance(dataset.features[column], Value) for column in layout.columns):
        features = Features({"prompt": Value("string"), "completion": Value("string")})
    return dataset.map(
        _convert,
        with_indices=True,
        fn_kwargs={"layout": layout},
        remove_columns=dataset.column_names,
        features=features,
        desc="prompts",
    )


def _convert(row: dict[str, Any], number: int, layout: TextLayout) -> dict[str, Any]:
    if layout.shape == "text":
        return {"text": _text(row["text"])}
    if layout.shape in ("messages", "conversations"):
        return _split_chat(row, number, layout)
    if layout.shape == "prompt_completion":
        return {name: _turns_or_text(row[name]) for name in ("prompt", "completion")}
    if layout.shape == "alpaca":
        names = {"instruction": "Instruction", "input": "Input"}
        parts = [(names[c], _text(row[c])) for c in layout.columns if c != "output"]
        response = _text(row["output"])
    else:
        parts = [(c, _text(row[c])) for c in layout.columns[:-1]]
        response = _text(row[layout.columns[-1]])
    prompt = "".join(f"### {name}:\n{text}\n\n" for name, text in parts if text)
    return {"prompt": prompt + "### Response:\n", "completion": response}


def _split_chat(row: dict[str, Any], number: int, layout: TextLayout) -> dict[str, Any]:
    if any(not isinstance(turn, dict) for turn in row[layout.shape] or []):
        raise InputError(f"row {number}: {layout.shape} must be a list of turns with role and text")
    turns = [
        {
            "role": ROLES.get(role, role),
            "content": _text(turn.get("content") or turn.get("value")),
        }
        for turn in row[layout.shape] or []
        for role in [turn.get("role") or turn.get("from")]
    ]
    if layout.shape == "conversations" and _text(row.get("system")):
        turns.insert(0, {"role": "system", "content": _text(row["system"])})
    last = max((k for k, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if not last:
        raise InputError(f"row {number} has no answer of an assistant to train on")
    return {"prompt": turns[:last], "completion": [turns[last]]}


def _turns_or_text(value: Any) -> Any:
    """Keep a list of chat turns as it is; everything else becomes one string."""
    is_chat = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    return value if is_chat and value else _text(value)


def _text(value: Any) -> str:
    return "\n".join(field_texts(value))


def has_chats(dataset: "Dataset", text_columns: list[str] | None = None) -> bool:
    """Say whether the rows are lists of chat turns, which a chat template has to render."""
    layout = detect_layout(dataset.column_names, tuple(text_columns) if text_columns else None)
    if layout.shape == "prompt_completion":
        return type(dataset.features["prompt"]).__name__ == "List"
    return layout.shape in ("messages", "conversations")


def check_model(
    name: str,
    *,
    needs_chat_template: bool,
    gguf_file: str | None = None,
    has_images: bool = False,
) -> None:
    """Raise early, in one line, when a model cannot be had, wants code run, or reads no such rows.

    Args:
        name: Folder, .gguf file or Hub id.
        needs_chat_template: Whether its tokenizer has to have a chat template.
        gguf_file: Name of a .gguf file in the folder.
        has_images: Whether it has to read images beside text.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    where: dict[str, Any] = {"trust_remote_code": False}
    if found := find_gguf(name, gguf_file):
        place, where["gguf_file"] = found
    else:
        try:
            place, where["revision"] = find_model(name)
        except ModelOutOfReach as error:
            raise InputError(
                f"{error}: give a folder as --model_name_or_path, or see "
                "recipes/configs/demo.yaml (`make demo`)"
            ) from error
        if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
            raise InputError(f"the folder {name} holds no model: it has no config.json")
    tokenizer: Any = None
    with loading(name):
        kind = AutoConfig.from_pretrained(place, **where).model_type
        if has_images and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            tokenizer = AutoProcessor.from_pretrained(place, **where)
    if has_images and not hasattr(tokenizer, "image_processor"):
        raise InputError(f"{name} is no vision-language model: it holds a model of type {kind}")
    if found and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"{name} is no causal language model: it holds a model of type {kind}")
    if needs_chat_template:
        tokenizer = tokenizer or load_tokenizer(place, **where)
        if not tokenizer.chat_template:
            raise InputError(
                f"the rows are chats and {name} has no chat template: give --chat_template_path"
            )


def response_loss(trainer: "SFTTrainer", dataset: "Dataset", batch_size: int) -> dict[str, Any]:
    r"""Measure the mean negative log-likelihood of the response tokens of held-out rows.

    $-\frac{1}{T} \sum_t \log p(y_t \mid y_{<t})$ over all T response tokens of all rows, in nats.
    Every process takes its share of the batches; the sums are added up, so that the number does
    not depend on the batch size or on how many processes there are.

    Args:
        trainer: After training; its model is used as it is, wrapped or not.
        dataset: Rows that its collator takes; prepared ones (input_ids and labels) go by length.
        batch_size: Rows in a forward pass.

    Returns:
        The loss, the number of response tokens and of rows.
    """
    import torch

    accelerator, model = trainer.accelerator, trainer.model_wrapped
    model.eval()
    rows = list(range(len(dataset)))
    if "input_ids" in dataset.column_names:
        lengths = [len(ids) for ids in dataset["input_ids"]]
        rows.sort(key=lambda k: -lengths[k])
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    n_rounds = math.ceil(len(batches) / accelerator.num_processes)
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(n_rounds):
        at = number * accelerator.num_processes + accelerator.process_index
        batch = batches[at] if at < len(batches) else batches[-1]
        inputs = trainer.data_collator([dataset[k] for k in batch])
        inputs = {name: inputs[name].to(accelerator.device) for name in inputs}
        labels = inputs.pop("labels")
        with torch.no_grad(), accelerator.autocast():
            logits = model(**inputs).logits
        if at < len(batches):  # all processes make as many passes; spare ones do not count
            targets = labels[:, 1:].reshape(-1)
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().reshape(len(targets), -1), targets, reduction="sum"
            )
            sums += torch.tensor([losses.item(), (targets != -100).sum().item()])
    total, n_tokens = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
    model.train()
    return {
        "response_loss": total / n_tokens if n_tokens else None,
        "response_tokens": int(n_tokens),
        "rows": len(dataset),
    }
