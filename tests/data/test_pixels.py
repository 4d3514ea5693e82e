"""Images of every nasty kind become upright 8-bit RGB, or are named."""

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_images import nasty_images, picture, save
from PIL import Image

from dq_multimodal.data.pixels import BLANK, decode_image, read_bytes, to_square, undecoded

NASTY = nasty_images()


@pytest.mark.parametrize("name", NASTY)
def test_every_kind_is_converted_or_named(name):
    data, wanted = NASTY[name]
    image, odd = decode_image(data)
    if wanted is None:
        assert odd[0] in BLANK
    else:
        assert odd == wanted
    assert (image is None) == bool(set(odd) & set(BLANK))
    if image is not None:
        assert image.mode == "RGB"
        assert image.size == ((14, 20) if name == "rotated" else (20, 14))


@pytest.mark.parametrize("name", ["grey", "16 bit", "32 bit", "float", "opaque alpha", "plain"])
def test_values_are_kept(name):
    image, _ = decode_image(NASTY[name][0])
    original = picture()
    if name in ("grey", "16 bit", "float"):
        original = original.convert("L").convert("RGB")
    elif name == "32 bit":
        grey = np.asarray(original.convert("L")).astype(np.float64) * 200 * 255 / 65535
        original = Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(original))


def test_a_rotation_tag_turns_the_picture():
    upright = picture((30, 10))
    exif = Image.Exif()
    exif[0x0112] = 3
    image, _ = decode_image(save(upright, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(upright)[::-1, ::-1])


def test_what_shines_through_is_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image, _ = decode_image(save(clear))
    assert np.asarray(image).min() == 255


KINDS = ["PNG", "JPEG", "WEBP", "GIF", "AVIF", "TIFF", "DDS", "SPIDER", "BMP"]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 400), st.sampled_from(KINDS))
def test_damage_never_crashes(garbage, place, kind):
    data = save(picture().convert("F") if kind == "SPIDER" else picture(), kind)
    place = min(place, len(data))
    image, odd = decode_image(data[:place] + garbage + data[place + len(garbage) :])
    assert image is not None or odd[0] in BLANK


def test_a_missing_file_is_empty_and_a_missing_value_none(tmp_path):
    assert read_bytes(None) is None
    assert read_bytes({"bytes": None, "path": None}) is None
    assert read_bytes({"bytes": None, "path": str(tmp_path / "gone.png")}) == b""
    path = tmp_path / "x.png"
    path.write_bytes(b"abc")
    assert read_bytes({"bytes": None, "path": str(path)}) == b"abc"
    assert read_bytes({"bytes": b"xy", "path": "gone.png"}) == b"xy"


def test_square_is_the_centre():
    image = Image.fromarray(np.full((10, 30, 3), np.arange(30)[:, None], dtype=np.uint8))
    np.testing.assert_array_equal(to_square(image, 10)[0, :, 0], np.arange(10, 20))
    assert to_square(image, 4, crop=0.5).shape == (4, 4, 3)
    assert to_square(picture((3, 3)), 8).shape == (8, 8, 3)
    right = picture((16, 16))  # of the right size, and so untouched
    np.testing.assert_array_equal(to_square(right, 16), np.asarray(right))


@pytest.mark.parametrize("is_plain", [False, True])
def test_files_are_given_as_they_are_and_not_copied(tmp_path, is_plain):
    kind = {"bytes": Value("binary"), "path": Value("string")} if is_plain else datasets.Image()
    files = [{"bytes": bytes([k]) * 1000, "path": f"{k}.png"} for k in range(8)]
    columns = {"a": files, "b": [[], *([file, file] for file in files[1:])], "n": list(range(8))}
    features = Features({"a": kind, "b": List(kind), "n": Value("int64")})
    Dataset.from_dict(columns, features).save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")
    found = undecoded(rows.select([5, 0, 3]), "b", "a")
    assert found.column_names == ["b", "a"]
    assert found["a"][:] == [files[k] for k in (5, 0, 3)]
    assert found["b"][:] == [[files[5]] * 2, [], [files[3]] * 2]
    assert len(list(tmp_path.rglob("*.arrow"))) == 1
    addresses = [
        {b.address for c in table.column("b").chunks for b in c.buffers() if b}
        for table in (rows.data, found.data)
    ]
    assert addresses[0] == addresses[1]
    assert found._fingerprint == undecoded(rows.select([5, 0, 3]), "b", "a")._fingerprint
