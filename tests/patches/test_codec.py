"""The patch store: records of kept patches, and what comes back of them."""

import io
import pickle

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from imagecodecs import jpegxl_decode
from PIL import Image

from dq_multimodal import InputError
from dq_multimodal.patches import restore
from dq_multimodal.patches.codec import (
    FIELDS,
    Record,
    decode_patches,
    encode_patches,
    fill_smoothly,
)
from dq_multimodal.patches.grid import (
    count_dropped,
    drop_lowest,
    grid_shape,
    keep_pixels,
    pack_mask,
    unpack_mask,
)


def pictures(n, height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    base = np.stack([rows * 5 + k * 9 + columns * 3 for k in range(n)])[..., None]
    noise = rng.integers(0, 20, (n, height, width, channels))
    return np.clip(base + noise, 0, 255).astype(np.uint8)


def marks(n, height, width, patch_size, drop_ratio=0.25, seed=0):
    n_patches = int(np.prod(grid_shape(height, width, patch_size)))
    scores = np.random.default_rng(seed).random((n, n_patches))
    return drop_lowest(scores, count_dropped(n_patches, drop_ratio))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 23) | st.integers(65, 80),
    st.integers(1, 23),
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.floats(0, 0.9) | st.just(1.0),
    st.integers(0, 100),
    st.sampled_from(["exact", "exact-small"]),
)
def test_kept_pixels_come_back_bit_for_bit(height, width, size, channels, ratio, seed, coding):
    """From one patch kept to all of them, of images that are coded as small ones and others."""
    images = pictures(3, height, width, channels, seed)
    keep = marks(3, height, width, size, ratio, seed)
    before = images.copy()
    decoded, found = decode_patches(encode_patches(images, keep, size, coding))
    is_kept = keep_pixels(keep, height, width, size)
    np.testing.assert_array_equal(found, keep)
    np.testing.assert_array_equal(decoded[is_kept], images[is_kept])
    assert not decoded[~is_kept].any()
    np.testing.assert_array_equal(images, before)


def test_a_drop_ratio_of_0_is_lossless_and_dropped_pixels_leave_no_trace():
    images = pictures(2, 17, 30)
    keep = marks(2, 17, 30, 4, 0.0)
    np.testing.assert_array_equal(decode_patches(encode_patches(images, keep, 4))[0], images)
    keep = marks(2, 17, 30, 4, 0.5)
    other = np.where(keep_pixels(keep, 17, 30, 4)[..., None], images, 99).astype(np.uint8)
    assert encode_patches(images, keep, 4) == encode_patches(other, keep, 4)


