"""Train the model that embeds images on the dataset itself, where no pretrained one fits.

    accelerate launch recipes/train_extractor.py --dataset_name uoft-cs/cifar10 --output_dir DIR
    accelerate launch recipes/train_extractor.py --model resnet10-narrow ...     # on CPUs
    dq-multimodal compress uoft-cs/cifar10 --embedding-model DIR/model
    accelerate launch recipes/train_extractor.py --record_dynamics ...
    dq-multimodal compress uoft-cs/cifar10 --embedding-model DIR/model --dynamics DIR/dynamics.npy

As both papers do for CIFAR-10: a ResNet-18, 10 epochs on all labelled rows. The same command goes
on where it was interrupted. Of the rows 2 %, drawn by the seed, are left out of training and say
how good the classifier is. With `--record_dynamics` none is: what the classifier says of every
row in every epoch is written to dynamics.npy, (epochs, rows, 3) float16: the probability of the
label, the largest other one, and the distance of all of them to the label (EL2N). They are those
of the training pass itself: augmented pictures, batch norm in training mode. Rows without a class
or a picture are NaN.
"""

from dq_multimodal.training.arguments import run
from dq_multimodal.training.classify import ClassifierArguments
from dq_multimodal.training.extractor import ExtractorArguments, train_extractor
from dq_multimodal.training.pictures import ImageDataArguments

if __name__ == "__main__":
    kinds = [ImageDataArguments, ClassifierArguments, ExtractorArguments]
    run(train_extractor, kinds, {"num_train_epochs": 10})
