"""Image classifiers trained from scratch: the packed pixels, augmentation and nets on one device.

A cell of a suite is one call of `train`. Pixels stay uint8 on the device; crops, mirrors and holes
are drawn a whole epoch at a time by a generator on the CPU, so that the CPU and a GPU see the same
pictures; losses never leave the device while it trains.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dq_multimodal.condensation.config import CONVNET
from dq_multimodal.condensation.nets import build_net as build_convnet
from dq_multimodal.config import InputError
from dq_multimodal.models.classifiers import build_classifier
from dq_multimodal.options import NEEDED, Request, check_count, in_range, option, whole_number
from harness.bundle import Bundle
from harness.suite import AMOUNTS, COUNTS, SHARE, Job, at_ratio

Decay = Literal["cosine", "linear"]
Padding = Literal["none", "zero", "reflect"]
Precision = Literal["auto", "bf16", "float32"]
Optimizer = Literal["sgd", "adamw"]

COMPILE_STEPS = 3000
"""A GPU cell of at least so many steps is compiled by torch.compile: that takes a minute."""

BLOCK_ROWS = 4096
"""Rows that are augmented together: whole epochs of large sets would fill the memory."""


@dataclass(frozen=True)
class Protocol(Request):
    r"""Settings of one way to train, by `train`.

    The learning rate of step t = 0 ... T - 1, with w = `warmup` T and u = (t - w) / (T - w), is
    $\eta (t + 1) / w$ while t + 1 <= w, and then $\eta (1 + \cos \pi u) / 2$ ("cosine",
    arXiv:1608.03983, Eq. 5, without restarts and step by step) or $\eta (1 - u)$ ("linear"; with
    a rise before it, the one-cycle policy of arXiv:1708.07120 with a triangle).

    Where a setting may go by keep ratio, a mapping {0.1: 32, 1.0: 128} gives the value of the first
    key that is at least the keep ratio of the cell. All parameters decay.
    """

    batch_size: int | dict[float, int] = option("", NEEDED, "At most the kept rows.", COUNTS)
    learning_rate: float | dict[float, float] = option(
        "", NEEDED, "Peak of the schedule, not scaled by the batch size.", AMOUNTS
    )
    epochs: float | dict[float, float] | None = option(
        "", None, "Passes over the kept rows. Either this or steps.", AMOUNTS
    )
    steps: int | None = option("", None, "Steps, whatever the number of rows.", check_count)
    optimizer: Optimizer = option("", "sgd", "adamw: arXiv:1711.05101, without momentum's keys.")
    momentum: float = option("", 0.9, "Of SGD.", SHARE)
    nesterov: bool = option("", False, "Whether SGD looks ahead.")
    weight_decay: float = option("", 5e-4, "Added to the gradient.", in_range("[0, inf)"))
    warmup: float = option("", 0.0, "Share of the steps in which the rate rises.", SHARE)
    decay: Decay = option("", "cosine", "Shape of the fall.")
    label_smoothing: float = option("", 0.0, "Share of the target spread over all classes.", SHARE)
    crop: Padding = option("", "zero", "What a random crop, size / 8 px a side, is padded with.")
    mirror: bool = option("", True, "Whether half of the pictures are mirrored.")
    cutout: int = option(
        "",
        0,
        "Side of a square of the mean colour, px; 0: none (arXiv:1708.04552).",
        whole_number(0),
    )
    evaluations: int = option("", 1, "Tests, evenly over the steps up to the last.", check_count)
    precision: Precision = option("", "auto", "auto: bf16 on GPUs and on CPUs with AMX.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.epochs is None) == (self.steps is None):
            raise InputError(f"wanted epochs or steps, got {self.epochs} and {self.steps}")


def count_steps(protocol: Protocol, n_rows: int, keep_ratio: float) -> tuple[int, int]:
    """Give the batch size and the number of steps.

    An epoch has floor(rows / batch) steps: the rows left over after the last whole batch wait for
    the next epoch, which has another order. Fewer rows than the batch size are one batch.
    """
    batch = min(at_ratio(protocol.batch_size, keep_ratio), n_rows)
    if protocol.steps is not None:
        return batch, protocol.steps
    return batch, max(1, round(at_ratio(protocol.epochs, keep_ratio) * (n_rows // batch)))


def rate_at(protocol: Protocol, step: int, steps: int) -> float:
    """Give the learning rate of a step as a share of its peak: see `Protocol`."""
    rise = protocol.warmup * steps
    if step + 1 <= rise:
        return (step + 1) / rise
    share = min(1.0, max(0.0, (step - rise) / (steps - rise)))
    return (1 + math.cos(math.pi * share)) / 2 if protocol.decay == "cosine" else 1 - share


@dataclass(frozen=True)
class Pictures:
    """The packed images of a task on a device: (n, h, w, 3) uint8 and (n,) int64.

    The labels of the training images may be soft: (n, classes) float32.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def n_classes(self) -> int:
        """Labels count from 0."""
        if self.train_labels.ndim == 2:
            return self.train_labels.shape[1]
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    def start(
        self,
        name: str,
        rows: Tensor,
        batch: int,
        protocol: Protocol,
        generator: torch.Generator,
        chances: Tensor | None,
    ) -> tuple[nn.Module, Iterator[tuple[tuple[Tensor, ...], Tensor]]]:
        """Build a net by its name, and give the batches that it reads; see `make_batches`."""
        mean, spread = measure_colours(self.train, rows)
        net = Colours(build_net(name, self.n_classes, self.train.shape[1]), mean, spread)
        fill = mean.round().to(torch.uint8).to(rows.device)
        batches = make_batches(self, rows, batch, protocol, fill, generator, chances)
        return net, (((images,), places) for images, places in batches)

    def tests(self, n_together: int) -> Iterator[tuple[Tensor, ...]]:
        """Give what a net reads of all test rows, so many at a time."""
        return ((images,) for images in self.test.split(n_together))

    def measure(self, is_right: Tensor) -> dict[str, float]:
        """Give the metrics, in percent, of an answer to each test row: right or not, (n,) bool."""
        return {"test accuracy": 100 * int(is_right.sum()) / len(is_right)}


