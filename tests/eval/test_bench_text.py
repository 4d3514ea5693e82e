"""Fine-tuning of a causal language model, and the token rows it trains on: a tiny model."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from harness import text, texts
from harness.bundle import Bundle, BundleWriter
from harness.suite import Job
from small_gguf import small_llama, write_gguf

from dq_multimodal.config import InputError
from dq_multimodal.models.locate import load_tokenizer
from dq_multimodal.training.sft import response_loss

CPU = torch.device("cpu")
PLAIN = {"batch_size": 4, "learning_rate": 1e-3, "steps": 6, "precision": "float32"}
N_ROWS = 24


def token_rows(n_rows=N_ROWS, seed=0):
    """Rows of 4 to 30 tokens; responses count up from 40, so can be learned."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_rows):
        prompt = rng.integers(0, 250, rng.integers(1, 15))
        response = np.arange(40, 40 + rng.integers(2, 14))
        ids = [*prompt.tolist(), *response.tolist(), 258]
        found.append({"ids": ids, "n_prompt": len(prompt)})
    return found


def write_bundle(folder, train, test, name="model.safetensors"):
    writer = BundleWriter(folder)
    writer.add_table("t/train/tiny", pa.Table.from_pylist(train, texts.SCHEMA))
    writer.add_table("t/test/tiny/of it", pa.Table.from_pylist(test, texts.SCHEMA))
    small_llama().save_pretrained(folder.with_name(folder.name + "-model"))
    texts.add_model(writer, "tiny", str(folder.with_name(folder.name + "-model")))
    writer.finish({"tasks": {}})
    return Bundle(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("b") / "bundle", token_rows(), token_rows(9, 1))


def job(rows=N_ROWS, seed=0, weights=None, keep_ratio=1.0, is_sampled=False, **settings):
    protocol = text.Protocol(**(PLAIN | settings))
    return Job("t", protocol, "tiny", np.arange(rows), keep_ratio, seed, weights, is_sampled)


def train(bundle, progress=lambda share: None, **settings):
    return text.train(job(**settings), bundle, CPU, progress)


def loss_of(found):
    return found["metrics"]["loss: of it"]["last"]


def plain_losses(net, row):
    """The definition: log-softmax at every place, of one row without padding."""
    ids, first = torch.tensor(row["ids"]), max(row["n_prompt"], 1)
    log_p = net(ids[None]).logits[0].log_softmax(-1)
    return torch.stack([-log_p[at - 1, ids[at]] for at in range(first, len(ids))])


def as_rows(rows):
    return [(np.array(row["ids"]), row["n_prompt"]) for row in rows]


def test_the_test_loss_is_that_of_the_recipe(monkeypatch):
    from accelerate import Accelerator
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    net, rows = small_llama().eval(), token_rows(11)

    class Trainer:
        accelerator = Accelerator(cpu=True)
        model_wrapped = net
        data_collator = DataCollatorForLanguageModeling(pad_token_id=0)

    labelled = [
        {"input_ids": ids, "labels": [-100] * row["n_prompt"] + ids[row["n_prompt"] :]}
        for row in rows
        for ids in [row["ids"]]
    ]
    wanted = response_loss(Trainer(), Dataset.from_list(labelled), 4)["response_loss"]
    for n_tokens in (1, 40, 4000):
        monkeypatch.setitem(text.PASS_TOKENS, "cpu", n_tokens)
        got = text.mean_loss(net, as_rows(rows), CPU)
        assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("max_norm", [1e9, 0.1])
@pytest.mark.parametrize("n_tokens", [20, 10_000])
def test_a_step_is_that_of_the_weighted_batch(bundle, monkeypatch, n_tokens, max_norm):
    """One plain gradient step against the formula of the module, whatever the passes."""
    monkeypatch.setitem(text.PASS_TOKENS, "cpu", n_tokens)
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, rate, **_: torch.optim.SGD(p, rate))
    trained = []
    monkeypatch.setattr(text, "mean_loss", lambda net, *_: trained.append(net.state_dict()) or 0.0)
    weights = np.linspace(0, 2, N_ROWS)
    settings = {"steps": 1, "batch_size": N_ROWS, "warmup": 0.0, "max_norm": max_norm}
    train(bundle, weights=weights, learning_rate=0.1, **settings)

    net, rows = small_llama(), token_rows()
    losses = [plain_losses(net, row) for row in rows]
    total = sum(w * found.sum() for w, found in zip(weights, losses, strict=True))
    (total / sum(len(found) for found in losses)).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in net.parameters()))
    rate = 0.1 * (1 + math.cos(math.pi / 2)) / 2 * min(1.0, max_norm / norm)
    for name, p in net.named_parameters():
        wanted = p.detach() - rate * p.grad
        torch.testing.assert_close(trained[0][name], wanted, rtol=1e-4, atol=1e-6)


