"""Put runs of recipes/alpaca_20pct.py side by side.

    python eval/comparison.py runs/demo/full-0 runs/demo/random-0 runs/demo/dq-0 [--output FILE]

Reads the metrics.json of each run, prints one table (Markdown), and with --output writes the
numbers as JSON. Runs that differ only in their seed become one line, mean and standard deviation.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

SETTINGS = (
    "dataset_name",
    "learning_rate",
    "use_peft",
    "per_device_train_batch_size",
    "max_length",
)
"""What runs of one line have in common, beside method, keep ratio and steps."""
HEAD = ("method", "rows", "bytes", "compress s", "train s", "steps", "held-out response loss")


def main() -> None:
    """Read, group, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="Output folders of the recipe.")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers.")
    args = parser.parse_args()
    try:
        groups = group([read(folder) for folder in args.runs])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(groups))
    if args.output:
        document = {"command": sys.argv, "lines": groups}
        temporary = args.output.with_name(args.output.name + ".tmp")
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.replace(args.output)


def read(folder: Path) -> dict[str, Any]:
    """Read what one run says of itself.

    Raises:
        ValueError: If it has not finished or tested on no held-out rows.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} is no finished run: it has no metrics.json") from None
    if not metrics["held_out"]:
        raise ValueError(f"{folder} was tested on no held-out rows")
    selection, asked = metrics["selection"], metrics["asked"]
    return {
        "method": asked["method"],
        "keep_ratio": asked["keep_ratio"] if asked["method"] != "full" else 1.0,
        "seed": asked["seed"],
        "rows": selection["rows"],
        "bytes": selection["bytes"],
        "compress_seconds": sum(selection["seconds"].values()),
        "train_seconds": metrics["seconds"]["train"],
        "steps": metrics["steps"],
        "response_loss": metrics["held_out"]["response_loss"],
        "held_out_rows": metrics["held_out"]["rows"],
        "device": metrics["device"],
        "is_resumed": metrics["seconds"]["is_resumed"],
        "settings": {name: asked.get(name) for name in SETTINGS},
    }


def group(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put runs together that differ only in their seed, in the order they came."""
    together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        kind = (run["method"], run["keep_ratio"], run["steps"], *run["settings"].values())
        together.setdefault(kind, []).append(run)
    lines = []
    for members in together.values():
        if len({run["seed"] for run in members}) < len(members):
            raise ValueError(f"two runs of {members[0]['method']} have the same seed")
        losses = [run["response_loss"] for run in members]
        lines.append(
            {
                **{key: members[0][key] for key in ("method", "keep_ratio", "rows", "steps")},
                "bytes": round(statistics.mean(run["bytes"] for run in members)),
                "compress_seconds": statistics.mean(run["compress_seconds"] for run in members),
                "train_seconds": statistics.mean(run["train_seconds"] for run in members),
                "response_loss": statistics.mean(losses),
                "response_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
                "runs": members,
            }
        )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Lay out the lines as Markdown."""
    cells = [list(HEAD)]
    for line in lines:
        resumed = any(run["is_resumed"] for run in line["runs"])
        loss = f"{line['response_loss']:.4f}"
        if line["response_loss_std"] is not None:
            loss += f" ± {line['response_loss_std']:.4f} ({len(line['runs'])} seeds)"
        cells.append(
            [
                f"{line['method']} {100 * line['keep_ratio']:g} %",
                f"{line['rows']:,}",
                f"{line['bytes']:,}",
                f"{line['compress_seconds']:.1f}",
                f"{line['train_seconds']:.1f}" if not resumed else "resumed",
                f"{line['steps']:,}",
                loss,
            ]
        )
    widths = [max(len(row[k]) for row in cells) for k in range(len(HEAD))]
    rows = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


if __name__ == "__main__":
    main()