@functools.lru_cache(maxsize=2)
def load_pictures(bundle: Bundle, task: str, device: torch.device) -> Pictures:
    """Move the images of a task onto a device, once for all its cells."""
    arrays = (
        bundle.array(f"{task}/{split}/{name}")
        for split in ("train", "test")
        for name in ("images", "labels")
    )
    return Pictures(*(torch.tensor(np.asarray(array), device=device) for array in arrays))


@functools.lru_cache(maxsize=2)
def load_soft(bundle: Bundle, task: str, device: torch.device) -> Pictures:
    """Give the images of a task with the learnt labels of its condensed sets."""
    soft = torch.tensor(np.asarray(bundle.array(f"{task}/train/soft_labels")), device=device)
    return replace(load_pictures(bundle, task, device), train_labels=soft)


@dataclass(frozen=True)
class Draws:
    """What augmentation draws for each of n rows.

    Attributes:
        shift: (n, 2) rows and columns by which the crop is moved, in [-pad, pad].
        is_mirrored: (n,) bool.
        hole: (n, 2) row and column of the centre of the hole.
    """

    shift: Tensor
    is_mirrored: Tensor
    hole: Tensor

    @classmethod
    def make(cls, n: int, height: int, width: int, generator: torch.Generator) -> "Draws":
        """Draw on the CPU; the crop moves by up to an eighth of the side."""

        def whole(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (n,), generator=generator)

        shift = torch.stack([whole(-(side // 8), side // 8) for side in (height, width)], 1)
        is_mirrored = whole(0, 1).bool()
        return cls(shift, is_mirrored, torch.stack([whole(0, height - 1), whole(0, width - 1)], 1))


def augment(images: Tensor, rows: Tensor, draws: Draws, protocol: Protocol, fill: Tensor) -> Tensor:
    """Give rows of uint8 images cropped, mirrored and with a hole, as `Protocol` says.

    Pixel (i, j) of a row comes from (i + shift_i, j' + shift_j), where j' = w - 1 - j if it is
    mirrored. Outside the picture lies black ("zero") or its reflection without the edge twice.

    Args:
        images: (N, h, w, 3) uint8.
        rows: (n,) positions in it.
        draws: Of these rows, on the same device.
        protocol: crop, mirror and cutout are read.
        fill: (3,) uint8, the colour of holes.
    """
    _, height, width, _ = images.shape
    places, is_inside, is_hole = [], [], []
    for axis, side in enumerate((height, width)):
        line = torch.arange(side, device=images.device)
        place = line.expand(len(rows), side)
        if axis == 1 and protocol.mirror:
            place = torch.where(draws.is_mirrored[:, None], side - 1 - place, place)
        if protocol.crop != "none":
            place = place + draws.shift[:, axis, None]
        is_inside.append((place >= 0) & (place < side))
        if protocol.crop == "reflect":
            place = side - 1 - (side - 1 - place.abs()).abs()
        places.append(place.clamp(0, side - 1))
        away = line - draws.hole[:, axis, None] + protocol.cutout // 2
        is_hole.append((away >= 0) & (away < protocol.cutout))
    y, x = places
    flat = (rows[:, None, None] * height + y[:, :, None]) * width + x[:, None, :]
    found = images.view(-1, 3)[flat.view(-1)].view(len(rows), height, width, 3)
    if protocol.crop == "zero":
        found = found * (is_inside[0][:, :, None] & is_inside[1][:, None, :])[..., None]
    if protocol.cutout:
        found = torch.where(
            (is_hole[0][:, :, None] & is_hole[1][:, None, :])[..., None], fill, found
        )
    return found


def measure_colours(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and standard deviation of the pixels of some rows, (3,) each, in 0 ... 255."""
    pixels = images[rows].view(-1, 3)
    counts = torch.stack([torch.bincount(pixels[:, c], minlength=256) for c in range(3)]).cpu()
    share = counts.double() / len(pixels)
    values = torch.arange(256, dtype=torch.float64)
    mean = share @ values
    spread = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), spread.clamp(min=1.0).float()


class Colours(nn.Module):
    """A net behind the step that brings uint8 pixels (n, h, w, 3) to mean 0 and deviation 1."""

    def __init__(self, net: nn.Module, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("spread", spread.view(3, 1, 1))

    def forward(self, images: Tensor, *others: Tensor) -> Tensor:
        """Give the logits, (n, classes); what is read beside the images goes on as it is."""
        # rows of pixels seen as channels are channels_last without a copy
        scaled = (images.permute(0, 3, 1, 2).float() - self.mean) / self.spread
        return self.net(scaled, *others)


def _conv(n_in: int, n_out: int, *, pool: bool = False) -> nn.Sequential:
    """Build a 3 x 3 convolution and what follows; pooled before the normalisation, if at all."""
    conv = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
    pooled = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(conv, *pooled, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))


class Residual(nn.Sequential):
    """x + f(x), f being the modules in order."""

    def forward(self, x: Tensor) -> Tensor:
        """Add what the modules give."""
        return x + super().forward(x)


class Head(nn.Module):
    """The largest value of each channel, and a linear layer whose logits are scaled down."""

    def __init__(self, n_in: int, n_classes: int, scale: float = 0.125) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits, (n, classes)."""
        return self.linear(x.amax((2, 3))) * self.scale


def resnet9(n_classes: int, width: int = 64) -> nn.Module:
    """Build the residual net of nine layers that trains CIFAR-10 fastest for its accuracy.

    Eight 3 x 3 convolutions of 64 to 512 channels and a linear layer, 6.6 million parameters; two
    residual pairs, each after a pooling; the shape is that of D. Page, "How to train your ResNet"
    (2018), as the DAWNBench entries have it.
    """
    w = width
    return nn.Sequential(
        _conv(3, w),
        *(_conv(w, 2 * w), nn.MaxPool2d(2)),
        Residual(_conv(2 * w, 2 * w), _conv(2 * w, 2 * w)),
        *(_conv(2 * w, 4 * w), nn.MaxPool2d(2)),
        *(_conv(4 * w, 8 * w), nn.MaxPool2d(2)),
        Residual(_conv(8 * w, 8 * w), _conv(8 * w, 8 * w)),
        Head(8 * w, n_classes),
    )


def small_cnn(n_classes: int) -> nn.Module:
    """Build a net that one CPU core trains at about 2,000 pictures of 32 px a second.

    A 4 x 4 convolution of stride 2, then twice a convolution, a pooling and a residual layer: five
    convolutions in all, of 32 to 128 channels, 0.28 million parameters. Pooling comes before the
    normalisation, which then has a quarter of the work.
    """
    stem = nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False)
    return nn.Sequential(
        *(stem, nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(_conv(32, 64, pool=True), Residual(_conv(64, 64))),
        *(_conv(64, 128, pool=True), Residual(_conv(128, 128))),
        Head(128, n_classes),
    )


def build_net(name: str, n_classes: int, side: int) -> nn.Module:
    """Build a net by its name.

    It is `resnet9`, `small-cnn`, one of the papers on condensation (`convnet`, of a depth that fits
    the side, or `convnet-d3`; `convnet/32` has 32 channels and not 128), or one of
    `build_classifier` (any timm name).
    """
    own = {"resnet9": resnet9, "small-cnn": small_cnn}
    if name in own:
        return own[name](n_classes)
    kind, _, width = name.partition("/")
    if kind.startswith(CONVNET) and (not width or width.isdecimal()):
        return build_convnet(kind, n_classes, 3, side, *([int(width)] if width else []))
    return build_classifier(name, n_classes, side)


@functools.cache
def has_amx() -> bool:
    """Say whether the CPU multiplies bf16 matrices in hardware, as Linux reports it."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "amx_bf16" in info.read_text()


def is_bf16(protocol: Any, device: torch.device) -> bool:
    """Say whether a cell computes in bf16."""
    if protocol.precision == "auto":
        return device.type == "cuda" or has_amx()
    return protocol.precision == "bf16"


def pays_to_compile(device: torch.device, steps: int) -> bool:
    """Say whether the training step of a cell is compiled."""
    return device.type == "cuda" and steps >= COMPILE_STEPS and can_compile(device)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Try torch.compile: it needs a C compiler and more, which a machine may lack."""
    try:
        torch.compile(lambda x: (x * x).sum())(torch.ones(64, device=device))
    except Exception:  # of many kinds, by what is missing
        return False
    return True


def draw_order(
    n_rows: int, batch: int, generator: torch.Generator, chances: Tensor | None = None
) -> Tensor:
    """Draw the places of the rows of an epoch, of whole batches, on the CPU; see `make_batches`."""
    n = n_rows // batch * batch
    if chances is None:
        return torch.randperm(n_rows, generator=generator)[:n]
    return torch.multinomial(chances, n, replacement=True, generator=generator)


def make_batches(
    pictures: Pictures,
    rows: Tensor,
    batch: int,
    protocol: Protocol,
    fill: Tensor,
    generator: torch.Generator,
    chances: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give augmented batches and the places of their rows in `rows`, epoch after epoch.

    What chance decides is drawn on the CPU, an epoch at a time, and moved once. An epoch is a
    permutation of the rows, or with `chances` as many draws with replacement.
    """
    device, (_, height, width, _) = rows.device, pictures.train.shape
    n = len(rows) // batch * batch
    block = max(1, BLOCK_ROWS // batch) * batch

    def move(values: Tensor) -> Tensor:
        if device.type == "cuda":  # a copy from pinned memory does not stop the host
            return values.pin_memory().to(device, non_blocking=True)
        return values

    while True:
        order = move(draw_order(len(rows), batch, generator, chances))
        draws = Draws.make(n, height, width, generator)
        parts = [move(part) for part in (draws.shift, draws.is_mirrored, draws.hole)]
        for start in range(0, n, block):
            places = order[start : start + block]
            drawn = Draws(*(part[start : start + block] for part in parts))
            images = augment(pictures.train, rows[places], drawn, protocol, fill)
            yield from zip(images.split(batch), places.split(batch), strict=True)


def check_net(net: nn.Module, pictures: Pictures) -> Tensor:
    """Say of each test row whether its highest logit is its label, (n,) bool, on the device."""
    n_together = 1000 if pictures.test.device.type == "cuda" else 250
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(*inputs).argmax(1) for inputs in pictures.tests(n_together)])
    net.train()
    return found == pictures.test_labels


def make_optimizer(net: nn.Module, protocol: Protocol) -> torch.optim.Optimizer:
    """Make the optimizer of a protocol; the schedule sets the rate."""
    options: dict[str, Any] = {"lr": 0.0, "weight_decay": protocol.weight_decay, "fused": True}
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), **options)
    options |= {"momentum": protocol.momentum, "nesterov": protocol.nesterov}
    return torch.optim.SGD(net.parameters(), **options)


@contextmanager
def own_state(device: torch.device, seed: int) -> Iterator[None]:
    """Seed everything, and put the state of the process back afterwards."""
    is_tuned = torch.backends.cudnn.benchmark
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.backends.cudnn.benchmark = device.type == "cuda"
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = is_tuned


def train(
    job: Job, bundle: Bundle, device: torch.device, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Train a net on the kept rows of a task, and test it on all test images.

    Args:
        job: The cell; `job.rows` are positions in the packed training images.
        bundle: Holds TASK/train/images, TASK/train/labels and the same of test; for a soft cell
            also TASK/train/soft_labels, (n, classes), by which the loss is the cross entropy
            - sum_k y_k log p_k.
        device: Where it trains.
        progress: Is told the share of the work that is done, rising to 1; what it raises passes.

    Returns:
        steps, epochs, batch_size, precision, compiled, and the metric "test accuracy" in percent.
    """
    load = load_soft if job.is_soft else load_pictures
    return train_on(job, load(bundle, job.task, device), device, progress)


def train_on(
    job: Job, pictures: Pictures, device: torch.device, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Do the work of `train` on pictures that are loaded."""
    with own_state(device, job.seed):
        return _train(job, pictures, device, progress)


def _train(
    job: Job, pictures: Pictures, device: torch.device, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Do the work of `train_on`, in its state."""
    protocol: Protocol = job.protocol
    rows = torch.tensor(job.rows, dtype=torch.int64, device=device)
    labels = pictures.train_labels[rows]
    given = None if job.weights is None else torch.tensor(job.weights, dtype=torch.float32)
    chances = given if job.is_sampled else None
    weights = None if given is None or job.is_sampled else given.to(device)
    batch, steps = count_steps(protocol, len(rows), job.keep_ratio)

    generator = torch.Generator().manual_seed(job.seed)
    net, batches = pictures.start(job.net, rows, batch, protocol, generator, chances)
    net.to(device, memory_format=torch.channels_last).train()
    forward: Callable[..., Tensor] = net
    if is_compiled := pays_to_compile(device, steps):
        torch.compiler.reset()  # a process compiles only so many nets; files keep what was made
        forward = torch.compile(net, dynamic=False)
    optimizer = make_optimizer(net, protocol)
    loss_of = nn.CrossEntropyLoss(reduction="none", label_smoothing=protocol.label_smoothing)
    peak = at_ratio(protocol.learning_rate, job.keep_ratio)

    n_tests = min(protocol.evaluations, steps)
    tests_at = {steps * (k + 1) // n_tests for k in range(n_tests)}
    n_tested = len(pictures.test_labels)
    total, done = 3 * batch * steps + n_tested * n_tests, 0  # a test is a third of a step
    is_low = is_bf16(protocol, device)
    right = []
    progress(0.0)
    for step in range(steps):
        inputs, places = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate_at(protocol, step, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_low):
            logits = forward(*inputs)
        losses = loss_of(logits.float(), labels[places])
        # weights have mean 1 over all kept rows: the expectation is the weighted loss of all
        (losses if weights is None else losses * weights[places]).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 3 * batch
        progress(min(1.0, done / total))
        if step + 1 in tests_at:
            with torch.autocast(device.type, torch.bfloat16, enabled=is_low):
                right.append(check_net(net, pictures))
            done += n_tested
    found = [pictures.measure(is_right) for is_right in right]
    progress(1.0)
    return {
        "steps": steps,
        "metrics": {
            name: {
                "last": last,
                "best": max(one[name] for one in found) if len(found) > 1 else None,
            }
            for name, last in found[-1].items()
        },
        "epochs": round(steps / (len(rows) // batch), 3),
        "batch_size": batch,
        "precision": "bf16" if is_low else "float32",
        "compiled": "default" if is_compiled else None,
    }