def test_equal_steps_or_equal_response_tokens(bundle):
    counts = np.array([len(row["ids"]) - row["n_prompt"] for row in token_rows()])
    for rows in (6, N_ROWS):
        found = train(bundle, rows=rows)
        assert (found["steps"], found["epochs"]) == (6, 4.0 if rows == 6 else 1.0)
        assert found["response_tokens"] == counts[:rows].sum()
        seen = found["response_tokens_seen"]
        assert seen == 4 * counts[:6].sum() if rows == 6 else counts.sum()
        by_tokens = train(bundle, rows=rows, steps=None, response_tokens=300)
        most = 4 * counts.max()
        assert 300 <= by_tokens["response_tokens_seen"] < 300 + most
    steps = {0.1: 2, 1: 5}
    assert [train(bundle, keep_ratio=r, steps=steps)["steps"] for r in (0.1, 0.2)] == [2, 5]


def test_every_pass_over_the_rows_has_all_of_them():
    batches = text.draw_batches(10, 4, seed=3)
    drawn = np.concatenate([next(batches) for _ in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert drawn.tolist() != np.concatenate([next(text.draw_batches(10, 20, seed=4))]).tolist()


def test_rows_are_drawn_in_proportion_to_their_chances():
    chances = np.array([0.0, 1.0, 3.0, 4.0])
    batches = text.draw_batches(4, 4, seed=0, chances=chances)
    drawn = np.concatenate([next(batches) for _ in range(2500)])
    share = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(share, chances / 8, atol=0.02)  # four deviations
    assert share[0] == 0


def test_weights_are_chances_where_the_suite_says_so(bundle):
    given = {"weights": np.linspace(0.1, 1.9, N_ROWS), "steps": 2}
    in_loss, drawn = (loss_of(train(bundle, **given, is_sampled=s)) for s in (False, True))
    assert drawn == loss_of(train(bundle, **given, is_sampled=True)) != in_loss


def test_it_learns_and_the_same_job_gives_the_same_numbers(bundle):
    settings = {"learning_rate": 0.02, "steps": 60, "batch_size": 8}
    before = loss_of(train(bundle, steps=1, learning_rate=1e-12))
    held = text.load_net(bundle.folder_path, "tiny")
    kept = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = (train(bundle, **settings) for _ in range(2))
    assert first == second
    assert loss_of(first) < before - 1
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in held.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    assert loss_of(train(bundle, **settings, seed=1)) != loss_of(first)


def test_small_updates_are_not_rounded_away_in_bf16(bundle, monkeypatch):
    """A step of 1e-4 is far below the digits of bf16; steps add up as in float32."""
    nets, start = [], small_llama().state_dict()
    monkeypatch.setattr(text, "mean_loss", lambda net, *_: nets.append(net.state_dict()) or 0.0)
    for precision in ("float32", "bf16"):
        train(bundle, precision=precision, learning_rate=1e-4, steps=60)
    assert {tensor.dtype for tensor in nets[1].values()} == {torch.bfloat16}
    high, low = (
        torch.cat([(net[name].float() - start[name]).flatten() for name in start]) for net in nets
    )
    assert torch.corrcoef(torch.stack([high, low]))[0, 1] > 0.9


def test_cut_rows_count_nothing(tmp_path):
    """Rows whose response is cut away are trained on as if they were not there."""
    rows = token_rows()
    long = [{"ids": [7] * 40, "n_prompt": 35}, *rows]
    settings = {"batch_size": N_ROWS + 1, "steps": 3, "max_length": 34, "rows": N_ROWS + 1}
    found = train(write_bundle(tmp_path / "long", long, token_rows(5, 1)), **settings)
    assert found["response_tokens"] == sum(len(r["ids"]) - r["n_prompt"] for r in rows)
    other = [{"ids": [9] * 40, "n_prompt": 35}, *rows]
    again = train(write_bundle(tmp_path / "other", other, token_rows(5, 1)), **settings)
    assert loss_of(again) == pytest.approx(loss_of(found), rel=1e-6)
    with pytest.raises(InputError, match="no kept row of t has a response within max_length"):
        train(write_bundle(tmp_path / "none", long[:1], rows), **(settings | {"rows": 1}))


def test_progress_rises_to_1_and_what_it_raises_passes(bundle):
    shares = []
    train(bundle, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[0] == 0 < shares[1] < shares[-2] <= shares[-1] == 1
    assert len(shares) >= 8

    class Stop(Exception):
        pass

    def stop(share):
        raise Stop

    with pytest.raises(Stop):
        train(bundle, progress=stop)
    head = text.load_net(bundle.folder_path, "tiny").get_output_embeddings()
    assert not head._forward_pre_hooks


def test_the_learning_rate_rises_and_falls():
    protocol = text.Protocol(**(PLAIN | {"learning_rate": 2.0}), warmup=0.2)
    assert [protocol.rate(share) for share in (0, 0.1, 0.2)] == [0, 1, 2]
    assert protocol.rate(0.6) == pytest.approx(1)
    assert protocol.rate(1) == protocol.rate(1.1) == pytest.approx(0)
    assert replace(protocol, warmup=0.0).rate(0) == 2


# --- texts to tokens ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(small_llama(), folder / "small.gguf")
    return folder / "small.gguf"


ALPACA = [
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"instruction": "Say the word", "input": "", "output": "the Wörd"},
    {"instruction": "Say nothing", "input": "", "output": ""},
    {"instruction": "Say " + "x" * 200, "input": "", "output": "x"},
]


def test_tokens_are_those_of_the_recipe(gguf, tmp_path):
    from trl import SFTConfig, SFTTrainer

    from dq_multimodal.training.sft import to_training_rows

    tokenizer, rows = load_tokenizer(str(gguf)), Dataset.from_list(ALPACA)
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = SFTTrainer(
        small_llama(), config, train_dataset=to_training_rows(rows), processing_class=tokenizer
    )
    wanted = [trainer.data_collator([row]) for row in trainer.train_dataset]
    got = texts.pack_texts(rows, tokenizer).to_pylist()
    assert len(wanted) == len(got)
    for batch, row in zip(wanted, got, strict=True):
        assert batch["input_ids"][0].tolist() == row["ids"]
        assert (batch["labels"][0] != -100).nonzero()[0].item() == row["n_prompt"]
    assert got[2]["ids"][-1] == tokenizer.eos_token_id  # an empty response is its end


def test_rows_that_are_cut(gguf, capsys):
    tokenizer, rows = load_tokenizer(str(gguf)), Dataset.from_list(ALPACA)
    cut = texts.pack_texts(rows, tokenizer, max_length=100)
    assert len(cut) == 4
    assert max(map(len, cut["ids"].to_pylist())) == 100
    assert "note: 1 of 4 rows have no response left at 100 tokens" in capsys.readouterr().err
    assert len(texts.pack_texts(rows, tokenizer, max_length=100, is_test=True)) == 3
    assert "note: 1 of 4 rows are left out at 100 tokens" in capsys.readouterr().err


def test_a_test_from_nested_records(tmp_path):
    records = [
        {"id": k, "instruction": f"Do {k}", "instances": [{"input": "", "output": str(k)}] * n}
        for k, n in enumerate((1, 2, 1))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    spec = {"dataset": str(path), "unnest": "instances"}
    rows, columns = texts.load_test("nested", spec)
    assert columns is None
    assert sorted(rows["output"]) == ["0", "1", "1", "2"]
    few, _ = texts.load_test("nested", spec | {"rows": 2})
    assert few["output"] == rows["output"][:2]
    halves = [texts.load_test("nested", spec | {"half": k})[0] for k in (0, 1)]
    assert sorted([*halves[0]["output"], *halves[1]["output"]]) == ["0", "1", "1", "2"]
    assert not set(halves[0]["output"]) & set(halves[1]["output"])
    for wrong, said in (
        ({"half": 2}, "test nested: half must be 0 or 1, got 2"),
        ({"unnest": "id"}, "column id must hold lists of records, got 0"),
        ({"text_columns": ["id", "answer"]}, "test nested: no column answer"),
        ({"row": 2}, "test nested: wanted a dataset and keys of"),
    ):
        with pytest.raises(InputError, match=said):
            texts.load_test("nested", spec | wrong)


def test_held_out_rows_lie_everywhere_and_nest():
    held = texts.split_held_out(1000, 100)[1]
    assert set(held) < set(texts.split_held_out(1000, 200)[1])
    assert 30 <= sum(held < 500) <= 70


def test_from_texts_to_a_trained_gguf_model(gguf, tmp_path):
    rows = Dataset.from_list([{"prompt": f"Say {k}:", "completion": f" {k}."} for k in range(40)])
    pq.write_table(rows.with_format("arrow")[:], tmp_path / "rows.parquet")
    spec = {
        "models": {"tiny": str(gguf)},
        "tests": {"again": {"dataset": str(tmp_path / "rows.parquet"), "rows": 5}},
    }
    chosen, held_out = texts.split_held_out(40, 8)
    writer = BundleWriter(tmp_path / "bundle")
    parts = (rows.select(chosen), rows.select(held_out))
    texts.add_texts(writer, "t", spec, *parts, ["tiny"])
    writer.finish({"tasks": {}})
    shutil.move(gguf, tmp_path / "away")
    tested = Bundle(tmp_path / "bundle").table("t/test/tiny/held out")
    trained = Bundle(tmp_path / "bundle").table("t/train/tiny")
    both = {tuple(ids) for table in (tested, trained) for ids in table["ids"].to_pylist()}
    assert (len(tested), len(trained), len(both)) == (8, 32, 40)
    found = text.train(job(rows=32), Bundle(tmp_path / "bundle"), CPU, lambda share: None)
    shutil.move(tmp_path / "away", gguf)
    assert set(found["metrics"]) == {"loss: held out", "loss: again"}
    assert all(0 < metric["last"] < 7 for metric in found["metrics"].values())
    with pytest.raises(InputError, match="task t: no model big among tiny"):
        texts.add_texts(BundleWriter(tmp_path / "other"), "t", spec, *parts, ["big"])
    with pytest.raises(InputError, match="task t: wanted held_out or tests"):
        texts.add_texts(writer, "t", {"models": {}}, rows, None, [])
