"""A suite: one YAML file that says which selections are compared on which data, and how.

    decides: The question that this suite answers.
    tasks:        # optional: data beside that of eval/datasets.yaml
    protocols:    # optional: settings beside those of eval/protocols.yaml
    selections:   # name: options of `compress`, or a row list, or by_length
    compare:      # groups of cells, in the order of worth

A selection may have keys of its own beside the options of `compress`: `use_weights` (loss, sample
or none: what becomes of the weights of its rows, by default of their losses), `by_class: false`
(random rows whatever their labels), `row_list` with `where` (see `read_row_list`), `by_length:
true` (the rows with the longest responses), and `same_bytes_as: NAME` (as many rows of its order as
take no more bytes than that selection at the same size and draw). `target: task` stands for the
target rows of the task. An entry of tasks or protocols may say `like: NAME` and change some of that
one.

A selection that says `condense: dm` is a synthetic set, with options of `condense` (dm is its
method): of the size asked, or with `images_per_class` of its own the first images of the set of
that size. With `use_soft: false` it is trained by its classes where it has learnt labels.

A cell is one training run: a task, a selection with a keep ratio (or images a class) and a draw, a
protocol, a net and a training seed.
"""

import importlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_type_hints

import numpy as np
import yaml

from dq_multimodal.config import InputError
from dq_multimodal.manifest import check_type
from dq_multimodal.options import Check, check_count, in_range, is_number

EVAL = Path(__file__).resolve().parent.parent
BASELINE = "random"
"""The selection with which all others are compared."""
SEEDS_APART = 1000
TRAINERS = {"image": "images", "text": "text", "probe": "probe", "vqa": "vqa"}
"""Module of each trainer, in this folder."""
FITTING = {"image": ("image", "probe"), "text": ("text", "probe"), "image-text": ("vqa",)}
"""Kinds of tasks, and the trainers for each."""
PER_CLASS = " a class"
"""What `keep` ends with where it is a number of images of each class."""
Entries = dict[str, dict[str, Any]]


class Group(TypedDict):
    """An entry of `compare`."""

    task: str
    protocol: str
    nets: list[str]
    keep_ratios: NotRequired[list[Any]]
    images_per_class: NotRequired[list[int]]
    selections: list[str]
    draws: NotRequired[int]
    seeds: NotRequired[int]


class Document(TypedDict):
    """What a suite file holds."""

    decides: str
    tasks: NotRequired[Entries]
    protocols: NotRequired[Entries]
    selections: Entries
    compare: list[Group]


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        task: Name of the data.
        selection: Name of the selection.
        keep: Share of the rows in (0, 1], or the name of a row list, whose number of rows is kept,
            or "10 a class".
        protocol: Name of the training settings.
        net: Name of the model that is trained.
        draw: Number of the draw of the rows, from 0.
        seed: Number of the training seed within the draw, from 0.
        is_fixed: Whether neither draw nor seed changes the result.
    """

    task: str
    selection: str
    keep: float | str
    protocol: str
    net: str
    draw: int
    seed: int
    is_fixed: bool = False

    @property
    def training_seed(self) -> int:
        """Seed of the weights and batches: the same for all selections of a pair."""
        return SEEDS_APART * self.seed + self.draw


@dataclass(frozen=True)
class Job:
    """What a trainer needs to know of a cell.

    Attributes:
        task: Name of the data in the bundle.
        protocol: Settings, of the type `Protocol` of the trainer.
        net: Name of the model.
        rows: Positions of the kept rows in the packed training rows, (k,) int64.
        keep_ratio: Share of the rows, in (0, 1].
        seed: Training seed.
        weights: Weight of each row, (k,), mean 1; None is equal weights.
        is_sampled: Whether they are chances of rows to be in a batch, and not factors of losses.
        is_soft: Whether the targets are the labels that were learnt with the images.
    """

    task: str
    protocol: Any
    net: str
    rows: np.ndarray
    keep_ratio: float
    seed: int
    weights: np.ndarray | None = None
    is_sampled: bool = False
    is_soft: bool = False


@dataclass(frozen=True)
class Suite:
    """A suite that has been read and checked; `settings` and `protocols` are by protocol name."""

    name: str
    decides: str
    tasks: Entries
    selections: Entries
    settings: Entries
    cells: list[Cell] = field(repr=False)

    def protocol(self, name: str) -> Any:
        """Build the settings of a protocol for its trainer."""
        settings = dict(self.settings[name])
        try:
            return trainer_of(settings.pop("trainer", None)).Protocol(**settings)
        except (InputError, TypeError) as error:
            raise InputError(f"protocol {name}: {error}") from None

    def draw_seed(self, selection: str, draw: int) -> int:
        """Give the seed of a draw: every selection has its own, so that no two share a hash."""
        return zlib.crc32(selection.encode()) % SEEDS_APART * SEEDS_APART + draw


def trainer_of(name: Any) -> Any:
    """Give the module that trains the cells of a protocol."""
    if name not in TRAINERS:
        raise InputError(f"trainer must be one of {', '.join(TRAINERS)}, got {name!r}")
    return importlib.import_module(f"harness.{TRAINERS[name]}")


def find_suite(name: str) -> Path:
    """Give the file of a suite, of which the name in eval/suites or the path is given.

    Raises:
        InputError: If there is none.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        path = EVAL / "suites" / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in (EVAL / "suites").glob("*.yaml")))
        raise InputError(f"no suite {name}: wanted a .yaml file or one of {there}")
    return path


