"""The ablation of adq: random, DQ, + RS, + DS, + IS, each trained with several seeds.

    python eval/adq_ablation.py images --classifier runs/cifar10-small/extractor/model
        [--seeds 5] [--keep_ratios 0.1] [--alphas 0.6] [--lines random dq ...]
    python eval/adq_ablation.py text [--seeds 3]

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data). Images: all of CIFAR-10, one
adq run a seed, and on the rows drawn from it recipes/cifar10.py with the short schedule
(recipes/configs/cifar10_short.yaml); test accuracy in percent. Text: all of Alpaca but its last
2 %, which are held out, ready embeddings, one adq run for each score of representativeness, and
recipes/alpaca_20pct.py with recipes/configs/alpaca_small.yaml; held-out response loss in nats. A
seed is that of the draw, the weights and the batches, and for images of the scores too. Every run
of one modality takes the same number of steps. Goes on where it was interrupted; other settings
want another `--work_dir`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import command, fail

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
CONFIGS = ROOT / "recipes" / "configs"
TRAIN_RATIO = 0.98

LINES: dict[str, dict[str, str]] = {
    "random": {"method": "random"},
    "dq": {"method": "dq"},
    "+ RS": {"method": "adq", "importance": "representativeness"},
    "+ DS": {"method": "adq", "importance": "diversity"},
    "+ IS": {"method": "adq", "importance": "both"},
}
SURPRISAL = {f"{name} (surprisal)": LINES[name] for name in ("+ RS", "+ IS")}
"""Lines of text whose representativeness is surprisal, not texture."""


def main() -> None:
    """Run what has not run yet, then collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modality", choices=("images", "text"))
    parser.add_argument("--seeds", type=int, help="Runs of each line.  [default: 5, text 3]")
    parser.add_argument("--keep_ratios", type=float, nargs="+", default=[0.1])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.6])
    parser.add_argument("--lines", nargs="+", help="Lines to run.  [default: all]")
    parser.add_argument("--max_steps", type=int, help="Training steps.  [default: configured]")
    parser.add_argument("--classifier", default="runs/cifar10-small/extractor/model")
    parser.add_argument("--work_dir", type=Path, help="[default: runs/adq-images or runs/adq-text]")
    parser.add_argument("--output", type=Path, help="[default: eval/results/adq_MODALITY.json]")
    args = parser.parse_args()
    is_text = args.modality == "text"
    args.seeds = args.seeds or (3 if is_text else 5)
    args.work_dir = args.work_dir or Path(f"runs/adq-{args.modality}")
    args.output = args.output or ROOT / "eval" / "results" / f"adq_{args.modality}.json"
    known = LINES | SURPRISAL if is_text else LINES
    args.lines = args.lines or list(known)
    if not (DATA / ("alpaca.parquet" if is_text else "cifar10")).exists():
        fail(f"no data in {DATA} (set DQ_TEST_DATA)")
    strange = [name for name in args.lines if name not in known]
    if strange:
        fail(f"no line {', '.join(strange)}: there are {', '.join(known)}")
    if is_text:
        write_split(args.work_dir / "data")

    made = []
    for seed in range(args.seeds):
        for ratio in args.keep_ratios:
            for name in args.lines:
                is_adaptive = known[name]["method"] == "adq"
                for alpha in args.alphas if is_adaptive else [None]:
                    folder = run(args, name, known[name], ratio, alpha, seed)
                    made.append({"line": name, "keep_ratio": ratio, "alpha": alpha, "run": folder})
    collect(args, made)


