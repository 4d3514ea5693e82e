"""Charts as inline SVG, and the colours of the bins, on screen and in print."""

from html import escape

LIGHT_RAMP = ("#3b1c6b", "#37518f", "#20788c", "#25996f", "#6fa62f", "#c09000")
DARK_RAMP = ("#8f83e6", "#5b9be0", "#3fc0c0", "#58d68d", "#b4e04f", "#ffe14d")
"""From dark to light (or, on dark ground, from dim to bright): read by eyes of every kind."""

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 46
MARKS = ("circle", "square", "triangle")

Points = list[tuple[float, float]]


def bin_colours(n_bins: int, is_dark: bool = False) -> list[str]:
    """Give one colour for every bin, first to last along the ramp."""
    ramp = [_parse(colour) for colour in (DARK_RAMP if is_dark else LIGHT_RAMP)]
    colours = []
    for number in range(n_bins):
        place = number / max(1, n_bins - 1) * (len(ramp) - 1)
        low = min(int(place), len(ramp) - 2)
        mixed = [a + (b - a) * (place - low) for a, b in zip(ramp[low], ramp[low + 1], strict=True)]
        colours.append("#" + "".join(f"{round(part):02x}" for part in mixed))
    return colours


def _parse(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def normalise(values: list[float | None]) -> list[float | None]:
    """Scale values to [0, 1] by their least and largest; equal ones lie in the middle."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if high <= low:
        return [None if value is None else 0.5 for value in values]
    return [None if value is None else (value - low) / (high - low) for value in values]


def line_chart(
    lines: list[tuple[str, Points]],
    *,
    title: str,
    x_name: str,
    y_name: str,
    x_range: tuple[float, float],
    x_ticks: list[float],
    has_marks: bool = False,
) -> str:
    """Draw lines over [0, 1], each of its own colour, dashes and marks, with a legend below.

    Args:
        lines: Name and (x, y) points of each, y in [0, 1]; at most three.
        title: What the chart shows, for those who cannot see it.
        x_name: Name of the horizontal axis.
        y_name: Name of the vertical axis.
        x_range: What the axis spans.
        x_ticks: Where it has numbers.
        has_marks: Whether points get marks.
    """
    low, high = x_range
    span = high - low or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low) / span * (WIDTH - LEFT - RIGHT)
        return round(across, 2), round(TOP + (1 - y) * (HEIGHT - TOP - BOTTOM), 2)

    parts = []
    for y in (0, 0.25, 0.5, 0.75, 1):
        x0, height = place(low, y)
        parts.append(
            f'<line class="grid" x1="{x0}" y1="{height}" x2="{WIDTH - RIGHT}" y2="{height}"/>'
        )
        parts.append(f'<text x="{x0 - 8}" y="{height + 4}" text-anchor="end">{y:g}</text>')
    for tick in x_ticks:
        across, floor = place(tick, 0)
        parts.append(f'<text x="{across}" y="{floor + 18}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
    )
    centre = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turn = f'transform="rotate(-90 12 {centre})"'
    parts.append(f'<text x="12" y="{centre}" text-anchor="middle" {turn}>{escape(y_name)}</text>')
    for number, (_, points) in enumerate(lines):
        spots = [place(x, y) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in spots)
        parts.append(f'<polyline class="line l{number}" points="{path}"/>')
        if has_marks:
            parts += [_mark(number, x, y) for x, y in spots]
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 34 12" aria-hidden="true">'
        f'<polyline class="line l{number}" points="1,6 33,6"/>'
        f"{_mark(number, 17, 6) if has_marks else ''}</svg>{escape(name)}</li>"
        for number, (name, _) in enumerate(lines)
    )
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _mark(number: int, x: float, y: float) -> str:
    kind = MARKS[number % len(MARKS)]
    if kind == "circle":
        return f'<circle class="mark l{number}" cx="{x}" cy="{y}" r="4"/>'
    if kind == "square":
        return (
            f'<rect class="mark l{number}" x="{x - 3.5:g}" y="{y - 3.5:g}" width="7" height="7"/>'
        )
    corners = f"{x},{y - 5:g} {x + 4.6:g},{y + 3.5:g} {x - 4.6:g},{y + 3.5:g}"
    return f'<polygon class="mark l{number}" points="{corners}"/>'


def round_ticks(high: float, n_ticks: int = 5) -> list[float]:
    """Give round numbers from 0 to at most high, about n_ticks of them."""
    if not high > 0:
        return [0.0]
    exponent = 0
    while high / 10**exponent >= 10:
        exponent += 1
    while high / 10**exponent < 1:
        exponent -= 1
    unit = 10.0**exponent
    steps = [unit * share for share in (0.1, 0.2, 0.5, 1, 2, 5)]
    step = min(steps, key=lambda s: abs(high / s - n_ticks))
    return [round(step * k, 12) for k in range(int(high / step + 1e-9) + 1)]
