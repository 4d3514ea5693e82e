"""The rows that a recipe trains on: compressed anew, or drawn from a finished run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dq_multimodal.config import (
    DEFAULT_TEXT_MODEL,
    CompressConfig,
    InputError,
    Method,
    check_choice,
)
from dq_multimodal.training.weights import USE_HELP, UseWeights

if TYPE_CHECKING:
    from dq_multimodal.run import Run

TrainingMethod = Literal[Method, "full"]
FULL = "full"
"""The method that keeps all rows: the other end of every comparison."""

METHOD_HELP = "A method of dq-multimodal compress, auto included; full trains on all rows."

DRAWN = ("method", "draw", "seed")
"""What `resample` can change beside the size; of adq also how its bins are weighed."""

ORDER = (
    "dynamics",
    "difficulty",
    "noise_ratio",
    "target",
    "target_split",
    "target_config",
    "target_columns",
    "target_share",
    "target_model",
    "target_gradients",
    "drop_duplicates",
    "cap_by",
    "cap",
)
"""What decides the order of the rows beside the method, in `compress` alone."""

FIXED = (
    "n_bins",
    "similarity",
    "representativeness",
    "embedding",
    "embedding_model",
    "embeddings",
    "text_columns",
    "label_column",
    *ORDER,
)
"""What `resample` cannot change."""


@dataclass
class OrderArguments:
    """What decides which rows are kept beside the method, and what their weights are for."""

    keep_rows: int | None = field(
        default=None, metadata={"help": "Number of rows to keep, in place of keep_ratio."}
    )
    dynamics: str | None = field(
        default=None,
        metadata={"help": "Training dynamics, FILE.npy of train_extractor.py or score_text.py."},
    )
    difficulty: str | None = field(
        default=None,
        metadata={
            "help": "coverage: rows weigh by aum, cad, dual, dyn-unc, el2n or forgetting of the "
            "dynamics, ifd of losses, or a column of numbers."
        },
    )
    noise_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of the rows of the lowest AUM that go to the end. Default: 0.05 for "
            "coverage with dynamics, 0.3 for ccs, else 0."
        },
    )
    target: str | None = field(
        default=None, metadata={"help": "Dataset of rows that the model shall be good at."}
    )
    target_split: str = field(default="train", metadata={"help": "Split of the target."})
    target_config: str | None = field(
        default=None, metadata={"help": "Configuration of the target on the Hub."}
    )
    target_columns: list[str] | None = field(
        default=None, metadata={"help": "Text columns of the target. Default: detected."}
    )
    target_share: float = field(
        default=0.7, metadata={"help": "Share of the subset that is picked for the target."}
    )
    target_model: str | None = field(
        default=None,
        metadata={
            "help": "Causal language model whose hidden states compare rows with the target. "
            "Default: the embeddings do."
        },
    )
    target_gradients: bool = field(
        default=False, metadata={"help": "Compare by LoRA gradients of that model."}
    )
    drop_duplicates: float | None = field(
        default=None,
        metadata={"help": "Cosine from which a row near to one before it goes to the end."},
    )
    cap_by: str | None = field(
        default=None, metadata={"help": "Column of which no value may pass cap."}
    )
    cap: float | None = field(
        default=None, metadata={"help": "Rows of one value, or their share below 1."}
    )
    alpha: float = field(
        default=0.6, metadata={"help": "adq: weight of a bin's importance beside its size."}
    )
    importance: str = field(
        default="both", metadata={"help": "adq: both, representativeness or diversity."}
    )
    representativeness: str | None = field(
        default=None, metadata={"help": "adq: texture (the default), or for text surprisal."}
    )
    from_run: str | None = field(
        default=None,
        metadata={
            "help": "Run folder, or OWNER/NAME on the Hub, to draw the rows from without an "
            "encoder. Its source and split are the default of the dataset."
        },
    )
    use_weights: str | None = field(default=None, metadata={"help": USE_HELP})

    def check(self, method: str) -> None:
        """Raise unless `compress` would take the settings; a run is asked when it is drawn from."""
        if self.use_weights is not None:
            check_choice("use_weights", self.use_weights, UseWeights)
        check_choice("method", method, TrainingMethod)
        options = self.options()
        if self.from_run is not None or method == FULL:
            options = {n: v for n, v in options.items() if n not in (*ORDER, "method")}
        CompressConfig(**{"dataset": "", **options})

    def options(self) -> dict[str, Any]:
        """Give the settings that `compress` takes."""
        names = ("alpha", "importance", "representativeness", "keep_rows", *ORDER)
        found = {name: getattr(self, name) for name in names}
        return found | {"target_columns": self.target_columns and tuple(self.target_columns)}


def source_flags(from_run: str, dataset_name: str | None) -> dict[str, Any]:
    """Name the rows that a run was made from as flags do, as far as a dataset leaves them open.

    Args:
        from_run: Run folder, or OWNER/NAME on the Hub.
        dataset_name: The dataset that was named beside it, which should hold the same rows.

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
        if getattr(source, key):
            raise InputError(
                f"the run {from_run} was made with {key}, which recipes do not take: train on its "
                "subset folder"
            )
    return {
        "dataset_name": source.path or source.name,
        "dataset_config_name": source.config_name,
        "dataset_revision": source.revision,
        "dataset_split": source.split,
    }


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
    for name in FIXED:
        value, made = options.get(name), getattr(run.request, name)
        if value not in (None, DEFAULT_TEXT_MODEL, getattr(plain, name), made):
            raise InputError(
                f"{name} {value} was asked, and the run {from_run} was made with {made}, which "
                "cannot be changed without an encoder"
            )
    if options.get("drop_ratio"):
        raise InputError("from_run draws whole rows: it does not go with drop_ratio")
    if options.get("method") in (None, "auto"):
        options = {**options, "method": run.request.method}
    names = (*DRAWN, "alpha", "importance") if options["method"] == "adq" else DRAWN
    drawn = {name: options[name] for name in names if name in options}
    sizes: dict[str, Any] = {name: options.get(name) for name in ("keep_ratio", "keep_rows")}
    return resample(run, output_dir=folder, **sizes, **drawn)


def describe_selection(run: "Run") -> dict[str, Any]:
    """Give what metrics.json says of how the rows of a run were chosen."""
    return {
        "method": run.request.method,
        "keep_ratio": run.request.keep_ratio,
        "has_encoder": run.request.needs_embeddings,
        "rows": run.manifest.kept,
        "source_rows": run.manifest.rows,
        "seconds": run.manifest.seconds,
    }
