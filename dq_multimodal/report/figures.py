"""The figures of the dataset card, where matplotlib is installed, and the colours of bins."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dq_multimodal.files import put_in_place
from dq_multimodal.report.collect import Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "figures"
QUIET = "#5a616e"
LINES = (("#1f5fa8", "-", "o"), ("#b0480f", "--", "s"), ("#1d7a4c", ":", "^"))
LIGHT_RAMP = ("#3b1c6b", "#37518f", "#20788c", "#25996f", "#6fa62f", "#c09000")
DARK_RAMP = ("#8f83e6", "#5b9be0", "#3fc0c0", "#58d68d", "#b4e04f", "#ffe14d")
"""From dark to light (or, on dark ground, from dim to bright): read by eyes of every kind."""


def bin_colours(n_bins: int, is_dark: bool = False) -> list[str]:
    """Give one colour for every bin, first to last along the ramp."""
    ramp = [bytes.fromhex(colour[1:]) for colour in (DARK_RAMP if is_dark else LIGHT_RAMP)]
    places = np.linspace(0, len(ramp) - 1, n_bins)
    parts = [np.interp(places, range(len(ramp)), part) for part in zip(*ramp, strict=True)]
    return ["#" + bytes(map(round, mixed)).hex() for mixed in zip(*parts, strict=True)]


def normalise(values: list[float | None]) -> list[float | None]:
    """Scale values to [0, 1] by their least and largest; equal ones lie in the middle."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if high <= low:
        return [None if value is None else 0.5 for value in values]
    return [None if value is None else (value - low) / (high - low) for value in values]


def can_draw() -> bool:
    """Say whether matplotlib is there."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def write_figures(facts: Facts, folder: Path) -> None:
    """Write map.png, bins.png and coverage.png into folder/figures, those that there are data for.

    The same run gives the same bytes: no dates and no names of programs go into the files.
    """
    figures = {
        "map.png": (_draw_map, facts.map),
        "bins.png": (_draw_bins, facts.selection.bin),
        "coverage.png": (_draw_coverage, facts.coverage),
    }
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    for name, (draw, what) in figures.items():
        path = target / name
        if what is None:
            path.unlink(missing_ok=True)
            continue
        temporary = path.with_name(name + ".tmp")
        draw(facts).savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        put_in_place(temporary, path)


def _start(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)
    return figure, axes


def _draw_map(facts: Facts) -> "Figure":
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shown, selection = facts.map, facts.selection
    assert shown is not None
    figure, axes = _start(6.4, 5.2)
    n_bins, kept = selection.n_bins, selection.kept[shown.rows]
    colours = np.full(len(kept), "#4b6f9c")
    if n_bins > 1 and selection.bin is not None:
        colours = np.array(bin_colours(n_bins))[selection.bin[shown.rows]]
    x, y = shown.places[:, 0], 1 - shown.places[:, 1]  # as on the page, where y points down
    axes.scatter(x[~kept], y[~kept], s=5, c=colours[~kept], alpha=0.55, lw=0, label="left out")
    axes.scatter(
        x[kept], y[kept], s=14, c=colours[kept], edgecolors="#1d2129", lw=0.6, label="kept"
    )
    axes.set_axis_off()
    axes.legend(frameon=False, loc="upper left", fontsize=9, labelcolor=QUIET)
    if n_bins > 1:
        ramp = ScalarMappable(Normalize(-0.5, n_bins - 0.5), ListedColormap(bin_colours(n_bins)))
        ticks = [0, n_bins - 1] if n_bins > 12 else list(range(n_bins))
        bar = figure.colorbar(ramp, ax=axes, ticks=ticks, shrink=0.6, label="bin")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=9, colors=QUIET)
    return figure


def _draw_bins(facts: Facts) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    n_bins, (sizes, kept) = facts.selection.n_bins, facts.selection.count_bins()
    figure, axes = _start(6.4, 3.4)
    axes.bar(range(n_bins), sizes, color="#e4edf7", label="rows")
    axes.bar(range(n_bins), kept, color=bin_colours(n_bins), label="kept")
    axes.set_xlabel("bin", color=QUIET)
    axes.set_ylabel("rows (kept ones filled)", color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if facts.scores:
        scores = axes.twinx()
        scores.spines["top"].set_visible(False)
        for (name, values), (colour, dash, mark) in zip(facts.scores.items(), LINES, strict=True):
            scaled = [np.nan if value is None else value for value in normalise(values)]
            scores.plot(range(n_bins), scaled, dash, color=colour, marker=mark, ms=4, label=name)
        scores.set_ylabel("score, scaled to 0 ... 1", color=QUIET)
        scores.tick_params(colors=QUIET, labelsize=9)
        figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=5)
    return figure


def _draw_coverage(facts: Facts) -> "Figure":
    """Draw which share of the rows has a kept row within a distance, and the band of the draws."""
    found, request = facts.coverage, facts.config.request
    assert found is not None
    figure, axes = _start(6.4, 3.4)
    (own, dash, _), (colour, other_dash, _), _ = LINES
    others = f"mean of {found.n_draws} random draws"
    axes.fill_betweenx(
        found.shares, found.random_low, found.random_high, color=colour, alpha=0.25, lw=0
    )
    axes.plot(found.random_curve, found.shares, other_dash, color=colour, lw=1.5, label=others)
    axes.plot(found.kept_curve, found.shares, dash, color=own, lw=2, label=request.method)
    unit = "1 - cosine similarity" if request.similarity == "cosine" else "euclidean"
    of_sample = " of the sample" if facts.selection.is_sample else ""
    axes.set_xlabel(f"distance to the nearest kept row{of_sample} ({unit})", color=QUIET)
    axes.set_ylabel(f"share of the rows{of_sample}", color=QUIET)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.grid(color="#e7e8eb")
    axes.legend(frameon=False, fontsize=9)
    return figure
