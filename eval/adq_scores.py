"""Are the scores of adq more than noise, and what do they cost beside the embeddings?

    python eval/adq_scores.py [--sets alpaca cifar10] [--classifier DIR]
        [--output eval/results/adq_scores.json]

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data), and scores the same bins with
several seeds, which draw other rows, other views and other weights of the discriminator. CIFAR-10
is embedded by `--classifier`, made by `accelerate launch recipes/train_extractor.py --model
resnet10-narrow --num_train_epochs 4 --output_dir runs/extractor-4`, and its texture is measured on
all rows; Alpaca (but its last 2 %) is binned by its ready embeddings and scored by the default
sentence encoder: surprisal on all rows, texture on the sampled ones. For every pair of seeds the
rank correlation (Spearman) of the bins' scores is given.

The cost is measured side by side on the first 10,000 rows: the embedding stage alone, then the same
with middle features and texture, and the scores. For CIFAR-10 also with the resnet18 that
recipes/train_extractor.py makes, untrained, since weights change no time. Goes on where it was
interrupted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from common import known_model, write

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
COST_ROWS = 10_000
SCORED_RATIO = 0.98  # of Alpaca: its last rows are held out of selections
SCORES = ("representativeness", "diversity", "importance")
SEEDS = {"alpaca, surprisal": 2, "alpaca, texture": 2, "cifar10": 5}


def main() -> None:
    """Score each set with each seed, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SEEDS))
    parser.add_argument("--classifier", default="runs/extractor-4/model")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/adq-scores"))
    parser.add_argument("--output", type=Path, default=ROOT / "eval/results/adq_scores.json")
    args = parser.parse_args()
    import torch

    from dq_multimodal.training.record import device_name

    document: dict[str, Any] = {
        "command": " ".join(["python", "eval/adq_scores.py", *sys.argv[1:]]),
        "device": device_name(torch.device("cpu")),
        "sets": {},
    }
    for name in args.sets:
        seeds = range(SEEDS[name])
        found = [score(name, seed, args) for seed in seeds]
        document["sets"][name] = {
            "rows": found[0]["rows"],
            "rows_a_bin": found[0]["rows_a_bin"],
            "seeds": list(seeds),
            "scores": {key: [f[key] for f in found] for key in SCORES},
            "rank_correlation": {
                key: [correlate(a[key], b[key]) for a, b in combinations(found, 2)]
                for key in SCORES
            },
            "costs": [measure_cost(name, model, args) for model in models_of(name, args)],
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output, document)
    for name, one in document["sets"].items():
        shown = {k: [round(v, 2) for v in vs] for k, vs in one["rank_correlation"].items()}
        extra = [f"{100 * cost['extra_share']:.0f} % ({cost['model']})" for cost in one["costs"]]
        print(f"{name}: {shown}; extra {', '.join(extra)}")


