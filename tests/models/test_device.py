"""Where models run, and in which numbers."""

import numpy as np
import pytest

from dq_multimodal import InputError
from dq_multimodal.models.image import load_image_model
from dq_multimodal.models.text import load_encoder


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_numbers_of_the_encoder(small_encoder, small_classifier, dtype):
    texts, pixels = ["the quick fox"], np.full((1, 16, 16, 3), 99, dtype=np.uint8)
    encoder = load_encoder(str(small_encoder), "cpu", dtype)
    model = load_image_model(str(small_classifier), "cpu", dtype)
    wanted = "float32" if dtype == "auto" else dtype
    assert encoder.describe()["dtype"] == model.describe()["dtype"] == wanted
    plain = load_encoder(str(small_encoder)).encode(texts), *model_of(small_classifier, pixels)
    found = encoder.encode(texts), *model.look(pixels)[:2]
    for is_like, exact in zip(found, plain, strict=True):
        assert is_like.dtype == np.float32
        np.testing.assert_allclose(is_like, exact, atol=0.05)
        assert np.array_equal(is_like, exact) == (wanted == "float32")


def model_of(folder, pixels):
    return load_image_model(str(folder)).look(pixels)[:2]


def test_a_device_that_is_not_there_is_one_clear_line(small_encoder, small_classifier):
    for load, place in ((load_encoder, small_encoder), (load_image_model, small_classifier)):
        with pytest.raises(InputError, match=r"^no device gpu: .+"):
            load(str(place), "gpu")
