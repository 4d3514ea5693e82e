"""Every option, declared once: name, type, default, help and check. Standard library only.

A field of `CompressConfig` or `ResampleConfig` is an option. The command line (`cli`), the flags of
the recipes (`training.arguments`), the signatures and docstrings of compress(), plan() and
resample(), and the request in config.yaml follow from it: a new option is one more field.
"""

import dataclasses
import math
import os
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import partial
from os import PathLike
from typing import Any, Literal, Self, get_args

from dq_multimodal.options import (
    NEEDED,
    InputError,
    Request,
    check_choice,
    check_count,
    check_seed,
    check_share,
    describe,
    in_range,
    is_number,
    option,
    whole_number,
)

NamedMethod = Literal["random", "blocks", "coverage", "dq", "adq", "graphcut", "ccs", "dual"]
Method = Literal["auto", NamedMethod]
DifficultyName = Literal["aum", "cad", "dual", "dyn-unc", "el2n", "forgetting", "ifd"]
Draw = Literal["random", "rank"]
Similarity = Literal["cosine", "euclidean"]
Representativeness = Literal["texture", "surprisal"]
Importance = Literal["both", "representativeness", "diversity"]
Norm = Literal["minmax", "softmax-z"]
Preset = Literal["dq-iccv23", "adq-aaai25"]
NamedModality = Literal["text", "image", "image-text"]
Modality = Literal["auto", NamedModality]
Embedding = Literal["features", "gradients"]
Attribution = Literal["gradcam++", "random"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PatchCoding = Literal["exact", "exact-small", "webp"]
Fill = Literal["mean", "zero", "mae"]
Engine = Literal["local", "ray"]

DEFAULT_TEXT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_IMAGE_MODEL = "resnet18.a1_in1k"
TEXT_SHARE = 0.5
SPLIT_NAME = r"\w+(\.\w+)*"  # what `datasets` takes for the name of a split
MAX_PART_ROWS, MOST_PARTS = 50_000, 2000
"""Rows of a part on average, where the number of parts is not given, and that number at most: the
time that k-means takes grows with its square."""
COVERAGE_NOISE, CCS_NOISE = 0.05, 0.3
"""Share of the rows that go to the end by their AUM; that of ccs is its paper's for CIFAR-10."""

PRESETS: dict[str, dict[str, Any]] = {
    "dq-iccv23": {"method": "dq", "similarity": "euclidean", "draw": "random", "n_bins": 10},
    "adq-aaai25": {
        "method": "adq",
        "similarity": "euclidean",
        "draw": "random",
        "n_bins": 10,
        "alpha": 0.6,
        "representativeness": "texture",
        "importance": "both",
        "norm": "softmax-z",
    },
}
"""What the two papers set; what is asked for beside a preset wins."""

read = partial(option, "What to read")
choose = partial(option, "How to choose")
model = partial(option, "Models")
image = partial(option, "Images")
output = partial(option, "Output", is_recorded=False)
WHERE = "Where it runs"
where = partial(option, WHERE, is_recorded=False)


def split_models(name: str | None) -> list[str]:
    """Give the models of IMAGE_MODEL,TEXT_MODEL, or the one that is named."""
    if name is None:
        return []
    is_place = os.path.exists(os.path.expanduser(name))  # noqa: PTH110, PTH111 - raises nothing
    return [name] if is_place else [part.strip() for part in name.split(",")]


NOT_ON_RAY = (
    *("streaming", "target", "dynamics", "difficulty", "drop_duplicates", "cap_by", "max_memory"),
    *("keep_every_class", "drop_ratio"),
)
"""Settings that the engine ray does not know."""


def check_cap(name: str, value: Any) -> None:
    """Raise unless the value is a number of rows, or a share below 1."""
    if not is_number(value) or not (0 < value < 1 or (value >= 1 and value == int(value))):
        raise InputError(f"{name} must be a number of rows, or a share below 1, got {value!r}")


@dataclass(frozen=True)
class CompressConfig(Request):
    """One request to compress a dataset."""

    dataset: str = read(
        NEEDED, "Hub id, or a .parquet, .json, .jsonl or .csv file, a glob, or a folder."
    )
    _: KW_ONLY
    split: str = read(
        "train", 'Split or slice, such as "train[:90%]"; all keeps of every split its share.'
    )
    config_name: str | None = read(None, "Configuration of a Hub dataset or of a folder.")
    revision: str | None = read(None, "Branch, tag or commit of a Hub dataset.")
    streaming: bool = read(False, "Read in several passes, never whole on this disk or in memory.")
    field: str | None = read(None, "Key of a JSON file that holds the rows.", metavar="KEY")
    modality: Modality = read("auto", "What the rows are; auto looks for images and for text.")
    text_columns: tuple[str, ...] | None = read(
        None, "Text columns that are embedded, in order.  [default: detected]", metavar="A,B"
    )
    image_column: str | None = read(
        None, "Column of images.  [default: the only one; beside text all of them]"
    )
    label_column: str | None = read(
        None,
        "Column of strata: each value is binned on its own; none leaves it aside.  [default: the "
        "labels of images]",
    )
    image_folder: str | None = read(
        None,
        "Folder in which paths in the rows may name files.  [default: the source's data files "
        "alone]",
    )
    keep_unreadable: bool = read(
        False, "Keep rows whose image cannot be decoded as candidates; else they are left out."
    )

    preset: Preset | None = choose(
        None, "Settings of a paper; other options win.", is_recorded=False
    )
    keep_ratio: float = choose(0.2, "Share of the rows to keep, in (0, 1].", check_share)
    keep_rows: int | None = choose(None, "Number of rows to keep instead.", check_count)
    method: Method = choose(
        "auto",
        "auto: by what is known to work on such data; coverage: facility location; dq: bins, a "
        "uniform sample; adq: bins, a sample by their importance; graphcut: one greedy run; "
        "blocks: balanced random; ccs, dual: by training dynamics.",
    )
    draw: Draw = choose("random", "Within a bin: by seeded hash (the papers), or by greedy rank.")
    seed: int = choose(0, "Seed of the draw and of the scores of adq.", check_seed)
    n_bins: int = choose(10, "Number of bins of a stratum.", check_count)
    similarity: Similarity = choose("cosine", "Similarity of the bins.")
    alpha: float = choose(
        0.6,
        "adq: weight of a bin's importance beside its size, in [0, 1]; 0 is dq.",
        in_range("[0, 1]"),
    )
    importance: Importance = choose("both", "adq: which scores count.")
    representativeness: Representativeness | None = choose(
        None,
        "adq: texture level, or for text surprisal.  [default: texture; surprisal for text with "
        "ready embeddings]",
    )
    norm: Norm = choose("minmax", "adq: the scale of the scores.")
    score_rows: int | None = choose(
        None,
        "adq: rows a bin that the diversity looks at.  [default: 15 %, 100 to 2,000]",
        whole_number(2),
    )
    dynamics: str | None = choose(
        None,
        "Training dynamics of the rows, (epochs, n, 3) of recipes/train_extractor.py, or losses of "
        "responses, (checkpoints, n, 2) of recipes/score_text.py.",
        metavar="FILE.npy",
    )
    difficulty: str | None = choose(
        None,
        "coverage: rows weigh by aum, cad, dual, dyn-unc, el2n or forgetting of the dynamics, ifd "
        "of losses, or by a column of numbers of at least 0.",
        metavar="NAME",
    )
    noise_ratio: float | None = choose(
        None,
        "Share of the rows, those of the lowest AUM, that go to the end, in [0, 1).  [default: "
        "0.05 for coverage with dynamics, 0.3 for ccs, else 0]",
        in_range("[0, 1)"),
    )
    target: str | None = choose(
        None, "20 to 1,000 rows like those that the model shall be good at.", metavar="DATASET"
    )
    target_split: str = choose("train", "Split of the target.")
    target_config: str | None = choose(None, "Configuration of the target on the Hub.")
    target_columns: tuple[str, ...] | None = choose(
        None, "Text columns of the target.  [default: detected]", metavar="A,B"
    )
    target_share: float = choose(
        0.7,
        "Share of the subset that is picked for the target, in (0, 1]; the rest is by method.",
        check_share,
    )
    target_model: str | None = choose(
        None,
        "Causal language model whose hidden states compare rows with the target (RDS+).  "
        "[default: the embeddings do]",
    )
    target_gradients: bool = choose(False, "Compare by LoRA gradients of that model (LESS).")
    drop_duplicates: float | None = choose(
        None,
        "Rows of such a cosine (of images and of text, where there are both) to one before them go "
        "to the end; the flag alone is 0.95.",
        check_share,
        metavar="COSINE",
        bare=0.95,
    )
    cap_by: str | None = choose(
        None, "Column of which no value may pass the cap.", metavar="COLUMN"
    )
    cap: float | None = choose(
        None, "Rows of one value, or their share below 1.", check_cap, metavar="N|SHARE"
    )
    keep_every_class: bool = choose(False, "Keep at least one row of every stratum.")
    partition: str | None = choose(
        None,
        "For very many rows without labels: bins in each of K parts of similar rows; kmeans alone "
        "takes ceil(rows / 50,000), at most 2,000.  [default: none]",
        lambda _, value: value == "none" or count_parts(value, 10**18),
        metavar="none|kmeans|kmeans:K",
    )

    embedding_model: str | None = model(
        None,
        "Encoder: a sentence-transformers, timm or transformers id, or a folder; of rows with "
        "images and text one that reads both, or IMAGE_MODEL,TEXT_MODEL.  [default: "
        f"{DEFAULT_IMAGE_MODEL}, {DEFAULT_TEXT_MODEL}]",
    )
    text_share: float | None = model(
        None,
        "Share of the text in the cosine of two rows with images and text, in (0, 1).  [default: "
        f"{TEXT_SHARE}]",
        in_range("(0, 1)"),
    )
    ready_embeddings: str | None = model(
        None,
        "Embeddings that are there already: an array of (n, d), or a column.",
        metavar="FILE.npy|COLUMN",
        old_name="embeddings",
    )
    batch_size: int = model(64, "Rows that go through the encoder together.", check_count)
    device: str | None = model(
        None,
        "Where models run: cpu, cuda, cuda:1, mps.  [default: a GPU if there is one]",
        is_recorded=False,
    )
    dtype: Dtype = model(
        "auto", "Numbers of the encoder; auto is float32, of a target_model on a GPU bfloat16."
    )

    image_embedding: Embedding = image(
        "features", "Pooled features, or last-layer gradients.", old_name="embedding"
    )
    drop_ratio: float = image(
        0.0, "Share of the patches of kept images to drop, in [0, 1).", in_range("[0, 1)")
    )
    patch_size: int | None = image(
        None,
        "Side of a patch in pixels.  [default: 4 up to 64 px, else 16]",
        whole_number(1, 1024),
    )
    attribution: Attribution = image(
        "gradcam++", "Which patches are dropped: the least important, or any."
    )
    attribution_model: str | None = image(
        None, "Classifier for that.  [default: the embedding model]"
    )
    patch_coding: PatchCoding = image(
        "exact",
        "exact keeps kept pixels bit for bit, exact-small too (fewer bytes, about ten times the "
        "time), webp is lossy.",
    )
    patch_quality: int = image(80, "Quality of webp, 0 to 100.", whole_number(0, 100))
    min_psnr: float | None = image(None, "Filled images below so many dB keep their original.")
    fill: Fill | None = image(None, "How holes are filled for that.  [default: mean]")
    mae_model: str | None = image(None, "Masked autoencoder that fills holes: an id or a folder.")

    output_dir: str | PathLike[str] | None = output(
        None, "The run folder.  [default: runs/DATASET-METHOD-RATIO]"
    )
    overwrite: bool = output(False, "Replace another run in that folder.")
    report: bool = output(True, "Write report.html and the figures of the card.")
    max_memory: int | str | None = output(
        None,
        "Refuse, before any work, a run that needs more: 8GB, 500MB, 2GiB.",
        lambda _, value: parse_bytes(value),
        metavar="SIZE",
    )

    engine: Engine = where("local", "local: this process; ray: the machines of a Ray cluster.")
    ray_address: str | None = where(
        None, "Cluster to work on, or auto.  [default: one of this machine]", metavar="ADDRESS"
    )
    ray_storage: str | None = where(
        None,
        "Folder or URL that all machines see, for parts of the work.  [default: the run folder]",
        metavar="URL",
    )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """Make the request of what compress() was asked; what stands beside a preset wins over it.

        Raises:
            InputError: For an option that is not there, or wrong, or does not go with another.
        """
        if options.get("keep_rows") is not None and "keep_ratio" in options:
            raise InputError("give keep_ratio or keep_rows, not both")
        preset = options.get("preset")
        if preset is not None:
            check_choice("preset", preset, Preset)
            options = {**PRESETS[preset], **options, "preset": None}
        if options.get("difficulty") and options.get("method", "auto") not in ("auto", "coverage"):
            raise InputError(f"difficulty is for coverage, and the method is {options['method']}")
        return super().from_options(options)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition == "none":
            object.__setattr__(self, "partition", None)
        if self.preset is not None:
            raise InputError("a preset is for compress() and plan()")
        if self.streaming and (self.split == "all" or set(self.split) & set("[+")):
            raise InputError(
                f"a stream is read whole: split must be the name of one split, got {self.split!r}"
            )
        self._check_order()
        self._check_patches()
        self._check_engine()

    def _check_order(self) -> None:
        """Raise unless the settings that decide the order of the rows go together."""
        if self.method in ("ccs", "dual") and self.dynamics is None:
            raise InputError(f"{self.method} needs the training dynamics of the rows: --dynamics")
        if self.difficulty in get_args(DifficultyName) and self.dynamics is None:
            raise InputError(f"difficulty {self.difficulty} needs dynamics of the rows")
        if self.noise_ratio and self.dynamics is None:
            raise InputError("noise_ratio needs the training dynamics of the rows: --dynamics")
        if self.image_embedding == "gradients":
            names = [n for n in ("partition", "drop_duplicates") if getattr(self, n) is not None]
            for what in [*names, *({self.method} & {"coverage", "blocks"})]:
                raise InputError(f"{what} is for plain embeddings, not for gradients")
        if self.method == "coverage" and self.similarity != "cosine":
            raise InputError("coverage compares rows by cosine: leave out similarity")
        lone = self.target_model or self.target_columns or self.target_gradients
        if (lone or self.target_config) and self.target is None:
            raise InputError("settings that begin with target_ need a target")
        if self.target_gradients and self.target_model is None:
            raise InputError("target_gradients needs a target_model: a causal language model")
        if self.cap_by is not None and self.keep_every_class:
            raise InputError("a cap may leave a class without a row: not with keep_every_class")
        if (self.cap_by is None) != (self.cap is None):
            raise InputError("cap_by and cap go together: a column, and rows or a share of a value")

    def _check_patches(self) -> None:
        """Raise unless the settings of the patches go together."""
        if not self.drop_ratio:
            for name in ("patch_size", "attribution_model", "min_psnr", "fill", "mae_model"):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"{name} is for dropped patches: it needs a drop_ratio above 0"
                    )
        if self.fill == "mae" and self.mae_model is None:
            raise InputError("fill mae needs a mae_model: a ViTMAE model id or folder")

    def _check_engine(self) -> None:
        """Raise unless the engine can do what is asked."""
        defaults = {part.name: part.default for part in fields(self)}
        if self.engine == "local":
            for name in (part.name for part in fields(self) if part.metadata["group"] == WHERE):
                if getattr(self, name) != defaults[name]:
                    raise InputError(f"{name} is for engine ray")
            return
        for name in NOT_ON_RAY:
            if getattr(self, name) != defaults[name]:
                raise InputError(f"{name} is for engine local: leave out one of them")
        if self.split == "all":
            raise InputError("engine ray reads one split, got all")
        if self.image_embedding == "gradients":
            raise InputError("engine ray has plain embeddings, not gradients")

    def measure_of(self, modality: str) -> Representativeness:
        """Give the measure of representativeness, chosen by the data where it was left open.

        Beside ready embeddings the encoder sees sampled rows only, whose mean texture is noisier.
        """
        is_sampled = self.ready_embeddings is not None and modality == "text"
        return self.representativeness or ("surprisal" if is_sampled else "texture")

    @property
    def memory_limit(self) -> int | None:
        """The max_memory in bytes."""
        return None if self.max_memory is None else parse_bytes(self.max_memory)

    def of_rows(self, n_rows: int) -> Self:
        """Give the request with the keep_ratio that its keep_rows, if any, are of n rows."""
        if self.keep_rows is None:
            return self
        return replace(self, keep_ratio=min(1.0, self.keep_rows / n_rows))

    @property
    def needs_embeddings(self) -> bool:
        """Whether rows have to be embedded for their order."""
        is_near = self.target is not None and self.target_model is None
        has_bins = self.method not in ("random", "ccs", "dual")
        return has_bins or is_near or self.drop_duplicates is not None

    @property
    def noise_share(self) -> float:
        """Share of the rows that go to the end as likely to be labelled wrong."""
        if self.noise_ratio is not None:
            return self.noise_ratio
        is_known = self.dynamics is not None and self.difficulty != "ifd"  # which is of losses
        known = {"ccs": CCS_NOISE, "coverage": COVERAGE_NOISE if is_known else 0.0}
        return known.get(self.method, 0.0)


