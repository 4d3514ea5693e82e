"""CIFAR-10 on CPUs, whole: extractor, autoencoder, selection, patches, restoring, training.

    python eval/cifar10_small.py --dataset_name DIR/train-*.parquet --test DIR/test-*.parquet

Runs the commands of the README one after the other, each of which goes on where it was
interrupted, and collects their metrics.json. Two comparisons come out, both with one small net, the
same number of steps for every line, and several seeds (of selection, masks, weights and batches):

- rows: 10 % of the rows by random, graphcut and dq, and all rows
- patches: the papers' equal budget, 12.5 % of the rows with 20 % of the patches dropped against
  10 % of the rows; GradCAM++ masks against random ones, holes filled by the mean colour or by MAE
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
EXTRACTOR = {"num_train_epochs": 10, "per_device_train_batch_size": 128}
AUTOENCODER = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 128,
    "hidden_size": 96,
    "num_hidden_layers": 3,
}

DROPPED = {"keep_ratio": 0.125, "drop_ratio": 0.2}
ARMS: dict[str, dict[str, Any]] = {
    "10 % of the rows": {"keep_ratio": 0.1},
    "12.5 % of the rows, whole": {"keep_ratio": 0.125},
    "GradCAM++ masks, mean": {**DROPPED, "fill": "mean"},
    "GradCAM++ masks, MAE": {**DROPPED, "fill": "mae"},
    "random masks, mean": {**DROPPED, "attribution": "random", "fill": "mean"},
    "random masks, MAE": {**DROPPED, "attribution": "random", "fill": "mae"},
    "random 10 %": {"method": "random", "keep_ratio": 0.1},
    "graphcut 10 %": {"method": "graphcut", "keep_ratio": 0.1},
    "full": {"method": "full"},
}
TABLES = {
    "patches": list(ARMS)[:6],
    "rows": ["random 10 %", "graphcut 10 %", "10 % of the rows", "full"],
}


def main() -> None:
    """Run what has not run yet, then collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or files.")
    parser.add_argument("--test", help="Files of the test rows.  [default: split test]")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/cifar10-small"))
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each line.")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help="Lines to run.")
    parser.add_argument("--output", type=Path, default=ROOT / "eval/results/cifar10_small.json")
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
    document = {
        "command": "python eval/cifar10_small.py",
        "extractor": read(work / "extractor"),
        "mae": read(work / "mae"),
        "selection": json.loads((work / "dq" / "manifest.json").read_text())["seconds"],
        "tables": {
            table: [summarise(name, args) for name in names if has_run(name, args)]
            for table, names in TABLES.items()
        },
    }
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(args.output)
    for table, lines in document["tables"].items():
        print(f"\n{table}")
        for line in lines:
            spread = f" ± {line['accuracy_std']:.2f}" if line["accuracy_std"] is not None else ""
            print(f"  {line['name']:28} {line['accuracy']:.2f}{spread}  {line['rows']:,} rows")


def folder_of(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Give the folder of one run."""
    short = "".join(c if c.isalnum() else "-" for c in name.lower())
    return args.work_dir / "runs" / f"{short}-{seed}"


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
        *("--output_dir", folder_of(name, seed, args)),
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


def command(*arguments: object) -> None:
    """Run a Python command; stop when it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


def read(folder: Path) -> dict[str, Any]:
    """Read what a training run says, without the paths of this machine."""
    found = json.loads((folder / "metrics.json").read_text())
    return {k: v for k, v in found.items() if k not in ("asked", "command", "complete")}


def has_run(name: str, args: argparse.Namespace) -> bool:
    """Say whether every seed of a line has been run."""
    folders = [folder_of(name, seed, args) for seed in range(args.seeds)]
    return all((folder / "metrics.json").is_file() for folder in folders)


def summarise(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Put the seeds of a line together."""
    runs = [read(folder_of(name, seed, args)) for seed in range(args.seeds)]
    accuracies = [100 * run["accuracy"] for run in runs]
    sizes = [run["selection"]["bytes"] for run in runs]
    stored = [size["stored_images"] for size in sizes if "stored_images" in size]
    return {
        "name": name,
        "options": ARMS[name],
        "rows": runs[0]["selection"]["rows"],
        "steps": runs[0]["steps"],
        "accuracy": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "stored_image_bytes": round(statistics.mean(stored)) if stored else None,
        "runs": [
            {
                key: run.get(key)
                for key in ("accuracy", "train_seconds", "is_resumed", "selection", "device")
            }
            for run in runs
        ],
    }


if __name__ == "__main__":
    main()
