"""Chats: what of them the encoder sees, and that every shape of them comes through untouched."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest
from datasets import Array2D, Dataset, Features, Image, Json, LargeList, List, Value, load_dataset
from PIL import Image as Pictures
from transformers import AutoTokenizer

from dq_multimodal import InputError, compress, verify
from dq_multimodal.adapters.choice import choose_adapter
from dq_multimodal.adapters.text import TextAdapter, detect_layout, field_texts, share_tokens
from dq_multimodal.config import CompressConfig
from dq_multimodal.manifest import Problem
from dq_multimodal.stages.embedding import note_alike

N = 30
WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
LONG = "the quick brown fox jumps over a lazy dog 0123456789 " * 40


def some_words(seed, n=6):
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def ask(k):
    return turn("user", f"q {k} {some_words(k)}")


def answer(k):
    return turn("assistant", f"a {k}")


def call(k, arguments):
    function = {"name": "weather", "arguments": arguments}
    return turn(
        "assistant", None, tool_calls=[{"id": f"c{k}", "type": "function", "function": function}]
    )


def tool(k, content):
    return {"role": "tool", "tool_call_id": f"c{k}", "content": content}


def describe(k):
    kinds = {"a": {"type": "number"}} if k % 2 else {"b": {"type": "string", "enum": ["x"]}}
    parameters = {"type": "object", "properties": kinds}
    return [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
SHAPES = {
    "tool calls": lambda k: {
        "messages": [ask(k), call(k, '{"a": 1}'), tool(k, str(k)), answer(k)],
        "tools": describe(k),
        "parallel_tool_calls": bool(k % 2),
    },
    "arguments": lambda k: {"messages": [ask(k), call(k, {"a": k} if k % 2 else '{"a": 1}')]},
    "function calls": lambda k: {
        "messages": [
            ask(k),
            turn("assistant", None, function_call={"name": "f", "arguments": '{"a": 1}'}),
            turn("function", '{"t": 3}', name="f"),
        ],
        "functions": [{"name": "f", "description": "d", "parameters": {"type": "object"}}],
    },
    "parts": lambda k: {
        "messages": [turn("user", f"q {k}" if k % 2 else [{"type": "text", "text": f"q {k}"}])]
    },
    "texts of JSON": lambda k: {
        "messages": [
            turn("user", [{"type": "text", "text": f"q {k}"}] if k % 2 else str(k)),
            turn("assistant", ["42", "true", "null", '{"a": 1}'][k % 4]),
        ],
        "score": k + 0.12345678901234567,
    },
    "pictures": lambda k: {
        "messages": [
            turn("developer", "be kind", name="x"),
            turn("user", [{"type": "text", "text": f"q {k}"}, PICTURE, SOUND]),
            turn("assistant", None, refusal=f"no {k}", audio={"id": "x"}),
        ]
    },
    "tool results": lambda k: {
        "messages": [
            ask(k),
            turn("assistant", "", tool_calls=[]),
            tool(k, [{"type": "text", "text": f"r {k}"}]),
            turn("assistant", [{"type": "refusal", "refusal": "no"}]),
        ]
    },
    "weights": lambda k: {
        "conversations": [
            {"from": "human", "value": f"q {k}"},
            {"from": "gpt", "value": f"a {k}", "weight": k % 2},
        ]
    },
    "one of thirty": lambda k: {"messages": [ask(k), call(k, "{}") if k == 29 else answer(k)]},
    "preference": lambda k: {
        "input": {"messages": [ask(k)], "tools": describe(k), "parallel_tool_calls": True},
        "preferred_output": [call(k, "{}") if k % 2 else answer(k)],
        "non_preferred_output": [answer(-k)],
    },
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def assert_untouched(folder, rows):
    files = [str(path) for path in (folder / "subset").glob("*.parquet")]
    held = load_dataset("parquet", data_files=files, split="train").to_list()
    assert held
    for row in held:
        source = rows[row["dq_row"]]
        assert without_nulls({name: row[name] for name in source}) == without_nulls(source)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_comes_through_untouched(shape, small_encoder, tmp_path):
    rows = [SHAPES[shape](k) for k in range(N)]
    path = write(tmp_path / "data.jsonl", rows)
    options = {"method": "dq", "n_bins": 3, "embedding_model": str(small_encoder)}
    run = compress(str(path), output_dir=tmp_path / "run", report=False, **options)
    assert "chats, version" in run.config["rows"]["template"] and not run.manifest["problems"]
    assert_untouched(run.path, rows)
    assert [check.result for check in verify(run)] == ["passed"] * 5
    stream = compress(
        str(path), method="random", streaming=True, output_dir=tmp_path / "stream", report=False
    )
    assert_untouched(stream.path, rows)


EXTENSIONS = {
    "deep": (
        List({"j": List(Json()), "s": {"j": Json()}}),
        lambda k: k % 3 * [{"j": [k], "s": {}}],
    ),
    "struct": ({"j": Json(), "n": Value("int64")}, lambda k: {"j": [k], "n": k} if k % 3 else None),
    "large": (LargeList(Json()), lambda k: [{"a": k}, None, "x"]),
    "array": (Array2D((2, 2), "int32"), lambda k: [[k, k], [0, 1]]),
    "inner array": ({"x": Array2D((2, 2), "int32")}, lambda k: {"x": [[k, k], [0, 1]]}),
}


def test_extension_types_at_any_depth(tmp_path):
    features = Features({name: kind for name, (kind, _) in EXTENSIONS.items()})
    rows = [{name: make(k) for name, (_, make) in EXTENSIONS.items()} for k in range(N)]
    for row in rows:
        for part in row["deep"]:
            part["s"] = {"j": {"a": 1}}
    source = Dataset.from_list(rows, features=features)
    source.save_to_disk(str(tmp_path / "saved"))
    source.to_parquet(tmp_path / "data.parquet")
    for name in ("saved", "data.parquet"):
        run = compress(str(tmp_path / name), method="random", output_dir=tmp_path / f"run-{name}")
        held = run.subset.remove_columns(["dq_row", "dq_bin", "dq_rank"])
        assert held.features == features
        assert held[:] == source[run.kept.tolist()]
        assert [check.result for check in verify(run)] == ["passed"] * 3 + ["skipped", "passed"]


def chats_of_one_prompt():
    return [{"messages": [turn("system", LONG), ask(k), answer(k)]} for k in range(N)]


def mean_cosine(folder):
    rows = np.load(folder / "embeddings.npy").astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    products = rows @ rows.T
    return (products.sum() - len(rows)) / (len(rows) * (len(rows) - 1))


def test_a_long_system_prompt_hides_no_row(cli, small_encoder, tmp_path):
    path = write(tmp_path / "data.jsonl", chats_of_one_prompt())
    options = {"method": "dq", "n_bins": 3, "embedding_model": str(small_encoder), "report": False}
    options["output_dir"] = tmp_path / "run"
    run = compress(str(path), **options)
    assert not run.manifest["problems"]
    assert len(np.unique(np.load(run.path / "embeddings.npy"), axis=0)) == N
    assert run.config["rows"]["template"].startswith("{messages[*].content}; chats, version 2: ")
    assert compress(str(path), **options).was_complete
    # A run by the template of before is another one.
    run.config.rows.template = "{messages[*].content}"
    run.config.write(run.path)
    with pytest.raises(InputError, match="another template"):
        compress(str(path), **options)
    # Whoever names the column gets all of it, and is told what came of it.
    named = ["--text-columns", "messages", "--method", "dq", "--n-bins", "3"]
    done = cli("compress", path, *named, "--embedding-model", small_encoder, "--output-dir", "all")
    assert mean_cosine(tmp_path / "all") > 0.9999
    for text in (done.stdout, (tmp_path / "all" / "README.md").read_text()):
        assert (
            "WARNING: nearly all embeddings are alike (the mean cosine of two rows is 1.0" in text
        )
        assert "30 rows of 30 are longer than the encoder reads (32 tokens): only their" in text
    report = (tmp_path / "all" / "report.html").read_text()
    assert "nearly all embeddings are alike" in report and "are longer than the encoder" in report


def test_rows_that_are_cut_are_counted_to_the_token(small_encoder, tmp_path, monkeypatch):
    texts = [" ".join(["fox"] * k) for k in range(1, 61)]
    source = write(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    tokenizer = AutoTokenizer.from_pretrained(small_encoder)
    cut = [k for k, text in enumerate(texts) if len(tokenizer(text)["input_ids"]) > 32]
    options = {"embedding_model": str(small_encoder), "method": "dq", "n_bins": 3}
    options |= {"batch_size": 8, "output_dir": tmp_path / "run", "report": False}
    embed, n_left = TextAdapter.embed, 3

    def stop(self, batch):
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise KeyboardInterrupt
        return embed(self, batch)

    monkeypatch.setattr("dq_multimodal.stages.embedding.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(TextAdapter, "embed", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(str(source), **options)
    monkeypatch.setattr(TextAdapter, "embed", embed)
    run = compress(str(source), **options)
    assert run.manifest["resumed"] == ["embeddings"]
    what = "longer than the encoder reads (32 tokens): only their beginning counts"
    assert run.manifest.problems == {what: Problem(count=len(cut), rows=cut)}
    assert f"{len(cut)} rows of 60 are {what}" in run.manifest["notes"]


def make_adapter(rows, model="unused", named=None):
    source = Dataset.from_list(rows)
    return TextAdapter(source, detect_layout(source.column_names, named), str(model))


@pytest.mark.parametrize(
    ("roles", "sizes", "wanted"),
    [
        (["user", "assistant"], [5, 6], [5, 6]),
        (["user", "assistant"], [50, 6], [14, 6]),
        (["system", "user", "model", "user"], [9, 90, 90, 1], [4, 5, 10, 1]),
    ],
)
def test_half_of_the_tokens_is_for_answers(roles, sizes, wanted):
    assert share_tokens(roles, sizes, 20) == wanted


def test_long_turns_leave_room_for_the_others(small_encoder):
    rows = [{"messages": [ask(0), answer(0)]}, {"messages": [turn("user", LONG), answer(1)]}]
    rows += [{"messages": [turn("user", LONG), turn("assistant", LONG[::-1])]}]
    adapter = make_adapter(rows, small_encoder)
    adapter.dimension  # noqa: B018 - loads the model
    whole = adapter.texts(np.arange(3))
    cut, problems = adapter.load(np.arange(3))
    assert cut[0] == whole[0] == f"q 0 {some_words(0)} a 0"
    assert cut[1].endswith(" a 1") and LONG.startswith(cut[1][:-4])
    count = adapter.encoder.count_tokens
    assert count(cut[1:]) == [30, 30]  # [CLS] and [SEP] are the other two
    question = next(k for k in range(len(cut[2])) if not LONG.startswith(cut[2][: k + 1]))
    assert count([cut[2][:question]]) == [15]
    assert list(problems.values()) == [[1, 2]]
    assert make_adapter(rows, small_encoder, ("messages",)).load(np.arange(3))[0] == whole


def test_system_turns_are_left_out_where_many_rows_share_them():
    few = [{"messages": [turn("system", "s"), ask(k)]} for k in range(9)]
    assert make_adapter(few).texts(np.array([0])) == [f"s {ask(0)['content']}"]
    many = [
        *few,
        {"messages": [turn("developer", "s")]},
        {"messages": [turn("system", "t"), ask(1)]},
    ]
    adapter = make_adapter(many)
    assert adapter.texts(np.array([0, 9, 10])) == [ask(0)["content"], "s", f"t {ask(1)['content']}"]
    assert adapter.lengths().tolist() == [len(text) for text in adapter.texts(np.arange(11))]
    gpt = [{"system": "s", "conversations": [{"from": "human", "value": "x"}]}] * 10
    assert make_adapter(gpt).texts(np.array([0])) == ["x"]
    assert make_adapter(gpt, named=("system", "conversations")).texts(np.array([0])) == ["s x"]


def test_what_a_turn_without_content_says():
    assert field_texts(call(1, '{"a": 1}')) == ["weather", '{"a": 1}']
    assert field_texts(call(1, {"a": "ü"})) == ["weather", '{"a": "ü"}']
    assert field_texts(turn("assistant", "x", tool_calls=call(1, "{}")["tool_calls"])) == ["x"]
    assert field_texts(turn("assistant", None, refusal="no")) == ["no"]
    assert field_texts({"role": "assistant", "function_call": {"name": "f"}}) == ["f"]
    assert field_texts(turn("user", [PICTURE, SOUND, {"type": "refusal", "refusal": "no"}])) == [
        "no"
    ]
    assert field_texts({"from": "Oslo", "to": "Rome"}) == ["Oslo", "Rome"]


def test_turns_that_differ_behind_the_first_megabytes(tmp_path):
    rows = [{"messages": [turn("user", f"{k} " + "x" * 120_000)]} for k in range(100)]
    rows += [{"messages": [ask(k), call(k, {"a": k}), answer("42")]} for k in range(20)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    for path in (write(tmp_path / "lines.jsonl", rows), tmp_path / "list.json"):
        run = compress(
            str(path),
            method="random",
            keep_ratio=1.0,
            output_dir=tmp_path / path.stem,
            report=False,
        )
        assert_untouched(run.path, rows)


def test_texts_that_were_read_as_numbers_are_said(tmp_path):
    rows = [
        {"messages": [turn("user", "42" if k else [{"type": "text", "text": "x"}])]} for k in (0, 1)
    ]
    path = str(write(tmp_path / "numbers.jsonl", rows))
    run = compress(
        load_dataset("json", data_files=path, split="train"),
        method="random",
        keep_ratio=1.0,
        output_dir=tmp_path / "two",
    )
    assert any(
        "1 row with a turn whose content is no text" in note for note in run.manifest["notes"]
    )


def test_alike_means_a_mean_cosine_of_99_percent_or_half_of_the_rows_equal():
    rows = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float32)
    assert note_alike(rows, by_cosine=True) == note_alike(rows, by_cosine=False) == []
    assert note_alike(rows[:1], by_cosine=True) == []
    far = rows + 100
    assert "mean cosine of two rows is 0.99" in note_alike(far, by_cosine=True)[0]
    assert note_alike(far, by_cosine=False) == []
    half = rows.copy()
    half[:201] = half[0]
    for by_cosine in (True, False):
        assert "201 of 400 rows" in note_alike(half, by_cosine=by_cosine)[0]
    half[200:] = rows[200:]
    assert note_alike(half, by_cosine=True) == []


def test_given_embeddings_and_rows_that_are_alike_are_said(
    small_classifier, small_encoder, tmp_path
):
    np.save(tmp_path / "emb.npy", np.ones((N, 4), dtype=np.float32))
    rows = Dataset.from_dict({"text": [f"t {k}" for k in range(N)]})
    options = {"method": "dq", "n_bins": 3, "report": False}
    for similarity in ("cosine", "euclidean"):
        run = compress(
            rows,
            ready_embeddings=str(tmp_path / "emb.npy"),
            similarity=similarity,
            output_dir=tmp_path / similarity,
            **options,
        )
        assert "WARNING: nearly all embeddings are alike" in run.manifest["notes"][0]
    white = Pictures.new("RGB", (16, 16), "white")
    columns = {"image": [white] * N, "question": ["what?"] * N, "file_name": ["a.png"] * N}
    rows = Dataset.from_dict(columns).cast_column("image", Image())
    options |= {"embedding_model": f"{small_classifier},{small_encoder}"}
    options |= {"output_dir": tmp_path / "images"}
    first, second, third = compress(rows, **options).manifest["notes"]
    assert "WARNING: nearly all embeddings are alike" in first
    assert second == (
        "rows are chosen by the images in image and the text in question (--modality image or text "
        "chooses by one of them alone)"
    )
    repeats = f"{N - 1} rows repeat a row before them exactly (the same image file and text, "
    assert third.startswith(repeats)
    random_run = CompressConfig(dataset="x", method="random")
    assert choose_adapter(rows, random_run).notes == []
    by_text = choose_adapter(rows, CompressConfig(dataset="x", modality="text"))
    assert by_text.describe()["columns"] == ["question"]


def test_halves_of_characters_are_no_text_for_a_tokenizer():
    turns = pa.array(['{"role": "user", "content": "a \\udc3d"}'])
    column = pa.ListArray.from_arrays([0, 1], pa.json_().wrap_array(turns))
    rows = Dataset(pa.table({"messages": column}))
    adapter = TextAdapter(rows, detect_layout(["messages"]), "unused")
    assert adapter.texts(np.array([0])) == ["a ?"]
