"""One line of a comparison on images: keep rows and patches, train a classifier, test it."""

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.training import record
from dq_multimodal.training.checkpoints import make_accelerator
from dq_multimodal.training.classify import BATCH_SIZE, ClassifierArguments, train_classifier
from dq_multimodal.training.image_data import ImageDataArguments
from dq_multimodal.training.selecting import (
    FULL,
    METHOD_HELP,
    OrderArguments,
    describe_selection,
    select_rows,
)
from dq_multimodal.training.weights import find_use, read_weights

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from dq_multimodal.data.source import Source

SMALL_SHARE = 0.1
SMALL_BATCH = 32
"""At or below so small a share of the rows, batches are smaller unless named."""


@dataclass
class ImageRunArguments(OrderArguments):
    """Which rows and patches are kept, and what is trained on them."""

    method: str = field(default="auto", metadata={"help": METHOD_HELP})
    keep_ratio: float = field(default=0.1, metadata={"help": "Share of the rows, in (0, 1]."})
    selection_seed: int = field(default=0, metadata={"help": "Seed of the selection."})
    n_bins: int = field(default=10, metadata={"help": "Number of bins of a class."})
    similarity: str = field(default="cosine", metadata={"help": "cosine or euclidean."})
    embedding_model: str | None = field(
        default=None, metadata={"help": "timm or transformers model, or a folder."}
    )
    embedding: str = field(default="features", metadata={"help": "features or gradients."})
    embeddings: str | None = field(default=None, metadata={"help": "Ready embeddings, FILE.npy."})
    drop_ratio: float = field(default=0.0, metadata={"help": "Share of patches, in [0, 1)."})
    patch_size: int | None = field(default=None, metadata={"help": "In pixels."})
    attribution: str = field(default="gradcam++", metadata={"help": "gradcam++ or random."})
    attribution_model: str | None = field(
        default=None, metadata={"help": "Classifier for gradcam++. Default: embedding_model."}
    )
    patch_coding: str = field(default="exact", metadata={"help": "exact, exact-small or webp."})
    patch_quality: int = field(default=80, metadata={"help": "Of webp, 0 to 100."})
    min_psnr: float | None = field(default=None, metadata={"help": "In dB."})
    fill: str | None = field(
        default=None,
        metadata={"help": "mean, zero or mae. Default: mae where a mae_model is named, else mean."},
    )
    mae_model: str | None = field(default=None, metadata={"help": "Masked autoencoder."})
    model: str = field(
        default="resnet18",
        metadata={
            "help": "resnet18, resnet50, vit, swin, convnext, mobilenetv2, resnet10-narrow, or "
            "any timm model name."
        },
    )
    is_pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights."})
    test_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to test on. Default: dataset_name."}
    )
    test_split: str = field(default="test", metadata={"help": "Split or slice to test on."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run."})

    def __post_init__(self) -> None:
        self.fill = self.fill or ("mae" if self.mae_model else "mean")
        self.check(self.method)

    def options(self) -> dict[str, Any]:
        """Give the settings that `compress` takes."""
        names = ("method", "keep_ratio", "n_bins", "similarity", "embedding_model", "embedding")
        found = {name: getattr(self, name) for name in (*names, "embeddings", "drop_ratio")}
        if self.drop_ratio:
            of_patches = ("patch_size", "attribution", "attribution_model", "patch_coding")
            gate = ("patch_quality", "min_psnr", "fill", "mae_model")
            found |= {name: getattr(self, name) for name in (*of_patches, *gate)}
        return {**super().options(), **found, "seed": self.selection_seed}


def train_on_subset(
    data: ImageDataArguments, training: ClassifierArguments, run: ImageRunArguments
) -> str:
    """Compress, restore, train, test, save, all into run.output_dir.

    Returns:
        What came out, in one line.

    Raises:
        InputError: For bad input, in one clear line.
    """
    import numpy as np
    from accelerate.utils import set_seed

    from dq_multimodal.data.columns import match_classes
    from dq_multimodal.data.source import pin_of
    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier
    from dq_multimodal.training.pictures import pixel_statistics

    accelerator = make_accelerator()
    name = Path(data.dataset_name.rstrip("/*")).name.split(".")[0]
    share = f"{run.keep_ratio:g}" if run.keep_rows is None else f"{run.keep_rows}-rows"
    share += f"-{run.drop_ratio:g}" if run.drop_ratio else ""
    output_dir = Path(run.output_dir or f"runs/{name}-{run.method}-{share}-{run.model}")
    source, test_source = data.load(), load_test(data, run)
    if training.per_device_train_batch_size is None:
        kept_share = run.keep_ratio
        if run.keep_rows is not None:
            kept_share = run.keep_rows / len(source.dataset)
        is_small = kept_share <= SMALL_SHARE and run.method != FULL
        training.per_device_train_batch_size = SMALL_BATCH if is_small else BATCH_SIZE
    pins = {
        "n_processes": accelerator.num_processes,
        "source": pin_of(source.origin, has_names=False),
        "test": pin_of(test_source.origin, has_names=False),
    }
    asked = record.describe_request(asdict(data), asdict(training), asdict(run), pins)
    if record.is_complete(output_dir, asked):
        return f"{output_dir} is already complete"
    if accelerator.is_main_process:
        record.start(output_dir, asked)
    started = time.perf_counter()
    kept, selection = choose_rows(data, run, source, output_dir / "selection", accelerator)

    size = data.find_size(source.dataset)
    pictures, labels = data.pictures(kept, size, fill=run.fill, mae_model=run.mae_model)
    test, test_labels = data.pictures(test_source.dataset, size, name="decode test")
    test.classes = match_classes(test.classes, test_labels, labels)
    strange = [label for label in test_labels if label not in labels]
    if strange:
        raise InputError(
            f"the test rows have labels that the kept rows lack: {', '.join(strange[:10])}"
        )
    mean, std = pixel_statistics(pictures)
    set_seed(training.seed)
    net = build_classifier(run.model, len(labels), size, is_pretrained=run.is_pretrained)
    n_parameters = int(np.sum([p.numel() for p in net.parameters()]))
    weights = read_weights(kept)
    use_weights = find_use(run.use_weights, weights)
    found = train_classifier(
        *(net, pictures, test, training, accelerator, output_dir, mean, std),
        weights=None if use_weights == "none" else weights,
        is_sampled=use_weights == "sample",
    )
    if accelerator.is_main_process:
        description = Classifier(run.model, size, len(labels), labels, tuple(mean), tuple(std))
        save_classifier(accelerator.unwrap_model(net), description, output_dir / "model")
        metrics = {
            "asked": asked,
            "seed": training.seed,
            "selection": selection,
            "use_weights": use_weights,
            **found,
            "rows_trained": len(pictures.rows),
            "rows_unused": {"train": len(pictures.unused), "test": len(test.unused)},
            "parameters": n_parameters,
            "seconds": round(time.perf_counter() - started, 2),
            "device": record.device_name(accelerator.device),
            "command": sys.argv,
        }
        record.finish(output_dir, metrics)
    percent = 100.0 if run.method == FULL else 100 * selection["keep_ratio"]
    method = selection.get("method", FULL)
    weighted = "" if use_weights == "none" else f", weights in the {use_weights}"
    return (
        f"{method} {percent:.4g} %, {run.model}{weighted}: "
        f"{100 * found['accuracy']:.2f} % of {found['rows_tested']:,} test rows right, "
        f"{found['steps']:,} steps in {found['train_seconds']:.0f} s; {output_dir}"
    )


def load_test(data: ImageDataArguments, run: ImageRunArguments) -> "Source":
    """Load the rows to test on."""
    from dq_multimodal.data.source import load_source

    if run.test_dataset_name is not None:
        split = "train" if run.test_split == "test" else run.test_split
        return load_source(run.test_dataset_name, split=split)
    return load_source(
        data.dataset_name,
        split=run.test_split,
        config_name=data.dataset_config_name,
        revision=data.dataset_revision,
    )


def choose_rows(
    data: ImageDataArguments,
    run: ImageRunArguments,
    source: "Source",
    folder: Path,
    accelerator: "Accelerator",
) -> tuple["Dataset", dict[str, Any]]:
    """Give the rows to train on and what metrics.json says of them; only one process selects."""
    from dq_multimodal.run import Run
    from dq_multimodal.stages.subset import count_bytes

    if run.method == FULL:
        size = {"rows": len(source.dataset), "bytes": {"subset_data": count_bytes(source.dataset)}}
        return source.dataset, {**size, "source_rows": len(source.dataset), "seconds": {}}
    if accelerator.is_main_process:
        options = {
            "split": data.dataset_split,
            "config_name": data.dataset_config_name,
            "revision": data.dataset_revision,
            "modality": "image",
            "image_column": data.image_column,
            "label_column": data.label_column,
            **run.options(),
        }
        select_rows(data.dataset_name, folder, options, run.from_run, source.origin)
    accelerator.wait_for_everyone()
    if not folder.is_dir():
        raise InputError(f"{folder} must lie on a file system that all processes share")
    made = Run(folder)
    found = made.manifest.as_dict()
    of_images = {name: found.get(name) for name in ("bytes", "patches")}
    return made.subset, describe_selection(made) | of_images
