"""Seconds, peak memory and picks of the selection: ours, and what others do, on the same rows.

    python eval/selection_benchmark.py [--peers FOLDER] [--cifar_run RUN] [--two_million]

Ours against the greedy with a matrix of all pairs as it was published, against a plain closed-form
greedy, and against apricot and submodlib where they are installed:
`pip install --no-deps --target FOLDER apricot-select numba llvmlite submodlib-py` puts them beside
the package. Rows: MiniLM embeddings of Alpaca (alpaca_minilm_f16.npy in DQ_TEST_DATA, default
../shared/data), its first n for n below 52,002; beyond, random mixtures of pairs of them; and
50,000 x 512 in 10 classes, of the run folder of CIFAR-10 named by --cifar_run, else made up. Every
piece is a process of its own (eval/selection_piece.py). What is measured is saved in --work and
not measured again; remove a file there, or the folder, to do so.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))
N_BINS, SEED = 10, 0
SIZES = (2_000, 4_000, 8_000, 11_495, 26_000, 52_002)
REAL, COMPARED, FLAT = 52_002, 11_495, 20_000
ROUGH = {
    "ours": (5, REAL, 1.25),
    "ours before": (5, REAL, 1.25),
    "ours in parts": (10, REAL, 1),
    "n-by-n": (150, COMPARED, 3),
    "n-by-n, float32": (75, COMPARED, 3),
    "closed form": (15, COMPARED, 2),
    "apricot": (60, 4_000, 2),
    "submodlib": (60, 4_000, 2.5),
}
"""Seconds at a number of rows, and the growth, as guessed to say beforehand how long it takes."""
METHODS = {
    "ours": "dq_multimodal.core.make_bins",
    "ours before": "the same of an older release, in the folder named by --before",
    "ours in parts": "the same in parts by k-means, --partition kmeans: ceil(rows / 50,000) parts",
    "n-by-n": "matrix of all pairs of the rows left, float64, made for each bin; at each pick the "
    "gains of all rows anew, by summing the rows of the matrix that are picked",
    "n-by-n, float32": "the same in float32, as the embeddings are",
    "closed form": "running sums, one product of the rows with a vector at each pick, float64",
    "apricot": "GraphCutSelection, lazy, alpha 1, on the matrix (1 + cosine) / 2 of the rows left",
    "submodlib": "GraphCutFunction, LazyGreedy, lambda 1, on the same matrix, which it takes in "
    "single precision; the last row of the last bin is ours to add",
}
Line = dict[str, Any]


def main() -> None:
    """Plan, measure what is not measured, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/selection-benchmark"))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "eval/results/selection_benchmark.json"
    )
    parser.add_argument("--up_to", type=int, default=10**9, help="Rows, to leave out larger sets.")
    parser.add_argument(
        "--exact_up_to", type=int, default=10**9, help="Rows of ours, not in parts."
    )
    parser.add_argument("--matrix_up_to", type=int, default=COMPARED, help="Rows of n-by-n.")
    parser.add_argument("--closed_up_to", type=int, default=COMPARED, help="Rows of closed form.")
    parser.add_argument("--peers_up_to", type=int, default=4_000, help="Rows of the libraries.")
    parser.add_argument("--peers", type=Path, help="Folder with apricot and submodlib.")
    parser.add_argument("--before", type=Path, help="Folder with an older release.")
    parser.add_argument("--cifar_run", type=Path, help="Run folder: its embeddings and strata.")
    parser.add_argument("--two_million", action="store_true")
    args = parser.parse_args()
    if not (DATA / "alpaca_minilm_f16.npy").is_file():
        print(f"error: no alpaca_minilm_f16.npy in {DATA} (set DQ_TEST_DATA)", file=sys.stderr)
        sys.exit(2)
    planned = plan(args)
    waiting = [one for one in planned if not place(one, args.work).is_file()]
    seconds = sum(3 + one["repeats"] * guess(one["method"], one["rows"]) for one in waiting)
    minutes = f"{seconds / 60:.0f} minutes on 2 cores"
    print(f"{len(waiting)} of {len(planned)} to measure, about {minutes}", flush=True)
    lines = []
    for one in planned:
        lines.append(measure(one, args.work))
        print(describe(lines[-1]), flush=True)
    for line in lines:
        line["agreement"] = agreement(line, lines)
    for line in lines:
        line.pop("picks")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text(json.dumps({**describe_run(), "lines": lines}, indent=2) + "\n")
    temporary.replace(args.output)
    goals = [sys.executable, str(ROOT / "eval" / "selection_goals.py"), str(args.output)]
    sys.exit(subprocess.run(goals).returncode)


