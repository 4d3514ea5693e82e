"""Rows as a causal language model sees them: weighted hidden states, or projected gradients."""

import hashlib
import math
import threading
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from jaxtyping import Int, UInt8
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter, Embedded, Problems
from dq_multimodal.adapters.text import ANSWER, TextAdapter, TextLayout, make_valid, split_turns
from dq_multimodal.config import InputError
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.models.locate import (
    ModelOutOfReach,
    accelerator,
    find_gguf,
    find_model,
    hash_weights,
    load_language_model,
    load_tokenizer,
)

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 512
"""Tokens of a row that are read."""
CUT = f"more than {MAX_TOKENS} tokens, of which the model reads so many"
TEMPLATE = ("### Instruction:\n", "\n\n### Response:\n")
"""What stands before a prompt and after it, the same for rows and target, whatever the columns."""
RANK, ALPHA = 8, 16
"""Of the LoRA weights, on all linear layers but the last."""
WARM_UP_RATIO, WARM_UP_ROWS = 0.05, (64, 2000)
"""Share of the rows that the LoRA weights are trained on, once, and its limits."""
WARM_UP_BATCH, LEARNING_RATE = 16, 5e-4
N_PROJECTED = 1024
"""Numbers that a gradient is projected to."""
SIGN_ROWS = 16384
"""Coordinates of a gradient that are projected together."""

Tokens = tuple[list[list[int]], list[int]]
"""Token ids of every row of a batch, and how many of them are its prompt."""


def find_language_model(name: str) -> dict[str, Any]:
    """Find a causal language model (Hub id, folder or .gguf file), and give what is recorded of it.

    That is the name, and its commit or the hash of its weights. InputError if it cannot be had.
    """
    if find_gguf(name):
        return {"model": name, "revision": None, "weights": hash_weights(name)}
    try:
        place, revision = find_model(name)
    except ModelOutOfReach as error:
        raise InputError(f"{error}: give a folder or a .gguf file as --target-model") from error
    return {"model": name, "revision": revision, "weights": hash_weights(place)}


class LanguageModel:
    """A causal language model with its tokenizer; bfloat16 on an accelerator, else float32."""

    def __init__(self, name: str, device: str | None = None, dtype: str = "auto") -> None:
        import torch

        self.description = find_language_model(name)
        place: str = name
        options: dict[str, Any] = {}
        if not find_gguf(name):
            place, options["revision"] = find_model(name)
        self.device = accelerator(device) or "cpu"
        if dtype == "auto":
            dtype = "float32" if self.device == "cpu" else "bfloat16"
        self.description |= {"dtype": dtype, "max_tokens": MAX_TOKENS}
        self.tokenizer = load_tokenizer(place, **options)
        net = load_language_model(place, dtype=getattr(torch, dtype), **options)
        net.config.use_cache = False
        self.net: Any = net.requires_grad_(requires_grad=False).to(self.device).eval()
        self._lock = threading.Lock()

    def tokenize(self, texts: list[str], *, is_begin: bool) -> list[list[int]]:
        """Give the token ids of texts; special tokens stand at the begin of a row only."""
        with self._lock:  # a tokenizer keeps settings of the call
            found = self.tokenizer(texts, add_special_tokens=is_begin, verbose=False)
        return found["input_ids"]

    def pad(self, ids: list[list[int]]) -> dict[str, "torch.Tensor"]:
        """Give rows of token ids as one tensor, zeros behind them, and their mask."""
        import torch

        sizes = torch.tensor([len(row) for row in ids])
        inputs = torch.zeros((len(ids), max(1, int(sizes.max()))), dtype=torch.long)
        mask = torch.arange(inputs.shape[1]) < sizes[:, None]
        inputs[mask] = torch.tensor([token for row in ids for token in row], dtype=torch.long)
        return {"input_ids": inputs.to(self.device), "attention_mask": mask.long().to(self.device)}


