"""The section of the page about a target: what was picked for each of its rows."""

from html import escape
from typing import Any

from dq_multimodal.report.cards import data_uri
from dq_multimodal.report.collect import TARGET_PICKS, Facts
from dq_multimodal.report.rows import clean, cut_fields, shorten
from dq_multimodal.report.sections import section, table

CHARACTERS, PICK_CHARACTERS = 240, 160


def target_section(facts: Facts) -> str:
    """Show every target row with the kept rows nearest to it; empty where there is no target."""
    found = facts.target
    if found is None:
        return ""

    def show(row: int, cosine: float) -> str:
        head = f"<small>row {row:,}, cosine {cosine:.3f}</small>"
        picture: Any = facts.pictures.get(row)
        if picture is not None:
            return f'{head}<br><img alt="Picture of row {row}" src="{data_uri(picture.small)}">'
        text = " · ".join(
            part for part in cut_fields(facts.texts.get(row, []), PICK_CHARACTERS) if part
        )
        return f'{head}<br><span dir="auto">{escape(text)}</span>'

    lines = []
    for target in found.rows:
        text = shorten(clean(target.text), CHARACTERS)
        near = [show(row, cosine) for row, cosine in target.picks]
        near += [""] * (TARGET_PICKS - len(near))
        lines.append(
            [
                str(target.number),
                f'<span dir="auto">{escape(text)}</span>',
                f"{target.n_kept:,}",
                *near,
            ]
        )
    head = ["target row", "text", "kept for it", "nearest", "second", "third"]
    body = table("Target rows and the rows that were kept for them", head, lines)
    if len(found.rows) < found.n_rows:
        body += f"<p>The first {len(found.rows)} of {found.n_rows:,} target rows are listed.</p>"
    leaks = (
        f"{found.n_leaks:,} rows of the source equal a target row or are very near one: do not "
        "test on such target rows."
        if found.n_leaks
        else "No row of the source equals a target row or is very near one, as far as compared."
    )
    intro = (
        "In turn, every row of the target took its next nearest row; the nearest of those that "
        "were kept are shown."
    )
    return section("target", "Picked for the target", intro, f"<p>{leaks}</p>{body}")
