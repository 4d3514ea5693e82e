"""The figure of eval/selection_benchmark.py, as eval/figures.py draws it."""

from collections.abc import Callable
from typing import Any

ORDER = ("n-by-n", "ours", "closed form", "apricot", "submodlib", "ours in parts", "ours before")
QUANTITIES = {"seconds": "seconds", "memory_bytes": "MB above the embeddings"}


def draw(document: dict[str, Any], start: Callable, label: Callable, styles: Any) -> Any:
    """Draw seconds and peak memory over the rows, a line a method, both axes logarithmic.

    Args:
        document: The results file.
        start: `figures.start`.
        label: `figures.label`.
        styles: Colour, dash and mark of each line.
    """
    title = f"Selection of MiniLM embeddings into {document['n_bins']} bins, cosine, "
    title += f"{document['device']}; crosses: extrapolated, not measured"
    figure, panels = start(1, 2, 3.9, title)
    lines = [x for x in document["lines"] if "seconds" in x and x["similarity"] == "cosine"]
    for axes, (key, unit) in zip(panels[0], QUANTITIES.items(), strict=True):
        for name, (colour, dash, mark) in zip(ORDER, styles, strict=False):
            own = [x for x in lines if x["method"] == name]
            for data, fill in (("Alpaca", "full"), ("mixed Alpaca", "none")):
                points = sorted((x["rows"], read(x, key)) for x in own if x["data"] == data)
                what = f"{name}, mixed rows" if fill == "none" else name
                if points:
                    dots = {"ls": dash, "c": colour, "ms": 4, "fillstyle": fill, "label": what}
                    axes.plot(*zip(*points, strict=True), mark, **dots)
            beyond = [x for x in document["extrapolated"] if x["method"] == name]
            for x in beyond:
                axes.plot(x["rows"], read(x, key), "x", c=colour, ms=6)
        axes.set(xscale="log", yscale="log")
        axes.minorticks_off()
        label(axes, "", "rows", unit)
    named = panels[0, 0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    return figure


def read(line: dict[str, Any], key: str) -> float:
    """Read seconds, or MB: at least a tenth, since the axis has no zero."""
    if key == "memory_bytes":
        return max(line[key] / 1e6, 0.1)
    found = line[key]
    return found["median"] if isinstance(found, dict) else found
