"""Load BBH, DROP and MMLU from a local folder for the tasks local_bbh, local_drop, local_mmlu.

lm-eval calls these functions through `custom_dataset` with the task's `dataset_kwargs` (and its
metadata, which they ignore). The folder is the one that the environment variable DQ_TEST_DATA
names, `../shared/data` beside the project otherwise, and holds the benchmarks as published:

    bbh/bbh/TASK.json                   {"examples": [{"input", "target"}]}
    bbh/cot-prompts/TASK.txt            a line "-----", the description, worked examples
    drop/drop_v0_dev.jsonl.gz           {"context", "ref_text"}, answers joined by a bar
    mmlu/dev/SUBJECT_dev.csv            question, choice0, ..., choice3, answer (0 to 3)
    mmlu/test/SUBJECT_test.csv          the same
"""

import csv
import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

PROJECT = Path(__file__).resolve().parents[2]
# The task's question ends in "Let's think step by step."; one file says it twice.
EXAMPLE = re.compile(
    r"^Q: (?P<input>.*?)\nA: (?:Let's think step by step\.\s+)*(?P<chain>.*?)\s*(?=\n\nQ: |\Z)",
    re.MULTILINE | re.DOTALL,
)
ANSWER = re.compile(r"So the answer is (.*)\.\s*$")


def find_data_file(*parts: str) -> Path:
    """Return the path of one file of the data folder.

    Raises:
        FileNotFoundError: If it is not there; the message names DQ_TEST_DATA.
    """
    folder = Path(os.environ.get("DQ_TEST_DATA") or PROJECT.parent / "shared" / "data")
    path = folder.joinpath(*parts)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: set DQ_TEST_DATA to a folder that holds {'/'.join(parts)}"
        )
    return path


def load_bbh(subset: str, **_: Any) -> DatasetDict:
    """Load one task of BIG-Bench Hard and its three worked examples.

    Args:
        subset: Name of the task, e.g. "navigate".

    Returns:
        Columns input, target, description; splits "test", "chain_of_thought" (the worked examples,
        target = the reasoning that ends in the answer) and "direct" (target = the answer alone).
    """
    examples = json.loads(find_data_file("bbh", "bbh", f"{subset}.json").read_text("utf-8"))
    prompt_file = find_data_file("bbh", "cot-prompts", f"{subset}.txt")
    prompt = prompt_file.read_text("utf-8").partition("-----\n")[2]
    description = prompt.partition("\n\nQ: ")[0].strip() + "\n\n"
    shots = [(match["input"], match["chain"]) for match in EXAMPLE.finditer(prompt)]
    answers = [ANSWER.search(chain) for _, chain in shots]
    if not shots or None in answers:
        raise ValueError(f"{prompt_file} holds no 'Q: ... A: ... So the answer is ...' examples")
    rows = {
        "test": [(row["input"], row["target"]) for row in examples["examples"]],
        "chain_of_thought": shots,
        "direct": [(shots[k][0], match[1]) for k, match in enumerate(answers) if match],
    }
    return DatasetDict(
        {
            split: Dataset.from_list(
                [{"input": q, "target": a, "description": description} for q, a in pairs]
            )
            for split, pairs in rows.items()
        }
    )


def load_drop(**_: Any) -> DatasetDict:
    """Load the development set of DROP: columns passage, question, answers; one split "test".

    An answer of several spans is one string here, joined by " and ": the file keeps no seam.
    """
    rows = []
    with gzip.open(find_data_file("drop", "drop_v0_dev.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            passage, _, question = record["context"].rpartition("\nQuestion: ")
            answers = [answer.strip() for answer in record["ref_text"].split("|")]
            rows.append(
                {
                    "passage": passage.removeprefix("Passage: "),
                    "question": question.removesuffix("\nAnswer:"),
                    "answers": list(dict.fromkeys(answers)),
                }
            )
    return DatasetDict({"test": Dataset.from_list(rows)})


def score_drop(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one prediction as lm-eval's `drop` does: best exact match and best F1 of all answers.

    The score is lm-eval's own. There an answer of several spans never matches exactly, since a
    prediction is one span; here it is one span too, and can.
    """
    from lm_eval.tasks.drop.utils import process_results

    spans = [(answer,) for answer in doc["answers"]]
    return process_results({"answers": spans}, list(results))


def load_mmlu(subject: str, **_: Any) -> DatasetDict:
    """Load one subject of MMLU.

    The file is read as plain text, so that an answer "None" or "N/A" stays one.

    Args:
        subject: Name of the subject as in the file names, e.g. "high_school_physics".

    Returns:
        Columns subject (spelled with spaces), question, choices, answer (0 to 3); splits "test"
        and "dev" (the five examples).
    """
    splits = {}
    for split in ("dev", "test"):
        path = find_data_file("mmlu", split, f"{subject}_{split}.csv")
        with path.open(newline="", encoding="utf-8") as file:
            splits[split] = Dataset.from_list(
                [
                    {
                        "subject": subject.replace("_", " "),
                        "question": row["question"],
                        "choices": [row[f"choice{k}"] for k in range(4)],
                        "answer": int(row["answer"]),
                    }
                    for row in csv.DictReader(file)
                ]
            )
    return DatasetDict(splits)
