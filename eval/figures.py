"""Draw the papers' figures from the committed results, and from runs on this machine.

    python eval/figures.py [--run NAME=FOLDER ...] [--results FOLDER] [--output_dir FOLDER]

scores.png is ADQ's Fig. 2, ablation.png its table, trajectories.png Fig. 4, keep_ratio.png Fig. 5,
alpha.png Fig. 6; selection.png is the benchmark; bins_NAME.png the bins of a run by t-SNE (appendix
of DQ). Without results a figure is left out; stderr says what makes them. Same results, same bytes.
"""

import argparse
import io
import json
import runpy
import sys
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from numpy import ndarray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
DPI, WIDTH = 160, 7.5  # inches: 1,200 pixels
QUIET, PALE, INK = "#5a616e", "#d5d8dd", "#1d2129"
STYLES = (
    ("#1f5fa8", "-", "o"),
    ("#c4520c", "--", "s"),
    ("#1d7a4c", "-.", "^"),
    ("#8a4f9e", ":", "D"),
    ("#5a616e", (0, (5, 1)), "v"),
    ("#a33a68", (0, (3, 1, 1, 1)), "P"),
)
"""Colour, dash and mark of each line: none is told apart by its colour alone."""
SWEPT = dict(zip(("random", "dq", "+ IS"), STYLES, strict=False))
NAMES = {"alpaca": "Alpaca", "cifar10": "CIFAR-10"}
ALPHA, SAMPLE = 0.6, 3_000  # the default; rows that t-SNE lays out
ABLATION = "python eval/adq_ablation.py"
SWEEP = "images --keep_ratios ... --alphas ... --output eval/results/adq_sweeps.json"
SWEEPS = {"adq_sweeps": f"{ABLATION} {SWEEP}"}
SOURCES: dict[str, dict[str, str]] = {
    "scores": {"adq_scores": "python eval/adq_scores.py"},
    "ablation": {"adq_images": f"{ABLATION} images", "adq_text": f"{ABLATION} text"},
    "keep_ratio": SWEEPS,
    "alpha": SWEEPS,
    "trajectories": {"trajectories": "python eval/trajectories.py"},
    "selection": {"selection_benchmark": "python eval/selection_benchmark.py"},
}
"""The results files of each figure, and the commands that make them."""


