"""The training loop of image classifiers, on Accelerate: resumable, the same batches anywhere."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.config import InputError, check_count
from dq_multimodal.models.classifiers import SMALL_SIDE
from dq_multimodal.training import record
from dq_multimodal.training.dynamics import Dynamics
from dq_multimodal.training.pictures import Pictures, draw_shifts, shift_and_flip
from dq_multimodal.training.weights import draw_rows

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


BATCH_SIZE, TEST_BATCH = 128, 500


@dataclass
class ClassifierArguments:
    """How a classifier is trained. The defaults are the schedule of the papers for CIFAR-10."""

    num_train_epochs: int = field(default=200, metadata={"help": "Passes over the rows."})
    max_steps: int = field(
        default=0,
        metadata={"help": "Steps instead of epochs, for equal work; 0 or less counts epochs."},
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Pictures a step and process. Default: 128."}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "Of SGD, falling as a cosine."})
    momentum: float = field(default=0.9, metadata={"help": "Of SGD (Nesterov)."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Of SGD."})
    warmup_ratio: float = field(default=0.0, metadata={"help": "Share of steps that warm up."})
    label_smoothing: float = field(default=0.0, metadata={"help": "In [0, 1)."})
    mirror: bool = field(
        default=True, metadata={"help": "Mirror half of the pictures; not for digits or letters."}
    )
    dataloader_num_workers: int = field(
        default=4, metadata={"help": "Processes that decode large pictures."}
    )
    seed: int = field(default=0, metadata={"help": "Of the weights, batches and shifts."})

    def __post_init__(self) -> None:
        check_count("num_train_epochs", self.num_train_epochs)
        if self.per_device_train_batch_size is not None:
            check_count("per_device_train_batch_size", self.per_device_train_batch_size)
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}")


def train_classifier(
    net: "nn.Module",
    train: Pictures,
    test: Pictures | None,
    args: ClassifierArguments,
    accelerator: "Accelerator",
    output_dir: Path,
    *,
    weights: Float[ndarray, " n"] | None = None,
    is_sampled: bool = False,
    dynamics: Dynamics | None = None,
) -> dict[str, Any]:
    r"""Train a classifier, going on from the last checkpoint in output_dir/checkpoints.

    Every epoch is one permutation of the rows, and its shifts, that follow from (seed, epoch)
    alone; each process takes its part of every global batch. So batches of the same global size
    (processes x per_device_train_batch_size) are the same for any number of processes; the
    statistics of batch norm are those of each process's own part.

    With weights $w_i$, scaled to mean 1 over the rows that are trained on, the loss of a batch of
    b rows is $\frac{1}{b} \sum_i w_i \ell_i$; or the rows of an epoch are drawn with replacement,
    in proportion to the weights, as many as a permutation would give.

    The rows left over after the last whole batch wait for the next epoch. Where dynamics are
    recorded no row waits: an epoch has one more batch, and the rows are shared out evenly.

    Args:
        net: What is trained.
        train: Rows to train on.
        test: Rows to test on; None tests nothing.
        args: How.
        accelerator: Where.
        output_dir: Holds the checkpoints.
        weights: Of all rows of `train`, at least 0.
        is_sampled: Draw rows by the weights, and leave the loss as it is.
        dynamics: Takes down what the net says of each row in each epoch.

    Returns:
        Accuracy in [0, 1] on the test pictures, rows tested, the last training loss, steps,
        seconds, whether it was resumed.
    """
    import torch

    net = net.to(memory_format=torch.channels_last)
    batch_size = (args.per_device_train_batch_size or BATCH_SIZE) * accelerator.num_processes
    steps_per_epoch, n_seen = max(1, len(train.rows) // batch_size), len(train.rows)
    if dynamics is not None:
        steps_per_epoch = math.ceil(n_seen / batch_size)
    n_seen = min(n_seen, steps_per_epoch * batch_size)
    n_steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * steps_per_epoch
    n_epochs = math.ceil(n_steps / steps_per_epoch)
    is_decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": is_decayed}, {"params": others, "weight_decay": 0.0}]
    how: dict[str, Any] = {"momentum": args.momentum, "nesterov": args.momentum > 0}
    how |= {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    optimizer = torch.optim.SGD(groups, **how)
    n_warmup = round(args.warmup_ratio * n_steps)

    def rate(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    net, optimizer = accelerator.prepare(net, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    checkpoints = record.Checkpoints(accelerator, output_dir, n_epochs)
    first_epoch = checkpoints.first
    class_of = torch.from_numpy(train.classes)
    loss_of = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=args.label_smoothing)
    factors = None
    if weights is not None:
        weights = np.where(np.isin(np.arange(len(weights)), train.rows), weights, 0)
        if not weights.any():
            raise InputError("the weights of all rows that can be trained on are 0")
        if not is_sampled:
            factors = torch.from_numpy(weights * len(train.rows) / weights.sum()).float()
    if dynamics is not None:
        dynamics.open(first_epoch, n_epochs, len(train), accelerator)
    standardise = train.standardiser(accelerator.device)
    step = first_epoch * steps_per_epoch
    started = time.perf_counter()
    loss = None
    is_quiet = not accelerator.is_main_process
    with tqdm(total=n_steps, initial=step, desc="train", unit="step", disable=is_quiet) as bar:
        for epoch in range(first_epoch, n_epochs):
            net.train()
            draws = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = np.random.default_rng((args.seed, epoch)).permutation(train.rows)[:n_seen]
            if is_sampled and weights is not None:
                order = draw_rows(weights, n_seen, args.seed, epoch)
            batches = np.array_split(order, steps_per_epoch)
            for pixels, rows in _epoch_batches(train, args, accelerator, epoch, batches):
                if step >= n_steps:
                    break
                pixels = pixels.to(accelerator.device, non_blocking=True)
                if not len(pixels):
                    raise InputError("none of the pictures of a batch can be read")
                if train.size <= SMALL_SIDE:
                    padding = max(1, train.size // 8)
                    moves, mirrors = draw_shifts(batch_size, draws, padding)
                    mirrors &= args.mirror
                    own = slice(accelerator.process_index, None, accelerator.num_processes)
                    n = len(pixels)
                    pixels = shift_and_flip(pixels, moves[:, own][:, :n], mirrors[own][:n], padding)
                classes = class_of[rows].to(accelerator.device)
                with accelerator.autocast():
                    logits = net(standardise(pixels))
                    losses = loss_of(logits, classes)
                if factors is not None:
                    losses = losses * factors[rows].to(accelerator.device)
                loss = losses.mean()
                accelerator.backward(loss)
                if dynamics is not None:
                    dynamics.note(rows, logits.detach(), classes)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                bar.update()
            if dynamics is not None:
                dynamics.finish_epoch(epoch)
            checkpoints.note(epoch)
    found = {
        "steps": step,
        "last_loss": None if loss is None else round(loss.item(), 4),
        "train_seconds": round(time.perf_counter() - started, 2),
        "is_resumed": first_epoch > 0,
    }
    if loss is not None and not math.isfinite(loss.item()):
        raise InputError(f"training diverged (loss {loss.item()}): lower the learning_rate")
    if test is not None:
        started = time.perf_counter()
        found |= measure_accuracy(net, test, accelerator, standardise)
        found["eval_seconds"] = round(time.perf_counter() - started, 2)
    return found


def measure_accuracy(
    net: "nn.Module", test: Pictures, accelerator: "Accelerator", standardise: Any
) -> dict[str, Any]:
    """Give the share of test pictures whose class has the largest logit; every one counts once."""
    import torch

    net.eval()
    own = test.rows[accelerator.process_index :: accelerator.num_processes]
    counts = torch.zeros(2, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, len(own), TEST_BATCH):
            pixels, rows = test.__getitems__(own[start : start + TEST_BATCH].tolist())
            batch = standardise(torch.from_numpy(pixels).to(accelerator.device))
            with accelerator.autocast():
                logits = net(batch)
            hits = logits.argmax(dim=1).cpu() == torch.from_numpy(test.classes[rows])
            counts += torch.tensor([hits.sum(), len(hits)])
    n_right, n_tested = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    return {"accuracy": n_right / max(1.0, n_tested), "rows_tested": int(n_tested)}


def _epoch_batches(
    train: Pictures,
    args: ClassifierArguments,
    accelerator: "Accelerator",
    epoch: int,
    batches: list[Int[ndarray, " b"]],
) -> Iterator[tuple[Any, Any]]:
    """Yield this process's part of the batches of an epoch: pictures, and which rows they are."""
    import torch

    rank, world = accelerator.process_index, accelerator.num_processes
    train.is_augmented, train.seed = True, (args.seed, epoch)
    n_workers = args.dataloader_num_workers if train.size > SMALL_SIDE else 0
    loader: Any = torch.utils.data.DataLoader(
        train,  # type: ignore[arg-type]
        batch_sampler=[batch[rank::world].tolist() for batch in batches],
        num_workers=n_workers,
        collate_fn=torch.utils.data.default_convert,  # whole batches already
    )
    yield from loader
