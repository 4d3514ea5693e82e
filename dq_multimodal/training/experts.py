"""Nets trained on the real pictures, epoch by epoch, which trajectory matching follows."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dq_multimodal.condensation.config import NO_AUGMENTATION, OPERATIONS, CondenseConfig
from dq_multimodal.config import InputError, check_count
from dq_multimodal.files import count
from dq_multimodal.training import record
from dq_multimodal.training.arguments import SOURCE, flags_of, load_rows

if TYPE_CHECKING:
    from dq_multimodal.condensation.experts import Trajectory
    from dq_multimodal.condensation.pictures import Real

CondenseFlags: Any = flags_of(
    *(*SOURCE, "image_folder", "image_column", "label_column", "image_size", "net", "net_width"),
    config=CondenseConfig,
    dataset="uoft-cs/cifar10",
)


@dataclass
class ExpertArguments(CondenseFlags):
    """What to train on, by the options of `condense`, and how. The defaults are those of MTT."""

    augment: list[str] = field(
        default_factory=lambda: list(NO_AUGMENTATION),
        metadata={"help": f"Operations of DSA, one a batch: {' '.join(OPERATIONS)}, or none."},
    )
    n_experts: int = field(default=10, metadata={"help": "Nets to train; the paper has 200."})
    num_train_epochs: int = field(default=50, metadata={"help": "Passes over the rows."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Pictures a step."})
    learning_rate: float = field(default=0.01, metadata={"help": "Of plain SGD, constant."})
    seed: int = field(default=0, metadata={"help": "Of the weights, batches and augmentation."})
    output_dir: str = field(default="runs/experts", metadata={"help": "Folder of the experts."})

    def __post_init__(self) -> None:
        for name in ("n_experts", "num_train_epochs", "per_device_train_batch_size"):
            check_count(name, getattr(self, name))
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}")


def train_experts(args: ExpertArguments) -> None:
    """Train them, each in one process, and write them into output_dir; say what came out.

    As in MTT (Cazenave et al., CVPR 2022): plain SGD, without momentum and decay. Weights, batches
    and augmentation follow from the seed, the number of the expert and the epoch, so they are the
    same for any number of processes, and after a stop training goes on as if there had been none.
    """
    from dq_multimodal.condensation.experts import Trajectory, describe_experts, write_about
    from dq_multimodal.condensation.pictures import read_real
    from dq_multimodal.data.source import pin_of

    started, folder = time.perf_counter(), Path(args.output_dir)
    accelerator = record.make_accelerator()
    options = {option: getattr(args, flag) for flag, option in args.OPTIONS.items()}
    config = CondenseConfig(**options, augment=tuple(args.augment))
    source = load_rows(args)
    asked = record.describe_request(asdict(args), {"source": pin_of(source.origin)})
    if not record.begin(folder, asked, accelerator):
        return
    real = read_real(source, config).to(accelerator.device)
    made = [Trajectory(folder, k, args.num_train_epochs) for k in range(args.n_experts)]
    own = list(enumerate(made))[accelerator.process_index :: accelerator.num_processes]
    n_done = sum(len(each.losses) for _, each in own)
    total, is_quiet = len(own) * args.num_train_epochs, not accelerator.is_main_process
    with tqdm(total=total, initial=n_done, unit="epoch", disable=is_quiet) as bar:
        for k, each in own:
            if not each.is_whole:
                train_expert(each, k, real, config, args, bar)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    losses = [Trajectory(folder, k, args.num_train_epochs).losses for k in range(args.n_experts)]
    about = {"n_experts": args.n_experts, "n_epochs": args.num_train_epochs}
    about |= {"learning_rate": args.learning_rate} | describe_experts(real, config)
    write_about(folder, about | {"asked": asked, "losses": losses})
    seconds = round(time.perf_counter() - started, 2)
    record.finish(folder, asked, accelerator.device, losses=losses, seconds=seconds)
    last = sum(each[-1] for each in losses) / len(losses)
    accelerator.print(
        f"{count(args.n_experts, 'expert')} of {args.net}, each of "
        f"{count(args.num_train_epochs, 'epoch')}, last loss {last:.3g}; "
        f"{folder} is ready as --experts"
    )


def train_expert(
    trajectory: "Trajectory",
    k: int,
    real: "Real",
    config: CondenseConfig,
    args: ExpertArguments,
    bar: tqdm,
) -> None:
    """Train expert k for the epochs that its trajectory lacks.

    Raises:
        InputError: If the loss is no number.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from dq_multimodal.condensation.augmentation import draw_augmentation
    from dq_multimodal.condensation.loop import own_random
    from dq_multimodal.condensation.nets import build_net

    device, saved = real.images.device, time.monotonic()
    with own_random(args.seed, (k, 0), device):
        net = build_net(config.net, real.n_classes, real.channels, real.side, config.net_width)
    trajectory.begin(net.to(device))
    optimiser = torch.optim.SGD(net.parameters(), lr=args.learning_rate)
    for epoch in range(len(trajectory.losses) + 1, args.num_train_epochs + 1):
        total = torch.zeros((), device=device)
        with own_random(args.seed, (k, epoch), device):
            order = torch.randperm(len(real.images)).to(device)
            for rows in order.split(args.per_device_train_batch_size):
                augment = draw_augmentation(config.augment, real.side, len(rows))
                logits = net(augment(real.normalise(real.images[rows])))
                loss = cross_entropy(logits, real.classes[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.detach() * len(rows)
        mean = total.item() / len(real.images)
        if not math.isfinite(mean):
            raise InputError(f"training diverged (loss {mean}): lower the learning_rate")
        trajectory.note(net, mean)
        is_last = epoch == args.num_train_epochs
        if is_last or time.monotonic() - saved >= record.SAVE_SECONDS:
            trajectory.save()
            saved = time.monotonic()
        bar.set_postfix(expert=k, loss=f"{mean:.3g}", refresh=False)
        bar.update()
