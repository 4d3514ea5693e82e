"""One page that holds everything: no network, no script but its own, data as data."""

import base64
import hashlib
import json
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from dq_multimodal import __version__
from dq_multimodal.report import cards, sections
from dq_multimodal.report.charts import bin_colours
from dq_multimodal.report.collect import Facts
from dq_multimodal.report.rows import cut_fields

HERE = Path(__file__).parent
SCRIPTS = ("page.js", "map.js")
TEXT_LIMITS = (400, 250, 150, 80, 40)
NEAR_SHARE = 0.5
"""Rows shown only as the nearest kept row of another get half of the characters."""
MAX_TEXT_BYTES = 5_000_000
MAX_PICTURE_BYTES = 5_500_000
LINKS = {
    "summary": "Summary",
    "map": "Map",
    "target": "Target",
    "bins": "Bins",
    "coverage": "Coverage",
    "duplicates": "Near-duplicates",
    "gallery": "Rows",
}


def make_page(facts: Facts, has_figures: bool, target: str = "") -> str:
    """Write report.html.

    Row texts and names are data: they go through `html.escape`, or into one JSON element that
    the script puts on the page as text. The policy of the page runs its own script by hash and
    nothing else, and lets nothing be fetched. `target` is the section about a target, if any.
    """
    style = _read("page.css") + cards.bin_styles(facts.selection.n_bins)
    script = "(function () {\n" + "".join(_read(name) for name in SCRIPTS) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown, limit = _rows_as_data(facts)
    links = {name: LINKS[name] for name in LINKS if target or name != "target"}
    parts = [
        sections.summary(facts),
        cards.map_section(facts),
        target,
        sections.bins(facts),
        sections.coverage(facts),
        cards.near_duplicates(facts),
        cards.gallery(facts),
    ]
    heading = escape(sections.title(facts))
    return Template(_read("page.html")).substitute(
        script_hash=f"sha256-{digest}",
        title=heading,
        heading=heading,
        style=style,
        links="".join(f'<li><a href="#{k}">{v}</a></li>' for k, v in links.items()),
        sections="\n".join(parts),
        footer=_footer(facts, has_figures, limit),
        data=as_json({**_map_as_data(facts), "rows": shown}),
        script=script,
    )


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def as_json(document: Any) -> str:
    """Give JSON that may stand inside a script element: nothing in it looks like markup."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _map_as_data(facts: Facts) -> dict[str, Any]:
    """Give the points in columns."""
    selection, shown = facts.selection, facts.map
    request = facts.config["request"]
    n_bins = selection.n_bins
    document: dict[str, Any] = {
        "kind": facts.reader.kind,
        "columns": facts.reader.column_names,
        "labels": [],
        "nRows": len(selection),
        "nKept": selection.n_kept,
        "nBins": n_bins,
        "how": sections.METHODS.get(request["method"], ""),
        "isCosine": request["similarity"] == "cosine",
        "light": bin_colours(n_bins),
        "dark": bin_colours(n_bins, is_dark=True),
        "points": None,
    }
    if shown is None:
        return document
    rows = shown.rows
    strata, stratum = np.unique(selection.stratum[rows], return_inverse=True)
    if facts.labels and len(facts.labels) <= cards.MAX_LABEL_FILTERS:
        document["labels"], stratum = facts.labels, selection.stratum[rows]
    elif facts.labels:
        document["labels"] = [facts.labels[code] for code in strata]
    likeness = 1 - shown.near_distance if document["isCosine"] else shown.near_distance
    points: dict[str, Any] = {
        "row": rows.tolist(),
        "x": np.rint(shown.places[:, 0] * 10_000).astype(int).tolist(),
        "y": np.rint(shown.places[:, 1] * 10_000).astype(int).tolist(),
        "kept": selection.kept[rows].astype(int).tolist(),
        "order": selection.order[rows].tolist(),
        "stratum": stratum.tolist(),
        "near": shown.near.tolist(),
        "similarity": [_short(value) for value in likeness],
        "bin": None,
    }
    if selection.bin is not None and selection.rank is not None and selection.gain is not None:
        points["bin"] = selection.bin[rows].tolist()
        points["rank"] = selection.rank[rows].tolist()
        points["gain"] = [_short(value) for value in selection.gain[rows]]
    return document | {"points": points}


def _short(value: float) -> float | None:
    """Give four digits; None for what is no number."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _rows_as_data(facts: Facts) -> tuple[dict[int, Any], str]:
    """Give text or picture of every row of the map, within a size, and say what was cut."""
    if facts.map is None:
        return {}, ""
    near = facts.map.near[facts.map.near >= 0]
    ours = facts.map.rows.tolist()
    others = np.setdiff1d(near, facts.map.rows).tolist()
    if facts.reader.kind == "text":
        for limit in TEXT_LIMITS:
            found = {row: cut_fields(facts.texts[row], limit) for row in ours}
            half = int(limit * NEAR_SHARE)
            found |= {row: cut_fields(facts.texts[row], half) for row in others}
            if len(as_json(found).encode()) <= MAX_TEXT_BYTES:
                break
        return found, f"Texts are cut at {limit} characters ({half} for the nearest kept row)."
    if facts.reader.kind == "image":
        pictures, size, n_left_out = {}, 0, 0
        for row in [*ours, *others]:
            picture = facts.pictures[row]
            address = "" if picture is None else cards.data_uri(picture.small)
            size += len(address)
            if size > MAX_PICTURE_BYTES:
                n_left_out += 1
            else:
                pictures[row] = address
        rest = f"; {n_left_out:,} found no room in this file" if n_left_out else ""
        return pictures, f"Pictures are scaled down to 48 px on the map, 96 px below it{rest}."
    return {}, ""


def _footer(facts: Facts, has_figures: bool, limit: str) -> str:
    packages = ["numpy", "scikit-learn"] + (["matplotlib"] if has_figures else [])
    made = ", ".join(f"{name} {version(name)}" for name in packages)
    figures = (
        "The figures folder holds map, bins and coverage as PNG."
        if has_figures
        else "No PNG figures were written, because matplotlib is not installed "
        "(<code>pip install matplotlib</code>)."
    )
    no_rows = (
        "<p>The source could not be read, so rows are shown by number only.</p>"
        if facts.reader.kind == "none"
        else ""
    )
    atlas = ""
    if facts.map is not None:
        shown = {"text": " --text text", "image": " --image image", "none": ""}[facts.reader.kind]
        atlas = (
            "<p>The points of the map are in <code>map.parquet</code>, which Embedding Atlas "
            "opens: <code>embedding-atlas map.parquet --x x --y y --neighbors neighbors"
            f"{shown}</code>.</p>"
        )
    return (
        f"{no_rows}<p>{limit} {figures}</p>{atlas}"
        f"<p>Made by dq-multimodal {__version__} with {made}. To write it again: "
        "<code>dq-multimodal report RUN</code>, with the folder of the run.</p>"
    )
