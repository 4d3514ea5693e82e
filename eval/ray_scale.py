"""Five million rows by the engine ray and by the local engine, one after the other.

    python eval/ray_scale.py --work runs/ray_scale

Makes 50 parquet files of short texts and embeddings of 64 float16 numbers, block by block, and has
each engine compress them by dq in parts by k-means. Memory is that of the process that was started
(with ray: the driver, not its workers), the anonymous part, sampled.
"""

import json
from pathlib import Path

import numpy as np
from measure import dq, flags, save

N_CENTRES = 500


def main() -> None:
    """Make the source, run each engine, compare what they chose, write the numbers."""
    import pyarrow.parquet as pq

    parser = flags(__doc__, "ray_scale")
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--files", type=int, default=50)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--engines", nargs="+", default=["ray", "local"])
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    source = args.work / "source"
    make_source(source, args.rows, args.files, args.dimension)
    asked = ["--method", "dq", "--ready-embeddings", "vector", "--partition", "kmeans"]
    runs = []
    for engine in args.engines:
        place = args.work / engine
        done = dq("compress", source, *asked, "--engine", engine, "--overwrite", output_dir=place)
        spent = {"wall_seconds": round(done.seconds, 1), "seconds": done.found["seconds"]}
        peaks = {"resident_bytes": done.resident, "peak_bytes": done.anonymous}
        runs.append({"name": engine, **spent, **peaks})
        print(json.dumps(runs[-1]), flush=True)
    tables = [pq.read_table(args.work / engine / "selection.parquet") for engine in args.engines]
    facts = {"rows": args.rows, "files": args.files, "dimension": args.dimension, "flags": asked}
    same = all(table.equals(tables[0]) for table in tables)
    save(args.output, {**facts, "runs": runs, "same_selection": same})


def make_source(folder: Path, n_rows: int, n_files: int, dimension: int) -> None:
    """Write the files, unless they are there: rows around centres, numbered through."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    centres = np.random.default_rng(0).normal(size=(N_CENTRES, dimension)).astype(np.float32)
    edges = np.linspace(0, n_rows, n_files + 1).astype(int)
    for number in range(n_files):
        path = folder / f"data-{number:05d}.parquet"
        if path.exists():
            continue
        rng = np.random.default_rng(number + 1)
        rows = np.arange(edges[number], edges[number + 1])
        noise = rng.standard_normal((len(rows), dimension), dtype=np.float32)
        vectors = (centres[rng.integers(N_CENTRES, size=len(rows))] + noise).astype(np.float16)
        flat = pa.array(vectors.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, dimension)
        texts = [f"row {row} of a set, of group {row % 97}" for row in rows.tolist()]
        pq.write_table(pa.table({"text": texts, "vector": column}), path)


if __name__ == "__main__":
    main()
