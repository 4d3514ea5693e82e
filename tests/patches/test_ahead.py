"""Rows read one by one are those of a batch, decoded some at a time."""

import pickle

import numpy as np
import pytest
from datasets import Dataset, Features, Value, concatenate_datasets

from dq_multimodal.patches import ahead, restore, store
from dq_multimodal.patches.codec import encode_patches
from dq_multimodal.patches.fields import FIELDS, ORIGINAL, Record

N = 30


@pytest.fixture(scope="module")
def rows():
    """30 pictures of 8 px: some grey, one original file, one none; numbers that are no places."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 8, 8, 3)).astype(np.uint8)
    keep = rng.random((N, 4)) > 0.3
    keep[:, 0] = True
    records = [
        encode_patches(images[k : k + 1, ..., : 1 if k % 7 == 0 else 3], keep[k : k + 1], 4)[0]
        for k in range(N)
    ]
    from nasty_images import picture, save

    blank = {"height": 0, "width": 0, "channels": 0, "patch_size": 0, "mask": b""}
    records[5] = Record(coding=ORIGINAL, data=save(picture()), **blank)
    records[9] = None
    features = {"img": {name: Value(kind) for name, kind in FIELDS.items()}}
    features = Features({**features, "dq_row": Value("int64")})
    numbers = [3 * k + 1 for k in range(N)]
    return Dataset.from_dict({"img": records, "dq_row": numbers}, features=features)


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the groups that were decoded."""
    found = []
    real = store.decode_patches

    def count(records):
        found.append(len(records))
        return real(records)

    monkeypatch.setattr(store, "decode_patches", count)
    return found


def look(row):
    image = row["img"]
    return None if image is None else (image.mode, image.size, image.tobytes(), row["dq_row"])


def whole(rows):
    """What batches give."""
    batch = restore(rows)[:]
    return [
        look({"img": image, "dq_row": number})
        for image, number in zip(batch["img"], batch["dq_row"], strict=True)
    ]


@pytest.mark.parametrize("cache", [ahead.CACHE_BYTES, 0])
def test_in_order_and_in_any_order(rows, calls, monkeypatch, cache):
    monkeypatch.setattr(ahead, "CACHE_BYTES", cache)
    monkeypatch.setattr(ahead, "BLOCK_ROWS", 8)
    wanted = whole(rows)
    calls.clear()
    assert [look(row) for row in restore(rows)] == wanted
    assert len(calls) <= 1 + 2 * 4 + 1  # the first alone, then blocks of 8, of two shapes
    calls.clear()
    shuffled = np.random.default_rng(1).permutation(N).tolist()
    back = restore(rows)
    assert [look(back[k]) for k in shuffled] == [wanted[k] for k in shuffled]
    assert (len(calls) <= 10) == (cache > 0)
    assert len(back._format_kwargs["transform"]._ahead._blocks) <= (4 if cache else 1)


def test_after_selecting_shuffling_and_joining(rows):
    wanted = dict(zip(rows["dq_row"], whole(rows), strict=True))
    for made in (
        restore(rows.shuffle(seed=3)),
        restore(rows).shuffle(seed=3),
        restore(rows).select(range(10, 20)),
        restore(rows.select(range(10, 20))),
        restore(rows).filter(lambda number: number % 2 == 0, input_columns="dq_row"),
    ):
        assert len(made) >= 10
        for row in made:
            assert look(row) == wanted[row["dq_row"]]
    other = rows.map(lambda row: {"dq_row": row["dq_row"] + 3})  # the same numbers, other pictures
    joined = concatenate_datasets([rows, other])
    assert [look(row) for row in restore(joined)] == whole(joined)
    bare = restore(rows.remove_columns("dq_row"))
    assert [bare[k]["img"] and bare[k]["img"].tobytes() for k in range(N)] == [
        found and found[2] for found in whole(rows)
    ]


def test_a_changed_picture_changes_no_other(rows):
    back = restore(rows)
    before = [look(row) for row in back]
    for row in back:
        if row["img"] is not None:
            row["img"].paste(0, (0, 0, 8, 8))
    assert [look(row) for row in back] == before


def test_another_process_and_the_fingerprint(rows):
    back = restore(rows)
    back[0], back[1]
    copy = pickle.loads(pickle.dumps(back))
    assert [look(row) for row in copy] == [look(row) for row in back]
    assert restore(rows)._fingerprint == back._fingerprint
