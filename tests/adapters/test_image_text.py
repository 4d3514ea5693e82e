"""Rows with images and text: which columns are read, and what becomes of both halves."""

import io

import numpy as np
import pytest
from datasets import Image, List, Translation, Value
from image_text_rows import BROKEN, ONE, SHAPES, make, picture
from PIL import Image as Pictures

from dq_multimodal import InputError
from dq_multimodal.adapters.choice import choose_adapter, find_modality
from dq_multimodal.adapters.image_text import ImageTextAdapter, join_halves, raise_threshold
from dq_multimodal.adapters.text import may_say
from dq_multimodal.config import CompressConfig
from dq_multimodal.core import Scores
from dq_multimodal.core.importance import normalise, sum_scores
from dq_multimodal.data.pixels import NO_IMAGE, UNREADABLE
from dq_multimodal.models.image_text import shrink


def choose(rows, models=None, **options):
    options = {"method": "dq", "embedding_model": models, **options}
    return choose_adapter(rows, CompressConfig(dataset="x", **options))


@pytest.fixture
def models(small_classifier, small_encoder):
    return f"{small_classifier},{small_encoder}"


def embed(adapter, rows):
    batch, problems = adapter.load(np.asarray(rows))
    return adapter.embed(batch).embedding, problems


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, models):
    columns, kinds, wanted, texts = SHAPES[shape]
    rows = make(columns, **kinds)
    adapter = choose(rows, models)
    assert isinstance(adapter, ImageTextAdapter)
    facts = adapter.describe()
    assert facts["modality"] == "image-text"
    assert facts["columns"] == wanted
    assert facts["image_columns"] == [
        n for n in kinds if n not in wanted or shape == "images inside"
    ]
    assert adapter.text.texts(np.arange(2)) == texts
    assert not adapter.problems
    got, problems = embed(adapter, [0, 1])
    assert not problems
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_the_cosine_is_the_mean_of_both_cosines():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(6, 5)).astype("f4"), rng.normal(size=(6, 3)).astype("f4")
    image[1] = text[2] = image[3] = text[3] = 0
    got = join_halves(image, text, 0.2)
    assert got.dtype == np.float32
    for i in range(6):
        for j in range(6):
            parts = []
            for half in (image, text):
                norms = np.linalg.norm(half[i]) * np.linalg.norm(half[j])
                parts.append(half[i] @ half[j] / norms if norms else 0)
            assert got[i] @ got[j] == pytest.approx(0.8 * parts[0] + 0.2 * parts[1], abs=1e-6)
    assert not got[3].any()


def test_each_half_is_what_its_model_makes_of_it(models, small_classifier, small_encoder):
    rows = make({"image": ONE, "question": ["what", "a fox"]}, image=Image())
    got, _ = embed(choose(rows, models, text_share=0.25), [0, 1])
    image, _ = embed(choose(rows, str(small_classifier), modality="image"), [0, 1])
    only = {"modality": "text", "text_columns": ("question",)}
    text, _ = embed(choose(rows, str(small_encoder), **only), [0, 1])
    size = image.shape[1]
    unit = image / np.linalg.norm(image, axis=1, keepdims=True)
    np.testing.assert_allclose(got[:, :size], np.sqrt(0.75) * unit, atol=1e-6)
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    np.testing.assert_allclose(got[:, size:], np.sqrt(0.25) * unit, atol=1e-6)


