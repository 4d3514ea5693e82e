r"""Supervised fine-tuning of a pretrained causal language model on packed token rows.

A row is a prompt and a response that ends with the end-of-text token; only response tokens count.
With the loss weights $w_i$ (mean 1) of the rows i of a batch and their response tokens $y_{it}$, a
step lowers

$$-\frac{\sum_i w_i \sum_t \log p(y_{it} \mid y_{i,<t}, x_i)}{\sum_i T_i}.$$

A batch is cut into passes of rows of like length, whose gradients add up, so that little is padded
and the step is that of the whole batch. Logits are made at response positions only.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from dq_multimodal.config import InputError
from dq_multimodal.models.locate import load_language_model
from dq_multimodal.options import NEEDED, Request, check_count, in_range, option
from dq_multimodal.training.text_losses import cut_passes, token_losses
from harness.bundle import Bundle
from harness.images import is_bf16, own_state
from harness.suite import ABOVE_0, COUNTS, SHARE, Job, at_ratio

Precision = Literal["auto", "bf16", "float32"]

PASS_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of a training pass, padding included; a test has twice as many."""
Rows = list[tuple[np.ndarray, int]]
"""Token numbers of each row, and how many of them are the prompt."""


@dataclass(frozen=True)
class Protocol(Request):
    r"""Settings of one way to fine-tune all parameters, by AdamW.

    The learning rate rises over the share `warmup` of the work and falls to 0 by a cosine
    (arXiv:1608.03983, Eq. 5), taken at the middle of each step. The work is the steps or the
    response tokens, whichever ends the training.

    Where a setting goes by keep ratio, {0.2: 480, 1: 800} is 480 up to 20 % of the rows, then 800.
    Under bf16 the model computes in bf16, and AdamW works on float32 copies of its parameters.
    """

    batch_size: int = option("", NEEDED, "Rows a step; may span passes over the rows.", check_count)
    learning_rate: float = option("", NEEDED, "Peak of the schedule.", ABOVE_0)
    steps: int | dict[float, int] | None = option(
        "", None, "Steps, for all selections alike. Either this or response_tokens.", COUNTS
    )
    response_tokens: int | dict[float, int] | None = option(
        "", None, "Training ends with the step that brings the tokens to so many.", COUNTS
    )
    max_length: int = option("", 512, "Tokens after which a training row is cut.", check_count)
    warmup: float = option("", 0.05, "Share of the work.", SHARE)
    weight_decay: float = option("", 0.0, "Of AdamW, decoupled.", in_range("[0, inf)"))
    max_norm: float = option("", 1.0, "Gradients are scaled down to this norm.", ABOVE_0)
    test_rows: int | None = option("", None, "Rows of each test, the first ones.", check_count)
    precision: Precision = option("", "auto", "auto: bf16 on GPUs and on CPUs with AMX.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.response_tokens is None):
            got = f"{self.steps} and {self.response_tokens}"
            raise InputError(f"wanted steps or response_tokens, got {got}")

    def work(self, keep_ratio: float) -> int:
        """Give the steps, or the response tokens, at a keep ratio."""
        return at_ratio(self.steps or self.response_tokens, keep_ratio)

    def rate(self, share: float) -> float:
        """Give the learning rate after a share of the work."""
        if share < self.warmup:
            return self.learning_rate * share / self.warmup
        fall = (min(share, 1.0) - self.warmup) / (1 - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * fall)) / 2


