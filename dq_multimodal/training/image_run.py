"""One line of a comparison on images: keep rows and patches, train a classifier, test it."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dq_multimodal.config import InputError
from dq_multimodal.training import record
from dq_multimodal.training.arguments import flags_of, load_rows, options_in
from dq_multimodal.training.classify import BATCH_SIZE, ClassifierArguments, train_classifier
from dq_multimodal.training.pictures import ImageDataArguments
from dq_multimodal.training.selecting import FULL, HOW, RowArguments, choose_rows
from dq_multimodal.training.weights import find_use, read_weights

SMALL_SHARE = 0.1
SMALL_BATCH = 32
"""At or below so small a share of the rows, batches are smaller unless named."""


PATCHES = [name for name in options_in("Images") if name != "image_embedding"]
ImageRowFlags: Any = flags_of(*HOW, "image_embedding", *PATCHES, keep_ratio=0.1)


@dataclass
class ImageRunArguments(RowArguments, ImageRowFlags):
    """Which rows and patches are kept, and what is trained on them."""

    model: str = field(
        default="resnet18",
        metadata={
            "help": "resnet18, resnet50, vit, swin, convnext, mobilenetv2, resnet10-narrow, or "
            "any timm model name."
        },
    )
    is_pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run."})

    def __post_init__(self) -> None:
        self.__dict__["fill"] = self.fill or ("mae" if self.mae_model else "mean")
        super().__post_init__()

    def options(self) -> dict[str, Any]:
        """Give the settings that `compress` takes beside the dataset."""
        left_out = () if self.drop_ratio else PATCHES
        return {k: v for k, v in super().options().items() if k not in left_out}


def train_on_subset(
    data: ImageDataArguments, training: ClassifierArguments, run: ImageRunArguments
) -> None:
    """Compress, restore, train, test, save, all into run.output_dir; say what came out.

    Raises:
        InputError: For bad input, in one clear line.
    """
    from accelerate.utils import set_seed

    from dq_multimodal.data.columns import match_classes
    from dq_multimodal.data.source import load_source, pin_of
    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier

    accelerator = record.make_accelerator()
    name = Path(data.dataset_name.rstrip("/*")).name.split(".")[0]
    share = f"{run.keep_ratio:g}" if run.keep_rows is None else f"{run.keep_rows}-rows"
    share += f"-{run.drop_ratio:g}" if run.drop_ratio else ""
    output_dir = Path(run.output_dir or f"runs/{name}-{run.method}-{share}-{run.model}")
    source = load_rows(data)
    if run.eval_dataset_name is None:
        test_source = load_rows(data, run.eval_split or "test")
    else:
        test_source = load_source(run.eval_dataset_name, split=run.eval_split or "train")
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
    if not record.begin(output_dir, asked, accelerator):
        return
    started = time.perf_counter()
    of_data = {o: getattr(data, flag) for flag, o in data.OPTIONS.items() if o != "dataset"}
    kept, selection, made = choose_rows(
        *(run, data.dataset_name, source, output_dir / "selection", accelerator),
        modality="image",
        **of_data,
    )
    if made is not None:
        selection["patches"] = made.manifest.as_dict().get("patches")

    size = data.find_size(source.dataset)
    pictures, labels = data.pictures(kept, size, fill=run.fill, mae_model=run.mae_model)
    test, test_labels = data.pictures(test_source.dataset, size, name="decode test")
    test.classes = match_classes(test.classes, test_labels, labels)
    strange = [label for label in test_labels if label not in labels]
    if strange:
        raise InputError(
            f"the test rows have labels that the kept rows lack: {', '.join(strange[:10])}"
        )
    set_seed(training.seed)
    net = build_classifier(run.model, len(labels), size, is_pretrained=run.is_pretrained)
    n_parameters = sum(p.numel() for p in net.parameters())
    weights = read_weights(kept)
    use_weights = find_use(run.use_weights, weights)
    found = train_classifier(
        *(net, pictures, test, training, accelerator, output_dir),
        weights=None if use_weights == "none" else weights,
        is_sampled=use_weights == "sample",
    )
    if not accelerator.is_main_process:
        return
    description = Classifier(run.model, size, len(labels), labels, *pictures.statistics)
    save_classifier(accelerator.unwrap_model(net), description, output_dir / "model")
    found |= {
        "seed": training.seed,
        "selection": selection,
        "use_weights": use_weights,
        "rows_trained": len(pictures.rows),
        "rows_unused": {"train": len(pictures.unused), "test": len(test.unused)},
        "parameters": n_parameters,
        "seconds": round(time.perf_counter() - started, 2),
    }
    record.finish(output_dir, asked, accelerator.device, **found)
    percent = 100.0 if made is None else 100 * selection["keep_ratio"]
    weighted = "" if use_weights == "none" else f", weights in the {use_weights}"
    accelerator.print(
        f"{selection.get('method', FULL)} {percent:.4g} %, {run.model}{weighted}: "
        f"{100 * found['accuracy']:.2f} % of {found['rows_tested']:,} test rows right, "
        f"{found['steps']:,} steps in {found['train_seconds']:.0f} s; {output_dir}"
    )
