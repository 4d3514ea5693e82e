"""The dataset and the model of `make demo`, made small by the real scripts."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import demo
import demo_images
import pyarrow.parquet as pq
import pytest
from launching import ROOT, launch

ODD_TEXTS = ["a\tb  c\n\n", "🤗 naïve “quotes” \u200d", "<|eos|>x", "def f():\n\treturn 0\r\n", " "]


def run(script, *args):
    """Run a script in a process of its own."""
    command = [sys.executable, ROOT / script, *args]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def make_rows(folder, *args):
    options = ["--packages", "json,collections,argparse,email", "--eval_rows", 20, *args]
    done = run("recipes/python_docs.py", "--output_dir", folder, *options)
    assert str(folder) in done.stdout and done.stdout.count("\n") == 1
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("data") / "docs")


@pytest.fixture(scope="module")
def model(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model(rows, folder)
    return folder


def make_model(rows, folder, run=launch):
    sizes = ["--vocab_size", 600, "--hidden_size", 64, "--num_hidden_layers", 2]
    flags = ["--dataset_name", rows / "train.parquet", "--output_dir", folder, *sizes]
    return run("recipes/tiny_llama.py", *flags).stdout


def test_rows_are_what_the_modules_document(rows):
    import inspect
    import json

    found = {
        row["name"]: row
        for part in ("train", "heldout")
        for row in pq.read_table(rows / f"{part}.parquet").to_pylist()
    }
    dumps = found["json.dumps"]
    assert dumps["instruction"] == "Explain what json.dumps does."
    assert dumps["input"].startswith("dumps(obj, *, skipkeys=False")
    assert inspect.getdoc(json.dumps).startswith(dumps["output"])
    assert dumps["package"] == "json"
    assert "argparse.ArgumentParser.add_argument" not in found  # it has no docstring
    assert (
        found["collections.deque.append"]["output"]
        == "Add an element to the right side of the deque."
    )
    assert all(40 <= len(row["output"]) <= 1200 for row in found.values())
    assert not any(part.startswith("_") for name in found for part in name.split("."))


def test_held_out_rows_share_nothing_with_training_rows(rows):
    train, held = (pq.read_table(rows / f"{part}.parquet") for part in ("train", "heldout"))
    assert len(held) == 20
    for column in ("instruction", "output", "name"):
        assert not set(train[column].to_pylist()) & set(held[column].to_pylist())


def test_rows_are_the_same_every_time(rows, tmp_path):
    again = make_rows(tmp_path / "again")
    other = make_rows(tmp_path / "other", "--seed", 1)
    for name in ("train.parquet", "heldout.parquet"):
        assert (again / name).read_bytes() == (rows / name).read_bytes()
        assert (other / name).read_bytes() != (rows / name).read_bytes()
    assert not list(again.glob("*.tmp"))


def test_complete_rows_are_kept(tmp_path):
    args = ["--output_dir", tmp_path, "--packages", "json", "--eval_rows", 2]
    assert "already complete" not in run("recipes/python_docs.py", *args).stdout
    before = (tmp_path / "train.parquet").stat().st_mtime_ns
    assert "already complete" in run("recipes/python_docs.py", *args).stdout
    assert (tmp_path / "train.parquet").stat().st_mtime_ns == before
    (tmp_path / "heldout.parquet").write_bytes(b"cut off")
    assert "rows from" in run("recipes/python_docs.py", *args).stdout
    assert len(pq.read_table(tmp_path / "heldout.parquet")) == 2


def test_no_package_outweighs_the_others(tmp_path):
    options = ["--max_rows", 100, "--packages", "json,email,asyncio,unittest,xml"]
    rows = make_rows(tmp_path, *options)
    packages = [
        package
        for part in ("train", "heldout")
        for package in pq.read_table(rows / f"{part}.parquet")["package"].to_pylist()
    ]
    assert max(packages.count(package) for package in set(packages)) <= 25


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--packages", "no_such_package"], "got 'no_such_package'"),
        (["--packages", "json,"], "got ''"),
        (["--packages", "json", "--eval_rows", "500"], "eval_rows must be at most "),
        (["--max_chars", "3"], "max_chars must be at least 40, got 3"),
        (["--eval_rows", "0"], "eval_rows must be at least 1, got 0"),
    ],
)
def test_bad_options_end_in_one_line(args, message, tmp_path):
    done = launch("recipes/python_docs.py", "--output_dir", tmp_path / "out", *args, code=2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_tokenizer_gives_back_any_text(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in ODD_TEXTS] == ODD_TEXTS
    assert len(tokenizer) == 600
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2]
    assert tokenizer.encode("###") == tokenizer.encode("###", add_special_tokens=False)


def test_model_loads_and_has_a_finite_loss(model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert llama.config.pad_token_id == tokenizer.pad_token_id
    assert llama.config.eos_token_id == tokenizer.eos_token_id
    batch = tokenizer(["Explain what json.dumps does.", "short"], return_tensors="pt", padding=True)
    loss = llama(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    # Random weights guess among all tokens.
    assert loss.item() == pytest.approx(torch.log(torch.tensor(600.0)).item(), abs=1)
    assert torch.equal(llama.lm_head.weight, llama.model.embed_tokens.weight)


def test_model_is_the_same_every_time(rows, model, tmp_path):
    make_model(rows, tmp_path / "again", run)  # by another process
    names = sorted(path.name for path in model.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes(), name
    assert "already complete" in make_model(rows, tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hidden_size", "100"], "hidden_size must be a multiple of 64, got 100"),
        (["--vocab_size", "100"], "vocab_size must be at least 259, got 100"),
        (["--dataset_name", "missing.parquet"], "dataset_name must be a parquet file"),
        (["--output_dir", "."], "output_dir must be new or made by this recipe"),
    ],
)
def test_bad_sizes_end_in_one_line(args, message, rows, tmp_path):
    given = ["--dataset_name", rows / "train.parquet", "--output_dir", tmp_path / "m", *args]
    done = launch("recipes/tiny_llama.py", *given, code=2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def write_metrics(arguments, found):
    """Write what a recipe would have, at the flags that it was given."""
    words = [*map(str, arguments)]
    flags = {a[2:]: b for a, b in pairwise(words) if a.startswith("--")}
    asked = {"method": flags.get("method"), "keep_ratio": float(flags.get("keep_ratio", 0.2))}
    seed = int(flags.get("seed", 0))
    about = {"asked": {**asked, "seed": seed, "selection_seed": seed}, "steps": 4}
    folder = Path(flags["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(about | {"device": "cpu, 2 threads"} | found))


def test_the_demo_puts_its_runs_side_by_side(tmp_path, monkeypatch, capsys):
    losses = iter((4.0, 5.0, 4.5))

    def run(*arguments):
        if any("alpaca_20pct" in str(a) for a in arguments):
            chosen = {"rows": 8, "bytes": 1000, "seconds": {"selection": 2.0}}
            times = {"train": 3.0, "is_resumed": False}
            held_out = {"response_loss": next(losses)}
            write_metrics(arguments, {"selection": chosen, "seconds": times, "held_out": held_out})

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path), "--seed", "1"])
    demo.main()
    lines = [json.loads(text) for text in (tmp_path / "results-1.jsonl").open()]
    found = {line["selection"]: line["metrics"]["loss: held out"]["last"] for line in lines}
    assert found == {"full": 4.0, "random": 5.0, "dq": 4.5}
    assert [line["keep_ratio"] for line in lines] == [1.0, 0.2, 0.2]
    assert "| 20 %, dq " in capsys.readouterr().out


def test_the_image_demo_puts_its_runs_side_by_side(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        if any("cifar10.py" in str(a) for a in arguments):
            chosen = {"rows": 8, "bytes": {"stored_images": 500}, "seconds": {"selection": 2.0}}
            about = {"selection": chosen, "train_seconds": 3.0, "is_resumed": False}
            write_metrics(arguments, {**about, "accuracy": 0.9})
        elif any("train_" in str(a) for a in arguments):
            write_metrics(arguments, {"seconds": 10.0})

    monkeypatch.setattr(demo_images, "run", run)
    monkeypatch.setattr(sys, "argv", ["demo", "--output_dir", str(tmp_path), "--seeds", "2"])
    demo_images.main()
    lines = [json.loads(text) for text in (tmp_path / "results.jsonl").open()]
    spent = {(line["selection"], line["keep_ratio"]): line["seconds"]["proxy"] for line in lines}
    assert list(spent.values()) == [0, 0, 10, 20]
    assert list(spent)[-1] == ("dq, 20 % of patches dropped", 0.125) and len(lines) == 8
    assert "90.00 ± 0.00 (2 seeds)" in capsys.readouterr().out
