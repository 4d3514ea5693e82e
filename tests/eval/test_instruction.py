"""eval/instruction.py and the tasks local_bbh, local_drop, local_mmlu, on a tiny random Llama."""

import ast
import csv
import gzip
import json
import math
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import instruction
import pytest
from small_language_model import write_language_model
from tasks import loaders

pytest.importorskip("lm_eval", reason="lm-eval comes with the extra `eval`")
peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "instruction.py"
TASKS = ROOT / "eval" / "tasks"
REAL_DATA = Path(os.environ.get("DQ_TEST_DATA") or ROOT.parent / "shared" / "data")
BBH, MMLU = (
    re.findall(r"\{task: (\w+),", (TASKS / f"local_{name}.yaml").read_text())
    for name in ("bbh", "mmlu")
)
N_DROP = 3  # made rows
needs_real_data = pytest.mark.skipif(
    not all((REAL_DATA / name).is_dir() for name in ("bbh", "drop", "mmlu")),
    reason=f"no bbh, drop and mmlu in {REAL_DATA}; DQ_TEST_DATA names another folder",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def parrot_dir(tmp_path_factory):
    """Save a model whose answer is known: it looks at the last token of the prompt alone."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = write_language_model(tmp_path_factory.mktemp("parrot"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = {"\n": "So the answer is (A).", ":": " (A)", "?": " 2 men"}
    tokenizer.add_tokens(list(answers.values()))
    tokenizer.save_pretrained(folder)
    n = len(tokenizer)
    width = n + -n % 4  # two heads of an even size
    size = {"vocab_size": n, "hidden_size": width, "intermediate_size": 8}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    special = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
    model = LlamaForCausalLM(LlamaConfig(**size, **special, max_position_embeddings=1536))
    next_token = torch.full((n,), tokenizer.eos_token_id)
    for last, answer in answers.items():
        (last_id,), (answer_id,) = tokenizer(last)["input_ids"], tokenizer(answer)["input_ids"]
        next_token[last_id] = answer_id
    layer = model.model.layers[0]
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(n, width))
        model.lm_head.weight.zero_()[next_token, torch.arange(n)] = 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made_data(tmp_path_factory):
    """Write a small folder of the same form as the real one: 2 BBH, 3 DROP, 3 MMLU rows a task."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("bbh/bbh", "bbh/cot-prompts", "drop", "mmlu/dev", "mmlu/test"):
        (folder / name).mkdir(parents=True)
    for task in BBH:
        rows = [{"input": f"Is {k} of {task} odd?", "target": "(A)"} for k in range(2)]
        (folder / f"bbh/bbh/{task}.json").write_text(json.dumps({"examples": rows}))
        shots = "".join(
            f"\n\nQ: Is {k} odd?\nOptions:\n- yes\n- no\nA: Let's think step by step.\n"
            f"It is {k}.\n\nSo the answer is ({k}.5)."
            for k in range(3)
        )
        prompt = f"a canary\n-----\nTell odd numbers.{shots}"
        (folder / f"bbh/cot-prompts/{task}.txt").write_text(prompt)
    with gzip.open(folder / "drop/drop_v0_dev.jsonl.gz", "wt") as file:
        for k in range(N_DROP):
            context = f"Passage: There were {k} men.\nAnd a cat.\nQuestion: How many?\nAnswer:"
            record = {"context": context, "completion": f" {k}", "ref_text": f"{k}|  {k}|{k} men"}
            file.write(json.dumps(record) + "\n")
    for subject in MMLU:
        for split, n_rows in (("dev", 5), ("test", 3)):
            with (folder / f"mmlu/{split}/{subject}_{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["question", *(f"choice{k}" for k in range(4)), "answer"])
                for k in range(n_rows):
                    question = f' {split} "{k}", {subject}:\nwhich one? '
                    writer.writerow([question, "None", "N/A", f"{k}", "a, b", k % 4])
    return folder


def run_script(*flags, data=REAL_DATA, **environ):
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    environ |= {"HF_HUB_OFFLINE": "1", "DQ_TEST_DATA": str(data), "OMP_NUM_THREADS": "1"}
    environ = {**os.environ, **environ}
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300)


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Run the script in this process, which has imported torch and the tasks' index already.

    Returns the results, or the line on stderr if the script exits with code 2.
    """

    def run(*flags, data):
        monkeypatch.setenv("DQ_TEST_DATA", str(data))
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # what the shell says is no consent
        output = tmp_path / "scores.json"
        where = [] if "--output" in flags else ["--output", str(output)]
        try:
            instruction.main([*map(str, flags), "--device", "cpu", *where])
        except SystemExit as exit_:
            assert exit_.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            return line
        assert os.environ["HF_ALLOW_CODE_EVAL"] == str(int("--allow_code_execution" in flags))
        return json.loads(output.read_text())

    return run


# The loaders.


def test_loaders_read_every_field(made_data, monkeypatch):
    monkeypatch.setenv("DQ_TEST_DATA", str(made_data))
    bbh = loaders.load_bbh("navigate", version=1)  # lm-eval adds its metadata
    assert bbh["test"]["input"] == ["Is 0 of navigate odd?", "Is 1 of navigate odd?"]
    assert bbh["test"]["target"] == ["(A)", "(A)"]
    assert set(bbh["test"]["description"]) == {"Tell odd numbers.\n\n"}
    assert bbh["direct"]["target"] == ["(0.5)", "(1.5)", "(2.5)"]
    assert bbh["chain_of_thought"]["target"][1] == "It is 1.\n\nSo the answer is (1.5)."
    assert bbh["chain_of_thought"]["input"][1] == "Is 1 odd?\nOptions:\n- yes\n- no"
    assert loaders.load_drop()["test"][2] == {
        "passage": "There were 2 men.\nAnd a cat.",
        "question": "How many?",
        "answers": ["2", "2 men"],
    }
    assert loaders.load_mmlu("high_school_physics")["dev"][4] == {
        "subject": "high school physics",
        "question": ' dev "4", high_school_physics:\nwhich one? ',
        "choices": ["None", "N/A", "4", "a, b"],
        "answer": 0,
    }


def test_loader_refuses_a_prompt_without_answers(made_data, tmp_path, monkeypatch):
    for name in ("bbh/bbh/snarks.json", "bbh/cot-prompts/snarks.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text((made_data / name).read_text().replace("So the", "The"))
    monkeypatch.setenv("DQ_TEST_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"snarks\.txt holds no"):
        loaders.load_bbh("snarks")


@needs_real_data
def test_tasks_hold_every_published_row(monkeypatch):
    monkeypatch.setenv("DQ_TEST_DATA", str(REAL_DATA))
    names = ["local_bbh", "local_bbh_direct", "local_drop", "local_mmlu"]
    tasks = instruction.index_tasks(None, False).load(names)["tasks"]
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    for name, n_tasks, n_rows in zip(
        names, (27, 27, 1, 57), (6511, 6511, 9536, 14042), strict=True
    ):
        mine = [size for task, size in sizes.items() if task.partition("::")[0] == name]
        assert (len(mine), sum(mine)) == (n_tasks, n_rows), name


@pytest.mark.parametrize(
    ("answer", "answers", "em", "f1"),
    [
        ("The 5 dogs", ["5 dogs"], 1, 1),  # articles, case, punctuation do not count
        ("five!", ["5", "five"], 1, 1),  # the best of all answers
        ("red dogs", ["red cats and dogs"], 0, 0.67),  # 2 * 1 * 1/2 / (1 + 1/2)
        ("6 dogs", ["5 dogs"], 0, 0),  # another number is no answer at all
        ("Bob and Ann", ["Ann and Bob"], 0, 1),  # one bag of words
    ],
)
def test_drop_score_by_hand(answer, answers, em, f1):
    assert loaders.score_drop({"answers": answers}, [answer]) == {"em": em, "f1": f1}


# The protocol: our task files against lm-eval's own, on the same rows.


@needs_real_data
@pytest.mark.parametrize(
    ("ours", "theirs", "argument", "loader", "n_shots"),
    [
        ("local_bbh", "bbh/cot_fewshot/{}", "subset", loaders.load_bbh, 3),
        ("local_bbh_direct", "bbh/fewshot/{}", "subset", loaders.load_bbh, 3),
        ("local_mmlu", "mmlu/default/mmlu_{}", "subject", loaders.load_mmlu, 5),
        ("local_drop", "drop/default", "", loaders.load_drop, 0),
    ],
)
def test_prompts_are_those_of_lm_eval(ours, theirs, argument, loader, n_shots, monkeypatch):
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setenv("DQ_TEST_DATA", str(REAL_DATA))
    folder = Path(lm_eval.tasks.__file__).parent
    for name, task in instruction.index_tasks(None, False).load([ours])["tasks"].items():
        part = name.partition("::")[2]
        config = load_yaml(folder / f"{theirs.format(part)}.yaml")
        config |= {"custom_dataset": loader, "dataset_kwargs": {argument: part} if part else {}}
        if ours == "local_drop":  # theirs reads another form of the same rows
            config |= {"process_docs": None, "doc_to_target": "", "validation_split": "test"}
            config.pop("training_split")
        shipped = ConfigurableTask(config=config)
        for doc in (task.eval_docs[0], task.eval_docs[-1]):
            prompt, target = task.fewshot_context(doc, n_shots), task.doc_to_target(doc)
            assert prompt == shipped.fewshot_context(doc, n_shots), name
            if ours == "local_drop":
                continue
            assert target == shipped.doc_to_target(doc), name
            if ours == "local_bbh":
                text = f"Let me see.\nSo the answer is {target}.\n"
                assert filtered(task, text) == filtered(shipped, text) == target
                assert filtered(task, "None") == filtered(shipped, "None")
            elif ours == "local_bbh_direct":
                assert filtered(task, f" {target}\n") == target
        for key in ("output_type", "doc_to_choice", "repeats"):
            assert task.config[key] == shipped.config[key], name
        stops = [one.config.generation_kwargs or {} for one in (task, shipped)]
        if ours == "local_drop":
            stops[0]["until"] = [stop for stop in stops[0]["until"] if stop != "\n\n"]
        assert stops[0] == stops[1]


def filtered(task, text):
    """Put one generated text through the task's filters."""
    responses: Any = [text]
    for ensemble in getattr(task, "_filters", []):
        for make in ensemble.filters:
            responses = next(iter(make().apply([responses], [{}])))
    return responses


# The script, whole.


def test_script_writes_all_it_promises(made_data, parrot_dir, tmp_path):
    output = tmp_path / "scores.json"
    output.write_text("an older run")
    flags = ("--model_name_or_path", parrot_dir, "--tasks", "local_bbh,local_drop,local_mmlu")
    flags += ("--limit", 1, "--batch_size", 4, "--device", "cpu", "--output", output)
    done = run_script(*flags, data=made_data)
    assert done.returncode == 0, done.stderr
    scores, stdout = json.loads(output.read_text()), done.stdout
    assert list(tmp_path.iterdir()) == [output]
    assert scores["command"].startswith("python eval/instruction.py --model_name_or_path parrot0 ")
    wanted = {"model": str(parrot_dir), "adapter": None, "num_fewshot": None, "limit": 1, "seed": 0}
    wanted |= {"dtype": "auto", "batch_size": 4, "max_length": 1536}
    assert {key: scores[key] for key in wanted} == wanted
    assert {"lm_eval", "torch", "transformers", "peft"} <= set(scores["versions"])
    assert scores["seconds"] > 0 and datetime.fromisoformat(scores["date"]).tzinfo

    tasks = scores["tasks"]
    groups = (("bbh", BBH, "exact_match,get-answer", 3), ("mmlu", MMLU, "acc,none", 5))
    for name, parts, key, n_shots in groups:
        group, of_parts = f"local_{name}", [f"local_{name}::{part}" for part in parts]
        assert tasks[group]["subtasks"] == of_parts
        assert tasks[group]["n_samples"] == len(parts)
        found = [tasks[part]["metrics"][key] for part in of_parts]
        assert {one["stderr"] for one in found} == {None}  # of one row
        mean = tasks[group]["metrics"][key]["value"]
        assert math.isclose(mean, sum(one["value"] for one in found) / len(found))
        assert {tasks[part]["num_fewshot"] for part in of_parts} == {n_shots}
        assert re.search(rf"^{group} +{n_shots} +{len(parts)} +{key} +{mean:.4f} ", stdout, re.M)
    assert tasks["local_bbh"]["metrics"]["exact_match,get-answer"]["value"] == 1  # all are (A)
    assert set(tasks["local_drop"]["metrics"]) == {"em,none", "f1,none"}
    assert tasks["local_drop"]["num_fewshot"] == 0
    assert len(tasks) == 3 + len(BBH) + len(MMLU)
    assert len(stdout.splitlines()) == 5  # the header, bbh, em, f1, mmlu


def test_known_answers_get_their_scores(made_data, parrot_dir, run_here):
    tasks = "local_bbh_direct,local_drop"
    flags = ("--model_name_or_path", parrot_dir, "--tasks", tasks, "--num_fewshot", 2)
    scores = run_here(*flags, "--seed", 7, data=made_data)
    assert (scores["num_fewshot"], scores["seed"], scores["limit"]) == (2, 7, None)
    drop, bbh = (scores["tasks"][name] for name in ("local_drop", "local_bbh_direct"))
    assert (drop["num_fewshot"], drop["n_samples"], drop["subtasks"]) == (2, N_DROP, [])
    assert bbh["n_samples"] == 2 * len(BBH)
    assert scores["tasks"]["local_bbh_direct::navigate"]["num_fewshot"] == 2
    assert bbh["metrics"] == {"exact_match,strip": {"value": 1.0, "stderr": 0.0}}
    # "2 men" is right in one row of three; deviation sqrt(1/3) over sqrt(3) rows
    for metric in drop["metrics"].values():
        assert math.isclose(metric["value"], 1 / 3)
        assert math.isclose(metric["stderr"], 1 / 3)


def test_an_adapter_is_put_on_the_model(made_data, model_dir, tmp_path, run_here):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    flags = ["--model_name_or_path", str(model_dir), "--adapter", str(tmp_path / "adapter")]
    flags += ["--tasks", "local_mmlu", "--limit", "1", "--num_fewshot", "1"]
    scores = run_here(*flags, data=made_data)
    assert scores["adapter"] == str(tmp_path / "adapter")
    assert scores["tasks"]["local_mmlu"]["n_samples"] == len(MMLU)
    args = instruction.parse_args([*flags, "--device", "cpu", "--output", str(tmp_path / "x")])
    loaded, ids = instruction.load_model(args).model, torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


# Bad input.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_name_or_path": "{missing}"}, "there is no folder {missing}"),
        ({"model_name_or_path": "{here}"}, "holds no config.json"),
        ({"model_name_or_path": "{broken}", "tasks": "local_drop"}, "{broken}"),
        ({"model_name_or_path": "no/body", "tasks": "local_drop"}, "Hub is out of reach"),
        ({"adapter": "{missing}"}, "--adapter: there is no folder {missing}"),
        ({"adapter": "{model}"}, "holds no adapter_config.json"),
        ({"include_path": "{missing}"}, "--include_path: there is no folder {missing}"),
        ({"output": "{missing}/scores.json"}, "--output: cannot write the file {missing}"),
        ({"limit": 0}, "--limit and --batch_size must be at least 1"),
        ({"batch_size": "many"}, "many"),
        ({"dtype": "int3"}, "int3"),
        ({"tasks": "local_drop,nonsense"}, "knows no task 'nonsense'; local ones: local_bbh"),
        ({"tasks": "mmlu"}, "need no network: local_bbh, local_drop, local_mmlu"),
        (
            {"tasks": "local_drop,humaneval"},
            "humaneval runs code that the model wrote: give --",
        ),
        ({"num_fewshot": 4}, "local_bbh::boolean_expressions has 3 examples, got 4"),
        ({"tasks": "local_mmlu"}, "{here}/mmlu/dev/"),
    ],
)
def test_bad_input_is_one_line(changes, said, made_data, model_dir, tmp_path, run_here):
    (tmp_path / "broken").mkdir()
    for file in model_dir.iterdir():
        n_bytes = 100 if file.suffix == ".safetensors" else None
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes()[:n_bytes])
    places = {name: tmp_path / name for name in ("missing", "broken")}
    places |= {"here": tmp_path, "model": model_dir}
    flags = {"model_name_or_path": model_dir, "tasks": "local_bbh"} | changes
    words = [str(w).format(**places) for k, v in flags.items() for w in (f"--{k}", v)]
    data = tmp_path if said == "{here}/mmlu/dev/" else made_data
    assert said.format(**places) in run_here(*words, data=data)
    assert not (tmp_path / "scores.json").exists()


def test_a_group_is_no_way_around_consent(made_data, model_dir, tmp_path, run_here):
    (tmp_path / "unsafe.yaml").write_text(
        f"include: {TASKS}/local_drop.yaml\ntask: hidden\nunsafe_code: true\n"
    )
    (tmp_path / "group.yaml").write_text("group: harmless\ntask: [hidden]\n")
    flags = ("--model_name_or_path", model_dir, "--include_path", tmp_path)
    flags += ("--tasks", "harmless", "--limit", 1)
    assert "hidden runs code" in run_here(*flags, data=made_data)
    scores = run_here(*flags, "--allow_code_execution", data=made_data)
    assert scores["tasks"]["hidden"]["n_samples"] == 1


def test_help_needs_no_heavy_import():
    for script in (SCRIPT, SCRIPT.with_name("measure.py")):
        top = ast.parse(script.read_text()).body
        names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in top if isinstance(node, ast.ImportFrom)]
        assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names | {"measure"}
