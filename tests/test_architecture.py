"""Imports go down the floors, and nowhere in a circle; the map is in docs/contributing.md."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dq_multimodal"

FLOORS = [
    {"config", "options", "files", "manifest"},
    {"core"},
    {"data", "models", "adapters", "patches"},
    {"stages"},
    {"card", "folder", "hub", "report", "run"},
    {"pipeline", "verification", "planning", "distributed"},
    {"cli", "condensation", "training"},
]
"""Everyone may read the first; then there are six. What is on one floor may import each other."""
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
APART = {("adapters", "patches"), ("patches", "adapters"), ("cli", "training")}
MAX_MODULES = 12
CORE_MAY_IMPORT = {
    *("contextlib", "numpy", "jaxtyping", "torch", "threadpoolctl", "numba"),
    *("collections", "concurrent", "dataclasses", "functools", "heapq", "itertools", "math", "os"),
    *("threading", "typing", "weakref"),
}


def files_of(folder):
    """Give the Python files of a folder, at any depth; there are some."""
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


def modules():
    """Give every module of the package with its file."""
    found = {}
    for path in files_of(PACKAGE):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]
    return found


MODULES = modules()


def imports(path):
    """Give the dotted names that a file imports, at any depth, for types included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path):
    """Give the modules of the package that a file imports."""
    for dotted in imports(path):
        head, _, rest = dotted.partition(".")
        if head != "dq_multimodal":
            continue
        if rest not in MODULES:
            rest = rest.rpartition(".")[0]
        if rest:
            yield rest


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    own = name if name in FLOOR else name.split(".")[0]
    for other in own_imports(MODULES[name]):
        top = other.split(".")[0]
        assert FLOOR[top] <= FLOOR[own], f"{name} imports {other}"
        assert (own, top) not in APART, f"{name} imports {other}"


def test_no_circles():
    """Within a module only; of a package, its own __init__ is a module like any other."""
    graph = {name: set(own_imports(path)) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_every_module_has_a_floor():
    tops = {name.split(".")[0] for name in MODULES}
    assert tops == {name.split(".")[0] for name in FLOOR}
    assert {name for pair in APART for name in pair} <= tops
    assert len([name for name in tops if (PACKAGE / f"{name}.py").exists()]) <= MAX_MODULES


def test_core_is_arrays_only():
    for path in files_of(PACKAGE / "core"):
        for dotted in imports(path):
            top = dotted.split(".")[0]
            is_own = dotted.startswith(("dq_multimodal.core", "dq_multimodal.config"))
            assert is_own or top in CORE_MAY_IMPORT, f"{path.name}: {dotted}"


@pytest.mark.parametrize("folder", ["recipes", "eval"])
def test_recipes_and_eval_use_the_package_never_each_other(folder):
    for path in files_of(ROOT / folder):
        for dotted in imports(path):
            assert dotted.split(".")[0] not in ("recipes", "eval", "tests"), f"{path}: {dotted}"


def test_files_stay_short():
    for folder in ("dq_multimodal", "recipes", "eval"):
        for path in files_of(ROOT / folder):
            assert len(path.read_text().splitlines()) <= 600, path


def test_options_need_the_standard_library_only():
    for module in ("config", "options", "condensation/config"):
        names = {dotted.split(".")[0] for dotted in imports(PACKAGE / f"{module}.py")}
        assert names - {"dq_multimodal"} <= sys.stdlib_module_names
        assert set(own_imports(PACKAGE / f"{module}.py")) <= {"config", "options"}
