"""What every adapter has to keep, whatever kind of data it reads."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image
from PIL import Image as Pictures

from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.adapters.image_text import ImageTextAdapter
from dq_multimodal.adapters.text import TextAdapter, detect_layout

N_ROWS = 50


@pytest.fixture(params=["text", "image", "gradients", "pair", "clip", "joint"])
def adapter(request, small_encoder, small_classifier, small_clip, small_joint):
    texts = ["the quick fox " * (k % 7) for k in range(N_ROWS)]
    if request.param == "text":
        rows = Dataset.from_dict({"text": texts})
        return TextAdapter(rows, detect_layout(["text"]), str(small_encoder))
    rng = np.random.default_rng(0)
    images = [
        Pictures.fromarray(rng.integers(0, 256, (8 + k % 5, 12, 3), dtype=np.uint8))
        for k in range(N_ROWS)
    ]
    rows = Dataset.from_dict({"img": images}, features=Features({"img": Image()}))
    kind = "gradients" if request.param == "gradients" else "features"
    if request.param in ("image", "gradients"):
        return ImageAdapter(rows, ["img"], None, str(small_classifier), kind)
    one = {"clip": (small_clip, small_clip), "joint": (small_joint, small_joint)}
    image, text = one.get(request.param, (small_classifier, small_encoder))
    rows = rows.add_column("text", texts)
    return ImageTextAdapter(
        rows,
        ImageAdapter(rows, ["img"], None, str(image)),
        TextAdapter(rows, detect_layout(["text"]), str(text), has_images=True),
        None,
    )


def score(adapter):
    """Have the adapter give what the scores need, where its model can."""
    halves = [getattr(adapter, name) for name in ("image", "text") if hasattr(adapter, name)]
    if getattr(adapter, "is_joint", False):
        pytest.skip("adq refuses a model that joins images and text")
    for part in (adapter, *halves):
        part.is_scored = True


def embed(adapter, rows):
    return adapter.embed(adapter.load(np.asarray(rows))[0]).embedding


def test_lengths_are_whole_numbers_one_a_row(adapter):
    lengths = adapter.lengths()
    assert lengths.shape == (N_ROWS,)
    assert np.issubdtype(lengths.dtype, np.integer)


def test_embeddings_are_finite_repeatable_and_of_one_row_each(adapter):
    got = embed(adapter, [3, 1, 49])
    assert got.shape == (3, adapter.dimension)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, embed(adapter, [3, 1, 49]))
    np.testing.assert_allclose(got[1], embed(adapter, [1])[0], atol=1e-5)


def test_it_says_what_it_reads_and_by_which_model(adapter):
    facts = {**adapter.describe(), **adapter.describe_model()}
    assert facts["modality"] in ("text", "image", "image-text")
    assert facts["dimension"] == adapter.dimension
    assert facts["columns"]
    assert "model" in facts or (facts["image"]["model"] and facts["text"]["model"])


def test_loading_finds_the_same_problems_again(adapter):
    first, second = (adapter.load(np.arange(N_ROWS))[1] for _ in range(2))
    assert first == second


def test_scores_cost_nothing_of_the_embeddings(adapter):
    plain = embed(adapter, [3, 1, 49])
    score(adapter)
    looks = adapter.embed(adapter.load(np.array([3, 1, 49]))[0])
    np.testing.assert_array_equal(looks.embedding, plain)
    assert looks.middle.shape == (3, adapter.middle_dimension)
    assert adapter.middle_dimension > 0
    assert looks.texture.shape == (3, 2 * len(adapter.parts))
    assert np.isfinite(looks.texture).all() and (looks.texture >= 0).all()
    alone = adapter.embed(adapter.load(np.array([1]))[0])
    np.testing.assert_allclose(looks.middle[1], alone.middle[0], atol=1e-5)
    np.testing.assert_allclose(looks.texture[1], alone.texture[0], rtol=1e-4)


def test_views_are_seeded_and_differ_from_their_rows(adapter):
    score(adapter)
    rows = np.array([3, 1, 49])

    def view(seed, rows=rows):
        return adapter.embed(adapter.load(np.asarray(rows), seed)[0]).embedding

    np.testing.assert_array_equal(view(5), view(5))
    np.testing.assert_allclose(view(5)[1], view(5, [1])[0], atol=1e-5)
    assert not np.array_equal(view(5), embed(adapter, rows))
    assert not np.array_equal(view(5), view(6))
