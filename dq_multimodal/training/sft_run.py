"""One line of a comparison: choose rows, fine-tune a language model on them by TRL, test, save."""

import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.training import record
from dq_multimodal.training.arguments import load_rows, read_arguments, run
from dq_multimodal.training.selecting import FULL, HeldOutArguments, choose_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from dq_multimodal.data.source import Source

Prepare = Callable[[Any, Any, Path, Any], None]
"""Makes the rows and the model that are not named; takes their flags, output folder and state."""


def run_sft(
    kind: type[HeldOutArguments],
    defaults: dict[str, Any],
    *,
    small: dict[str, Any] | None = None,
    prepare: Prepare | None = None,
) -> None:
    """Parse the flags of a recipe that fine-tunes by TRL, and run it.

    Args:
        kind: Its flags beside those of TRL.
        defaults: Of those of TRL, beside what is the same in all recipes.
        small: More of them, where no model is named.
        prepare: Of a recipe for rows with pictures.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from trl import ModelConfig, SFTConfig

    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    on_gpu = torch.cuda.is_available() and not wants_cpu
    shared = {
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "num_train_epochs": 3,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "report_to": ["none"],
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "ddp_timeout": record.WAIT_SECONDS,  # as of all recipes
    }
    kinds, defaults = [kind, SFTConfig, ModelConfig], shared | defaults
    if small and read_arguments(kinds, defaults)[2].model_name_or_path is None:
        defaults |= small
    run(partial(fine_tune, prepare=prepare), kinds, defaults)


def fine_tune(rows: Any, training: Any, model: Any, *, prepare: Prepare | None) -> None:
    """Compress, fine-tune, evaluate, save; the flags are those of the recipe and of TRL."""
    from accelerate import PartialState
    from trl import SFTTrainer, get_peft_config

    from dq_multimodal.data.source import pin_of
    from dq_multimodal.models.locate import find_gguf, load_language_model, load_tokenizer, loading
    from dq_multimodal.training.sft import check_model, has_chats, response_loss
    from dq_multimodal.training.weighted_sft import WeightedSFTTrainer
    from dq_multimodal.training.weights import WEIGHT_COLUMN, find_use, read_weights

    if training.output_dir in (None, "trainer_output"):
        name = Path(rows.dataset_name or "shapes").name.split(".")[0]
        size = f"{rows.keep_ratio:g}" if rows.keep_rows is None else f"{rows.keep_rows}-rows"
        training.output_dir = f"runs/{name}-{rows.method}-{size}-sft"
    output_dir = Path(training.output_dir)
    training.output_dir = str(output_dir / "checkpoints")
    training.hub_model_id = training.hub_model_id or output_dir.name
    is_pushed, training.push_to_hub = training.push_to_hub, False  # pushed when all is done
    _ = training.device  # starts the process group
    state = PartialState()
    asked_code = (training.model_init_kwargs or {}).get("trust_remote_code")
    if training.trust_remote_code or asked_code:  # trl passes False on
        raise InputError("trust_remote_code: code that comes with a model is never run here")
    has_images = prepare is not None
    if has_images:
        check_settings(rows, training)
    if state.is_main_process:
        check_pushes(rows, training, is_pushed)
    if prepare is not None:
        prepare(rows, model, output_dir, state)

    source, held_out = load_both(rows)
    pins = {
        "n_processes": state.num_processes,
        "source": pin_of(source.origin),
        "held_out": held_out and pin_of(held_out.origin),
    }
    asked = record.describe_request(vars(rows), training.to_dict(), vars(model), pins)
    if record.is_complete(output_dir, asked):
        state.print(f"{output_dir} is already complete")
        publish(rows, training, output_dir, state, is_pushed)
        return
    is_chat = has_images or has_chats(source.dataset, rows.text_columns)
    name, options = str(model.model_name_or_path), dict(training.model_init_kwargs or {})
    gguf_file = options.get("gguf_file")
    needs_template = is_chat and training.chat_template_path is None
    check_model(
        name, needs_chat_template=needs_template, gguf_file=gguf_file, has_images=has_images
    )
    if state.is_main_process:
        record.start(output_dir, asked)
    folder = output_dir / "selection"
    kept, selection, made = choose_rows(rows, rows.dataset_name, source, folder, state)
    selection |= {"bytes": selection["bytes"]["subset_data"], "folder": made and str(folder)}
    parts = {"train": kept} | ({"held_out": held_out.dataset} if held_out else {})
    parts, pictures = convert(parts, rows, state, has_images)
    train_rows, weights = parts["train"], read_weights(kept)
    use_weights = find_use(rows.use_weights, weights)
    trainer_of: Any = SFTTrainer
    if use_weights != "none":
        if not has_images:
            train_rows = train_rows.add_column(WEIGHT_COLUMN, weights)
        trainer_of = partial(WeightedSFTTrainer, use_weights=use_weights)

    if model.dtype:
        options["dtype"] = model.dtype
    checkpoint = record.last_checkpoint(output_dir / "checkpoints")
    is_whole = checkpoint is not None and any(Path(checkpoint).glob("model*.safetensors"))
    net, tokenizer = name, None  # loaded by the trainer
    if checkpoint and is_whole:
        net, options = checkpoint, {k: v for k, v in options.items() if k != "gguf_file"}
    elif find_gguf(name, gguf_file):
        net, tokenizer = load_language_model(name, **options), load_tokenizer(name, gguf_file)
        options = {}
    training.model_init_kwargs = options or None
    training.eval_packing = False  # the held-out loss is one of rows
    with loading(name, UnpicklingError):
        trainer = trainer_of(
            model=net,
            processing_class=tokenizer,
            args=training,
            train_dataset=train_rows,
            eval_dataset=parts.get("held_out"),
            peft_config=get_peft_config(model),
        )
    if is_whole and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        # transformers 5.23 saves weights by other names than those it would look for here
        trainer._load_from_checkpoint = lambda *_: None
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    train_seconds = time.perf_counter() - started
    started = time.perf_counter()
    evaluation = None
    if held_out:
        batch_size = training.per_device_eval_batch_size
        evaluation = response_loss(trainer, trainer.eval_dataset, batch_size)
        evaluation["rows_asked"] = len(held_out.dataset)
    eval_seconds = time.perf_counter() - started

    trainer.save_model(str(output_dir / "model"))
    n_trained = None if training.packing else len(trainer.train_dataset)
    found = {
        "selection": selection,
        "use_weights": use_weights,
        "rows_trained": n_trained,  # not known when rows are packed
        "rows_cut_away": None if n_trained is None else len(train_rows) - n_trained,
        "steps": result.global_step,
        "train_loss": losses(trainer),
        "held_out": evaluation,
        "seconds": {
            "train": round(train_seconds, 2),
            "eval": round(eval_seconds, 2),
            "is_resumed": checkpoint is not None,
        },
        "parameters": count_parameters(trainer),
        "n_processes": state.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "versions": {p: version(p) for p in ("dq-multimodal", "torch", "transformers", "trl")},
        "log_history": trainer.state.log_history,
    }
    if has_images:
        found["pictures"] = pictures
    if state.is_main_process:
        record.finish(output_dir, asked, state.device, **found)
        state.print(summarise(found, output_dir))
    publish(rows, training, output_dir, state, is_pushed)


def convert(
    parts: dict[str, "Dataset"], rows: Any, state: Any, has_images: bool
) -> tuple[dict[str, "Dataset"], dict[str, Any]]:
    """Turn rows into those that TRL takes; of rows with pictures, say what is read of them."""
    from dq_multimodal.training.sft import to_training_rows
    from dq_multimodal.training.vision_language import to_vlm_rows

    if not has_images:
        return {n: to_training_rows(part, rows.text_columns) for n, part in parts.items()}, {}
    found, about = {}, {}
    for name, part in parts.items():
        found[name], about[name] = to_vlm_rows(part, rows.text_columns, rows.image_column)
        state.print(f"{name}: {describe_rows(about[name])}")
    return found, about


def describe_rows(about: dict[str, Any]) -> str:
    """Say in one line what `to_vlm_rows` found."""
    from dq_multimodal.training.vision_language import list_reasons

    said = f"{about['rows']:,} rows, {about['rows_with_images']:,} of them with pictures"
    if left_out := about["rows_left_out"]:
        said += f"; {sum(left_out.values()):,} left out: {list_reasons(left_out)}"
    if "chat" in about:
        return f"{said}; chats in {' '.join(about['chat'])}"
    asked = about["prompt"]
    asked = repr(asked) if isinstance(asked, str) else ", ".join(asked)
    return f"{said}; {asked} -> {about['response']}"


def check_settings(rows: Any, training: Any) -> None:
    """Raise for settings that do not go with pictures."""
    for name in ("packing", "padding_free", "assistant_only_loss", "pad_to_multiple_of"):
        if getattr(training, name):
            raise InputError(f"{name} is not for rows with pictures")
    if training.max_length is not None:
        raise InputError("max_length would cut pictures and answers: leave it out")
    if rows.use_weights == "loss":
        raise InputError("use_weights loss is not for rows with pictures: use sample")
    training.remove_unused_columns = False  # the rows become those of TRL as they are read


def load_both(rows: Any) -> tuple["Source", "Source | None"]:
    """Load the rows to choose from and those that are held out, which must not overlap."""
    from dq_multimodal.data.source import load_source
    from dq_multimodal.data.splits import base_split

    source = load_rows(rows)
    if rows.eval_dataset_name is not None:
        split, folder = rows.eval_split or "train", getattr(rows, "image_folder", None)
        return source, load_source(rows.eval_dataset_name, split=split, image_folder=folder)
    if rows.eval_split is None:
        return source, None
    rows.check_held_out(len(load_rows(rows, base_split(rows.dataset_split)).dataset))
    return source, load_rows(rows, rows.eval_split)


def check_pushes(rows: Any, training: Any, has_model: bool) -> None:
    """Raise before the work if what was asked to be pushed could not be."""
    from dq_multimodal.hub import MODEL, check_push

    private = bool(training.hub_private_repo)
    if rows.push_subset_to_hub and rows.method != FULL:
        check_push(rows.push_subset_to_hub, private=private)
    if has_model:
        check_push(training.hub_model_id, private=private, kind=MODEL)


def publish(rows: Any, training: Any, output_dir: Path, state: Any, has_model: bool) -> None:
    """Push what was asked to be pushed: the subset, the model."""
    if not state.is_main_process:
        return
    from dq_multimodal import Run
    from dq_multimodal.hub import push_model

    private = bool(training.hub_private_repo)
    if rows.push_subset_to_hub and rows.method != FULL:
        address = Run(output_dir / "selection").push_to_hub(
            rows.push_subset_to_hub, private=private
        )
        state.print(f"pushed the subset: {address}")
    if has_model:
        address = push_model(output_dir / "model", training.hub_model_id, private=private)
        state.print(f"pushed the model: {address}")


def losses(trainer: Any) -> dict[str, float]:
    """Give the first and the last logged training loss."""
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"first": logged[0], "last": logged[-1]} if logged else {}


def count_parameters(trainer: Any) -> dict[str, int]:
    """Count all parameters and those that were trained."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"all": sum(n for n, _ in sizes), "trained": sum(n for n, grad in sizes if grad)}


def summarise(metrics: dict[str, Any], output_dir: Path) -> str:
    """Say in two lines what came out."""
    held_out = metrics["held_out"]
    tested = "no held-out response tokens"
    if held_out and held_out["response_loss"] is not None:
        tested = f"held-out response loss {held_out['response_loss']:.4f} nats a token"
        tested += f" on {held_out['rows']:,} rows"
    first, last = metrics["train_loss"].get("first"), metrics["train_loss"].get("last")
    chosen, use_weights = metrics["selection"], metrics["use_weights"]
    weighted = "" if use_weights == "none" else f"weights in the {use_weights}, "
    n_rows = metrics["rows_trained"] if "pictures" in metrics else chosen["rows"]
    return (
        f"trained on {n_rows:,} of {chosen['source_rows']:,} rows, {weighted}"
        f"{metrics['steps']} steps, training loss {first} -> {last}, {tested}\n"
        f"{output_dir}: selection/, model/, metrics.json"
    )
