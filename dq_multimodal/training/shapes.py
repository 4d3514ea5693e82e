"""Pictures of coloured shapes with questions and answers, drawn here: no network, no download."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32
COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "yellow": (240, 210, 40),
    "purple": (148, 103, 189), "white": (250, 250, 250),
}  # fmt: skip
CORNERS = {"circle": 0, "triangle": 3, "square": 4}
"""Of the shapes; a circle has none."""
FILES = {"train.parquet": 1000, "heldout.parquet": 200}
"""Files and their rows."""


def write_shapes(folder: Path, files: dict[str, int] | None = None, seed: int = 0) -> list[Path]:
    """Write files of rows with columns image, question, answer and label.

    A picture holds one shape: its kind, colour, size and place are drawn, and so is the question.
    The label names colour and kind. The same seed gives the same rows.

    Args:
        folder: Where to.
        files: Rows of each file, by its name; None is FILES.
        seed: Of the draws; each file goes on where the one before it ended.

    Returns:
        The files.
    """
    from datasets import ClassLabel, Dataset, Features, Image, Value

    rng, folder = np.random.default_rng(seed), Path(folder)
    labels = ClassLabel(names=[f"{colour} {kind}" for colour in COLOURS for kind in CORNERS])
    kinds = {"image": Image(), "question": Value("string"), "answer": Value("string")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, n_rows in (files or FILES).items():
        rows = [make_row(rng) for _ in range(n_rows)]
        partial = folder / f".{name}.tmp"  # renamed: a file that exists is whole
        Dataset.from_list(rows, features=Features(kinds | {"label": labels})).to_parquet(partial)
        partial.replace(folder / name)
    return [folder / name for name in files or FILES]


def make_row(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a picture and a question about it, and answer it."""
    colour, kind, other = rng.choice([*COLOURS]), rng.choice([*CORNERS]), rng.choice([*CORNERS])
    there = f"Yes, a {colour} one." if other == kind else f"No, only a {kind}."
    question, answer = [
        (f"What colour is the {kind}?", f"The {kind} is {colour}."),
        ("What shape is this?", f"It is a {kind}."),
        (f"Is there a {other}?", there),
    ][rng.integers(3)]
    image, label = draw_shape(colour, kind, rng), f"{colour} {kind}"
    return {"image": image, "question": question, "answer": answer, "label": label}


def draw_shape(colour: str, kind: str, rng: np.random.Generator) -> "Image":
    """Draw one shape on grey, at a place and of a size that are drawn."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), (int(rng.integers(20, 110)),) * 3)
    radius = rng.uniform(SIDE / 5, SIDE / 2.5)
    x, y = rng.uniform(radius, SIDE - radius, 2)
    pen, fill, n_corners = ImageDraw.Draw(image), COLOURS[colour], CORNERS[kind]
    if n_corners:
        pen.regular_polygon((x, y, radius), n_corners, fill=fill)
    else:
        pen.circle((x, y), radius, fill=fill)
    return image