def split_row(layout: TextLayout, values: list[Any]) -> tuple[str, str]:
    """Split a row into its prompt and its response.

    Of a chat the last answer of the assistant is the response and all before it the prompt; a row
    of one text is all response; else the last column is the response.
    """
    columns = [
        [(role, "\n".join(texts)) for role, texts in split_turns(name, value) if texts]
        for name, value in zip(layout.columns, values, strict=True)
    ]
    if layout.shape in ("messages", "conversations"):
        turns = [turn for column in columns for turn in column]
        last = max((k for k, (role, _) in enumerate(turns) if role in ANSWER), default=-1)
        parts = turns[:last] if last >= 0 else [], turns[last : last + 1] if last >= 0 else turns
    else:
        parts = [turn for column in columns[:-1] for turn in column], columns[-1]
    prompt, response = (make_valid("\n\n".join(text for _, text in part)) for part in parts)
    return prompt, response


class LanguageRows:
    """What both adapters have: rows of text as tokens of a language model.

    Args:
        adapter: What reads their text, and says how long they are.
        ends_rows: Whether the end-of-text token is the last of a response.
    """

    def __init__(
        self,
        dataset: Dataset,
        adapter: TextAdapter,
        model: LanguageModel,
        *,
        ends_rows: bool = False,
    ) -> None:
        self.adapter, self.model, self.ends_rows = adapter, model, ends_rows
        self._columns = dataset.select_columns(list(adapter.layout.columns))

    def describe(self) -> dict[str, Any]:
        """Say which columns are read, and in which template."""
        return {**self.adapter.describe(), "prompt": TEMPLATE}

    def lengths(self) -> Int[ndarray, " n"]:
        """Characters of every row."""
        return self.adapter.lengths()

    def load(self, rows: Int[ndarray, " b"], view: int | None = None) -> tuple[Tokens, Problems]:
        """Give the tokens of rows; of those that are too long, prompt and response are cut.

        Where both need it each gets half of the tokens, so that a long prompt leaves a response.
        """
        del view
        layout = self.adapter.layout
        batch = self._columns[rows.tolist()]
        fields = zip(*(batch[name] for name in layout.columns), strict=True)
        prompts, responses = zip(*(split_row(layout, list(row)) for row in fields), strict=True)
        is_plain = layout.shape == "text"
        before, after = ("", "") if is_plain else TEMPLATE
        heads = self.model.tokenize([before + text for text in prompts], is_begin=True)
        tail = self.model.tokenize([after], is_begin=False)[0] if after else []
        answers = self.model.tokenize(list(responses), is_begin=False)
        end = self.model.tokenizer.eos_token_id if self.ends_rows else None
        ids, n_prompt, cut = [], [], []
        for row, head, answer in zip(rows.tolist(), heads, answers, strict=True):
            response = answer if end is None else [*answer, end]
            room = max(MAX_TOKENS // 2, MAX_TOKENS - len(response)) - len(tail)
            prompt = [*head[:room], *tail]
            ids.append([*prompt, *response][:MAX_TOKENS])
            n_prompt.append(len(prompt))
            if len(head) + len(tail) + len(response) > MAX_TOKENS:
                cut.append(row)
        return (ids, n_prompt), {CUT: cut} if cut else {}


class HiddenStates(LanguageRows, Adapter):
    r"""Position-weighted means of the last hidden states: RDS+.

    $x = \sum_i w_i h_i$ with $w_i = i / \sum_{j=1}^L j$ over the L tokens of prompt and response:
    later tokens, which have seen more of the text, weigh more (Ivison et al. 2025,
    arXiv:2503.01807; the weights are those of SGPT, Muennighoff 2022, arXiv:2202.08904). Departure:
    at most 512 tokens of a row, in a plain template in place of the chat template of Tulu.
    """

    def __init__(self, dataset: Dataset, adapter: TextAdapter, model: LanguageModel) -> None:
        Adapter.__init__(self, dataset)
        LanguageRows.__init__(self, dataset, adapter, model)

    def describe_model(self) -> dict[str, Any]:
        """Say which model, and what of it."""
        return {**self.model.description, "kind": "hidden states", "dimension": self.dimension}

    @property
    def dimension(self) -> int:
        """Size of a hidden state."""
        return int(self.model.net.config.get_text_config().hidden_size)

    def embed(self, batch: Tokens) -> Embedded:
        """Embed the tokens of rows; a row without any is zeros."""
        import torch

        inputs = self.model.pad(batch[0])
        with torch.inference_mode():
            states = self.model.net.base_model(**inputs).last_hidden_state.float()
            weights = inputs["attention_mask"].float()
            weights = weights * torch.arange(1, weights.shape[1] + 1, device=weights.device)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
            means = torch.einsum("bt,btd->bd", weights, states)
        return Embedded(means.cpu().numpy())


class Gradients(LanguageRows, Adapter):
    r"""Projected gradients of the loss of a response with respect to LoRA weights: LESS.

    $x = P^\top \nabla_\theta \ell(y \mid p)$, scaled to length 1: $\ell$ is the mean loss of the
    response tokens, theta the LoRA weights after a warm-up on a few of the rows, P a matrix of
    random signs, so that inner products are kept on average (Xia et al. 2024, arXiv:2402.04333).
    Departures: one checkpoint, after one epoch, in place of four; plain gradients for rows and
    target alike, where LESS takes the step of Adam for rows; rank 8 on all linear layers in place
    of 128 on those of attention; 1,024 projected numbers in place of 8,192.

    Args:
        model: With LoRA weights, see `warm_up`.
        signs: The projection, see `make_signs`.
    """

    def __init__(
        self,
        dataset: Dataset,
        adapter: TextAdapter,
        model: LanguageModel,
        signs: UInt8[ndarray, "p bytes"],
    ) -> None:
        import torch

        Adapter.__init__(self, dataset)
        LanguageRows.__init__(self, dataset, adapter, model, ends_rows=True)
        self._signs = torch.from_numpy(signs).to(model.device)

    @cached_property
    def _digest(self) -> str:
        """Hash of the LoRA weights and the signs."""
        hasher = hashlib.sha256(self._signs.cpu().numpy().tobytes())
        for module in lora_layers(self.model.net):
            hasher.update(module.weight.detach().cpu().numpy().tobytes())
        return hasher.hexdigest()[:16]

    def describe_model(self) -> dict[str, Any]:
        """Say which model, and what of it."""
        return {**self.model.description, "kind": "gradients", "rank": RANK, "lora": self._digest}

    @property
    def dimension(self) -> int:
        """Numbers of a projected gradient."""
        return 8 * self._signs.shape[1]

    def embed(self, batch: Tokens) -> Embedded:
        """Give the projected gradients of rows; a row without response tokens is zeros."""
        import torch

        n_rows = len(batch[0])
        sums = torch.zeros((n_rows, self.dimension), device=self.model.device)
        start = 0
        for gradient in row_gradients(self.model, batch):
            stop = start + gradient.shape[1]
            sums += project(gradient, self._signs[start:stop])
            start = stop
        return Embedded(torch.nn.functional.normalize(sums, dim=1).cpu().numpy())


def row_losses(model: LanguageModel, batch: Tokens) -> "torch.Tensor":
    """Give the mean loss of the response tokens of each row, (b,), 0 where there are none."""
    import torch

    ids, n_prompt = batch
    inputs = model.pad(ids)
    places = torch.arange(1, inputs["input_ids"].shape[1], device=model.device)
    counts = inputs["attention_mask"][:, 1:].bool()
    is_response = counts & (places >= torch.tensor(n_prompt, device=model.device)[:, None])
    logits = model.net(**inputs).logits[:, :-1][is_response].float()
    targets = inputs["input_ids"][:, 1:][is_response]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    sizes = is_response.sum(dim=1)
    rows = torch.repeat_interleave(torch.arange(len(ids), device=model.device), sizes)
    sums = torch.zeros(len(ids), device=model.device).index_add(0, rows, losses)
    return sums / sizes.clamp(min=1)


def row_gradients(model: LanguageModel, batch: Tokens) -> list["torch.Tensor"]:
    r"""Give the gradient of the loss of every row, one (b, p) tensor for each LoRA matrix.

    One pass for the batch: a matrix W with input x and output u = W x has the gradient
    $\sum_t (\partial \ell / \partial u_t) x_t^\top$, and the output in row b of the batch bears on
    the loss of that row alone.

    Raises:
        InputError: If a layer of the model mixes the rows of a batch.
    """
    import torch

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_: Any, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> None:
        seen.append((given[0], found))

    layers = lora_layers(model.net)
    with ExitStack() as stack, torch.enable_grad():
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        total = row_losses(model, batch).sum()
    if len(seen) != len(layers) or any(x.ndim != 3 for x, _ in seen):
        name = model.description["model"]
        raise InputError(f"{name} mixes the rows of a batch: no gradients of rows")
    outputs = [found for _, found in seen]
    slopes = torch.autograd.grad(total, outputs)
    return [
        torch.einsum("bto,bti->boi", slope.float(), given.detach().float()).flatten(1)
        for slope, (given, _) in zip(slopes, seen, strict=True)
    ]


def lora_layers(net: Any) -> list[Any]:
    """List the LoRA matrices of a model in the order in which it is built."""
    is_lora = (".lora_A.default", ".lora_B.default")
    return [module for name, module in net.named_modules() if name.endswith(is_lora)]


def make_signs(n_weights: int, n_projected: int, seed: int) -> UInt8[ndarray, "p bytes"]:
    """Draw the signs of a projection, a bit each, by hash: the same on every machine.

    Args:
        n_weights: Numbers of a gradient.
        n_projected: Numbers that it is projected to, a multiple of 64.
    """
    n_words = n_projected // 64
    signs = np.empty((n_weights, n_projected // 8), dtype=np.uint8)
    for start in range(0, n_weights, SIGN_ROWS):
        stop = min(start + SIGN_ROWS, n_weights)
        words = hash_numbers(seed, np.arange(start * n_words, stop * n_words, dtype=np.uint64))
        signs[start:stop] = words.astype("<u8").view(np.uint8).reshape(stop - start, -1)
    return signs


def project(gradient: "torch.Tensor", signs: "torch.Tensor") -> "torch.Tensor":
    """Multiply rows of numbers, (b, p), with signs given as bits, (p, k / 8); gives (b, k)."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=signs.device)
    sums = torch.zeros((len(gradient), 8 * signs.shape[1]), device=signs.device)
    for start in range(0, len(signs), SIGN_ROWS):
        bits = (signs[start : start + SIGN_ROWS, :, None] >> shifts) & 1
        part = gradient[:, start : start + SIGN_ROWS]
        sums += 2 * (part @ bits.flatten(1).float()) - part.sum(dim=1, keepdim=True)
    return sums


def add_lora(model: LanguageModel, seed: int) -> None:
    """Give the model LoRA weights, as PEFT draws them from the seed."""
    import peft
    import torch

    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        model.net = peft.get_peft_model(model.net, settings).eval()
    model.net.config.use_cache = False


def warm_up(model: LanguageModel, rows: LanguageRows, seed: int, file: Path) -> None:
    """Train the LoRA weights on a few of the rows, once; or read what an earlier run trained.

    A gradient says little at random weights, and half of it is zero where the second LoRA matrix
    is. Trained on 5 % of the rows (at least 64, at most 2,000), drawn by hash, in one epoch, with
    AdamW.

    Args:
        rows: What gives the tokens of the rows.
        seed: Seed of the weights and of the draw.
        file: .safetensors file of the trained weights.
    """
    import torch
    from safetensors.torch import load_file, save_file

    add_lora(model, seed)
    weights = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    if file.is_file():
        for name, value in load_file(file).items():
            weights[name].data.copy_(value)
        return
    n_rows = len(rows.lengths())
    size = min(n_rows, max(WARM_UP_ROWS[0], min(WARM_UP_ROWS[1], round(WARM_UP_RATIO * n_rows))))
    drawn = np.argsort(hash_numbers(seed, np.arange(n_rows, dtype=np.uint64)), kind="stable")[:size]
    tokens_of: dict[int, tuple[list[int], int]] = {}
    for some in _batches(np.sort(drawn)):  # in the order of the dataset, which may be a stream
        tokens_of |= zip(some.tolist(), zip(*rows.load(some)[0], strict=True), strict=True)
    batches = [[tokens_of[row] for row in some.tolist()] for some in _batches(drawn)]
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=0.0)
    with tqdm(total=size, desc="warm up", unit="row") as bar:
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / len(batches))
            ids, n_prompt = map(list, zip(*batch, strict=True))
            loss = row_losses(model, (ids, n_prompt)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(len(batch))
    if not math.isfinite(loss.item()):
        raise InputError(f"the warm-up of {model.description['model']} ended with a loss of {loss}")
    partial = file.with_name(file.name + ".partial")
    save_file({name: p.detach().cpu().contiguous() for name, p in weights.items()}, partial)
    partial.replace(file)


def _batches(rows: Int[ndarray, " k"]) -> list[Int[ndarray, " b"]]:
    return np.split(rows, range(WARM_UP_BATCH, len(rows), WARM_UP_BATCH))
