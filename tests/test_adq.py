"""Adaptive DQ from end to end: its scores, its samples, and what needs no model."""

import io
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from forging import RUN_FILES, change_table
from nasty_images import image_rows, picture, save
from PIL import Image as Pictures

from dq_multimodal import InputError, compress, resample, verify
from dq_multimodal.adapters.base import Part
from dq_multimodal.adapters.image import augment, measure_texture
from dq_multimodal.adapters.text import TextAdapter, detect_layout, drop_spans
from dq_multimodal.core import Scores, adaptive_weights, bin_importance, order_rows
from dq_multimodal.manifest import ScoreFacts
from dq_multimodal.models.text import load_encoder
from dq_multimodal.stages import embedding, scoring
from dq_multimodal.stages.scoring import mean_texture

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    made = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(397)]
    return ["", " ", "dog", *made]


@pytest.fixture(scope="module")
def run(texts, small_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adq")
    path = str(folder / "texts.parquet")
    Dataset.from_dict({"text": texts}).to_parquet(path)
    options = {"method": "adq", "n_bins": 7, "output_dir": folder / "run", "report": False}
    return compress(path, embedding_model=str(small_encoder), **options)


def table(run):
    return pq.read_table(run.path / "bins.parquet").to_pandas()


def test_the_files_of_adq_tell_the_whole_story(run):
    found = table(run)
    assert not found.isnull().any().any()
    assert (found.diversity < 0).all()
    scores = Scores(found.representativeness.to_numpy(), found.diversity.to_numpy())
    np.testing.assert_allclose(found.importance, bin_importance(scores))
    weights = adaptive_weights(run.bins, found.importance.to_numpy(), 0.6)
    np.testing.assert_allclose(found.weight, weights)
    np.testing.assert_array_equal(run.order, order_rows(run.bins, weights))
    shares = (found["size"] / found.kept)[run.bins.bin[run.kept]].to_numpy()
    np.testing.assert_allclose(run.subset["dq_weight"], shares / shares.mean(), rtol=1e-6)
    assert found.kept.sum() == 80
    assert len(set(found.kept)) > 1, "the sample is uniform: the scores did nothing"
    assert [check.result for check in verify(run)] == ["passed"] * 5
    assert {path.name for path in run.path.iterdir()} == RUN_FILES
    assert "alpha" in (run.path / "README.md").read_text()


def test_texture_is_the_mean_over_the_windows_of_all_rows(run, texts, small_encoder):
    encoder = load_encoder(str(small_encoder))
    texture = np.concatenate([encoder.encode_scored([text]).texture for text in texts])
    want = mean_texture(texture, run.bins.bin, 7)
    np.testing.assert_allclose(table(run).representativeness, want, rtol=1e-4)
    for b in range(7):
        rows = [np.repeat(level, int(n)) for level, n in texture[run.bins.bin == b]]
        assert want[b] == pytest.approx(np.concatenate(rows).mean())


def test_alpha_0_is_dq_row_for_row(run, tmp_path):
    dq = run.resample(0.2, method="dq", output_dir=tmp_path / "dq")
    zero = run.resample(0.2, alpha=0.0, output_dir=tmp_path / "zero")
    np.testing.assert_array_equal(zero.order, dq.order)
    assert (zero.kept == dq.kept).all()
    assert not np.array_equal(zero.order, run.order)


def test_resampling_needs_no_model_and_no_embeddings(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dq_multimodal.adapters.text.load_encoder", refuse)
    shutil.copytree(run.path, tmp_path / "bare")
    (tmp_path / "bare" / "embeddings.npy").unlink()
    whole = resample(tmp_path / "bare", 0.1, alpha=0.9, output_dir=tmp_path / "a")
    assert (table(whole).importance == table(run).importance).all()
    alone = resample(whole.path, 0.1, importance="diversity", output_dir=tmp_path / "b")
    assert table(alone).importance.max() == 1
    back = resample(alone.path, 0.1, importance="both", alpha=0.6, output_dir=tmp_path / "c")
    np.testing.assert_array_equal(back.order, run.order)
    assert set(back.kept) <= set(run.kept)
    for drawn in (whole, alone, back):
        assert verify(drawn)[0].result == "passed"


@pytest.mark.parametrize("column", ["importance", "weight", "kept", "diversity"])
def test_verify_sees_a_changed_table_of_bins(run, tmp_path, column):
    shutil.copytree(run.path, tmp_path / "run")

    def change(old):
        values = old.to_pylist()
        return pa.array([*values[:2], values[2] + 1, *values[3:]], old.type)

    change_table(tmp_path / "run", "bins.parquet", column, change)
    check = verify(tmp_path / "run")[0]
    assert check.result == "failed"
    assert column in check.detail or column == "diversity"


def test_a_run_without_scores_says_so(texts, small_encoder, tmp_path):
    rows = Dataset.from_dict({"text": texts})
    options = {"embedding_model": str(small_encoder), "report": False}
    dq = compress(rows, method="dq", output_dir=tmp_path / "dq", **options)
    with pytest.raises(InputError, match="adq needs the scores of the bins, and this run has none"):
        dq.resample(0.1, method="adq", output_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_ready_embeddings_are_scored_by_the_sampled_rows(run, texts, small_encoder, tmp_path):
    rows = Dataset.from_dict({"text": texts})
    given = str(run.path / "embeddings.npy")
    options = {"method": "adq", "ready_embeddings": given, "n_bins": 7, "report": False}
    model = {"embedding_model": str(small_encoder), "representativeness": "texture"}
    ready = compress(rows, output_dir=tmp_path / "a", score_rows=1000, **model, **options)
    # the sample is every row, so all scores are those of the whole pass
    np.testing.assert_allclose(
        table(ready).representativeness, table(run).representativeness, rtol=1e-3
    )
    assert ready.manifest["scores"]["all_rows"]
    part = compress(rows, output_dir=tmp_path / "b", score_rows=20, **model, **options)
    assert part.manifest.scores == ScoreFacts(rows=140, rows_a_bin=[20, 20], all_rows=False)
    model.pop("representativeness")
    default = compress(rows, output_dir=tmp_path / "c", score_rows=20, **model, **options)
    assert default.request.representativeness == "surprisal"
    assert default.manifest["scores"]["all_rows"]
    assert (table(default).diversity == table(part).diversity).all()
    assert "| representativeness | `surprisal` |" in (tmp_path / "c" / "README.md").read_text()


def test_what_is_missing_is_named(cli, tmp_path, run):
    Dataset.from_dict({"x": list(range(400))}).to_parquet(tmp_path / "x.parquet")
    given = ("--method", "adq", "--ready-embeddings", run.path / "embeddings.npy")
    done = cli("compress", "x.parquet", *given, code=2)
    assert "adq scores the text or images of rows" in done.stderr
    assert "has the columns x: name --text-columns, or --method dq" in done.stderr
    Dataset.from_dict({"text": ["a"] * 400}).to_parquet(tmp_path / "t.parquet")
    none = ("--embedding-model", "OWNER/none")
    done = cli("compress", "t.parquet", *given, *none, code=2)
    assert "adq needs an encoder for its scores (dq does not)" in done.stderr
    cli("compress", "t.parquet", *given, "--method", "dq", "--no-report")


def test_surprisal_by_hand(small_encoder, tmp_path):
    rows = Dataset.from_dict({"text": ["fox fox", "fox dog", "", "dog"]})
    adapter = TextAdapter(rows, detect_layout(["text"]), str(small_encoder))
    encoder = load_encoder(str(small_encoder))
    ids = [encoder.token_ids([text])[0] for text in rows["text"]]
    everything = np.concatenate(ids)
    share = {token: (everything == token).mean() for token in everything}
    want = [np.mean([-np.log2(share[t]) for t in np.concatenate(part)]) for part in (ids[:2],)]
    got = adapter.surprisal(np.array([0, 0, 1, 2]))
    assert got[0] == pytest.approx(want[0])
    assert np.isnan(got[1])
    assert got[2] == pytest.approx(-np.mean([np.log2(share[t]) for t in ids[3]]))


def test_surprisal_for_text_only(run, texts, small_encoder, small_classifier, tmp_path):
    rows = Dataset.from_dict({"text": texts})
    options = {"method": "adq", "embedding_model": str(small_encoder), "n_bins": 7}
    options |= {"representativeness": "surprisal", "report": False}
    made = compress(rows, output_dir=tmp_path / "a", **options)
    assert (table(made).diversity == table(run).diversity).all()
    assert (table(made).representativeness > 0).all()
    assert not (table(made).representativeness == table(run).representativeness).any()
    with pytest.raises(InputError, match="surprisal is for text"):
        images(tmp_path / "b", small_classifier, representativeness="surprisal")
    assert not (tmp_path / "b").exists(), "it was said after the work was done"


def images(folder, classifier, **options):
    files = [save(picture((16, 16), seed=k)) if k % 9 else b"" for k in range(90)]
    rows = image_rows(files, label=[k % 2 for k in range(90)])
    settings = {"embedding_model": str(classifier), "n_bins": 3, "output_dir": folder, **options}
    return compress(rows, method="adq", report=False, **settings)


@pytest.mark.parametrize("kind", ["features", "gradients"])
def test_images_are_scored_over_all_strata(small_classifier, tmp_path, kind):
    run = images(tmp_path / "run", small_classifier, image_embedding=kind, label_column="none")
    assert table(run).shape[0] == 3
    run = images(tmp_path / "two", small_classifier, label_column="label")
    found = table(run)
    assert found.shape[0] == 6
    for name in ("representativeness", "diversity", "importance"):
        assert (found[found.stratum == 0][name].to_numpy() == found[name].to_numpy()[3:]).all()
    assert sorted(found.groupby("stratum").kept.sum()) == [8, 8]  # of the rows that can be read
    levels = [
        measure_texture([Pictures.open(io.BytesIO(save(picture((16, 16), seed=k))))])[0, 0]
        for k in range(90)
        if k % 9
    ]
    assert levels[0] > 0
    readable = np.arange(90)[np.arange(90) % 9 > 0]
    of_bin = [
        np.mean([levels[i] for i, k in enumerate(readable) if run.bins.bin[k] == b])
        for b in range(3)
    ]
    np.testing.assert_allclose(found.representativeness[:3], of_bin, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("dq-iccv23", {"method": "dq", "similarity": "euclidean"}),
        ("adq-aaai25", {"method": "adq", "similarity": "euclidean", "norm": "softmax-z"}),
    ],
)
def test_presets_set_what_they_say_and_options_beside_them_win(
    tmp_path, texts, small_encoder, preset, wanted
):
    rows = Dataset.from_dict({"text": texts})
    options = {"preset": preset, "embedding_model": str(small_encoder), "report": False}
    made = compress(rows, output_dir=tmp_path / "a", **options).request.as_dict()
    assert wanted.items() <= made.items()
    options |= {"similarity": "cosine", "n_bins": 3}
    made = compress(rows, output_dir=tmp_path / "b", **options).request
    assert (made.method, made.similarity, made.n_bins) == (wanted["method"], "cosine", 3)


def test_spans_are_left_out_by_seed():
    text = " ".join(map(str, range(100)))
    view = drop_spans(text, (0, 5))
    assert view == drop_spans(text, (0, 5)) != drop_spans(text, (1, 5))
    words = view.split()
    assert len(words) == 85
    assert [w for w in text.split() if w in set(words)] == words
    gaps = np.diff([int(w) for w in words])
    assert (gaps > 1).sum() < 15, "no spans, single words"
    assert drop_spans("one", (0, 0)) == "one"
    assert drop_spans("", (0, 0)) == ""
    assert len(drop_spans("one two", (-3, 0)).split()) == 1
    chinese = "".join(chr(0x4E00 + k) for k in range(100))
    assert len(drop_spans(chinese, (0, 0))) == 85


def test_a_view_of_a_picture_keeps_its_size_and_most_of_its_look():
    pixels = np.asarray(picture((24, 24), seed=1).convert("RGB"))
    view = augment(pixels, (0, 1))
    assert view.shape == pixels.shape
    assert view.dtype == np.uint8
    np.testing.assert_array_equal(view, augment(pixels, (0, 1)))
    assert not np.array_equal(view, pixels)
    assert abs(view.mean() - pixels.mean()) < 0.5 * pixels.mean()


def test_large_images_are_measured_smaller():
    large = picture((2400, 1300), seed=0).convert("RGB")
    other = picture((20, 30), seed=1).convert("RGB")
    found = measure_texture([large, other, large])
    want = measure_texture([large.reduce(2)])[0]
    assert found[0].tolist() == found[2].tolist() == want.tolist()
    assert found[1].tolist() == measure_texture([other])[0].tolist() != want.tolist()


def test_nothing_that_can_be_scored_is_dq(tmp_path, small_classifier, texts, small_encoder, run):
    options = {"method": "adq", "n_bins": 4, "report": False}
    model = {"embedding_model": str(small_classifier), "keep_unreadable": True}
    rows = image_rows([b"no picture"] * 40)
    blank = compress(rows, output_dir=tmp_path / "a", **model, **options)
    assert blank.manifest["scores"]["rows"] == 0
    assert table(blank).kept.tolist() == [2] * 4
    assert blank.manifest["problems"]["an image that cannot be read"]["count"] == 40
    np.save(tmp_path / "zeros.npy", np.zeros((len(texts), 3)))
    given = {"ready_embeddings": tmp_path / "zeros.npy", "embedding_model": small_encoder}
    rows = Dataset.from_dict({"text": texts})
    zeros = compress(rows, output_dir=tmp_path / "b", **given, **options)
    assert table(zeros).kept.tolist() == [20] * 4
    for made in (blank, zeros):
        assert verify(made)[0].result == "passed"


def test_settings_of_adq_are_not_ignored_by_other_methods(run, tmp_path):
    for change in ({"alpha": 1.0}, {"importance": "diversity"}, {"norm": "softmax-z"}):
        with pytest.raises(InputError, match="is for adq, and this draws by dq"):
            run.resample(0.1, method="dq", output_dir=tmp_path / "no", **change)
    assert not (tmp_path / "no").exists()


def test_outer_products_are_scored_by_their_right_factor(tmp_path):
    np.save(tmp_path / "embeddings.npy", np.arange(20, dtype=np.float32).reshape(2, 10))
    np.save(tmp_path / "middle.npy", np.full((2, 3), 7, dtype=np.float16))
    got = scoring._features(tmp_path, np.array([1]), Part(), 4)
    assert got.tolist() == [[14, 15, 16, 17, 18, 19, 7, 7, 7]]


def test_middle_features_beyond_float16_stay_finite(small_encoder, tmp_path, monkeypatch):
    rows = Dataset.from_dict({"text": ["a fox", "dog"]})
    adapter = TextAdapter(rows, detect_layout(["text"]), str(small_encoder), is_scored=True)
    plain = adapter.embed

    def huge(batch):
        return replace(plain(batch), middle=np.full((2, adapter.middle_dimension), 1e9))

    monkeypatch.setattr(adapter, "embed", huge)
    embedding.embed_rows(adapter, tmp_path, 8)
    assert np.isfinite(np.load(tmp_path / "middle.npy")).all()
