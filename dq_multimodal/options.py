"""What an option is: a field of a config, with its help and check. Standard library only.

From the fields follow the flags of the command line and of the recipes (`add_options`), and the
signatures and docstrings of the functions that take them (`takes`). The options are in config.py.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, fields
from functools import partial
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, get_args, get_origin

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
First = TypeVar("First")
Check = Callable[[str, Any], object]
"""Takes the name of an option and a value, and raises InputError unless the value is a good one."""
NEEDED: Any = MISSING
"""The default of an option that has none."""


class InputError(ValueError):
    """Wrong use or bad input: the message is one clear line for the user."""


def is_number(value: Any) -> bool:
    """Say whether a value is a finite number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def in_range(interval: str) -> Check:
    """Make a check for numbers in an interval such as "(0, 1]"."""
    low, high = map(float, interval[1:-1].split(","))
    ends = {end for end, sign in ((low, interval[0]), (high, interval[-1])) if sign in "()"}

    def check(name: str, value: Any) -> None:
        if not is_number(value) or not low <= value <= high or value in ends:
            hint = " (write 0.2 for 20 %)" if "%" in str(value) else ""
            raise InputError(f"{name} must lie in {interval}, got {value!r}{hint}")

    return check


def whole_number(low: int, high: int = 2**63 - 1) -> Check:
    """Make a check for whole numbers from low to high."""
    wanted = f"of at least {low}" if high == 2**63 - 1 else f"from {low} to {high}"

    def check(name: str, value: Any) -> None:
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or not low <= int(value) <= high:
            raise InputError(f"{name} must be a whole number {wanted}, got {value!r}")

    return check


check_share, check_count = in_range("(0, 1]"), whole_number(1)


def check_seed(name: str, value: Any) -> None:
    """Raise unless the value is a whole number; it is used modulo 2^64."""
    if not isinstance(value, Integral) or isinstance(value, bool) or abs(int(value)) >= 2**1000:
        raise InputError(f"{name} must be a whole number, got {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise unless the value is one of the names of a Literal type."""
    if value not in get_args(choices):
        raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def option(
    group: str,
    default: T,
    help: str,
    check: Check | None = None,
    *,
    metavar: str | None = None,
    bare: Any = None,
    old_name: str | None = None,
    is_recorded: bool = True,
) -> T:
    """Declare a field that is an option.

    The group, the help and the metavar (None takes it from the type or the name) are those of
    --help. The check is what values must meet beside their type; bare is what the flag stands for
    without a value, old_name its name in the release before, which still works. What is recorded
    stands in config.yaml: it decides what comes out.
    """
    return dataclasses.field(default=default, metadata=locals())


@dataclass(frozen=True)
class Request:
    """Fields that are options; a value that is wrong raises InputError when it is set."""

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _settle(each, getattr(self, each.name)))

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """Make a request of what a user asked for, by the names of this release or the last.

        Raises:
            InputError: For an option that is not there, naming the nearest one, or a wrong value.
        """
        options = rename(cls, options, is_told=True)
        known = {each.name for each in fields(cls)}
        for name in options.keys() - known:
            raise InputError(f"there is no option {name}{suggest(name, known)}")
        return cls(**options)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from `as_dict`, which may come from a file of anybody.

        Raises:
            InputError: If a setting is unknown to this release, missing, or wrong.
        """
        values = rename(cls, values)
        unknown = sorted(map(str, values.keys() - set(cls.recorded())))
        if unknown:
            raise InputError(f"settings this release does not know: {', '.join(unknown)}")
        for each in fields(cls):
            if each.default is NEEDED and each.name not in values:
                raise InputError(f"the setting {each.name} is missing")
        return cls(**values)

    @classmethod
    def recorded(cls) -> list[str]:
        """Give the names of the options that stand in config.yaml."""
        return [each.name for each in fields(cls) if each.metadata["is_recorded"]]

    def as_dict(self) -> dict[str, Any]:
        """Give the recorded settings as plain values that YAML can hold."""
        found = {name: getattr(self, name) for name in self.recorded()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def kind_of(each: Field) -> Any:
    """Give the type of an option without None; it is Any where several are left."""
    if get_origin(each.type) is Literal or type(None) not in get_args(each.type):
        return each.type
    kinds = [part for part in get_args(each.type) if part is not type(None)]
    return kinds[0] if len(kinds) == 1 else Any


def _settle(each: Field, value: Any) -> Any:
    """Check a value, and make paths and numbers of NumPy plain ones.

    Raises:
        InputError: If it is of another type, or out of range.
    """
    name, kind = each.name, kind_of(each)
    if value is None and kind is not each.type:
        return None
    if each.metadata["check"] is not None:
        each.metadata["check"](name, value)
    if get_origin(kind) is Literal:
        check_choice(name, value, kind)
        return value
    is_list = isinstance(value, list | tuple) and len(value) > 0
    readers: dict[Any, tuple[str, bool, Callable[[Any], Any]]] = {
        int: ("", True, int),  # its check has seen to it
        float: ("a number", is_number(value), float),
        bool: ("true or false", isinstance(value, bool), bool),
        str: ("a name or a path", isinstance(value, str | PathLike), fspath),
        tuple: ("a list of names", is_list and all(isinstance(v, str) for v in value), tuple),
    }
    wanted, is_good, read = readers.get(get_origin(kind) or kind, ("", True, lambda x: x))
    if not is_good:
        raise InputError(f"{name} must be {wanted}, got {value!r:.200}")
    return read(value)


def rename(config: Any, options: dict[str, Any], *, is_told: bool = False) -> dict[str, Any]:
    """Give options by their new names, and say so on stderr if is_told.

    Raises:
        InputError: If one has both names.
    """
    names = {each.metadata["old_name"]: each.name for each in fields(config)}
    new_names = {old: new for old, new in names.items() if old is not None}
    for old in options.keys() & new_names.keys():
        if new_names[old] in options:
            raise InputError(f"{old} is the old name of {new_names[old]}: leave it out")
        if is_told:
            told = f"note: {old} is now {new_names[old]}; the old name goes with the next release"
            print(told, file=sys.stderr, flush=True)  # noqa: T201
    return {new_names.get(name, name): value for name, value in options.items()}


def suggest(name: str, known: Collection[str]) -> str:
    """Give the end of a message that names what is most like a wrong name, if anything is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def help_of(each: Field, default: Any) -> str:
    """Give the help of an option with its default, as argparse takes it."""
    is_shown = default not in (None, NEEDED) and not isinstance(default, bool)
    words = ",".join(default) if isinstance(default, tuple) else default
    shown = f"  [default: {words}]" if is_shown else ""
    return f"{each.metadata['help']}{shown}".replace("%", "%%")


