"""--streaming: passes over the source give what the whole source gives."""

import json
import os
import shutil
from dataclasses import replace
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_images import picture, save

from dq_multimodal import InputError, Run, compress, verify
from dq_multimodal.data import stream
from dq_multimodal.data.source import load_source
from dq_multimodal.data.stream import Passes, Stream
from dq_multimodal.stages import embedding
from dq_multimodal.stages.embedding import plan_batches

N = 150
OWN = ["dq_row", "dq_bin", "dq_rank"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream, "LEAST_ROWS", 8)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 32)


def make_table(n_rows=N):
    rng = np.random.default_rng(0)
    words = np.array(["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"])
    return pa.table(
        {
            "instruction": [" ".join(rng.choice(words, 1 + k % 9)) for k in range(n_rows)],
            "output": [None if k in (7, 140) else f"done {k} \N{SNOWMAN}" for k in range(n_rows)],
            "meta": [{"id": k, "tags": ["a", None][: k % 3]} for k in range(n_rows)],
            "kind": [("x", "y", None)[k % 3] for k in range(n_rows)],
            "score": pa.array(rng.normal(size=n_rows), pa.float32()),
        }
    )


def write_source(kind, folder):
    table = make_table()
    flat = table.drop_columns(["meta"])
    folder.mkdir()
    if kind == "csv":
        Dataset(flat).to_csv(folder / "d.csv")
        return folder / "d.csv"
    if kind == "jsonl":
        Dataset(table).to_json(folder / "d.jsonl")
        return folder / "d.jsonl"
    pq.write_table(table.slice(0, 70), folder / "a-train.parquet", row_group_size=30)
    pq.write_table(table.slice(70), folder / "b-train.parquet", row_group_size=11)
    return folder if kind == "folder" else folder / "*.parquet"


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "emb.npy", np.random.default_rng(1).normal(size=(N, 6)))
    return write_source("glob", tmp_path / "src")


def both(source, tmp_path, **options):
    """Run without and with streaming."""
    options.setdefault("report", False)
    plain = compress(str(source), output_dir=tmp_path / "plain", **options)
    streamed = compress(str(source), output_dir=tmp_path / "stream", streaming=True, **options)
    return plain, streamed


def assert_same(plain, streamed, names=("selection.parquet", "bins.parquet")):
    for name in names:
        assert pq.read_table(streamed.path / name).equals(pq.read_table(plain.path / name))
    assert streamed.subset.features == plain.subset.features
    assert streamed.subset.to_list() == plain.subset.to_list()
    assert streamed.request.streaming
    assert not plain.request.streaming
    request = replace(streamed.request, streaming=False)
    assert replace(streamed.config, request=request) == plain.config
    for key in ("rows", "labels", "notes", "problems", "kept"):
        assert streamed.manifest[key] == plain.manifest[key], key