def results_of(name: str) -> Path:
    """Give the results file of a suite.

    Raises:
        InputError: If it is that of another suite, of the same name, in eval/suites.
    """
    path = find_suite(name)
    known = EVAL / "suites" / path.name
    if known.is_file() and not known.samefile(path):
        raise InputError(f"name a file with --results: {path} is another suite than {known}")
    return EVAL / "results" / f"{path.stem}.jsonl"


def read_suite(name: str) -> Suite:
    """Read a suite by its name in eval/suites, or by the path of its file.

    Raises:
        InputError: If there is none, or it is not as described above.
    """
    path = find_suite(name)
    found = _read_yaml(path)
    _check(path.name, found, Document)
    tasks, settings = (
        resolve(what, _read_yaml(EVAL / file) | found.get(what, {}))
        for what, file in (("tasks", "datasets.yaml"), ("protocols", "protocols.yaml"))
    )
    decides, selections = found["decides"].strip(), found["selections"]
    suite = Suite(path.stem, decides, tasks, selections, settings, [])
    cells = [c for k, group in enumerate(found["compare"]) for c in _cells_of(k, group, suite)]
    suite.cells.extend(dict.fromkeys(cells))
    return suite


def resolve(what: str, found: Entries) -> Entries:
    """Fill every entry that says `like: NAME` with what that one says."""

    def fill(name: Any, seen: tuple[str, ...] = ()) -> dict[str, Any]:
        if not isinstance(name, str) or name not in found or name in seen:
            raise InputError(f"{what}: no {name} with keys of its own among {', '.join(found)}")
        own = dict(found[name])
        base = own.pop("like", None)
        return own if base is None else fill(base, (*seen, name)) | own

    return {name: fill(name) for name in found}


def _cells_of(number: int, group: Group, suite: Suite) -> Iterator[Cell]:
    """Give the cells of a group: one draw of everything after the other."""
    where, task, protocol = f"compare[{number}]", group.get("task"), group.get("protocol")
    _check(where, group, Group)
    known = {"task": suite.tasks, "protocol": suite.settings, "selection": suite.selections}
    asked = [("task", task), ("protocol", protocol)]
    for what, name in (*asked, *(("selection", name) for name in group["selections"])):
        if name not in known[what]:
            raise InputError(f"{where}: no {what} {name}: there are {', '.join(known[what])}")
    counts = {what: group.get(what, 1) for what in ("draws", "seeds")}
    for what, count in counts.items():
        if not 1 <= count <= SEEDS_APART:
            raise InputError(f"{where}.{what} must be 1 to {SEEDS_APART:,}, got {count}")
    keeps = [*_keeps_of(where, group, suite.selections)]
    suite.protocol(protocol)
    kind, trainer = suite.tasks[task].get("kind"), suite.settings[protocol]["trainer"]
    if kind not in FITTING:
        raise InputError(f"task {task}: kind must be one of {', '.join(FITTING)}, got {kind!r}")
    if trainer not in FITTING[kind]:
        raise InputError(f"protocol {protocol} is for {trainer}, and task {task} is of {kind}")
    for name in group["selections"]:
        if "condense" in suite.selections[name] and trainer != "image":
            raise InputError(f"{where}: {name} is condensed, and protocol {protocol} is no image's")
    order = (*map(range, counts.values()), keeps, group["selections"], group["nets"])
    for draw, seed, keep, selection, net in product(*order):
        is_same = keep == 1 or is_same_rows(selection, suite.selections[selection], keep)
        is_fixed = trainer == "probe" and is_same
        if not is_fixed or draw == seed == 0:
            yield Cell(task, selection, keep, protocol, net, draw, seed, is_fixed)


