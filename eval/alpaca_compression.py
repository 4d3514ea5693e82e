"""Compress all of Alpaca from ready embeddings: sizes, nesting, seconds, peak memory.

    python eval/alpaca_compression.py [--output eval/results/alpaca_compression.json]

Runs the real command line on the folder of real data (DQ_TEST_DATA, default ../shared/data):
`compress --keep-ratio 0.2 --method dq`, then `resample` to 0.1 and 0.05, then `verify`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))


def main() -> None:
    """Run the commands, check what they wrote, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "eval" / "results" / "alpaca_compression.json"
    )
    args = parser.parse_args()
    if not (DATA / "alpaca.parquet").is_file():
        print(f"error: no alpaca.parquet in {DATA} (set DQ_TEST_DATA)", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    results["machine"] = {"processor": platform.machine(), "cores": os.cpu_count(), "gpu": None}
    results["versions"] = {p: version(p) for p in ("dq-multimodal", "numpy", "torch", "datasets")}
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def measure(folder: Path) -> dict[str, Any]:
    """Compress, resample, verify and compare the row numbers."""
    embeddings = ("--ready-embeddings", "alpaca_minilm_f16.npy", "--method", "dq")
    compress = ["compress", "alpaca.parquet", "--keep-ratio", "0.2", *embeddings, "--json"]
    started = time.perf_counter()
    run = dq(compress, folder / "0.2")
    seconds = time.perf_counter() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    kept = {0.2: rows_of(folder / "0.2")}
    for ratio in (0.1, 0.05):
        dq(["resample", folder / "0.2", "--keep-ratio", ratio, "--json"], folder / str(ratio))
        kept[ratio] = rows_of(folder / str(ratio))
    checks = dq(["verify", folder / "0.2", "--json"])
    return {
        "command": "dq-multimodal " + " ".join(compress),
        "rows": run["rows"],
        "kept": {str(ratio): len(rows) for ratio, rows in kept.items()},
        "is_nested": kept[0.05] < kept[0.1] < kept[0.2],
        "bytes": run["bytes"],
        "notes": run["notes"],
        "stage_seconds": run["seconds"],
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_bytes,
        "verify": {check["name"]: check["result"] for check in checks},
    }


def dq(arguments: list[object], output_dir: Path | None = None) -> Any:
    """Run one command in the folder of data and read its JSON."""
    command = [sys.executable, "-m", "dq_multimodal.cli", *map(str, arguments)]
    if output_dir is not None:
        command += ["--output-dir", str(output_dir)]
    done = subprocess.run(command, cwd=DATA, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rows_of(run: Path) -> set[int]:
    """Read the numbers of the kept rows."""
    return set(pq.read_table(run / "subset", columns=["dq_row"])["dq_row"].to_pylist())


if __name__ == "__main__":
    main()