@pytest.mark.parametrize("kind", ["glob", "folder", "jsonl", "csv"])
def test_every_kind_of_source(tmp_path, kind):
    place = write_source(kind, tmp_path / "src")
    plain, streamed = both(place, tmp_path, method="random", label_column="kind")
    assert_same(plain, streamed)
    sizes = [run.manifest["bytes"]["source_data"] for run in (plain, streamed)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert [check.result for check in verify(streamed)] == [*["passed"] * 3, "skipped", "passed"]


def test_given_embeddings_give_the_same_run(source, tmp_path):
    options = {"embeddings": str(tmp_path / "emb.npy"), "method": "dq", "label_column": "kind"}
    plain, streamed = both(source, tmp_path, n_bins=4, report=True, **options)
    assert_same(plain, streamed)
    assert len(streamed.manifest["problems"]["an empty output"]["rows"]) == 2
    assert [check.result for check in verify(streamed)] == ["passed"] * 5
    shown = [pq.read_table(run.path / "map.parquet") for run in (plain, streamed)]
    assert shown[0].equals(shown[1])
    more = [run.resample(0.6, output_dir=f"{run.path}-more").subset for run in (plain, streamed)]
    assert more[0].to_list() == more[1].to_list()
    streamed.write_report()
    options |= {"n_bins": 4, "streaming": True}
    assert compress(str(source), output_dir=streamed.path, **options).was_complete


def test_embeddings_in_a_column(tmp_path):
    values = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    table = make_table().append_column("vec", pa.array(values.tolist(), pa.list_(pa.float32())))
    pq.write_table(table, tmp_path / "d.parquet")
    runs = both(tmp_path / "d.parquet", tmp_path, embeddings="vec", method="dq")
    assert_same(*runs)
    np.testing.assert_array_equal(np.load(runs[1].path / "embeddings.npy"), values)


def test_the_encoder_sees_chunks_and_gives_nearly_the_same(source, tmp_path, small_encoder):
    model = str(small_encoder)
    options = {"method": "adq", "embedding_model": model, "batch_size": 5, "n_bins": 3}
    plain, streamed = both(source, tmp_path, score_rows=10, **options)
    values = [np.load(run.path / "embeddings.npy") for run in (plain, streamed)]
    np.testing.assert_allclose(values[1], values[0], atol=1e-5)
    for name in ("representativeness", "diversity"):
        scores = [pq.read_table(run.path / "bins.parquet")[name] for run in (plain, streamed)]
        np.testing.assert_allclose(scores[1], scores[0], rtol=0.02)
    assert streamed.manifest["scores"] == plain.manifest["scores"]


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


def test_an_interrupted_stream_goes_on_where_it_stopped(
    source, tmp_path, small_encoder, monkeypatch
):
    from dq_multimodal.adapters.text import TextAdapter

    monkeypatch.setattr(embedding, "SAVE_SECONDS", 0.0)
    model = str(small_encoder)
    options = {"method": "adq", "embedding_model": model, "batch_size": 5, "n_bins": 3}
    options |= {"score_rows": 10, "report": False, "streaming": True, "label_column": "kind"}
    whole = compress(str(source), output_dir=tmp_path / "whole", **options)
    embed, calls = TextAdapter.embed, count()
    n_batches = sum(-(-rows // 5) for rows in (32, 32, 32, 32, N - 128))

    def stopping(adapter, batch):
        if next(calls) == stop:
            raise Killed
        return embed(adapter, batch)

    for stop in (3, 17, n_batches + 2):  # in the first chunk, in the third, among the views
        monkeypatch.setattr(TextAdapter, "embed", stopping)
        calls = count()
        with pytest.raises(Killed):
            compress(str(source), output_dir=tmp_path / "run", **options)
        calls, stop = count(), -1
        run = compress(str(source), output_dir=tmp_path / "run", **options)
        n_again = next(calls)
        assert n_again < n_batches + 10
        assert run.manifest["resumed"]
        np.testing.assert_array_equal(*(np.load(r.path / "embeddings.npy") for r in (whole, run)))
        for name in ("selection.parquet", "bins.parquet"):
            assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()
        assert run.subset.to_list() == whole.subset.to_list()
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("how", ["parquet", "pictures"])
def test_images_with_labels(tmp_path, small_classifier, how):
    files = [save(picture((16, 16), seed=k)) for k in range(40)]
    labels = [("cat", "dog", "emu", "cat")[k % 4] for k in range(40)]
    place = tmp_path / ("src.parquet" if how == "parquet" else "src")
    if how == "parquet":
        files[3] = b""
        rows = {"img": [{"bytes": file, "path": None} for file in files], "label": labels}
        pq.write_table(pa.table(rows), place)
    else:
        for k, (file, label) in enumerate(zip(files, labels, strict=True)):
            (place / label).mkdir(parents=True, exist_ok=True)
            (place / label / f"{k}.png").write_bytes(file)
    options = {"embedding_model": str(small_classifier), "method": "dq", "n_bins": 2}
    if how == "parquet":
        options |= {"embedding": "gradients", "drop_ratio": 0.25, "patch_coding": "webp"}
    plain, streamed = both(place, tmp_path, batch_size=40, report=True, **options)
    values = [np.load(run.path / "embeddings.npy") for run in (plain, streamed)]
    np.testing.assert_allclose(values[1], values[0], atol=1e-5)
    assert streamed.manifest["labels"] == ["cat", "dog", "emu"]
    for key in ("problems", "kept", "rows"):
        assert streamed.manifest[key] == plain.manifest[key]
    assert {check.result for check in verify(streamed)} == {"passed"}
    assert (streamed.path / "map.parquet").exists()


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stream_of_the_hub_is_pinned_and_never_stored(cli, tmp_path, is_whole):
    pq.write_table(make_table(), tmp_path / "rows.parquet")
    with FakeHub() as hub:
        data = (tmp_path / "rows.parquet").read_bytes()
        card = b"---\nlicense: mit\n---\n"
        commit = hub.add_repo("owner/d", {"README.md": card, "data/train.parquet": data})
        env = hub.env(tmp_path)
        asked = ("compress", "owner/d", "--method", "random", "--label-column", "kind")
        cli(*asked, "--streaming", "--output-dir", "stream", env=env)
        stored = [p for p in (tmp_path / "hf_home").rglob("*") if p.is_file()]
        assert not [p for p in stored if p.suffix in (".parquet", ".arrow")]
        assert all(p.stat().st_size < len(data) / 2 for p in stored)
        if is_whole:
            cli(*asked, "--output-dir", "plain", env=env)
        # another commit changes nothing: the stream is of the recorded one
        hub.add_repo("owner/d", {"data/train.parquet": b"not parquet"})
        checks = json.loads(cli("verify", "stream", "--json", env=env).stdout)
        assert [check["result"] for check in checks] == [*["passed"] * 3, "skipped", "passed"]
        if is_whole:
            missing = cli("compress", "owner/d", "--streaming", "--split", "dev", env=env, code=2)
            assert missing.stderr.count("error: ") == 1
            assert "Traceback" not in missing.stderr
    streamed = Run(tmp_path / "stream")
    assert streamed.config["source"]["revision"] == commit
    assert streamed.config["source"]["license"] == "mit"
    if not is_whole:
        return
    assert_same(Run(tmp_path / "plain"), streamed)
    offline = cli(*asked, "--streaming", "--output-dir", "no", env=env, code=2)
    assert "the Hub is out of reach" in offline.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("src/a-train.parquet", {"split": "train[:90%]"}, "a stream is read whole: split must be"),
        ("src/a-train.parquet", {"split": "dev"}, "cannot read .*a-train.parquet: .*dev"),
        ("saved", {}, "saved is memory-mapped where it is: leave out --streaming"),
        ("norows.parquet", {}, "norows.parquet has no rows"),
        ("broken.parquet", {}, "cannot read .*broken.parquet"),
        ("odd.jsonl", {}, "cannot read .*odd.jsonl"),
        ("src/*.parquet", {"keep_ratio": 0.001}, "keeps none of the 150 rows"),
        ("src/*.parquet", {"label_column": "meta"}, "must hold plain values"),
        ("src/*.parquet", {"method": "dq", "embeddings": "emb5.npy"}, "each of the 150 rows"),
        ("src/*.parquet", {"method": "dq", "n_bins": 151}, "at most the 150 rows"),
    ],
)
def test_refusals_leave_nothing(source, tmp_path, monkeypatch, name, options, message):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "norows.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not parquet at all PAR1")
    (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n{"text": \n')
    np.save(tmp_path / "emb5.npy", np.ones((5, 2)))
    monkeypatch.chdir(tmp_path)
    asked = {"method": "random", "streaming": True, "output_dir": "out", **options}
    with pytest.raises(InputError, match=message) as error:
        compress(name, **asked)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_dataset_in_memory_is_no_stream(tmp_path):
    with pytest.raises(InputError, match="is loaded already"):
        compress(Dataset.from_dict({"text": ["a"]}), streaming=True, output_dir=tmp_path / "no")


def test_a_file_that_changes_between_passes_ends_the_run(source, tmp_path, monkeypatch):
    from dq_multimodal import pipeline

    write = pipeline.write_selection

    def change_and_write(*arguments):
        write(*arguments)
        path = next((tmp_path / "src").glob("a-*"))
        pq.write_table(make_table(60), path)
        os.utime(path, (1, 1))

    monkeypatch.setattr(pipeline, "write_selection", change_and_write)
    with pytest.raises(InputError, match=r"has changed while it was read: a-train\.parquet"):
        compress(str(source), method="random", streaming=True, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "subset").exists()
    with pytest.raises(InputError, match="has not finished"):
        Run(tmp_path / "run")


def passes_of(sizes, columns=("a",)):
    """Give passes over number k = 0, 1, ... that find sizes[0], then sizes[1], ... rows."""
    coming = iter(sizes)

    def rows(size):
        for k in range(size):
            yield {name: k for name in columns}

    def begin(_):
        return IterableDataset.from_generator(rows, gen_kwargs={"size": next(coming)})

    return Stream(Passes("numbers", begin))


@pytest.mark.parametrize(
    ("later", "what"), [(69, "fewer"), (71, "more"), (64, "fewer"), (96, "more")]
)
def test_another_number_of_rows_in_a_later_pass_is_an_error(later, what):
    numbers = passes_of([70, 70, later])  # the first looks at the first rows only
    assert len(numbers) == 70
    with pytest.raises(InputError, match=f"numbers has changed .* 70 rows, .* {what}"):
        assert numbers[[0, 1]]["a"] == [0, 1]
        assert numbers[[later - 1] if later < 70 else [69]]["a"]
        numbers.finish()


def test_a_short_chunk_before_the_last_is_an_error(monkeypatch):
    numbers = passes_of([70, 70])
    tables = [pa.table({"a": [0] * size}) for size in (32, 31, 7)]
    monkeypatch.setattr(stream, "_read_tables", lambda *_: iter(tables))
    with pytest.raises(InputError, match="a short chunk before the last"):
        len(numbers)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=6))
