"""The section of the page about a target: what was picked for each of its rows."""

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from dq_multimodal.config import InputError, check_type
from dq_multimodal.files import read_text
from dq_multimodal.report.cards import data_uri
from dq_multimodal.report.facts import Facts
from dq_multimodal.report.rows import clean, cut_fields, shorten
from dq_multimodal.report.sections import section, table
from dq_multimodal.stages.selection import SELECTION_FILE, read_table
from dq_multimodal.stages.targeting import FOLDER, PICKS

MOST_BYTES = 50_000_000
MAX_SHOWN = 200
N_SHOWN = 3
CHARACTERS, PICK_CHARACTERS = 240, 160


class TargetDict(TypedDict):
    """What picks.json holds of a target row."""

    text: str
    picks: list[list[float]]


class PicksDict(TypedDict):
    """What picks.json holds."""

    targets: list[TargetDict]
    n_leaks: int


@dataclass(frozen=True)
class TargetRow:
    """A target row and the rows that were picked for it.

    Attributes:
        text: Its text, cut; empty for an image.
        n_kept: Kept rows that were picked for it.
        picks: The nearest of them, row number and cosine.
    """

    text: str
    n_kept: int
    picks: list[tuple[int, float]]


def describe_picks(folder: Path, share: float) -> tuple[list[TargetRow], int] | None:
    """Give what was picked for each target row, and how many rows leak.

    Of K kept rows the first ceil(share * K) in the targeted order were picked for the target; the
    others are there by the untargeted order.

    Args:
        folder: The run folder.
        share: Share of a subset that is picked for the target.

    Returns:
        None where the run had no target, or its picks are not there.

    Raises:
        InputError: If picks.json is not what a run writes.
    """
    path = folder / FOLDER / PICKS
    try:
        found = json.loads(read_text(path, MOST_BYTES))
        check_type(PICKS, found, PicksDict)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not what a run writes: {error}") from error
    selection = read_table(folder, SELECTION_FILE)
    if "target_rank" not in selection.column_names:
        return None
    rank, row = (
        selection[name].combine_chunks().fill_null(-1).to_numpy()
        for name in ("target_rank", "target_row")
    )
    is_picked = picked_rows(rank, selection["kept"].to_numpy(), share)
    counts = np.bincount(row[is_picked], minlength=len(found["targets"]))
    rows = []
    for number, target in enumerate(found["targets"]):
        near = [
            (int(k), float(cosine))
            for k, cosine in (pick for pick in target["picks"] if len(pick) == 2)
            if 0 <= k < len(is_picked) and is_picked[int(k)]
        ]
        rows.append(TargetRow(target["text"], int(counts[number]), near[:N_SHOWN]))
    return rows, found["n_leaks"]


def picked_rows(
    rank: Int[ndarray, " n"], kept: Bool[ndarray, " n"], share: float
) -> Bool[ndarray, " n"]:
    """Say which kept rows are there for the target: the first by rank, a share of all kept rows."""
    n_first = math.ceil(share * int(kept.sum()) - 1e-9)  # as core.target.mix_orders counts
    rows = np.flatnonzero(kept & (rank >= 0))
    first = rows[np.argsort(rank[rows], kind="stable")][:n_first]
    is_picked = np.zeros(len(rank), dtype=bool)
    is_picked[first] = True
    return is_picked


def target_section(facts: Facts, folder: Path) -> str:
    """Show every target row with the kept rows nearest to it; empty where there is no target."""
    share = facts.config["request"].get("target_share")
    found = None if share is None else describe_picks(folder, share)
    if found is None:
        return ""
    rows, n_leaks = found
    shown = rows[:MAX_SHOWN]
    numbers = sorted({row for target in shown for row, _ in target.picks})
    is_image = facts.reader.kind == "image"
    texts = facts.reader.texts(numbers) if facts.reader.kind == "text" else {}
    pictures = facts.reader.pictures(numbers) if is_image else {}

    def show(row: int, cosine: float) -> str:
        head = f"<small>row {row:,}, cosine {cosine:.3f}</small>"
        picture: Any = pictures.get(row)
        if picture is not None:
            return f'{head}<br><img alt="Picture of row {row}" src="{data_uri(picture.small)}">'
        text = " · ".join(part for part in cut_fields(texts.get(row, []), PICK_CHARACTERS) if part)
        return f'{head}<br><span dir="auto">{escape(text)}</span>'

    lines = []
    for number, target in enumerate(shown):
        text = shorten(clean(target.text), CHARACTERS)
        near = [show(row, cosine) for row, cosine in target.picks]
        near += [""] * (N_SHOWN - len(near))
        lines.append(
            [str(number), f'<span dir="auto">{escape(text)}</span>', f"{target.n_kept:,}", *near]
        )
    head = ["target row", "text", "kept for it", "nearest", "second", "third"]
    body = table("Target rows and the rows that were kept for them", head, lines)
    if len(shown) < len(rows):
        body += f"<p>The first {len(shown)} of {len(rows):,} target rows are listed.</p>"
    leaks = (
        f"{n_leaks:,} rows of the source equal a target row or are very near one: do not test on "
        "such target rows."
        if n_leaks
        else "No row of the source equals a target row or is very near one, as far as compared."
    )
    intro = (
        "In turn, every row of the target took its next nearest row; the nearest of those that "
        "were kept are shown."
    )
    return section("target", "Picked for the target", intro, f"<p>{leaks}</p>{body}")
