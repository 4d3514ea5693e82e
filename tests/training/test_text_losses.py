"""Losses of responses against the definition, row by row and token by token."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_gguf import small_llama, write_gguf

from dq_multimodal import InputError
from dq_multimodal.models.locate import load_tokenizer
from dq_multimodal.training.text_losses import (
    cut_passes,
    measure_losses,
    to_token_rows,
    token_losses,
)

ROWS = [
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"instruction": "Name the path that you took there", "input": "", "output": "It was the th"},
    {"instruction": "Say nothing", "input": "", "output": ""},
    {"instruction": "Hi", "input": "", "output": "Hello and welcome"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer that also knows `th`."""
    folder = tmp_path_factory.mktemp("model")
    write_gguf(small_llama(n_layers=1), folder / "model.gguf")
    return load_tokenizer(str(folder))


def nats(model, ids, at):
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(np.mean([-log_p[k - 1, ids[k]] for k in range(at, len(ids))]))


def test_tokens_are_those_of_fine_tuning(tokenizer):
    rows = to_token_rows(Dataset.from_list(ROWS), tokenizer, None, 100)
    for row, source in zip(rows, ROWS, strict=True):
        response = tokenizer.decode(row["ids"][row["n_prompt"] :])
        assert response == (source["output"] + "</s>" if source["output"] else "")
    prompt = tokenizer.decode(rows[0]["ids"][: rows[0]["n_prompt"]])
    assert prompt == "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"
    short = to_token_rows(Dataset.from_list(ROWS[3:]), tokenizer, None, rows[3]["n_prompt"] + 5)
    assert tokenizer.decode(short[0]["ids"][short[0]["n_prompt"] :]) == "Hello"
    none = to_token_rows(Dataset.from_list(ROWS[3:]), tokenizer, None, 10)[0]
    assert (len(none["ids"]), none["n_prompt"]) == (10, 10)
    plain = to_token_rows(Dataset.from_list([{"text": "the text</s>"}]), tokenizer, None, 100)[0]
    assert (tokenizer.decode(plain["ids"]), plain["n_prompt"]) == ("the text</s>", 0)


def test_tokens_of_chats_are_those_of_the_template(tokenizer, monkeypatch):
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant")]
    chat = Dataset.from_list([{"messages": turns}])
    with pytest.raises(InputError, match="no chat template"):
        to_token_rows(chat, tokenizer, None, 100)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (row,) = to_token_rows(chat, tokenizer, None, 100)
    assert tokenizer.decode(row["ids"][: row["n_prompt"]]) == "[user]u</s>[assistant]"
    assert tokenizer.decode(row["ids"][row["n_prompt"] :]) == "a</s>"


def test_passes_hold_rows_of_like_length():
    passes = cut_passes([3, 9, 4, 30, 9, 1], 20)
    assert [rows.tolist() for rows in passes] == [[3], [1, 4], [2, 0, 5]]


def test_losses_with_and_without_the_instruction(tokenizer):
    model = small_llama(n_layers=1).eval()
    dataset = Dataset.from_list(ROWS)
    rows = to_token_rows(dataset, tokenizer, None, 100)
    wanted = []
    for row in rows:
        ids, at = row["ids"], row["n_prompt"]
        pair = (nats(model, ids, at), nats(model, [257, *ids[at:]], 1)) if at < len(ids) else ()
        wanted.append(pair or (np.nan, np.nan))
    for pass_tokens in (1, 60, 10_000):
        got = measure_losses(model, rows, 257, pass_tokens=pass_tokens, device="cpu")
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert np.isnan(got[2]).all() and np.isfinite(got[[0, 1, 3]]).all()
    assert (abs(got[[0, 1, 3], 0] - got[[0, 1, 3], 1]) > 1e-3).all()


def test_a_plain_text_is_all_response(tokenizer):
    model = small_llama(n_layers=1).eval()
    rows = to_token_rows(Dataset.from_list([{"text": "the text"}]), tokenizer, None, 100)
    got = measure_losses(model, rows, 257, pass_tokens=100, device="cpu")
    wanted = nats(model, [257, *rows[0]["ids"]], 1)
    np.testing.assert_allclose(got, [[wanted, wanted]], rtol=1e-5)


def small_gemma():
    """A model with a window of attention, whose logits are bent after the last layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, initializer_range=0.2,
        final_logit_softcapping=2.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("make", [small_llama, small_gemma])
def test_texts_of_one_pass_do_not_touch(make):
    model, rng = make().eval(), np.random.default_rng(0)
    texts = [(rng.integers(0, 250, n).tolist(), at) for n, at in ((9, 3), (4, 1), (17, 6), (3, 3))]
    losses, number = token_losses(model, texts, "cpu")
    assert number.tolist() == [k for k, (ids, at) in enumerate(texts) for _ in ids[at:]]
    for k, text in enumerate(texts[:3]):
        assert losses[number == k].mean().item() == pytest.approx(nats(model, *text), rel=1e-5)
