"""config.yaml and manifest.json of a condensed set, and the names of its files."""

import re
from dataclasses import dataclass, field

from dq_multimodal import report
from dq_multimodal.card import CARD, FIGURES
from dq_multimodal.condensation.config import LARGEST_SIDE, CondenseConfig
from dq_multimodal.config import InputError
from dq_multimodal.manifest import (
    CONDENSED,
    CONFIG,
    ConfigFile,
    ManifestFile,
    Origin,
    Record,
    Written,
)

STATE = "state.safetensors"
"""There while the set is not finished."""
DATA = "data/train-00000.parquet"
PICTURES = f"{FIGURES}/pictures.png"
SHOWN = (report.FILE, PICTURES)
"""What a report leaves."""
OURS = (STATE, CARD, *SHOWN, CONFIG)
"""Files beside the mark (and NAME.tmp of each)."""
WHOLE = {"data": r"train-\d{5}\.parquet(\.tmp)?"}
"""Folders that are replaced as a whole, and what is written into them."""
PUSHED_FILES = re.compile(rf"data/train-\d{{5}}\.parquet|{re.escape(PICTURES)}")
"""Files of one that another may lack."""
PIXELS, SOFT_LABEL, ORDER = "pixels", "soft_label", "dq_order"
"""Columns beside those of the source."""
MAX_NUMBERS = 10**9
"""Of pixels, or of soft labels, that are read back, whoever wrote them."""


@dataclass(kw_only=True)
class CondensedConfig(ConfigFile):
    """config.yaml of a condensed set."""

    request: CondenseConfig
    source: Origin
    image_column: str  # of the source
    label_column: str
    pins: dict[str, str] = field(default_factory=dict)  # hashes of what init and experts name

    def check(self) -> None:
        """Raise if the source has no rows."""
        if self.source.rows is None:
            raise InputError("config.source has no rows")


@dataclass(kw_only=True)
class StoredBytes(Record):
    """Bytes of the pictures and of the soft labels, of the file of both, of the real pictures."""

    images: int  # PNG files, or float16 numbers
    soft_labels: int  # 4 a number
    file: int
    real_images: int  # as the source stores them


@dataclass(kw_only=True)
class CondensedManifest(ManifestFile):
    """manifest.json of a condensed set."""

    FORMAT = CONDENSED
    complete: bool = False
    rows: int
    real_rows: int  # that have a class and a picture
    classes: list[str]  # names, in the order of the rows
    channels: int
    side: int
    mean: list[float]  # of the real pixels in [0, 1], channel by channel
    spread: list[float]  # their standard deviation
    learning_rate: float | None = None  # with which to train on the set, where it was learnt
    bytes: StoredBytes
    losses: list[float]  # means of so many iterations each; the last may be of fewer
    loss_every: int
    choices: list[list[int]] = field(default_factory=list)
    """Of multisize: iterations done, images a class of the prefix that learns, of the frozen."""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)  # what was stopped and went on
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, Written] = field(default_factory=dict)
    digest: str | None = None  # SHA-256 of all of this but for how the work went
    is_sealed: bool = field(default=True, init=False, compare=False, repr=False)
    """Whether the digest in the file was right when it was read."""

    def __post_init__(self) -> None:
        n_classes, side = len(self.classes), self.side
        if n_classes < 2 or self.rows < n_classes or self.rows % n_classes:
            raise InputError(f"it has {self.rows} rows of {n_classes} classes")
        if self.channels not in (1, 3) or not 1 <= side <= LARGEST_SIDE:
            raise InputError(f"it has pictures of {self.channels} x {side} x {side}")
        if self.rows * self.channels * side**2 > MAX_NUMBERS or self.rows * n_classes > MAX_NUMBERS:
            raise InputError("it is larger than this release reads")
        if not len(self.mean) == len(self.spread) == self.channels or min(self.spread) <= 0:
            raise InputError(f"mean and spread are not those of {self.channels} channels")
        if self.loss_every < 1 or any(len(choice) != 3 for choice in self.choices):
            raise InputError("its losses or choices are not those of a set")

    @property
    def images_per_class(self) -> int:
        """Pictures of each class."""
        return self.rows // len(self.classes)

    @property
    def n_bytes(self) -> int:
        """Stored bytes of the pictures and of their soft labels."""
        return self.bytes.images + self.bytes.soft_labels