def test_how_patches_are_laid_out():
    """The data is a picture of patches that any reader of JPEG XL opens.

    Small images: one line, every second row of patches mirrored and from its end, or the same by
    columns. Others: lines of patches in reading order.
    """
    image = pictures(1, 12, 8)
    patches = {
        (y, x): image[0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] for y in (0, 1, 2) for x in (0, 1)
    }
    keep = np.array([[True, True, True, True, True, False]])
    made = jpegxl_decode(encode_patches(image, keep, 4)[0]["data"])
    by_rows = [patches[0, 0], patches[0, 1], patches[1, 1][:, ::-1], patches[1, 0][:, ::-1]]
    by_rows = np.concatenate([*by_rows, patches[2, 0]], axis=1)
    by_columns = [patches[0, 0], patches[1, 0], patches[2, 0], patches[1, 1][::-1]]
    by_columns = np.concatenate([*by_columns, patches[0, 1][::-1]], axis=0)
    assert np.array_equal(made, by_rows) or np.array_equal(made, by_columns)

    image = pictures(1, 120, 80)
    patch = {k: image[0, 40 * (k // 2) :, 40 * (k % 2) :][:40, :40] for k in range(6)}
    made = jpegxl_decode(encode_patches(image, keep, 40)[0]["data"])
    patch[5] = np.zeros_like(patch[0])  # fills the last line
    lines = [(0, 1), (2, 3), (4, 5)]
    wanted = [np.concatenate([patch[k] for k in line], axis=1) for line in lines]
    np.testing.assert_array_equal(made, np.concatenate(wanted))


def test_fewer_bytes_than_the_whole_as_lossless_webp(real_data):
    """The measure of docs/images.md on a few images; eval/patch_bytes.py has all of them."""
    parquet = pytest.importorskip("pyarrow.parquet")
    cases = [
        ("cifar10/train-00000-of-00005.parquet", "img", 40, 4, "exact", 0.76),
        ("flickr8k_1k.parquet", "image", 4, 16, "exact", 0.80),
        ("flickr8k_1k.parquet", "image", 4, 16, "exact-small", 0.75),
    ]
    for name, column, n, size, coding, most in cases:
        rows = parquet.read_table(real_data / name, columns=[column])[column][:n].to_pylist()
        stored = whole = 0
        for k, row in enumerate(rows):
            image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
            file = io.BytesIO()
            image.save(file, "WEBP", lossless=True, quality=100)
            whole += len(file.getvalue())
            keep = marks(1, image.height, image.width, size, seed=k)
            record = encode_patches(np.asarray(image)[None], keep, size, coding)[0]
            stored += len(record["data"]) + len(record["mask"])
        assert stored <= most * whole, (name, coding, stored / whole)


@pytest.mark.parametrize("channels", [1, 3])
def test_webp_is_close(channels):
    images = pictures(2, 48, 32, channels) // 2
    keep = marks(2, 48, 32, 16)
    records = encode_patches(images, keep, 16, "webp", 90)
    decoded, _ = decode_patches(records)
    is_kept = keep_pixels(keep, 48, 32, 16)
    error = decoded[is_kept].astype(float) - images[is_kept]
    assert np.sqrt((error**2).mean()) < 12
    assert not decoded[~is_kept].any()
    assert Image.open(io.BytesIO(records[0]["data"])).size == (32, 48)


def test_smooth_filling_keeps_what_is_kept_and_stays_within_it():
    images = pictures(2, 21, 34)
    is_kept = keep_pixels(marks(2, 21, 34, 4, 0.5), 21, 34, 4)
    smooth = fill_smoothly(images, is_kept)
    np.testing.assert_array_equal(smooth[is_kept], images[is_kept])
    for image, filled, kept in zip(images, smooth, is_kept, strict=True):
        assert filled[~kept].min() >= image[kept].min()
        assert filled[~kept].max() <= image[kept].max()
    flat = np.full((1, 9, 9, 3), 77, dtype=np.uint8)
    holes = np.ones((1, 9, 9), dtype=bool)
    holes[0, 2:6, 3:9] = False
    assert (fill_smoothly(flat * holes[..., None], holes) == 77).all()


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_masks_are_one_bit_a_patch(bits):
    keep = np.array(bits)
    packed = pack_mask(keep)
    assert len(packed) == -(-len(bits) // 8)
    np.testing.assert_array_equal(unpack_mask(packed, len(bits)), keep)


def test_ties_drop_the_lower_patch_and_one_patch_stays():
    keep = drop_lowest(np.array([[1.0, 0.0, 0.0, 0.0]]), 2)
    assert keep.tolist() == [[True, False, False, True]]
    assert count_dropped(64, 0.25) == 16
    assert count_dropped(1, 0.9) == 0
    assert count_dropped(3, 0.99) == 2


def store(records):
    feature = {name: Value(kind) for name, kind in FIELDS.items()}
    rows = {"img": records, "id": list(range(len(records)))}
    return Dataset.from_dict(rows, features=Features({"img": feature, "id": Value("int64")}))


def test_a_store_of_many_shapes_is_restored_row_by_row(tmp_path):
    records, wanted = [], []
    for k, (height, width, channels) in enumerate(
        [(16, 16, 3), (9, 20, 1), (16, 16, 3), (5, 4, 3)]
    ):
        images = pictures(1, height, width, channels, k)
        records += encode_patches(images, marks(1, height, width, 4, 0.3, k), 4)
        wanted.append(images[0])
    file = io.BytesIO()
    Image.fromarray(wanted[0]).save(file, "PNG")
    original = Record(
        coding="original",
        height=0,
        width=0,
        channels=0,
        patch_size=0,
        mask=b"",
        data=file.getvalue(),
    )
    broken = Record(**{**original, "data": b"no image"})
    store([*records, original, broken, None]).to_parquet(tmp_path / "store.parquet")
    loaded = Dataset.from_parquet(str(tmp_path / "store.parquet"))
    whole = restore(loaded, fill="zero")
    images = whole[:]["img"]
    for record, image, want in zip(records, images, wanted, strict=False):
        n_patches = int(np.prod(grid_shape(record["height"], record["width"], 4)))
        keep = unpack_mask(record["mask"], n_patches)[None]
        is_kept = keep_pixels(keep, record["height"], record["width"], 4)[0]
        got = np.asarray(image).reshape(want.shape)
        np.testing.assert_array_equal(got, np.where(is_kept[..., None], want, 0))
    np.testing.assert_array_equal(np.asarray(images[4]), wanted[0])
    assert images[5] is None
    assert images[6] is None
    for k in range(7):
        alone = whole[k]["img"]
        assert (alone is None) == (images[k] is None)
        assert alone is None or np.array_equal(np.asarray(alone), np.asarray(images[k]))
    shuffled = restore(loaded.select([3, 0]), fill="mean")
    assert [image.size for image in shuffled[:]["img"]] == [(4, 5), (16, 16)]
    assert shuffled[:]["id"] == [3, 0]


def test_what_restore_refuses():
    plain = Dataset.from_dict({"x": [1]})
    with pytest.raises(InputError, match="no column of patch records among x"):
        restore(plain)
    images = pictures(1, 8, 8)
    records = encode_patches(images, marks(1, 8, 8, 4), 4)
    with pytest.raises(InputError, match="fill must be one of mean, zero, mae"):
        restore(store(records), fill="magic")
    with pytest.raises(InputError, match="fill mae needs a mae_model"):
        restore(store(records), fill="mae")
    old = Record(**{**records[0], "coding": "exact"})
    with pytest.raises(InputError, match=r"by dq-multimodal 0\.1, .* or compress the source again"):
        restore(store([records[0], old]))[:]


BIG = encode_patches(pictures(1, 200, 150), marks(1, 200, 150, 16), 16)[0]["data"]


@pytest.mark.parametrize("side", [8, 80])
@pytest.mark.parametrize(
    "change",
    [
        {"data": lambda data: data[:-3]},
        {"data": lambda data: b""},
        {"data": lambda data: b"no picture"},
        {"data": lambda data: BIG},
        {"mask": lambda mask: b"\0" * len(mask)},
        {"mask": lambda mask: b"\x80" + b"\0" * (len(mask) - 1)},
        {"patch_size": lambda size: 0},
        {"patch_size": lambda size: 2 * size},
        {"channels": lambda n: 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_damage_is_told_in_one_line(side, change):
    record = encode_patches(pictures(1, side, side), marks(1, side, side, 4), 4)[0]
    damaged = Record(**{**record, **{name: f(record[name]) for name, f in change.items()}})
    with pytest.raises(InputError, match=r"^a record of the patch store is broken: .*$"):
        decode_patches([damaged])


HUGE = {"height": 10_000, "width": 10_000, "patch_size": 1024, "mask": b"\xff" * 13}
OTHER = {"height": 96, "mask": b"\xff" * 4}


@pytest.mark.parametrize(("coding", "change"), [("exact", HUGE), ("webp", HUGE), ("webp", OTHER)])
def test_records_of_wrong_sizes_are_refused_before_they_are_decoded(coding, change, monkeypatch):
    record = encode_patches(pictures(1, 80, 80), np.ones((1, 25), bool), 16, coding)[0]
    for name in ("PIL.Image.Image.convert", "dq_multimodal.patches.codec.jpegxl_decode"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(InputError, match="record of the patch store is broken"):
        decode_patches([Record(**{**record, **change})])


def test_rows_stay_themselves_after_selecting_and_in_another_process():
    images = pictures(12, 9, 9)
    rows = store(encode_patches(images, marks(12, 9, 9, 4), 4))
    wanted = [np.asarray(image) for image in restore(rows)[:]["img"]]
    for made in (
        restore(rows.shuffle(seed=3)),
        restore(rows).shuffle(seed=3),
        restore(rows).select(range(5, 12)),
        restore(rows).filter(lambda number: number % 2 == 0, input_columns="id"),
        pickle.loads(pickle.dumps(restore(rows))),
    ):
        assert len(made) >= 6
        for row in made:
            np.testing.assert_array_equal(np.asarray(row["img"]), wanted[row["id"]])
    assert restore(rows)._fingerprint == restore(rows)._fingerprint
