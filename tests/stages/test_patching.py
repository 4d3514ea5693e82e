"""Patch records of a run, block by block."""

from hypothesis import given
from hypothesis import strategies as st
from nasty_images import picture, save

from dq_multimodal.data.pixels import count_pixels
from dq_multimodal.stages import patching
from dq_multimodal.stages.patching import STEP_PIXELS, TOO_LARGE


@given(st.lists(st.integers(0, 3 * STEP_PIXELS), min_size=1, max_size=50))
def test_steps_hold_few_pixels_or_one_image(sizes):
    steps = patching._steps(sizes)
    assert [k for first, last in steps for k in range(first, last)] == list(range(len(sizes)))
    assert all(last - first == 1 or sum(sizes[first:last]) <= STEP_PIXELS for first, last in steps)


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
