"""What `plan` says against what `compress` then takes, on the same rows and machine.

    python eval/plan_accuracy.py [--sets alpaca cifar10] [--rows N] [--method adq]
        [--classifier DIR] [--work_dir runs/plan-accuracy]
        [--output eval/results/plan_accuracy.json]

Runs the real command line on the folder of real data (DQ_TEST_DATA, default ../shared/data): all
of Alpaca by the default sentence encoder, and all of CIFAR-10 by `--classifier`, a folder made by
`accelerate launch recipes/train_extractor.py --model resnet10-narrow`; with `--rows`, the first N
rows of each. Sets that the output holds from other calls stay in it. Every ratio is what happened
over what was said. Peak memory is the largest resident size of the process, mapped files included.
Let nothing else run on the machine.
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

from common import fail, write

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
FILES = {"alpaca": "alpaca.parquet", "cifar10": "cifar10/train-*.parquet"}


def main() -> None:
    """Plan and compress each set, then write both side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--rows", type=int, help="so many rows of each; default all")
    parser.add_argument("--method", default="adq")
    parser.add_argument("--classifier", default="runs/extractor/model")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/plan-accuracy"))
    parser.add_argument("--output", type=Path, default=ROOT / "eval/results/plan_accuracy.json")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    sets = {name: measure(name, args) for name in args.sets}
    import torch  # only now: see `run`

    from dq_multimodal.training.record import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {
        "command": " ".join(["python", "eval/plan_accuracy.py", *sys.argv[1:]]),
        "device": device_name(device),
        "cores": os.cpu_count(),
    }
    before = json.loads(args.output.read_text())["sets"] if args.output.exists() else {}
    document = {"sets": before | {name: about | found for name, found in sets.items()}}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output, document)
    for name, found in sets.items():
        print(name, json.dumps(found["ratio"]))


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Plan one set, compress it, and compare."""
    source = str(DATA / FILES[name])
    if not list(DATA.glob(FILES[name])):
        fail(f"no {FILES[name]} in {DATA} (set DQ_TEST_DATA)")
    if args.rows is not None:
        source = str(write_rows(name, args.rows, args.work_dir))
    flags = [source, "--method", args.method, "--json"]
    if name == "cifar10":
        flags += ["--embedding-model", args.classifier]
    target = args.work_dir / f"{name}-run"
    shutil.rmtree(target, ignore_errors=True)
    said, plan_seconds, _ = run(["plan", *flags])
    done, seconds, peak = run(["compress", *flags, "--output-dir", str(target)])
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
        "predicted": predicted,
        "memory_terms": said["memory"],
        "actual": actual,
        "ratio": ratio,
    }


def divide(actual: float | None, predicted: float) -> float | None:
    """Give actual / predicted to three digits; None where one of them is missing or 0."""
    return round(actual / predicted, 3) if actual and predicted else None


def write_rows(name: str, n_rows: int, folder: Path) -> Path:
    """Write the first rows of a set to a file of their own, by another process."""
    code = (
        "import sys; from datasets import load_dataset; files, n, path = sys.argv[1:]; "
        "d = load_dataset('parquet', data_files=files, split='train'); "
        "d.select(range(min(int(n), len(d)))).to_parquet(path)"
    )
    path = folder / f"{name}-{n_rows}.parquet"
    files = str(DATA / FILES[name])
    subprocess.run([sys.executable, "-c", code, files, str(n_rows), str(path)], check=True)
    return path


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
