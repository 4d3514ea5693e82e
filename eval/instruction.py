"""Run lm-eval tasks on a language model, with or without a LoRA adapter, and write the scores.

    python eval/instruction.py --model_name_or_path DIR --adapter DIR --tasks mmlu --output FILE

The tasks are lm-eval's, by their names there, which fetch their data from the Hub. The tasks
local_bbh, local_bbh_direct, local_drop and local_mmlu of `eval/tasks` follow the same protocols
and read the folder that the environment variable DQ_TEST_DATA names instead. humaneval runs code
that the model wrote, in this process's own account, so it wants --allow_code_execution.

The scores go to --output as one JSON document, a short table to stdout, logs to stderr. Exit code
2 and one line on stderr mean bad input.
"""

import argparse
import contextlib
import logging
import math
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from measure import describe_run, fail, flags, write

TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"
LOCAL_TASKS = "local_bbh, local_drop, local_mmlu"
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError)


def count(text: str) -> int:
    """Read a whole number of a flag, at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


def batch_size(text: str) -> int | str:
    """Read --batch_size: rows, or auto."""
    return text if text.partition(":")[0] == "auto" else count(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line, and check the folders that it names."""
    parser = flags(__doc__, "instruction")
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder or Hub id of the model")
    add("--adapter", help="folder or Hub id of a peft adapter on top of it")
    add("--tasks", required=True, help="names of tasks or groups, joined by commas")
    add("--include_path", type=Path, help="folder with more task files, besides eval/tasks")
    add("--limit", type=count, help="only the first N rows of every (sub)task")
    add("--num_fewshot", type=count, help="examples in the prompt (default: the task's own)")
    add("--batch_size", type=batch_size, default=8, help="rows at a time, or auto (default: 8)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    add("--seed", type=count, default=0, help="picks the examples of the prompt (default: 0)")
    add("--allow_code_execution", action="store_true", help="let tasks run the model's code")
    args = parser.parse_args(argv)
    if 0 in (args.limit, args.batch_size):
        fail("--limit and --batch_size must be at least 1")
    check_folder(args.model_name_or_path, "--model_name_or_path", "config.json")
    if args.adapter:
        check_folder(args.adapter, "--adapter", "adapter_config.json")
    if args.include_path and not args.include_path.is_dir():
        fail(f"--include_path: there is no folder {args.include_path}")
    if args.output.is_dir() or not os.access(args.output.parent, os.W_OK):
        fail(f"--output: cannot write the file {args.output}; does its folder exist?")
    return args


def check_folder(name: str, flag: str, config_file: str) -> None:
    """Fail if `name` can only be a folder and is no such one; what else it is, the Hub knows."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / config_file).is_file():
            fail(f"{flag}: the folder {name} holds no {config_file}")
    elif folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        fail(f"{flag}: there is no folder {name}")


def fail_on(what: str, error: BaseException) -> NoReturn:
    """Exit on an error while loading; if the Hub could not be asked, name what needs no Hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause:
        no_hub = isinstance(cause, ConnectionError | LocalEntryNotFoundError)
        if no_hub or "Hugging Face Hub" in str(cause):
            fail(
                f"{what}: not on this machine, and the Hub is out of reach or has it not. Tasks "
                f"that need no network: {LOCAL_TASKS}; models and adapters: give a folder"
            )
        cause = cause.__cause__ or cause.__context__
    fail(f"{what}: {str(error)[:400] or type(error).__name__}")


@cache
def index_tasks(include_path: Path | None, has_defaults: bool) -> Any:
    """Return lm-eval's index of task files, of eval/tasks alone or of its own ones too."""
    from lm_eval.tasks import TaskManager

    folders = dict.fromkeys(p.resolve() for p in (TASKS_FOLDER, include_path) if p is not None)
    return TaskManager(include_path=list(folders), include_defaults=has_defaults)


def load_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """Load the tasks with their data and set examples and seed: "tasks" and "groups", by name."""
    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",")))
    # To index lm-eval's own thousands of files takes ten seconds, which local tasks can save.
    manager = index_tasks(args.include_path, False)
    if not set(names) <= set(manager.all_tasks):
        manager = index_tasks(args.include_path, True)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        fail(f"--tasks: lm-eval knows no task {', '.join(unknown)!r}; local ones: {LOCAL_TASKS}")
    # Asked twice: loading humaneval runs code already, and groups show their tasks only loaded.
    files = {name: manager.task_index[name].cfg or {} for name in names}
    check_code(args, [name for name, file in files.items() if file.get("unsafe_code")])
    try:
        loaded = manager.load(names)
    except LOAD_ERRORS as error:
        fail_on(", ".join(names), error)
    tasks = loaded["tasks"]
    check_code(args, [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)])
    for name, task in tasks.items():
        # A task whose file says 0 stays at 0, as in lm-eval: its prompt is complete.
        own = task.config["num_fewshot"]
        wanted = (own if args.num_fewshot is None or own == 0 else args.num_fewshot) or 0
        if wanted > (n_examples := len(task.sampler.df)):
            fail(f"--num_fewshot: {name} has {n_examples} examples, got {wanted}")
        task.set_config(key="num_fewshot", value=wanted)
        task.set_fewshot_seed(seed=args.seed)
    return loaded


