"""Keep a share of CIFAR-10 (or any labelled image dataset), train a classifier on it, test it.

    accelerate launch recipes/cifar10.py --keep_ratio 0.1 --method dq --model resnet18
    accelerate launch recipes/cifar10.py --keep_ratio 0.125 --drop_ratio 0.2    # equal bytes
    accelerate launch recipes/cifar10.py --method random                        # the baseline
    accelerate launch recipes/cifar10.py --method full                          # all rows
    accelerate launch recipes/cifar10.py --config recipes/configs/cifar10_short.yaml    # on CPUs

The schedule is that of the papers: 200 epochs, batches of 128 (32 at or below 10 % of the rows),
SGD from 0.1 falling as a cosine. Features come from `--embedding_model`, a folder made by
recipes/train_extractor.py. With `--drop_ratio` the classifier is trained on the restored images:
patches are dropped, stored, read back and filled (`--fill mean|zero|mae`).

`--output_dir` then holds selection/ (the run folder of `dq-multimodal compress`), model/ and
metrics.json, which says accuracy, seconds and bytes. The same command goes on where it was
interrupted.
"""

from dq_multimodal.training.arguments import run
from dq_multimodal.training.classify import ClassifierArguments
from dq_multimodal.training.image_run import ImageRunArguments, train_on_subset
from dq_multimodal.training.pictures import ImageDataArguments

if __name__ == "__main__":
    run(train_on_subset, [ImageDataArguments, ClassifierArguments, ImageRunArguments])
