"""The main job on data and models made on the spot: no Hub, no download, no accelerator.

    make demo        (or: python recipes/demo.py [--output_dir runs/demo] [--seed 0])

Makes an instruction dataset from the documentation of the installed Python packages, a tokenizer
and a small Llama, and runs recipes/alpaca_20pct.py with recipes/configs/demo.yaml three times:
on all rows, on 20 % drawn at random and on 20 % chosen by Dataset Quantization, each for the same
number of steps; of so few rows the scores of adq would embed a large part twice. Prints one table,
and writes its lines to results-SEED.jsonl, as README.md shows them (eval/results/demo.jsonl).
Interrupted, it goes on where it stopped.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from dq_multimodal.training.result_lines import lay_out, read_line, write_lines

RECIPES = Path(__file__).resolve().parent
METHODS = ("full", "random", "dq")


def main() -> None:
    """Make the data and the model, train three times, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="Of selection, model and training.")
    args = parser.parse_args()
    out, seed = args.output_dir, str(args.seed)
    data, model = out / "data", out / f"llama-{seed}"
    train = data / "train.parquet"

    run(RECIPES / "python_docs.py", "--output_dir", data)
    if not model.is_dir():
        size = ("--vocab_size", 2048, "--hidden_size", 128, "--num_hidden_layers", 4)
        where = ("--dataset_name", train, "--output_dir", model, "--seed", seed)
        run(RECIPES / "tiny_llama.py", *where, *size)
    folders = [out / f"{method}-{seed}" for method in METHODS]
    for method, folder in zip(METHODS, folders, strict=True):
        run(
            *("-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", os.cpu_count() or 1),
            *(RECIPES / "alpaca_20pct.py", "--config", RECIPES / "configs" / "demo.yaml"),
            *("--dataset_name", train, "--eval_dataset_name", data / "heldout.parquet"),
            *("--model_name_or_path", model, "--method", method, "--output_dir", folder),
            *("--selection_seed", seed, "--seed", seed),
        )
    lines = [
        read_line(folder, "demo", "Python docs", method, "small Llama")
        for method, folder in zip(METHODS, folders, strict=True)
    ]
    write_lines(out / f"results-{seed}.jsonl", lines)
    print(lay_out(lines))
    place = folders[-1] / "selection"
    print(f"\nThe compressed dataset is in {place}: start with its report.html.")


def run(*arguments: object) -> None:
    """Run a Python script; stop with its exit code when it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *map(str, arguments)]
    try:
        done = subprocess.run(command, env={**os.environ, **offline})
    except KeyboardInterrupt:
        sys.exit(130)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
