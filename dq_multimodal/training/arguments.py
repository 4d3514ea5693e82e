"""Flags of the recipes, and YAML files that stand for flags."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dq_multimodal.config import DEFAULT_TEXT_MODEL, InputError
from dq_multimodal.data.splits import base_split, rest_of_split, split_ranges
from dq_multimodal.training.selecting import METHOD_HELP, OrderArguments, source_flags


@dataclass
class SelectionArguments(OrderArguments):
    """Which rows to train on, and which to test on.

    The held-out rows are named by `eval_dataset_name` (another dataset), by `eval_split` (another
    slice of the same one), or, where neither the splits nor another dataset are named, are the
    last 2 % of the dataset, which selection and training then never see. Of a run to draw from,
    they are the rows behind those that it is of, and none where it is of the whole split.
    """

    dataset_name: str = field(
        default="tatsu-lab/alpaca", metadata={"help": "Hub id, local file or folder."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split or slice to compress and train on."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split or slice that is held out, never trained on."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Another dataset to hold out, in the same shape."}
    )
    method: str = field(default="auto", metadata={"help": METHOD_HELP})
    keep_ratio: float = field(default=0.2, metadata={"help": "Share of the rows, in (0, 1]."})
    selection_seed: int = field(default=0, metadata={"help": "Seed of the selection."})
    draw: str = field(default="random", metadata={"help": "Within a bin: random or rank."})
    n_bins: int = field(default=10, metadata={"help": "Number of bins."})
    similarity: str = field(default="cosine", metadata={"help": "cosine or euclidean."})
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Text columns in order, the last is the response. Default: detected."},
    )
    embedding_model: str | None = field(
        default=None,
        metadata={"help": f"sentence-transformers model or folder. Default: {DEFAULT_TEXT_MODEL}."},
    )
    embeddings: str | None = field(
        default=None, metadata={"help": "Ready embeddings of the rows: FILE.npy or a column."}
    )
    push_subset_to_hub: str | None = field(
        default=None, metadata={"help": "OWNER/NAME to push the subset to."}
    )

    def __post_init__(self) -> None:
        self.check(self.method)
        names_eval = self.eval_split is not None or self.eval_dataset_name is not None
        if self.from_run is not None and self.dataset_split is not None and not names_eval:
            self.eval_split = rest_of_split(self.dataset_split)
        if self.dataset_split is None and self.eval_dataset_name is None:
            if self.eval_split is not None:
                raise InputError(
                    "eval_split names rows of the dataset: name dataset_split too, without them"
                )
            self.dataset_split, self.eval_split = "train[:98%]", "train[98%:]"
        self.dataset_split = self.dataset_split or "train"

    def check_held_out(self, n_rows: int) -> None:
        """Raise if rows that are held out are trained on.

        Args:
            n_rows: Rows of the whole split that `dataset_split` is of.
        """
        if self.eval_dataset_name is not None or self.eval_split is None:
            return
        if "+" in f"{self.dataset_split}{self.eval_split}":
            raise InputError("dataset_split and eval_split must name one split each, without +")
        if base_split(self.dataset_split or "") != base_split(self.eval_split):
            return
        for start, stop in split_ranges(self.dataset_split or "", n_rows):
            for first, last in split_ranges(self.eval_split, n_rows):
                if max(start, first) < min(stop, last):
                    raise InputError(
                        f"eval_split {self.eval_split} shares rows with dataset_split "
                        f"{self.dataset_split}: held-out rows must not be trained on"
                    )

    def options(self) -> dict[str, Any]:
        """Give the settings that `compress` takes."""
        return {
            **super().options(),
            "split": self.dataset_split,
            "config_name": self.dataset_config_name,
            "revision": self.dataset_revision,
            "method": self.method,
            "keep_ratio": self.keep_ratio,
            "seed": self.selection_seed,
            "draw": self.draw,
            "n_bins": self.n_bins,
            "similarity": self.similarity,
            "text_columns": tuple(self.text_columns) if self.text_columns else None,
            "embedding_model": self.embedding_model,
            "embeddings": self.embeddings,
        }


def read_arguments(
    dataclasses: list[Any], defaults: dict[str, Any], arguments: list[str] | None = None
) -> tuple[Any, ...]:
    """Parse flags into dataclasses; `--config FILE` puts the entries of a YAML file before them.

    Entries of the file become flags, so they meet the very same checks, and flags given by the
    user win. With `--from_run` the dataset of that run is the default. A wrong flag, key or value
    ends the program with one line and exit code 2.

    Args:
        dataclasses: Whose fields are the flags.
        defaults: Defaults that differ from those of the dataclasses.
        arguments: The flags; None takes those of the program.
    """
    from transformers import HfArgumentParser

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = HfArgumentParser(dataclasses)
    parser.set_defaults(**defaults)
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
        named, _ = of_run.parse_known_args(arguments)
        if named.from_run is not None:
            parser.set_defaults(**source_flags(named.from_run, named.dataset_name))
        return parser.parse_args_into_dataclasses(arguments)[: len(dataclasses)]
    except ValueError as error:
        sys.exit(fail(error))


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
    """Print one line on stderr and give the exit code of bad input."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)  # noqa: T201
    return 2
