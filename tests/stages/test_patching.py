"""Patch records of a run, block by block."""

import numpy as np
import pandas as pd
import pytest
from nasty_images import picture, save

from dq_multimodal.data.pixels import count_pixels
from dq_multimodal.stages import patching
from dq_multimodal.stages.patching import TOO_LARGE


def test_pixels_are_counted_by_the_header():
    assert count_pixels(save(picture((30, 20)))) == 600
    assert count_pixels(save(picture((30, 20)))[:60]) == 600
    assert count_pixels(b"no image") == count_pixels(None) == 0


def test_an_image_too_large_for_the_coder_is_not_decoded(monkeypatch):
    monkeypatch.setattr(patching, "LARGEST_PIXELS", 100)
    assert patching._decode(save(picture((11, 10)))) == (None, [TOO_LARGE])
    image, odd = patching._decode(save(picture((10, 10))))
    assert image.size == (10, 10)
    assert odd == []


@pytest.mark.parametrize(
    ("values", "mean", "lowest"), [([10.0, 20.0, np.inf, None], 15.0, 10.0), ([None], None, None)]
)
def test_images_without_loss_are_in_no_mean_of_the_psnr(values, mean, lowest):
    found = patching._mean_and_lowest(pd.Series(values, dtype=object))
    assert found == {"mean": mean, "lowest": lowest}
