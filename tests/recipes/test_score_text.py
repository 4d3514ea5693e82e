"""recipes/score_text.py on a tiny model: checkpoints, adapters, and a run that goes on."""

import json

import numpy as np
import pytest
import score_text
import torch
from datasets import Dataset
from small_gguf import small_llama, write_gguf

from dq_multimodal.models.locate import load_tokenizer
from dq_multimodal.training import text_losses


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(score_text, "BLOCK_ROWS", 3)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return score_text


@pytest.fixture
def parts(tmp_path):
    """Ten rows, a .gguf file, another whole model, and an adapter of the first."""
    from peft import LoraConfig, get_peft_model

    rows = [{"instruction": f"Say {k}", "output": "It is " * (k % 4) + str(k)} for k in range(9)]
    Dataset.from_list([*rows, {"instruction": "Hush", "output": ""}]).to_parquet(
        tmp_path / "rows.parquet"
    )
    write_gguf(small_llama(n_layers=1), tmp_path / "model.gguf")
    small_llama(seed=1, n_layers=1).save_pretrained(tmp_path / "checkpoint-8")
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(small_llama(n_layers=1), settings)
    adapted.save_pretrained(tmp_path / "checkpoint-9")
    return tmp_path, adapted


def flags(parts, out, **more):
    return {
        "dataset_name": str(parts / "rows.parquet"),
        "model_name_or_path": str(parts / "model.gguf"),
        "output_dir": str(out),
        **more,
    }


def test_losses_at_checkpoints_and_after_an_interrupt(recipe, parts, monkeypatch, capsys):
    parts, adapted = parts
    names = [str(parts / name) for name in ("model.gguf", "checkpoint-8", "checkpoint-9")]
    args = recipe.ScoreArguments(**flags(parts, parts / "out", checkpoints=names))
    real, calls = text_losses.measure_losses, []

    def stop_at_the_sixth(*given, **options):
        calls.append(given)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(text_losses, "measure_losses", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        recipe.score(args)
    recipe.score(args)
    assert len(calls) == 6 + 3 * 4 - 5  # four blocks of each checkpoint, five were done
    got = np.load(parts / "out" / "losses.npy")
    tokens = np.load(parts / "out" / "tokens.npy")
    assert (got.shape, got.dtype, tokens.dtype) == ((3, 10, 2), np.float32, np.int32)
    tokenizer = load_tokenizer(names[0])
    dataset = Dataset.from_parquet(str(parts / "rows.parquet"))
    rows = text_losses.to_token_rows(dataset, tokenizer, None, 512)
    assert tokens.tolist() == [len(row["ids"]) - row["n_prompt"] for row in rows]
    for k, net in enumerate((small_llama(0, 1), small_llama(1, 1), adapted)):
        wanted = real(net.eval(), rows, 257, pass_tokens=999, device="cpu")
        np.testing.assert_allclose(got[k], wanted, rtol=1e-4)
    assert np.isnan(got[:, 9]).all() and (tokens[9], tokens[:9].min() > 0) == (0, True)
    about = json.loads((parts / "out" / "losses.json").read_text())
    assert (about["checkpoints"], about["unit"]) == (names, "nats a token")
    assert not (parts / "out" / "blocks").exists()
    capsys.readouterr()
    recipe.score(args)
    assert "already complete" in capsys.readouterr().out


def test_the_model_itself_is_the_default_and_bad_input_is_one_line(
    recipe, parts, monkeypatch, capsys
):
    parts, _ = parts
    given = flags(parts, parts / "out")

    def run(**more):
        command = [part for key, value in {**given, **more}.items() for part in (f"--{key}", value)]
        monkeypatch.setattr("sys.argv", ["score_text.py", *map(str, command)])
        recipe.main()

    run()
    assert np.load(parts / "out" / "losses.npy").shape == (1, 10, 2)
    assert "10 rows, 1 without a response" in capsys.readouterr().out
    for change, message in (
        ({"max_length": 0}, "max_length must be a whole number"),
        ({"max_length": 9}, "holds a run with another max_length"),
        ({"model_name_or_path": "no/model", "output_dir": parts / "b"}, "out of reach and model"),
        ({"text_columns": "story", "output_dir": parts / "c"}, "no column story"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(**change)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
