"""One line of a comparison: choose rows, fine-tune a language model on them by TRL, test, save."""

import os
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.training import record
from dq_multimodal.training.arguments import load_rows, run
from dq_multimodal.training.selecting import FULL, SelectionArguments, choose_rows

if TYPE_CHECKING:
    from dq_multimodal.data.source import Source


def run_sft(kind: type[SelectionArguments], defaults: dict[str, Any]) -> None:
    """Parse the flags of a recipe that fine-tunes by TRL, and run it.

    Args:
        kind: Its flags beside those of TRL.
        defaults: Of those of TRL, beside what is the same in all recipes.
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
    run(fine_tune, [kind, SFTConfig, ModelConfig], shared | defaults)


def fine_tune(rows: SelectionArguments, training: Any, model: Any) -> None:
    """Compress, fine-tune, evaluate, save; the flags are those of the recipe and of TRL."""
    from accelerate import PartialState
    from trl import SFTTrainer, get_peft_config

    from dq_multimodal.data.source import pin_of
    from dq_multimodal.models.locate import find_gguf, load_language_model, load_tokenizer, loading
    from dq_multimodal.training.sft import check_model, has_chats, response_loss, to_training_rows
    from dq_multimodal.training.weighted_sft import WeightedSFTTrainer
    from dq_multimodal.training.weights import WEIGHT_COLUMN, find_use, read_weights

    if training.output_dir in (None, "trainer_output"):
        name = Path(rows.dataset_name).name.split(".")[0]
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
    if state.is_main_process:
        check_pushes(rows, training, is_pushed)

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
    has_template = training.chat_template_path is not None
    is_chat = has_chats(source.dataset, rows.text_columns)
    name, options = str(model.model_name_or_path), dict(training.model_init_kwargs or {})
    gguf_file = options.get("gguf_file")
    needs_template = is_chat and not has_template
    check_model(name, needs_chat_template=needs_template, gguf_file=gguf_file)
    if state.is_main_process:
        record.start(output_dir, asked)
    folder = output_dir / "selection"
    kept, selection, made = choose_rows(rows, rows.dataset_name, source, folder, state)
    selection |= {"bytes": selection["bytes"]["subset_data"], "folder": made and str(folder)}
    train_rows, weights = to_training_rows(kept, rows.text_columns), read_weights(kept)
    use_weights = find_use(rows.use_weights, weights)
    trainer_of: Any = SFTTrainer
    if use_weights != "none":
        train_rows = train_rows.add_column(WEIGHT_COLUMN, weights)
        trainer_of = partial(WeightedSFTTrainer, use_weights=use_weights)

    if model.dtype:
        options["dtype"] = model.dtype
    net, tokenizer = name, None  # loaded by the trainer
    if find_gguf(name, gguf_file):
        net, tokenizer = load_language_model(name, **options), load_tokenizer(name, gguf_file)
        options = {}
    training.model_init_kwargs = options or None
    training.eval_packing = False  # the held-out loss is one of rows
    test_rows = to_training_rows(held_out.dataset, rows.text_columns) if held_out else None
    with loading(name, UnpicklingError):
        trainer = trainer_of(
            model=net,
            processing_class=tokenizer,
            args=training,
            train_dataset=train_rows,
            eval_dataset=test_rows,
            peft_config=get_peft_config(model),
        )
    started = time.perf_counter()
    checkpoint = record.last_checkpoint(output_dir / "checkpoints")
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
        "rows_cut_away": None if n_trained is None else len(kept) - n_trained,
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
    if state.is_main_process:
        record.finish(output_dir, asked, state.device, **found)
        state.print(summarise(found, output_dir))
    publish(rows, training, output_dir, state, is_pushed)


def load_both(rows: SelectionArguments) -> tuple["Source", "Source | None"]:
    """Load the rows to choose from and those that are held out, which must not overlap."""
    from dq_multimodal.data.source import load_source
    from dq_multimodal.data.splits import base_split

    source = load_rows(rows)
    if rows.eval_dataset_name is not None:
        return source, load_source(rows.eval_dataset_name, split=rows.eval_split or "train")
    if rows.eval_split is None:
        return source, None
    rows.check_held_out(len(load_rows(rows, base_split(rows.dataset_split)).dataset))
    return source, load_rows(rows, rows.eval_split)


def check_pushes(rows: SelectionArguments, training: Any, has_model: bool) -> None:
    """Raise before the work if what was asked to be pushed could not be."""
    from dq_multimodal.hub import check_push

    private = bool(training.hub_private_repo)
    if rows.push_subset_to_hub and rows.method != FULL:
        check_push(rows.push_subset_to_hub, private=private)
    if has_model:
        check_push(training.hub_model_id, private=private, kind="model")


def publish(
    rows: SelectionArguments, training: Any, output_dir: Path, state: Any, has_model: bool
) -> None:
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
    return (
        f"trained on {chosen['rows']:,} of {chosen['source_rows']:,} rows, {weighted}"
        f"{metrics['steps']} steps, training loss {first} -> {last}, {tested}\n"
        f"{output_dir}: selection/, model/, metrics.json"
    )
