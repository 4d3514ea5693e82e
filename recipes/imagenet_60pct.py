"""Keep 60 % of ImageNet-1K (or any large labelled image dataset), train ResNet-50, test it.

    accelerate launch recipes/imagenet_60pct.py
    accelerate launch recipes/imagenet_60pct.py --method random
    accelerate launch recipes/imagenet_60pct.py --dataset_name FOLDER --eval_split validation

As the paper has it: features of a ViT-base, bins class by class, 60 % of the rows. Images stay on
disk, memory-mapped; they are decoded as they are needed, ahead of the model. The ResNet is
trained for 100 epochs from random crops of 224 px, and tested on central crops. Flags, output
folder and resuming are those of recipes/cifar10.py.
"""

import sys

from dq_multimodal.config import InputError
from dq_multimodal.training.arguments import fail, read_arguments
from dq_multimodal.training.classify import ClassifierArguments
from dq_multimodal.training.image_data import ImageDataArguments
from dq_multimodal.training.image_run import ImageRunArguments, train_on_subset

DEFAULTS = {
    "dataset_name": "ILSVRC/imagenet-1k",
    "eval_split": "validation",
    "keep_ratio": 0.6,
    "embedding_model": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "model": "resnet50",
    "image_size": 224,
    "num_train_epochs": 100,
    "per_device_train_batch_size": 256,
    "learning_rate": 0.1,
    "weight_decay": 1e-4,
    "warmup_ratio": 0.05,
    "label_smoothing": 0.1,
    "dataloader_num_workers": 8,
}


def main() -> None:
    """Parse the flags and run."""
    from accelerate import PartialState

    kinds = [ImageDataArguments, ClassifierArguments, ImageRunArguments]
    parsed = read_arguments(kinds, DEFAULTS)
    try:
        said = train_on_subset(*parsed)
    except InputError as error:
        sys.exit(fail(error))
    if PartialState().is_main_process:
        print(said)


if __name__ == "__main__":
    main()
