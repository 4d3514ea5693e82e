"""Are the scores of adq more than noise, and what do they cost beside the embeddings?

    python eval/adq_scores.py [--sets alpaca cifar10] [--seeds 0 1] [--classifier DIR]
        [--work_dir runs/adq-scores] [--output eval/results/adq_scores.json]

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data): all of Alpaca, binned by its
ready embeddings and scored by the default sentence encoder, and all of CIFAR-10, embedded by
`--classifier`, a folder made by recipes/train_extractor.py. Bins do not depend on the seed; the
sample of rows, their views and the discriminator do, and with ready embeddings the texture, which
then comes from the sampled rows alone. For every pair of seeds the rank correlation (Spearman) of
the bins' scores is given. The cost is measured side by side on the first 10,000 rows: the
embedding stage alone, then the same with middle features and texture, and the scores. Goes on
where it was interrupted.
"""

import argparse
import json
import os
import shutil
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
COST_ROWS = 10_000
SCORES = ("representativeness", "diversity", "importance", "surprisal")


def main() -> None:
    """Score each set with each seed, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["alpaca", "cifar10"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--classifier", default="runs/cifar10-small/extractor/model")
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
        dataset, request = load(name, args.classifier)
        work = args.work_dir / name
        found = [score(dataset, request, work, seed) for seed in args.seeds]
        document["sets"][name] = {
            "rows": len(dataset),
            "rows_a_bin": found[0]["rows_a_bin"],
            "seeds": args.seeds,
            "scores": {key: [f[key] for f in found] for key in SCORES if key in found[0]},
            "rank_correlation": {
                key: [correlate(a[key], b[key]) for a, b in combinations(found, 2)]
                for key in SCORES
                if key in found[0]
            },
            "cost": {
                key: value
                for key, value in measure_cost(dataset, request, work / "cost").items()
                if key != "asked"
            },
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output, document)
    for name, found in document["sets"].items():
        shown = {k: [round(v, 2) for v in vs] for k, vs in found["rank_correlation"].items()}
        print(f"{name}: {shown}; extra {100 * found['cost']['extra_share']:.1f} %")


def load(name: str, classifier: str) -> tuple[Any, Any]:
    """Load the rows of a set, and the settings to score them with."""
    from datasets import load_dataset

    from dq_multimodal import CompressConfig

    files = {"alpaca": "alpaca.parquet", "cifar10": "cifar10/train-*.parquet"}[name]
    if not list(DATA.glob(files)):
        print(f"error: no {files} in {DATA} (set DQ_TEST_DATA)", file=sys.stderr)
        sys.exit(2)
    dataset = load_dataset("parquet", data_files=str(DATA / files), split="train")
    model = {"alpaca": None, "cifar10": classifier}[name]
    ready = {"alpaca": str(DATA / "alpaca_minilm_f16.npy"), "cifar10": None}[name]
    return dataset, CompressConfig(dataset=name, embedding_model=model, embeddings=ready)


def score(dataset: Any, request: Any, work: Path, seed: int) -> dict[str, Any]:
    """Score the bins with one seed, from one embedding pass for all seeds."""
    from dataclasses import replace

    from dq_multimodal import embedding, scoring
    from dq_multimodal.adapters.choice import choose_adapter, label_column_of
    from dq_multimodal.core import bin_importance
    from dq_multimodal.selection import bin_rows, read_strata

    result = work / f"seed-{seed}.json"
    work.mkdir(parents=True, exist_ok=True)
    request = replace(request, seed=seed)
    adapter = choose_adapter(dataset, request)
    assert adapter is not None
    asked = adapter.describe_model()
    if result.is_file() and (known := json.loads(result.read_text()))["asked"] == asked:
        return known
    if request.embeddings is not None:
        embedding.copy_embeddings(request.embeddings, dataset, request.split, work)
    else:
        embedding.embed_rows(adapter, work, request.batch_size)
    strata, _ = read_strata(dataset, label_column_of(adapter, request))
    bins = bin_rows(embedding.open_embeddings(work), strata, "dq", request.n_bins, "cosine")
    started = time.perf_counter()
    scores, facts = scoring.score_bins(adapter, work, bins, request, 0)
    found: dict[str, Any] = {
        "asked": asked,
        "representativeness": scores.representativeness.tolist(),
        "diversity": scores.diversity.tolist(),
        "importance": bin_importance(scores).tolist(),
        "seconds": time.perf_counter() - started,
        "rows_a_bin": facts["rows_a_bin"],
    }
    if adapter.describe()["modality"] == "text":
        started = time.perf_counter()
        found["surprisal"] = adapter.surprisal(bins.bin).tolist()
        found["surprisal_seconds"] = time.perf_counter() - started
    shutil.rmtree(work / scoring.FOLDER)
    write(result, found)
    return found


def correlate(a: list[float], b: list[float]) -> float:
    """Give Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return 1.0 if a == b else float(spearmanr(a, b)[0])


def measure_cost(dataset: Any, request: Any, work: Path) -> dict[str, Any]:
    """Time the embedding stage without the scores and with them, one after the other."""
    from dataclasses import replace

    from dq_multimodal import embedding, scoring
    from dq_multimodal.adapters.choice import choose_adapter, label_column_of
    from dq_multimodal.selection import bin_rows, read_strata

    result = work.with_suffix(".json")
    model = request.embedding_model
    if result.is_file() and (known := json.loads(result.read_text()))["asked"] == model:
        return known
    rows = dataset.select(range(min(COST_ROWS, len(dataset))))
    request = replace(request, embeddings=None)
    seconds: dict[str, float] = {}
    for name, method in (("embed", "dq"), ("embed_and_look", "adq")):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        adapter = choose_adapter(rows, replace(request, method=method))
        assert adapter is not None
        adapter.lengths()
        adapter.embed(adapter.load(np.arange(8))[0])  # load the model before the clock runs
        started = time.perf_counter()
        embedding.embed_rows(adapter, work, request.batch_size)
        seconds[name] = time.perf_counter() - started
    strata, _ = read_strata(rows, label_column_of(adapter, request))
    bins = bin_rows(embedding.open_embeddings(work), strata, "dq", request.n_bins, "cosine")
    started = time.perf_counter()
    scoring.score_bins(adapter, work, bins, request, 0)
    seconds["scores"] = time.perf_counter() - started
    shutil.rmtree(work)
    extra = (seconds["embed_and_look"] + seconds["scores"]) / seconds["embed"] - 1
    model = adapter.describe_model()["model"]
    own = Path(model) / "classifier.json"
    name = json.loads(own.read_text())["model"] if own.is_file() else Path(model).name
    found = {"rows": len(rows), "model": name, "seconds": seconds, "extra_share": extra}
    write(result, {**found, "asked": request.embedding_model})
    return found


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
