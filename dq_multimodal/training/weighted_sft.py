"""Supervised fine-tuning in which rows weigh differently, on top of TRL."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, tensor
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from dq_multimodal.config import InputError
from dq_multimodal.training.weights import WEIGHT_COLUMN, UseWeights, draw_rows

WEIGHTS = "row_weights"
"""Their name in a batch."""


class WeightedSampler(Sampler):
    """Draws as many rows as there are, with replacement, in proportion to their weights.

    Args:
        weights: (n,), at least 0.
        seed: The draws of an epoch follow from it and the epoch.
    """

    def __init__(self, weights: Float[ndarray, " n"], seed: int) -> None:
        self.weights, self.seed, self.epoch = weights, seed, 0

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        return iter(draw_rows(self.weights, len(self), self.seed, self.epoch).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Draw those of another epoch."""
        self.epoch = epoch


class WeightedSFTTrainer(SFTTrainer):
    r"""TRL's trainer, for training rows that carry `dq_weight`.

    "loss": with the weights $w_i$ of the rows of a batch (all of its passes and processes) and
    their response tokens $y_{it}$, $T_i$ of them, a step lowers

    $$-\frac{\sum_i w_i \sum_t \log p(y_{it} \mid y_{i,<t}, x_i)}{\sum_i T_i}$$

    after one factor for all rows has brought $\sum_i w_i T_i$ over the training rows to
    $\sum_i T_i$. So equal weights change nothing, and the mean over batches is the weighted mean
    over all response tokens. (Were each batch divided by its own $\sum_i w_i T_i$, weights would do
    less the smaller the batches, and nothing in batches of one row.)

    "sample": `WeightedSampler`, and TRL's own loss.

    Args:
        use_weights: "loss" or "sample".
        given: Arguments of SFTTrainer.

    Raises:
        InputError: For settings under which rows cannot be told apart, or whose loss is no sum over
            tokens; or if the weights of all rows that are left after truncation are 0.
    """

    def __init__(self, *, use_weights: UseWeights, args: SFTConfig, **given: Any) -> None:
        check_settings(args, use_weights)
        super().__init__(args=args, **given)
        self.use_weights = use_weights
        trained: Any = self.train_dataset
        rows = trained.with_format(None)
        self.row_weights = np.asarray(rows[WEIGHT_COLUMN], dtype=np.float64)
        if not self.row_weights.any():
            raise InputError("the weights of all rows that are trained on are 0")
        if use_weights == "loss":
            counts = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
            factor = float(np.sum(counts) / max(np.dot(self.row_weights, counts), 1e-30))
            self.data_collator = _with_weights(self.data_collator, factor)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: Any = self._signature_columns
        if WEIGHT_COLUMN not in names:
            names.append(WEIGHT_COLUMN)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.use_weights == "sample":
            return WeightedSampler(self.row_weights, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], *given: Any, **options: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Give the loss of a pass; the log-probabilities of a row are multiplied by its weight."""
        weights = inputs.pop(WEIGHTS, None)
        if weights is None:
            return super().compute_loss(model, inputs, *given, **options)

        def weighted(**batch: Any) -> Any:
            outputs = model(**batch)
            outputs.log_probs = outputs.log_probs * weights[:, None]
            return outputs

        return super().compute_loss(weighted, inputs, *given, **options)


def check_settings(args: SFTConfig, use_weights: UseWeights) -> None:
    """Raise if weights do not go with the settings."""
    if args.packing:
        raise InputError("packing puts rows together that weigh differently: use_weights none")
    if use_weights == "loss":
        if args.padding_free or args.label_smoothing_factor or args.loss_type != "nll":
            raise InputError(
                "use_weights loss does not go with padding_free, label_smoothing_factor and "
                "loss_type other than nll"
            )
    elif args.train_sampling_strategy != "random":
        raise InputError("use_weights sample does not go with another train_sampling_strategy")


def _with_weights(collate: Any, factor: float) -> Any:
    """Add the weights to the batches that a collator makes; rows that are tested have none."""

    def add(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        if WEIGHT_COLUMN in rows[0]:
            batch[WEIGHTS] = tensor([row[WEIGHT_COLUMN] * factor for row in rows])
        return batch

    return add
