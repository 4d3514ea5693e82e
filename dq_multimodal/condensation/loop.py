"""What all methods share: how a set begins, its steps, its checkpoints, its prefixes."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from dq_multimodal.condensation.config import NOISE, RANDOM, CondenseConfig
from dq_multimodal.condensation.distribution_matching import match_distributions
from dq_multimodal.condensation.experts import open_experts
from dq_multimodal.condensation.gradient_matching import match_gradients
from dq_multimodal.condensation.kernel_regression import match_predictions
from dq_multimodal.condensation.multisize import N_NETS, FeatureDistance, Prefixes
from dq_multimodal.condensation.nets import Net, build_net, hold_norms
from dq_multimodal.condensation.pictures import Real, check_sizes
from dq_multimodal.condensation.synthetic import Synthetic
from dq_multimodal.condensation.trajectory_matching import match_trajectories
from dq_multimodal.config import InputError
from dq_multimodal.files import put_in_place

Match = Callable[
    [Real, Synthetic, CondenseConfig, Callable[[], Net]], Iterator[Callable[[Synthetic], Tensor]]
]
"""A method: one call an outer iteration. It gives, step by step, the loss of a set or of a prefix
of it; after each the set has taken a step. What it draws comes from the state of torch."""
METHODS: dict[str, Match] = {
    "dm": match_distributions,
    "dc": match_gradients,
    "krr": match_predictions,
    "mtt": match_trajectories,
}
MOMENTUM = 0.5
"""Of the steps of the images."""
LABEL_STEP, RATE_STEP = 0.01, 0.02
"""Of a label, and of the learning rate of students as a share of what it begins as."""
SAVE_SECONDS = 20.0
AVERAGED = 50
"""Losses whose mean the progress bar shows."""
START, MEASURE = -1, -2
"""Numbers that stand for an iteration, before the first, when something is drawn."""


@dataclass
class History:
    """How a run went: its loss, the mean of each iteration, and the prefixes that were chosen.

    A choice is (iterations done, images a class of the prefix, images a class that are frozen).
    """

    losses: list[float] = field(default_factory=list)
    choices: list[tuple[int, int, int]] = field(default_factory=list)


def run_loop(
    real: Real, config: CondenseConfig, state: Path, first: list[int] | None = None
) -> tuple[Synthetic, History]:
    """Learn a synthetic set, or go on where a run that was stopped left its state.

    Everything that is drawn in an outer iteration follows from the seed and its number, and the
    state is written between two of them: a run that was stopped gives the same bits as one that
    was not, on the same machine.

    Args:
        real: On the device where the work is to be done.
        config: The request, with `iterations` and `learning_rate`.
        state: File of the state, which the caller removes when the result is written.
        first: Places in `real` of the rows with which the set begins, in the order of a set; None
            draws them.

    Returns:
        The set, detached, and how it went.

    Raises:
        InputError: If a class has too few real pictures, the loss is no number, or the state
            cannot be read.
    """
    check_sizes(real, config.images_per_class)
    if config.experts is not None:
        open_experts(config.experts).check(real, config)
    device = real.images.device
    draw_net = partial(_draw_net, real, config)
    with own_random(config.seed, START, device):
        synthetic = begin(real, config, first)
    optimiser = make_optimiser(synthetic, config)
    prefixes, history, done = Prefixes(), History(), 0
    measure, is_uniform = None, config.multisize_choice == "uniform"
    if config.multisize and not is_uniform:
        with own_random(config.seed, MEASURE, device):
            measure = FeatureDistance(real, [draw_net() for _ in range(N_NETS)])
            prefixes.choose(measure(synthetic))
    if state.exists():
        done = _read_state(state, synthetic, optimiser, prefixes, history)
    saved = monotonic()
    with tqdm(total=config.iterations, initial=done, desc=config.method, unit="it") as bar:
        for number in range(done, config.iterations or 0):
            losses = []
            with own_random(config.seed, number, device):
                for loss_of in METHODS[config.method](real, synthetic, config, draw_net):
                    loss = loss_of(synthetic)
                    losses.append(loss.detach())
                    if config.multisize:
                        if is_uniform:
                            prefixes.chosen = int(torch.randint(1, config.images_per_class, ()))
                        loss = loss + loss_of(synthetic.prefix(prefixes.chosen))
                    optimiser.zero_grad()
                    loss.backward()
                    take_step(optimiser, synthetic, prefixes.frozen * real.n_classes)
            mean = float(torch.stack(losses).mean())
            if mean != mean or abs(mean) == float("inf"):
                raise InputError(
                    f"the loss of iteration {number:,} is no number: try a smaller learning_rate "
                    f"than {config.learning_rate:g}"
                )
            history.losses.append(mean)
            if measure is not None and (number + 1) % config.multisize_period == 0:
                prefixes.choose(measure(synthetic))
                history.choices.append((number + 1, prefixes.chosen, prefixes.frozen))
            recent = history.losses[-AVERAGED:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4g}", refresh=False)
            bar.update()
            if monotonic() - saved > SAVE_SECONDS or number + 1 == config.iterations:
                _write_state(state, synthetic, optimiser, prefixes, history)
                saved = monotonic()
    if not all(value.isfinite().all() for value in synthetic.learnt.values()):
        raise InputError(
            f"some of what was learnt is no number: try a smaller learning_rate than "
            f"{config.learning_rate:g}"
        )
    return synthetic.detach(), history


def begin(real: Real, config: CondenseConfig, first: list[int] | None = None) -> Synthetic:
    """Give the set before its first step: real rows of each class, or noise."""
    n, shape = config.images_per_class * real.n_classes, real.images.shape[1:]
    device = real.images.device
    if first is not None:
        images = real.normalise(real.images[torch.tensor(first, device=device)])
    elif config.init == NOISE:
        images = torch.randn(n, *shape).to(device)
    elif config.init == RANDOM:
        drawn = [real.draw(k, config.images_per_class) for k in range(real.n_classes)]
        images = torch.stack(drawn, 1).flatten(0, 1)
    else:
        raise InputError(f"init {config.init} needs the rows of that run")
    found = Synthetic(images.requires_grad_(), real.n_classes)
    if config.learn_labels:
        targets = one_hot(found.classes, real.n_classes).float()
        found = replace(found, targets=targets.requires_grad_())
    if config.experts is not None:
        rate = torch.tensor(open_experts(config.experts).learning_rate, device=device)
        found = replace(found, rate=rate.requires_grad_())
    return found


def make_optimiser(synthetic: Synthetic, config: CondenseConfig) -> torch.optim.Optimizer:
    """Make what takes the steps of the set: SGD with momentum, but for krr and mtt Adam.

    KIP has Adam. MTT has SGD, with learning rates from 100 to 100,000: the gradient of an image is
    the smaller, the more there are, and Adam's steps are not.
    """
    if config.method not in ("krr", "mtt"):
        return torch.optim.SGD([synthetic.images], config.learning_rate or 0, momentum=MOMENTUM)
    rates = {"images": config.learning_rate, "targets": LABEL_STEP}
    if synthetic.rate is not None:
        rates["rate"] = RATE_STEP * synthetic.rate.item()
    groups = [{"params": [value], "lr": rates[name]} for name, value in synthetic.learnt.items()]
    return torch.optim.Adam(groups)


def take_step(optimiser: torch.optim.Optimizer, synthetic: Synthetic, n_frozen: int) -> None:
    """Take a step that leaves the first so many rows as they are, whatever their momentum."""
    parts = [part for part in (synthetic.images, synthetic.targets) if part is not None]
    before = [part[:n_frozen].detach().clone() for part in parts]
    optimiser.step()
    with torch.no_grad():
        for part, kept in zip(parts, before, strict=True):
            part[:n_frozen] = kept


def _draw_net(real: Real, config: CondenseConfig) -> Net:
    net = build_net(config.net, real.n_classes, real.channels, real.side, config.net_width)
    net = net.to(real.images.device)
    hold_norms(net, real)
    return net


@contextmanager
def own_random(seed: int, number: int | tuple[int, ...], device: torch.device) -> Iterator[None]:
    """Draw by the seed and a number, or some, and put the state of torch back afterwards."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        yield


