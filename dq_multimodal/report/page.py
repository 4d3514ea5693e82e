"""One page that holds everything: no network, no script but its own, data as data."""

import base64
import hashlib
import json
from importlib.metadata import version
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dq_multimodal import __version__
from dq_multimodal.card import list_settings
from dq_multimodal.config import format_bytes
from dq_multimodal.data.local import short_name
from dq_multimodal.files import count
from dq_multimodal.manifest import Config
from dq_multimodal.report.collect import Facts, group_sample
from dq_multimodal.report.compare import SAME_PICTURE, TEXT_THRESHOLD, Coverage, Groups
from dq_multimodal.report.decisions import KINDS, Decisions
from dq_multimodal.report.figures import bin_colours, normalise
from dq_multimodal.report.rows import clean, clean_name, cut_fields, shorten

TEXT_LIMITS = (400, 250, 150, 80, 40)
NEAR_SHARE = 0.5
"""Rows shown only as the nearest kept row of another get half of the characters."""
MAX_TEXT_BYTES = 5_000_000
MAX_PICTURE_BYTES = 5_500_000
MAX_LABELS = 100
"""With more labels than this there is no choice among them."""
MAX_GROUPS = 20
N_SHADES = 32
"""Colours for the length of a row."""
MEASURES = {"mean": "mean", "median": "median", "p95": "95th percentile", "max": "largest"}


def make_page(facts: Facts, has_figures: bool) -> str:
    """Give the text of report.html.

    Row texts and names are data: the templates escape them, or they go into one JSON element
    that the script puts on the page as text. The policy of the page runs its own script by hash
    and nothing else, and lets nothing be fetched.
    """
    environment = open_templates()
    names = facts.reader.column_names

    def named_fields(fields: list[str], limit: int) -> list[tuple[str, str]]:
        shown = names if len(fields) > 1 else [""] * len(fields)
        pairs = zip(shown, cut_fields(fields, limit), strict=False)
        return [(name, text) for name, text in pairs if text]

    environment.filters["named_fields"] = named_fields
    parts = [read_part(environment, name) for name in ("page.js", "map.js")]
    script = "(function () {\n" + "".join(parts) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rows, cut = _rows_as_data(facts)
    document = _map_as_data(facts) | rows
    packages = ["numpy", "scikit-learn"] + (["matplotlib"] if has_figures else [])
    n_rows, n_kept = facts.selection.n_rows, facts.selection.n_kept
    request, source = facts.config.request, _source_name(facts.config)
    return environment.get_template("page.html").render(
        facts=facts,
        request=request,
        title=f"{source}: {n_kept:,} of {count(n_rows, 'row')} kept by {request.method}",
        of_sample=" of the sample" if facts.selection.is_sample else "",
        source=f"{source} (split {clean_name(facts.config.source.split)})",
        script_hash=f"sha256-{digest}",
        style=Markup(read_part(environment, "page.css")),
        script=Markup(script),
        colours=document["colours"],
        data=Markup(as_json(document)),
        cut=cut,
        versions=", ".join(
            [f"dq-multimodal {__version__}", *(f"{name} {version(name)}" for name in packages)]
        ),
        has_figures=has_figures,
        max_labels=MAX_LABELS,
        unit="1 - cosine similarity" if request.similarity == "cosine" else "euclidean distance",
        decided=_decided(facts),
        notes=[clean_name(note, 400) for note in facts.manifest.notes],
        settings=_settings(facts),
        bins=_bins(facts),
        strips=[] if facts.coverage is None else _strips(facts.coverage),
        groups=_groups(facts, facts.groups),
        other_words=_groups(facts, facts.other_words),
        same_picture=SAME_PICTURE,
        other_text=TEXT_THRESHOLD,
    )


