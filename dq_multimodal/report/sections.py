"""The sections of the page about the run, its bins and its coverage, as HTML."""

from html import escape
from typing import Any

from dq_multimodal.data.local import is_local, short_name
from dq_multimodal.report.charts import line_chart, normalise, round_ticks
from dq_multimodal.report.collect import Facts
from dq_multimodal.report.rows import clean_name
from dq_multimodal.stages.selection import SCORES

MAX_BIN_LINES = 200

METHODS = {
    "dq": "Dataset Quantization: similar rows were parted into bins, and every bin gave the same "
    "share of its rows.",
    "adq": "Adaptive Dataset Quantization: rows were parted into bins, and bins that matter more "
    "gave more of their rows.",
    "graphcut": "GraphCut: rows were picked one after the other, each the best addition to those "
    "before it.",
    "random": "Random selection: rows were drawn by a seeded hash, whatever they say.",
    "blocks": "Balanced random selection: similar rows were put side by side, and the same share "
    "of every part was drawn.",
    "coverage": "Coverage: each row picked was the one that brought all rows of its class nearest "
    "to a picked row.",
    "ccs": "Coverage-centric selection: rows likely to be labelled wrong went last, and every "
    "level of difficulty gave as many rows as the others.",
    "dual": "DUAL: rows that were hard and uncertain in training were drawn more often.",
}
ADAPTIVE = ("alpha", "importance", "norm")
MARKING = ("difficulty", "noise_ratio", "drop_duplicates", "cap_by", "cap")
OF_BINS = ("draw", "n_bins", "partition", "similarity", *ADAPTIVE)
SETTINGS = ("method", "keep_ratio", "keep_rows", "seed", *MARKING, *OF_BINS)
WHY_NO_EMBEDDINGS = (
    "This needs the embeddings of the rows, and there were none to read: random runs make none, "
    "and repositories on the Hub do not hold them."
)