def check_code(args: argparse.Namespace, unsafe: list[str]) -> None:
    """Fail if there are tasks that run the model's code and the user has not agreed to that."""
    os.environ["HF_ALLOW_CODE_EVAL"] = str(int(args.allow_code_execution))
    if unsafe and not args.allow_code_execution:
        fail(f"{', '.join(unsafe)} runs code that the model wrote: give --allow_code_execution")


def load_model(args: argparse.Namespace) -> Any:
    """Load the model, and the adapter on top, into lm-eval's wrapper."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from safetensors import SafetensorError

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device: {device} does not work here: {str(error).splitlines()[0]}")
    names = {"pretrained": args.model_name_or_path, "peft": args.adapter}
    try:
        return HFLM(**names, dtype=args.dtype, device=device, batch_size=args.batch_size)
    except (*LOAD_ERRORS, SafetensorError) as error:
        fail_on(" + ".join(filter(None, names.values())), error)


def collect_scores(results: dict[str, Any]) -> dict[str, Any]:
    """Turn lm-eval's results into one entry a task or group.

    Metrics keep lm-eval's keys, "metric,filter". A number that does not exist, such as the
    standard error of one row, is None.
    """

    def number(value: Any) -> float | None:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    scores = {}
    for name, row in results["results"].items():
        stderr_of = {key: key.replace(",", "_stderr,", 1) for key in row if "," in key}
        scores[name] = {
            "metrics": {
                key: {"value": number(row[key]), "stderr": number(row[stderr])}
                for key, stderr in stderr_of.items()
                if stderr in row
            },
            "n_samples": row.get("sample_len", 0),
            "num_fewshot": results["n-shot"].get(name),
            "subtasks": results["group_subtasks"].get(name, []),
        }
    return scores


def format_table(scores: dict[str, Any]) -> str:
    """Return the rows that no group with numbers already sums up, as text."""
    summed = {sub for row in scores.values() if row["metrics"] for sub in row["subtasks"]}
    line = "{:32}  {:>5}  {:>7}  {:24}  {:>6}  {:>6}".format
    lines = [line("task", "shots", "samples", "metric", "value", "stderr")]
    for name, row in scores.items():
        for key, metric in row["metrics"].items() if name not in summed else ():
            numbers = ["-" if number is None else f"{number:.4f}" for number in metric.values()]
            lines.append(line(name, str(row["num_fewshot"]), row["n_samples"], key, *numbers))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Evaluate one model and write its scores."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        from lm_eval import evaluate
    except ImportError:
        fail("lm-eval is missing: pip install 'dq-multimodal[eval]'")
    import huggingface_hub
    import transformers

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # a line for each of 57 tasks
    huggingface_hub.logging.set_verbosity_error()  # each of its tries to reach the Hub
    clock, tasks, model = time.perf_counter(), load_tasks(args), load_model(args)
    transformers.set_seed(args.seed)
    options = {"limit": args.limit, "log_samples": False}
    options["confirm_run_unsafe_code"] = args.allow_code_execution
    with contextlib.redirect_stdout(sys.stderr):  # lm-eval talks there about --batch_size auto
        results = evaluate(lm=model, task_dict=tasks, **options)
    if results is None:  # not the first of several processes
        return
    asked = ("num_fewshot", "limit", "seed", "dtype", "batch_size")
    document = {
        **describe_run(),
        "model": args.model_name_or_path,
        "adapter": args.adapter,
        "tasks": collect_scores(results),
        **{name: getattr(args, name) for name in asked},
        "max_length": model.max_length,
        "seconds": round(time.perf_counter() - clock, 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }
    write(args.output, document)
    print(format_table(document["tasks"]))


if __name__ == "__main__":
    main()
