"""Flags of the recipes, from the options of compress() and from YAML files."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_origin

from dq_multimodal.config import CompressConfig, InputError
from dq_multimodal.options import Help, help_of, kind_of, metavar_of

if TYPE_CHECKING:
    from dq_multimodal.data.source import Source

FLAGS = {
    "dataset": "dataset_name",
    "config_name": "dataset_config_name",
    "revision": "dataset_revision",
    "split": "dataset_split",
    "seed": "selection_seed",
    "dtype": "embedding_dtype",
}
"""Flags that have other names than their options: a recipe has more than one split and seed."""
SOURCE = ("dataset", "split", "config_name", "revision")
"""Options that name the rows."""
OLD_FLAGS = {
    "embedding": "image_embedding",
    "embeddings": "ready_embeddings",
    "test_dataset_name": "eval_dataset_name",
    "test_split": "eval_split",
}
"""Names of flags in the release before."""
LAST_SECONDS = 5.0
"""So long other processes wait before they say what rank 0 has said, or the launcher ends them."""


def flags_of(*names: str, config: Any = CompressConfig, **defaults: Any) -> Any:
    """Make a dataclass to inherit from: its fields are options of compress() as recipes have them.

    Its OPTIONS names the option of each flag.

    Args:
        names: Of the options.
        config: Whose options they are.
        defaults: Where they differ from those of the options.
    """
    made: list[tuple[str, Any, Any]] = []
    for each in (config.__dataclass_fields__[name] for name in names):
        kind, default = kind_of(each), defaults.get(each.name, each.default)
        kind = {Literal: str, tuple: list[str]}.get(get_origin(kind), kind)
        text = help_of(each, default)
        if each.name == "method":
            text = text.replace("  [", " full trains on all rows.  [")
        metavar = None if each.name == "method" or kind is bool else metavar_of(each)
        about = field(default=default, metadata={"help": text, "metavar": metavar})
        kind = kind | None if default is None else kind
        made.append((FLAGS.get(each.name, each.name), kind, about))
    options = {FLAGS.get(name, name): name for name in names}
    return make_dataclass("Flags", made, namespace={"OPTIONS": options})


def options_in(*groups: str) -> list[str]:
    """Give the names of the options of some groups that decide which rows are kept."""
    known = CompressConfig.__dataclass_fields__
    return [n for n in CompressConfig.recorded() if known[n].metadata["group"] in groups]


def read_arguments(
    dataclasses: list[Any], defaults: dict[str, Any], arguments: list[str] | None = None
) -> tuple[Any, ...]:
    """Parse flags into dataclasses; `--config FILE` puts the entries of a YAML file before them.

    Entries of the file become flags, so they meet the very same checks, and flags given by the
    user win. With `--from_run` the dataset of that run is the default. A wrong flag, key or value
    ends the program with one line and exit code 2. The flags of other libraries are in --help
    where their defaults differ here.

    Args:
        dataclasses: Whose fields are the flags.
        defaults: Defaults that differ from those of the dataclasses.
        arguments: The flags; None takes those of the program.
    """
    from transformers import HfArgumentParser

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    foreign = [kind for kind in dataclasses if kind.__module__.split(".")[0] == "trl"]
    about = [f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in foreign]
    parser = HfArgumentParser(
        dataclasses,
        usage="%(prog)s [flags]",
        formatter_class=Help,
        epilog=f"All fields of {' and '.join(about)} are flags too." if about else None,
    )
    parser.set_defaults(**defaults)
    hidden = {each.name for kind in foreign for each in fields(kind)} - defaults.keys()
    for action in parser._actions:
        known = CompressConfig.__dataclass_fields__.get(action.dest)
        if known is not None and known.metadata["bare"] is not None:
            action.nargs, action.const = "?", known.metadata["bare"]
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
        elif action.dest in defaults and "[default: " not in str(action.help):
            action.help = f"{action.help or ''} [default: {defaults[action.dest]}]"
    parser.add_argument("--config", help="YAML file whose entries are flags.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    of_run = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--from_run", "--dataset_name"):
        of_run.add_argument(name)
    for each in (parser, first, of_run):
        each.error = lambda message: sys.exit(fail(message))  # type: ignore[method-assign]
    try:
        file, arguments = first.parse_known_args(arguments)
        if file.config is not None:
            arguments = flags_from_yaml(file.config) + arguments
        arguments = [_rename(argument) for argument in arguments]
        named, _ = of_run.parse_known_args(arguments)
        if named.from_run is not None:
            takes_folder = any(action.dest == "image_folder" for action in parser._actions)
            defaults = source_flags(named.from_run, named.dataset_name, takes_folder=takes_folder)
            parser.set_defaults(**defaults)
        return parser.parse_args_into_dataclasses(arguments)[: len(dataclasses)]
    except ValueError as error:
        sys.exit(fail(error))


def run(
    train: Callable[..., None], dataclasses: list[Any], defaults: dict[str, Any] | None = None
) -> None:
    """Parse the flags of a recipe, and train; wrong input ends it with one line and exit code 2."""
    parsed = read_arguments(dataclasses, defaults or {})
    try:
        train(*parsed)
    except InputError as error:
        sys.exit(fail(error))


def _rename(argument: str) -> str:
    """Give a flag its name of this release, and say so if it had another."""
    name, equals, value = argument.partition("=")
    new = OLD_FLAGS.get(name.removeprefix("--").replace("-", "_"))
    if new is None or not name.startswith("--"):
        return argument
    _say(f"note: {name} is now --{new}; the old name goes with the next release")
    return f"--{new}{equals}{value}"


def source_flags(
    from_run: str, dataset_name: str | None, *, takes_folder: bool = False
) -> dict[str, Any]:
    """Name the rows that a run was made from as flags do, as far as a dataset leaves them open.

    Args:
        from_run: Run folder, or OWNER/NAME on the Hub.
        dataset_name: The dataset that was named beside it, which should hold the same rows.
        takes_folder: Whether the recipe takes an image_folder.

    Raises:
        InputError: If it is no run, or of a dataset that has no name.
    """
    from dq_multimodal.run import open_run

    source = open_run(from_run).config.source
    if dataset_name is not None:
        return {"dataset_split": source.split}
    if source.kind == "memory":
        raise InputError(
            f"the run {from_run} is of a dataset in memory, which cannot be loaded again: save the "
            "dataset to a file, compress that, and draw from the run of it"
        )
    for key in ("field", "image_folder", "image_files"):
        if getattr(source, key) and not (takes_folder and source.image_folder and key != "field"):
            raise InputError(
                f"the run {from_run} was made with {key}, which recipes do not take: train on its "
                "subset folder"
            )
    return {
        "dataset_name": source.path or source.name,
        "dataset_config_name": source.config_name,
        "dataset_revision": source.revision,
        "dataset_split": source.split,
        **({"image_folder": source.image_folder} if takes_folder else {}),
    }


def load_rows(flags: Any, split: str | None = None) -> "Source":
    """Load the rows that the flags of a recipe name, or those of another split."""
    from dq_multimodal.data.source import load_source

    return load_source(
        flags.dataset_name,
        split=split or flags.dataset_split or "train",
        config_name=flags.dataset_config_name,
        revision=flags.dataset_revision,
        image_folder=getattr(flags, "image_folder", None),
    )


def flags_from_yaml(path: Path) -> list[str]:
    """Turn a flat YAML mapping into flags: lists become several values, null leaves a flag out.

    Raises:
        InputError: If there is no such file, or it is no flat mapping.
    """
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not YAML: {reason}") from error
    if not isinstance(entries, dict) or any(isinstance(v, dict) for v in entries.values()):
        raise InputError(f"{path} must hold flat entries NAME: VALUE")
    flags = []
    for name, value in entries.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(str(v) for v in values)]
    return flags


def fail(error: object) -> int:
    """Say in one line on stderr what was wrong, and give the exit code of bad input.

    Of launched processes rank 0 says it; another one only if it is still there some seconds later,
    when the launcher would have ended it if rank 0 had failed too.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(LAST_SECONDS)
    _say(f"error: {'' if rank == '0' else f'rank {rank}: '}{' '.join(str(error).split())}")
    return 2


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201