def section(name: str, title: str, intro: str, body: str) -> str:
    """Wrap a section: a heading, one plain sentence, the rest."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f'<p class="intro">{intro}</p>{body}</section>'
    )


def table(caption: str, head: list[str], lines: list[list[str]], kind: str = "") -> str:
    """Make an accessible table; cells are HTML already, the first of a line is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{line[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def source_name(config: dict[str, Any]) -> str:
    """Name the source without folders of the machine."""
    return clean_name(short_name(config["source"]["name"]), 80)


def title(facts: Facts) -> str:
    """Say in one line what was kept of what."""
    n_rows, n_kept = len(facts.selection), facts.selection.n_kept
    method = facts.config["request"]["method"]
    return f"{source_name(facts.config)}: {n_kept:,} of {n_rows:,} rows kept by {method}"


def format_bytes(size: float) -> str:
    """Give bytes in a unit that fits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:,.0f} bytes"
        size /= 1000
    return f"{size:,.1f} TB"


def summary(facts: Facts) -> str:
    """Say what was kept, how much smaller it is, and how it was chosen."""
    request, sizes = facts.config["request"], facts.manifest.get("bytes", {})
    n_rows, n_kept = len(facts.selection), facts.selection.n_kept
    tiles = [
        (f"{n_kept:,}", f"rows kept of {n_rows:,}"),
        (
            f"{n_rows / max(1, n_kept):.3g}&times;",
            f"fewer rows ({100 * n_kept / n_rows:.4g} % left)",
        ),
    ]
    before, after = sizes.get("source_data"), sizes.get("subset_data")
    if before and after:
        size = f"{format_bytes(before)} → {format_bytes(after)}"
        tiles.append((size, "of data, all source columns, uncompressed"))
    pictures = sizes.get("source_images"), sizes.get("stored_images")
    if all(pictures):
        size = f"{format_bytes(pictures[0])} → {format_bytes(pictures[1])}"
        tiles.append((size, "of image files of the kept rows"))
    shown = "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for value, what in tiles)
    settings = [[escape(name), f"<code>{escape(value)}</code>"] for name, value in _settings(facts)]
    notes = [clean_name(note, 400) for note in facts.manifest.get("notes", [])]
    if facts.n_blank:
        noun = "row has" if facts.n_blank == 1 else "rows have"
        notes.append(
            f"{facts.n_blank:,} {noun} no embedding (zeros): on the map, in coverage and among "
            "near-duplicates they are left out"
        )
    said = "".join(f'<li dir="auto">{escape(note)}</li>' for note in notes)
    body = (
        f'<dl class="tiles">{shown}</dl>'
        f'<div class="strip" aria-hidden="true"><span style="width:{100 * n_kept / n_rows:.3f}%">'
        f"</span></div><p>{METHODS.get(request['method'], escape(request['method']))}</p>"
        f"<div class='pair'>{table('Settings of the run', ['setting', 'value'], settings)}"
        + (f"<div><h3>Notes on odd rows</h3><ul>{said}</ul></div>" if notes else "")
        + "</div>"
    )
    intro = "What was kept, and how it was chosen; the filled part of the bar is the share kept."
    return section("summary", "Summary", intro, body)


def _settings(facts: Facts) -> list[tuple[str, str]]:
    config, request = facts.config, facts.config["request"]
    is_adaptive = request["method"] == "adq"
    found = [("source", source_name(config) + ", split " + clean_name(config["source"]["split"]))]
    for name in SETTINGS:
        is_unused = name in OF_BINS and facts.selection.bin is None
        is_unused |= name in ADAPTIVE and not is_adaptive
        if request.get(name) is not None and not is_unused:
            found.append((name, str(request[name])))
    column = config.get("label_column")
    if column:
        found.append(("strata", f"{clean_name(column)}, {len(facts.labels):,} of them"))
    elif facts.labels:
        found.append(("parts", f"{len(facts.labels):,}"))
    model = {
        key: clean_name(short_name(value) if isinstance(value, str) and is_local(value) else value)
        for key, value in (config.get("embedding") or {}).items()
        if isinstance(value, str | int | float) and key != "sha256_of_float32"
    }
    if model:
        found.append(("embedding", ", ".join(f"{key} {value}" for key, value in model.items())))
    rows = config.get("rows")
    if rows:
        what = rows.get("template") or ", ".join(rows["columns"])
        found.append((f"embedded {rows['modality']}", clean_name(what, 200)))
    return found


def bins(facts: Facts) -> str:
    """Show scores and kept rows by bin."""
    selection = facts.selection
    if selection.bin is None:
        intro = "This method makes no bins."
        return section("bins", "Rows kept by bin", intro, "")
    n_bins = selection.n_bins
    sizes = [int((selection.bin == b).sum()) for b in range(n_bins)]
    kept = [int((selection.kept & (selection.bin == b)).sum()) for b in range(n_bins)]
    scaled = {name: normalise(values) for name, values in facts.scores.items()}
    widest = max(sizes, default=1) or 1
    lines = []
    for b in range(min(n_bins, MAX_BIN_LINES)):
        share = 100 * kept[b] / max(1, sizes[b])
        bar = (
            f'<span class="bar" aria-hidden="true" style="width:{100 * sizes[b] / widest:.2f}%">'
            f'<span class="b{b}" style="width:{share:.2f}%"></span></span>'
        )
        cells = [str(b), bar, f"{sizes[b]:,}", f"{kept[b]:,}", f"{share:.1f}&nbsp;%"]
        for name in scaled:
            raw, to_one = facts.scores[name][b], scaled[name][b]
            is_known = raw is not None and to_one is not None
            cells.append(f"{raw:.4g} <small>({to_one:.2f})</small>" if is_known else "")
        lines.append(cells)
    head = ["bin", '<span class="hidden">bar: </span>share kept', "rows", "kept", "%", *scaled]
    body = ""
    if scaled:
        series = [
            (name, [(float(b), y) for b, y in enumerate(scaled[name]) if y is not None])
            for name in SCORES
        ]
        step = max(1, -(-n_bins // 10))
        body += line_chart(
            series,
            title="Representativeness, diversity and importance of every bin, scaled to 0 to 1; "
            "the table below has the numbers",
            x_name="bin",
            y_name="score, scaled",
            x_range=(0, max(1, n_bins - 1)),
            x_ticks=[float(b) for b in range(0, n_bins, step)],
            has_marks=True,
        )
        body += (
            "<p>Each score is scaled so that its least bin is 0 and its largest 1; the numbers as "
            "computed are in the table, the scaled ones in brackets.</p>"
        )
    else:
        body += "<p>This method scores no bins, so only counts are shown.</p>"
    what = "Scores, rows and kept rows by bin" if scaled else "Rows and kept rows by bin"
    body += table(what, head, lines, "numbers")
    if n_bins > MAX_BIN_LINES:
        body += f"<p>The first {MAX_BIN_LINES} of {n_bins:,} bins are listed.</p>"
    intro = (
        "Bins are groups of rows, numbered as they were picked: bin 0 lies in the middle of the "
        "data, the last bin at its edge. Each bar is as long as its bin is large, and its filled "
        "part was kept."
    )
    return section("bins", "Rows kept by bin", intro, body)


def coverage(facts: Facts) -> str:
    """Show how near kept rows are to all rows, beside random selection."""
    intro = (
        "How far is every row from the nearest row that was kept? Nearer is better: the line that "
        "rises first covers the data better."
    )
    found, request = facts.coverage, facts.config["request"]
    if found is None:
        return section("coverage", "Coverage", intro, f"<p>{WHY_NO_EMBEDDINGS}</p>")
    method = request["method"]
    other = "other random draws" if method == "random" else "random"
    is_cosine = request["similarity"] == "cosine"
    unit = "1 - cosine similarity" if is_cosine else "euclidean distance"
    top = max(found.kept["max"], found.random["max"][0]) or 1.0
    chart = line_chart(
        [
            (name, [(x, y) for x, y in zip(curve, found.shares, strict=True)])
            for name, curve in ((method, found.kept_curve), (other, found.random_curve))
        ],
        title="Share of the rows that have a kept row within a distance; the table has the numbers",
        x_name=f"distance to the nearest kept row ({unit})",
        y_name="share of the rows",
        x_range=(0.0, top),
        x_ticks=round_ticks(top),
    )
    names = {"mean": "mean", "median": "median", "p95": "95th percentile", "max": "largest"}
    lines = [
        [name, f"{found.kept[key]:.4f}", "{:.4f} ({:.4f} to {:.4f})".format(*found.random[key])]
        for key, name in names.items()
    ]
    asked = (
        f"a seeded sample of {found.n_asked:,} of {found.n_readable:,} rows"
        if found.is_sampled
        else f"all {found.n_readable:,} rows"
    )
    body = (
        f'<p class="verdict">{escape(found.verdict)}</p><div class="pair">{chart}<div>'
        + table(f"Distance to the nearest kept row ({unit})", ["", method, other], lines, "numbers")
        + f"<p>Measured on {asked}; kept rows count, at distance 0. Beside it "
        f"{found.n_draws} random draws of the same size: their mean, and in brackets the interval "
        "that holds 95 % of them.</p></div></div>"
    )
    return section("coverage", "Coverage", intro, body)
