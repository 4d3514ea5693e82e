"""The sections of the page that show rows: map, near-duplicates, gallery; and rows as cards."""

import base64
from html import escape

from dq_multimodal.report.charts import bin_colours
from dq_multimodal.report.collect import MAX_GALLERY_BINS, MAX_GROUPS, Facts, group_sample
from dq_multimodal.report.rows import cut_fields
from dq_multimodal.report.sections import WHY_NO_EMBEDDINGS, section, table

CARD_CHARACTERS = 280
MAX_LABEL_FILTERS = 100


def data_uri(picture: bytes) -> str:
    """Give a WebP file as an address that holds it."""
    return "data:image/webp;base64," + base64.b64encode(picture).decode()


def card(facts: Facts, row: int) -> str:
    """Show one row: its number, whether it was kept, and its text or picture."""
    selection = facts.selection
    is_kept = bool(selection.kept[row])
    label = facts.labels[selection.stratum[row]] if facts.labels else ""
    head = f"row {row:,}" + (f' · <bdi dir="auto">{escape(label)}</bdi>' if label else "")
    state = "kept" if is_kept else "left out"
    body = ""
    if row in facts.pictures:
        picture = facts.pictures[row]
        if picture is None:
            body = '<p class="no-picture">no picture that can be read</p>'
        else:
            alt = escape(f"Picture of row {row}" + (f", {label}" if label else ""))
            kind = ' class="tiny"' if picture.is_tiny else ""
            body = f'<img{kind} alt="{alt}" src="{data_uri(picture.large)}">'
    elif row in facts.texts:
        fields = cut_fields(facts.texts[row], CARD_CHARACTERS)
        names = facts.reader.column_names if len(fields) > 1 else [""] * len(fields)
        body = "".join(
            '<p class="field">'
            + (f'<span class="name" dir="auto">{escape(name)}</span>' if name else "")
            + f'<span class="text" dir="auto">{escape(text)}</span></p>'
            for name, text in zip(names, fields, strict=False)
            if text
        )
        body = body or '<p class="field quiet">(no text)</p>'
    return (
        f'<li class="card {"is-kept" if is_kept else "is-out"}"><p class="head">{head} '
        f'<span class="state">{state}</span></p>{body}</li>'
    )


def _cards(facts: Facts, rows: list[int]) -> str:
    kind = "cards pictures" if facts.reader.kind == "image" else "cards"
    return f'<ul class="{kind}">{"".join(card(facts, row) for row in rows)}</ul>'


def map_section(facts: Facts) -> str:
    """Make the frame of the map, which the script of the page fills."""
    intro = (
        "Every point is a row, and rows that mean much the same lie near each other. Ringed "
        "points were kept. Point at one, tap it, or use the arrow keys to read it."
    )
    if facts.map is None:
        return section("map", "Map of the rows", intro, f"<p>{WHY_NO_EMBEDDINGS}</p>")
    n_points, n_readable = len(facts.map.rows), len(facts.selection) - facts.n_blank
    n_bins = facts.selection.n_bins
    sampled = (
        f"A seeded sample of {n_points:,} of {n_readable:,} rows is drawn, kept and left-out ones "
        "in the proportion of the whole. "
        if n_points < n_readable
        else f"All {n_points:,} rows are drawn. "
    )
    controls = ""
    if n_bins > 1:
        options = "".join(f'<option value="{b}">bin {b}</option>' for b in range(n_bins))
        controls += (
            '<label>Bin <select id="filter-bin"><option value="">all bins</option>'
            f"{options}</select></label>"
        )
    if 1 < len(facts.labels) <= MAX_LABEL_FILTERS:
        options = "".join(
            f'<option value="{code}" dir="auto">{escape(label)}</option>'
            for code, label in enumerate(facts.labels)
        )
        controls += (
            '<label>Label <select id="filter-label"><option value="">all labels</option>'
            f"{options}</select></label>"
        )
    controls += '<label><input type="checkbox" id="filter-kept"> Only kept rows</label>'
    body = f"""<p>{sampled}Distances between groups far apart say little.</p>
<noscript><p>The map needs scripts, which this viewer does not run; the rest does
not.</p></noscript>
<div class="controls" role="group" aria-label="Which points to show">{controls}
<span id="map-count" role="status"></span></div>
<div class="map-grid">
<div class="map-frame"><div id="map-box" role="application" tabindex="0"
 aria-roledescription="map of points" aria-label="Map of {n_points:,} rows"
 aria-describedby="map-help"><canvas id="map-canvas" aria-hidden="true"></canvas></div>
<div class="zoom" role="group" aria-label="Zoom"><button type="button" id="zoom-in"
 aria-label="Zoom in">+</button><button type="button" id="zoom-out"
 aria-label="Zoom out">&minus;</button><button type="button" id="zoom-all">All</button></div></div>
<div id="point" class="point" role="region" aria-label="The chosen row" tabindex="0">
<p class="quiet">Nothing chosen yet.</p></div>
<div class="map-notes">{_legend(n_bins)}
<p class="quiet">Click a point to hold it, and an empty place to let go; drag to move a map that
is zoomed. A dashed line leads to the nearest kept row where that is drawn.</p>
<p id="map-help" class="quiet">Keys on the map: arrows go to the next point that way, + and
&minus; zoom, 0 shows all, Home goes to the first row, Enter jumps to the nearest kept row.</p>
</div></div>
<p id="map-live" class="hidden" aria-live="polite"></p>
<details id="points"><summary>The points as a table</summary>
<div id="points-table"></div></details>"""
    return section("map", "Map of the rows", intro, body)


