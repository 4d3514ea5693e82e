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
from pathlib import Path
from typing import Any

from measure import DATA, command_line, dq, flags, need, write

FILES = {"alpaca": "alpaca.parquet", "cifar10": "cifar10/train-*.parquet"}


def main() -> None:
    """Plan and compress each set, then write both side by side."""
    parser = flags(__doc__, "plan_accuracy")
    parser.add_argument("--sets", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--rows", type=int, help="so many rows of each; default all")
    parser.add_argument("--methods", nargs="+", default=["dq", "coverage", "random"])
    parser.add_argument("--encoder", action="store_true", help="embed Alpaca anew")
    parser.add_argument("--classifier", default="runs/extractor/model")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/plan-accuracy"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    need(*(FILES[name] for name in args.sets))
    for name in args.sets:
        for method in args.methods:
            about = {"command": command_line(), "cores": os.cpu_count()}  # no torch: see `Done`
            found = about | measure(name, method, args)
            before = json.loads(args.output.read_text())["sets"] if args.output.exists() else {}
            write(args.output, {"sets": before | {f"{name}, {method}": found}})
            print(name, method, json.dumps(found["ratio"]), flush=True)


def measure(name: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Plan one set, compress it, and compare."""
    asked = [DATA / FILES[name], "--method", method]
    if name == "cifar10":
        asked += ["--embedding-model", args.classifier]
    elif not args.encoder:
        asked += ["--ready-embeddings", DATA / "alpaca_minilm_f16.npy"]
    if args.rows is not None:
        asked += ["--split", f"train[:{args.rows}]"]
    target = args.work_dir / f"{name}-run"
    shutil.rmtree(target, ignore_errors=True)
    load = [os.getloadavg()[0]]
    said, plan_seconds, *_ = dq("plan", *asked)
    load.append(os.getloadavg()[0])
    done, seconds, peak, _ = dq("compress", *asked, output_dir=target)
    load.append(os.getloadavg()[0])
    same = ("subset_data", "subset_files")
    predicted = {
        "rows": said["rows"],
        "kept": said["kept"],
        "seconds": {key: value for key, value in said["seconds"].items() if key != "start"},
        "total_seconds": said["total_seconds"],
        "peak_memory": said["memory"]["peak"],
        "disk": said["disk"]["total"],
        **{key: said["bytes"][key] for key in same},
    }
    actual = {
        "rows": done["rows"],
        "kept": done["kept"],
        "seconds": {key: done["seconds"].get(key) for key in predicted["seconds"]},
        "total_seconds": round(seconds, 3),
        "peak_memory": peak,
        "disk": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        **{key: done["bytes"][key] for key in same},
    }
    shutil.rmtree(target)
    pairs = {key: (actual[key], predicted[key]) for key in predicted if key != "seconds"}
    for key, value in predicted["seconds"].items():
        pairs[f"{key}_seconds"] = (actual["seconds"][key], value)
    return {
        "plan_seconds": round(plan_seconds, 3),
        "load": [round(value, 1) for value in load],
        "predicted": predicted,
        "memory_terms": said["memory"],
        "actual": actual,
        "ratio": {key: round(a / b, 3) if a and b else None for key, (a, b) in pairs.items()},
    }


if __name__ == "__main__":
    main()
