"""Draw the figures of the docs from the committed results, and from runs on this machine.

    python eval/figures.py [--run NAME=FOLDER ...] [--results FOLDER] [--output_dir FOLDER]

scores.png is ADQ's Fig. 2; selection.png is the benchmark; bins_NAME.png the bins of a run by t-SNE
(appendix of DQ). Without results a figure is left out; stderr says what makes them. Same results,
same bytes. The figures of the suites are drawn by `eval/bench.py table SUITE`.
"""

import io
import json
import sys
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from measure import RESULTS, ROOT, Parser, fail
from numpy import ndarray
from PIL import Image
from selection_benchmark import extrapolate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI, WIDTH = 160, 7.5  # inches: 1,200 pixels
QUIET, PALE, INK = "#5a616e", "#d5d8dd", "#1d2129"
STYLES = (
    ("#1f5fa8", "-", "o"),
    ("#c4520c", "--", "s"),
    ("#1d7a4c", "-.", "^"),
    ("#8a4f9e", ":", "D"),
    ("#5a616e", (0, (5, 1)), "v"),
    ("#a33a68", (0, (3, 1, 1, 1)), "P"),
    ("#0e8a8a", "-", "X"),
    ("#8c6d1f", "--", "p"),
    ("#b0413e", "-.", "<"),
    ("#3f4a9a", ":", ">"),
)
"""Colour, dash and mark of each line: none is told apart by its colour alone."""
NAMES = {"alpaca": "Alpaca", "cifar10": "CIFAR-10"}
METHODS = ("n-by-n", "ours", "closed form", "apricot", "submodlib", "ours in parts")
SAMPLE = 3_000  # rows that t-SNE lays out


def main() -> None:
    """Draw what there are results for."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER")
    args = parser.parse_args()
    runs = {name: Path(folder) for name, _, folder in (item.partition("=") for item in args.run)}
    for name, folder in runs.items():
        if not (folder / "selection.parquet").is_file():
            fail(f"--run {name}={folder}: wanted NAME=RUN_FOLDER")
    sources = {"scores": "adq_scores", "selection": "selection_benchmark"}
    for (name, source), draw in zip(sources.items(), (draw_scores, draw_selection), strict=True):
        path = args.results / f"{source}.json"
        if path.is_file():
            save(draw(json.loads(path.read_text())), args.output_dir / f"{name}.png")
        else:
            print(f"{name}.png: no {path}, made by `python eval/{source}.py`", file=sys.stderr)
    for name, folder in runs.items():
        save(draw_bins(NAMES.get(name, name), folder), args.output_dir / f"bins_{name}.png")
    if not runs:
        print("bins_NAME.png: no --run NAME=RUN_FOLDER", file=sys.stderr)


def start(n_rows: int, n_columns: int, height: float, title: str) -> "tuple[Figure, ndarray]":
    """Make a figure of panels, (n_rows, n_columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9, color=INK)
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=QUIET, labelsize=8)
        axes.grid(color="#ececef", lw=0.6)
    return figure, panels


def label(axes: "Axes", title: str = "", x: str = "", y: str = "") -> None:
    """Write what a panel and its axes show."""
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_xlabel(x, fontsize=9, color=QUIET)
    axes.set_ylabel(y, fontsize=9, color=QUIET)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG of 128 colours, without the names of programs."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)
    print(path)


def draw_scores(document: dict[str, Any]) -> "Figure":
    """Draw the scores of the bins, a row of panels a dataset, a line a seed."""
    sets = document["sets"]
    keys = {"representativeness": "RS", "diversity": "DS", "importance": "IS"}
    title = "Scores of the bins, each scaled to 0 ... 1, a line a seed"
    figure, panels = start(len(sets), 3, 0.6 + 2.1 * len(sets), title)
    for row, (name, one) in zip(panels, sets.items(), strict=True):
        for axes, (key, short) in zip(row, keys.items(), strict=True):
            of_seeds = zip(one["seeds"], one["scores"][key], cycle(STYLES), strict=False)
            for seed, values, (colour, dash, mark) in of_seeds:
                low, high = min(values), max(values)
                y = [(v - low) / (high - low) if high > low else 1.0 for v in values]
                axes.plot(range(len(y)), y, mark, ls=dash, c=colour, ms=4, label=f"seed {seed}")
            axes.set_xticks(range(len(values)))
            label(axes, f"{key} ({short})", "bin")
        net = name_net(one["costs"][0]["model"])
        label(row[0], row[0].get_title(), "bin", f"{NAMES.get(name, name)}\n{net}")
        row[0].legend(framealpha=0.7, fontsize=8)
    return figure