def score(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Score the bins of a set with one seed, and read the scores."""
    from dq_multimodal import Run
    from dq_multimodal.core import bin_importance
    from dq_multimodal.stages.selection import read_scores

    if name.startswith("alpaca"):
        measure = "texture" if name.endswith("texture") else "surprisal"
        data = args.work_dir / "alpaca"
        write_rows(data)
        folder = args.work_dir / f"{measure}-{seed}"
        options: list[object] = [data / "train.parquet", "--embeddings", data / "embeddings.npy"]
        options += ["--representativeness", measure]
    else:
        folder = args.work_dir / f"cifar10-{seed}"
        options = [DATA / "cifar10" / "train-*.parquet", "--embedding-model", args.classifier]
    options += ["--keep-ratio", 0.1, "--seed", seed, "--no-report", "--output-dir", folder]
    command = [sys.executable, "-m", "dq_multimodal.cli", "compress", *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)
    run, scores = Run(folder), read_scores(folder)
    assert scores is not None
    return {
        "rows": run.manifest.rows,
        "rows_a_bin": run.manifest.scores.rows_a_bin,
        "representativeness": scores.representativeness.tolist(),
        "diversity": scores.diversity.tolist(),
        "importance": bin_importance(scores).tolist(),
    }


def write_rows(folder: Path) -> None:
    """Write the rows of Alpaca but the last 2 %, and their embeddings."""
    import pyarrow.parquet as pq

    if (folder / "embeddings.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(DATA / "alpaca.parquet")
    n_rows = round(SCORED_RATIO * len(table))
    pq.write_table(table.slice(0, n_rows), folder / "train.parquet")
    temporary = folder / "embeddings.tmp.npy"
    np.save(temporary, np.load(DATA / "alpaca_minilm_f16.npy")[:n_rows])
    temporary.replace(folder / "embeddings.npy")


def correlate(a: list[float], b: list[float]) -> float:
    """Give Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return 1.0 if a == b else float(spearmanr(a, b)[0])


def models_of(name: str, args: argparse.Namespace) -> list[str | None]:
    """Give the encoders with which the cost is measured; None is the default of text."""
    return (
        [None]
        if name.startswith("alpaca")
        else [args.classifier, untrained("resnet18", args.work_dir)]
    )


def untrained(model: str, work_dir: Path) -> str:
    """Make a classifier for CIFAR-10 as recipes/train_extractor.py does, and do not train it."""
    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier

    folder = work_dir / model
    labels = tuple(map(str, range(10)))
    half = (0.5, 0.5, 0.5)
    description = Classifier(model, 32, len(labels), labels, half, half)
    save_classifier(build_classifier(model, len(labels), 32), description, folder)
    return str(folder)


def measure_cost(name: str, model: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Time the embedding stage without the scores and with them, one after the other."""
    from dataclasses import replace

    import torch
    from datasets import load_dataset

    from dq_multimodal import CompressConfig
    from dq_multimodal.adapters.choice import choose_adapter, label_column_of
    from dq_multimodal.stages import embedding, scoring
    from dq_multimodal.stages.ordering import bin_rows
    from dq_multimodal.stages.selection import read_strata

    net = "all-MiniLM-L6-v2" if model is None else known_model(model)
    kind = name.split(",")[0]
    work = args.work_dir / "costs" / f"{kind}-{net}"
    result = work.with_name(work.name + ".json")
    if result.is_file():
        known = json.loads(result.read_text())
        if known.pop("classifier") == model:
            return add_up(name, known)
    files = {"alpaca": "alpaca.parquet", "cifar10": "cifar10/train-*.parquet"}[kind]
    rows = load_dataset("parquet", data_files=str(DATA / files), split=f"train[:{COST_ROWS}]")
    request = CompressConfig(dataset=kind, embedding_model=model)
    seconds: dict[str, float] = {}
    for stage, method in (("embed", "dq"), ("embed_and_look", "adq")):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        adapter = choose_adapter(rows, replace(request, method=method))
        assert adapter is not None
        adapter.lengths()
        adapter.embed(adapter.load(np.arange(8))[0])  # load the model before the clock runs
        started = time.perf_counter()
        embedding.embed_rows(adapter, work, request.batch_size)
        seconds[stage] = time.perf_counter() - started
    strata, _ = read_strata(rows, label_column_of(adapter, request))
    bins = bin_rows(embedding.open_embeddings(work), strata, "dq", request.n_bins, "cosine")
    started = time.perf_counter()
    scoring.score_bins(adapter, work, bins, request, 0)
    seconds["scores"] = time.perf_counter() - started
    if kind == "alpaca":
        started = time.perf_counter()
        adapter.surprisal(bins.bin)
        seconds["surprisal"] = time.perf_counter() - started
    shutil.rmtree(work)
    found = {
        "rows": len(rows),
        "model": net,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }
    write(result, {**found, "classifier": model})
    return add_up(name, found)


def add_up(name: str, cost: dict[str, Any]) -> dict[str, Any]:
    """Give the share of the embedding time that a measure of the scores adds."""
    seconds = cost["seconds"]
    taken = seconds["embed_and_look"] + seconds["scores"]
    taken += seconds["surprisal"] if name.endswith("surprisal") else 0
    return {**cost, "extra_share": taken / seconds["embed"] - 1}


if __name__ == "__main__":
    main()