def test_a_missing_half_is_zeros_and_several_images_are_their_mean(models, small_classifier):
    images = [
        [picture(0)],
        [],
        None,
        [picture(0), BROKEN, picture(1)],
        [BROKEN],
        [None, picture(0)],
    ]
    texts = ["a", "a", "", "a", "a", " \t"]
    rows = make({"images": images, "text": texts}, images=List(Image()))
    adapter = choose(rows, models)
    got, problems = embed(adapter, range(6))
    assert problems == {NO_IMAGE: [1, 2], UNREADABLE: [3, 4]}
    adapter.lengths()
    assert adapter.problems["no text at all"] == [2, 5]
    size = adapter.image.dimension
    has_image, has_text = got[:, :size].any(axis=1), got[:, size:].any(axis=1)
    assert has_image.tolist() == [True, False, False, True, False, True]
    assert has_text.tolist() == [True, True, False, True, True, False]
    single = choose(make({"image": [picture(0), picture(1)]}, image=Image()), str(small_classifier))
    mean = embed(single, [0, 1])[0].mean(axis=0)
    np.testing.assert_allclose(got[3, :size], np.sqrt(0.5) * mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(got[0, :size], got[5, :size], atol=1e-6)


def test_a_picture_of_several_rows_of_a_batch_is_embedded_once(models, monkeypatch):
    files = [[picture(0)], [picture(1), picture(0)], [BROKEN], [picture(0), BROKEN], [picture(0)]]
    rows = make({"images": files, "text": [*"abcde"]}, images=List(Image()))
    adapter = choose(rows, models, method="adq")
    alone = [embed(adapter, [k]) for k in range(5)]
    (images, _), _ = adapter.load(np.arange(5))
    assert len(images[0]) == 2
    assert images[1].tolist() == [[0, 0], [1, 1], [0, 1], [0, 3], [0, 4]]
    got, problems = embed(adapter, range(5))
    np.testing.assert_allclose(got, np.concatenate([part for part, _ in alone]), atol=1e-5)
    assert problems == {UNREADABLE: [2, 3]}
    textures = [adapter.embed(adapter.load(np.array([k]))[0]).texture for k in range(5)]
    made = adapter.embed(adapter.load(np.arange(5))[0])
    np.testing.assert_allclose(made.texture, np.concatenate(textures), rtol=1e-4)
    views = adapter.load(np.arange(5), 3)[0][0]
    assert len(views[0]) == 5, "each row has a view of its own"


def test_rows_of_few_lengths_stay_in_their_order(models):
    texts = ["a" * n for n in (24, 31, 25, 0, 40, 30, 24)]
    rows = make({"image": [picture(0)] * 7, "text": texts}, image=Image())
    lengths = choose(rows, models).lengths()
    assert (lengths >= 1).all()
    assert lengths[4] > lengths[0] > lengths[3]
    assert len({*lengths[[0, 2, 5, 6]]}) == 1
    assert all(n <= m <= 1.5 * n + 1 for n, m in zip(map(len, texts), lengths, strict=True))


def test_what_the_rows_are_read_as():
    both = make({"image": ONE, "question": ["a", "b"]}, image=Image())
    named = make({"image": ONE, "file_name": ["a", "b"], "label": ["x", "y"]}, image=Image())
    words = make({"text": ["a", "b"]})

    def read(rows, **options):
        return find_modality(rows, CompressConfig(dataset="x", method="dq", **options))

    assert read(both) == read(both, text_columns=("question",)) == "image-text"
    assert read(both, image_column="image") == "image-text"
    assert read(both, image_embedding="gradients") == read(both, modality="image") == "image"
    assert read(both, label_column="question") == "image"
    assert read(named) == "image"
    assert read(named, text_columns=("label",)) == "image-text"
    assert read(words) == read(both, modality="text") == "text"


@pytest.mark.parametrize(
    ("models", "options", "wanted"),
    [
        ("a,b,c", {}, "embedding_model must be one model or IMAGE_MODEL,TEXT_MODEL for image-text"),
        ("a,", {}, "embedding_model must be one model or IMAGE_MODEL,TEXT_MODEL"),
        ("a,b", {"modality": "image"}, "embedding_model must be one model for image rows, got a,b"),
        ("a", {"modality": "image", "text_share": 0.5}, "text_share is for images with text"),
        ("a", {"text_columns": ("no",)}, "no column no"),
        (None, {"image_column": "question"}, "the image column question must hold images"),
    ],
)
def test_what_cannot_be(models, options, wanted):
    rows = make({"image": ONE, "question": ["a", "b"]}, image=Image())
    with pytest.raises(InputError, match=wanted):
        choose(rows, models, **options)


def test_one_model_has_to_read_both(small_encoder):
    rows = make({"image": ONE, "question": ["a", "b"]}, image=Image())
    with pytest.raises(InputError, match="reads no images beside text: name IMAGE_MODEL,TEXT"):
        choose(rows, str(small_encoder)).describe_model()


def test_a_clip_reads_both_apart(small_clip):
    from sentence_transformers import SentenceTransformer

    rows = make({"image": [*ONE, None], "question": ["what", "shape", "is"]}, image=Image())
    adapter = choose(rows, str(small_clip))
    got, problems = embed(adapter, [0, 1, 2])
    assert problems == {NO_IMAGE: [2]}
    model = SentenceTransformer(str(small_clip))
    images = model.encode([{"image": Pictures.open(io.BytesIO(v["bytes"]))} for v in ONE])
    texts = model.encode(["what", "shape", "is"])
    wanted = join_halves(np.concatenate([images, 0 * images[:1]]), texts, 0.5)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    found = adapter.describe_model()
    assert found["dimension"] == 48
    assert found["image"]["model"] == found["text"]["model"] == str(small_clip)


def test_a_text_that_is_an_address_stays_a_text(small_clip, tmp_path):
    Pictures.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    place = str(tmp_path / "a.png")
    rows = make({"image": [None] * 3, "text": [place, place + " ", "x"]}, image=Image())
    got, _ = embed(choose(rows, str(small_clip)), [0, 1, 2])
    np.testing.assert_allclose(got[0], got[1], atol=1e-6)
    texts = choose(rows, str(small_clip), modality="text")
    np.testing.assert_allclose(embed(texts, [0])[0], embed(texts, [1])[0], atol=1e-5)


def test_a_model_may_read_rows_whole(small_joint):
    from sentence_transformers import SentenceTransformer

    images = [[picture(0)], [], [picture(1), picture(2)], [picture(3)], []]
    texts = ["what", "no picture", "<image>two<image_2>", "", ""]
    rows = make({"images": images, "text": texts}, images=List(Image()))
    adapter = choose(rows, str(small_joint))
    got, problems = embed(adapter, range(5))
    assert problems == {NO_IMAGE: [1, 4]}
    opened = [[Pictures.open(io.BytesIO(v["bytes"])) for v in row] for row in images]
    inputs = [
        {"image": opened[0], "text": "what"},
        {"text": "no picture"},
        {"image": opened[2], "text": "two"},
        {"image": opened[3]},
    ]
    wanted = SentenceTransformer(str(small_joint)).encode(inputs)
    np.testing.assert_allclose(got[:4], wanted, atol=1e-5)
    assert not got[4].any()
    assert adapter.describe_model()["model"] == str(small_joint)
    assert "text_share" not in adapter.describe_model()


def test_tokens_of_images_in_a_text_break_nothing(small_joint):
    texts = ["a <|image_pad|> b", "a   b"]
    rows = make({"image": [picture(0)] * 2, "text": texts}, image=Image())
    got, _ = embed(choose(rows, str(small_joint)), [0, 1])
    np.testing.assert_allclose(got[0], got[1], atol=1e-6)
    assert got.any(axis=1).all()


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_thin_pictures_stop_no_model(small_joint, small_clip, size):
    rows = make({"image": [picture(0, size), picture(1)], "text": ["a", "b"]}, image=Image())
    for model in (small_joint, small_clip):
        got, problems = embed(choose(rows, str(model)), [0, 1])
        assert got.any(axis=1).all() and not problems


def test_large_and_thin_pictures_are_made_smaller():
    assert shrink(Pictures.new("RGB", (3000, 1000))).shape == (500, 1500, 3)
    assert shrink(Pictures.new("RGB", (7, 900))).shape == (700, 7, 3)
    assert shrink(Pictures.new("RGB", (1024, 1024))).shape == (1024, 1024, 3)
    edges = np.zeros((1, 300, 3), dtype=np.uint8)
    edges[0, 100:200] = 255
    assert (shrink(Pictures.fromarray(edges)) == 255).all()


def test_names_that_say_nothing():
    says = ("question", "captions", "multiple_choice_answer", "raw", "user", "hint")
    names = ("questionId", "question_types", "doc_no", "sentids", "imgPath", "image_classes")
    assert all(map(may_say, says))
    assert not any(map(may_say, names))


def test_of_structs_only_what_is_said_is_read(models):
    kind = {"raw": Value("string"), "sentid": Value("int64"), "source": Value("string")}
    columns = {"image": ONE, "sentences": [[{"raw": "a dog", "sentid": 7, "source": "x"}]] * 2}
    columns |= {"query": [{"en": "a", "de": "b"}] * 2}
    translated = Translation(languages=["en", "de"])
    rows = make(columns, image=Image(), sentences=List(kind), query=translated)
    adapter = choose(rows, models)
    assert adapter.text.texts(np.arange(2)) == ["a dog b a"] * 2  # languages are sorted


@pytest.mark.parametrize("kind", [Image(decode=False), Image()])
def test_images_in_turns_are_found_however_they_are_decoded(models, kind):
    columns, kinds, _, _ = SHAPES["images inside"]
    parts = {"type": Value("string"), "text": Value("string"), "image": kind}
    rows = make(columns, messages=List({"role": Value("string"), "content": List(parts)}))
    assert choose(rows, models).describe()["image_columns"] == ["messages"] == [*kinds]
    assert len(choose(rows, models).image.files([1])[0]) == 2
    nested = {"images": [[[value] for value in ONE]] * 2, "text": ["a", "b"]}
    adapter = choose(make(nested, images=List(List(Image()))), models)
    assert len(adapter.image.files([0])[0]) == 2


def test_images_that_are_not_read_are_said(models):
    kinds = {"image": Image(), "regions": {"mask": Image(), "cap": Value("string")}}
    columns = {"image": ONE, "text": ["a", "b"], "regions": [{"mask": v, "cap": "c"} for v in ONE]}
    notes = choose(make(columns, **kinds), models).notes
    assert "images are not read where they lie in regions" in notes


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("{text},{image}", "two models are IMAGE_MODEL,TEXT_MODEL"),
        ("{joint},{text}", "cannot load the model"),
        ("~nobody/a", "model"),
        ("{image}, {text}", None),
    ],
)
def test_models_that_do_not_fit(names, wanted, small_classifier, small_encoder, small_joint):
    places = {"image": small_classifier, "text": small_encoder, "joint": small_joint}
    rows = make({"image": ONE, "text": ["a", "b"]}, image=Image())
    adapter = choose(rows, names.format(**places))
    if wanted is None:
        assert adapter.describe_model()["dimension"] > 0
        return
    with pytest.raises(InputError, match=wanted) as caught:
        adapter.describe_model()
    assert "\n" not in str(caught.value)


