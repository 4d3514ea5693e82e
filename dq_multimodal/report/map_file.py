"""map.parquet: the points of the map for Embedding Atlas and other tools."""

from pathlib import Path
from typing import Any

from dq_multimodal.files import write_table
from dq_multimodal.report.collect import Facts

FILE = "map.parquet"


def write_map(facts: Facts, folder: Path) -> None:
    """Write the shown points: row, x, y, bin, kept, label, neighbors, text and image.

    `neighbors` holds positions within the file, each point itself first, as Embedding Atlas has
    them: `embedding-atlas map.parquet --x x --y y --neighbors neighbors --text text` (or `--image
    image`, or both). Without points no file is left.
    """
    import pyarrow as pa
    from datasets import Features, Image, List, Value

    shown, selection = facts.map, facts.selection
    if shown is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    rows = shown.rows
    pairs = zip(shown.neighbour_ids.tolist(), shown.neighbour_distances.tolist(), strict=True)
    neighbours = [
        {"ids": [at, *ids], "distances": [0.0, *distances]}
        for at, (ids, distances) in enumerate(pairs)
    ]
    lists = {"ids": List(Value("int64")), "distances": List(Value("float32"))}
    columns: dict[str, tuple[Any, list[Any]]] = {
        "row": (Value("int64"), selection.row[rows].tolist()),
        "x": (Value("float32"), list(shown.places[:, 0])),
        "y": (Value("float32"), list(1 - shown.places[:, 1])),  # upwards, as plots have it
        "bin": (
            Value("int32"),
            [None] * len(rows) if selection.bin is None else selection.bin[rows].tolist(),
        ),
        "kept": (Value("bool"), selection.kept[rows].tolist()),
        "label": (Value("string"), [facts.label(row) if facts.labels else None for row in rows]),
        "neighbors": (lists, neighbours),
    }
    if facts.reader.has_texts:
        texts = [" ".join(filter(None, facts.texts[row])) for row in rows]
        columns["text"] = Value("string"), texts
    if facts.reader.has_pictures:
        pictures = [facts.pictures[row].large for row in rows]
        files = [{"bytes": picture, "path": None} if picture else None for picture in pictures]
        columns["image"] = Image(), files
    schema = Features({name: feature for name, (feature, _) in columns.items()}).arrow_schema
    values = {name: found for name, (_, found) in columns.items()}
    write_table(pa.table(values, schema=schema), folder / FILE)