def describe_run() -> Line:
    """Say where and how it was measured."""
    import torch

    from dq_multimodal.training.record import device_name

    packages = ("dq-multimodal", "numpy", "torch")
    flags = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", "eval/selection_benchmark.py", *flags]),
        "device": device_name(torch.device("cpu")),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "n_bins": N_BINS,
        "methods": METHODS,
    }


def plan(args: argparse.Namespace) -> list[Line]:
    """List the measurements: method, rows, and where these rows are or what makes them."""
    alpaca = {"data": "Alpaca", "make": "copy", "from": str(DATA / "alpaca_minilm_f16.npy")}
    sizes = [n for n in SIZES if n <= args.up_to]
    asked = [(alpaca, n, "ours", kind) for n in sizes for kind in ("cosine", "euclidean")]
    limits = {
        "n-by-n": args.matrix_up_to,
        "n-by-n, float32": args.matrix_up_to,
        "closed form": args.closed_up_to,
        "apricot": args.peers_up_to,
        "submodlib": args.peers_up_to,
    }
    asked += [(alpaca, n, m, "cosine") for m, limit in limits.items() for n in sizes if n <= limit]
    mixed = {**alpaca, "data": "mixed Alpaca", "make": "mixed", "seed": SEED}
    many = [(REAL, "cosine"), (4 * REAL, "cosine"), (4 * REAL, "euclidean"), (1_000_000, "cosine")]
    many += [(2_000_000, "cosine")] if args.two_million else []
    mixed["of"] = max(n for n, _ in many)
    most = min(args.up_to, args.exact_up_to)
    asked += [(mixed, n, "ours", kind) for n, kind in many if n <= most]
    parted = [n for n, kind in many if kind == "cosine" and REAL < n <= args.up_to]
    asked += [(mixed, n, "ours in parts", "cosine") for n in parted]
    classes = {"data": "made up, 10 classes", "make": "classes", "seed": SEED, "of": 50_000}
    n_rows = 50_000
    if args.cifar_run is not None:
        classes = {"data": "CIFAR-10, 10 classes", "make": "strata", "from": str(args.cifar_run)}
        n_rows = len(np.load(args.cifar_run / "embeddings.npy", mmap_mode="r"))
    if n_rows <= args.up_to:
        asked += [(classes, n_rows, "ours", kind) for kind in ("cosine", "euclidean")]
    flat = {"data": "made up, 8 directions", "make": "flat", "seed": SEED, "of": FLAT}
    if most >= FLAT:
        asked.append((flat, FLAT, "ours", "cosine"))
    if args.before is not None:
        pairs = [
            [one, (*one[:2], "ours before", one[3])][: 1 + (one[2] == "ours")] for one in asked
        ]
        asked = [one for pair in pairs for one in pair]
    peers = {"apricot": args.peers, "submodlib": args.peers, "ours before": args.before}
    return [
        {
            **{"method": method, "rows": n, "similarity": kind, "n_bins": N_BINS, "source": source},
            "repeats": 1 if source is flat else count_repeats(guess(method, n)),
            "peers": str(peers[method].resolve()) if peers.get(method) else None,
        }
        for source, n, method, kind in asked
    ]


def count_repeats(seconds: float) -> int:
    """Give how often a measurement is made that takes so long."""
    return 5 if seconds < 2 else 3 if seconds < 10 else 1


