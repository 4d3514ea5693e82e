"""The rows that a recipe trains on: compressed anew, or drawn from a finished run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dq_multimodal.config import (
    DEFAULT_TEXT_MODEL,
    CompressConfig,
    InputError,
    Method,
    check_choice,
)
from dq_multimodal.data.splits import base_split, rest_of_split, split_ranges
from dq_multimodal.training.arguments import SOURCE, flags_of, options_in
from dq_multimodal.training.weights import USE_HELP, UseWeights

if TYPE_CHECKING:
    from datasets import Dataset

    from dq_multimodal.data.source import Source
    from dq_multimodal.run import Run

TrainingMethod = Literal[Method, "full"]
FULL = "full"
"""The method that keeps all rows: the other end of every comparison."""
HELD_OUT = ("train[:98%]", "train[98%:]")
"""What is trained on, and what is held out, where neither is named."""
HOW = options_in("How to choose", "Models")
SIZES = ("keep_ratio", "keep_rows")
DRAWN = ("method", "draw", "seed")
"""What `resample` can change beside the size."""
WEIGHED = ("alpha", "importance", "norm")
"""What it can change of adq."""
FIXED = {*HOW, "modality", "text_columns", "label_column", "image_embedding"}
FIXED -= {*SIZES, *DRAWN, *WEIGHED, "batch_size"}
"""What it cannot change."""


@dataclass
class RowArguments:
    """What recipes take beside the options of compress() that `flags_of` makes flags of."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Another dataset to test on, in the same shape."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split or slice to test on, never trained on."}
    )
    from_run: str | None = field(
        default=None,
        metadata={
            "help": "Run folder, or OWNER/NAME on the Hub, to draw the rows from without an "
            "encoder. Its source and split are the default of the dataset."
        },
    )
    use_weights: str | None = field(default=None, metadata={"help": USE_HELP})
    OPTIONS: ClassVar[dict[str, str]]

    def __post_init__(self) -> None:
        """Raise unless `compress` would take the settings; a run is asked when it is drawn from."""
        if self.use_weights is not None:
            check_choice("use_weights", self.use_weights, UseWeights)
        options = self.options()
        check_choice("method", options["method"], TrainingMethod)
        if self.from_run is not None or options["method"] == FULL:
            options = {n: v for n, v in options.items() if n not in {*FIXED, "method"}}
        CompressConfig(**{"dataset": "", **options})

    def options(self) -> dict[str, Any]:
        """Give the settings that `compress` takes beside the dataset."""
        found = {o: getattr(self, flag) for flag, o in self.OPTIONS.items() if o != "dataset"}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


@dataclass
class HeldOutArguments(RowArguments):
    """Which rows are trained on, and which are held out.

    The held-out rows are named by `eval_dataset_name` (another dataset), by `eval_split` (another
    slice of the same one), or, where neither the splits nor another dataset are named, are the
    last 2 % of the dataset, which selection and training then never see. Of a run to draw from,
    they are the rows behind those that it is of, and none where it is of the whole split.
    """

    push_subset_to_hub: str | None = field(
        default=None, metadata={"help": "OWNER/NAME to push the subset to."}
    )

    def __post_init__(self) -> None:
        settings: dict[str, Any] = self.__dict__
        split, is_named = settings["dataset_split"], self.eval_dataset_name is not None
        if self.from_run is not None and split is not None and not (is_named or self.eval_split):
            self.eval_split = rest_of_split(split)
        elif split is None and not is_named:
            if self.eval_split is not None:
                raise InputError(
                    "eval_split names rows of the dataset: name dataset_split too, without them"
                )
            split, self.eval_split = HELD_OUT
        settings["dataset_split"] = split or "train"
        super().__post_init__()

    def check_held_out(self, n_rows: int) -> None:
        """Raise if rows that are held out are trained on.

        Args:
            n_rows: Rows of the whole split that `dataset_split` is of.
        """
        split = self.__dict__["dataset_split"] or ""
        if self.eval_dataset_name is not None or self.eval_split is None:
            return
        if "+" in split + self.eval_split:
            raise InputError("dataset_split and eval_split must name one split each, without +")
        if base_split(split) != base_split(self.eval_split):
            return
        for start, stop in split_ranges(split, n_rows):
            for first, last in split_ranges(self.eval_split, n_rows):
                if max(start, first) < min(stop, last):
                    raise InputError(
                        f"eval_split {self.eval_split} shares rows with dataset_split "
                        f"{split}: held-out rows must not be trained on"
                    )


TextFlags: Any = flags_of(*SOURCE, "text_columns", *HOW, dataset="tatsu-lab/alpaca", split=None)
COLUMNS = ("modality", "text_columns", "image_column", "label_column", "image_folder")
PictureFlags: Any = flags_of(*SOURCE, *COLUMNS, *HOW, dataset=None, split=None)


