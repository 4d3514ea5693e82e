"""What `--partition kmeans:K` loses against the exact bins, on real Alpaca embeddings.

    python eval/partition_loss.py [--parts 1 4 16 64] [--rows 52002] [--seeds 3] [--train]

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data). One part is the exact greedy.
For every K: seconds of the k-means and of the bins, the share of rows that get the bin number of
the exact run, how far the kept rows overlap with its own (Jaccard; the draw by rank, and by hash
with several seeds), and how near every row has a kept one (1 - cosine or euclidean distance, mean
and 95th percentile), beside random selection of the same size. With --train also the held-out
response loss of recipes/alpaca_20pct.py with recipes/configs/alpaca_small.yaml, its last 2 % of
the rows held out. Goes on where it was interrupted; other settings want another --work_dir.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import command, fail

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
TRAIN_RATIO = 0.98


def main() -> None:
    """Measure, train if asked to, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rows", type=int, help="The first so many rows.  [default: all]")
    parser.add_argument("--similarity", choices=("cosine", "euclidean"), default="cosine")
    parser.add_argument("--keep_ratio", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=3, help="Draws by hash, and models to train.")
    parser.add_argument("--train", action="store_true", help="Train on what was kept.")
    parser.add_argument("--max_steps", type=int, help="Training steps.  [default: configured]")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/partition-loss"))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "eval" / "results" / "partition_loss.json"
    )
    args = parser.parse_args()
    if not (DATA / "alpaca.parquet").is_file():
        fail(f"no alpaca.parquet in {DATA} (set DQ_TEST_DATA)")
    if args.parts[0] != 1:
        fail("the first of --parts must be 1, the exact bins, with which the others are compared")
    document = {
        "command": " ".join(["python", "eval/partition_loss.py", *sys.argv[1:]]),
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        **measure_once(args),
    }
    if args.train:
        for line in document["lines"]:
            line["response_loss"] = train_line(args, line["asked"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output, document)
    print(json.dumps(document, indent=2))


def measure_once(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, or read what the same settings measured before."""
    names = ("parts", "rows", "similarity", "keep_ratio", "seeds")
    settings = {name: getattr(args, name) for name in names}
    place = args.work_dir / "measured.json"
    if place.is_file():
        before = json.loads(place.read_text())
        if before["settings"] != settings:
            fail(f"{args.work_dir} is of other settings: name another --work_dir")
        return before["found"]
    found = measure(args)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    write(place, {"settings": settings, "found": found})
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make the bins for every number of parts, and compare."""
    from dq_multimodal.config import count_kept
    from dq_multimodal.core import make_bins, one_bin, order_rows, partition_rows
    from dq_multimodal.report.vectors import Vectors, nearest

    rows = np.load(DATA / "alpaca_minilm_f16.npy")[: args.rows].astype(np.float32)
    n_kept = count_kept(len(rows), args.keep_ratio)
    vectors, numbers = Vectors(rows, args.similarity), np.arange(len(rows))

    def cover(subsets: list[np.ndarray]) -> dict[str, float]:
        found = [nearest(vectors, numbers, np.flatnonzero(kept))[1] for kept in subsets]
        return {
            "mean": float(np.mean(found)),
            "p95": float(np.mean([np.percentile(distances, 95) for distances in found])),
        }

    def compare(subsets: list[np.ndarray], wanted: list[np.ndarray]) -> dict[str, Any]:
        shares = [(a & b).sum() / (a | b).sum() for a, b in zip(subsets, wanted, strict=True)]
        return {"jaccard": float(np.mean(shares)), "coverage": cover(subsets)}

    lines: list[dict[str, Any]] = []
    exact: dict[str, Any] = {}
    for n_parts in args.parts:
        started = time.perf_counter()
        codes = partition_rows(rows, n_parts, args.similarity)
        parted = time.perf_counter()
        bins = make_bins(rows, 10, args.similarity, codes)
        done = time.perf_counter()
        ranked = [order_rows(bins, draw="rank") < n_kept]
        drawn = [order_rows(bins, seed=seed) < n_kept for seed in range(args.seeds)]
        exact = exact or {"bin": bins.bin, "rank": ranked, "dq": drawn}
        sizes = np.bincount(codes)
        lines.append(
            {
                "asked": n_parts,
                "parts": len(sizes),
                "rows_a_part": [int(sizes.min()), int(sizes.max())],
                "seconds": {"partition": parted - started, "bins": done - parted},
                "same_bin": float((bins.bin == exact["bin"]).mean()),
                "rank": compare(ranked, exact["rank"]),
                "dq": compare(drawn, exact["dq"]),
            }
        )
        print(json.dumps(lines[-1]), file=sys.stderr)
    lone = one_bin(np.zeros(len(rows), dtype=np.int64))
    at_random = [order_rows(lone, seed=seed) < n_kept for seed in range(args.seeds)]
    lines.append({"asked": None, "dq": compare(at_random, exact["dq"])})
    return {
        "rows": len(rows),
        "kept": n_kept,
        "similarity": args.similarity,
        "seeds": args.seeds,
        "lines": lines,
    }


def train_line(args: argparse.Namespace, n_parts: int | None) -> list[float]:
    """Train on the rows of one line with every seed (None: on random ones); give the losses."""
    data, losses = args.work_dir / "data", []
    write_split(data, args.rows)
    source = args.work_dir / f"selection-{n_parts or args.parts[0]}"
    command(
        *("-m", "dq_multimodal.cli", "compress", data / "train.parquet", "--method", "dq"),
        *("--partition", f"kmeans:{n_parts or args.parts[0]}", "--similarity", args.similarity),
        *("--embeddings", data / "embeddings.npy", "--keep-ratio", args.keep_ratio),
        *("--no-report", "--output-dir", source),
    )
    for seed in range(args.seeds):
        model = args.work_dir / f"llama-{seed}"
        if not model.is_dir():
            size = ("--vocab_size", 2048, "--hidden_size", 128, "--num_hidden_layers", 4)
            rows = ("--dataset_name", data / "train.parquet", "--seed", seed)
            command(ROOT / "recipes" / "tiny_llama.py", *rows, *size, "--output_dir", model)
        folder = args.work_dir / "runs" / f"{n_parts or 'random'}-{seed}"
        command(
            *(ROOT / "recipes" / "alpaca_20pct.py", "--method", "dq" if n_parts else "random"),
            *("--config", ROOT / "recipes" / "configs" / "alpaca_small.yaml"),
            *("--dataset_name", data / "train.parquet", "--from_run", source),
            *("--eval_dataset_name", data / "heldout.parquet", "--model_name_or_path", model),
            *("--similarity", args.similarity, "--keep_ratio", args.keep_ratio),
            *("--selection_seed", seed, "--seed", seed, "--output_dir", folder),
            *(("--max_steps", args.max_steps) if args.max_steps else ()),
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        losses.append(metrics["held_out"]["response_loss"])
    return losses


def write_split(folder: Path, n_rows: int | None) -> None:
    """Write train.parquet, heldout.parquet and the embeddings of the training rows."""
    import pyarrow.parquet as pq

    if (folder / "embeddings.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(DATA / "alpaca.parquet").slice(0, n_rows)
    n_train = round(TRAIN_RATIO * len(table))
    pq.write_table(table.slice(0, n_train), folder / "train.parquet")
    pq.write_table(table.slice(n_train), folder / "heldout.parquet")
    temporary = folder / "embeddings.tmp.npy"
    np.save(temporary, np.load(DATA / "alpaca_minilm_f16.npy")[:n_train])
    temporary.replace(folder / "embeddings.npy")


def write(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
