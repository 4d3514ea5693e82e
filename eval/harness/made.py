"""Small sets of pictures that need no network: `made:NAME` as the place of a task.

`digits` are the handwritten digits of scikit-learn, 8 px (UCI, Alpaydin and Kaynak 1998: the 1,797
of its test file, of 13 writers). `garments` are drawn here, 28 px: ten kinds of clothes as
Fashion-MNIST has (arXiv:1708.07747), grey on black, with outlines, sleeves, folds, stripes and
noise that vary; they stand in for it where it cannot be had, and no number on one is one on the
other. Each has a part `train` and a part `test` without rows in common.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dq_multimodal.config import InputError

FOLDER = Path("runs") / "made"
VERSION = 1
N_TEST_DIGITS = 500
N_GARMENTS = {"train": 6000, "test": 2000}
SIDE, SCALE = 28, 4
"""Side of the garments, px, and how many times larger they are drawn."""


def make_pictures(name: str) -> str:
    """Give the file of a part such as `digits-train`, which is written if it is not there.

    Raises:
        InputError: If there is no such set.
    """
    sets: dict[str, Callable[[str], tuple[np.ndarray, np.ndarray, list[str]]]]
    sets = {"digits": read_digits, "garments": draw_garments}
    kind, _, part = name.partition("-")
    if kind not in sets or part not in N_GARMENTS:
        known = ", ".join(f"{kind}-{part}" for kind in sets for part in N_GARMENTS)
        raise InputError(f"no made:{name}: there are {known}")
    path = FOLDER / f"{name}-{VERSION}.parquet"
    if not path.is_file():
        write(path, *sets[kind](part))
    return str(path.absolute())


def write(path: Path, pictures: np.ndarray, classes: np.ndarray, names: list[str]) -> None:
    """Write grey pictures (n, h, w) uint8 as PNG files in Parquet, with their classes."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from PIL import Image

    def encode(picture: np.ndarray) -> dict[str, Any]:
        Image.fromarray(picture).save(buffer := io.BytesIO(), "PNG", optimize=True)
        return {"bytes": buffer.getvalue()}

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    rows = {"image": [*map(encode, pictures)], "label": classes.tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Dataset.from_dict(rows, features=features).to_parquet(temporary)
    temporary.replace(path)


def read_digits(part: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Give the digits of scikit-learn: 500 by chance for the test, the others for training."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    rows = np.sort(order[:N_TEST_DIGITS] if part == "test" else order[N_TEST_DIGITS:])
    pictures = (found.images[rows] * 255 / 16).round().astype(np.uint8)
    return pictures, found.target[rows], [*map(str, range(10))]


GARMENTS = [
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
]
Shape = list[tuple[float, float]]
"""Corners (x, y) in units of the picture's side, y downwards."""


def draw_garments(part: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draw garments, as many of each class; the parts draw from generators of their own."""
    rng = np.random.default_rng([VERSION, list(N_GARMENTS).index(part)])
    classes = np.arange(N_GARMENTS[part]) % len(GARMENTS)
    pictures = np.stack([draw_garment(GARMENTS[k], rng) for k in classes])
    return pictures, classes, GARMENTS


def draw_garment(name: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one garment, (28, 28) uint8: its parts, moved and turned a little, and its cloth."""
    from PIL import Image, ImageDraw

    n = SIDE * SCALE
    mask, seams = Image.new("L", (n, n)), Image.new("L", (n, n))
    turn, stretch = math.radians(rng.normal(0, 3)), rng.normal(1, 0.05, 2)
    shift = rng.normal(0, 0.02, 2)

    def place(shape: Shape) -> Shape:
        points = (np.array(shape) - 0.5) * stretch + rng.normal(0, 0.008, (len(shape), 2))
        turned = points @ np.array(
            [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
        )
        return [(float(x), float(y)) for x, y in (turned + 0.5 + shift) * n]

    parts, holes, lines = outline(name, rng)
    for shapes, value in ((parts, 255), (holes, 0)):
        for shape in shapes:
            ImageDraw.Draw(mask).polygon(place(shape), fill=value)
    for line in lines:
        ImageDraw.Draw(seams).line(place(line), fill=255, width=SCALE)
    small = [np.asarray(x.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255 for x in (mask, seams)]
    return (small[0] * weave(rng) * (1 - 0.5 * small[1]) * 255).round().astype(np.uint8)


def weave(rng: np.random.Generator) -> np.ndarray:
    """Give the brightness of a cloth, (28, 28) in [0, 1]: a tone, folds, maybe stripes, noise."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    angle, waves = rng.uniform(0, np.pi, 2), np.zeros((SIDE, SIDE))
    for turn, count in zip(angle, rng.uniform((0.5, 3), (2, 8)), strict=True):
        phase = 2 * np.pi * (count * (x * np.cos(turn) + y * np.sin(turn)) + rng.uniform())
        depth = rng.uniform(0, 0.15) if count < 2 else 0.35 * (rng.uniform() < 0.3)
        waves += depth * np.sin(phase)
    noise = rng.normal(0, rng.uniform(0.02, 0.1), (SIDE, SIDE))
    return np.clip(rng.uniform(0.3, 0.95) * (1 + waves) + noise, 0.05, 1)


def mirror(shape: Shape) -> Shape:
    """Give the other half of a shape."""
    return [(1 - x, y) for x, y in shape]


def top(name: str, rng: np.random.Generator) -> tuple[list[Shape], list[Shape], list[Shape]]:
    """Give a garment of the upper body; sleeves, hem and front tell one from another, mostly."""
    u = rng.uniform
    is_dress = name == "dress"
    shoulder, waist = u(0.12, 0.2) if is_dress else u(0.19, 0.27), u(0.13, 0.26)
    hem = {"dress": u(0.15, 0.34), "coat": waist + u(0, 0.06)}.get(name, waist + u(-0.02, 0.02))
    low = {"dress": u(0.86, 0.97), "coat": u(0.82, 0.96)}.get(name, u(0.72, 0.92))
    neck, deep, arm = u(0.06, 0.11), u(0.02, 0.1), u(0.08, 0.13)
    reach = {"t-shirt": u(0.2, 0.4), "dress": u(0, 0.6) * (u() < 0.5)}.get(name, u(0.5, 0.8))
    if name == "shirt" and u() < 0.3:
        reach = u(0.2, 0.45)
    half = [(0.5 - neck, 0.08), (0.5 - shoulder, 0.13), (0.5 - waist, 0.5), (0.5 - hem, low)]
    half += [(0.5, low), (0.5, 0.08 + deep)]
    wide = u(0.05, 0.16)
    sleeve = [(0.5 - shoulder, 0.13), (0.5 - shoulder - wide * reach - 0.02, 0.13 + reach)]
    sleeve += [(0.5 - shoulder - wide * reach + arm * 0.8, 0.13 + reach + 0.02)]
    sleeve += [(0.5 - shoulder + arm * 0.5, 0.13 + 1.6 * arm)]
    arms = [sleeve, mirror(sleeve)] if reach > 0.1 else []
    is_open = {"coat": 0.9, "shirt": 0.7, "dress": 0.1}.get(name, 0.03)
    front = [[(0.5, 0.08 + deep), (0.5, low)]] if u() < is_open else []
    if name == "shirt" and front:
        front += [[(0.5 - neck, 0.08), (0.5, 0.1 + deep), (0.5 + neck, 0.08)]]
    return [half, mirror(half), *arms], [], front


def outline(name: str, rng: np.random.Generator) -> tuple[list[Shape], list[Shape], list[Shape]]:
    """Give the parts of a garment, its holes, and its seams."""
    if name in ("t-shirt", "pullover", "coat", "shirt", "dress"):
        return top(name, rng)
    u = rng.uniform
    if name == "trouser":
        waist, foot, gap = u(0.12, 0.2), u(0.06, 0.13), u(0.01, 0.08)
        hip, low = waist + u(0, 0.04), u(0.9, 0.97)
        left = [(0.5 - waist, 0.04), (0.5, 0.04), (0.5, 0.3), (0.5 - gap, low)]
        left += [(0.5 - gap - foot, low), (0.5 - hip, 0.3)]
        return [left, mirror(left)], [], [[(0.5, 0.04), (0.5, 0.3)]]
    if name == "bag":
        wide, high = u(0.26, 0.44), u(0.2, 0.36)
        body = [(0.5 - wide, 0.9 - 2 * high + u(0, 0.04)), (0.5 + wide, 0.9 - 2 * high)]
        body += [(0.5 + wide, 0.9), (0.5 - wide, 0.9)]
        rise, grip, edge = u(0.1, 0.24), u(0.1, 0.25), 0.9 - 2 * high
        handle = [(0.5 - grip, edge), (0.5 - grip * 0.8, edge - rise)]
        handle += [(0.5 + grip * 0.8, edge - rise), (0.5 + grip, edge)]
        inner = [(0.5 + (x - 0.5) * 0.8, min(edge, y + 0.05)) for x, y in handle]
        flap = [[(0.5 - wide, 0.95 - high), (0.5 + wide, 0.95 - high)]] if u() < 0.5 else []
        return [handle, body], [inner], flap
    heel, toe, sole = u(0.06, 0.14), u(0.88, 0.96), u(0.74, 0.84)
    thick = u(0.03, 0.08)
    bottom = [(heel, sole), (toe, sole), (toe, sole + thick), (heel, sole + thick)]
    if name == "sandal":
        lift = u(0, 0.2)
        bottom[0], bottom[3] = (heel, sole - lift), (heel, sole + thick - lift / 3)
        straps = []
        for at in (u(0.12, 0.3), u(0.45, 0.75)):
            tall, width = u(0.12, 0.3), u(0.04, 0.1)
            straps.append([(at, sole - lift / 2), (at + 0.08, sole - tall - lift / 2)])
            straps[-1] += [(at + 0.08 + width, sole - tall - lift / 2), (at + 2 * width, sole)]
        return [bottom, *straps], [], []
    shaft = sole - (u(0.45, 0.68) if name == "ankle boot" else u(0.2, 0.38))
    ankle = heel + u(0.28, 0.42)
    upper = [(heel, sole), (heel + u(0, 0.04), shaft), (ankle, shaft + u(-0.03, 0.05))]
    upper += [(ankle + u(0.05, 0.2), sole - u(0.12, 0.24)), (toe - 0.06, sole - u(0.06, 0.14))]
    return [bottom, [*upper, (toe, sole)]], [], [[(heel, sole), (toe, sole)]]
