"""Make a small Llama with random weights, and a tokenizer trained on the rows it will see.

    python recipes/tiny_llama.py --dataset_name runs/demo/data/train.parquet --output_dir DIR

For trying out a fine-tuning recipe without a network: `AutoModelForCausalLM` and `AutoTokenizer`
load the folder like any model of the Hub. The same rows and options give the same files;
tiny_llama.json in the folder records them.
"""

import argparse
import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dq_multimodal.training.tiny_models import (
    HEAD_DIM,
    SPECIAL_TOKENS,
    configure_llama,
    train_tokenizer,
)

RECORD = "tiny_llama.json"
OPTIONS = ("vocab_size", "hidden_size", "num_hidden_layers", "seed")
COLUMNS = ("instruction", "input", "output")
# Every prompt holds these words, so they deserve tokens of their own.
PROMPT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"


def read_texts(path: Path) -> list[str]:
    """Read the rows of a parquet file, each as one text.

    Raises:
        ValueError: If the file is not parquet, lacks a column or has no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = f"dataset_name must be a parquet file of rows with {', '.join(COLUMNS)}, got {path}"
    try:
        table = pq.read_table(path, columns=list(COLUMNS))
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise ValueError(f"{wanted}: {str(error).splitlines()[0]}") from None
    if not len(table) or len(table.column_names) < len(COLUMNS):
        raise ValueError(f"{wanted}: {len(table)} rows of {', '.join(table.column_names)}")
    return [PROMPT.format(**row) for row in table.to_pylist()]


def make_model(tokenizer: Any, hidden_size: int, num_hidden_layers: int, seed: int) -> Any:
    """Make a Llama with random weights; its width is a multiple of that of a head."""
    from transformers import LlamaForCausalLM, set_seed

    set_seed(seed)
    return LlamaForCausalLM(configure_llama(tokenizer, hidden_size, num_hidden_layers))


def make_folder(args: argparse.Namespace) -> str:
    """Write model and tokenizer, unless they are there, and say in one line what was made.

    Raises:
        ValueError: If an option is out of range or the rows cannot be read.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if args.vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, got {args.vocab_size}")
    if args.hidden_size < HEAD_DIM or args.hidden_size % HEAD_DIM:
        raise ValueError(f"hidden_size must be a multiple of {HEAD_DIM}, got {args.hidden_size}")
    if args.num_hidden_layers < 1:
        raise ValueError(f"num_hidden_layers must be at least 1, got {args.num_hidden_layers}")
    output_dir, texts = args.output_dir, read_texts(args.dataset_name)
    request = {key: getattr(args, key) for key in OPTIONS}
    request["texts_sha256"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    request |= {name: version(name) for name in ("tokenizers", "torch", "transformers")}
    record, place = json.dumps(request, indent=2), output_dir / RECORD
    if place.is_file() and place.read_text("utf-8") == record:
        return f"{output_dir}: already complete"
    if output_dir.exists() and not place.is_file():
        raise ValueError(f"output_dir must be new or made by this recipe, got {output_dir}")

    tokenizer = train_tokenizer(texts, args.vocab_size)
    model = make_model(tokenizer, args.hidden_size, args.num_hidden_layers, args.seed)
    # Written beside its place, then renamed: a folder that exists is complete.
    folder = output_dir.with_name(f".{output_dir.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(record, "utf-8")
    shutil.rmtree(output_dir, ignore_errors=True)
    folder.rename(output_dir)
    shape = f"{args.num_hidden_layers} layers of width {args.hidden_size}"
    counts = f"{model.num_parameters():,} parameters, {shape}, {len(tokenizer):,} tokens"
    return f"{output_dir}: {counts}"


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_name", type=Path, required=True, help="parquet file of rows")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab_size", type=int, default=8192, help="tokens, at most this many")
    parser.add_argument("--hidden_size", type=int, default=256, help="width, a multiple of 64")
    parser.add_argument("--num_hidden_layers", type=int, default=4, help="depth")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = parser.parse_args()
    try:
        print(make_folder(args))
    except (ValueError, OSError) as error:
        parser.exit(2, f"tiny_llama.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "tiny_llama.py: interrupted\n")


if __name__ == "__main__":
    main()
