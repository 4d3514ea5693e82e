"""Does training on textured pictures stay closer to training on all of them? (ADQ, Fig. 4.)

    python eval/trajectories.py [--model resnet10-narrow] [--epochs 4] [--seeds 2]

Reads CIFAR-10 in the folder of real data (DQ_TEST_DATA, default ../shared/data). The pictures, one
patch of 32 px each, are ranked by texture level and cut into equal thirds High, Medium and Low;
Random is a third drawn by chance, the control that the paper lacks. From the same weights one net
is trained on all rows (the expert) and one on each third (the students), at a constant rate.

The distance is the L2 norm of the difference of all parameters; the paper leaves its own to an
appendix that we do not have. `ratio` is that over the way of the expert from its start. An epoch
of the expert has three times the steps of an epoch of a student, so distances are given both after
equal epochs, as in the paper, and after equal steps. A round is one epoch of a student, a third of
one of the expert; after each round the net is saved, and what is saved is not trained again.
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import fail
from jaxtyping import Float, Int
from numpy import ndarray
from tqdm import tqdm

if TYPE_CHECKING:
    from torch import nn

    from dq_multimodal.training.pictures import Pictures

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
EXPERT = "Expert"
THIRDS = ("High", "Medium", "Low")
ROUNDS = len(THIRDS)  # in an epoch of the expert


@dataclass
class Plan:
    """What all nets of one seed have in common; `n_steps` are those of a round."""

    args: argparse.Namespace
    n_classes: int
    mean: list[float]
    std: list[float]
    n_steps: int
    device: Any
    seed: int

    def file_of(self, name: str, number: int) -> Path:
        """Name the file of a net after so many rounds."""
        return self.args.work_dir / f"seed-{self.seed}" / name / f"round-{number:03d}.safetensors"


def main() -> None:
    """Train what is not trained yet, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet10-narrow")
    parser.add_argument("--epochs", type=int, default=4, help="Passes over their own rows.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=0.05, help="Constant.")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/trajectories"))
    parser.add_argument("--output", type=Path, default=ROOT / "eval/results/trajectories.json")
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 1:
        fail(f"epochs and seeds must be at least 1, got {args.epochs} and {args.seeds}")
    from dq_multimodal import InputError
    from dq_multimodal.atomic import write_text
    from dq_multimodal.training import record

    asked = {name: getattr(args, name) for name in ("model", "batch_size", "learning_rate")}
    try:
        record.is_complete(args.work_dir, asked)
        train, test, labels = load()
        record.start(args.work_dir, asked)
        document = measure_all(args, train, test, labels)
    except InputError as error:
        fail(str(error))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(document, indent=2) + "\n")
    for run in document["runs"]:
        for name, found in run["students"].items():
            ends = [found[f"equal_{unit}"][-1]["distance"] for unit in ("epochs", "steps")]
            said = "distance {:.3f} after equal epochs, {:.3f} after equal steps".format(*ends)
            print(f"seed {run['seed']}, {name}: {said}; test accuracy {found['accuracy']:.4f}")


def load() -> "tuple[Pictures, Pictures, tuple[str, ...]]":
    """Decode the training and the test rows."""
    from dq_multimodal.training.image_data import ImageDataArguments
    from dq_multimodal.vision.columns import match_classes

    if not (DATA / "cifar10").is_dir():
        fail(f"no cifar10 in {DATA} (set DQ_TEST_DATA)")
    sets = [ImageDataArguments(str(DATA / "cifar10" / f"{s}-*.parquet")) for s in ("train", "test")]
    rows = [one.load().dataset for one in sets]
    size = sets[0].find_size(rows[0])
    train, labels = sets[0].pictures(rows[0], size, name="decode")
    test, test_labels = sets[1].pictures(rows[1], size, name="decode test")
    test.classes = match_classes(test.classes, test_labels, labels)
    return train, test, labels