def _of_run(name: str) -> Any:
    """Declare an option of `CompressConfig` whose default is the setting of a run."""
    about = CompressConfig.__dataclass_fields__[name].metadata
    help = about["help"].partition("  [default")[0] + "  [default: the run's]"
    return dataclasses.field(default=None, metadata={**about, "help": help})


@dataclass(frozen=True, kw_only=True)
class PlanConfig(CompressConfig):
    """One request to say what compressing a dataset will take, also on a cluster."""

    nodes: int = where(1, "plan: machines of the cluster.", check_count)
    gpus_per_node: int = where(0, "plan: GPUs of each; 0 embeds on its cores.", whole_number(0))
    cores_per_node: int | None = where(
        None, "plan: cores of each.  [default: those of this machine]", check_count
    )
    node_price: float | None = where(
        None, "plan: dollars an hour of each.", in_range("[0, inf)"), metavar="DOLLARS"
    )
    rows: int | None = where(
        None, "plan: rows that there will be.  [default: those of the dataset]", check_count
    )


@dataclass(frozen=True)
class ResampleConfig(Request):
    """One request to draw another subset from a finished run, without an encoder."""

    run: str = read(NEEDED, "Run folder, or OWNER/NAME on the Hub.", is_recorded=False)
    keep_ratio: float | None = choose(None, "Share of the source rows, in (0, 1].", check_share)
    _: KW_ONLY
    keep_rows: int | None = choose(None, "Number of rows to keep instead.", check_count)
    method: NamedMethod | None = choose(None, "Another method.  [default: the run's]")
    draw: Draw | None = _of_run("draw")
    seed: int | None = _of_run("seed")
    alpha: float | None = _of_run("alpha")
    importance: Importance | None = _of_run("importance")
    norm: Norm | None = _of_run("norm")
    output_dir: str | PathLike[str] | None = output(
        None, "The run folder.  [default: runs/DATASET-METHOD-RATIO]"
    )
    overwrite: bool = output(False, "Replace another run in that folder.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.keep_ratio is None) == (self.keep_rows is None):
            raise InputError("resample needs a keep_ratio or keep_rows, one of them")

    def changes(self) -> dict[str, Any]:
        """Give the settings that are to be other ones than those of the run."""
        found = {name: value for name, value in self.as_dict().items() if value is not None}
        return {**found, "keep_rows": self.keep_rows}


def count_parts(partition: Any, n_rows: int) -> int:
    """Give the parts that "kmeans:K" asks for; of "kmeans" ceil(n_rows / 50,000), at most 2,000.

    Raises:
        InputError: If it is neither, or K lies outside 1 ... n_rows.
    """
    name, colon, number = partition.partition(":") if isinstance(partition, str) else ("", "", "")
    is_whole = number.isascii() and number.isdigit() and len(number) < 19
    if name != "kmeans" or (colon and not (is_whole and int(number) >= 1)):
        raise InputError(
            f"partition must be none, kmeans or kmeans:K with K of at least 1, got {partition!r}"
        )
    n_parts = int(number) if colon else min(MOST_PARTS, -(-n_rows // MAX_PART_ROWS))
    if n_parts > n_rows:
        raise InputError(f"partition must be of at most the {n_rows} rows, got {partition}")
    return n_parts


def count_kept(n_rows: int, keep_ratio: float, what: str = "rows") -> int:
    """Give the size of a subset, round(keep_ratio * n_rows); a message calls its rows `what`.

    Raises:
        InputError: If not even one row would be kept.
    """
    n_kept = round(keep_ratio * n_rows)
    if n_kept < 1:
        raise InputError(
            f"keep_ratio {keep_ratio} keeps none of the {n_rows:,} {what}: ask for more"
        )
    return n_kept


SIZE_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}


def parse_bytes(value: Any) -> int:
    """Read a size of memory: a number of bytes, or a text such as "8GB", "500 MB" or "2GiB".

    Raises:
        InputError: If it is none, or less than one byte.
    """
    text = str(value).strip().lower()
    number = text.rstrip("kmgtib").strip()
    unit = text[len(number) :].strip() or "b"
    try:
        size = float(number) * SIZE_UNITS[unit]
        if isinstance(value, bool) or not 1 <= size < math.inf:
            raise ValueError(value)
    except (ValueError, KeyError):
        raise InputError(
            f"max_memory must be a size such as 8GB, 500MB or 2GiB, got {value}"
        ) from None
    return int(size)


def format_bytes(size: int) -> str:
    """Write a size for people, in powers of 1,000, never below what it is."""
    for power, unit in enumerate(("bytes", "kB", "MB", "GB")):
        if size < 1000 ** (power + 1) or unit == "GB":
            break
    scaled = math.ceil(10 * size / 1000**power) / 10
    return f"{scaled:,.1f}".removesuffix(".0") + f" {unit}"


for _config in (CompressConfig, PlanConfig, ResampleConfig):
    _config.__doc__ = f"{_config.__doc__}\n\nAttributes:\n{describe(fields(_config))}"
