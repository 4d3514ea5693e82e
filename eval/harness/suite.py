"""A suite: one YAML file that says which selections are compared on which data, and how.

    decides: The question that this suite answers.
    tasks:        # optional: data beside that of eval/datasets.yaml
    protocols:    # optional: settings beside those of eval/protocols.yaml
    selections:   # name: options of `compress`, or a row list
    compare:      # groups of cells, in the order of worth

An entry of tasks or protocols may say `like: NAME` and change some of that one.

A cell is one training run: a task, a selection with a keep ratio and a draw, a protocol, a net and
a training seed.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dq_multimodal.config import InputError

EVAL = Path(__file__).resolve().parent.parent
BASELINE = "random"
"""The selection with which all others are compared."""
PARTS = {"decides", "tasks", "selections", "protocols", "compare"}
GROUP = {"task", "protocol", "nets", "keep_ratios", "selections", "draws", "seeds"}
SEEDS_APART = 1000


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        task: Name of the data.
        selection: Name of the selection.
        keep: Share of the rows in (0, 1], or the name of a row list, whose number of rows is kept.
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
        weights: Weight of each row in the loss, (k,), mean 1; None is equal weights.
    """

    task: str
    protocol: Any
    net: str
    rows: np.ndarray
    keep_ratio: float
    seed: int
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Suite:
    """A suite that has been read and checked; `settings` and `protocols` are by protocol name."""

    name: str
    decides: str
    tasks: dict[str, dict[str, Any]]
    selections: dict[str, dict[str, Any]]
    settings: dict[str, dict[str, Any]]
    cells: list[Cell] = field(repr=False)

    def protocol(self, name: str) -> Any:
        """Build the settings of a protocol for its trainer."""
        settings = dict(self.settings[name])
        module = trainer_of(settings.pop("trainer"))
        try:
            return module.Protocol(**settings)
        except TypeError as error:
            raise InputError(f"protocol {name}: {error}") from None

    def draw_seed(self, selection: str, draw: int) -> int:
        """Give the seed of a draw: every selection has its own, so that no two share a hash."""
        return zlib.crc32(selection.encode()) % SEEDS_APART * SEEDS_APART + draw


def trainer_of(name: str) -> Any:
    """Give the module that trains the cells of a protocol."""
    if name == "image":
        from harness import images

        return images
    if name == "text":
        from harness import text

        return text
    if name == "probe":
        from harness import probe

        return probe
    raise InputError(f"trainer must be image, text or probe, got {name!r}")


def read_suite(name: str) -> Suite:
    """Read a suite by its name in eval/suites, or by the path of its file.

    Raises:
        InputError: If there is none, or it is not as described above.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        path = EVAL / "suites" / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in (EVAL / "suites").glob("*.yaml")))
        raise InputError(f"no suite {name}: wanted a .yaml file or one of {there}")
    found = _read_yaml(path)
    _check_keys(path.name, found, PARTS, PARTS - {"protocols", "tasks"})
    tasks, settings = (
        resolve(what, _read_yaml(EVAL / file) | (found.get(what) or {}))
        for what, file in (("tasks", "datasets.yaml"), ("protocols", "protocols.yaml"))
    )
    decides, selections = found["decides"].strip(), found["selections"]
    suite = Suite(path.stem, decides, tasks, selections, settings, [])
    cells = [cell for group in found["compare"] for cell in _cells_of(group, suite)]
    suite.cells.extend(dict.fromkeys(cells))
    for protocol in {cell.protocol for cell in cells}:
        suite.protocol(protocol)
    return suite


def resolve(what: str, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fill every entry that says `like: NAME` with what that one says."""

    def fill(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
        if name not in found or name in seen or not isinstance(found[name], dict):
            raise InputError(f"{what}: no {name} with keys of its own among {', '.join(found)}")
        own = dict(found[name])
        base = own.pop("like", None)
        return own if base is None else fill(base, (*seen, name)) | own

    return {name: fill(name) for name in found}


def _cells_of(group: dict[str, Any], suite: Suite) -> Iterator[Cell]:
    """Give the cells of a group: one draw of everything after the other."""
    _check_keys("compare", group, GROUP, GROUP - {"draws", "seeds"})
    known = {"task": suite.tasks, "protocol": suite.settings}
    for key, names in known.items():
        if group[key] not in names:
            raise InputError(f"no {key} {group[key]}: there are {', '.join(names)}")
    for name in group["selections"]:
        if name not in suite.selections:
            raise InputError(f"no selection {name}: there are {', '.join(suite.selections)}")
    for keep in group["keep_ratios"]:
        is_ratio = isinstance(keep, int | float) and 0 < keep <= 1
        if not is_ratio and "row_list" not in suite.selections.get(str(keep), {}):
            raise InputError(f"keep_ratios must lie in (0, 1] or name a row list, got {keep}")
    is_convex = suite.settings[group["protocol"]].get("trainer") == "probe"
    counts = (range(group.get("draws", 1)), range(group.get("seeds", 1)))
    order = (*counts, group["keep_ratios"], group["selections"], group["nets"])
    for draw, seed, keep, selection, net in product(*order):
        is_fixed = is_convex and (keep == 1 or is_same_rows(suite.selections[selection], keep))
        if not is_fixed or draw == seed == 0:
            place = (group["task"], selection, keep, group["protocol"])
            yield Cell(*place, net, draw, seed, is_fixed)


def is_same_rows(options: dict[str, Any], keep: float | str) -> bool:
    """Say whether a selection takes the same rows in every draw."""
    if "row_list" in options:
        return isinstance(keep, str)
    return options.get("method") == "graphcut" or options.get("draw") == "rank"


def _check_keys(what: str, found: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(found, dict):
        raise InputError(f"{what}: wanted keys {', '.join(sorted(known))}, got {found!r}")
    strange, missing = set(found) - known, needed - set(found)
    if strange or missing:
        said = [f"no key {name}" for name in sorted(strange)]
        said += [f"{name} is missing" for name in sorted(missing)]
        raise InputError(f"{what}: {', '.join(said)}; keys are {', '.join(sorted(known))}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold keys and values")
    return found
