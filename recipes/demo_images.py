"""The image job on data and models made on the spot: no Hub, no download, no accelerator.

    make demo-images    (or: python recipes/demo_images.py [--output_dir runs/demo-images])

Writes scikit-learn's digits as an image dataset, trains a small extractor and a small masked
autoencoder on them, and runs recipes/cifar10.py, each time for the same number of steps: on all
rows, on 10 % drawn at random, on 10 % chosen by Dataset Quantization, and on 12.5 % of the rows
with 20 % of their patches dropped, stored, and filled again. Prints one table, and writes its lines
to results.jsonl, as README.md shows them (eval/results/demo_images.jsonl). Interrupted, it goes on
where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dq_multimodal.training.result_lines import lay_out, read_line, write_lines

RECIPES = Path(__file__).resolve().parent

LINES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "random": {"method": "random", "keep_ratio": 0.1},
    "dq": {"method": "dq", "keep_ratio": 0.1},
    "dq, 20 % of patches dropped": {"method": "dq", "keep_ratio": 0.125, "drop_ratio": 0.2},
}


def main() -> None:
    """Make the data and the models, train four times, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-images"))
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each line.")
    args = parser.parse_args()
    out = args.output_dir
    data = {"dataset_name": out / "data" / "train.parquet"}
    if not (out / "data" / "test.parquet").is_file():
        run(RECIPES / "digits.py", "--output_dir", out / "data")
    launch(
        "train_extractor.py",
        **data,
        model="resnet10-narrow",
        num_train_epochs=10,
        per_device_train_batch_size=64,
        learning_rate=0.05,
        mirror=False,
        output_dir=out / "extractor",
    )
    launch(
        "train_mae.py",
        **data,
        patch_size=2,
        hidden_size=64,
        num_hidden_layers=3,
        num_train_epochs=30,
        per_device_train_batch_size=64,
        output_dir=out / "mae",
    )
    lines: list[dict[str, Any]] = []
    for name, options in LINES.items():
        kept = "-".join(str(options.get(key, 1)) for key in ("keep_ratio", "drop_ratio"))
        folders = [out / f"{options['method']}-{kept}-{seed}" for seed in range(args.seeds)]
        for seed, folder in enumerate(folders):
            settings = dict(options)
            if options["method"] == "dq":
                settings["embedding_model"] = out / "extractor" / "model"
            if "drop_ratio" in options:
                settings |= {"patch_size": 2, "fill": "mae", "mae_model": out / "mae" / "model"}
            launch(
                "cifar10.py",
                **data,
                eval_dataset_name=out / "data" / "test.parquet",
                model="resnet10-narrow",
                max_steps=300,
                per_device_train_batch_size=32,
                learning_rate=0.05,
                mirror=False,
                selection_seed=seed,
                seed=seed,
                output_dir=folder,
                **settings,
            )
        models = (options["method"] == "dq") * ["extractor"] + ("drop_ratio" in options) * ["mae"]
        spent = sum(seconds_of(out / model) for model in models)
        about = ("demo-images", "digits", name, "resnet10-narrow", spent)
        lines += [read_line(folder, *about) for folder in folders]
    write_lines(out / "results.jsonl", lines)
    print(lay_out(lines))
    print(f"\nThe compressed dataset is in {folders[0] / 'selection'}: start with its README.md.")


def seconds_of(folder: Path) -> float:
    """Read how long it took to train a model."""
    return json.loads((folder / "metrics.json").read_text())["seconds"]


def launch(name: str, **options: object) -> None:
    """Run a recipe by accelerate, on one process with all cores."""
    run(
        *("-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", os.cpu_count() or 1, RECIPES / name),
        *(part for key, value in options.items() for part in (f"--{key}", value)),
    )


def run(*arguments: object) -> None:
    """Run a Python script; stop with its exit code when it fails."""
    command = [sys.executable, *map(str, arguments)]
    try:
        done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    except KeyboardInterrupt:
        sys.exit(130)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
