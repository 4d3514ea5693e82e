"""What `plan` says against what `compress` then takes, on the same rows and machine.

    python eval/plan_accuracy.py [--sets alpaca cifar10] [--methods dq coverage random]
        [--rows N] [--classifier DIR] [--work_dir runs/plan-accuracy]
        [--output eval/results/plan_accuracy.json]

Runs the real command line on the folder of real data (DQ_TEST_DATA, default ../shared/data): all
of Alpaca with its ready embeddings (or, with `--encoder`, by the default sentence encoder), and all
of CIFAR-10 by `--classifier`, a folder made by `accelerate launch recipes/train_extractor.py
--model resnet10-narrow`; with `--rows`, the first N rows of each. Sets that the output holds from
other calls stay in it. Every ratio is what happened over what was said. Peak memory is the largest
resident size of the process, mapped files included. Let nothing else run on the machine: `load`
says how many processes there were, on the average of a minute, before the plan, before the run and
after it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import fail, write

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
FILES = {"alpaca": "alpaca.parquet", "cifar10": "cifar10/train-*.parquet"}


def main() -> None:
    """Plan and compress each set, then write both side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--rows", type=int, help="so many rows of each; default all")
    parser.add_argument("--methods", nargs="+", default=["dq", "coverage", "random"])
    parser.add_argument("--encoder", action="store_true", help="embed Alpaca anew")
    parser.add_argument("--classifier", default="runs/extractor/model")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/plan-accuracy"))
    parser.add_argument("--output", type=Path, default=ROOT / "eval/results/plan_accuracy.json")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(["python", "eval/plan_accuracy.py", *sys.argv[1:]]),
        "cores": os.cpu_count(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        for method in args.methods:
            found = about | measure(name, method, args)
            before = json.loads(args.output.read_text())["sets"] if args.output.exists() else {}
            write(args.output, {"sets": before | {f"{name}, {method}": found}})
            print(name, method, json.dumps(found["ratio"]), flush=True)


def measure(name: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Plan one set, compress it, and compare."""
    source = str(DATA / FILES[name])
    if not list(DATA.glob(FILES[name])):
        fail(f"no {FILES[name]} in {DATA} (set DQ_TEST_DATA)")
    flags = [source, "--method", method, "--json"]
    if name == "cifar10":
        flags += ["--embedding-model", args.classifier]
    elif not args.encoder:
        flags += ["--ready-embeddings", str(DATA / "alpaca_minilm_f16.npy")]
    if args.rows is not None:
        flags += ["--split", f"train[:{args.rows}]"]
    target = args.work_dir / f"{name}-run"
    shutil.rmtree(target, ignore_errors=True)
    load = [os.getloadavg()[0]]
    said, plan_seconds, _ = run(["plan", *flags])
    load.append(os.getloadavg()[0])
    done, seconds, peak = run(["compress", *flags, "--output-dir", str(target)])
    load.append(os.getloadavg()[0])
    predicted = {
        "rows": said["rows"],
        "kept": said["kept"],
        "seconds": {key: value for key, value in said["seconds"].items() if key != "start"},
        "total_seconds": said["total_seconds"],
        "peak_memory": said["memory"]["peak"],
        "disk": said["disk"]["total"],
        "subset_data": said["bytes"]["subset_data"],
        "subset_files": said["bytes"]["subset_files"],
    }
    actual = {
        "rows": done["rows"],
        "kept": done["kept"],
        "seconds": {key: done["seconds"].get(key) for key in predicted["seconds"]},
        "total_seconds": round(seconds, 3),
        "peak_memory": peak,
        "disk": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        "subset_data": done["bytes"]["subset_data"],
        "subset_files": done["bytes"]["subset_files"],
    }
    shutil.rmtree(target)
    ratio = {key: divide(actual[key], predicted[key]) for key in predicted if key != "seconds"}
    ratio |= {
        f"{key}_seconds": divide(actual["seconds"][key], value)
        for key, value in predicted["seconds"].items()
    }
    return {
        "plan_seconds": round(plan_seconds, 3),
        "load": [round(value, 1) for value in load],
        "predicted": predicted,
        "memory_terms": said["memory"],
        "actual": actual,
        "ratio": ratio,
    }


def divide(actual: float | None, predicted: float) -> float | None:
    """Give actual / predicted to three digits; None where one of them is missing or 0."""
    return round(actual / predicted, 3) if actual and predicted else None


def run(arguments: list[str]) -> tuple[Any, float, int]:
    """Run one command; give its JSON, its seconds and its peak resident bytes.

    A child's peak is at least the size of the process that started it (Linux counts from before
    the program was loaded), so this script stays small while it measures.
    """
    command = [sys.executable, "-m", "dq_multimodal.cli", *arguments]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        fail(f"{' '.join(arguments)} ended with {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads(text), seconds, usage.ru_maxrss * unit


if __name__ == "__main__":
    main()
