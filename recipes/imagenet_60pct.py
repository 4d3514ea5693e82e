"""Keep 60 % of ImageNet-1K (or any large labelled image dataset), train ResNet-50, test it.

    accelerate launch recipes/imagenet_60pct.py
    accelerate launch recipes/imagenet_60pct.py --method random
    accelerate launch recipes/imagenet_60pct.py --dataset_name FOLDER --eval_split validation

As the paper has it: features of a ViT-base, bins class by class, 60 % of the rows. Images stay on
disk, memory-mapped; they are decoded as they are needed, ahead of the model. The ResNet is
trained for 100 epochs from random crops of 224 px, and tested on central crops. Flags, output
folder and resuming are those of recipes/cifar10.py.
"""

from dq_multimodal.training.arguments import run
from dq_multimodal.training.classify import ClassifierArguments
from dq_multimodal.training.image_run import ImageRunArguments, train_on_subset
from dq_multimodal.training.pictures import ImageDataArguments

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

if __name__ == "__main__":
    kinds = [ImageDataArguments, ClassifierArguments, ImageRunArguments]
    run(train_on_subset, kinds, DEFAULTS)
