"""Fine-tuning with weights of rows against the definition of its loss."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_gguf import small_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dq_multimodal import InputError
from dq_multimodal.training.weighted_sft import WeightedSFTTrainer
from dq_multimodal.training.weights import draw_rows

RATE = 0.5
LENGTHS, PROMPTS = (5, 9, 6, 12), (2, 3, 4, 2)


def make_rows(weights=None):
    rng = np.random.default_rng(0)
    rows = []
    for length, n_prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = rng.integers(0, 256, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * n_prompt + ids[n_prompt:]})
    dataset = Dataset.from_list(rows)
    return dataset if weights is None else dataset.add_column("dq_weight", weights)


def make_tokenizer():
    words = {f"w{k}": k for k in range(258)} | {"</s>": 258}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def make_trainer(folder, rows, kind=SFTTrainer, settings=None, **more):
    """One step of gradient descent on four rows, in two passes of two."""
    args = SFTConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            **(settings or {}),
        }
    )
    tokenizer = make_tokenizer()
    return kind(
        model=small_llama(n_layers=1),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        **more,
    )


def after_a_step(folder, rows, **more):
    trainer = make_trainer(folder, rows, **more)
    trainer.train()
    return trainer.model.lm_head.weight.detach(), trainer.state.log_history[-1]["train_loss"]


def by_definition(weights):
    """Sum the weighted losses of the response tokens row by row; divide by the weighted count."""
    model, total, count = small_llama(n_layers=1), 0.0, 0.0
    for row, weight in zip(make_rows(), weights, strict=True):
        log_p = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for at in range(1, len(row["input_ids"])):
            if row["labels"][at] != -100:
                total = total - weight * log_p[at - 1, row["labels"][at]]
                count += weight
    loss = total / count
    (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
    return model.lm_head.weight.detach() - RATE * gradient, loss.item()


def test_the_loss_is_the_weighted_mean_over_response_tokens(tmp_path):
    weights = [0.25, 2.5, 1.25, 0.0]
    weighted = {"kind": WeightedSFTTrainer, "use_weights": "loss"}
    got, loss = after_a_step(tmp_path / "a", make_rows(weights), **weighted)
    wanted, wanted_loss = by_definition(weights)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    plain, plain_loss = after_a_step(tmp_path / "b", make_rows())
    assert (plain - wanted).abs().max() > 1e-3
    for number in (1.0, 3.0):
        equal, equal_loss = after_a_step(tmp_path / "c", make_rows([number] * 4), **weighted)
        torch.testing.assert_close(equal, plain, rtol=1e-5, atol=1e-7)
        assert equal_loss == pytest.approx(plain_loss, rel=1e-6)


def test_weights_count_in_batches_of_one_row(tmp_path):
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    ends = []
    for weights in ([1.0] * 4, [3.0, 1.0, 1.0, 1.0]):
        rows = make_rows(weights)
        trainer = make_trainer(tmp_path, rows, WeightedSFTTrainer, one, use_weights="loss")
        batch = trainer.data_collator([trainer.train_dataset[0]])
        ends.append(trainer.compute_loss(trainer.model, batch).item())
    n_tokens = [length - n for length, n in zip(LENGTHS, PROMPTS, strict=True)]
    factor = sum(n_tokens) / (sum(n_tokens) + 2 * n_tokens[0])
    assert ends[1] == pytest.approx(3 * factor * ends[0], rel=1e-5)


def test_rows_are_drawn_by_their_weights_anew_each_epoch(tmp_path):
    weights = [1.0, 0.0, 2.0, 1.0]
    trainer = make_trainer(
        tmp_path, make_rows(weights), WeightedSFTTrainer, {"seed": 3}, use_weights="sample"
    )
    ids = trainer.train_dataset["input_ids"]
    loader = trainer.get_train_dataloader()
    for epoch in (1, 4):
        loader.set_epoch(epoch)
        drawn = [row for batch in loader for row in batch["input_ids"].tolist()]
        wanted = draw_rows(np.array(weights), 4, 3, epoch)
        assert [row[: len(ids[k])] for row, k in zip(drawn, wanted, strict=True)] == [
            ids[k] for k in wanted
        ]
    assert "row_weights" not in next(iter(loader))
    trainer.train()


@pytest.mark.parametrize(
    ("settings", "use", "message"),
    [
        ({"packing": True, "max_length": 8}, "sample", "packing puts rows together"),
        ({"label_smoothing_factor": 0.1}, "loss", "label_smoothing_factor"),
        ({"train_sampling_strategy": "group_by_length"}, "sample", "train_sampling_strategy"),
    ],
)
def test_settings_that_weights_do_not_go_with(tmp_path, settings, use, message):
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, make_rows([1.0] * 4), WeightedSFTTrainer, settings, use_weights=use)
