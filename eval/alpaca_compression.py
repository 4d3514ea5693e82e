"""Compress all of Alpaca from ready embeddings: sizes, nesting, seconds, peak memory.

    python eval/alpaca_compression.py [--output eval/results/alpaca_compression.json]

Runs the real command line on the folder of real data (DQ_TEST_DATA, default ../shared/data):
`compress --keep-ratio 0.2 --method dq`, then `resample` to 0.1 and 0.05, then `verify`.
"""

import tempfile
from pathlib import Path
from typing import Any

from measure import DATA, dq, flags, need, save


def main() -> None:
    """Run the commands, check what they wrote, write the results file."""
    args = flags(__doc__, "alpaca_compression").parse_args()
    need("alpaca.parquet", "alpaca_minilm_f16.npy")
    with tempfile.TemporaryDirectory() as folder:
        save(args.output, measure(Path(folder)))


def measure(folder: Path) -> dict[str, Any]:
    """Compress, resample, verify and compare the row numbers."""
    options = ["--ready-embeddings", DATA / "alpaca_minilm_f16.npy", "--method", "dq"]
    asked = ["compress", DATA / "alpaca.parquet", "--keep-ratio", "0.2", *options]
    done = dq(*asked, output_dir=folder / "0.2")
    kept = {0.2: rows_of(folder / "0.2")}
    for ratio in (0.1, 0.05):
        dq("resample", folder / "0.2", "--keep-ratio", ratio, output_dir=folder / str(ratio))
        kept[ratio] = rows_of(folder / str(ratio))
    checks = dq("verify", folder / "0.2").found
    return {
        "rows": done.found["rows"],
        "kept": {str(ratio): len(rows) for ratio, rows in kept.items()},
        "is_nested": kept[0.05] < kept[0.1] < kept[0.2],
        "bytes": done.found["bytes"],
        "notes": done.found["notes"],
        "stage_seconds": done.found["seconds"],
        "seconds": round(done.seconds, 2),
        "peak_memory_bytes": done.resident,
        "verify": {check["name"]: check["result"] for check in checks},
    }


def rows_of(run: Path) -> set[int]:
    """Read the numbers of the kept rows."""
    import pyarrow.parquet as pq  # late: a small script does not raise the peak of what it runs

    return set(pq.read_table(run / "subset", columns=["dq_row"])["dq_row"].to_pylist())


if __name__ == "__main__":
    main()
