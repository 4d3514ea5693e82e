"""What runs of the recipes found, side by side: results lines (JSON) and a short table."""

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from dq_multimodal.config import InputError
from dq_multimodal.files import write_text
from dq_multimodal.training.record import METRICS
from dq_multimodal.training.selecting import FULL

SETTINGS = ("max_steps", "per_device_train_batch_size", "learning_rate", "max_length")
OPTIONS = ("method", "n_bins", "similarity", "drop_ratio", "fill")
SPENT = ("selection", "proxy", "training")
ENCODED = ("embeddings", "scores")
"""Stages of a selection that run the encoder."""


def read_line(
    folder: Path, suite: str, task: str, selection: str, net: str, proxy_seconds: float = 0.0
) -> dict[str, Any]:
    """Give the results line of one finished run, in the form of the files in eval/results.

    Args:
        folder: Output folder of recipes/alpaca_20pct.py or recipes/cifar10.py.
        suite: Name of the comparison; it names the training settings too.
        task: Name of the data.
        selection: Name of what was kept.
        net: Name of the model.
        proxy_seconds: What it took to train the models that the selection needs; the seconds in
            which the encoder embedded the rows, and for adq their views, are added.

    Raises:
        InputError: If the run has not finished or was tested on no held-out rows.
    """
    try:
        found = json.loads((folder / METRICS).read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder} is no finished run: it has no {METRICS}") from None
    asked, chosen = found["asked"], found["selection"]
    if "accuracy" in found:
        metrics = {"test accuracy": 100 * found["accuracy"]}
        size = count_image_bytes(folder / "selection", chosen["bytes"])
        seconds, is_resumed = found["train_seconds"], found["is_resumed"]
    else:
        if not found["held_out"] or found["held_out"]["response_loss"] is None:
            raise InputError(f"{folder} was tested on no held-out rows")
        metrics = {"loss: held out": found["held_out"]["response_loss"]}
        size = chosen["bytes"]
        seconds, is_resumed = found["seconds"]["train"], found["seconds"]["is_resumed"]
    method, stages = chosen.get("method", asked["method"]), chosen["seconds"]
    has_encoder = chosen.get("has_encoder", method != "random")  # else that stage only reads rows
    encoded = sum(stages.get(name, 0) for name in ENCODED) if has_encoder else 0
    keep_ratio = 1.0 if method == FULL else chosen.get("keep_ratio", asked["keep_ratio"])
    kind, _, threads = found["device"].partition(", ")
    return {
        "suite": suite,
        "task": task,
        "selection": selection,
        "options": _given(asked, OPTIONS) | {"method": method},
        "keep": keep_ratio,
        "keep_ratio": keep_ratio,
        "rows": chosen["rows"],
        "bytes": size,
        "protocol": suite,
        "settings": _given(asked, SETTINGS),
        "use_weights": found.get("use_weights", "none"),
        "net": net,
        "draw": asked["selection_seed"],
        "seed": asked["seed"],
        "is_fixed": False,
        "data": _digest(asked.get("source")),
        "digest": _digest(asked),
        "steps": found["steps"],
        "metrics": {name: {"last": value, "best": None} for name, value in metrics.items()},
        "seconds": {
            "selection": sum(stages.values()) - encoded,
            "proxy": proxy_seconds + encoded,
            "training": None if is_resumed else seconds,
        },
        "device": {
            "type": "cpu" if kind == "cpu" else "cuda",
            "name": threads or kind,
            "threads": int(threads.split()[0]) if threads else None,
        },
        "versions": found.get("versions", {}),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _given(asked: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: asked[name] for name in names if asked.get(name) is not None}


def count_image_bytes(selection: Path, sizes: dict[str, Any]) -> int | None:
    """Give the bytes of the kept images: patch records with masks, or the files as they were.

    None where all rows were trained on, which are not stored anew.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if "stored_images" in sizes:
        return sizes["stored_images"]
    total = 0
    for path in sorted((selection / "subset").glob("*.parquet")):
        schema = pq.read_schema(path)
        names = [n for n in schema.names if str(schema.field(n).type).startswith("struct<bytes")]
        for column in pq.read_table(path, columns=names).columns:
            files = pc.struct_field(column.combine_chunks(), "bytes")
            total += pc.sum(pc.binary_length(files)).as_py() or 0
    return total or None


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a results file, whole or not at all."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def lay_out(lines: list[dict[str, Any]]) -> str:
    """Lay out lines as Markdown, those of one selection and keep ratio together.

    A value is the mean, with the standard deviation where there are several runs.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["selection"], line["keep_ratio"]), []).append(line)
    (metric,) = {name for line in lines for name in line["metrics"]}
    digits = 2 if "accuracy" in metric else 4
    cells = [["kept", "rows", "bytes", "selection s", "proxy s", "training s", "steps", metric]]
    for (selection, keep_ratio), runs in groups.items():
        values = [run["metrics"][metric]["last"] for run in runs]
        value = f"{statistics.mean(values):.{digits}f}"
        if len(values) > 1:
            value += f" ± {statistics.stdev(values):.{digits}f} ({len(values)} seeds)"
        columns = [[run["bytes"] for run in runs]]
        columns += [[run["seconds"][name] for run in runs] for name in SPENT]
        means = [None if None in column else statistics.mean(column) for column in columns]
        shown = ["" if mean is None else f"{mean:,.{k > 0:d}f}" for k, mean in enumerate(means)]
        kept, rows, steps = f"{100 * keep_ratio:g} %", runs[0]["rows"], runs[0]["steps"]
        cells.append([f"{kept}, {selection}", f"{rows:,}", *shown, f"{steps:,}", value])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)
