"""Compare selections of real Alpaca by the held-out response loss of a small Llama.

    python eval/alpaca_small.py [--seeds 0 1 2] [--methods full random graphcut dq]
        [--output_dir runs/alpaca_small] [--output eval/results/alpaca_small.json]

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data). The last 2 % of the rows are
held out of tokenizer, selection and training. Every run is recipes/alpaca_20pct.py with
recipes/configs/alpaca_small.yaml: the same steps, only the rows differ. A seed sets the weights,
the order of training and the draw of the rows. Interrupted, it goes on where it stopped.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
TRAIN_RATIO = 0.98


def main() -> None:
    """Split the data, make the models, run the recipe, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--methods", nargs="+", default=["full", "random", "graphcut", "dq"])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/alpaca_small"))
    parser.add_argument("--output", type=Path, default=Path("eval/results/alpaca_small.json"))
    args = parser.parse_args()
    if not (DATA / "alpaca.parquet").is_file():
        print(f"error: no alpaca.parquet in {DATA} (set DQ_TEST_DATA)", file=sys.stderr)
        sys.exit(2)
    data, folders = args.output_dir / "data", []
    write_split(data)
    for seed in args.seeds:
        model = args.output_dir / f"llama-{seed}"
        if not model.is_dir():
            size = ("--vocab_size", 2048, "--hidden_size", 128, "--num_hidden_layers", 4)
            rows = ("--dataset_name", data / "train.parquet", "--seed", seed)
            run(ROOT / "recipes" / "tiny_llama.py", *rows, *size, "--output_dir", model)
        for method in args.methods:
            folder = args.output_dir / f"{method}-{seed}"
            folders.append(folder)
            run(
                *(ROOT / "recipes" / "alpaca_20pct.py", "--config"),
                *(ROOT / "recipes" / "configs" / "alpaca_small.yaml", "--method", method),
                *("--dataset_name", data / "train.parquet", "--output_dir", folder),
                *("--eval_dataset_name", data / "heldout.parquet", "--model_name_or_path", model),
                *("--embeddings", data / "embeddings.npy"),
                *("--selection_seed", seed, "--seed", seed),
            )
    run(ROOT / "eval" / "comparison.py", *folders, "--output", args.output)


def write_split(folder: Path) -> None:
    """Write train.parquet, heldout.parquet and the embeddings of the training rows."""
    if (folder / "embeddings.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(DATA / "alpaca.parquet")
    n_train = round(TRAIN_RATIO * len(table))
    pq.write_table(table.slice(0, n_train), folder / "train.parquet")
    pq.write_table(table.slice(n_train), folder / "heldout.parquet")
    np.save(folder / "embeddings.npy", np.load(DATA / "alpaca_minilm_f16.npy")[:n_train])


def run(*arguments: object) -> None:
    """Run a Python script; stop with its exit code when it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
