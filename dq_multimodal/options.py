"""Options that several commands share, and how their texts are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dq_multimodal.byte_sizes import parse_bytes
from dq_multimodal.config import (
    DEFAULT_IMAGE_MODEL,
    DEFAULT_TEXT_MODEL,
    Attribution,
    Draw,
    Embedding,
    Fill,
    Importance,
    InputError,
    Method,
    Modality,
    Norm,
    PatchCoding,
    Preset,
    Representativeness,
    Similarity,
    check_drop_ratio,
    check_keep_ratio,
)

KeepRatio = Annotated[
    str, typer.Option(metavar="RATIO", help="Share of the rows to keep, in (0, 1].")
]
KeepRows = Annotated[
    int | None,
    typer.Option(metavar="N", help="Number of rows to keep instead.", show_default=False),
]
OutputDir = Annotated[
    Path | None,
    typer.Option(help="The run folder.  [default: runs/DATASET-METHOD-RATIO]", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run in that folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
PushToHub = Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Push the result there.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
RunOrId = Annotated[
    str, typer.Argument(metavar="RUN", help="Run folder, or OWNER/NAME on the Hub.")
]

ConfigName = Annotated[
    str | None, typer.Option(help="Configuration of a Hub dataset or of a folder.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
PresetName = Annotated[
    Preset | None, typer.Option(help="Settings of a paper; other flags win.", show_default=False)
]
MethodName = Annotated[
    Method, typer.Option(help="How rows are chosen; auto: by what is known to work on such data.")
]
Dynamics = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.npy",
        help="Training dynamics of the rows, from recipes/train_extractor.py or score_text.py.",
    ),
]
Difficulty = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="coverage: rows weigh by aum, cad, dual, dyn-unc, el2n or forgetting of the dynamics, "
        "ifd of losses, or by a column of numbers.",
    ),
]
NoiseRatio = Annotated[
    float | None,
    typer.Option(
        help="Share of the rows of the lowest AUM that go to the end, in [0, 1).  [default: 0.05 "
        "for coverage with dynamics, 0.3 for ccs, else 0]",
        show_default=False,
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        metavar="DATASET", help="20 to 1,000 rows like those that the model shall be good at."
    ),
]
TargetSplit = Annotated[str, typer.Option(help="Split of the target.")]
TargetConfig = Annotated[str | None, typer.Option(help="Configuration of the target on the Hub.")]
TargetColumns = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="Text columns of the target.  [default: detected]", show_default=False
    ),
]
TargetShare = Annotated[
    float, typer.Option(help="Share of the subset that is picked for the target, (0, 1].")
]
TargetModel = Annotated[
    str | None,
    typer.Option(
        help="Causal language model whose hidden states compare rows with the target (RDS+).  "
        "[default: the embeddings do]",
        show_default=False,
    ),
]
TargetGradients = Annotated[
    bool,
    typer.Option("--target-gradients", help="Compare by LoRA gradients of that model (LESS)."),
]
DropDuplicates = Annotated[
    float | None,
    typer.Option(
        metavar="[COSINE]",
        help="Rows so near to one before them go to the end; 0.95 if no number is given.",
    ),
]
CapBy = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of which no value may pass --cap.")
]
Cap = Annotated[
    float | None, typer.Option(metavar="N|SHARE", help="Rows of one value, or their share below 1.")
]
DrawName = Annotated[Draw, typer.Option(help="Within a bin: by seeded hash, or by rank.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw and of the scores.")]
Alpha = Annotated[
    float, typer.Option(help="adq: weight of a bin's importance beside its size, [0, 1]; 0 is dq.")
]
RepresentativenessName = Annotated[
    Representativeness | None,
    typer.Option(
        help="adq: texture level, or for text surprisal.  [default: texture; surprisal for text "
        "with ready embeddings]"
    ),
]
ImportanceName = Annotated[Importance, typer.Option(help="adq: which scores count.")]
NormName = Annotated[Norm, typer.Option(help="adq: the scale of the scores.")]
ScoreRows = Annotated[
    int | None,
    typer.Option(
        help="adq: rows a bin that the diversity looks at.  [default: 15 %, 100 to 2,000]",
        show_default=False,
    ),
]
ModalityName = Annotated[
    Modality, typer.Option(help="What the rows are; auto looks for a column of images.")
]
TextColumns = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="Text columns, in order.  [default: detected]", show_default=False
    ),
]
ImageColumn = Annotated[
    str | None, typer.Option(help="Column of images.  [default: the only one]", show_default=False)
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of strata: each value is binned on its own; that of images is found, "
        "none leaves it aside."
    ),
]
EmbeddingModel = Annotated[
    str | None,
    typer.Option(
        help="sentence-transformers, timm or transformers id, or a folder.  "
        f"[default: {DEFAULT_TEXT_MODEL}, {DEFAULT_IMAGE_MODEL}]",
        show_default=False,
    ),
]
EmbeddingKind = Annotated[
    Embedding, typer.Option(help="Of images: pooled features, or last-layer gradients.")
]
Embeddings = Annotated[str | None, typer.Option(help="Ready embeddings: FILE.npy, or a column.")]
SimilarityName = Annotated[Similarity, typer.Option(help="Similarity of the bins.")]
BinCount = Annotated[int, typer.Option(help="Number of bins.")]
PartitionName = Annotated[
    str,
    typer.Option(
        metavar="none|kmeans|kmeans:K",
        help="For very many rows without labels: bins in each of K parts of similar rows; "
        "kmeans alone takes ceil(rows / 50,000).",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows through the encoder together.")]
DropRatio = Annotated[
    str, typer.Option(metavar="RATIO", help="Share of the patches of kept images to drop, [0, 1).")
]
PatchSize = Annotated[
    int | None,
    typer.Option(
        help="Side of a patch in pixels.  [default: 4 up to 64 px, else 16]", show_default=False
    ),
]
AttributionName = Annotated[
    Attribution, typer.Option(help="Which patches are dropped: the least important, or any.")
]
AttributionModel = Annotated[
    str | None,
    typer.Option(help="Classifier for it.  [default: embedding model]", show_default=False),
]
PatchCodingName = Annotated[
    PatchCoding,
    typer.Option(
        help="exact keeps kept pixels bit for bit, exact-small too (fewer bytes, several times the "
        "time), webp is lossy."
    ),
]
PatchQuality = Annotated[int, typer.Option(help="Quality of webp, 0 to 100.")]
MinPsnr = Annotated[
    float | None, typer.Option(help="Filled images below so many dB keep their original.")
]
FillName = Annotated[
    Fill | None,
    typer.Option(help="How holes are filled for that.  [default: mean]", show_default=False),
]
MaeModel = Annotated[
    str | None, typer.Option(help="Masked autoencoder that fills holes: id or folder.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Refuse, before any work, a run that needs more: 8GB, 500MB, 2GiB."
    ),
]
Streaming = Annotated[
    bool,
    typer.Option("--streaming", help="Read the source in passes, never whole on this disk."),
]
Field = Annotated[
    str | None, typer.Option(metavar="KEY", help="Key of a JSON file that holds the rows.")
]
ImageFolder = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder in which paths in the rows may name files."),
]
KeepUnreadable = Annotated[
    bool,
    typer.Option("--keep-unreadable", help="Keep rows whose image cannot be decoded in play."),
]
KeepEveryClass = Annotated[
    bool,
    typer.Option("--keep-every-class", help="Keep at least one row of every stratum."),
]
WithReport = Annotated[bool, typer.Option(help="Write report.html.")]

_AS_RUN = {"show_default": False}
OtherKeepRatio = Annotated[
    str | None, typer.Option(metavar="RATIO", help="Share of the rows to keep, in (0, 1].")
]
OtherMethod = Annotated[
    Method | None, typer.Option(help="Another method.  [default: the run's]", **_AS_RUN)
]
OtherDraw = Annotated[
    Draw | None, typer.Option(help="Another draw.  [default: the run's]", **_AS_RUN)
]
OtherSeed = Annotated[
    int | None, typer.Option(help="Another seed of the draw.  [default: the run's]", **_AS_RUN)
]
OtherAlpha = Annotated[
    float | None, typer.Option(help="adq: another alpha.  [default: the run's]", **_AS_RUN)
]
OtherImportance = Annotated[
    Importance | None, typer.Option(help="adq: other scores.  [default: the run's]", **_AS_RUN)
]
OtherNorm = Annotated[
    Norm | None, typer.Option(help="adq: another scale.  [default: the run's]", **_AS_RUN)
]
EmbeddingsOf = Annotated[
    Path | None,
    typer.Option(help="Run folder whose embeddings to show, for a run that was resampled."),
]


def given_options(context: typer.Context, *left_out: str) -> dict[str, Any]:
    """Give the options that were named on the command line, their texts read."""
    readers: dict[str, Callable[[Any], Any]] = {
        "keep_ratio": parse_ratio,
        "drop_ratio": parse_drop_ratio,
        "text_columns": parse_columns,
        "target_columns": lambda text: parse_columns(text, "target_columns"),
        "max_memory": parse_bytes,
    }
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name: readers.get(name, lambda x: x)(value)
        for name, value in context.params.items()
        if name not in left_out and getattr(sources[name], "name", "") != "DEFAULT"
    }


def parse_ratio(text: str) -> float:
    """Read a ratio in (0, 1]."""
    try:
        ratio = float(text)
        check_keep_ratio(ratio)
    except ValueError:
        hint = " (write 0.2 for 20 %)" if "%" in str(text) else ""
        raise InputError(f"keep_ratio must lie in (0, 1], got {text}{hint}") from None
    return ratio


def parse_drop_ratio(text: str) -> float:
    """Read a ratio in [0, 1)."""
    try:
        ratio = float(text)
    except ValueError:
        raise InputError(f"drop_ratio must lie in [0, 1), got {text}") from None
    check_drop_ratio(ratio)
    return ratio


def parse_columns(text: str | None, name: str = "text_columns") -> tuple[str, ...] | None:
    """Read column names parted by commas."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError(f"{name} must be names parted by commas, got {text!r}")
    return names