def _legend(n_bins: int) -> str:
    shapes = (
        '<li><svg class="dot" viewBox="0 0 14 14" aria-hidden="true"><circle class="ring" cx="7" '
        'cy="7" r="4.5"/></svg>kept</li><li><svg class="dot" viewBox="0 0 14 14" '
        'aria-hidden="true"><circle class="plain" cx="7" cy="7" r="3"/></svg>left out</li>'
    )
    if n_bins > 1:
        names = range(n_bins) if n_bins <= 12 else (0, n_bins // 2, n_bins - 1)
        swatches = "".join(f'<li><span class="swatch b{b}"></span>bin {b}</li>' for b in names)
        shapes += swatches
    return f'<ul class="legend">{shapes}</ul>'


def bin_styles(n_bins: int) -> str:
    """Give the CSS of the colour of every bin."""
    shown = range(n_bins)
    light, dark = bin_colours(n_bins), bin_colours(n_bins, is_dark=True)
    rules = "".join(f".b{b}{{background:{light[b]}}}" for b in shown)
    night = "".join(f".b{b}{{background:{dark[b]}}}" for b in shown)
    return f"{rules}@media screen and (prefers-color-scheme:dark){{{night}}}"


def near_duplicates(facts: Facts) -> str:
    """Show groups of rows that nearly say the same."""
    found = facts.groups
    intro = (
        "Rows that say nearly the same, chained into groups. A smaller training set should not "
        "spend many of its rows on one of them."
    )
    if found is None:
        return section("duplicates", "Near-duplicates", intro, f"<p>{WHY_NO_EMBEDDINGS}</p>")
    kept = facts.selection.kept
    n_rows = sum(len(members) for members in found.members)
    counts = [int(kept[members].sum()) for members in found.members]
    searched = (
        f"a seeded sample of {found.n_searched:,} of {found.n_readable:,} rows"
        if found.n_searched < found.n_readable
        else f"all {found.n_searched:,} rows"
    )
    how = (
        f"<p>Two rows count as near-duplicates from a cosine similarity of {found.threshold:g} on; "
        f"all pairs of {searched} were compared. The threshold fits some encoders better than "
        "others: look at the groups before you trust the counts.</p>"
    )
    if not found.members:
        return section("duplicates", "Near-duplicates", intro, how + "<p>There are none.</p>")
    verdict = (
        f"{len(counts):,} groups hold {n_rows:,} rows "
        f"({100 * n_rows / max(1, found.n_searched):.3g}&nbsp;% of those compared). "
        f"{sum(counts):,} of them were kept, {100 * sum(counts) / n_rows:.3g}&nbsp;%; of all rows "
        f"it is {100 * kept.mean():.3g}&nbsp;%."
    )
    lines = [
        ["none of its rows", f"{sum(c == 0 for c in counts):,}"],
        ["one", f"{sum(c == 1 for c in counts):,}"],
        ["several", f"{sum(c > 1 for c in counts):,}"],
    ]
    body = f'<p class="verdict">{verdict}</p>' + table(
        "What was kept of the groups", ["kept of a group", "groups"], lines, "numbers"
    )
    body += f"<h3>The {min(MAX_GROUPS, len(counts)):,} largest groups</h3>"
    for number, members in enumerate(found.members[:MAX_GROUPS]):
        shown = group_sample(members, kept)
        rest = len(members) - len(shown)
        more = f'<p class="quiet">and {rest:,} more</p>' if rest else ""
        body += (
            f"<details{' open' if not number else ''}><summary>{len(members):,} rows, "
            f"{counts[number]:,} kept</summary>{_cards(facts, shown)}{more}</details>"
        )
    return section("duplicates", "Near-duplicates", intro, how + body)


def gallery(facts: Facts) -> str:
    """Show some kept rows of every bin beside some that were left out."""
    intro = (
        "Some rows of every bin, drawn by chance: what was kept on one side, what was left out on "
        "the other. They should look alike."
    )
    body = ""
    if facts.selection.n_bins > MAX_GALLERY_BINS:
        body = (
            f"<p>{len(facts.gallery)} of {facts.selection.n_bins:,} bins, evenly spread, are "
            "shown.</p>"
        )
    for place, (number, ours, others) in enumerate(facts.gallery):
        name = "All rows" if number is None else f"Bin {number}"
        swatch = "" if number is None else f'<span class="swatch b{number}"></span>'
        sides = "".join(
            f"<div><h3>{title}</h3>{_cards(facts, rows) if rows else '<p>none</p>'}</div>"
            for title, rows in (("Kept", ours), ("Left out", others))
        )
        body += (
            f"<details{' open' if not place else ''}><summary>{swatch}{name}</summary>"
            f'<div class="sides">{sides}</div></details>'
        )
    return section("gallery", "Rows of every bin", intro, body)
