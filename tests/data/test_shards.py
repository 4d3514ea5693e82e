"""A source in shards: the rows of load_source, and every fault of a file in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    concatenate_datasets,
)
from nasty_images import image_rows, picture, save

from dq_multimodal import CompressConfig, InputError
from dq_multimodal.data import shards
from dq_multimodal.data.shards import open_rows, survey_file
from dq_multimodal.data.source import MEMORY, from_memory, load_source

N = 200
SETTINGS = ("split", "config_name", "revision", "field", "image_folder")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in {"SHARD_ROWS": 30, "IMAGE_ROWS": 7, "BLOCK_BYTES": 1000}.items():
        monkeypatch.setattr(shards, name, value)


def survey(files, is_hashed):
    return [survey_file(files, is_hashed, number, Path()) for number in range(len(files))]


def rows_of(data, **options):
    """Cut a source into shards."""
    name = data if isinstance(data, Dataset | DatasetDict) else str(data)
    asked = {"engine": "ray", "method": "random", **options}
    request = CompressConfig(name if isinstance(name, str) else MEMORY, **asked)
    return open_rows(name, request, survey)


def check_rows(data, local=None, least_shards=2, **options):
    """Compare the rows of all shards, and what is said of the source, with load_source."""
    rows, source = rows_of(data, **options)
    if local is None:
        request = CompressConfig(str(data), **options)
        local = load_source(str(data), **{name: getattr(request, name) for name in SETTINGS})
        assert source.origin == local.origin
        assert source.note == local.note
    parts = [rows.read(number) for number in range(len(rows.shards))]
    assert len(parts) >= least_shards
    assert [*np.cumsum([0, *map(len, parts)])] == [*rows.starts]
    assert rows.features == local.dataset.features == parts[-1].features
    found = concatenate_datasets(parts).with_format("arrow")[:]
    if any(type(kind).__name__ == "Json" for kind in rows.features.values()):  # spaces differ
        assert concatenate_datasets(parts).to_list() == local.dataset.to_list()
    else:
        assert found.equals(local.dataset.with_format("arrow")[:])
    first = source.dataset.with_format("arrow")[:]
    assert first.equals(found.slice(0, len(first)))
    return rows


def make_table(n_rows=N, start=0):
    numbers = range(start, start + n_rows)
    return pa.table(
        {
            "text": [f"row {k}" for k in numbers],
            "kind": pa.array([None if k % 7 == 0 else k % 5 for k in numbers], pa.int32()),
            "chat": [[{"role": "user", "content": f"Hi {k}"}] * (k % 3) for k in numbers],
        }
    )


def write_parquet(path, table, group=17):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def write_lines(path, table, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in table.to_pylist()]
    path.write_text(end.join(lines) + end)


def test_one_parquet_file_a_glob_and_a_folder(tmp_path):
    for k in range(3):
        write_parquet(tmp_path / "d" / f"part-{k}.parquet", make_table(50 + k, 100 * k))
    check_rows(tmp_path / "d" / "part-0.parquet")
    check_rows(tmp_path / "d" / "*.parquet", least_shards=5)
    rows = check_rows(tmp_path / "d", least_shards=5)
    sizes = np.diff(rows.starts)
    assert sizes.sum() == 153
    assert sizes.max() <= 30 + 17


def test_splits_of_a_folder(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / "d" / f"{split}.parquet", make_table(60, 1000 * (split == "test")))
    check_rows(tmp_path / "d")
    rows = check_rows(tmp_path / "d", split="test")
    assert rows.read(0)[0]["text"] == "row 1000"
    assert check_rows(tmp_path / "d", split="train[10:50]").files == ()
    with pytest.raises(InputError, match="split"):
        rows_of(tmp_path / "d", split="dev")


def test_features_of_a_parquet_file_are_kept(tmp_path):
    features = {"label": ClassLabel(names=["no", "yes"]), "v": List(Value("float32"), length=2)}
    given = {"label": [0, 1, None] * 30, "v": [[k, k + 0.5] for k in range(90)]}
    Dataset.from_dict(given, features=Features(features)).to_parquet(tmp_path / "d.parquet")
    rows = check_rows(tmp_path / "d.parquet", least_shards=1)
    assert rows.features["label"].names == ["no", "yes"]


@pytest.mark.parametrize(
    ("name", "end"),
    [("d.jsonl", "\n"), ("d.ndjson", "\r\n"), ("D.JSONL", "\n\n"), ("d.jsonl", "\n \n\n")],
)
def test_json_lines(tmp_path, name, end):
    write_lines(tmp_path / name, make_table(100), end)
    assert check_rows(tmp_path / name, least_shards=3).n_rows == 100


def test_json_lines_without_a_last_line_break_and_with_long_lines(tmp_path):
    lines = [json.dumps({"text": "x" * (k * 397 % 3000), "k": k}) for k in range(24)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    assert check_rows(tmp_path / "d.jsonl", least_shards=1).n_rows == 24
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert check_rows(tmp_path / "d.jsonl", least_shards=1).n_rows == 24  # behind a byte order mark


def test_blank_lines_only_make_no_piece(tmp_path):
    lines = [json.dumps({"text": f"row {k}"}) for k in range(20)]
    (tmp_path / "d.jsonl").write_text("\n".join([*lines, *[""] * 5000, *lines]))
    assert check_rows(tmp_path / "d.jsonl").n_rows == 40


def write_values(path, *values):
    """Write 60 rows of each value x, so that pieces hold one value, but for one of them."""
    lines = [json.dumps({"text": f"row {k}", "x": x}) for x in values for k in range(60)]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("first", [2.5, "word", True, [1], {"a": 1}])
def test_values_that_later_lines_leave_open_are_missing(tmp_path, first):
    write_values(tmp_path / "d.jsonl", first, None)
    check_rows(tmp_path / "d.jsonl")
    lines = [json.dumps({"text": "row", "x": first})] * 60 + ['{"text": "no x"}'] * 60
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    check_rows(tmp_path / "d.jsonl")


CHANGES = [(1, 1.5), (1, "word"), (None, "word"), ("2020-01-01", "word"), ([], [1]), ("word", 1.5)]
CHANGES += [("word", True), ("word", {"a": 1}), (["word"], [1]), ({"a": "word"}, {"a": 1})]


@pytest.mark.parametrize("values", CHANGES, ids=str)
def test_later_lines_of_another_type_are_refused_in_one_line(tmp_path, values):
    write_values(tmp_path / "d.jsonl", *values)
    check_refused(tmp_path / "d.jsonl", r"d\.jsonl")
    write_values(tmp_path / "d.jsonl", *values[::-1])
    if values in ((1, 1.5), (None, "word"), ([], [1])):
        check_rows(tmp_path / "d.jsonl")
    else:
        check_refused(tmp_path / "d.jsonl", r"d\.jsonl")


def test_later_lines_of_other_keys_are_refused_in_one_line(tmp_path):
    lines = ['{"text": "row"}'] * 90 + ['{"text": "row", "y": 1}'] * 90
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    check_refused(tmp_path / "d.jsonl", r"d\.jsonl from byte .* other columns .* first rows: y$")


def check_refused(data, message):
    with pytest.raises(InputError, match=message) as error:
        rows, _ = rows_of(data)
        for number in range(len(rows.shards)):
            rows.read(number)
    assert "\n" not in str(error.value)


FAULTS = [
    (b'{"text": "row\n', r"d\.jsonl: .*Invalid"),
    (b'{"text": "caf\xe9"}\n', r"d\.jsonl is not UTF-8 text \(byte 0xe9 at .*iconv"),
    (b"[1, 2]\n", r"d\.jsonl: "),
    (b"no json at all\n", r"d\.jsonl: .*Invalid value"),
    (b'{"text": "a"} {"text": "b"}\n', r"d\.jsonl must hold one JSON object a line"),
    (b'{"text": "a",\n "x": 1}\n', r"d\.jsonl "),
]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("line", "message"), FAULTS, ids=range(len(FAULTS)))
def test_lines_that_are_no_rows_are_refused_in_one_line(tmp_path, line, message, is_first):
    good = b"".join(b'{"text": "row %d"}\n' % k for k in range(100))
    (tmp_path / "d.jsonl").write_bytes(line + good if is_first else good + line)
    check_refused(tmp_path / "d.jsonl", message)


def test_what_workers_cannot_cut_is_loaded_here(tmp_path):
    table = make_table().drop_columns("chat")
    table.to_pandas().to_csv(tmp_path / "d.csv", index=False)
    assert check_rows(tmp_path / "d.csv").files == ()
    (tmp_path / "d.json").write_text(json.dumps(table.to_pylist()))
    assert check_rows(tmp_path / "d.json").files == ()
    (tmp_path / "f.json").write_text(json.dumps({"rows": table.to_pylist()}))
    check_rows(tmp_path / "f.json", field="rows")
    Dataset(table).save_to_disk(tmp_path / "saved")
    check_rows(tmp_path / "saved")


def test_a_dataset_in_memory(tmp_path):
    whole = Dataset(make_table())
    check_rows(whole, from_memory(whole))
    check_rows(whole, from_memory(whole, "train[:40%]"), split="train[:40%]")
    both = DatasetDict({"train": whole, "test": whole.select(range(100))})
    assert check_rows(both, from_memory(both, "test"), split="test").n_rows == 100


def test_a_url(tmp_path):
    for k in range(2):
        write_parquet(tmp_path / "d" / f"part-{k}.parquet", make_table(60, 60 * k))
    local = load_source(str(tmp_path / "d"), split="train")
    for name in ("", "/", "/*.parquet"):
        check_rows(f"file://{tmp_path}/d{name}", local)
    check_rows(
        f"file://{tmp_path}/d/part-0.parquet",
        load_source(f"{tmp_path}/d/part-0.parquet", split="train"),
    )
    with pytest.raises(InputError, match=r"no \.parquet or \.jsonl files at file:"):
        rows_of(f"file://{tmp_path}/missing")


def test_images_in_parquet_and_files_that_rows_name(tmp_path):
    files = [save(picture(seed=k)) for k in range(20)]
    image_rows(files, label=[*range(20)]).to_parquet(tmp_path / "d.parquet")
    check_rows(tmp_path / "d.parquet", least_shards=1)
    (tmp_path / "a.png").write_bytes(files[0])
    named = Dataset.from_dict({"image": [str(tmp_path / "a.png")] * 20})
    named = named.cast_column("image", image_rows(files).features["img"])
    assert len(check_rows(named, from_memory(named)).shards) == 3  # 7 images each


def test_files_whose_columns_differ_are_refused_in_one_line(tmp_path):
    write_parquet(tmp_path / "d" / "a.parquet", make_table(50))
    other = make_table(50)
    kinds = pa.array([f"k{k}" for k in range(50)])
    for table, message in (
        (other.drop_columns("kind"), r"b\.parquet has other columns than the first rows: kind"),
        (other.append_column("more", kinds), r"b\.parquet has other columns .*: more"),
        (other.set_column(1, "kind", kinds), "d: .*'k"),
    ):
        write_parquet(tmp_path / "d" / "b.parquet", table)
        check_refused(tmp_path / "d", message)
    write_parquet(tmp_path / "d" / "b.parquet", other.select(["chat", "text", "kind"]))
    check_rows(tmp_path / "d")  # only their order differs


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, kind):
    path = tmp_path / f"d.{kind}"
    write = write_parquet if kind == "parquet" else write_lines
    write(path, make_table())
    rows, _ = rows_of(path)
    rows.read(0)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with pytest.raises(InputError, match=f"has changed while it was read: d.{kind}"):
        rows.read(1)
    path.unlink()
    with pytest.raises(InputError, match="d"):
        rows.read(1)


def test_empty_and_broken_files(tmp_path):
    write_parquet(tmp_path / "d.parquet", make_table(0))
    with pytest.raises(InputError, match="has no rows in split 'train'"):
        rows_of(tmp_path / "d.parquet")
    (tmp_path / "e.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="no rows"):
        rows_of(tmp_path / "e.jsonl")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(InputError, match=r"b\.parquet"):
        rows_of(tmp_path / "b.parquet")


def test_shards_are_larger_where_there_would_be_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_SHARDS", 3)
    write_parquet(tmp_path / "d.parquet", make_table())
    assert 2 <= len(check_rows(tmp_path / "d.parquet").shards) <= 3
    whole = Dataset(make_table())
    assert len(check_rows(whole, from_memory(whole)).shards) == 3


def test_shards_are_cut_by_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 10_000)
    write_parquet(tmp_path / "d.parquet", make_table())
    assert len(check_rows(tmp_path / "d.parquet", least_shards=1).shards) == 1
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    assert len(check_rows(tmp_path / "d.parquet").shards) >= 3
