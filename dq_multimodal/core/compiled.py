"""Loops that numba compiles; it is imported when the first of them runs, not before."""

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def compile_loop(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over arrays, once; it runs without the interpreter's lock.

    The machine code is kept beside the source or in the user's cache folder, where one of them can
    be written, so that later processes need not compile again.

    Args:
        loop: A module's function, marked `no_type_check`, so that no wrapper hides it.
    """
    import numba

    try:
        return numba.njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # neither folder can be written
        return numba.njit(nogil=True)(loop)
