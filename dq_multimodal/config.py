"""What can be asked for, checked when it is made. Standard library only."""

import math
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

Method = Literal["auto", "random", "blocks", "coverage", "dq", "adq", "graphcut", "ccs", "dual"]
DifficultyName = Literal["aum", "cad", "dual", "dyn-unc", "el2n", "forgetting", "ifd"]
Draw = Literal["random", "rank"]
Similarity = Literal["cosine", "euclidean"]
Representativeness = Literal["texture", "surprisal"]
Importance = Literal["both", "representativeness", "diversity"]
Norm = Literal["minmax", "softmax-z"]
Preset = Literal["dq-iccv23", "adq-aaai25"]
Modality = Literal["auto", "text", "image"]
Embedding = Literal["features", "gradients"]
Attribution = Literal["gradcam++", "random"]
PatchCoding = Literal["exact", "exact-small", "webp"]
Fill = Literal["mean", "zero", "mae"]

DEFAULT_TEXT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MAX_PATCH_SIZE = 1024
MAX_PART_ROWS = 50_000  # on average, where the number of parts is not given
DEFAULT_IMAGE_MODEL = "resnet18.a1_in1k"
COVERAGE_NOISE, CCS_NOISE = 0.05, 0.3
"""Share of the rows that go to the end by their AUM; that of ccs is its paper's for CIFAR-10."""

CHOICES: dict[str, Any] = {
    "method": Method,
    "draw": Draw,
    "similarity": Similarity,
    "importance": Importance,
    "norm": Norm,
    "modality": Modality,
    "embedding": Embedding,
    "attribution": Attribution,
    "patch_coding": PatchCoding,
}
"""Settings that are one of a few names."""

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


class InputError(ValueError):
    """Wrong use or bad input: the message is one clear line for the user."""


