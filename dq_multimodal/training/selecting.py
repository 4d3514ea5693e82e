"""The rows that a recipe trains on: compressed anew, or drawn from a finished run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import (
    DEFAULT_TEXT_MODEL,
    CompressConfig,
    Importance,
    InputError,
    Representativeness,
    check_alpha,
    check_choice,
)
from dq_multimodal.training.weights import USE_HELP, UseWeights

if TYPE_CHECKING:
    from dq_multimodal.run import Run

DRAWN = ("method", "draw", "seed")
"""What `resample` can change; of adq also how its bins are weighed."""

FIXED = (
    "n_bins",
    "similarity",
    "representativeness",
    "embedding",
    "embedding_model",
    "embeddings",
    "text_columns",
    "label_column",
)
"""What it cannot."""


@dataclass
class AdaptiveArguments:
    """How adq weighs the bins, a finished run to draw from, and what weights of rows are for."""

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

    def check(self) -> None:
        """Raise unless the settings are known ones."""
        check_alpha(self.alpha)
        check_choice("importance", self.importance, Importance)
        if self.representativeness is not None:
            check_choice("representativeness", self.representativeness, Representativeness)
        if self.use_weights is not None:
            check_choice("use_weights", self.use_weights, UseWeights)

    def options(self) -> dict[str, Any]:
        """Give the settings that `compress` takes."""
        names = ("alpha", "importance", "representativeness")
        return {name: getattr(self, name) for name in names}


def source_flags(from_run: str, dataset_name: str | None) -> dict[str, Any]:
    """Name the rows that a run was made from as flags do, as far as a dataset leaves them open.

    Args:
        from_run: Run folder, or OWNER/NAME on the Hub.
        dataset_name: The dataset that was named beside it, which should hold the same rows.

    Raises:
        InputError: If it is no run, or of a dataset that has no name.
    """
    from dq_multimodal.hub import open_run

    source = open_run(from_run).config["source"]
    if dataset_name is not None:
        return {"dataset_split": source["split"]}
    if source["kind"] == "memory":
        raise InputError(
            f"the run {from_run} is of a dataset in memory, which cannot be loaded again: save the "
            "dataset to a file, compress that, and draw from the run of it"
        )
    for key in ("field", "image_folder", "image_files"):
        if source.get(key):
            raise InputError(
                f"the run {from_run} was made with {key}, which recipes do not take: train on its "
                "subset folder"
            )
    return {
        "dataset_name": source.get("path") or source["name"],
        "dataset_config_name": source.get("config_name"),
        "dataset_revision": source.get("revision"),
        "dataset_split": source["split"],
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

    if from_run is None:
        return compress(dataset_name, output_dir=folder, **options)
    from dq_multimodal.hub import open_run
    from dq_multimodal.resampling import resample
    from dq_multimodal.source import is_same_source

    run = open_run(from_run)
    if not is_same_source(run.config["source"], origin):
        theirs, split = run.config["source"], options.get("split", "train")
        raise InputError(
            f"the run {from_run} is of other rows than {dataset_name}, split {split}: it is of "
            f"{theirs['name']}, split {theirs['split']}; leave out the dataset and its split to "
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
    names = (*DRAWN, "alpha", "importance") if options.get("method", "adq") == "adq" else DRAWN
    drawn = {name: options[name] for name in names if name in options}
    return resample(run, options["keep_ratio"], output_dir=folder, **drawn)
