"""CIFAR-10 on CPUs, whole: extractor, autoencoder, selection, patches, restoring, training.

    python eval/cifar10_small.py --dataset_name DIR/train-*.parquet --test DIR/test-*.parquet

Runs the commands of the README one after the other, each of which goes on where it was
interrupted, and compares at the papers' equal data budget: 12.5 % of the rows with 20 % of the
patches dropped against 10 % of the rows; GradCAM++ masks against random ones, holes filled by the
mean colour or by MAE; random rows beside them, all other rows being chosen by dq. Every line has
the same small net, the same number of steps, and several seeds (of selection, masks, weights and
batches).
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from common import command

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
EXTRACTOR = {"num_train_epochs": 10, "per_device_train_batch_size": 128}
AUTOENCODER = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 128,
    "hidden_size": 96,
    "num_hidden_layers": 3,
}

STEPS = {
    "extractor": (
        "accuracy",
        "rows_tested",
        "steps",
        "parameters",
        "seconds",
        "is_resumed",
        "device",
    ),
    "mae": (
        "psnr_of_holes",
        "rows_held_out",
        "steps",
        "parameters",
        "seconds",
        "is_resumed",
        "device",
    ),
}
"""The steps before the comparisons, and what is recorded of them."""

DROPPED = {"keep_ratio": 0.125, "drop_ratio": 0.2}
ARMS: dict[str, dict[str, Any]] = {
    "random 10 %": {"method": "random", "keep_ratio": 0.1},
    "10 % of the rows": {"keep_ratio": 0.1},
    "12.5 % of the rows, whole": {"keep_ratio": 0.125},
    "GradCAM++ masks, mean": {**DROPPED, "fill": "mean"},
    "GradCAM++ masks, MAE": {**DROPPED, "fill": "mae"},
    "random masks, mean": {**DROPPED, "attribution": "random", "fill": "mean"},
    "random masks, MAE": {**DROPPED, "attribution": "random", "fill": "mae"},
}


def main() -> None:
    """Run what has not run yet, then collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or files.")
    parser.add_argument("--test", help="Files of the test rows.  [default: split test]")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/cifar10-small"))
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each line.")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help="Lines to run.")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "eval" / "results")
    args = parser.parse_args()
    work = args.work_dir

    data = ("--dataset_name", args.dataset_name)
    launch(
        RECIPES / "train_extractor.py",
        *(*data, "--model", "resnet10-narrow", "--output_dir", work / "extractor"),
        *flags(EXTRACTOR),
    )
    launch(
        RECIPES / "train_mae.py",
        *(*data, "--output_dir", work / "mae", *flags(AUTOENCODER)),
    )
    command(
        *("-m", "dq_multimodal.cli", "compress", args.dataset_name, "--keep-ratio", 0.1),
        *("--method", "dq", "--embedding-model", work / "extractor" / "model"),
        *("--batch-size", 256, "--output-dir", work / "dq"),
    )
    for seed in range(args.seeds):
        for name in args.arms:
            run_arm(name, seed, args)
    lines = [f"{name}={','.join(folders_of(name, args))}" for name in args.arms]
    output = args.output_dir / "cifar10_patches.json"
    said = ("--command", "python eval/cifar10_small.py", "--output", output)
    command(ROOT / "eval" / "image_comparison.py", *lines, *said)
    write_steps(work, args.output_dir / "cifar10_steps.json")


def write_steps(work: Path, output: Path) -> None:
    """Write what the steps before the comparisons say of themselves."""
    found = {name: json.loads((work / name / "metrics.json").read_text()) for name in STEPS}
    manifest = json.loads((work / "dq" / "manifest.json").read_text())
    document = {
        "command": "python eval/cifar10_small.py",
        **{name: {k: found[name][k] for k in keys} for name, keys in STEPS.items()},
        "compress": {k: manifest[k] for k in ("rows", "kept", "seconds")},
    }
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(output)


def folders_of(name: str, args: argparse.Namespace) -> list[str]:
    """Give the folders of the runs of one line, a seed each."""
    short = "".join(c if c.isalnum() else "-" for c in name.lower())
    return [str(args.work_dir / "runs" / f"{short}-{seed}") for seed in range(args.seeds)]


def run_arm(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train one line with one seed."""
    options = {"method": "dq", **ARMS[name]}
    work = args.work_dir
    if options["method"] in ("dq", "graphcut"):
        options["embeddings"] = work / "dq" / "embeddings.npy"
        options["embedding_model"] = work / "extractor" / "model"
    if options.get("fill") == "mae":
        options["mae_model"] = work / "mae" / "model"
    test = ("--test_dataset_name", args.test) if args.test else ()
    launch(
        RECIPES / "cifar10.py",
        *("--config", RECIPES / "configs" / "cifar10_short.yaml"),
        *("--dataset_name", args.dataset_name, *test),
        *flags(options),
        *("--selection_seed", seed, "--seed", seed),
        *("--output_dir", folders_of(name, args)[seed]),
    )


def flags(options: dict[str, Any]) -> list[object]:
    """Turn settings into flags."""
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def launch(script: Path, *arguments: object) -> None:
    """Run a recipe by accelerate, on one process with all cores."""
    command(
        *("-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", os.cpu_count() or 1, script, *arguments),
    )


if __name__ == "__main__":
    main()
