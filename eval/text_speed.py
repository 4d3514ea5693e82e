"""Texts a second through the embedding stage, and what of `compress` is not the encoder.

    python eval/text_speed.py [--rows 3000] [--compress_rows 0]

The stage (rows read, tokenised, embedded, saved) and the bare encoder's forward pass on tokens
that are ready are measured by turns in one run, on the same batches sorted by length. Then
`compress` runs in a process of its own, on as many rows or on --compress_rows, with a clock around
the forward pass of the transformer: what is not in it, from the start of the process to its end,
is the rest. Reads Alpaca from the folder of real data (DQ_TEST_DATA, default ../shared/data), rows
spread evenly over the file; 0 rows is all of it.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import fail, timed

from dq_multimodal.config import DEFAULT_TEXT_MODEL, CompressConfig

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))


def main() -> None:
    """Measure stage and command, and write; or, started by itself, run the command watched."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3_000)
    parser.add_argument("--compress_rows", type=int, help="for `compress`; default as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=DEFAULT_TEXT_MODEL)
    parser.add_argument("--methods", nargs="+", default=["dq", "adq"])
    parser.add_argument("--source", type=Path, default=DATA / "alpaca.parquet")
    parser.add_argument("--output", type=Path, default=ROOT / "eval/results/text_speed.json")
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        print(json.dumps(watch(args.watch, args.methods[0], args.model)))
        return
    if not args.source.is_file():
        fail(f"no {args.source} (set DQ_TEST_DATA)")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.parquet"
        write_rows(args.source, args.rows, data)
        stage = measure_stage(data, args.model, args.rounds)
        n_rows = args.rows if args.compress_rows is None else args.compress_rows
        write_rows(args.source, n_rows, data)
        commands = [measure_command(data, method, args.model) for method in args.methods]
    document = {
        "command": " ".join(["python", "eval/text_speed.py", *sys.argv[1:]]),
        "batch_size": CompressConfig.batch_size,
        "stage": stage,
        "compress": commands,
        "goals": hold(stage, commands),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(args.output)
    print({key: value for key, value in stage.items() if key != "rounds"}, *commands, sep="\n")


def write_rows(source: Path, n_rows: int, target: Path) -> None:
    """Write rows spread evenly over a file; 0 is all of them."""
    import pyarrow.parquet as pq

    table = pq.read_table(source)
    if 0 < n_rows < len(table):
        table = table.take(np.linspace(0, len(table) - 1, n_rows).astype(np.int64))
    pq.write_table(table, target)


def measure_stage(data: Path, model: str, rounds: int) -> dict[str, Any]:
    """Time the embedding stage and the bare encoder by turns."""
    import torch
    from sentence_transformers.util import batch_to_device

    from dq_multimodal.adapters.text import TextAdapter, detect_layout
    from dq_multimodal.data.source import load_source
    from dq_multimodal.models.text import load_encoder
    from dq_multimodal.stages.embedding import FILE, embed_rows, plan_batches
    from dq_multimodal.training.record import device_name

    dataset = load_source(str(data)).dataset
    adapter = TextAdapter(dataset, detect_layout(dataset.column_names), model)
    bare = load_encoder(model).model
    batches = plan_batches(adapter.lengths(), CompressConfig.batch_size)
    ready = [bare.preprocess(adapter.load(rows)[0]) for rows in batches]
    ready = [batch_to_device(features, bare.device) for features in ready]

    def forward() -> None:
        with torch.inference_mode():
            for features in ready:
                bare(dict(features))["sentence_embedding"].cpu()

    adapter.embed(adapter.load(batches[-1])[0])
    found: dict[str, list[float]] = {"stage": [], "encoder": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            found["encoder"].append(timed(forward))
            work = (adapter, Path(folder), CompressConfig.batch_size)
            found["stage"].append(timed(lambda work=work: embed_rows(*work)))
            (Path(folder) / FILE).unlink()
    shares = [e / s for e, s in zip(found["encoder"], found["stage"], strict=True)]
    return {
        "rows": len(dataset),
        "model": model,
        "texts_per_second": {
            key: round(len(dataset) / statistics.median(seconds), 1)
            for key, seconds in found.items()
        },
        "share_of_encoder_rate": round(statistics.median(shares), 3),
        "rounds": {key: [round(s, 3) for s in seconds] for key, seconds in found.items()},
        "device": device_name(bare.device),
    }


def measure_command(data: Path, method: str, model: str) -> dict[str, Any]:
    """Run `compress` in a process of its own, from its start to its end."""
    flags = ["--watch", str(data), "--methods", method, "--model", model]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval" / "text_speed.py"), *flags],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - started
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "rows": found["rows"],
        "method": method,
        "seconds": round(wall, 2),
        "seconds_in_forward": found["forward"],
        "seconds_in_compress": found["compress"],
        "share_not_forward": round(1 - found["forward"] / wall, 4),
        "share_not_forward_in_compress": round(1 - found["forward"] / found["compress"], 4),
        "stage_seconds": found["stages"],
    }


def watch(data: Path, method: str, model: str) -> dict[str, Any]:
    """Compress with a clock around every forward pass of the transformer."""
    import torch

    from dq_multimodal import compress
    from dq_multimodal.adapters import text

    load, spent = text.load_encoder, 0.0

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def load_watched(name: str) -> Any:
        encoder = load(name)
        net = encoder.model[0].auto_model
        forward = net.forward

        @functools.wraps(forward)  # the module above looks at its arguments
        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            started = now()
            found = forward(*args, **kwargs)
            spent += now() - started
            return found

        net.forward = timed_forward
        return encoder

    text.load_encoder = load_watched
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "run"
        asked = {"keep_ratio": 0.2, "method": method, "embedding_model": model}
        seconds = timed(lambda: compress(str(data), output_dir=target, **asked))
        manifest = json.loads((target / "manifest.json").read_text())
    found = {"rows": manifest["rows"], "forward": round(spent, 3), "compress": round(seconds, 3)}
    return found | {"stages": manifest["seconds"]}


def hold(stage: dict[str, Any], commands: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the goals beside what was measured."""
    share = stage["share_of_encoder_rate"]
    goals = [
        {
            "work": f"text embedding, {stage['rows']:,} rows of Alpaca, of the bare encoder's rate",
            "goal": "at least 95 %",
            "measured": f"{100 * share:.1f} %",
            "is_met": share >= 0.95,
        }
    ]
    for line in commands:
        rest = line["share_not_forward"]
        goals.append(
            {
                "work": f"compress, {line['rows']:,} rows of Alpaca, {line['method']}: not in the "
                "forward pass",
                "goal": "at most 5 % of the wall time",
                "measured": f"{100 * rest:.1f} %",
                "is_met": rest <= 0.05,
            }
        )
    return goals


if __name__ == "__main__":
    main()