def run(
    args: argparse.Namespace,
    name: str,
    options: dict[str, str],
    ratio: float,
    alpha: float | None,
    seed: int,
) -> Path:
    """Train one line with one seed, and give the folder of its run."""
    work = args.work_dir
    short = "".join(c for c in name.lower() if c.isalnum())
    short += "" if alpha is None else f"-{alpha:g}"
    folder = work / "runs" / f"{short}-{ratio:g}-{seed}"
    is_text = args.modality == "text"
    source = select_text(work, name) if is_text else select_images(work, args.classifier, seed)
    flags: dict[str, Any] = {
        **options,
        "keep_ratio": ratio,
        "from_run": source,
        "selection_seed": seed,
        "seed": seed,
        "output_dir": folder,
    }
    if alpha is not None:
        flags["alpha"] = alpha
    if args.max_steps:
        flags["max_steps"] = args.max_steps
    if is_text:
        model = work / f"llama-{seed}"
        if not model.is_dir():
            size = ("--vocab_size", 2048, "--hidden_size", 128, "--num_hidden_layers", 4)
            rows = ("--dataset_name", work / "data" / "train.parquet", "--seed", seed)
            command(ROOT / "recipes" / "tiny_llama.py", *rows, *size, "--output_dir", model)
        flags |= {
            "dataset_name": work / "data" / "train.parquet",
            "eval_dataset_name": work / "data" / "heldout.parquet",
            "model_name_or_path": model,
        }
        recipe, config = "alpaca_20pct.py", "alpaca_small.yaml"
    else:
        flags |= {
            "dataset_name": DATA / "cifar10" / "train-*.parquet",
            "test_dataset_name": DATA / "cifar10" / "test-*.parquet",
        }
        recipe, config = "cifar10.py", "cifar10_short.yaml"
    parts = [part for key, value in flags.items() for part in (f"--{key}", value)]
    command(ROOT / "recipes" / recipe, "--config", CONFIGS / config, *parts)
    return folder


def select_images(work: Path, classifier: str, seed: int) -> Path:
    """Score and order all of CIFAR-10 with one seed."""
    folder = work / f"selection-{seed}"
    command(
        *("-m", "dq_multimodal.cli", "compress", DATA / "cifar10" / "train-*.parquet"),
        *("--embedding-model", classifier, "--keep-ratio", 0.1, "--seed", seed),
        *("--no-report", "--output-dir", folder),
    )
    return folder


def select_text(work: Path, name: str) -> Path:
    """Score and order the training rows of Alpaca, by one score of representativeness."""
    score = "surprisal" if name in SURPRISAL else "texture"
    folder = work / f"selection-{score}-0"
    command(
        *("-m", "dq_multimodal.cli", "compress", work / "data" / "train.parquet"),
        *("--embeddings", work / "data" / "embeddings.npy", "--keep-ratio", 0.1),
        *("--representativeness", score, "--no-report", "--output-dir", folder),
    )
    return folder


def write_split(folder: Path) -> None:
    """Write train.parquet, heldout.parquet and the embeddings of the training rows."""
    import pyarrow.parquet as pq

    if (folder / "embeddings.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(DATA / "alpaca.parquet")
    n_train = round(TRAIN_RATIO * len(table))
    pq.write_table(table.slice(0, n_train), folder / "train.parquet")
    pq.write_table(table.slice(n_train), folder / "heldout.parquet")
    temporary = folder / "embeddings.tmp.npy"
    np.save(temporary, np.load(DATA / "alpaca_minilm_f16.npy")[:n_train])
    temporary.replace(folder / "embeddings.npy")


def collect(args: argparse.Namespace, made: list[dict[str, Any]]) -> None:
    """Put the runs of each line together, with their mean and its 95 % interval."""
    from scipy.stats import t

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in made:
        found = json.loads((entry["run"] / "metrics.json").read_text())
        value = found["held_out"]["response_loss"] if "held_out" in found else found["accuracy"]
        key = (entry["line"], entry["keep_ratio"], entry["alpha"])
        groups.setdefault(key, []).append({**found, "value": value})
    lines = []
    for (name, ratio, alpha), runs in groups.items():
        values = np.array([run["value"] for run in runs]) * (1 if args.modality == "text" else 100)
        half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
        lines.append(
            {
                "line": name,
                "keep_ratio": ratio,
                "alpha": alpha,
                "rows": runs[0]["selection"]["rows"],
                "steps": runs[0]["steps"],
                "values": values.tolist(),
                "mean": float(values.mean()),
                "half_of_95": float(half) if len(values) > 1 else None,
            }
        )
    document = {
        "command": " ".join(["python", "eval/adq_ablation.py", *sys.argv[1:]]),
        "device": runs[0]["device"],
        "what": "held-out response loss, nats" if args.modality == "text" else "test accuracy, %",
        "lines": lines,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(args.output)
    for line in lines:
        half = line["half_of_95"]
        print(f"{line['line']} {line['keep_ratio']} {line['alpha']}: {line['mean']:.4f} +- {half}")


if __name__ == "__main__":
    main()
