"""From results lines to statistics, Markdown tables and a figure.

What is never put into one row: cells of different tasks, protocols, settings, data, nets, metrics,
kinds of device (CPU, CUDA), keep ratios, selections and options of a selection. Where lines of one
protocol were made with several settings or data (an older state of a suite), each makes a table of
its own, which names what differs.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import grid

from dq_multimodal.config import InputError
from harness.suite import BASELINE, PER_CLASS, images_of

LEVEL = 0.95
N_RESAMPLES, SEED = 10_000, 0
ENOUGH_DRAWS = 10
"""Percentile intervals are too short where draws are few: of normal numbers they hold the mean in
92 % of cases with 10 draws, 87 % with 6 and 76 % with 3 (3,000 trials each)."""
SIZES = {"response_tokens": "response tokens", "bytes": "bytes"}
SAME_BYTES = 0.05
"""Where the bytes a row differ by no more than this share, they get no column."""
SPENT = ("selection", "proxy", "training")
NEEDED = ("suite", "task", "protocol", "net", "device", "settings", "selection", "keep_ratio")
NEEDED += ("draw", "seed", "is_fixed", "rows", "steps", "metrics")
"""What a line must say to be of use here."""

Cells = dict[tuple[int, int], float]
"""(draw, training seed) -> value; (0, 0) for a fixed line."""


@dataclass(frozen=True)
class Estimate:
    """A mean of draws and its 95 % interval, which is None where there are less than two draws."""

    mean: float
    interval: tuple[float, float] | None
    n_draws: int
    n_cells: int


@dataclass(frozen=True)
class Row:
    """All cells of one selection at one keep ratio.

    `size` is the mean of the response tokens or bytes, `best` that of the best epochs (None where
    a cell has none), `seconds` the medians of selection, proxy and training (NaN where not known).
    Where the rows are a list that somebody published, `is_list` holds, and `rank` is its place from
    the best among the draws of random and itself, and their number (None where it is not fixed).
    `use_weights` says what became of the weights of the rows: loss, sample or none; `n_images` is
    the number of images of each class, where the size is one.
    """

    keep_ratio: float
    selection: str
    rows: float
    size: float | None
    steps: float
    value: Estimate
    best: float | None
    difference: Estimate | None
    seconds: tuple[float, ...] | None
    is_fixed: bool
    is_list: bool
    rank: tuple[int, int] | None
    use_weights: str = "none"
    n_images: int | None = None


@dataclass(frozen=True)
class Group:
    """Rows that may be compared; `note` names settings or data that tell it from its like."""

    suite: str
    task: str
    protocol: str
    net: str
    device: str
    metric: str
    device_names: tuple[str, ...]
    note: str
    size_name: str
    rows: tuple[Row, ...]


def is_higher_better(metric: str) -> bool:
    """Say whether more of a metric is better.

    Raises:
        InputError: If its name tells neither.
    """
    names = [word for word in ("accuracy", "loss") if word in metric]
    if len(names) != 1:
        raise InputError(f"wanted a metric with 'accuracy' or 'loss' in its name, got {metric!r}")
    return names == ["accuracy"]


def summarise(lines: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Put the cells of results lines together, in the order in which their groups came.

    Of two lines of the same cell with the same settings, options and data the later one counts.

    Raises:
        InputError: If a line lacks a key that is needed, or a metric tells no direction.
    """
    places: dict[tuple[str, ...], dict[tuple[str, str], dict[Any, dict[Any, Any]]]] = {}
    for line in lines:
        if missing := [key for key in NEEDED if line.get(key) is None]:
            wanted = f"a results line with {', '.join(NEEDED)}"
            raise InputError(f"wanted {wanted}, got one without {', '.join(missing)}")
        version = (canonical(line["settings"]), canonical(line.get("data")))
        used = {"use_weights": line.get("use_weights", "none")}
        options = canonical((line.get("options") or {}) | used)
        row = (line["keep_ratio"], line["selection"], options, line["is_fixed"])
        cell = (0, 0) if line["is_fixed"] else (line["draw"], line["seed"])
        for metric in line["metrics"]:
            is_higher_better(metric)
            group = (*(line[k] for k in ("suite", "task", "protocol", "net")),)
            versions = places.setdefault((*group, line["device"]["type"], metric), {})
            versions.setdefault(version, {}).setdefault(row, {})[cell] = line
    return [
        make_group(place, rows, describe(version, list(versions)))
        for place, versions in places.items()
        for version, rows in versions.items()
    ]


def canonical(value: Any) -> str:
    """Write a value so that equal ones are equal strings."""
    return json.dumps(value, sort_keys=True)


