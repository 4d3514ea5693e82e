"""Loads the stand-alone scripts of eval/ as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EVAL = Path(__file__).resolve().parents[1] / "eval"


def load_script(name: str) -> ModuleType:
    """Load eval/NAME.py (or a path below eval/), which finds its neighbours as when it is run."""
    if str(EVAL) not in sys.path:
        sys.path.append(str(EVAL))
    path = EVAL / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"eval_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
