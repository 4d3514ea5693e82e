"""Instruction rows as tokens of a language model, packed for `harness.text`.

The prompt is the product's own (`dq_multimodal.training.sft.to_training_rows`), and the tokens are
those on which its recipe trains: prompt, response, end of text.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dq_multimodal.config import InputError
from dq_multimodal.core.hashing import row_hash
from dq_multimodal.data.source import load_source
from dq_multimodal.models.locate import find_gguf, load_tokenizer
from dq_multimodal.training.sft import has_chats, to_training_rows
from dq_multimodal.training.text_losses import check_tokenizer, tokenise
from harness.bundle import BundleWriter
from harness.encoders import find_place

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = "held out"
"""Name of the test on rows of the data set itself."""
HELD_OUT_SEED = 1_000_003
"""Of the hash by which rows are held out, and rows of a test are taken; no draw has it."""
TEST_KEYS = {"dataset", "split", "config_name", "text_columns", "rows", "unnest", "half"}
MODEL_FILES = (*("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.bin"),)
SCHEMA = pa.schema({"ids": pa.list_(pa.int32()), "n_prompt": pa.int32()})


def split_held_out(n_rows: int, n_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Part the rows into those to choose from and those that no selection may take.

    Returns:
        Row numbers, both sorted; the held-out ones have the lowest hashes.
    """
    if not 0 <= n_held_out < n_rows:
        raise InputError(f"held_out must lie in [0, {n_rows}), got {n_held_out}")
    order = np.argsort(row_hash(HELD_OUT_SEED, n_rows), kind="stable")
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])


def sample_rows(dataset: "Dataset", n_rows: int | None) -> "Dataset":
    """Give rows in the order of their hashes: the first of them are a random sample."""
    order = np.argsort(row_hash(HELD_OUT_SEED, len(dataset)), kind="stable")
    return dataset.select(order[:n_rows])


def load_test(name: str, spec: dict[str, Any]) -> tuple["Dataset", list[str] | None]:
    """Load the rows of a test from elsewhere, and the columns of their texts.

    Args:
        name: Name of the test, for messages.
        spec: `dataset`, a place or several; `split` and `config_name` of it; `text_columns`, of
            which the last is the response; `half`, 0 or 1: one of two disjoint halves, by their
            hashes; `rows`, how many of them, by their hashes; `unnest`, a column of lists of
            records: each record becomes a row, with the other columns beside it.

    Raises:
        InputError: If a key is strange, or the rows are not as it says.
    """
    if set(spec) - TEST_KEYS or "dataset" not in spec:
        keys = ", ".join(sorted(TEST_KEYS))
        raise InputError(f"test {name}: wanted a dataset and keys of {keys}, got {', '.join(spec)}")
    place = find_place(spec["dataset"])
    usual = "train" if Path(place).is_absolute() else "test"
    which = {"split": spec.get("split", usual), "config_name": spec.get("config_name")}
    rows = load_source(place, **which).dataset
    if "half" in spec:  # before records are parted: those of a row stay together
        if spec["half"] not in (0, 1):
            raise InputError(f"test {name}: half must be 0 or 1, got {spec['half']!r}")
        rows, middle = sample_rows(rows, None), len(rows) // 2
        rows = rows.select(range(middle) if spec["half"] == 0 else range(middle, len(rows)))
    if column := spec.get("unnest"):
        rows = unnest(rows, column)
    columns = spec.get("text_columns")
    if missing := set(columns or []) - set(rows.column_names):
        raise InputError(f"test {name}: no column {', '.join(sorted(missing))}")
    return sample_rows(rows, spec.get("rows")), columns


def unnest(rows: "Dataset", column: str) -> "Dataset":
    """Make a row of each record in the lists of a column."""
    from datasets import Dataset

    found = []
    for row in rows:
        records = row.pop(column, None)
        if not isinstance(records, list) or any(not isinstance(r, dict) for r in records):
            raise InputError(f"column {column} must hold lists of records, got {records!r:.60}")
        found += [row | record for record in records]
    return Dataset.from_list(found)


def pack_texts(
    rows: "Dataset",
    tokenizer: Any,
    *,
    text_columns: list[str] | None = None,
    max_length: int = 512,
    is_test: bool = False,
) -> pa.Table:
    """Turn instruction rows, of any shape that `to_training_rows` knows, into token rows.

    Rows are cut after `max_length` tokens; without a response token left, those of a test are
    dropped, and rows to train on keep their numbers.

    Returns:
        `ids`, list<int32>, and `n_prompt`, int32, the tokens before the response.

    Raises:
        InputError: If the tokenizer knows no end of text, or no chat template where one is needed.
    """
    is_chat = has_chats(rows, text_columns)
    check_tokenizer(tokenizer, is_chat=is_chat)
    found = []
    for row in to_training_rows(rows, text_columns):
        ids, n_prompt, _ = tokenise(row, tokenizer, is_chat=is_chat)
        found.append({"ids": ids[:max_length], "n_prompt": n_prompt})
    good = [row for row in found if len(row["ids"]) > max(row["n_prompt"], 1)]
    if n_lost := len(found) - len(good):
        what = "are left out" if is_test else "have no response left"
        said = f"{n_lost:,} of {len(found):,} rows {what} at {max_length} tokens"
        print(f"note: {said}", file=sys.stderr)
    return pa.Table.from_pylist(good if is_test else found, SCHEMA)


def add_model(writer: BundleWriter, name: str, place: str) -> None:
    """Write the files of a model into a bundle, below models/NAME."""
    if found := find_gguf(place):
        files = [Path(found[0]) / found[1]]
    else:
        folder = Path(place)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(place, allow_patterns=list(MODEL_FILES)))
        files = [p for pattern in MODEL_FILES for p in sorted(folder.glob(pattern))]
    if not any(p.suffix in (".gguf", ".safetensors", ".bin") for p in files):
        raise InputError(f"the model {place} has no weights in one folder")
    for path in files:
        writer.add_file(f"models/{name}/{path.name}", path)


def add_texts(
    writer: BundleWriter,
    task: str,
    spec: dict[str, Any],
    rows: "Dataset",
    held_out: "Dataset | None",
    models: list[str],
) -> None:
    """Write the tokens of a task for each of its models, and the models.

    Args:
        writer: Of the bundle.
        task: Name of the task.
        spec: What the suite says of it: `models`, NAME to places; `tests`, NAME to a test (see
            `load_test`); `text_columns`; `max_length`, 512 by default, of training rows and tests.
        rows: The rows that some cell trains on, in the order of their positions.
        held_out: The rows held out, if any.
        models: Names of the models that some cell trains.
    """
    columns, max_length = spec.get("text_columns"), spec.get("max_length", 512)
    tests = {name: load_test(name, test) for name, test in spec.get("tests", {}).items()}
    if held_out is not None and len(held_out):
        tests = {HELD_OUT: (sample_rows(held_out, None), columns), **tests}
    if not tests:
        raise InputError(f"task {task}: wanted held_out or tests")
    for name in models:
        if name not in spec.get("models", {}):
            raise InputError(f"task {task}: no model {name} among {', '.join(spec['models'])}")
        place = find_place(spec["models"][name])
        tokenizer = load_tokenizer(place)
        packed = pack_texts(rows, tokenizer, text_columns=columns, max_length=max_length)
        writer.add_table(f"{task}/train/{name}", packed)
        for test, (found, own) in tests.items():
            options = {"text_columns": own, "max_length": max_length, "is_test": True}
            writer.add_table(f"{task}/test/{name}/{test}", pack_texts(found, tokenizer, **options))
        add_model(writer, name, place)
