"""Put runs of recipes/cifar10.py side by side.

    python eval/image_comparison.py "dq 10 %=runs/dq-0,runs/dq-1" "full=runs/full-0" [--output FILE]

Each argument is a name and the output folders of its runs, which differ in their seed only. Prints
one table (Markdown) of mean and standard deviation, and with --output writes the numbers as JSON.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HEAD = ("kept", "rows", "image bytes", "steps", "train s", "test accuracy %")


def main() -> None:
    """Read, group, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", nargs="+", help="NAME=FOLDER[,FOLDER...]")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers.")
    parser.add_argument("--command", help="What to record as the command that made the runs.")
    args = parser.parse_args()
    try:
        lines = [read_line(text) for text in args.lines]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(lines))
    if args.output:
        document = {"command": args.command or " ".join(sys.argv), "lines": lines}
        temporary = args.output.with_name(args.output.name + ".tmp")
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.replace(args.output)


def read_line(text: str) -> dict[str, Any]:
    """Put the runs of one line together.

    Raises:
        ValueError: If a run has not finished, or two have the same seed.
    """
    name, _, folders = text.rpartition("=")
    runs = [read_run(Path(folder)) for folder in folders.split(",")]
    if len({run["seed"] for run in runs}) < len(runs):
        raise ValueError(f"two runs of {name} have the same seed")
    accuracies = [100 * run["accuracy"] for run in runs]
    sizes = [run["image_bytes"] for run in runs if run["image_bytes"] is not None]
    return {
        "name": name,
        "rows": runs[0]["rows"],
        "steps": runs[0]["steps"],
        "accuracy": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "image_bytes": round(statistics.mean(sizes)) if sizes else None,
        "train_seconds": statistics.mean(run["train_seconds"] for run in runs),
        "runs": runs,
    }


def read_run(folder: Path) -> dict[str, Any]:
    """Read what one run says of itself."""
    try:
        found = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} is no finished run: it has no metrics.json") from None
    return {
        "seed": found["asked"]["seed"],
        "accuracy": found["accuracy"],
        "rows_tested": found["rows_tested"],
        "rows": found["selection"]["rows"],
        "image_bytes": count_image_bytes(folder / "selection", found["selection"]["bytes"]),
        "steps": found["steps"],
        "train_seconds": found["train_seconds"],
        "is_resumed": found["is_resumed"],
        "select_seconds": found["selection"]["seconds"],
        "patches": found["selection"].get("patches"),
        "device": found["device"],
    }


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


def table(lines: list[dict[str, Any]]) -> str:
    """Lay out the lines as Markdown."""
    cells = [list(HEAD)]
    for line in lines:
        accuracy = f"{line['accuracy']:.2f}"
        if line["accuracy_std"] is not None:
            accuracy += f" ± {line['accuracy_std']:.2f} ({len(line['runs'])} seeds)"
        is_resumed = any(run["is_resumed"] for run in line["runs"])
        cells.append(
            [
                line["name"],
                f"{line['rows']:,}",
                f"{line['image_bytes']:,}" if line["image_bytes"] else "",
                f"{line['steps']:,}",
                "resumed" if is_resumed else f"{line['train_seconds']:.0f}",
                accuracy,
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
