"""Compress an instruction dataset to 20 % of its rows and fine-tune a language model on them.

    accelerate launch recipes/alpaca_20pct.py
    accelerate launch recipes/alpaca_20pct.py --method random            # the baseline
    accelerate launch recipes/alpaca_20pct.py --method full              # all rows
    accelerate launch recipes/alpaca_20pct.py --dataset_name my.jsonl --model_name_or_path DIR
    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/alpaca_20pct.py

One file makes every row of a comparison. `--config FILE` reads flags from YAML; flags win.
`--output_dir` then holds selection/ (the run folder of `dq-multimodal compress`), model/ (LoRA
adapter, or the whole model with `--use_peft false`) and metrics.json. The same command goes on
where it was interrupted.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import InputError
from dq_multimodal.training.arguments import FULL, SelectionArguments, fail, read_arguments

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig, SFTConfig, SFTTrainer

DAY_SECONDS = 86_400


def main() -> None:
    """Parse the flags and run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from trl import ModelConfig, SFTConfig

    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU") != "true"
    defaults = {
        "model_name_or_path": "huggyllama/llama-7b",
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "num_train_epochs": 3,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "max_length": 512,
        "report_to": ["none"],
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "ddp_timeout": DAY_SECONDS,  # other processes wait while the first one selects
    }
    parsed = read_arguments([SelectionArguments, SFTConfig, ModelConfig], defaults)
    try:
        train(*parsed)
    except InputError as error:
        sys.exit(fail(error))


def train(rows: SelectionArguments, training: "SFTConfig", model: "ModelConfig") -> None:
    """Compress, fine-tune, evaluate, save."""
    from accelerate import PartialState
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTTrainer, get_peft_config

    from dq_multimodal.source import load_source
    from dq_multimodal.training.sft import check_model, response_loss, to_training_rows

    if training.output_dir in (None, "trainer_output"):
        name = Path(rows.dataset_name).name.split(".")[0]
        training.output_dir = f"runs/{name}-{rows.method}-{rows.keep_ratio:g}-sft"
    output_dir = Path(training.output_dir)
    _ = training.device  # starts the process group
    state = PartialState()
    asked = {**vars(rows), "model_name_or_path": model.model_name_or_path, "seed": training.seed}
    asked |= {"max_steps": training.max_steps, "num_train_epochs": training.num_train_epochs}
    asked |= {"learning_rate": training.learning_rate, "use_peft": model.use_peft}
    if is_complete(output_dir / "metrics.json", asked):
        state.print(f"{output_dir} is already complete")
        return
    check_model(str(model.model_name_or_path))

    kept, selection = choose_rows(rows, output_dir / "selection", state)
    held_out = None
    if rows.eval_dataset_name or rows.eval_split:
        held_out = load_source(
            rows.eval_dataset_name or rows.dataset_name,
            split=rows.eval_split or "train",
            config_name=rows.dataset_config_name,
            revision=rows.dataset_revision,
        ).dataset

    if model.dtype:
        training.model_init_kwargs = {**(training.model_init_kwargs or {}), "dtype": model.dtype}
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=to_training_rows(kept, rows.text_columns),
        eval_dataset=to_training_rows(held_out, rows.text_columns) if held_out else None,
        peft_config=get_peft_config(model),
    )
    started = time.perf_counter()
    checkpoint = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    train_seconds = time.perf_counter() - started
    started = time.perf_counter()
    evaluation = None
    if held_out:
        batch_size = training.per_device_eval_batch_size
        evaluation = response_loss(trainer, trainer.eval_dataset, batch_size)
        evaluation["rows_asked"] = len(held_out)
    eval_seconds = time.perf_counter() - started

    trainer.save_model(str(output_dir / "model"))
    metrics = {
        "complete": True,
        "asked": asked,
        "selection": selection,
        "rows_trained": len(trainer.train_dataset),
        "rows_cut_away": len(kept) - len(trainer.train_dataset),
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
        "device": device_name(state),
        "command": sys.argv,
        "versions": {p: version(p) for p in ("dq-multimodal", "torch", "transformers", "trl")},
        "log_history": trainer.state.log_history,
    }
    if state.is_main_process:
        write_json(output_dir / "metrics.json", metrics)
        print(summarise(metrics, output_dir))
    if training.push_to_hub:
        trainer.push_to_hub()


def choose_rows(
    rows: SelectionArguments, folder: Path, state: Any
) -> tuple["Dataset", dict[str, Any]]:
    """Give the rows to train on and what metrics.json says of them; only one process selects."""
    from dq_multimodal import Run, compress
    from dq_multimodal.source import load_source
    from dq_multimodal.subset import OWN_COLUMNS, count_bytes

    if rows.method == FULL:
        dataset = load_source(
            rows.dataset_name,
            split=rows.dataset_split or "train",
            config_name=rows.dataset_config_name,
            revision=rows.dataset_revision,
        ).dataset
        size = {"rows": len(dataset), "bytes": count_bytes(dataset)}
        return dataset, {**size, "source_rows": len(dataset), "seconds": {}, "folder": None}
    if state.is_main_process:
        run = compress(rows.dataset_name, output_dir=folder, **rows.options())
        if rows.push_subset_to_hub:
            run.push_to_hub(rows.push_subset_to_hub)
    state.wait_for_everyone()
    if not folder.is_dir():
        raise InputError(f"{folder} must lie on a file system that all processes share")
    run = Run(folder)
    return run.subset.remove_columns(list(OWN_COLUMNS)), {
        "rows": run.manifest["kept"],
        "bytes": run.manifest["bytes"]["subset_data"],
        "source_rows": run.manifest["rows"],
        "seconds": run.manifest["seconds"],
        "folder": str(folder),
    }


def is_complete(path: Path, asked: dict[str, Any]) -> bool:
    """Say whether the very same was run here; raise if something else was."""
    if not path.is_file():
        return False
    before = json.loads(path.read_text())["asked"]
    differing = [name for name in asked if before.get(name) != asked[name]]
    if differing:
        raise InputError(
            f"{path.parent} holds a run with another {', '.join(differing)}: name another "
            "--output_dir or remove it"
        )
    return True


def losses(trainer: "SFTTrainer") -> dict[str, float]:
    """Give the first and the last logged training loss."""
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"first": logged[0], "last": logged[-1]} if logged else {}


def count_parameters(trainer: "SFTTrainer") -> dict[str, int]:
    """Count all parameters and those that were trained."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"all": sum(n for n, _ in sizes), "trained": sum(n for n, grad in sizes if grad)}


def device_name(state: Any) -> str:
    """Name the device, as results files do."""
    import torch

    if state.device.type == "cuda":
        return torch.cuda.get_device_name(state.device)
    return f"cpu, {torch.get_num_threads()} threads"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def summarise(metrics: dict[str, Any], output_dir: Path) -> str:
    """Say in two lines what came out."""
    held_out = metrics["held_out"]
    tested = "no held-out rows"
    if held_out:
        tested = f"held-out response loss {held_out['response_loss']:.4f} nats a token"
        tested += f" on {held_out['rows']:,} rows"
    first, last = metrics["train_loss"].get("first"), metrics["train_loss"].get("last")
    return (
        f"trained on {metrics['rows_trained']:,} of {metrics['selection']['source_rows']:,} rows, "
        f"{metrics['steps']} steps, training loss {first} -> {last}, {tested}\n"
        f"{output_dir}: selection/, model/, metrics.json"
    )


if __name__ == "__main__":
    main()
