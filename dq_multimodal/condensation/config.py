"""The options of `condense`, declared once, like those of `config.py`. Standard library only."""

import dataclasses
from dataclasses import KW_ONLY, dataclass
from functools import partial
from os import PathLike
from typing import Any, Literal

from dq_multimodal.config import CompressConfig
from dq_multimodal.options import (
    InputError,
    Request,
    check_count,
    check_seed,
    in_range,
    option,
    whole_number,
)

CondenseMethod = Literal["dm", "dc", "krr", "mtt"]
Kernel = Literal["features", "ntk"]
Choice = Literal["learnable", "uniform"]
Storage = Literal["png", "float16"]

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""The operations of DSA, by the names of its paper."""
NO_AUGMENTATION = ("none",)
RANDOM, NOISE = "random", "noise"
CONVNET, MOST_BLOCKS = "convnet", 5
SMALLEST_SIDE, LARGEST_SIDE = 8, 1024
DEFAULTS: dict[str, dict[str, Any]] = {
    "dm": {"iterations": 20_000, "learning_rate": 1.0},
    "dc": {"iterations": 1000, "learning_rate": 0.1},
    "krr": {"iterations": 1000, "learning_rate": 0.02},
    "mtt": {"iterations": 1000, "learning_rate": 0.05},
}
"""What is taken for an option of a method that is not given."""
STEPS_OF_DC = {1: (1, 1), 10: (10, 50), 50: (50, 10)}
"""Images a class, up to which the inner loops and the steps of the net in each are those of DC's
paper (its ς_θ and T)."""

read, how = partial(option, "What to read"), partial(option, "How to condense")
sizes, nets = partial(option, "Sets of many sizes"), partial(option, "Nets")
OF = "Method "
of_dc, of_krr, of_mtt = (partial(option, OF + name) for name in ("dc", "krr", "mtt"))
output = partial(option, "Output", is_recorded=False)


def same(name: str) -> Any:
    """Declare the option that `compress` has under this name."""
    found = CompressConfig.__dataclass_fields__[name]
    return dataclasses.field(default=found.default, metadata=found.metadata)


def check_operations(name: str, value: Any) -> None:
    """Raise unless the value lists operations of DSA, or is none alone."""
    known = isinstance(value, list | tuple) and all(each in OPERATIONS for each in value)
    if not known and tuple(value) != NO_AUGMENTATION:
        raise InputError(f"{name} must be none or some of {', '.join(OPERATIONS)}, got {value!r}")


@dataclass(frozen=True)
class CondenseConfig(Request):
    """One request to condense a dataset."""

    dataset: str = same("dataset")
    _: KW_ONLY
    split: str = read("train", 'Split or slice, such as "train[:90%]" or "train+validation".')
    config_name: str | None = same("config_name")
    revision: str | None = same("revision")
    image_column: str | None = read(None, "Column of images.  [default: the only one]")
    label_column: str | None = read(None, "Column of classes.  [default: the labels of images]")
    image_folder: str | None = same("image_folder")
    image_size: int | None = read(
        None,
        "Side of the pictures in pixels.  [default: that of the images up to 96, else 64]",
        whole_number(SMALLEST_SIDE, LARGEST_SIDE),
    )

    method: CondenseMethod = how(
        "dm",
        "dm: distribution matching; dc: gradient matching; krr: kernel ridge regression; mtt: "
        "trajectory matching, which needs --experts.",
    )
    images_per_class: int = how(10, "Synthetic images of each class.", check_count)
    init: str = how(
        RANDOM,
        "What the images begin as: random (rows of their class), noise, or a run folder or "
        "OWNER/NAME of compress, whose first rows are taken.",
        metavar="random|noise|RUN",
    )
    iterations: int | None = how(
        None, "Outer iterations.  [default: dm 20000, dc 1000, krr 1000, mtt 1000]", check_count
    )
    learning_rate: float | None = how(
        None,
        "Learning rate of the images.  [default: dm 1, dc 0.1, krr 0.02, mtt 0.05]",
        in_range("(0, inf)"),
    )
    real_batch: int = how(256, "Real images of a class (krr: of all) at a time.", check_count)
    augment: tuple[str, ...] = how(
        OPERATIONS,
        "Operations of DSA, of which one at a time is done to real and synthetic images alike: "
        "color,crop,cutout,flip,scale,rotate, or none.",
        check_operations,
        metavar="A,B",
    )
    seed: int = how(0, "Seed of all that is drawn.", check_seed)

    multisize: bool = sizes(
        False, "Make every prefix of the set a set of its own (MDC), all in one run."
    )
    multisize_choice: Choice = sizes(
        "learnable",
        "Which prefix learns beside the whole set: the most learnable, as MDC has it, or at each "
        "step one drawn uniformly.",
    )
    multisize_period: int = sizes(
        100, "Outer iterations after which the most learnable prefix is chosen again.", check_count
    )

    net: str = nets(
        CONVNET,
        "The net that compares images: convnet (of a depth that fits the side), convnet-d1 to -d5, "
        "or a timm name.",
    )
    net_width: int = nets(128, "Channels of a convnet.", check_count)
    device: str | None = same("device")

    inner_loops: int | None = of_dc(
        None,
        "Steps of the images in an iteration.  [default: by the number of images]",
        check_count,
    )
    net_steps: int | None = of_dc(
        None, "Steps of the net after each.  [default: by the number of images]", check_count
    )

    kernel: Kernel = of_krr("features", "Of nets drawn at random, or the neural tangent kernel.")
    ridge: float = of_krr(1e-3, "Ridge, as a share of the mean diagonal.", in_range("(0, inf)"))
    learn_labels: bool = of_krr(False, "Learn the labels too, as soft ones.")

    experts: str | None = of_mtt(
        None, "Folder that recipes/train_experts.py wrote.", metavar="FOLDER"
    )
    expert_epochs: int = of_mtt(2, "Epochs of an expert that the student follows.", check_count)
    student_steps: int = of_mtt(20, "Steps in which it follows them.", check_count)
    max_start_epoch: int = of_mtt(5, "Latest epoch of an expert to start at.", whole_number(0))

    stored_as: Storage = option(
        "Output", "png", "Pixels of the result: png (8 bits, rounded) or float16 (not rounded)."
    )
    output_dir: str | PathLike[str] | None = output(
        None, "The result folder.  [default: runs/DATASET-METHOD-IMAGES]"
    )
    overwrite: bool = output(False, "Replace another result in that folder.")
    report: bool = output(True, "Write report.html.")

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = dict(DEFAULTS[self.method])
        if self.method == "dc":
            most = next((n for n in STEPS_OF_DC if self.images_per_class <= n), max(STEPS_OF_DC))
            chosen["inner_loops"], chosen["net_steps"] = STEPS_OF_DC[most]
        for name, value in chosen.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.split == "all":
            raise InputError("split all would learn from test rows too: name those to learn from")
        for each in dataclasses.fields(self):
            owner = each.metadata["group"].removeprefix(OF)
            is_set = getattr(self, each.name) != each.default
            if is_set and owner in DEFAULTS and owner != self.method:
                raise InputError(f"{each.name} is for {owner}, and the method is {self.method}")
        if self.method == "mtt" and self.experts is None:
            raise InputError("mtt needs experts: train them by recipes/train_experts.py")
        if self.multisize and self.images_per_class == 1:
            raise InputError("multisize needs images_per_class of at least 2")
