"""Exact repeats: which rows they are, by all pairs, and what a run says of them."""

import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image
from nasty_images import picture, save

from dq_multimodal.adapters.choice import choose_adapter
from dq_multimodal.config import CompressConfig
from dq_multimodal.data.repeats import digest_rows, find_repeats, note_repeats
from dq_multimodal.data.source import load_source

CONTENTS = [b"one", b"two", b"one", b"three", b"eno", None, b"", b"two", b"one", None, b""]
REPEATS = [2, 7, 8]
"""Rows of CONTENTS that repeat one before them; eno is as long as one."""
REQUEST = CompressConfig("data", method="random")


def repeats_by_pairs(texts):
    words = [(text or "").split() for text in texts]
    return [k for k, row in enumerate(words) if row and row in words[:k]]


def adapter_of(dataset, **options):
    return choose_adapter(dataset, CompressConfig("data", method="random", **options))


def image_rows(contents, paths=None):
    paths = paths or [None] * len(contents)
    values = [
        None if file is None and path is None else {"bytes": file, "path": path}
        for file, path in zip(contents, paths, strict=True)
    ]
    return Dataset.from_dict({"img": values}, features=Features({"img": Image()}))


def test_texts_are_compared_by_all_pairs_but_for_white_space():
    rng = np.random.default_rng(0)
    spaces = [" ", "  ", "\n", "\t "]
    texts = ["", None, "   "] + [
        rng.choice(spaces).join(rng.choice(["a", "b", "ab"], rng.integers(1, 4)))
        for _ in range(60)
    ]  # fmt: skip
    rows = Dataset.from_dict({"text": texts})
    wanted = repeats_by_pairs(texts)
    assert 10 < len(wanted) < 60
    assert find_repeats(rows, adapter_of(rows)).tolist() == wanted
    some = rows.select([5, 3, 40, 41, 5])
    assert find_repeats(some, adapter_of(some)).tolist() == repeats_by_pairs(some["text"])


def test_all_columns_that_are_embedded_count_and_no_others():
    rows = {"instruction": ["a", "a", "a"], "output": ["x", "y", "x"], "id": [1, 2, 3]}
    rows = Dataset.from_dict(rows)
    assert find_repeats(rows, adapter_of(rows)).tolist() == [2]
    only = adapter_of(rows, text_columns=("instruction",))
    assert find_repeats(rows, only).tolist() == [1, 2]


def test_a_chat_with_another_system_turn_repeats_nothing():
    def chat(system, question):
        turns = [("system", system), ("user", question), ("assistant", "yes")]
        return [{"role": role, "content": text} for role, text in turns]

    chats = [chat("be brief", f"q{k}") for k in range(30)]  # a system turn that all share
    chats += [chat("be brief", "q3"), chat("be long", "q4"), chat("be long", "q4")]
    rows = Dataset.from_dict({"messages": chats})
    assert find_repeats(rows, adapter_of(rows)).tolist() == [30, 32]


def test_image_files_are_compared_by_their_bytes():
    rows = image_rows(CONTENTS)
    assert find_repeats(rows, adapter_of(rows)).tolist() == REPEATS
    order = [8, 4, 0, 2, 3]
    some = rows.select(order)
    assert find_repeats(some, adapter_of(some)).tolist() == [2, 3]
    plain = Dataset.from_dict(
        {"img": [{"bytes": file, "path": "a.png"} for file in CONTENTS[:5]]}
    )  # a struct as other writers leave it
    assert find_repeats(plain, adapter_of(plain)).tolist() == [2]
    assert find_repeats(image_rows([b"a", b"bc"]), adapter_of(image_rows([b"a"]))).tolist() == []


def test_files_beside_the_table_and_in_a_zip_file(tmp_path):
    paths = []
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as together:
        for k, file in enumerate(CONTENTS):
            (tmp_path / f"{k}.png").write_bytes(file or b"")
            together.writestr(f"{k}.png", file or b"")
            paths.append(f"zip://{k}.png::{tmp_path}/all.zip" if k % 2 else f"{tmp_path}/{k}.png")
    contents = [None] * len(CONTENTS)
    contents[8] = CONTENTS[8]  # one of the rows holds its file itself
    paths[3] = str(tmp_path / "missing.png")
    rows = image_rows(contents, paths)
    assert find_repeats(rows, adapter_of(rows)).tolist() == REPEATS


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_stream_gives_the_same(tmp_path, kind):
    column = [None if file is None else file.decode() for file in CONTENTS]
    if kind == "image":
        column = [{"bytes": file, "path": None} for file in CONTENTS]
    pq.write_table(pa.table({"text": column}), tmp_path / "data.parquet")
    rows = load_source(str(tmp_path / "data.parquet"), streaming=True).dataset
    assert find_repeats(rows, adapter_of(rows, modality=kind)).tolist() == REPEATS


def test_digests_are_of_the_rows_asked_for():
    rows = Dataset.from_dict({"text": ["a b", "", "c", "a\nb"]})
    found = dict(digest_rows(adapter_of(rows)))
    assert list(found) == [0, 2, 3]
    assert found[0] == found[3] != found[2]
    assert dict(digest_rows(adapter_of(rows), np.array([1, 3]))) == {3: found[3]}


def test_what_is_said():
    rows = Dataset.from_dict({"text": ["a", "b", "a"]})
    hint = "; --drop-duplicates puts near-duplicates last"
    line = "1 row repeats a row before it exactly (the same text, white space apart): row 2"
    assert note_repeats(rows, adapter_of(rows), REQUEST) == [line + hint]
    dropped = CompressConfig("data", method="random", drop_duplicates=0.9)
    assert note_repeats(rows, adapter_of(rows), dropped) == [line]
    many = image_rows([b"a"] * 11)
    assert note_repeats(many, adapter_of(many), REQUEST) == [
        "10 rows repeat a row before them exactly (the same image file): "
        "rows 1, 2, 3, 4, 5, 6, 7, 8, ..." + hint
    ]
    assert note_repeats(rows, None, REQUEST) == []
    assert note_repeats(rows.select([0, 1]), adapter_of(rows.select([0, 1])), REQUEST) == []


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_every_run_says_it_and_a_finished_one_stays(kind, streaming, cli, tmp_path):
    column, what = [f"row {k % 7}" for k in range(10)], "text, white space apart"
    if kind == "image":
        column = [{"bytes": save(picture(seed=k % 7)), "path": None} for k in range(10)]
        what = "image file"
    pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    flags = ("compress", "d.parquet", "--method", "random", "--output-dir", "run", "--no-report")
    flags += ("--streaming",) * streaming
    line = f"3 rows repeat a row before them exactly (the same {what}): rows 7, 8, 9;"
    assert line in cli(*flags).stdout
    assert line in (tmp_path / "run" / "README.md").read_text()
    assert "already complete" in cli(*flags).stdout
