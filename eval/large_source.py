"""A source of millions of rows: seconds and memory of every stage of compress.

    python eval/large_source.py --work runs/large

Makes a parquet file of short texts and a file of float16 embeddings, block by block, and runs the
command line on them, bins in parts by k-means (with `--streaming` also as a stream). Memory is the
anonymous part, sampled: memory-mapped files are the system's to drop.
"""

import json
from pathlib import Path

import numpy as np
from measure import dq, flags, save

BLOCK_ROWS = 50_000
N_LABELS = 50


def main() -> None:
    """Make the source, run each way, write the numbers."""
    parser = flags(__doc__, "large_source")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--methods", nargs="+", default=["random", "dq"])
    parser.add_argument("--keep_ratio", default="0.01")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    make_source(args.work, args.rows, args.dimension)
    runs = []
    for method in args.methods:
        given = ["--method", method, "--keep-ratio", args.keep_ratio]
        if method != "random":
            ready = ["--ready-embeddings", str(args.work / "embeddings.npy")]
            given += [*ready, "--partition", "kmeans"]
        for name, more in ((method, []), (f"{method}-stream", ["--streaming"])):
            asked = ["compress", args.work / "data.parquet", "--overwrite", *given, *more]
            done = dq(*asked, output_dir=args.work / name)
            spent = {"wall_seconds": round(done.seconds, 1), "seconds": done.found["seconds"]}
            about = {"name": name, "flags": [*given, *more]}
            runs.append({**about, **spent, "peak_bytes": done.anonymous})
            print(json.dumps(runs[-1]))
    save(args.output, {"rows": args.rows, "dimension": args.dimension, "runs": runs})


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


if __name__ == "__main__":
    main()