def guess(method: str, n_rows: int) -> float:
    """Guess the seconds of one repeat."""
    seconds, at, growth = ROUGH[method]
    return seconds * (n_rows / at) ** growth


def place(one: Line, work: Path) -> Path:
    """Name the file of a measurement; ours is measured anew when the code of core changes."""
    facts = {**one, "peers": None, "source": {**one["source"], "of": None}}
    if one["method"].startswith("ours"):
        root = Path(one["peers"]) if one["method"] == "ours before" else ROOT
        code = sorted((root / "dq_multimodal" / "core").glob("*.py"))
        facts["code"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in code]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{one['method']}-{one['source']['data']}-{one['rows']}-{one['similarity']}-{key}.json"
    return work / "measured" / name.replace(", ", "-").replace(" ", "-")


def measure(one: Line, work: Path) -> Line:
    """Measure in a process of its own, or read what was measured."""
    path = place(one, work)
    picks = path.with_suffix(".npz")
    source = one["source"]
    line = {"method": one["method"], "data": source["data"], "rows": one["rows"]}
    line |= {"similarity": one["similarity"], "picks": str(picks)}
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        file, strata = provide(source, work)
        keys = ("method", "rows", "similarity", "n_bins", "repeats", "peers")
        asked = {key: one[key] for key in keys}
        asked |= {"file": str(file), "strata": strata and str(strata), "picks": str(picks)}
        found = piece(asked)
        if "seconds" not in found:
            return {**line, **found}
        found["dimension"] = int(np.load(file, mmap_mode="r").shape[1])
        path.write_text(json.dumps(found) + "\n")
    found = json.loads(path.read_text())
    seconds = found.pop("seconds")
    spread = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    line["seconds"] = {name: round(value, 4) for name, value in spread.items()}
    return {**line, "repeats": len(seconds), **found}


def provide(source: Line, work: Path) -> tuple[Path, Path | None]:
    """Make the rows of a source where they are not there yet; give them and their strata."""
    name = f"{source['data']}-{source.get('of', '')}".replace(", ", "-").replace(" ", "-")
    file, strata = work / f"{name}.npy", None
    target = file
    if source["make"] in ("classes", "strata"):
        strata = work / f"{name}-strata.npy"
    if source["make"] == "strata":
        file, target = Path(source["from"]) / "embeddings.npy", strata
        source = {**source, "from": str(Path(source["from"]) / "selection.parquet")}
    if not target.is_file():
        asked = {**source, "file": str(target), "strata": strata and str(strata)}
        made = piece({**asked, "rows": source["of"]} if "of" in source else asked)
        if made:
            print(f"error: cannot make {target}: {made['absent']}", file=sys.stderr)
            sys.exit(1)
    return file, strata


def piece(asked: Line) -> Line:
    """Run one piece; of one that fails, give its last line."""
    script = str(ROOT / "eval" / "selection_piece.py")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, script, json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"absent": f"failed: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def describe(line: Line) -> str:
    """Say a line on the screen."""
    head = f"{line['method']}, {line['data']}, {line['rows']:,} rows, {line['similarity']}: "
    if "absent" in line:
        return head + line["absent"]
    return head + f"{line['seconds']['median']:.2f} s, {line['memory_bytes'] / 1e6:,.0f} MB"


def agreement(line: Line, lines: list[Line]) -> dict[str, float] | None:
    """Compare picks with ours: shares of the rows in the same bin, and at the same rank there."""
    same = ("data", "rows", "similarity")
    own = [x for x in lines if x["method"] == "ours" and all(x[k] == line[k] for k in same)]
    if (
        line["method"] in ("ours", "ours in parts")
        or not own
        or "absent" in line
        or "absent" in own[0]
    ):
        return None
    a, b = np.load(line["picks"]), np.load(own[0]["picks"])
    in_bin = a["bin"] == b["bin"]
    at_rank = in_bin & (a["rank"] == b["rank"])
    return {"same_bin": float(in_bin.mean()), "same_bin_and_rank": float(at_rank.mean())}


if __name__ == "__main__":
    main()