def test_a_joint_model_of_text_has_no_scores_for_adq(small_classifier, small_joint):
    rows = make({"image": ONE, "text": ["a", "b"]}, image=Image())
    adapter = choose(rows, f"{small_classifier},{small_joint}", method="adq")
    with pytest.raises(InputError, match="the scores of adq need token vectors"):
        adapter.embed(adapter.load(np.arange(2))[0])


@pytest.mark.parametrize("share", [0.5, 0.2, 0.9])
def test_the_raised_threshold_makes_both_halves_near(share):
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(300, 3)).astype("f4") for _ in range(2))
    whole = join_halves(image, text, share)
    near = whole @ whole.T >= raise_threshold(0.6, share)
    assert 300 < near.sum() < 90_000
    for half in (image, text):
        unit = half / np.linalg.norm(half, axis=1, keepdims=True)
        assert ((unit @ unit.T)[near] >= 0.6 - 1e-5).all()
    assert raise_threshold(0.6, None) == 0.6


def test_what_one_model_cannot_do(small_joint):
    rows = make({"image": ONE, "text": ["a", "b"]}, image=Image())
    with pytest.raises(InputError, match="text_share is for two halves"):
        choose(rows, str(small_joint), text_share=0.5).describe_model()
    with pytest.raises(InputError, match="adq scores images and text apart"):
        choose(rows, str(small_joint), method="adq").describe_model()


def test_scores_are_the_sum_of_both_halves():
    image = Scores(np.array([0.1, 0.3, 0.2]), np.array([-5.0, -4.0, np.nan]))
    text = Scores(np.array([20.0, 10.0, 30.0]), np.array([-1.0, -3.0, -2.0]))
    got = sum_scores([image, text], "minmax")
    np.testing.assert_allclose(got.representativeness, [0.5, 1.0, 1.5])
    np.testing.assert_allclose(got.diversity, [1.0, 1.0, 0.5 + 0.5])
    z = sum_scores([image, text], "softmax-z").representativeness
    wanted = sum(normalise(s.representativeness, "softmax-z") for s in (image, text))
    np.testing.assert_allclose(z, wanted)
    assert sum_scores([text]) is text


def test_contents_are_text_and_files(models):
    rows = make({"image": [*ONE, None], "text": ["a  b", "", " "]}, image=Image())
    got = [*choose(rows, models).contents(np.arange(3))]
    assert got == [b"a b\0" + ONE[0]["bytes"], b"\0" + ONE[1]["bytes"], b""]