def _keeps_of(where: str, group: Group, selections: Entries) -> Iterator[float | str]:
    """Give the sizes of a group as cells have them."""
    if ("keep_ratios" in group) == ("images_per_class" in group):
        raise InputError(f"{where}: wanted keep_ratios or images_per_class")
    for keep in group.get("keep_ratios", []):
        is_list = isinstance(keep, str) and "row_list" in selections.get(keep, {})
        if not is_list and not (is_number(keep) and 0 < keep <= 1):
            raise InputError(f"keep_ratios must lie in (0, 1] or name a row list, got {keep}")
        yield keep if isinstance(keep, str) else float(keep)
    own = {name: selections[name] for name in group["selections"] if "condense" in selections[name]}
    if own and "keep_ratios" in group:
        raise InputError(f"{where}: {', '.join(own)} is condensed: wanted images_per_class")
    for n_images in group.get("images_per_class", []):
        check_count("images_per_class", n_images)
        for name, options in own.items():
            if (most := options.get("images_per_class", n_images)) < n_images:
                raise InputError(f"{where}: {name} has {most} images a class, asked for {n_images}")
        yield f"{n_images}{PER_CLASS}"


def images_of(keep: float | str) -> int | None:
    """Give the images of each class that `keep` stands for; None where it is something else."""
    number, mark, rest = str(keep).partition(PER_CLASS)
    return int(number) if mark and not rest and number.isdecimal() else None


def is_same_rows(name: str, options: dict[str, Any], keep: float | str) -> bool:
    """Say whether a selection takes the same rows in every draw."""
    if "row_list" in options:
        return keep == name
    method = options.get("method")
    return (
        "by_length" in options
        or method in ("graphcut", "coverage")
        or (method in ("dq", "adq") and options.get("draw") == "rank")
    )


def _check(name: str, found: Any, kind: Any) -> None:
    """Raise unless what was read has the types of a TypedDict, no other keys and nothing empty."""
    check_type(name, found, kind)
    known = get_type_hints(kind)
    if strange := sorted(set(found) - set(known)):
        raise InputError(f"{name}: no key {', '.join(strange)}; keys are {', '.join(known)}")
    for key, value in found.items():
        if value in ([], {}) or not str(value).strip():
            raise InputError(f"{name}.{key} must not be empty")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold keys and values")
    return found


def by_ratio(check: Check) -> Check:
    """Make a check for a setting that may go by keep ratio, with keys that rise up to 1."""

    def check_all(name: str, value: Any) -> None:
        steps = value if isinstance(value, dict) else {1.0: value}
        ratios = list(steps)
        if not all(map(is_number, ratios)) or sorted(ratios) != ratios or ratios[-1:] != [1.0]:
            raise InputError(f"{name} by keep ratio must have rising keys up to 1.0, got {ratios}")
        for one in steps.values():
            check(name, one)

    return check_all


ABOVE_0, SHARE = in_range("(0, inf)"), in_range("[0, 1)")
AMOUNTS, COUNTS = by_ratio(ABOVE_0), by_ratio(check_count)


def at_ratio(value: Any, keep_ratio: float) -> Any:
    """Give a setting at a keep ratio: the value of the first key that is at least as high."""
    if not isinstance(value, dict):
        return value
    return next(one for ratio, one in value.items() if keep_ratio <= ratio + 1e-9)