def train(
    job: Job, bundle: Bundle, device: torch.device, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Fine-tune a language model on the kept rows of a task, and test it on all its tests.

    Args:
        job: The cell; `job.rows` are positions in the packed training rows.
        bundle: Holds the tables TASK/train/NET and TASK/test/NET/TEST with the columns `ids` and
            `n_prompt`, and the model in models/NET.
        device: Where it trains.
        progress: Is told the share of the work that is done, rising to 1; what it raises passes.

    Returns:
        steps, the metric "loss: TEST" of each test, in nats a response token, response_tokens of
        the kept rows, response_tokens_seen, and epochs.
    """
    with own_state(device, job.seed):
        net = copy.deepcopy(load_net(bundle.folder_path, job.net)).to(device)
        if device.type == "cpu":  # the backward pass of PyTorch's own attention is slow there
            net.set_attn_implementation("eager")
        packed = load_rows(bundle.folder_path, f"{job.task}/train/{job.net}")
        kept = [(packed[k][0][: job.protocol.max_length], packed[k][1]) for k in job.rows]
        tests = {
            name.rsplit("/", 1)[1]: load_rows(bundle.folder_path, name)[: job.protocol.test_rows]
            for name in bundle.names(f"{job.task}/test/{job.net}/")
        }
        return _train(job, net, kept, tests, device, progress)


def _train(
    job: Job,
    net: nn.Module,
    kept: Rows,
    tests: dict[str, Rows],
    device: torch.device,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    protocol: Protocol = job.protocol
    counts = np.array([count_response(row) for row in kept])
    if not counts.any():
        raise InputError(f"no kept row of {job.task} has a response within max_length tokens")
    weights, chances = np.ones(len(kept)), None
    if job.weights is not None and job.is_sampled:
        chances = np.asarray(job.weights, dtype=np.float64)
    elif job.weights is not None:
        weights = np.asarray(job.weights)
    total = protocol.work(job.keep_ratio)
    exact = parameters = list(net.parameters())
    if is_low := is_bf16(protocol, device):
        exact = [p.detach().clone() for p in parameters]
        for p in parameters:  # and no buffers: positions need more digits
            p.data = p.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        exact, protocol.learning_rate, weight_decay=protocol.weight_decay, fused=True
    )
    # a training token costs about four tokens of a test
    n_test = sum(len(ids) for rows in tests.values() for ids, _ in rows)
    n_rows = total * protocol.batch_size if protocol.steps else total / counts.mean()
    n_train = 4 * n_rows * sum(len(ids) for ids, _ in kept) / len(kept)
    train_share = n_train / (n_train + n_test)

    step, seen, done = 0, 0, 0
    batches = draw_batches(len(kept), protocol.batch_size, job.seed, chances)
    net.train()
    progress(0.0)
    while done < total:
        places = next(batches)
        n_tokens = int(counts[places].sum())
        gain = 1 if protocol.steps else n_tokens
        for part in cut_passes([len(kept[k][0]) for k in places], PASS_TOKENS[device.type]):
            chosen = places[part]
            losses, row_of = token_losses(net, [kept[k] for k in chosen], device)
            shares = torch.as_tensor(weights[chosen] / max(n_tokens, 1), dtype=torch.float32)
            (losses * shares.to(device)[row_of]).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = protocol.rate((done + gain / 2) / total)
        if is_low:
            for p, own in zip(parameters, exact, strict=True):
                own.grad, p.grad = None if p.grad is None else p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(exact, protocol.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if is_low:
            for p, own in zip(parameters, exact, strict=True):
                p.data.copy_(own)
        step, seen, done = step + 1, seen + n_tokens, done + gain
        progress(train_share * min(1.0, done / total))

    metrics, n_tested = {}, 0
    for name, rows in tests.items():

        def note(n_tokens: int) -> None:
            nonlocal n_tested
            n_tested += n_tokens
            progress(train_share + (1 - train_share) * min(1.0, n_tested / n_test))

        last = mean_loss(net, rows, device, note)
        metrics[f"loss: {name}"] = {"last": last, "best": None}
    progress(1.0)
    return {
        "steps": step,
        "metrics": metrics,
        "response_tokens": int(counts.sum()),
        "response_tokens_seen": seen,
        "epochs": round(step * protocol.batch_size / len(kept), 3),
        "batch_size": protocol.batch_size,
        "precision": "bf16" if is_low else "float32",
    }


def draw_batches(
    n_rows: int, batch_size: int, seed: int, chances: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Give batches of positions without end.

    Each pass over the rows is a new permutation, or with `chances` (above 0, in proportion) as
    many draws with replacement.
    """
    generator = np.random.default_rng(seed)
    left = np.zeros(0, dtype=np.int64)
    while True:
        while len(left) < batch_size:
            if chances is None:
                drawn = generator.permutation(n_rows)
            else:
                drawn = generator.choice(n_rows, n_rows, p=chances / chances.sum())
            left = np.concatenate([left, drawn])
        yield left[:batch_size]
        left = left[batch_size:]


def count_response(row: tuple[np.ndarray, int]) -> int:
    """Count the tokens of a row that are predicted; the first of a row never is."""
    ids, n_prompt = row
    return max(0, len(ids) - max(n_prompt, 1))


@torch.no_grad()
def mean_loss(
    net: nn.Module,
    rows: Rows,
    device: torch.device,
    note: Callable[[int], None] = lambda n_tokens: None,
) -> float:
    """Give the mean negative log-likelihood of all response tokens of all rows, in nats."""
    net.eval()
    total, count = 0.0, 0
    for part in cut_passes([len(ids) for ids, _ in rows], 2 * PASS_TOKENS[device.type]):
        losses, _ = token_losses(net, [rows[k] for k in part], device)
        total, count = total + losses.double().sum().item(), count + len(losses)
        note(sum(len(rows[k][0]) for k in part))
    net.train()
    return total / count


@functools.lru_cache(maxsize=1)
def load_net(folder: Path, name: str) -> nn.Module:
    """Load a model of a bundle in float32; kept for the next cell, which trains a copy."""
    return load_language_model(str(Bundle(folder).folder(f"models/{name}")))


@functools.lru_cache(maxsize=32)
def load_rows(folder: Path, name: str) -> Rows:
    """Read a table of token rows; kept for the next cell."""
    table = Bundle(folder).table(name).combine_chunks()
    ids = [np.asarray(row, dtype=np.int64) for row in table["ids"].to_pylist()]
    return list(zip(ids, table["n_prompt"].to_pylist(), strict=True))