def measure_all(args: Any, train: "Pictures", test: "Pictures", labels: Any) -> dict[str, Any]:
    """Train and measure all nets of all seeds."""
    import torch

    from dq_multimodal.training.pictures import pixel_statistics
    from dq_multimodal.training.record import device_name

    levels = texture_levels(train)
    thirds = cut_thirds(train.rows, levels)
    n_third = len(thirds["High"])
    n_steps = n_third // args.batch_size
    if not n_steps:
        fail(f"a third has {n_third} rows, less than one batch of {args.batch_size}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = pixel_statistics(train)
    runs = []
    for seed in range(args.seeds):
        drawn = np.random.default_rng((seed, 0, 1)).permutation(train.rows)[:n_third]
        students = {**thirds, "Random": np.sort(drawn)}
        plan = Plan(args, len(labels), mean, std, n_steps, device, seed)
        train_net(plan, EXPERT, train, train.rows, ROUNDS * args.epochs)
        for name, rows in students.items():
            train_net(plan, name, train, rows, args.epochs)
        runs.append({"seed": seed, **measure(plan, list(students), args.epochs, test)})
    classes = {name: np.take(labels, train.classes[rows]) for name, rows in thirds.items()}
    return {
        "command": " ".join(["python", "eval/trajectories.py", *sys.argv[1:]]),
        "device": device_name(device),
        "dataset": "CIFAR-10",
        **{name: getattr(args, name) for name in ("model", "batch_size", "learning_rate")},
        "rows": len(train.rows),
        "rows_a_third": n_third,
        "epochs": args.epochs,
        "steps_an_epoch": {"expert": ROUNDS * n_steps, "student": n_steps},
        "mean_texture": {name: float(levels[rows].mean()) for name, rows in thirds.items()},
        "rows_a_class": {name: dict(Counter(sorted(v.tolist()))) for name, v in classes.items()},
        "runs": runs,
    }


def texture_levels(pictures: "Pictures") -> Float[ndarray, " n"]:
    """Measure the texture level of every picture, as the scores of adq do."""
    from dq_multimodal.core.texture import image_texture
    from dq_multimodal.vision.views import LUMA

    blocks = np.array_split(np.arange(len(pictures)), 1 + len(pictures) // 1000)
    pixels = (pictures.__getitems__(rows.tolist())[0] for rows in blocks)
    return np.concatenate([image_texture(block @ LUMA)[0] for block in pixels])


def cut_thirds(rows: Int[ndarray, " k"], levels: Float[ndarray, " n"]) -> dict[str, ndarray]:
    """Cut rows into equal thirds by falling texture level; the lower row first in a tie.

    Where there is no multiple of three, the one or two rows of the least texture are left out.
    """
    order = rows[np.lexsort((rows, -levels[rows]))]
    parts = np.split(order[: len(rows) // 3 * 3], 3)
    return {name: np.sort(part) for name, part in zip(THIRDS, parts, strict=True)}


def train_net(
    plan: Plan, name: str, pictures: "Pictures", rows: Int[ndarray, " k"], n_rounds: int
) -> int:
    """Train one net round by round, from the last round saved; gives the rounds trained now.

    Every epoch is one permutation of the rows that follows from (seed, epoch), cut into rounds.
    """
    import torch

    from dq_multimodal.training.pictures import draw_shifts, shift_and_flip

    done = 0
    while plan.file_of(name, done + 1).is_file():
        done += 1
    net, optimizer = start_net(plan, pictures.size, plan.file_of(name, done) if done else None)
    if not done:
        save_round(net, optimizer, plan.file_of(name, 0))
    mean, std = (255 * torch.tensor(v, device=plan.device) for v in (plan.mean, plan.std))
    loss_of = torch.nn.CrossEntropyLoss()
    padding, size = max(1, pictures.size // 8), plan.args.batch_size
    for number in range(done + 1, n_rounds + 1):
        epoch, part = divmod(number - 1, ROUNDS if name == EXPERT else 1)
        order = np.random.default_rng((plan.seed, epoch)).permutation(rows)
        draws = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
        said = f"seed {plan.seed}, {name}, round {number} of {n_rounds}"
        net.train()
        for step in tqdm(range(plan.n_steps), desc=said, unit="step"):
            own = order[(part * plan.n_steps + step) * size :][:size].tolist()
            pixels, classes = (torch.from_numpy(a) for a in pictures.__getitems__(own))
            moves, mirrors = draw_shifts(len(pixels), draws, padding)
            moved = shift_and_flip(pixels.to(plan.device), moves, mirrors, padding)
            batch = ((moved - mean) / std).permute(0, 3, 1, 2)
            loss = loss_of(net(batch), classes.to(plan.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        save_round(net, optimizer, plan.file_of(name, number))
    return max(0, n_rounds - done)


def start_net(plan: Plan, size: int, file: Path | None = None) -> "tuple[nn.Module, Any]":
    """Build a net and its optimizer as they were saved, or as all nets of a seed start."""
    import torch
    from safetensors.torch import load_file

    from dq_multimodal.vision.classifiers import build_classifier

    torch.manual_seed(plan.seed)
    net = build_classifier(plan.args.model, plan.n_classes, size)
    net = net.to(plan.device, memory_format=torch.channels_last)
    rate = plan.args.learning_rate
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True)
    if file is not None:
        state = load_file(file, device=str(plan.device))
        net.load_state_dict({k.split(".", 1)[1]: v for k, v in state.items() if k[0] in "pb"})
        for name, value in net.named_parameters():
            if f"momentum.{name}" in state:
                optimizer.state[value]["momentum_buffer"] = state[f"momentum.{name}"]
    return net, optimizer


def save_round(net: "nn.Module", optimizer: Any, file: Path) -> None:
    """Save all that training goes on from: parameters, buffers and momentum."""
    from safetensors.torch import save_file

    from dq_multimodal.atomic import put_in_place

    state = {f"parameter.{name}": value.detach() for name, value in net.named_parameters()}
    state |= {f"buffer.{name}": value for name, value in net.named_buffers()}
    moved = [(name, value) for name, value in net.named_parameters() if value in optimizer.state]
    state |= {f"momentum.{name}": optimizer.state[v]["momentum_buffer"] for name, v in moved}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, temporary)
    put_in_place(temporary, file)


def measure(plan: Plan, students: list[str], n_epochs: int, test: "Pictures") -> dict[str, Any]:
    """Give the distances of all students from the expert, and the accuracy of all nets."""
    start = plan.file_of(EXPERT, 0)

    def compare(name: str, number: int, of_expert: int) -> dict[str, float]:
        expert, student = plan.file_of(EXPERT, of_expert), plan.file_of(name, number)
        found = {"distance": distance(student, expert), "from_start": distance(student, start)}
        return {**found, "ratio": found["distance"] / distance(expert, start)}

    epochs, n_rounds = range(1, n_epochs + 1), ROUNDS * n_epochs
    files = [plan.file_of(EXPERT, k) for k in range(1, n_rounds + 1)]
    expert = {
        "from_start": [distance(file, start) for file in files],
        "accuracy": accuracy(plan, EXPERT, n_rounds, test),
        "accuracy_at_steps_of_students": accuracy(plan, EXPERT, n_epochs, test),
    }
    found: dict[str, Any] = {"expert": expert, "students": {}}
    for name in students:
        found["students"][name] = {
            "equal_epochs": [{"epochs": k, **compare(name, k, ROUNDS * k)} for k in epochs],
            "equal_steps": [{"steps": k * plan.n_steps, **compare(name, k, k)} for k in epochs],
            "accuracy": accuracy(plan, name, n_epochs, test),
        }
    return found


def distance(a: Path, b: Path) -> float:
    """Give the L2 norm of the difference of all parameters of two saved nets."""
    from safetensors.numpy import load_file

    one, other = load_file(a), load_file(b)
    names = [name for name in one if name.startswith("parameter.")]
    return float(np.sqrt(sum(np.square(one[n] - other[n], dtype=float).sum() for n in names)))


def accuracy(plan: Plan, name: str, number: int, test: "Pictures") -> float:
    """Give the share of test rows that a saved net gets right."""
    from accelerate import Accelerator

    from dq_multimodal.training.classify import measure_accuracy

    net, _ = start_net(plan, test.size, plan.file_of(name, number))
    accelerator = Accelerator(mixed_precision="no")
    return measure_accuracy(net, test, accelerator, plan.mean, plan.std)["accuracy"]


if __name__ == "__main__":
    main()
