"""Imports flow down: core <- adapters <- run, pipeline <- hub <- cli <- recipes, eval."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dq_multimodal"

LEVELS = [
    {"config"},
    {"byte_sizes", "messages", "row_sizes"},
    {"options", "summary", "row_files", "markdown"},
    {
        *("core", "world", "atomic", "splits"),
        *("listing", "pinned_files", "text_tables"),
    },
    {"model_source", "launch", "documents"},
    {"vision"},
    {"adapters", "patches"},
    {"stream"},
    {"local_data", "batches", "shares", "marks", "language_rows", "repeats"},
    {"source", "ordering"},
    {"patch_records"},
    {"embedding", "selection", "subset", "patching", "card_parts"},
    {"targeting"},
    {"scoring", "report", "card"},
    {"folder", "memory"},
    {"run"},
    {"preparation"},
    {"resampling", "probes"},
    {"pipeline", "report_probes", "assisting"},
    {"planning"},
    {"hub", "verification"},
    {"training"},
    {"cli"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FACADE = {("run", "hub"), ("run", "resampling")}
"""Run.push_to_hub and Run.resample hand over to the levels above."""
CORE_MAY_IMPORT = {
    *("contextlib", "numpy", "jaxtyping", "torch", "threadpoolctl", "numba"),
    *("collections", "concurrent", "dataclasses", "functools", "heapq", "itertools", "math", "os"),
    *("threading", "typing", "weakref"),
}


def imports(path):
    """Give the dotted names that a file imports, at any depth; type-only imports do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            if node.module == "dq_multimodal":
                yield from (f"dq_multimodal.{alias.name}" for alias in node.names)
            else:
                yield node.module


def home(dotted):
    return dotted.split(".")[1] if "." in dotted else ""


def files():
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_down(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in LEVEL, f"{own} has no level: give it one"
    for dotted in imports(path):
        if not dotted.startswith("dq_multimodal"):
            continue
        other = home(dotted)
        if other in ("", own) or other not in LEVEL:  # the package's own names
            assert other in ("", own, "__version__"), f"{path}: {dotted}"
            continue
        assert LEVEL[other] < LEVEL[own] or (own, other) in FACADE, f"{own} imports {other}"


def test_every_module_has_a_level():
    assert {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()} - set(LEVEL) <= {
        "__init__",
        "__pycache__",
    }


def test_core_is_arrays_only():
    for path in (PACKAGE / "core").glob("*.py"):
        for dotted in imports(path):
            top = dotted.split(".")[0]
            is_own = dotted.startswith(("dq_multimodal.core", "dq_multimodal.config"))
            assert is_own or top in CORE_MAY_IMPORT, f"{path.name}: {dotted}"


@pytest.mark.parametrize("folder", ["recipes", "eval"])
def test_recipes_and_eval_use_the_package_never_each_other(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for dotted in imports(path):
            assert dotted.split(".")[0] not in ("recipes", "eval", "tests"), f"{path}: {dotted}"


def test_files_stay_short():
    for folder in ("dq_multimodal", "recipes", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 600, path


def test_config_needs_the_standard_library_only():
    assert set(imports(PACKAGE / "config.py")) <= {"math", "numbers", "os", "dataclasses", "typing"}