def describe(version: tuple[str, str], among: list[tuple[str, str]]) -> str:
    """Name the settings (and the data) of a version that are not those of all its like."""
    settings = [flat(json.loads(other)) for other, _ in among]
    own = flat(json.loads(version[0]))
    names = sorted({name for other in settings for name in other})
    differ = [n for n in names if any(other.get(n) != own.get(n) for other in settings)]
    said = [f"{name} {own.get(name, 'not set')}" for name in differ]
    if len({data for _, data in among}) > 1:
        said.append(f"data {json.loads(version[1])}")
    return ", ".join(said)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Give the leaves of nested settings by their dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    inner = (flat(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
    return {key: leaf for part in inner for key, leaf in part.items()}


def make_group(of_group: tuple[str, ...], found: dict[Any, dict[Any, Any]], note: str) -> Group:
    """Work out the rows of one group."""
    metric, lines = of_group[-1], [line for cells in found.values() for line in cells.values()]
    size = next((key for key in SIZES if any(line.get(key) is not None for line in lines)), "")
    names = name_rows(list(found))
    values = {key: read(cells, metric, "last") for key, cells in found.items()}
    baselines = {key[0]: key for key, name in names.items() if name == BASELINE}
    if lost := sorted({key[0] for key in found if key[1] == BASELINE} - set(baselines)):
        at = " and ".join(share(keep_ratio) for keep_ratio in lost)
        why = f"{BASELINE} has several options there, or fixed cells beside others"
        note = "; ".join(filter(None, (note, f"no differences at {at}: {why}")))
    rows = []
    for key, cells in found.items():
        keep_ratio, _, options, is_fixed = key
        base, pairs = baselines.get(keep_ratio), Cells()
        if base is not None and base != key:
            pairs = subtract(values[key], values[base], is_fixed, base[-1])
        is_list = "row_list" in json.loads(options)
        difference = estimate(pairs) if pairs else None
        rank = rank_of(pairs, metric) if is_list and is_fixed else None
        if difference and rank:  # the interval would be that of random's mean alone
            difference = replace(difference, interval=None)
        best = estimate(read(cells, metric, "best")).mean
        sizes = [line.get(size) for line in cells.values()]
        rows.append(
            Row(
                keep_ratio=keep_ratio,
                selection=names[key],
                rows=float(np.mean([line["rows"] for line in cells.values()])),
                size=None if None in sizes else float(np.mean(sizes)),
                steps=float(np.mean([line["steps"] for line in cells.values()])),
                value=estimate(values[key]),
                best=None if np.isnan(best) else best,
                difference=difference,
                seconds=median_seconds(list(cells.values())),
                is_fixed=is_fixed,
                is_list=is_list,
                rank=rank,
                use_weights=json.loads(options)["use_weights"],
                n_images=images_of(next(iter(cells.values())).get("keep", "")),
            )
        )
    order = list(dict.fromkeys(row.selection for row in rows))
    rows.sort(key=lambda r: (r.keep_ratio, r.selection != BASELINE, order.index(r.selection)))
    devices = tuple(sorted({line["device"]["name"] for line in lines}))
    return Group(*of_group, devices, note, SIZES.get(size, ""), tuple(rows))


def name_rows(keys: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
    """Name rows by their selection, and by its options where several share the name."""
    names = {}
    for key in keys:
        keep_ratio, selection, options, is_fixed = key
        like = [k for k in keys if k[1] == selection]
        said = describe((options, ""), list(dict.fromkeys((k[2], "") for k in like)))
        if len({k[3] for k in like if k[0] == keep_ratio and k[2] == options}) > 1:
            said += " fixed" if is_fixed else " not fixed"
        names[key] = f"{selection} ({said.strip()})" if said else selection
    return names


def read(cells: dict[Any, Any], metric: str, which: str) -> Cells:
    """Read a metric of all cells of a row; NaN where it has none."""
    found = {cell: line["metrics"][metric].get(which) for cell, line in cells.items()}
    return {cell: np.nan if value is None else float(value) for cell, value in found.items()}


def subtract(own: Cells, base: Cells, is_fixed: bool, is_base_fixed: bool) -> Cells:
    """Give the differences of cells with the same draw and training seed.

    A fixed line is the same for every draw, so it is paired with all of them.
    """
    if is_fixed and not is_base_fixed:
        return {cell: own[0, 0] - value for cell, value in base.items()}
    if is_base_fixed and not is_fixed:
        return {cell: value - base[0, 0] for cell, value in own.items()}
    return {cell: value - base[cell] for cell, value in own.items() if cell in base}


def estimate(cells: Cells) -> Estimate:
    """Give the mean of the draws' means, and its percentile interval by the bootstrap over draws.

    A draw is resampled as a whole because its training seeds share its rows (Efron and Tibshirani
    1993, chapter 13).
    """
    from scipy.stats import bootstrap

    means, interval = draw_means(cells), None
    if np.isnan(means).any():
        interval = (np.nan, np.nan)
    elif len(means) > 1:
        options = {"n_resamples": N_RESAMPLES, "confidence_level": LEVEL, "method": "percentile"}
        found = bootstrap((means,), np.mean, rng=np.random.default_rng(SEED), **options)
        interval = (float(found.confidence_interval.low), float(found.confidence_interval.high))
    return Estimate(float(means.mean()), interval, len(means), len(cells))


def draw_means(cells: Cells) -> np.ndarray:
    """Give the mean over the training seeds of each draw, in the order of the draws."""
    of_draws: dict[int, list[float]] = {}
    for (draw, _), value in sorted(cells.items()):
        of_draws.setdefault(draw, []).append(value)
    return np.array([np.mean(values) for values in of_draws.values()])


def rank_of(pairs: Cells, metric: str) -> tuple[int, int] | None:
    """Give the place, from the best, of one fixed value among the draws that it is paired with.

    Returns:
        1 + the number of better draws, and 1 + the number of draws; None for less than two.
    """
    lead = draw_means(pairs) if pairs else np.zeros(0)
    if len(lead) < 2 or np.isnan(lead).any():
        return None
    is_behind = lead < 0 if is_higher_better(metric) else lead > 0
    return 1 + int(is_behind.sum()), 1 + len(lead)


def median_seconds(lines: list[Any]) -> tuple[float, ...] | None:
    """Give the median seconds of selection, proxy and training, NaN where a line does not say."""
    found = [line.get("seconds") or {} for line in lines]
    if not any(found):
        return None
    parts = [[of_line.get(name) for of_line in found] for name in SPENT]
    return tuple(np.nan if None in part else float(np.median(part)) for part in parts)


def judge(row: Row, group: Group) -> str:
    """Say whether a difference is better or worse than none; with "?" where draws are few.

    A list that somebody published is one draw of the method that made it. An interval over draws of
    random, or over training seeds, leaves that draw out, so a list has its rank instead.
    """
    found = row.difference
    if row.rank:
        return "rank {} of {}".format(*row.rank)
    if row.is_list or found is None or found.interval is None:
        return ""
    low, high = found.interval
    if not (low > 0 or high < 0):
        return ""
    word = "better" if (low > 0) == is_higher_better(group.metric) else "worse"
    return f"**{word}**" if found.n_draws >= ENOUGH_DRAWS else f"{word}?"


def markdown(groups: list[Group]) -> str:
    """Lay out the groups, a table each, and say how to read them."""
    rows = [row for group in groups for row in group.rows]
    notes = {
        "In brackets: 95 % intervals, bootstrap over draws. Differences are paired: same draw, "
        "same training seed. **better**, **worse**: the interval excludes 0, which a few of many "
        f"do by chance; with a question mark where it is of fewer than {ENOUGH_DRAWS} draws, which "
        "make it too short.": any(row.value.interval for row in rows),
        f"A rank: the place of a fixed list, from the best, among the draws of {BASELINE}.": any(
            row.rank for row in rows
        ),
        "Weights of the kept rows (how many rows each stands for): factors of their losses, "
        "chances to be in a batch (sample), or none.": any(r.use_weights != "none" for r in rows),
        "Seconds are medians of wall time, which other work on the machine makes longer.": any(
            row.seconds for row in rows
        ),
    }
    parts = [f"{headline(group)}\n\n{lay_out(group)}" for group in groups]
    parts.append(" ".join(said for said, is_needed in notes.items() if is_needed))
    return "\n\n".join(filter(None, parts)) or "No cell has finished yet."


def headline(group: Group) -> str:
    """Say what the rows of a group have in common."""
    note = f" [{group.note}]" if group.note else ""
    better = "higher" if is_higher_better(group.metric) else "lower"
    device = f"{group.device} ({', '.join(group.device_names)})"
    what = f"{group.task}, protocol {group.protocol}{note}, {group.net}"
    return f"**{what}**, on {device}; {unit(group)}, {better} is better:"


def unit(group: Group) -> str:
    """Name the metric with its unit."""
    return f"{group.metric}, {'%' if is_higher_better(group.metric) else 'nats a response token'}"


def lay_out(group: Group) -> str:
    """Lay out one group; columns that no row fills are left out."""
    digits = 2 if is_higher_better(group.metric) else 4
    last = any(row.best is not None for row in group.rows)
    each = [row.size / row.rows for row in group.rows if row.size is not None]
    is_same = group.size_name == "bytes" and each and max(each) <= (1 + SAME_BYTES) * min(each)
    has_weights = any(row.use_weights != "none" for row in group.rows)
    table = []
    for row in group.rows:
        found = row.difference
        spent = ("?" if np.isnan(value) else f"{value:,.1f}" for value in row.seconds or ())
        why = "one list" if row.rank else ""
        best = "" if row.best is None else f"{row.best:.{digits}f}"
        cells = {
            "kept": f"{row.n_images}{PER_CLASS}" if row.n_images else share(row.keep_ratio),
            "selection": row.selection,
            "weights": row.use_weights if has_weights else "",
            "rows": f"{row.rows:,.0f}",
            group.size_name: "" if row.size is None or is_same else f"{row.size:,.0f}",
            "steps": f"{row.steps:,.0f}",
            f"{group.metric}, last epoch" if last else group.metric: show(
                row.value, digits, "fixed" if row.is_fixed else ""
            ),
            f"difference to {BASELINE}": show(found, digits, why, sign="+") if found else "",
            " ": judge(row, group),
            "best epoch, picked by the test rows": best,
            "cells": count(row),
            "seconds: selection + proxy + training": " + ".join(spent),
        }
        table.append(cells)
    used = [name for name in table[0] if any(cells[name] for cells in table)]
    head = tuple(name.strip() for name in used)
    return grid([head, *(tuple(cells[name] for name in used) for cells in table)])


def share(keep_ratio: float) -> str:
    """Write a keep ratio in percent."""
    return f"{100 * keep_ratio:.4g} %"


def show(found: Estimate, digits: int, why: str = "", sign: str = "") -> str:
    """Write a mean with its interval, or why it has none: as given, or for want of draws."""
    shown = f"{found.mean:{sign}.{digits}f}"
    if found.interval is not None:
        low, high = (f"{value:{sign}.{digits}f}" for value in found.interval)
        return f"{shown} [{low}, {high}]"
    return f"{shown} ({why or ('one cell' if found.n_cells == 1 else 'one draw')})"


def count(row: Row) -> str:
    """Count cells, their draws, and pairs where a cell has no partner."""
    value, paired = row.value, row.difference
    said = f"{value.n_cells}"
    if value.n_cells > value.n_draws:
        said += f" ({value.n_draws} draws)" if value.n_draws > 1 else " (1 draw)"
    if paired is not None and not row.is_fixed and paired.n_cells != value.n_cells:
        said += f", {paired.n_cells} paired"
    return said


def figure(groups: list[Group], path: Path) -> bool:
    """Draw the difference to the baseline over the keep ratio, a panel a group, a line a selection.

    Returns:
        False, and no file, where no row has a difference.
    """
    from figures import STYLES, label, save, start

    shown = [group for group in groups if any(row.difference for row in group.rows)]
    if not shown:
        return False
    names = list(dict.fromkeys(r.selection for g in shown for r in g.rows if r.difference))
    n_columns = min(2, len(shown))
    n_rows = -(-len(shown) // n_columns)
    title = f"{shown[0].suite}: difference to {BASELINE}, 95 % intervals over draws"
    drawing, panels = start(n_rows, n_columns, 0.9 + 2.6 * n_rows, title)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes, group in zip(panels.flat, shown, strict=False):
        axes.axhline(0, c="#1d2129", lw=0.8)
        ratios = sorted({row.keep_ratio for row in group.rows if row.difference})
        for k, name in enumerate(names):
            colour, dash, mark = STYLES[k % len(STYLES)]
            # Side by side on the logarithmic axis, so that no interval hides another.
            shift = 1 + 0.03 * (k - (len(names) - 1) / 2)
            found = [r for r in group.rows if r.selection == name and r.difference]
            if found:
                mean = np.array([r.difference.mean for r in found])
                ends = np.array([r.difference.interval or (np.nan, np.nan) for r in found]).T
                x = [100 * r.keep_ratio * shift for r in found]
                dots = {"fmt": mark, "ls": dash, "c": colour, "ms": 4, "lw": 1.2, "elinewidth": 1}
                handles[name] = axes.errorbar(x, mean, abs(ends - mean), **dots)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks([100 * r for r in ratios], [f"{100 * r:.3g}" for r in ratios])
        axes.set_xlim(100 * ratios[0] / 1.5, 100 * ratios[-1] * 1.5)
        head = f"{group.task}, {group.protocol}, {group.net}, {group.device}"
        better = "up" if is_higher_better(group.metric) else "down"
        label(axes, head, "rows kept, %", f"{unit(group)}\n(better: {better})")
    legend = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 7}
    drawing.legend([handles[name] for name in names], names, **legend)
    save(drawing, path)
    return True