def main() -> None:
    """Draw what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "eval" / "results")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "eval" / "figures")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER")
    args = parser.parse_args()
    runs = {name: Path(folder) for name, _, folder in (item.partition("=") for item in args.run)}
    for name, folder in runs.items():
        if not (folder / "selection.parquet").is_file():
            print(f"error: --run {name}={folder}: wanted NAME=RUN_FOLDER", file=sys.stderr)
            sys.exit(2)
    drawn = (draw_scores, draw_ablation, draw_keep_ratio, draw_alpha, draw_trajectories)
    for (name, sources), draw in zip(SOURCES.items(), (*drawn, draw_selection), strict=True):
        found = {}
        for file, made_by in sources.items():
            if (path := args.results / f"{file}.json").is_file():
                found[file] = json.loads(path.read_text())
            else:
                print(f"{name}.png: no {path}, made by `{made_by}`", file=sys.stderr)
        if found and (figure := draw(found)) is not None:
            save(figure, args.output_dir / f"{name}.png")
        elif found:
            print(f"{name}.png: too few lines in {', '.join(found)}.json", file=sys.stderr)
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


def draw_scores(found: dict[str, Any]) -> "Figure":
    """Draw the scores of the bins, a row of panels a dataset, a line a seed."""
    sets = found["adq_scores"]["sets"]
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


def draw_ablation(found: dict[str, Any]) -> "Figure":
    """Draw the lines of the ablation with their intervals, a panel a modality."""
    figure, panels = start(1, len(found), 3.3, "Every seed, the mean, and its 95 % interval")
    for axes, (file, document) in zip(panels[0], found.items(), strict=True):
        lines = document["lines"]
        for k, (line, (colour, _, mark)) in enumerate(zip(lines, cycle(STYLES), strict=False)):
            dots = np.full(len(line["values"]), k + 0.2)
            axes.plot(line["values"], dots, "o", c=colour, ms=3, alpha=0.6, mew=0)
            half = line["half_of_95"]
            axes.errorbar(line["mean"], k, xerr=half, fmt=mark, c=colour, ms=6, capsize=3)
        axes.set_yticks(range(len(lines)), [line["line"] for line in lines])
        axes.invert_yaxis()
        data = "Alpaca, small Llama" if file == "adq_text" else f"CIFAR-10, {name_net()}"
        kept = " and ".join({f"{100 * line['keep_ratio']:g} %": 0 for line in lines})
        label(axes, f"{data},\n{kept} kept, {count_seeds(lines)}", document["what"])
    return figure


def count_seeds(lines: list[dict[str, Any]]) -> str:
    """Say how many seeds the lines have."""
    return " or ".join(str(n) for n in sorted({len(x["values"]) for x in lines})) + " seeds"


def name_net(recorded: str = "model") -> str:
    """Name a net; a folder of ours, called model, holds that of the short schedule."""
    own = yaml.safe_load((ROOT / "recipes/configs/cifar10_short.yaml").read_text())["model"]
    return own if Path(recorded).name == "model" else Path(recorded).name


def draw_line(axes: "Axes", points: list[tuple[float, dict[str, Any]]], name: str) -> None:
    """Draw seeds as dots, their means as a line, intervals where there are three seeds."""
    colour, dash, mark = SWEPT[name]
    points = sorted(points, key=lambda point: point[0])
    for x, line in points:
        dots = np.full(len(line["values"]), x)
        axes.plot(dots, line["values"], "o", c=colour, ms=3, alpha=0.5, mew=0)
        if len(dots) >= 3:
            axes.errorbar(x, line["mean"], yerr=line["half_of_95"], c=colour, capsize=3, lw=1)
    mean = ([x for x, _ in points], [line["mean"] for _, line in points])
    axes.plot(*mean, mark, ls=dash, c=colour, ms=5, label=name)


def draw_alpha(found: dict[str, Any]) -> "Figure | None":
    """Draw accuracy over alpha, dq being alpha 0, a panel a keep ratio."""
    document = found["adq_sweeps"]
    pairs = {(line["keep_ratio"], line["alpha"]) for line in document["lines"] if line["alpha"]}
    ratios = sorted({ratio for ratio, _ in pairs if sum(r == ratio for r, _ in pairs) > 1})
    if not ratios:
        return None
    swept = [line for line in document["lines"] if line["keep_ratio"] in ratios]
    title = f"Weight of the importance: CIFAR-10, {name_net()}, {count_seeds(swept)} (dots)"
    figure, panels = start(1, len(ratios), 3.4, f"{title}; alpha 0 is dq")
    for axes, ratio in zip(panels[0], ratios, strict=True):
        lines = [line for line in swept if line["keep_ratio"] == ratio]
        points = [(x["alpha"] or 0.0, x) for x in lines if x["line"] in ("dq", "+ IS")]
        draw_line(axes, points, "+ IS")
        for mean in [line["mean"] for line in lines if line["line"] == "random"]:
            axes.axhline(mean, c=SWEPT["random"][0], ls="--", label="random, mean")
        label(axes, f"{100 * ratio:g} % of the rows kept", "alpha", document["what"])
        axes.legend(frameon=False, fontsize=8)
    return figure


def draw_keep_ratio(found: dict[str, Any]) -> "Figure | None":
    """Draw accuracy over the keep ratio for random, dq and adq."""
    document = found["adq_sweeps"]
    lines = [line for line in document["lines"] if line["alpha"] in (None, ALPHA)]
    if len({line["keep_ratio"] for line in lines}) < 2:
        return None
    title = f"Share of the rows: CIFAR-10, {name_net()}, {count_seeds(lines)} (dots)"
    figure, ((axes,),) = start(1, 1, 3.6, f"{title}; + IS is adq with alpha {ALPHA:g}")
    for k, name in enumerate(SWEPT):  # side by side, so that none hides another
        own = [line for line in lines if line["line"] == name]
        draw_line(axes, [(100 * line["keep_ratio"] + 0.2 * (k - 1), line) for line in own], name)
    label(axes, "", "rows kept, %", document["what"])
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_trajectories(found: dict[str, Any]) -> "Figure":
    """Draw the distance of the students from the expert, and how well each of them ends."""
    document = found["trajectories"]
    runs, names = document["runs"], list(document["runs"][0]["students"])
    title = f"Students from thirds by texture or by chance: {document['dataset']}, "
    title += f"{document['model']}, seed {', '.join(str(run['seed']) for run in runs)}"
    figure, panels = start(1, 3, 3.3, title)
    for axes, unit in zip(panels[0], ("epochs", "steps"), strict=False):
        for name, (colour, dash, mark) in zip(names, STYLES, strict=False):
            of_seeds = [run["students"][name][f"equal_{unit}"] for run in runs]
            x = [point[unit] for point in of_seeds[0]]
            y = np.array([[point["distance"] for point in one] for one in of_seeds])
            axes.plot(x, y.T, c=colour, lw=0.7, alpha=0.6)
            axes.plot(x, y.mean(axis=0), mark, c=colour, ls=dash, ms=5, label=name)
        axes.set(ylim=(0, None), xticks=x)
        label(axes, f"after equal {unit}", unit, "L2 distance from the expert")
    panels[0, 0].legend(frameon=False, fontsize=8)
    ends = {name: [run["students"][name]["accuracy"] for run in runs] for name in names}
    ends["Expert"] = [run["expert"]["accuracy_at_steps_of_students"] for run in runs]
    for (name, values), (colour, _, mark) in zip(ends.items(), STYLES, strict=False):
        panels[0, 2].plot([name] * len(values), 100 * np.array(values), mark, c=colour, ms=6)
    panels[0, 2].tick_params(axis="x", rotation=40)
    label(panels[0, 2], f"after {x[-1]:,} steps", "", "test accuracy, %")
    return figure


def draw_selection(found: dict[str, Any]) -> "Figure":
    """Draw seconds and memory of the selection over the rows: see eval/selection_figure.py."""
    draw = runpy.run_path(str(ROOT / "eval" / "selection_figure.py"))["draw"]
    return draw(found["selection_benchmark"], start, label, STYLES)


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