def name_net(recorded: str = "model") -> str:
    """Name a net; a folder of ours, called model, holds that of the short schedule."""
    own = yaml.safe_load((ROOT / "recipes/configs/cifar10_short.yaml").read_text())["model"]
    return own if Path(recorded).name == "model" else Path(recorded).name


def draw_selection(document: dict[str, Any]) -> "Figure":
    """Draw seconds and peak memory over the rows, a line a method, both axes logarithmic."""
    title = f"Selection of MiniLM embeddings into {document['n_bins']} bins, cosine, "
    title += f"{document['device']}; crosses: extrapolated, not measured"
    figure, panels = start(1, 2, 3.9, title)
    lines = [x for x in document["lines"] if "seconds" in x and x["similarity"] == "cosine"]
    quantities = {
        "seconds": lambda line: line["seconds"]["median"],
        "MB above the embeddings": lambda line: max(line["memory_bytes"] / 1e6, 0.1),
    }
    for axes, (unit, value) in zip(panels[0], quantities.items(), strict=True):
        for name, (colour, dash, mark) in zip(METHODS, STYLES, strict=False):
            for data, fill in (("Alpaca", "full"), ("mixed Alpaca", "none")):
                own = [x for x in lines if (x["method"], x["data"]) == (name, data)]
                points = sorted((x["rows"], value(x)) for x in own)
                if points:
                    what = f"{name}, mixed rows" if fill == "none" else name
                    dots = {"ls": dash, "c": colour, "ms": 4, "fillstyle": fill, "label": what}
                    axes.plot(*zip(*points, strict=True), mark, **dots)
            for x in extrapolate([x for x in lines if x["method"] == name]):
                far = x["seconds"] if unit == "seconds" else value(x)
                axes.plot(x["rows"], far, "x", c=colour, ms=6)
        axes.set(xscale="log", yscale="log")
        axes.minorticks_off()
        label(axes, "", "rows", unit)
    named = panels[0, 0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    return figure


def draw_bins(name: str, folder: Path) -> "Figure":
    """Draw single bins, the kept rows and all bins of a run by t-SNE, and the bins of a class."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    request, net = config["request"], name_net(config["embedding"].get("model") or "ready rows")
    rows = pq.read_table(folder / "selection.parquet").to_pandas()
    labels = json.loads((folder / "manifest.json").read_text())["labels"]
    shown = rows.sample(min(SAMPLE, len(rows)), random_state=0)
    places, bins = lay_out(folder, shown["row"], request["similarity"]), shown["bin"].to_numpy()
    n_bins = int(rows["bin"].max()) + 1
    singles = np.linspace(0, n_bins - 1, 3 if labels[1:] else 4)
    marked = {f"bin {k:.0f}": bins == k for k in singles.astype(int)}
    marked[f"kept, {100 * request['keep_ratio']:g} %"] = shown["kept"].to_numpy()
    title = f"Bins of {name} by t-SNE: {request['method']}, seed {request['seed']}, model {net}; "
    title += f"{len(shown):,} of {len(rows):,} rows"
    figure, panels = start(2, 3, 5.2, title)
    for axes, (what, is_marked) in zip(panels.flat, marked.items(), strict=False):
        axes.scatter(*places[~is_marked].T, s=3, c=PALE, lw=0)
        axes.scatter(*places[is_marked].T, s=6, c=STYLES[0][0], lw=0)
        label(axes, what)
    colours = {"cmap": "viridis", "vmin": -0.5, "vmax": n_bins - 0.5, "s": 5, "lw": 0}
    dots = panels.flat[len(marked)].scatter(*places.T, c=bins, **colours)
    label(panels.flat[len(marked)], "all bins")
    if labels[1:]:
        own = rows[rows["stratum"] == 0]
        own = own.sample(min(SAMPLE // 2, len(own)), random_state=0)
        own_places = lay_out(folder, own["row"], request["similarity"])
        panels[-1, -1].scatter(*own_places.T, c=own["bin"], **colours)
        label(panels[-1, -1], f"all bins, {labels[0]} alone")
    for axes in panels.flat:
        axes.set_axis_off()
    figure.colorbar(dots, ax=panels, label="bin", shrink=0.5).outline.set_visible(False)
    return figure


def lay_out(folder: Path, rows: Any, similarity: str) -> ndarray:
    """Give rows a place in the plane by t-SNE, (k, 2); by their directions where those count."""
    from sklearn.manifold import TSNE

    vectors = np.load(folder / "embeddings.npy", mmap_mode="r")[rows.to_numpy()]
    if similarity == "cosine":
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    layout = TSNE(init="pca", random_state=0, perplexity=min(30, (len(rows) - 1) / 3))
    return layout.fit_transform(vectors)


if __name__ == "__main__":
    main()
