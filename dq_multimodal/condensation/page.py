"""report.html of a condensed set: its pictures beside the nearest real ones, and how it was made.

One page without a network and without scripts.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from markupsafe import Markup
from numpy import ndarray
from PIL import Image
from torch import Tensor

from dq_multimodal import __version__
from dq_multimodal.condensation.card import list_settings, title_of
from dq_multimodal.condensation.documents import SOFT_LABEL, CondensedConfig, CondensedManifest
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.condensation.rows import encode, to_bytes
from dq_multimodal.data.local import short_name
from dq_multimodal.report.page import data_uri, open_templates, read_part
from dq_multimodal.report.rows import clean_name

if TYPE_CHECKING:
    from datasets import Dataset

N_NEAR = 3
"""Real pictures beside each synthetic one."""
MAX_BYTES = 3_500_000
"""Of the addresses of pictures, which are most of the page."""
OPEN_CLASSES = 12
"""So many classes are unfolded."""
LARGEST_SIDE = 96
"""Larger pictures are scaled down."""
MAX_LISTED = 100
"""Choices of a prefix that are listed."""
COMPARED = 20
"""Real pictures of each class, at least, that are compared with the others."""
BLOCK_NUMBERS = 20_000_000
WIDTH, HEIGHT = 640, 200
"""Units of a chart."""
SHEET_CLASSES, SHEET_IMAGES, SHEET_SIDE = 20, 10, 64


@dataclass(frozen=True)
class Nearest:
    """The nearest real pictures of the same class, of every row of a set.

    Attributes:
        place: Their places in the real set, nearest first, -1 where a class has too few.
        distance: Root mean square of the difference of all numbers of two normalised pictures.
        typical: Median of the distance of a real picture to its nearest other of the class, of
            some of each class.
    """

    place: Int[ndarray, "n k"]
    distance: Float[ndarray, "n k"]
    typical: float


def find_nearest(pixels: Float[ndarray, "n c h w"], real: Real) -> Nearest:
    """Find the real pictures of its class that differ least from each row, in normalised pixels."""
    ours = (torch.from_numpy(pixels) - real.mean.cpu()) / real.spread.cpu()
    n_classes, scale = real.n_classes, float(np.sqrt(ours[0].numel()))
    place = np.full((len(ours), N_NEAR), -1, dtype=np.int64)
    distance = np.full((len(ours), N_NEAR), np.nan)
    among = []
    for k in range(n_classes):
        members = real.of_class(k).cpu()
        theirs = real.images[members.to(real.images.device)].cpu()
        some = real.normalise(theirs[:: max(1, len(theirs) // COMPARED)].to(real.mean.device)).cpu()
        n, n_near = len(ours[k::n_classes]), min(N_NEAR, len(members))
        found, at = _search(torch.cat([ours[k::n_classes], some]), theirs, real, max(n_near, 2))
        place[k::n_classes, :n_near] = members[at[:n, :n_near]].numpy()
        distance[k::n_classes, :n_near] = found[:n, :n_near].numpy() / scale
        if len(members) > 1:
            among += (found[n:, 1] / scale).tolist()
    return Nearest(place, distance, float(np.median(among)) if among else float("nan"))


def _search(
    ours: Tensor, theirs: UInt8[Tensor, "m c h w"], real: Real, n_near: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Give the distances to the nearest of some real pictures, and which; block by block."""
    best = torch.full((len(ours), n_near), torch.inf)
    which = torch.zeros((len(ours), n_near), dtype=torch.long)
    step = max(1, BLOCK_NUMBERS // theirs[0].numel())
    for start in range(0, len(theirs), step):
        block = real.normalise(theirs[start : start + step].to(real.mean.device)).cpu()
        found = torch.cdist(ours.flatten(1).double(), block.flatten(1).double())
        numbers = torch.arange(start, start + len(block)).expand_as(found)
        merged, both = torch.cat([best, found], 1), torch.cat([which, numbers], 1)
        order = merged.argsort(dim=1, stable=True)[:, :n_near]
        best, which = merged.gather(1, order), both.gather(1, order)
    return best, which


def make_page(
    config: CondensedConfig,
    manifest: CondensedManifest,
    rows: "Dataset",
    pixels: Float[ndarray, "n c h w"],
    real: Real | None,
) -> str:
    """Give the text of report.html.

    Args:
        config: config.yaml.
        manifest: manifest.json.
        rows: The rows of the set.
        pixels: Their pictures, in [0, 1] units.
        real: The real set; None where it cannot be had.
    """
    environment = open_templates()
    nearest = None if real is None else find_nearest(pixels, real)
    soft = None
    if SOFT_LABEL in rows.column_names:
        soft = np.array(rows.select_columns([SOFT_LABEL])[SOFT_LABEL], dtype=np.float64)
    classes, cut = _show_classes(manifest, pixels, real, nearest, soft)
    source = clean_name(short_name(config.source.name), 80)
    settings = list_settings(config.request, manifest).items()
    return environment.get_template("condensed.html").render(
        request=config.request,
        manifest=manifest,
        script_hash=None,
        title=clean_name(title_of(config, manifest), 200),
        source=f"{source} (split {clean_name(config.source.split)})",
        style=Markup(read_part(environment, "page.css") + read_part(environment, "condensed.css")),
        classes=classes,
        cut=cut,
        n_open=OPEN_CLASSES,
        nearest=nearest,
        n_near=N_NEAR,
        is_scaled=manifest.side > LARGEST_SIDE,
        loss=_draw_losses(manifest),
        choices=_draw_choices(manifest, config.request.iterations or 1),
        max_listed=MAX_LISTED,
        notes=[clean_name(note, 400) for note in manifest.notes],
        settings=[(clean_name(name), clean_name(value, 200)) for name, value in settings],
        version=__version__,
    )


def _show_classes(
    manifest: CondensedManifest,
    pixels: Float[ndarray, "n c h w"],
    real: Real | None,
    nearest: Nearest | None,
    soft: Float[ndarray, "n classes"] | None,
) -> tuple[list[dict[str, Any]], str]:
    """Give what is shown of each class, and say what was cut.

    Of all classes the same number of pictures is shown, as many as there is room for; of very
    many classes the first.
    """
    names, ours = [clean_name(name) for name in manifest.classes], to_bytes(pixels)
    shown: list[list[dict[str, Any]]] = [[] for _ in names]
    n_classes, size = len(names), 0
    for row, picture in enumerate(ours):
        card: dict[str, Any] = {
            "row": row,
            "image": data_uri(_shrink(picture)),
            "near": [],
            "soft": "",
        }
        if soft is not None:
            top = np.argsort(-soft[row], kind="stable")[:2]
            card["soft"] = ", ".join(f"{names[k]} {soft[row, k]:.2f}" for k in top)
        if real is not None and nearest is not None:
            places = nearest.place[row][nearest.place[row] >= 0]
            for place, distance in zip(places, nearest.distance[row], strict=False):
                other = real.images[int(place)].cpu().numpy().transpose(1, 2, 0)
                image = data_uri(_shrink(other, is_exact=False))
                card["near"].append(
                    {"row": int(real.rows[place]), "image": image, "distance": distance}
                )
        size += len(card["image"]) + sum(len(near["image"]) for near in card["near"])
        if size > MAX_BYTES:
            break
        shown[row % n_classes].append(card)
    full = min(map(len, shown))
    if full:
        shown = [cards[:full] for cards in shown]
    classes = [
        {"name": name, "cards": cards} for name, cards in zip(names, shown, strict=True) if cards
    ]
    n_shown = sum(len(cards) for cards in shown)
    if n_shown == len(ours):
        return classes, ""
    what = f"the first {full or 1} of {manifest.images_per_class} of each class"
    if len(classes) < n_classes:
        what += f" and the first {len(classes):,} of {n_classes:,} classes"
    return classes, f"To keep the page small, {what} are shown; the folder holds all."


def _shrink(picture: UInt8[ndarray, "h w c"], *, is_exact: bool = True) -> bytes:
    """Give a picture as WebP, scaled down if it is large; exact if it is small and is to be."""
    side = max(picture.shape[:2])
    if side > LARGEST_SIDE:
        flat = picture[..., 0] if picture.shape[-1] == 1 else picture
        small = Image.fromarray(flat)
        small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        picture = np.asarray(small).reshape(*small.size[::-1], -1)
    if picture.shape[-1] == 1:
        picture = np.repeat(picture, 3, axis=-1)  # WebP has colours only
    if is_exact and side <= LARGEST_SIDE:
        return encode(picture, "WEBP", lossless=True, method=4)
    return encode(picture, "WEBP", quality=85, method=4)


def _draw_losses(manifest: CondensedManifest) -> dict[str, Any] | None:
    """Give the curve of the loss; its scale is logarithmic where all are above 0 and far apart."""
    losses = np.array(manifest.losses)
    if len(losses) < 2:
        return None
    is_log = losses.min() > 0 and losses.max() > 10 * losses.min()
    values = np.log(losses) if is_log else losses
    low, high = float(values.min()), float(values.max())
    x = np.linspace(0, WIDTH, len(values))
    y = HEIGHT * (1 - (values - low) / (high - low if high > low else 1.0))
    return {
        "points": " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)),
        "low": f"{losses.min():.4g}",
        "high": f"{losses.max():.4g}",
        "first": f"{losses[0]:.4g}",
        "last": f"{losses[-1]:.4g}",
        "is_log": is_log,
        "width": WIDTH,
        "height": HEIGHT,
    }


def _draw_choices(manifest: CondensedManifest, n_iterations: int) -> dict[str, Any] | None:
    """Give the prefix that learns beside the whole set, from choice to choice, as rectangles."""
    if not manifest.choices:
        return None
    most, done = manifest.images_per_class, max(n_iterations, manifest.choices[-1][0])
    starts = [(0, 1, 0), *map(tuple, manifest.choices)]
    bars = []
    for (begin, chosen, frozen), (end, *_) in pairwise([*starts, (done, 0, 0)]):
        bars.append(
            {
                "x": round(WIDTH * begin / done, 2),
                "width": round(WIDTH * (end - begin) / done, 2),
                "height": round(HEIGHT * chosen / most, 2),
                "frozen": round(HEIGHT * frozen / most, 2),
            }
        )
    return {
        "bars": bars,
        "listed": starts[: MAX_LISTED + 1],
        "n": len(starts),
        "most": most,
        "width": WIDTH,
        "height": HEIGHT,
    }


def draw_sheet(pixels: Float[ndarray, "n c h w"], n_classes: int) -> bytes:
    """Draw the first pictures as one PNG: a line for each class, in their order."""
    ours = to_bytes(pixels)
    lines = min(n_classes, SHEET_CLASSES)
    columns = min(len(ours) // n_classes, SHEET_IMAGES)
    zoom = max(1, SHEET_SIDE // ours.shape[1])
    side, gap = zoom * ours.shape[1], 4
    if side > LARGEST_SIDE:
        side = LARGEST_SIDE
    shape = (lines * (side + gap) + gap, columns * (side + gap) + gap, 3)
    sheet = Image.fromarray(np.full(shape, 255, dtype=np.uint8))
    for line in range(lines):
        for column in range(columns):
            picture = ours[column * n_classes + line]
            flat = picture[..., 0] if picture.shape[-1] == 1 else picture
            tile = Image.fromarray(flat).resize((side, side), 0 if zoom > 1 else 3)
            sheet.paste(tile, (gap + column * (side + gap), gap + line * (side + gap)))
    return encode(np.asarray(sheet), optimize=True)
