"""The main job on data and models made on the spot: no Hub, no download, no accelerator.

    make demo        (or: python recipes/demo.py [--output_dir runs/demo] [--seed 0])

1. Makes an instruction dataset from the documentation of the installed Python packages.
2. Compresses it to 20 % by Dataset Quantization, with a report to open. That is the main job.
3. Makes a tokenizer and a small Llama.
4. Trains it by recipes/alpaca_20pct.py with recipes/configs/demo.yaml three times for the same
   number of steps: on all rows, on 20 % at random (both drawn from one run) and on those of step 2.

Prints one table, and writes its lines to results-SEED.jsonl, as README.md shows them
(eval/results/demo.jsonl). Interrupted, it goes on where it stopped.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from dq_multimodal.training.result_lines import lay_out, read_line, write_lines

RECIPES = Path(__file__).resolve().parent
METHODS = ("full", "random", "dq")
ROWS = 1000
SMALL = (
    *("--packages", "python,numpy,scipy,sklearn,pyarrow,pandas"),
    *("--max_rows", ROWS + 500, "--max_chars", 400),
)
"""Packages whose files are read in seconds; rows, with the 500 held out, short for the encoder."""


def main() -> None:
    """Make the data, compress it, make the model, train three times, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="Of selection, model and training.")
    args = parser.parse_args()
    out, seed = args.output_dir, str(args.seed)
    data, model, chosen = out / "data", out / f"llama-{seed}", out / f"compressed-{seed}"
    train = data / "train.parquet"

    say(f"1/4  making {ROWS:,} rows of the documentation of installed packages")
    run(RECIPES / "python_docs.py", "--output_dir", data, *SMALL)
    say("2/4  compressing them to 20 % (about a minute)")
    run(
        *("-m", "dq_multimodal.cli", "compress", train, "--keep-ratio", 0.2, "--method", "dq"),
        *("--seed", seed, "--output-dir", chosen),
    )
    say(f"     open {(chosen / 'report.html').resolve()}")
    say("3/4  making a tokenizer and a small Llama")
    if not model.is_dir():
        size = ("--vocab_size", 2048, "--hidden_size", 128, "--num_hidden_layers", 4)
        where = ("--dataset_name", train, "--output_dir", model, "--seed", seed)
        run(RECIPES / "tiny_llama.py", *where, *size)
    folders = [out / f"{method}-{seed}" for method in METHODS]
    for method, folder in zip(METHODS, folders, strict=True):
        say(f"4/4  training on {'all rows' if method == 'full' else f'20 %, {method}'}")
        drawn = () if method == "full" else ("--from_run", chosen)
        run(
            *("-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", count_threads()),
            *(RECIPES / "alpaca_20pct.py", "--config", RECIPES / "configs" / "demo.yaml"),
            *("--dataset_name", train, "--eval_dataset_name", data / "heldout.parquet"),
            *("--model_name_or_path", model, "--method", method, "--output_dir", folder),
            *("--selection_seed", seed, "--seed", seed, *drawn),
        )
    lines = [
        read_line(folder, "demo", "Python docs", method, "small Llama")
        for method, folder in zip(METHODS, folders, strict=True)
    ]
    write_lines(out / f"results-{seed}.jsonl", lines)
    print(lay_out(lines))
    print(f"\nThe compressed dataset is in {chosen}: open its report.html.")


def say(text: str) -> None:
    """Say what comes next, before a process of its own says more."""
    print(f"\n{text}" if text[0].isdigit() else text, flush=True)


def count_threads() -> int:
    """Give the threads that the user allows, else one for each core that is ours to use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return int(os.environ.get("OMP_NUM_THREADS") or n_cores or 1)


def run(*arguments: object) -> None:
    """Run a Python script; stop with its exit code when it fails."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {"OMP_WAIT_POLICY": "PASSIVE"}  # on a busy machine spinning threads wait for long
    command = [sys.executable, *map(str, arguments)]
    try:
        done = subprocess.run(command, env={**os.environ, **settings})
    except KeyboardInterrupt:
        sys.exit(130)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
