"""The store of parts: whole files or none, by any file system of fsspec."""

import errno
import os
import pickle
import uuid

import numpy as np
import pytest

from dq_multimodal.config import InputError
from dq_multimodal.data.store import Store

KIND = np.dtype([("row", "i8"), ("vector", "f2", (3,))])


@pytest.fixture(params=["path", "url", "memory"])
def store(request, tmp_path):
    roots = {"path": str(tmp_path / "s"), "url": f"file://{tmp_path}/s"}
    return Store(roots.get(request.param, f"memory://{uuid.uuid4().hex}/s"))


def make_records(n_rows=10):
    found = np.zeros(n_rows, KIND)
    found["row"], found["vector"] = np.arange(n_rows), np.arange(3 * n_rows).reshape(n_rows, 3)
    return found


def test_what_is_written_is_read_all_or_in_part(store, tmp_path):
    records = make_records()
    store.write("parts/00000.bin", records, tmp_path)
    np.testing.assert_array_equal(store.read("parts/00000.bin", KIND), records)
    for start, size in ((0, 10), (3, 4), (9, 1), (0, 0), (10, 0)):
        found = store.read("parts/00000.bin", KIND, start, size)
        np.testing.assert_array_equal(found, records[start : start + size])
    with store.open("parts/00000.bin") as file:
        assert file.read() == records.tobytes()


def test_reading_beyond_the_end_or_another_kind_raises(store, tmp_path):
    store.write("parts/00000.bin", make_records(), tmp_path)
    for start, size in ((0, 11), (8, 3), (10, 1), (99, 1)):
        with pytest.raises(InputError, match="not as long as it was written"):
            store.read("parts/00000.bin", KIND, start, size)
    with pytest.raises(InputError, match="not as long"):
        store.read("parts/00000.bin", np.dtype("V9"))
    with pytest.raises(FileNotFoundError):
        store.read("parts/00001.bin", KIND)


def test_facts_are_found_by_stage_and_number(store, tmp_path):
    assert store.find_facts("bins/00003") is None
    assert store.read_facts("bins") == {}
    facts = {number: {"n": number, "names": ["\u00e9"]} for number in (0, 3, 123456)}
    for number, found in facts.items():
        store.put_facts(f"bins/{number:05d}", found, tmp_path)
    store.write("bins/00001.bin", make_records(), tmp_path)
    store.put_facts("order/00000", {"n": 5}, tmp_path)
    assert store.read_facts("bins") == facts
    assert store.read_facts("order") == {0: {"n": 5}}
    assert store.find_facts("bins/00003") == facts[3]
    assert pickle.loads(pickle.dumps(store)).read_facts("bins") == facts
    store.clear()
    assert store.read_facts("bins") == {}
    store.clear()  # of nothing


def test_a_file_that_is_written_again_is_the_last_one(store, tmp_path):
    store.put_facts("bins/00000", {"n": 1}, tmp_path)
    store.put_facts("bins/00000", {"n": 2}, tmp_path)
    assert store.read_facts("bins") == {0: {"n": 2}}


def test_fetching_makes_a_file_here(store, tmp_path):
    store.write("subset/00000-0.parquet", b"rows", tmp_path)
    found = store.fetch("subset/00000-0.parquet", tmp_path / "mine")
    assert found == tmp_path / "mine"
    assert found.read_bytes() == b"rows"


def test_a_file_is_there_whole_or_absent(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "s"))

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.write("bins/00000.bin", b"old", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for name in ("bins/00000", "bins/00001"):
            with pytest.raises(OSError, match="No space"):
                store.write(f"{name}.bin", b"new", tmp_path)
            with pytest.raises(OSError, match="No space"):
                store.put_facts(name, {"n": 1}, tmp_path)
    assert store.read_facts("bins") == {}
    assert store.read("bins/00000.bin", np.dtype("V1")).tobytes() == b"old"
    assert not (tmp_path / "s" / "bins" / "00001.bin").exists()
    store.put_facts("bins/00001", {"n": 1}, tmp_path)
    assert store.read_facts("bins") == {1: {"n": 1}}  # what was left half is no part


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_fetching_copies_where_there_are_no_links(tmp_path, monkeypatch, number):
    store = Store(str(tmp_path / "s"))
    store.write("subset/00000-0.parquet", b"rows", tmp_path)
    linked = store.fetch("subset/00000-0.parquet", tmp_path / "linked")
    assert linked.samefile(store.path("subset/00000-0.parquet"))

    def fail(*_):
        raise OSError(number, "no links")

    monkeypatch.setattr(os, "link", fail)
    copied = store.fetch("subset/00000-0.parquet", tmp_path / "copied")
    assert copied.read_bytes() == b"rows"
    assert not copied.samefile(linked)
