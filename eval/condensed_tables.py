"""Tables of condensed sets from results lines, for eval/readme.py: see docs/condensation.md."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.suite import BASELINE, PER_CLASS, images_of
from harness.table import Cells, Estimate, draw_means, estimate, subtract
from measure import grid

METRIC = "test accuracy"
SHARE_OF_IOR = 0.5
"""w of the label-robust score, as on the leaderboard of DD-Ranking."""
AS_HARD = " as hard"
"""What the name of a selection ends with that is trained by classes where another is by labels."""
Table = list[tuple[str, ...]]


@dataclass
class Found:
    """The lines of one task, net and device: accuracies, and one line of each selection and size.

    `whole` are the accuracies on all rows; the others are by selection and images a class.
    """

    name: str
    values: dict[tuple[str, int], Cells] = field(default_factory=dict)
    lines: dict[tuple[str, int], list[Mapping[str, Any]]] = field(default_factory=dict)
    whole: Cells = field(default_factory=dict)

    @property
    def selections(self) -> dict[str, Mapping[str, Any]]:
        """The selections in their order, each with its options."""
        return {name: lines[0]["options"] for (name, _), lines in self.lines.items()}

    def sizes(self, names: Iterable[str]) -> list[int]:
        """Give the images a class at which there are some selections."""
        return sorted({n for name, n in self.values if name in names})

    def differ(self, name: str, other: str, n_images: int) -> Estimate | None:
        """Give the paired difference of two selections; None where one is not there."""
        both = [self.values.get((x, n_images), {}) for x in (name, other)]
        pairs = subtract(both[0], both[1], False, False)
        return estimate(pairs) if pairs else None


def collect(lines: Iterable[Mapping[str, Any]]) -> list[Found]:
    """Sort the lines of a suite; of two lines of a cell the later one counts."""
    found: dict[tuple[str, ...], Found] = {}
    for line in lines:
        place = line["task"], line["net"], line["device"]["type"]
        name = f"{line['task']}, {line['net']}"
        one = found.setdefault(place, Found(name if place[2] == "cpu" else f"{name}, {place[2]}"))
        cell, n_images = (line["draw"], line["seed"]), images_of(line["keep"])
        value = line["metrics"][METRIC]["last"]
        if n_images is not None:
            key = line["selection"], n_images
            one.values.setdefault(key, {})[cell] = value
            one.lines.setdefault(key, []).append(line)
        elif line["selection"] == BASELINE and line["keep"] == 1:
            one.whole[cell] = value
    return [one for one in found.values() if one.lines]


def accuracies(lines: Iterable[Mapping[str, Any]]) -> str:
    """Lay out accuracies and their differences to random, a row for each net and selection."""
    found, sizes = collect(lines), set()
    shown = {}
    for one in found:
        shown[one.name] = [x for x, options in one.selections.items() if is_plain(options)]
        sizes |= set(one.sizes(set(shown[one.name]) - {BASELINE}))
    heads = [f"{n}{PER_CLASS}{what}" for n in sorted(sizes) for what in ("", ", to random")]
    table: Table = [("data, net", "selection", *heads)]
    for one in found:
        for name in shown[one.name]:
            cells = []
            for n in sorted(sizes):
                values = one.values.get((name, n))
                difference = one.differ(name, BASELINE, n) if name != BASELINE else None
                cells += [show(estimate(values)) if values else "", show(difference, "+")]
            table.append((one.name, name, *cells))
    return grid(table)


def is_plain(options: Mapping[str, Any]) -> bool:
    """Say whether a selection is made at the size that is asked for, and not by bytes."""
    return "images_per_class" not in options and "same_bytes_as" not in options


def prefixes(lines: Iterable[Mapping[str, Any]]) -> str:
    """Lay out the prefixes of plain runs, and of those by each `multisize_choice` beside them."""
    found = collect(lines)
    runs = [
        (one, name, {choice_of(o): x for x, o in one.selections.items() if belongs_to(o, plain)})
        for one in found
        for name, plain in one.selections.items()
        if "images_per_class" in plain and not plain.get("multisize")
    ]
    choices = [*dict.fromkeys(choice for *_, multi in runs for choice in multi)]
    heads = [*choices, *(f"{choice} - plain" for choice in choices)]
    table: Table = [("data, net", "run", "images a class", BASELINE, "plain", *heads)]
    for one, name, multi in runs:
        shown = [BASELINE, name, *(multi.get(choice, "") for choice in choices)]
        for n in one.sizes([name]):
            values = [one.values.get((x, n)) for x in shown]
            accuracies = [show(estimate(cells)) if cells else "" for cells in values]
            differences = [show(one.differ(x, name, n), "+") for x in shown[2:]]
            table.append((one.name, name, str(n), *accuracies, *differences))
        means = [mean_of(one, x, [name]) for x in shown]
        table.append((one.name, name, "mean", *means, *("" for _ in choices)))
    return grid(table) if runs else ""


def choice_of(options: Mapping[str, Any]) -> str:
    """Say how a run of many sizes chooses the prefix that learns."""
    return options.get("multisize_choice", "learnable")


def belongs_to(options: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    """Say whether a selection is the run of many sizes that belongs to a plain one."""
    return bool(options.get("multisize")) and options["condense"] == plain["condense"]


def mean_of(one: Found, name: str, runs: Iterable[str]) -> str:
    """Give the mean accuracy of a selection over all prefixes; nothing where one is missing."""
    values = [one.values.get((name, n)) for n in one.sizes(runs)]
    if not all(values):
        return ""
    return f"{sum(estimate(cells).mean for cells in values if cells) / len(values):.1f}"


def stored(lines: Iterable[Mapping[str, Any]]) -> str:
    """Lay out images, stored bytes and accuracy, of the nets for which bytes were made the same."""
    found = [
        one
        for one in collect(lines)
        if any("same_bytes_as" in options for options in one.selections.values())
    ]
    cut = {
        one.name: [x for x, o in one.selections.items() if "images_per_class" not in o]
        for one in found
    }
    sizes = sorted({n for one in found for n in one.sizes(set(cut[one.name]) - {BASELINE})})
    what = ("images", "bytes", "accuracy")
    heads = [f"{n}{PER_CLASS}: {each}" for n in sizes for each in what]
    table: Table = [("data, net", "selection", *heads)]
    for one in found:
        for name in cut[one.name]:
            cells: list[str] = []
            for n in sizes:
                found_lines = one.lines.get((name, n), [])
                if not found_lines:
                    cells += [""] * len(what)
                    continue
                means = [sum(x[k] for x in found_lines) / len(found_lines) for k in SIZES]
                value = show(estimate(one.values[name, n]))
                cells += [*(f"{mean:,.0f}" for mean in means), value]
            table.append((one.name, name, *cells))
    return grid(table)


SIZES = ("rows", "bytes")


def scores(lines: Iterable[Mapping[str, Any]]) -> str:
    r"""Lay out the scores of DD-Ranking (arXiv:2505.13300), by its formulas from our own cells.

    Hard-label recovery HLR = acc(all rows) - acc(set, hard labels), improvement over random
    IOR = acc(set, as trained) - acc(random rows of the same number), and the label-robust score
    $(e^\alpha - e^{-1}) / (e - e^{-1})$ with $\alpha = w\, IOR - (1 - w)\, HLR$, w = 1/2 and
    accuracies as shares. Departures: accuracies are those after the last step of our protocol,
    where the package takes the best of the tested epochs and of five rates; random rows keep their
    hard labels beside sets with soft ones, where it lets a teacher label them.
    """
    table: Table = [("data, net", "images a class", "selection", "HLR", "IOR", "LRS")]
    for one in collect(lines):
        if one.whole:
            table += sorted(score(one), key=lambda row: int(row[1]))
    return grid(table)


def score(one: Found) -> Iterator[tuple[str, ...]]:
    """Give the rows of `scores` of one net."""
    whole = float(draw_means(one.whole).mean())
    for (name, n), values in one.values.items():
        options, base = one.selections[name], one.values.get((BASELINE, n))
        if name == BASELINE or base is None or not is_plain(options) or name.endswith(AS_HARD):
            continue
        is_soft = any(line.get("labels") == "soft" for line in one.lines[name, n])
        hard = one.values.get((name + AS_HARD, n)) if is_soft else values
        if hard is None:
            continue
        recovery = {cell: whole - value for cell, value in hard.items()}
        gain = subtract(values, base, False, False)
        both = {cell: rank(gain[cell], recovery[cell]) for cell in gain if cell in recovery}
        shown = [show(estimate(x)) for x in (recovery, gain)]
        yield one.name, str(n), name, *shown, show(estimate(both), digits=3)


def package_scores(document: Mapping[str, Any]) -> str:
    """Lay out what eval/dd_ranking.py measured."""
    table: Table = [("images a class", "selection", "HLR", "IOR", "LRS")]
    for line in document["lines"]:
        each = {key: [score[key] for score in line["scores"]] for key in ("hlr", "ior", "lrs")}
        found = {
            key: estimate({(draw, 0): value for draw, value in enumerate(values)})
            for key, values in each.items()
        }
        shown = (show(found["hlr"]), show(found["ior"]), show(found["lrs"], digits=3))
        table.append((str(line["images_per_class"]), line["selection"], *shown))
    return grid(table)


def rank(improvement: float, recovery: float, share: float = SHARE_OF_IOR) -> float:
    """Give the label-robust score of an IOR and an HLR in percent: see `scores`."""
    alpha = (share * improvement - (1 - share) * recovery) / 100
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def show(found: Estimate | None, sign: str = "", digits: int = 1) -> str:
    """Write a mean with its interval, where there is one."""
    if found is None:
        return ""
    shown = f"{found.mean:{sign}.{digits}f}"
    if found.interval is None:
        return shown
    low, high = (f"{value:{sign}.{digits}f}" for value in found.interval)
    return f"{shown} [{low}, {high}]"
