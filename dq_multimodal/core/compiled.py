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
    return _compile(loop)


def compile_float_loop(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop, as `compile_loop` does, whose sums of floats may be made in any order."""
    return _compile(loop, fastmath={"reassoc", "contract", "nsz", "nnan"})


def _compile(loop: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    import numba

    try:
        return numba.njit(nogil=True, cache=True, **options)(loop)
    except RuntimeError:  # neither folder can be written
        return numba.njit(nogil=True, **options)(loop)
