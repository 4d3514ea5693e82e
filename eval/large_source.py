"""A source of millions of rows: seconds and memory of every stage of compress.

    python eval/large_source.py --work runs/large --output eval/results/large_source.json

Makes a parquet file of short texts and a file of float16 embeddings, block by block, and runs the
command line on them, bins in parts by k-means (with `--streaming` also as a stream). Memory is the
anonymous part, sampled: memory-mapped files are the system's to drop.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BLOCK_ROWS = 50_000
N_LABELS = 50


def make_source(folder: Path, n_rows: int, dimension: int) -> None:
    """Write data.parquet and embeddings.npy: rows around one centre a label.

    Their variance along the k-th axis falls as k^-0.6, much as it does of sentence embeddings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    words = np.array([f"word{k}" for k in range(1000)])
    centres = 0.5 * rng.normal(size=(N_LABELS, dimension)).astype(np.float32)
    spread = np.arange(1, dimension + 1, dtype=np.float32) ** -0.3
    spread /= np.sqrt((spread**2).mean())
    shape = (n_rows, dimension)
    out = np.lib.format.open_memmap(folder / "embeddings.npy", "w+", np.float16, shape)
    schema = pa.schema({"text": pa.string(), "label": pa.int64()})
    with pq.ParquetWriter(folder / "data.parquet", schema) as writer:
        for start in range(0, n_rows, BLOCK_ROWS):
            size = min(BLOCK_ROWS, n_rows - start)
            labels = rng.integers(0, N_LABELS, size=size)
            texts = [" ".join(row) for row in words[rng.integers(0, len(words), size=(size, 10))]]
            writer.write_table(pa.table({"text": texts, "label": labels}, schema=schema))
            noise = rng.standard_normal((size, dimension), dtype=np.float32)
            out[start : start + size] = centres[labels] + spread * noise
    out.flush()


def measure(folder: Path, name: str, *flags: str) -> dict[str, object]:
    """Run compress once; give its seconds by stage and its largest anonymous memory."""
    command = [sys.executable, "-m", "dq_multimodal.cli", "compress", str(folder / "data.parquet")]
    command += ["--output-dir", str(folder / name), "--overwrite", "--json", *flags]
    started, peak = time.perf_counter(), 0
    with (folder / f"{name}.json").open("w") as out:
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.1)
    if process.wait():
        raise SystemExit(f"exit {process.returncode}: {' '.join(command)}")
    manifest = json.loads((folder / name / "manifest.json").read_text())
    seconds = round(time.perf_counter() - started, 1)
    return {
        "flags": flags,
        "wall_seconds": seconds,
        "seconds": manifest["seconds"],
        "peak_bytes": peak,
    }


def main() -> None:
    """Make the source, run each way, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--methods", nargs="+", default=["random", "dq"])
    parser.add_argument("--keep_ratio", default="0.01")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    make_source(asked.work, asked.rows, asked.dimension)
    runs = []
    for method in asked.methods:
        flags = ["--method", method, "--keep-ratio", asked.keep_ratio]
        if method != "random":
            flags += ["--embeddings", str(asked.work / "embeddings.npy"), "--partition", "kmeans"]
        for name, more in ((method, []), (f"{method}-stream", ["--streaming"])):
            runs.append({"name": name, **measure(asked.work, name, *flags, *more)})
            print(json.dumps(runs[-1]))
    import torch

    from dq_multimodal.training.record import device_name

    found = {
        "command": " ".join(["python", "eval/large_source.py", *sys.argv[1:]]),
        "device": device_name(torch.device("cpu")),
        "rows": asked.rows,
        "dimension": asked.dimension,
        "runs": runs,
    }
    asked.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
