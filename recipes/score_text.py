"""Measure the loss of every response, with and without its instruction, by a small language model.

    python recipes/score_text.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_dir DIR
    python recipes/score_text.py --model_name_or_path model.gguf --output_dir DIR
    python recipes/score_text.py --model_name_or_path MODEL --checkpoints RUN/checkpoints/*
    dq-multimodal compress tatsu-lab/alpaca --dynamics DIR/losses.npy

The quotient of the two losses is IFD; losses at several checkpoints, which recipes/alpaca_20pct.py
leaves with --save_steps, are trajectories. Rows become prompts and responses as in that recipe;
`--checkpoints` are whole models or LoRA adapters of the model. `--output_dir` then holds
losses.npy, (checkpoints, rows, 2) float32 in nats a token, NaN where a row has no response;
tokens.npy, (rows,) int32, the response tokens; and losses.json. The same command goes on where it
was interrupted; under `accelerate launch` the processes share the rows.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dq_multimodal.config import check_count
from dq_multimodal.training import record
from dq_multimodal.training.arguments import SOURCE, flags_of, load_rows, run

BLOCK_ROWS = 512
"""Rows are measured and kept in blocks of so many; so few are lost at most in a process."""
BLOCKS = "blocks"
PASS_TOKENS = {"cpu": 2048, "cuda": 8192}


ScoreFlags = flags_of(*SOURCE, "text_columns", dataset="tatsu-lab/alpaca")


@dataclass
class ScoreArguments(ScoreFlags):
    """Which rows, and by which model."""

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M",
        metadata={"help": "Causal language model: Hub id, folder or .gguf file."},
    )
    checkpoints: list[str] | None = field(
        default=None,
        metadata={"help": "Models, or LoRA adapters of the model. Default: the model itself."},
    )
    max_length: int = field(default=512, metadata={"help": "Tokens after which a row is cut."})
    pass_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a forward pass. Default: 2048, 8192 on a GPU."}
    )
    output_dir: str = field(default="runs/losses", metadata={"help": "Folder of the run."})

    def __post_init__(self) -> None:
        check_count("max_length", self.max_length)
        if self.pass_tokens is not None:
            check_count("pass_tokens", self.pass_tokens)


def main() -> None:
    """Parse the flags and run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(score, [ScoreArguments])


def score(args: ScoreArguments) -> None:
    """Measure all rows at all checkpoints, block by block, and put the blocks together."""
    import numpy as np
    from tqdm import tqdm

    from dq_multimodal.data.source import pin_of
    from dq_multimodal.files import write_text
    from dq_multimodal.models.locate import hash_weights, load_tokenizer
    from dq_multimodal.training.sft import check_model, has_chats
    from dq_multimodal.training.text_losses import (
        COLUMNS,
        load_checkpoint_of,
        measure_losses,
        to_token_rows,
    )

    accelerator = record.make_accelerator()
    output_dir, device = Path(args.output_dir), accelerator.device
    source = load_rows(args)
    model, checkpoints = args.model_name_or_path, args.checkpoints or [args.model_name_or_path]
    pins = {
        "source": pin_of(source.origin),
        "weights": [hash_weights(name) for name in (model, *checkpoints)],
        "device_type": device.type,
    }
    asked = record.describe_request(asdict(args), pins)
    if record.is_complete(output_dir, asked):
        accelerator.print(f"{output_dir} is already complete")
        return
    check_model(model, needs_chat_template=has_chats(source.dataset, args.text_columns))
    started = time.perf_counter()
    if accelerator.is_main_process:
        record.start(output_dir, asked)
        (output_dir / BLOCKS).mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    tokenizer = load_tokenizer(model)
    with accelerator.main_process_first():  # the others find its rows in the cache
        rows = to_token_rows(source.dataset, tokenizer, args.text_columns, args.max_length)
    begin = tokenizer.bos_token_id
    begin = tokenizer.eos_token_id if begin is None else begin
    pass_tokens = args.pass_tokens or PASS_TOKENS.get(device.type, PASS_TOKENS["cuda"])
    starts = range(0, len(rows), BLOCK_ROWS)
    total, is_quiet = len(rows) * len(checkpoints), not accelerator.is_main_process
    with tqdm(total=total, desc="losses", unit="row", disable=is_quiet) as bar:
        for number, name in enumerate(checkpoints):
            net = None
            for k, start in enumerate(starts):
                block = rows.select(range(start, min(start + BLOCK_ROWS, len(rows))))
                path = block_path(output_dir, number, start)
                is_own = k % accelerator.num_processes == accelerator.process_index
                if is_own and not path.exists():
                    net = net or load_checkpoint_of(model, name, device)
                    how = {"pass_tokens": pass_tokens, "device": device}
                    save_array(path, measure_losses(net, block, begin, **how))
                bar.update(len(block))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    parts = [
        [np.load(block_path(output_dir, number, start)) for start in starts]
        for number in range(len(checkpoints))
    ]
    losses = np.stack([np.concatenate(part) for part in parts])
    counts = [max(0, len(row["ids"]) - row["n_prompt"]) for row in rows]
    save_array(output_dir / "tokens.npy", np.array(counts, dtype=np.int32))
    about = {
        "columns": COLUMNS,
        "unit": "nats a token",
        "model": model,
        "checkpoints": checkpoints,
        **pins,
        "max_length": args.max_length,
        "command": sys.argv,
    }
    write_text(output_dir / "losses.json", json.dumps(about, indent=2) + "\n")
    save_array(output_dir / "losses.npy", losses)
    means = np.nanmean(losses, axis=(0, 1)) if np.isfinite(losses).any() else [np.nan] * 2
    n_empty = counts.count(0)
    found = {"rows": len(rows), "rows_without_response": n_empty}
    found["mean_losses"] = dict(zip(COLUMNS, map(float, means), strict=True))
    found["seconds"] = round(time.perf_counter() - started, 2)
    record.finish(output_dir, asked, device, **found)
    shutil.rmtree(output_dir / BLOCKS)
    print(
        f"{len(rows):,} rows, {n_empty:,} without a response: mean loss {means[0]:.3f} nats a "
        f"token with the instruction, {means[1]:.3f} without; {output_dir / 'losses.npy'} is "
        "ready as --dynamics"
    )


def save_array(path: Path, array: Any) -> None:
    """Write an array, whole or not at all."""
    import numpy as np

    from dq_multimodal.files import put_in_place

    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    put_in_place(partial, path)


def block_path(output_dir: Path, checkpoint: int, start: int) -> Path:
    """Name the file of a block of rows at a checkpoint."""
    return output_dir / BLOCKS / f"{checkpoint:03d}-{start:09d}.npy"


if __name__ == "__main__":
    main()