def test_a_stream_gives_the_rows_of_the_dataset(asked):
    """In whatever order: behind the held chunks a new pass begins."""
    stream_rows = passes_of([100] * 99, ("a", "b"))
    view = stream_rows.select_columns(["b"])
    for rows in asked:
        assert stream_rows[rows] == {"a": rows, "b": rows}
        assert view[rows]["b"] == rows
    blocks = [block["b"] for block in view.iter(30)]  # of chunks of 32
    assert [len(block) for block in blocks] == [30, 2, 30, 2, 30, 2, 4]
    assert np.concatenate(blocks).tolist() == list(range(100))
    assert stream_rows.with_format("arrow")[[3, 50]]["a"].to_pylist() == [3, 50]


def test_forward_reading_takes_one_pass():
    numbers = passes_of([100, 100])  # the first rows, and one pass: a second has nothing to read
    assert sum(len(block["a"]) for block in numbers.iter(7)) == len(numbers) == 100
    forward = passes_of([100, 100])
    for start in range(0, 100, 9):
        rows = list(range(start, min(start + 9, 100)))[::-1]
        assert forward[rows]["a"] == rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 20))
def test_batches_of_a_stream_come_chunk_by_chunk(lengths, batch_size, chunk_rows):
    lengths = np.array(lengths)
    chunks = np.arange(len(lengths)) // chunk_rows
    batches = plan_batches(lengths, batch_size, chunks)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    of_batch = [set(chunks[batch].tolist()) for batch in batches]
    assert all(len(found) == 1 for found in of_batch)
    assert [min(found) for found in of_batch] == sorted(min(found) for found in of_batch)
    for number in range(int(chunks.max()) + 1):
        rows = np.flatnonzero(chunks == number)
        ours = [batch for batch, found in zip(batches, of_batch, strict=True) if number in found]
        alone = plan_batches(lengths[rows], batch_size)
        assert [batch.tolist() for batch in ours] == [rows[batch].tolist() for batch in alone]


@pytest.mark.parametrize(("limit", "wanted"), [(10**9, 32), (20_000, 16), (100, 8)])
def test_large_rows_make_small_chunks(limit, wanted, tmp_path, monkeypatch):
    Dataset.from_dict({"text": ["x" * 1000] * 20}).to_parquet(tmp_path / "d.parquet")
    monkeypatch.setattr(stream, "CHUNK_BYTES", limit)
    found = load_source(str(tmp_path / "d.parquet"), streaming=True).dataset
    assert found.chunk_rows == wanted
    assert found[[19]] == {"text": ["x" * 1000]}
