"""map.parquet: the points of the map for Embedding Atlas and other tools."""

from pathlib import Path
from typing import Any

from dq_multimodal.files import write_table
from dq_multimodal.report.collect import Facts

FILE = "map.parquet"


def write_map(facts: Facts, folder: Path) -> None:
    """Write the shown points: row, x, y, bin, kept, label, text or image, neighbors.

    `neighbors` holds positions within the file, each point itself first, as Embedding Atlas has
    them: `embedding-atlas map.parquet --x x --y y --neighbors neighbors --text text`. Without
    points no file is left.
    """
    import pyarrow as pa
    from datasets import Features, Image, List, Value

    shown, selection = facts.map, facts.selection
    if shown is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    rows = shown.rows
    bins = [None] * len(rows) if selection.bin is None else selection.bin[rows].tolist()
    labels = facts.labels
    neighbours = [
        {"ids": [at, *ids], "distances": [0.0, *distances]}
        for at, (ids, distances) in enumerate(
            zip(shown.neighbour_ids.tolist(), shown.neighbour_distances.tolist(), strict=True)
        )
    ]
    columns: dict[str, list[Any]] = {
        "row": rows.tolist(),
        "x": list(shown.places[:, 0]),
        "y": list(1 - shown.places[:, 1]),  # upwards, as plots have it
        "bin": bins,
        "kept": selection.kept[rows].tolist(),
        "label": [labels[code] if labels else None for code in selection.stratum[rows]],
        "neighbors": neighbours,
    }
    features = {
        "row": Value("int64"),
        "x": Value("float32"),
        "y": Value("float32"),
        "bin": Value("int32"),
        "kept": Value("bool"),
        "label": Value("string"),
        "neighbors": {"ids": List(Value("int64")), "distances": List(Value("float32"))},
    }
    if facts.reader.kind == "text":
        columns["text"] = [" ".join(text for text in facts.texts[row] if text) for row in rows]
        features["text"] = Value("string")
    elif facts.reader.kind == "image":
        pictures = [facts.pictures[row] for row in rows]
        columns["image"] = [
            None if picture is None else {"bytes": picture.large, "path": None}
            for picture in pictures
        ]
        features["image"] = Image()
    schema = Features(features).arrow_schema
    write_table(pa.table(columns, schema=schema), folder / FILE)