def metavar_of(each: Field) -> str:
    """Give what --help calls the value of an option."""
    kind, name = kind_of(each), each.name.split("_")[-1].upper()
    choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else None
    return each.metadata["metavar"] or choices or name


class Help(argparse.HelpFormatter):
    """The layout of --help; a flag is shown with_this spelling alone where it has-this too."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = action.option_strings
        known = {flag.lstrip("-").replace("-", "_"): flag for flag in reversed(flags)}
        action.option_strings = list(reversed(known.values()))
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = flags


def add_options(
    parser: argparse.ArgumentParser, config: Any, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """Give a parser the options of a config as flags, in groups; only flags that are set come out.

    Returns:
        The groups, by name.
    """
    groups: dict[str, Any] = {}
    for each in (each for each in fields(config) if each.name not in leave_out):
        about, kind = each.metadata, kind_of(each)
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        group, flag = groups[about["group"]], f"--{each.name.replace('_', '-')}"
        how: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS}
        if each.default is NEEDED:
            flag, how = each.name, {"metavar": each.name.upper()}
        elif kind is bool:
            how["action"] = argparse.BooleanOptionalAction if each.default else "store_true"
        else:
            how |= {"type": partial(_read, kind), "metavar": metavar_of(each)}
        if about["bare"] is not None:
            how |= {"nargs": "?", "const": about["bare"]}
        group.add_argument(flag, help=help_of(each, each.default), **how)
        if about["old_name"] is not None:
            how |= {"dest": about["old_name"], "help": argparse.SUPPRESS}
            group.add_argument(f"--{about['old_name']}", **how)
    return groups


def _read(kind: Any, text: str) -> Any:
    """Read the text of a flag; what cannot be read goes to the checks as it is."""
    if get_origin(kind) is tuple:
        return tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def describe(options: Collection[Field]) -> str:
    """Give the entries of options as docstrings have them."""
    texts = [f"{each.name}: {' '.join(each.metadata['help'].split())}" for each in options]
    wrap = partial(textwrap.wrap, width=96, initial_indent=" " * 4, subsequent_indent=" " * 8)
    return "\n".join(line for text in texts for line in wrap(text))


def takes(
    config: Callable[Concatenate[Any, P], Any], *leave_out: str
) -> Callable[[Callable[Concatenate[First, ...], R]], Callable[Concatenate[First, P], R]]:
    """Let signature and docstring of a function show the options that it takes after its first."""

    def decorate(
        function: Callable[Concatenate[First, ...], R],
    ) -> Callable[Concatenate[First, P], R]:
        signature: Any = inspect.signature(function)
        first = next(iter(signature.parameters.values()))
        found = {each.name: each for each in fields(config)}  # type: ignore[arg-type]
        known = inspect.signature(config).parameters.values()
        left = [p for p in known if p.default is not p.empty and p.name not in leave_out]
        function.__signature__ = signature.replace(parameters=[first, *left])  # type: ignore[attr-defined]
        doc, args, more = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
        own, gap, rest = more.partition("\n\n")
        entries = describe([found[p.name] for p in left])
        function.__doc__ = f"{doc}{args}{own.rstrip()}\n{entries}{gap}{rest}"
        return function

    return decorate
