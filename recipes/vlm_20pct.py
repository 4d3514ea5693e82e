"""Compress rows of pictures and text to 20 % and fine-tune a vision-language model on them.

    accelerate launch recipes/vlm_20pct.py                          # small, offline: see below
    accelerate launch recipes/vlm_20pct.py --method random          # the baseline
    accelerate launch recipes/vlm_20pct.py --method full            # all rows
    accelerate launch recipes/vlm_20pct.py --modality text          # chosen by the text alone
    accelerate launch recipes/vlm_20pct.py --dataset_name OWNER/NAME \
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct

One file makes every row of a comparison. Rows are pictures with chats, with questions and answers
or with captions, in one column of images or several, one picture a row, many or none. The loss
counts responses only. `--config FILE` reads flags from YAML; flags win. `--output_dir` then holds
selection/ (the run folder of `dq-multimodal compress`), model/ (LoRA adapter, or the whole model
with `--use_peft false`) and metrics.json, which says too which rows were left out and why. The same
command goes on where it was interrupted, from the last checkpoint (`--save_steps`).

Without `--dataset_name` the rows are drawn: coloured shapes, each with a question and an answer.
A small classifier, trained on all of them to name shape and colour, then embeds the pictures where
the method needs that and no `--embedding_model` is named. Without `--model_name_or_path` the model
is a small LLaVA with random weights, trained whole. Such a run tries out the recipe and says
nothing of real data.
"""

from pathlib import Path
from typing import Any

from dq_multimodal.config import DEFAULT_TEXT_MODEL, InputError
from dq_multimodal.training.selecting import FULL, HELD_OUT, PictureSelectionArguments
from dq_multimodal.training.sft_run import run_sft

SMALL = {
    "use_peft": False,
    "num_train_epochs": 30,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "activation_checkpointing": False,
}
"""How a small model with random weights is trained."""
MOST_ROWS = 10_000
"""Rows that its tokenizer is trained on."""


def make_missing(rows: Any, model: Any, output_dir: Path, state: Any) -> None:
    """Draw the rows, train their encoder and make the model, as far as they are not named."""
    from dq_multimodal.adapters.text import field_texts
    from dq_multimodal.data.pixels import undecoded
    from dq_multimodal.training.arguments import load_rows
    from dq_multimodal.training.shapes import FILES, SIDE, write_shapes
    from dq_multimodal.training.tiny_models import write_llava
    from dq_multimodal.training.vision_language import find_layout

    if rows.dataset_name is None:
        files = [output_dir / "data" / name for name in FILES]
        if state.is_main_process and not all(file.is_file() for file in files):
            write_shapes(output_dir / "data")
        state.wait_for_everyone()
        rows.dataset_name = str(files[0])
        if rows.eval_dataset_name is None:
            if (rows.dataset_split, rows.eval_split) != HELD_OUT:
                raise InputError("dataset_split and eval_split are of a dataset: name it, too")
            rows.dataset_split, rows.eval_split = "train", None
            rows.eval_dataset_name = str(files[1])
        is_plain = rows.method in (FULL, "random") or rows.modality == "text"
        if not is_plain and rows.embedding_model is None:
            train_encoder(rows.dataset_name, output_dir / "encoder")
            text_model = "" if rows.modality == "image" else f",{DEFAULT_TEXT_MODEL}"
            rows.embedding_model = f"{output_dir / 'encoder' / 'model'}{text_model}"
    if model.model_name_or_path is None:
        folder, dataset = output_dir / "llava", load_rows(rows).dataset
        columns = find_layout(dataset, rows.text_columns, rows.image_column).text
        if state.is_main_process and not folder.is_dir():
            first = undecoded(dataset, *columns)[:MOST_ROWS]
            write_llava(folder, field_texts([*first.values()]), image_size=SIDE)
        state.wait_for_everyone()
        model.model_name_or_path = str(folder)


def train_encoder(dataset_name: str, folder: Path) -> None:
    """Train a small classifier of the pictures, whose features embed them."""
    import torch

    from dq_multimodal.training.classify import ClassifierArguments
    from dq_multimodal.training.extractor import ExtractorArguments, train_extractor
    from dq_multimodal.training.pictures import ImageDataArguments

    n_threads = torch.get_num_threads()
    train_extractor(
        ImageDataArguments(dataset_name=dataset_name, image_size=16),
        ClassifierArguments(num_train_epochs=5, per_device_train_batch_size=32, learning_rate=0.2),
        ExtractorArguments(model="resnet10-narrow", output_dir=str(folder)),
    )
    torch.set_num_threads(n_threads)  # it took all cores


if __name__ == "__main__":
    shown = {"model_name_or_path": None, "max_length": None}
    run_sft(PictureSelectionArguments, shown, small=SMALL, prepare=make_missing)