def _states_of(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Give a name, the tensor and the state of all that an optimiser changes."""
    for number, group in enumerate(optimiser.param_groups):
        yield f"optimiser.{number}", group["params"][0], optimiser.state[group["params"][0]]


def _write_state(
    path: Path,
    synthetic: Synthetic,
    optimiser: torch.optim.Optimizer,
    prefixes: Prefixes,
    history: History,
) -> None:
    """Write all that the next iteration depends on."""
    found = {name: value.detach() for name, value in synthetic.learnt.items()}
    for name, _, values in _states_of(optimiser):
        for key, value in values.items():
            if value is not None:
                found[f"{name}.{key}"] = value
    found["losses"] = torch.tensor(history.losses, dtype=torch.float64)
    about = {"prefixes": vars(prefixes), "choices": history.choices}
    temporary = path.with_name(path.name + ".tmp")
    found = {name: value.contiguous().cpu() for name, value in found.items()}
    save_file(found, temporary, {"about": json.dumps(about)})
    put_in_place(temporary, path)


def _read_state(
    path: Path,
    synthetic: Synthetic,
    optimiser: torch.optim.Optimizer,
    prefixes: Prefixes,
    history: History,
) -> int:
    """Put a state back, and give the number of iterations that are done."""
    try:
        with safe_open(path, "pt", device="cpu") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {})["about"])
        with torch.no_grad():
            for name, value in synthetic.learnt.items():
                if value.shape != found[name].shape:
                    raise KeyError(name)
                value.copy_(found[name])
        for name, tensor, values in _states_of(optimiser):
            for key in [key for key in found if key.startswith(name + ".")]:
                place = "cpu" if key == f"{name}.step" else tensor.device
                values[key.removeprefix(name + ".")] = found[key].to(place)
        vars(prefixes).update(about["prefixes"])
        history.losses = found["losses"].tolist()
        history.choices = [(int(a), int(b), int(c)) for a, b, c in about["choices"]]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is not the state of this run: remove it to begin anew") from error
    return len(history.losses)
