"""Train the nets whose trajectories `condense --method mtt` follows, on the real pictures.

    accelerate launch recipes/train_experts.py --dataset_name uoft-cs/cifar10 --output_dir DIR
    dq-multimodal condense uoft-cs/cifar10 --method mtt --experts DIR --images-per-class 10

The folder has a safetensors file for each expert, with its parameters after every epoch, and
experts.json. Experts are shared out among the processes, and are the same for any number of them.
The same command goes on where it was interrupted.
"""

from dq_multimodal.training.arguments import run
from dq_multimodal.training.experts import ExpertArguments, train_experts

if __name__ == "__main__":
    run(train_experts, [ExpertArguments])