def open_templates() -> Environment:
    """Give the templates of pages, which escape what they are given, with their filters."""
    environment = Environment(
        loader=PackageLoader("dq_multimodal", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": lambda value: f"{value:,}",
        "percent": lambda share, digits=3: f"{100 * share:.{digits}g} %",
        "count": count,
        "all_rows": lambda n: "the one row" if n == 1 else f"all {n:,} rows",
        "bytes": format_bytes,
        "data_uri": data_uri,
        "clean": clean,
        "shorten": shorten,
    }
    return environment


def read_part(environment: Environment, name: str) -> str:
    """Give the text of a file beside the templates."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def as_json(document: Any) -> str:
    """Give JSON that may stand inside a script element: nothing in it looks like markup."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def data_uri(picture: bytes) -> str:
    """Give a WebP file as an address that holds it."""
    return "data:image/webp;base64," + base64.b64encode(picture).decode()


def _source_name(config: Config) -> str:
    """Name the source without folders of the machine."""
    return clean_name(short_name(config.source.name), 80)


def _decided(facts: Facts) -> list[dict[str, Any]]:
    """Count what decided of kept rows and of those left out, the most frequent first."""
    kinds, kept = facts.decisions.kind, facts.selection.kept
    ours, others = (np.bincount(kinds[rows], minlength=len(KINDS)) for rows in (kept, ~kept))
    return [
        {"kind": KINDS[k], "n_kept": int(ours[k]), "n_left_out": int(others[k])}
        for k in np.argsort(-(ours + others), kind="stable")
        if ours[k] or others[k]
    ]


def _settings(facts: Facts) -> list[tuple[str, str]]:
    """Give the settings that counted, by name."""
    config = facts.config
    found = {"source": f"{_source_name(config)}, split {clean_name(config.source.split)}"}
    found |= list_settings(config)
    if facts.labels:
        found["strata" if config.label_column or config.source.splits else "parts"] = (
            f"{len(facts.labels):,}"
        )
    return [(clean_name(name), clean_name(value, 200)) for name, value in found.items()]


def _bins(facts: Facts) -> list[dict[str, Any]]:
    """Give rows, kept rows and scores of every bin, as numbers and as widths of bars."""
    selection = facts.selection
    if selection.bin is None:
        return []
    sizes, kept = (counts.tolist() for counts in selection.count_bins())
    scores = [zip(v, normalise(v), strict=True) for v in facts.scores.values()]
    by_bin: list[Any] = list(zip(*scores, strict=True)) or [()] * len(sizes)
    return [
        {
            "size": size,
            "n_kept": n_kept,
            "share": 100 * n_kept / max(1, size),
            "width": round(100 * size / max(sizes), 2),
            "scores": scores,
        }
        for size, n_kept, scores in zip(sizes, kept, by_bin, strict=True)
    ]


def _strips(found: Coverage) -> list[dict[str, Any]]:
    """Give each measure of coverage beside the interval of random draws, drawn to scale."""
    strips = []
    for key, name in MEASURES.items():
        ours, (mean, low, high) = found.kept[key], found.random[key]
        numbers = np.array([ours, mean, low, high])
        width = 1.5 * float(np.ptp(numbers)) or 1.0
        middle = (numbers.min() + numbers.max()) / 2
        places = (50 + 100 * (numbers - middle) / width).round(1).tolist()
        strip = {"name": name, "numbers": [f"{x:.4f}" for x in numbers], "places": places}
        strip["verdict"] = "better" if ours < low else "worse" if ours > high else "no different"
        strips.append(strip)
    return strips


def _groups(facts: Facts, found: Groups | None) -> list[dict[str, Any]]:
    """Give size, kept rows and some rows of every group of near-duplicates."""
    kept = facts.selection.kept
    return [
        {
            "size": len(members),
            "n_kept": int(kept[members].sum()),
            "shown": group_sample(members, kept) if number < MAX_GROUPS else [],
        }
        for number, members in enumerate(found.members if found else [])
    ]


def _map_as_data(facts: Facts) -> dict[str, Any]:
    """Give the points in columns, and what the script needs to speak of them."""
    selection, shown, decisions = facts.selection, facts.map, facts.decisions
    n_bins = selection.n_bins
    document: dict[str, Any] = {
        "columns": facts.reader.column_names,
        "labels": [],
        "nBins": n_bins,
        "isCosine": facts.config.request.similarity == "cosine",
        "lengthName": facts.length_name,
        "colours": {
            name: {"bins": bin_colours(n_bins, is_dark), "shades": bin_colours(N_SHADES, is_dark)}
            for name, is_dark in (("light", False), ("dark", True))
        },
        "points": None,
    }
    if shown is None:
        return document
    rows = shown.rows
    strata, stratum = np.unique(selection.stratum[rows], return_inverse=True)
    if facts.labels and len(facts.labels) <= MAX_LABELS:
        document["labels"], stratum = facts.labels, selection.stratum[rows]
    elif facts.labels:
        document["labels"] = [facts.labels[code] for code in strata]
    groups, group = np.unique(decisions.group[rows], return_inverse=True)
    n_rows, n_kept = decisions.n_rows[groups], decisions.n_kept[groups]
    document["groups"] = np.stack([n_rows, n_kept], axis=1).tolist()
    sentences: dict[str, int] = {}
    why = [sentences.setdefault(_why(decisions, row), len(sentences)) for row in rows.tolist()]
    document["sentences"] = list(sentences)
    likeness = 1 - shown.near_distance if document["isCosine"] else shown.near_distance
    document["points"] = {
        "row": selection.row[rows].tolist(),
        "x": np.rint(shown.places[:, 0] * 10_000).astype(int).tolist(),
        "y": np.rint(shown.places[:, 1] * 10_000).astype(int).tolist(),
        "kept": selection.kept[rows].astype(int).tolist(),
        "bin": None if selection.bin is None else selection.bin[rows].tolist(),
        "stratum": stratum.reshape(-1).tolist() if facts.labels else None,
        "length": shown.length.tolist() if facts.length_name else None,
        "near": np.where(shown.near < 0, -1, selection.row[shown.near]).tolist(),
        "similarity": [_short(value) for value in likeness],
        "place": decisions.place[rows].tolist(),
        "group": group.reshape(-1).tolist(),
        "why": why,
    }
    return document


def _why(decisions: Decisions, row: int) -> str:
    """Give what decided of a row; {place}, {n_rows} and {n_kept} are filled in by the script."""
    sentence = decisions.template(row)
    if "{place}" not in sentence:
        return decisions.sentence(row)
    name = decisions.stratum_name
    return sentence.replace("{of_stratum}", f" of its {name}" if name else "")


def _short(value: float) -> float | None:
    """Give four digits; None for what is no number."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _rows_as_data(facts: Facts) -> tuple[dict[str, Any], str]:
    """Give pictures and texts of the rows of the map by row number, and say what was cut.

    A picture is its address, empty where there is none, and what is said of it.
    """
    found: dict[str, Any] = {"pictures": None, "texts": None}
    if facts.map is None:
        return found, ""
    ours = facts.map.rows.tolist()
    near = facts.map.near[facts.map.near >= 0]
    others = np.setdiff1d(near, facts.map.rows).tolist()
    numbers, said = facts.selection.row.tolist(), []
    if facts.reader.has_pictures:
        size, n_left_out, found["pictures"] = 0, 0, {}
        for row in [*ours, *others]:
            picture = facts.pictures[row]
            address = data_uri(picture.small) if picture.small else ""
            size += len(address)
            if size > MAX_PICTURE_BYTES:
                n_left_out += 1
            else:
                found["pictures"][numbers[row]] = [address, picture.note]
        rest = f"; {n_left_out:,} found no room in this file" if n_left_out else ""
        said.append(f"Pictures are scaled down to 48 px on the map, 96 px below it{rest}.")
    if facts.reader.has_texts:
        most_bytes = MAX_TEXT_BYTES // (1 + facts.reader.has_pictures)
        for limit in TEXT_LIMITS:
            half = int(limit * NEAR_SHARE)
            sizes = [*((row, limit) for row in ours), *((row, half) for row in others)]
            texts = {numbers[row]: cut_fields(facts.texts[row], size) for row, size in sizes}
            if len(as_json(texts).encode()) <= most_bytes:
                break
        found["texts"] = texts
        said.append(f"Texts are cut at {limit} characters ({half} for the nearest kept row).")
    return found, " ".join(said)
