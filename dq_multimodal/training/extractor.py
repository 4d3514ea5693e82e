"""A classifier trained on a dataset itself, whose features embed its images."""

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dq_multimodal.config import InputError
from dq_multimodal.training import record
from dq_multimodal.training.arguments import load_rows
from dq_multimodal.training.classify import ClassifierArguments, train_classifier
from dq_multimodal.training.dynamics import FILE as DYNAMICS
from dq_multimodal.training.dynamics import Dynamics
from dq_multimodal.training.pictures import ImageDataArguments

HELD_OUT = 0.02


@dataclass
class ExtractorArguments:
    """What to train, and where to."""

    model: str = field(
        default="resnet18", metadata={"help": "resnet10-narrow, or a timm model name."}
    )
    output_dir: str = field(default="runs/extractor", metadata={"help": "Folder of the run."})
    record_dynamics: bool = field(
        default=False,
        metadata={
            "help": "Write dynamics.npy, for compress --dynamics: trains on all rows, holds none "
            "out, and measures no accuracy."
        },
    )


def train_extractor(
    data: ImageDataArguments, training: ClassifierArguments, extractor: ExtractorArguments
) -> None:
    """Train, test on held-out rows, save, all into extractor.output_dir; say what came out."""
    import numpy as np
    from accelerate.utils import set_seed

    from dq_multimodal.data.source import pin_of
    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier

    is_recorded = extractor.record_dynamics
    if is_recorded and training.max_steps > 0:
        raise InputError("record_dynamics takes whole epochs: num_train_epochs, not max_steps")
    accelerator = record.make_accelerator()
    output_dir = Path(extractor.output_dir)
    source = load_rows(data)
    pins = {"n_processes": accelerator.num_processes, "source": pin_of(source.origin)}
    asked = record.describe_request(asdict(data), asdict(training), asdict(extractor), pins)
    if not record.begin(output_dir, asked, accelerator):
        return
    started = time.perf_counter()
    dataset = source.dataset
    order = np.random.default_rng(training.seed).permutation(len(dataset))
    n_held_out = 0 if is_recorded else max(1, round(HELD_OUT * len(dataset)))
    size = data.find_size(dataset)
    pictures, labels = data.pictures(dataset, size, np.sort(order[n_held_out:]))
    held_out = None
    if n_held_out:
        held_out, _ = data.pictures(dataset, size, order[:n_held_out], name="decode held-out")
    if len(labels) < 2:
        raise InputError(f"training needs labels of at least two classes, found {len(labels)}")
    set_seed(training.seed)
    net = build_classifier(extractor.model, len(labels), size)
    dynamics = Dynamics(output_dir) if is_recorded else None
    found = train_classifier(
        net, pictures, held_out, training, accelerator, output_dir, dynamics=dynamics
    )
    if accelerator.is_main_process:
        shape = (extractor.model, size, len(labels), labels)
        description = Classifier(*shape, *pictures.statistics)
        save_classifier(net, description, output_dir / "model")
        parts = [part for part in (pictures, held_out) if part is not None]
        found |= {
            "rows_trained": len(pictures.rows),
            "rows_unused": sum(len(part.unused) for part in parts),
            "parameters": sum(p.numel() for p in net.parameters()),
            "seconds": round(time.perf_counter() - started, 2),
        }
        if dynamics is not None:
            n_epochs = training.num_train_epochs
            about = {"model": extractor.model, "epochs": n_epochs, "rows": len(dataset)}
            more = {"source": pins["source"], "seed": training.seed, "command": sys.argv}
            dynamics.finish(about | more)
            said = f"trained on all {len(pictures.rows):,} labelled rows; "
            said += f"{output_dir / DYNAMICS} is ready as --dynamics"
        else:
            accuracy, n_tested = 100 * found["accuracy"], found["rows_tested"]
            said = f"{accuracy:.2f} % of {n_tested:,} held-out rows right"
        record.finish(output_dir, asked, accelerator.device, **found)
        accelerator.print(
            f"{extractor.model}: {said}; {output_dir / 'model'} is ready as --embedding-model"
        )