@dataclass
class SelectionArguments(HeldOutArguments, TextFlags):
    """Which rows of text to train on, and which to test on."""


@dataclass
class PictureSelectionArguments(HeldOutArguments, PictureFlags):
    """Which rows of pictures and text to train on, and which to test on."""

    def options(self) -> dict[str, Any]:
        """Give the settings of `compress`: chosen by pictures, text columns are trained on only."""
        found = super().options()
        return found | ({"text_columns": None} if found["modality"] == "image" else {})


def select_rows(
    dataset_name: str,
    folder: Path,
    options: dict[str, Any],
    from_run: str | None,
    origin: dict[str, Any],
) -> "Run":
    """Compress a dataset into a folder, or draw from a run with the options that can differ.

    Args:
        dataset_name: Hub id, local file or folder.
        folder: Where to.
        options: What `compress` takes.
        from_run: A run to draw from; None compresses.
        origin: What pins the source rows.

    Raises:
        InputError: If the run is of other rows, or cannot give what is asked for.
    """
    from dq_multimodal.pipeline import compress

    if options.get("keep_rows") is not None:
        options = {name: value for name, value in options.items() if name != "keep_ratio"}
    if from_run is None:
        return compress(dataset_name, output_dir=folder, **options)
    from dq_multimodal.data.source import is_same_source
    from dq_multimodal.run import open_run, resample

    run = open_run(from_run)
    theirs, split = run.config.source, options.get("split", "train")
    if not is_same_source(theirs.as_dict(), origin):
        raise InputError(
            f"the run {from_run} is of other rows than {dataset_name}, split {split}: it is of "
            f"{theirs.name}, split {theirs.split}; leave out the dataset and its split to "
            "use those, or compress the dataset anew"
        )
    plain = CompressConfig(dataset=dataset_name)
    for name in FIXED & options.keys():
        value, made = options[name], getattr(run.request, name)
        if name == "modality" and run.config.rows is not None:
            made = run.config.rows.modality
        if value not in (None, DEFAULT_TEXT_MODEL, getattr(plain, name), made):
            raise InputError(
                f"{name} {value} was asked, and the run {from_run} was made with {made}, which "
                "cannot be changed without an encoder"
            )
    if options.get("drop_ratio"):
        raise InputError("from_run draws whole rows: it does not go with drop_ratio")
    if options.get("method") in (None, "auto"):
        options = {**options, "method": run.request.method}
    names = {*SIZES, *DRAWN, *(WEIGHED if options["method"] == "adq" else ())}
    if options.get("norm") == plain.norm:
        names -= {"norm"}  # the run's
    drawn = {name: options[name] for name in names & options.keys()}
    return resample(run, output_dir=folder, **drawn)


def choose_rows(
    flags: RowArguments, dataset_name: str, source: "Source", folder: Path, state: Any, **more: Any
) -> tuple["Dataset", dict[str, Any], "Run | None"]:
    """Give the rows to train on, what metrics.json says of them, and their run.

    Args:
        flags: Of the recipe; "full" has no run.
        dataset_name: Hub id, local file or folder.
        source: Its rows.
        folder: Of the run.
        state: Of the processes, of which one selects.
        more: Options of compress() beside the flags.

    Raises:
        InputError: If compress() raises it, the process that selects has failed, or the processes
            share no folder.
    """
    from dq_multimodal.run import Run
    from dq_multimodal.stages.subset import count_bytes

    rows = source.dataset
    if flags.options()["method"] == FULL:
        size = {"rows": len(rows), "bytes": {"subset_data": count_bytes(rows)}}
        return rows, {**size, "source_rows": len(rows), "seconds": {}}, None
    if state.is_main_process:
        select_rows(dataset_name, folder, more | flags.options(), flags.from_run, source.origin)
    try:
        state.wait_for_everyone()
    except RuntimeError as error:  # the connection was lost
        raise InputError("the process that selects the rows has failed") from error
    if not folder.is_dir():
        raise InputError(f"{folder} must lie on a file system that all processes share")
    run = Run(folder)
    return run.subset, describe_selection(run), run


def describe_selection(run: "Run") -> dict[str, Any]:
    """Give what metrics.json says of how the rows of a run were chosen."""
    return {
        "method": run.request.method,
        "keep_ratio": run.request.keep_ratio,
        "has_encoder": run.request.needs_embeddings,
        "rows": run.manifest.kept,
        "source_rows": run.manifest.rows,
        "bytes": run.manifest.as_dict()["bytes"],
        "seconds": run.manifest.seconds,
    }
