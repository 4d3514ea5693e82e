"""Are the scores of adq more than noise, and what do they cost beside the embeddings?

    python eval/adq_scores.py [--sets cifar10] [--classifier DIR]

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data), and scores the same bins with
several seeds, which draw other rows, other views and other weights of the discriminator. CIFAR-10
is embedded by `--classifier`, made by `accelerate launch recipes/train_extractor.py --model
resnet10-narrow --num_train_epochs 4 --output_dir runs/extractor-4`, and its texture is measured on
all rows; Alpaca (but its last 2 %) is binned by its ready embeddings and scored by the default
sentence encoder: surprisal on all rows, texture on the sampled ones. For every pair of seeds the
rank correlation (Spearman) of the bins' scores is given.

The cost is that of two commands on the first 10,000 rows, dq and adq: what embeddings and scores
take with adq beyond the embeddings with dq. For CIFAR-10 also with the resnet18 that
recipes/train_extractor.py makes, untrained, since weights change no time. Runs that are finished
are not made again.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from measure import DATA, dq, flags, known_model, need, save, save_untrained

COST_ROWS = 10_000
SCORED_RATIO = 0.98  # of Alpaca: its last rows are held out of selections
SCORES = ("representativeness", "diversity", "importance")
SEEDS = {"alpaca, surprisal": 2, "alpaca, texture": 2, "cifar10": 5}


def main() -> None:
    """Score each set with each seed, then compare."""
    parser = flags(__doc__, "adq_scores")
    parser.add_argument("--sets", nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--classifier", default="runs/extractor-4/model")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/adq-scores"))
    args = parser.parse_args()
    need("alpaca.parquet", "alpaca_minilm_f16.npy", "cifar10/train-*.parquet")
    sets = {}
    for name in args.sets:
        found = [score(name, seed, args) for seed in range(SEEDS[name])]
        pairs = list(combinations(found, 2))
        sets[name] = {
            "rows": found[0]["rows"],
            "rows_a_bin": found[0]["rows_a_bin"],
            "seeds": list(range(len(found))),
            "scores": {key: [f[key] for f in found] for key in SCORES},
            "rank_correlation": {
                key: [correlate(a[key], b[key]) for a, b in pairs] for key in SCORES
            },
            "costs": [measure_cost(name, model, args) for model in models_of(name, args)],
        }
        print(name, sets[name]["rank_correlation"], sets[name]["costs"])
    save(args.output, {"sets": sets})


def compress(folder: Path, *options: object) -> None:
    """Run the command line into a folder, unless it has done so before."""
    dq("compress", *options, "--keep-ratio", 0.1, "--no-report", output_dir=folder)


def kind_of(name: str) -> list[object]:
    """Give the options that say how the representativeness of a set is measured."""
    kind = "texture" if name.endswith("texture") else "surprisal"
    return ["--representativeness", kind] if name.startswith("alpaca") else []


def score(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Score the bins of a set with one seed, and read the scores."""
    from dq_multimodal import Run
    from dq_multimodal.core import bin_importance
    from dq_multimodal.stages.selection import read_scores

    folder = args.work_dir / f"{name.replace(', ', '-')}-{seed}"
    options: list[object] = [DATA / "cifar10/train-*.parquet", "--embedding-model", args.classifier]
    if name.startswith("alpaca"):
        rows, embeddings = write_rows(args.work_dir / "alpaca")
        options = [rows, "--ready-embeddings", embeddings]
    compress(folder, *options, *kind_of(name), "--method", "adq", "--seed", seed)
    run, scores = Run(folder), read_scores(folder)
    assert scores is not None
    return {
        "rows": run.manifest.rows,
        "rows_a_bin": run.manifest.scores.rows_a_bin,
        "representativeness": scores.representativeness.tolist(),
        "diversity": scores.diversity.tolist(),
        "importance": bin_importance(scores).tolist(),
    }


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Write the rows of Alpaca but the last 2 %, and their embeddings."""
    import pyarrow.parquet as pq

    rows, embeddings = folder / "train.parquet", folder / "embeddings.npy"
    if not embeddings.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(DATA / "alpaca.parquet")
        n_rows = round(SCORED_RATIO * len(table))
        pq.write_table(table.slice(0, n_rows), rows)
        temporary = folder / "embeddings.tmp.npy"
        np.save(temporary, np.load(DATA / "alpaca_minilm_f16.npy")[:n_rows])
        temporary.replace(embeddings)
    return rows, embeddings


def correlate(a: list[float], b: list[float]) -> float:
    """Give Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return 1.0 if a == b else float(spearmanr(a, b)[0])


def models_of(name: str, args: argparse.Namespace) -> list[str | None]:
    """Give the encoders with which the cost is measured; None is the default of text."""
    if name.startswith("alpaca"):
        return [None]
    folder = args.work_dir / "resnet18"
    if not folder.is_dir():
        save_untrained("resnet18", 32, folder)
    return [args.classifier, str(folder)]


def measure_cost(name: str, model: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Time embeddings and scores on the first rows, without the scores and with them."""
    import pyarrow.parquet as pq
    import torch

    kind = name.split(",")[0]
    source = "alpaca.parquet" if kind == "alpaca" else "cifar10/train-*.parquet"
    rows = args.work_dir / f"{kind}-first.parquet"
    if not rows.is_file():
        first = sorted(DATA.glob(source))[0]
        pq.write_table(pq.read_table(first).slice(0, COST_ROWS), rows)
    net = "all-MiniLM-L6-v2" if model is None else known_model(model)
    seconds = {}
    for method, kinds in (("dq", []), ("adq", kind_of(name))):
        folder = args.work_dir / f"cost-{name.replace(', ', '-')}-{net}-{method}"
        options = [*kinds, *([] if model is None else ["--embedding-model", model])]
        compress(folder, rows, "--method", method, *options)
        found = json.loads((folder / "manifest.json").read_text())["seconds"]
        seconds[method] = found["embeddings"] + found.get("scores", 0)
    return {
        "rows": COST_ROWS,
        "model": net,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "extra_share": seconds["adq"] / seconds["dq"] - 1,
    }


if __name__ == "__main__":
    main()
