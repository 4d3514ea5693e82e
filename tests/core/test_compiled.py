"""compile_loop: compiled once, at the first call, and where no cache can be written too."""

import subprocess
import sys
from typing import no_type_check

import numba

from dq_multimodal.core.compiled import compile_loop


@no_type_check
def count(n):
    total = 0
    for i in range(n):
        total += i
    return total


def test_a_loop_is_compiled_once():
    assert compile_loop(count)(10) == 45
    assert compile_loop(count) is compile_loop(count)
    assert compile_loop(count).signatures


def test_no_folder_for_the_cache(monkeypatch):
    asked, njit = [], numba.njit

    def refuse(**options):
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuse)
    assert compile_loop.__wrapped__(count)(5) == 10
    assert asked == [{"nogil": True, "cache": True}, {"nogil": True}]


def test_importing_the_core_loads_no_numba():
    code = "import sys, dq_multimodal.core; print({'numba', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