@dataclass(frozen=True)
class CompressConfig:
    """One request to compress a dataset.

    Attributes:
        dataset: Hub id, or a local path: .parquet, .json, .jsonl or .csv file or glob, or a folder.
        split: Split of the source, slices such as "train[:90%]" included.
        config_name: Configuration of a Hub dataset, or of a folder whose card has several.
        revision: Branch, tag or commit of a Hub dataset.
        keep_ratio: Share of the rows to keep, in (0, 1].
        keep_rows: Number of rows to keep, in place of keep_ratio.
        method: "auto" (what the evidence supports for what is at hand, see docs/method.md),
            "coverage" (facility location), "dq" (bins, uniform sample), "adq" (bins, a sample by
            their importance), "graphcut" (one greedy run), "blocks" (balanced random), "random",
            "ccs" or "dual" (both by training dynamics).
        dynamics: .npy file of training dynamics, (epochs, n, 3), or of losses of responses,
            (checkpoints, n, 2); see `recipes/train_extractor.py` and `recipes/score_text.py`.
        difficulty: For coverage, what a row weighs: "aum", "cad", "dual", "dyn-unc", "el2n" or
            "forgetting" of the dynamics, "ifd" of losses, or a column of numbers of at least 0.
        noise_ratio: Share of the rows, those with the lowest AUM of the dynamics, that go to the
            end of the order, since they are likely to be labelled wrong. None is 0.05 for coverage
            with dynamics, 0.3 for ccs, else 0.
        target: Dataset of the rows that the model shall be good at: a file, folder or Hub id.
        target_split: Its split.
        target_config: Its configuration on the Hub.
        target_columns: Its text columns; None detects them.
        target_share: Share of any subset that is picked for the target; the rest is by method.
        target_model: Causal language model whose hidden states (RDS+) compare rows and target, or
            with target_gradients its gradients (LESS); None compares by the embeddings.
        target_gradients: Compare by gradients of LoRA weights of the target_model.
        drop_duplicates: Cosine from which rows count as near-duplicates: the first in the order
            stays, the others go to the end. None looks for none.
        cap_by: Column of which no value may have more rows in the subset than cap says.
        cap: A number of rows, from 1, or below 1 a share of the subset.
        draw: Within a bin, rows by seeded hash ("random", the papers) or by greedy rank ("rank").
        seed: Seed of the draw, and of the scores of adq.
        alpha: For adq, the weight of the importance of a bin beside its size, in [0, 1]; 0 is dq.
        representativeness: For adq, "texture", or for text also "surprisal". None is texture, and
            surprisal for text with ready embeddings, where texture is that of sampled rows only.
        importance: For adq, "both" scores, "representativeness" or "diversity" alone.
        norm: For adq, how a score is brought to one scale: "minmax" or "softmax-z".
        score_rows: For adq, rows a bin that the diversity looks at; None is 15 % of the bin, at
            least 100 and at most 2,000.
        modality: "text" or "image"; "auto" takes images where the dataset has a column of them.
        text_columns: Columns that are embedded, in this order; None detects them.
        image_column: Column of images; None finds the only one.
        label_column: Column whose values become strata: every stratum is binned on its own. None
            finds the labels of images; "none" leaves them aside.
        embedding_model: sentence-transformers, timm or transformers model id, or a folder; None
            is the default of the modality.
        embedding: Of images, pooled "features" or last-layer "gradients".
        embeddings: .npy file of (n, d) ready embeddings, or the name of a column that holds them.
        similarity: "cosine" or "euclidean".
        n_bins: Bins of a stratum, at least 1.
        partition: For very many rows without labels, bins in each of K parts of similar rows:
            "kmeans:K", or "kmeans" for ceil(rows / 50,000); None or "none" makes no parts.
        batch_size: Rows that go through the encoder together.
        drop_ratio: Share of the patches of each kept image to drop, in [0, 1); 0 drops none.
        patch_size: Side of a patch in pixels; None is 4 up to 64 px, else 16.
        attribution: Which patches are dropped: the least important by "gradcam++", or "random".
        attribution_model: Classifier for gradcam++; None is the embedding model.
        patch_coding: "exact" keeps kept pixels bit for bit, "exact-small" too, in fewer bytes and
            several times the time, "webp" is lossy.
        patch_quality: Quality of webp, 0 to 100.
        min_psnr: Images whose filled holes lie below this many dB keep their original.
        fill: How holes are filled for that: "mean", "zero" or "mae".
        mae_model: Masked autoencoder for mae, a model id or folder.
        streaming: Read the source as a stream: several passes, never whole on disk or in memory.
        field: Key of a JSON file that holds the list of rows, such as "data".
        image_folder: Folder in which paths in the rows may name files; None allows none but the
            source's own data files.
        keep_unreadable: Keep rows whose image cannot be decoded in play; else the subset leaves
            them out.
        keep_every_class: Keep at least one row of every stratum, also where that is more than
            keep_ratio asks for.
    """

    dataset: str
    split: str = "train"
    config_name: str | None = None
    revision: str | None = None
    keep_ratio: float = 0.2
    keep_rows: int | None = None
    method: Method = "auto"
    dynamics: str | None = None
    difficulty: str | None = None
    noise_ratio: float | None = None
    target: str | None = None
    target_split: str = "train"
    target_config: str | None = None
    target_columns: tuple[str, ...] | None = None
    target_share: float = 0.7
    target_model: str | None = None
    target_gradients: bool = False
    drop_duplicates: float | None = None
    cap_by: str | None = None
    cap: float | None = None
    draw: Draw = "random"
    seed: int = 0
    alpha: float = 0.6
    representativeness: Representativeness | None = None
    importance: Importance = "both"
    norm: Norm = "minmax"
    score_rows: int | None = None
    modality: Modality = "auto"
    text_columns: tuple[str, ...] | None = None
    image_column: str | None = None
    label_column: str | None = None
    embedding_model: str | None = None
    embedding: Embedding = "features"
    embeddings: str | None = None
    similarity: Similarity = "cosine"
    n_bins: int = 10
    partition: str | None = None
    batch_size: int = 64
    drop_ratio: float = 0.0
    patch_size: int | None = None
    attribution: Attribution = "gradcam++"
    attribution_model: str | None = None
    patch_coding: PatchCoding = "exact"
    patch_quality: int = 80
    min_psnr: float | None = None
    fill: Fill | None = None
    mae_model: str | None = None
    streaming: bool = False
    field: str | None = None
    image_folder: str | None = None
    keep_unreadable: bool = False
    keep_every_class: bool = False

    def __post_init__(self) -> None:
        paths = ("dataset", "embedding_model", "embeddings", "attribution_model", "mae_model")
        more = (
            "image_folder",
            "field",
            "dynamics",
            "difficulty",
            "target",
            "target_config",
            "target_model",
        )
        for name in (*paths, *more, "cap_by"):
            value = getattr(self, name)
            if isinstance(value, PathLike):
                object.__setattr__(self, name, fspath(value))
            elif value is not None and not isinstance(value, str):
                raise InputError(f"{name} must be a name or a path, got {type(value).__name__}")
        check_keep_ratio(self.keep_ratio)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.representativeness is not None:
            check_choice("representativeness", self.representativeness, Representativeness)
        check_count("n_bins", self.n_bins)
        check_count("batch_size", self.batch_size)
        check_seed(self.seed)
        check_alpha(self.alpha)
        if self.score_rows is not None:
            check_count("score_rows", self.score_rows)
            if self.score_rows < 2:
                raise InputError("score_rows must be at least 2: a row is compared with others")
        self._check_partition()
        self._check_order()
        self._check_patches()
        if self.streaming and set(self.split) & set("[+"):
            raise InputError(
                f"a stream is read whole: split must be the name of one split, got {self.split!r}"
            )
        for name in ("keep_ratio", "drop_ratio", "alpha", "target_share"):
            object.__setattr__(self, name, float(getattr(self, name)))  # NumPy's included
        for name in ("n_bins", "batch_size", "seed", "patch_quality"):
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("text_columns", "target_columns"):
            columns = getattr(self, name)
            if isinstance(columns, str) or (columns is not None and not columns):
                raise InputError(f"{name} must be a list of names, got {columns!r}")
            if columns is not None:
                object.__setattr__(self, name, tuple(columns))

    def measure_of(self, modality: str) -> Representativeness:
        """Give the measure of representativeness, chosen by the data where it was left open.

        Beside ready embeddings the encoder sees sampled rows only, whose mean texture is noisier.
        """
        if self.representativeness is not None:
            return self.representativeness
        return "surprisal" if self.embeddings is not None and modality == "text" else "texture"

    def _check_partition(self) -> None:
        """Raise unless the partition is a known one that fits the embeddings; "none" is None."""
        if self.partition == "none":
            object.__setattr__(self, "partition", None)
        if self.partition is None:
            return
        count_parts(self.partition, 10**18)
        if self.embedding == "gradients":
            raise InputError("partition is for plain embeddings, and gradients are outer products")

    def of_rows(self, n_rows: int) -> "CompressConfig":
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

    def _check_order(self) -> None:
        """Raise unless what else decides the order is in range and fits."""
        if self.keep_rows is not None:
            check_count("keep_rows", self.keep_rows)
            object.__setattr__(self, "keep_rows", int(self.keep_rows))
        if self.method in ("ccs", "dual") and self.dynamics is None:
            raise InputError(f"{self.method} needs the training dynamics of the rows: --dynamics")
        if self.difficulty in get_args(DifficultyName) and self.dynamics is None:
            raise InputError(f"difficulty {self.difficulty} needs dynamics of the rows")
        for name in ("coverage", "blocks"):
            if self.method == name and self.embedding == "gradients":
                raise InputError(f"{name} is for plain embeddings, not for gradients")
        if self.drop_duplicates is not None and self.embedding == "gradients":
            raise InputError("drop_duplicates is for plain embeddings, not for gradients")
        if self.method == "coverage" and self.similarity != "cosine":
            raise InputError("coverage compares rows by cosine: leave out similarity")
        if self.noise_ratio is not None:
            check_share("noise_ratio", self.noise_ratio, below=1)
            if self.noise_ratio and self.dynamics is None:
                raise InputError("noise_ratio needs the training dynamics of the rows: --dynamics")
        check_share("target_share", self.target_share)
        lone = self.target_model or self.target_columns or self.target_gradients
        if (lone or self.target_config) and self.target is None:
            raise InputError("settings that begin with target_ need a target")
        if not isinstance(self.target_split, str) or not isinstance(self.target_gradients, bool):
            raise InputError("target_split must be a name, and target_gradients true or false")
        if self.target_gradients and self.target_model is None:
            raise InputError("target_gradients needs a target_model: a causal language model")
        if self.drop_duplicates is not None:
            check_share("drop_duplicates", self.drop_duplicates)
        if self.cap_by is not None and self.keep_every_class:
            raise InputError("a cap may leave a class without a row: not with keep_every_class")
        if (self.cap_by is None) != (self.cap is None):
            raise InputError("cap_by and cap go together: a column, and rows or a share of a value")
        if self.cap is not None and not (
            _is_number(self.cap)
            and (0 < self.cap < 1 or (self.cap >= 1 and self.cap == int(self.cap)))
        ):
            raise InputError(f"cap must be a number of rows, or a share below 1, got {self.cap!r}")
        for name in ("noise_ratio", "drop_duplicates", "cap"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    def _check_patches(self) -> None:
        """Raise unless the settings of the patches fit each other."""
        check_drop_ratio(self.drop_ratio)
        if self.patch_size is not None:
            check_count("patch_size", self.patch_size)
            if self.patch_size > MAX_PATCH_SIZE:
                raise InputError(
                    f"patch_size must be at most {MAX_PATCH_SIZE}, got {self.patch_size}"
                )
        if not self.drop_ratio:
            names = ("patch_size", "attribution_model", "min_psnr", "fill", "mae_model")
            lone = [name for name in names if getattr(self, name) is not None]
            if lone:
                raise InputError(f"{lone[0]} is for dropped patches: it needs a drop_ratio above 0")
        quality = self.patch_quality
        if not isinstance(quality, Integral) or not 0 <= quality <= 100:
            raise InputError(f"patch_quality must be a whole number from 0 to 100, got {quality!r}")
        psnr = self.min_psnr
        if psnr is not None and not (isinstance(psnr, Real) and math.isfinite(psnr)):
            raise InputError(f"min_psnr must be a number of dB, got {psnr!r}")
        if self.fill is not None:
            check_choice("fill", self.fill, Fill)
        if self.fill == "mae" and self.mae_model is None:
            raise InputError("fill mae needs a mae_model: a ViTMAE model id or folder")

    def as_dict(self) -> dict[str, Any]:
        """Give the settings as plain values that YAML can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompressConfig":
        """Rebuild from `as_dict`, which may come from a file of anybody: all types are checked.

        Raises:
            InputError: If a setting is unknown to this release, missing, or of another type.
        """
        check_type("settings", values, dict[str, Any])
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise InputError(f"settings this release does not know: {', '.join(unknown)}")
        if "dataset" not in values:
            raise InputError("the setting dataset is missing")
        kinds = get_type_hints(cls)
        if isinstance(values.get("seed"), int) and values["seed"].bit_length() < 1000:
            kinds["seed"] = Any  # is used modulo 2^64
        for name, value in values.items():
            check_type(name, value, kinds[name])
        return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_share(name: str, value: Any, below: float | None = None) -> None:
    """Raise unless the value is a number in (0, 1], or in [0, below)."""
    is_good = _is_number(value) and (0 < value <= 1 if below is None else 0 <= value < below)
    if not is_good:
        wanted = "(0, 1]" if below is None else f"[0, {below})"
        raise InputError(f"{name} must lie in {wanted}, got {value!r}")


def check_keep_ratio(keep_ratio: Any) -> None:
    """Raise unless the ratio is a number in (0, 1]."""
    is_number = isinstance(keep_ratio, Real) and not isinstance(keep_ratio, bool)
    if not is_number or math.isnan(keep_ratio) or not 0 < keep_ratio <= 1:
        raise InputError(f"keep_ratio must lie in (0, 1], got {keep_ratio}")


def check_drop_ratio(drop_ratio: Any) -> None:
    """Raise unless the ratio is a number in [0, 1)."""
    is_number = isinstance(drop_ratio, Real) and not isinstance(drop_ratio, bool)
    if not is_number or math.isnan(drop_ratio) or not 0 <= drop_ratio < 1:
        raise InputError(f"drop_ratio must lie in [0, 1), got {drop_ratio}")


def check_alpha(alpha: Any) -> None:
    """Raise unless the weight is a number in [0, 1]."""
    is_number = isinstance(alpha, Real) and not isinstance(alpha, bool)
    if not is_number or math.isnan(alpha) or not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in [0, 1], got {alpha}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise unless the value is one of the names of a Literal type."""
    if value not in get_args(choices):
        raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise unless the value is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_seed(seed: Any) -> None:
    """Raise unless the seed is a whole number."""
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise InputError(f"seed must be a whole number, got {seed!r}")


def check_type(name: str, value: Any, kind: Any) -> Any:
    """Raise unless a value that was read from a file has a type, all that it holds included.

    Args:
        name: What the message calls it.
        value: Plain values, as YAML and JSON give them.
        kind: str, bool, int (of 64 bits), float (finite), Any, a Literal, a list,
            tuple (a list in the file) or dict of one of them, one of them or None, or a dataclass
            or TypedDict (a dict in the file, which may hold more keys).

    Returns:
        The value, with dataclasses and tuples made.

    Raises:
        InputError: If it is another, naming the part that is.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Union or origin is type(int | str):
        (kind,) = (part for part in parts if part is not type(None))
        return None if value is None else check_type(name, value, kind)
    if is_dataclass(kind) or is_typeddict(kind):
        check_type(name, value, dict[str, Any])
        if hasattr(kind, "from_dict"):
            return kind.from_dict(value)
        kinds = get_type_hints(kind)
        if is_typeddict(kind):
            known, needed = [*kinds], kind.__required_keys__
        else:
            own = [part for part in fields(kind) if part.init]
            known = [part.name for part in own]
            needed = {part.name for part in own if part.default is part.default_factory is MISSING}
        for key in sorted(needed - value.keys()):
            raise InputError(f"{name} has no {key}")
        return kind(
            **{k: check_type(f"{name}.{k}", value[k], kinds[k]) for k in known if k in value}
        )
    if origin in (list, tuple) and isinstance(value, list):
        items = (check_type(f"{name}[{k}]", item, parts[0]) for k, item in enumerate(value))
        return tuple(items) if origin is tuple else [*items]
    if origin is dict and isinstance(value, dict):
        return {
            check_type(f"a key of {name}", key, parts[0]): check_type(
                f"{name}.{key}", item, parts[1]
            )
            for key, item in value.items()
        }
    if not _is_plain(value, kind):
        wanted = getattr(kind, "__name__", str(kind).replace("typing.", ""))
        is_short = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**64)
        shown = repr(value) if is_short else type(value).__name__  # no text of a linked file
        raise InputError(f"{name} must be {wanted}, got {shown}")
    return value


def _is_plain(value: Any, kind: Any) -> bool:
    """Say whether a value has a type that is not made of others."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e300  # not NaN, not infinite
    if get_origin(kind) is not None:  # a list, tuple or dict, which another value is not
        return False
    return kind is Any or isinstance(value, kind)


def count_parts(partition: Any, n_rows: int) -> int:
    """Give the parts that "kmeans:K" asks for; of "kmeans" ceil(n_rows / 50,000).

    Raises:
        InputError: If it is neither, or K lies outside 1 ... n_rows.
    """
    name, colon, number = partition.partition(":") if isinstance(partition, str) else ("", "", "")
    is_whole = number.isascii() and number.isdigit() and len(number) < 19
    if name != "kmeans" or (colon and not (is_whole and int(number) >= 1)):
        raise InputError(
            f"partition must be none, kmeans or kmeans:K with K of at least 1, got {partition!r}"
        )
    n_parts = int(number) if colon else -(-n_rows // MAX_PART_ROWS)
    if n_parts > n_rows:
        raise InputError(f"partition must be of at most the {n_rows} rows, got {partition}")
    return n_parts


def count_kept(n_rows: int, keep_ratio: float, what: str = "rows") -> int:
    """Give the size of a subset, round(keep_ratio * n_rows).

    Args:
        n_rows: Rows that there are to choose from.
        keep_ratio: Share of them.
        what: What the message calls them.

    Raises:
        InputError: If not even one row would be kept.
    """
    n_kept = round(keep_ratio * n_rows)
    if n_kept < 1:
        raise InputError(
            f"keep_ratio {keep_ratio} keeps none of the {n_rows:,} {what}: ask for more"
        )
    return n_kept
