"""The real set, read from a dataset."""

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures

from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.pictures import read_real
from dq_multimodal.condensation.pipeline import note_rows
from dq_multimodal.config import InputError
from dq_multimodal.data.pixels import ANIMATED, DEEP, TRANSPARENT
from dq_multimodal.data.source import from_memory


def make_dataset(labels, *, is_grey=True, label_type=None, side=8, seed=0, missing=()):
    rng = np.random.default_rng(seed)
    shape = (side, side) if is_grey else (side, side, 3)
    images = [
        None if n in missing else Pictures.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for n in range(len(labels))
    ]
    features = Features({"picture": Image(), "label": label_type or Value("int64")})
    return Dataset.from_dict({"picture": images, "label": labels}, features=features)


def read(dataset, **options):
    return read_real(from_memory(dataset), CondenseConfig("x", **options))


@pytest.mark.parametrize("is_grey", [True, False])
def test_pixels_and_how_they_are_normalised(is_grey):
    dataset = make_dataset([0, 1, 1, 0], is_grey=is_grey)
    real = read(dataset)
    assert real.images.shape == (4, 1 if is_grey else 3, 8, 8) and real.images.dtype == torch.uint8
    for row, image in enumerate(dataset["picture"]):
        wanted = np.asarray(image).reshape(8, 8, -1).transpose(2, 0, 1)
        assert (real.images[row].numpy() == wanted).all()
    values = real.images.double() / 255
    for c in range(real.channels):
        assert float(real.mean[c]) == pytest.approx(float(values[:, c].mean()), abs=1e-6)
        assert float(real.spread[c]) == pytest.approx(
            float(values[:, c].std(correction=0)), abs=1e-6
        )
    found = real.normalise(real.images)
    torch.testing.assert_close(real.to_pixels(found).double(), values, rtol=0, atol=1e-6)


def test_classes_without_pictures_and_rows_without_either_are_left_out():
    names = ClassLabel(names=["ant", "bee", "cow", "dog"])
    dataset = make_dataset([3, 1, None, 3, 1], label_type=names, missing=(4,))
    real = read(dataset)
    assert real.labels == (1, 3) and real.names == ("bee", "dog")
    assert real.classes.tolist() == [1, 0, 1] and real.rows.tolist() == [0, 1, 3]
    assert real.unused == (2, 4)
    assert real.of_class(1).tolist() == [0, 2]


def test_one_colour_picture_makes_all_of_three_channels():
    grey, colour = make_dataset([0, 1]), make_dataset([0, 1], is_grey=False)
    rows = {name: [*grey[name], *colour[name]] for name in grey.column_names}
    assert read(Dataset.from_dict(rows, features=grey.features)).channels == 3


def test_files_of_which_not_all_is_read_are_noted():
    """Grey ones and those with a rotation tag lose nothing."""
    grey, deep = np.full((8, 8), 100, np.uint8), np.full((8, 8), 40_000, np.uint16)
    clear = Pictures.fromarray(np.full((8, 8, 4), 100, np.uint8))
    frames = [Pictures.fromarray(grey + k) for k in range(2)]
    files = []
    for picture, options in (
        *((Pictures.fromarray(each), {}) for each in (grey, deep)),
        (clear, {}),
        (frames[0], {"save_all": True, "append_images": frames[1:]}),
    ):
        picture.save(buffer := io.BytesIO(), "PNG", **options)
        files.append({"bytes": buffer.getvalue()})
    features = Features({"picture": Image(), "label": Value("int64")})
    rows = {"picture": files, "label": [0, 1, 0, 1]}
    source = from_memory(Dataset.from_dict(rows, features=features))
    real = read_real(source, CondenseConfig("x"))
    assert real.reduced == {ANIMATED: [3], TRANSPARENT: [2], DEEP: [1]}
    assert note_rows(real, source)[-1] == (
        "1 row with more than 8 bits a channel, scaled to 8, read as in training: row 1"
    )


def test_sides():
    large = make_dataset([0, 1], side=120)
    assert read(large).side == 64
    assert read(large, image_size=100).side == 100
    assert read(make_dataset([0, 1], side=96)).side == 96
    assert read(make_dataset([0, 1], side=6), image_size=8).side == 8
    with pytest.raises(InputError, match="have 6 px: give --image-size of at least 8"):
        read(make_dataset([0, 1], side=6))


def test_what_cannot_be_condensed_is_one_line():
    text = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(InputError, match=r"^condense makes pictures, .*text"):
        read(text)
    with pytest.raises(InputError, match="condense needs classes"):
        read(make_dataset([0, 1]).remove_columns("label"))
    with pytest.raises(InputError, match="needs two classes, and dataset has pictures of 1"):
        read(make_dataset([2, 2]))
