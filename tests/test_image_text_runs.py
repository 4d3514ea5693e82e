"""Runs of rows with images and text, from the source to the subset."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Image, List, load_dataset
from image_text_rows import BROKEN, SHAPES, make, picture

from dq_multimodal import InputError, Run, compress, plan, verify
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.adapters.image_text import ImageTextAdapter
from dq_multimodal.adapters.text import TextAdapter, detect_layout
from dq_multimodal.core import Scores
from dq_multimodal.core.diversity import diversity, learn_directions
from dq_multimodal.core.importance import normalise
from dq_multimodal.data.pixels import NO_IMAGE, UNREADABLE, read_paths, undecoded
from dq_multimodal.hub import public_config
from dq_multimodal.stages.scoring import mean_texture
from dq_multimodal.stages.selection import read_scores

N = 40
QUESTIONS = ["what colour is it", "which shape is in the picture", "is there a circle", "how many"]


def make_rows(n_rows=N):
    """Rows of which some have no image, a broken one, or no question."""
    images = [picture(k // 2, (16 + k % 3, 20)) for k in range(n_rows)]
    images[3], images[7], images[11] = None, BROKEN, BROKEN
    questions = [QUESTIONS[k % 4] + " " * (k % 2) + "x" * (k % 5) for k in range(n_rows)]
    questions[5] = questions[3] = ""
    answers = [["yes", "no", "red"][k % 3] for k in range(n_rows)]
    columns = {"image": images, "question": questions, "answer": answers}
    return make(columns, image=Image())


@pytest.fixture(scope="module")
def models(small_classifier, small_encoder):
    return f"{small_classifier},{small_encoder}"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.parquet"
    make_rows().to_parquet(path)
    return path


def run(source, models, place, **options):
    options = {"method": "dq", "n_bins": 3, "keep_ratio": 0.5, "report": False, **options}
    return compress(source, embedding_model=models, output_dir=place, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_come_through_untouched(shape, models, tmp_path):
    columns, kinds, texts, _ = SHAPES[shape]
    rows = make({name: values * 4 for name, values in columns.items()}, **kinds)
    rows.to_parquet(tmp_path / "rows.parquet")
    done = run(tmp_path / "rows.parquet", models, tmp_path / "run")
    names = [name for name in kinds if name not in texts or shape == "images inside"]
    said = f"the images in {', '.join(names)} and the text in "
    assert any(said + ", ".join(texts) in note for note in done.manifest.notes)
    assert len(done.subset) == 4
    kept, wanted = done.subset, rows.select(done.subset["dq_row"])
    for name in columns:
        plain = [part.with_format("arrow")[:][name].to_pylist() for part in (kept, wanted)]
        assert plain[0] == plain[1]
    assert {check.result for check in verify(done)} == {"passed"}


@pytest.mark.parametrize("method", ["random", "blocks", "coverage", "dq", "adq", "graphcut"])
def test_methods(method, source, models, tmp_path, monkeypatch):
    done = run(source, models, tmp_path / "run", method=method)
    assert len(done.subset) == N // 2
    problems = {what: problem.rows for what, problem in done.manifest.problems.items()}
    assert problems[NO_IMAGE] == [3]
    assert problems[UNREADABLE] == [7, 11]
    assert problems["an empty question"] == [3, 5]
    assert "1 row with no image, still candidates: row 3" in done.manifest.notes
    assert done.config.rows.modality == "image-text"
    results = [check.result for check in verify(done)]
    assert results == ["passed"] * 3 + ["skipped" if method == "random" else "passed", "passed"]
    monkeypatch.setattr(ImageTextAdapter, "load", None)  # is not called again
    assert run(source, models, tmp_path / "run", method=method).path == done.path


def test_strata_and_share(source, models, tmp_path):
    done = run(source, models, tmp_path / "run", label_column="answer", text_share=0.9)
    assert done.config.rows.columns == ["question"]
    assert done.manifest.labels == ["no", "red", "yes"]
    assert done.config.embedding.text_share == 0.9
    other = run(source, models, tmp_path / "other", label_column="answer", text_share=0.1)
    vectors = [np.load(r.path / "embeddings.npy") for r in (done, other)]
    size = done.config.embedding.image.dimension
    np.testing.assert_allclose(vectors[0][0, :size] * 3, vectors[1][0, :size], rtol=1e-5)


def test_labels_are_found_as_those_of_images(models, tmp_path):
    rows = make_rows(12)
    kinds = rows.add_column("kind", [k % 2 for k in range(12)])
    kinds = kinds.cast_column("kind", ClassLabel(names=["a", "b"]))
    assert run(kinds, models, tmp_path / "run").manifest.labels == ["a", "b"]


def test_the_scores_are_those_of_both_halves(source, models, tmp_path):
    done = run(source, models, tmp_path / "run", method="adq", seed=3, score_rows=50)
    rows = load_dataset("parquet", data_files=str(source), split="train")
    image_model, text_model = models.split(",")
    image = ImageAdapter(rows, ["image"], None, image_model, is_scored=True)
    layout = detect_layout(rows.column_names, ("question", "answer"))
    text = TextAdapter(rows, layout, text_model, has_images=True, is_scored=True)
    bins = done.bins.bin
    parts = []
    for half in (image, text):
        plain = half.embed(half.load(np.arange(N))[0])
        views = half.embed(half.load(np.arange(N), 3)[0])
        there = plain.embedding.any(axis=1)
        pairs = []
        for made in (plain, views):
            norms = np.linalg.norm(made.embedding, axis=1, keepdims=True)
            unit = made.embedding / np.where(norms > 0, norms, 1)
            pairs.append(np.concatenate([unit, made.middle], axis=1)[there].astype("f4"))
        first, second = learn_directions(*pairs, seed=3)
        of_bin = [bins[there] == b for b in range(3)]
        div = np.array([diversity(first[b], second[b]) for b in of_bin])
        parts.append(Scores(mean_texture(plain.texture, bins, 3), div))
    for name in ("representativeness", "diversity"):
        wanted = sum(normalise(getattr(part, name)) for part in parts)
        got = getattr(read_scores(done.path), name)
        np.testing.assert_allclose(got, wanted, atol=0.02)


def test_stopped_and_started_again_is_the_same(source, models, tmp_path, monkeypatch):
    whole = run(source, models, tmp_path / "whole", batch_size=8)
    embed, n_done = ImageTextAdapter.embed, []

    def stop(self, batch):
        n_done.append(1)
        if len(n_done) == 3:
            raise KeyboardInterrupt
        return embed(self, batch)

    monkeypatch.setattr("dq_multimodal.stages.embedding.SAVE_SECONDS", 0)
    monkeypatch.setattr(ImageTextAdapter, "embed", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, models, tmp_path / "run", batch_size=8)
    again = run(source, models, tmp_path / "run", batch_size=8)
    assert len(n_done) == 3 + 3
    for name in ("embeddings.npy", "selection.parquet"):
        assert (whole.path / name).read_bytes() == (again.path / name).read_bytes()
    assert whole.manifest.problems == again.manifest.problems


def test_repeats_are_rows_of_the_same_image_and_text(models, tmp_path):
    images = [picture(0), picture(0), picture(1), picture(0), None, None]
    texts = ["a b", "a  b", "a b", "c", "d", "d"]
    rows = make({"image": images, "text": texts}, image=Image())
    notes = run(rows, models, tmp_path / "run", n_bins=1).manifest.notes
    found = [note for note in notes if "repeat" in note]
    assert len(found) == 1
    assert found[0].startswith(
        "2 rows repeat a row before them exactly (the same image file and text, white space "
        "apart): rows 1, 5"
    )


def test_patches_of_the_images_are_dropped(models, tmp_path):
    make_rows(12).to_parquet(tmp_path / "rows.parquet")
    options = {"method": "blocks", "drop_ratio": 0.3, "patch_size": 4, "attribution": "random"}
    done = run(tmp_path / "rows.parquet", models, tmp_path / "run", **options)
    assert done.manifest.patches.images > 0
    assert {check.result for check in verify(done)} == {"passed"}
    lists = make({"images": [[picture(0)]] * 4, "text": ["a"] * 4}, images=List(Image()))
    with pytest.raises(InputError, match="drop_ratio is for one image a row"):
        run(lists, models, tmp_path / "lists", **options)
    assert not (tmp_path / "lists" / "manifest.json").exists()


def test_a_target_with_images_and_text(source, models, tmp_path):
    target = tmp_path / "target.parquet"
    make_rows().select(range(20, 30)).to_parquet(target)
    done = run(source, models, tmp_path / "run", method="random", target=str(target))
    kept = set(done.subset["dq_row"])
    assert {*range(20, 30)} <= kept
    picks = json.loads((done.path / "target" / "picks.json").read_text())
    assert picks["n_leaks"] >= 10
    assert picks["targets"][0]["text"].startswith(QUESTIONS[0])


def test_a_stream_chooses_the_same(source, models, tmp_path):
    whole = run(source, models, tmp_path / "whole")
    streamed = run(source, models, tmp_path / "run", streaming=True)
    assert whole.subset["dq_row"] == streamed.subset["dq_row"]
    assert whole.manifest.problems == streamed.manifest.problems


def test_ready_embeddings_need_no_model(source, tmp_path):
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(N, 4)).astype("f4"))
    done = run(source, None, tmp_path / "run", ready_embeddings=str(tmp_path / "e.npy"))
    assert done.config.rows.modality == "image-text"
    assert not any("rows are chosen by the images" in note for note in done.manifest.notes)


def test_a_plan(source, models):
    found = plan(source, method="adq", n_bins=3, embedding_model=models, keep_ratio=0.5)
    assert found["modality"] == "image-text"
    assert found["kept"] == N // 2
    assert found["embedding"]["image"]["model"] == models.split(",")[0]


def test_no_folder_of_a_model_is_pushed(source, models, tmp_path):
    done = run(source, models, tmp_path / "run")
    found = public_config(done.config).format()
    for model in models.split(","):
        assert model not in found
        assert model.rpartition("/")[2] in found


def test_a_run_is_read_again(source, models, tmp_path):
    done = run(source, models, tmp_path / "run")
    again = Run(done.path)
    assert again.config == done.config
    assert again.config.embedding.text.dimension > 0
    fewer = again.resample(0.25, output_dir=tmp_path / "fewer")
    assert len(fewer.subset) == N // 4
    assert isinstance(fewer.subset, Dataset)


def test_paths_of_images_are_read_from_a_folder(models, tmp_path):
    (tmp_path / "pictures" / "coco").mkdir(parents=True)
    rows = []
    for k in range(8):
        name = f"coco/{k}.PNG"
        (tmp_path / "pictures" / name).write_bytes(picture(k)["bytes"])
        turns = [{"from": "human", "value": f"<image>\nwhat {k}"}, {"from": "gpt", "value": "a"}]
        rows.append({"id": f"{k}", "conversations": turns} | ({"image": name} if k else {}))
    rows[5]["image"] = ""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    folder = {"image_folder": str(tmp_path / "pictures"), "n_bins": 1}
    done = run(tmp_path / "rows.json", models, tmp_path / "run", **folder)
    assert done.config.rows.image_columns == ["image"]
    assert done.manifest.problems[NO_IMAGE].rows == [0, 5]
    kept = done.subset.cast_column("image", Image(decode=False))
    for number, value in zip(kept["dq_row"], kept["image"], strict=True):
        assert value is None if number in (0, 5) else value["bytes"] == picture(number)["bytes"]
    assert {check.result for check in verify(done)} == {"passed"}
    plain = run(tmp_path / "rows.json", models.split(",")[1], tmp_path / "plain", n_bins=1)
    assert plain.config.rows.modality == "text"
    with pytest.raises(InputError, match="image_folder is for rows that name images, and"):
        run(tmp_path / "rows.json", models, tmp_path / "other", **folder, streaming=True)
    rows[3]["image"] = "../rows.json.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"row 3 .* names a file that is none of its own"):
        run(tmp_path / "rows.json", models, tmp_path / "other", **folder)


def test_lists_of_paths_are_read_too_and_names_beside_images_are_names(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0)["bytes"])
    rows = Dataset.from_dict({"images": [["a.png"], [], None], "text": ["a", "b", "c"]})
    there = {"a.png"}
    found = read_paths(rows, there.__contains__)
    assert found.features["images"] == List(Image())
    found = undecoded(found, "images")["images"]
    assert [row and [value["path"] for value in row] for row in found] == [["a.png"], [], None]
    named = make({"image": [picture(0)], "file_name": ["a.png"]}, image=Image())
    assert read_paths(named, there.__contains__) is named
    plain = rows.select_columns(["text"])
    assert read_paths(plain, there.__contains__) is plain
    columns = {
        "image": ["a.png", "", None],
        "url": ["https://x/a.png"] * 3,
        "mask": ["m/a.png"] * 3,
    }
    columns |= {"odd": ["a.png", "no image", "a.png"]}
    table = Dataset.from_dict(columns)
    found = read_paths(table, there.__contains__)
    assert [name for name in columns if isinstance(found.features[name], Image)] == ["image"]
    values = undecoded(found, "image")["image"]
    assert [value and value["path"] for value in values] == ["a.png", None, None]
    chosen = read_paths(table.select([0, 2]), there.__contains__)
    assert [n for n in columns if isinstance(chosen.features[n], Image)] == ["image", "odd"]


@pytest.mark.parametrize(("ratio", "method"), [(0.1, "coverage"), (0.2, "blocks")])
def test_auto_covers_where_few_rows_are_kept(source, models, tmp_path, ratio, method):
    done = run(source, models, tmp_path / "run", method="auto", keep_ratio=ratio)
    assert done.request.method == method


def test_models_in_the_output_folder_are_spared(small_classifier, small_encoder, source, tmp_path):
    run(source, f"{small_classifier},{small_encoder}", tmp_path / "run")
    shutil.copytree(small_classifier, tmp_path / "run" / "cls")
    with pytest.raises(InputError, match="lies in the output folder"):
        run(source, f"{tmp_path / 'run' / 'cls'},{small_encoder}", tmp_path / "run", overwrite=True)


def test_near_duplicates_are_near_in_both_halves(models, tmp_path):
    images = [picture(0), picture(0), None, picture(0)]
    texts = ["what is it", "what is it", "what is it", "0123456789 fox"]
    rows = make({"image": images, "text": texts}, image=Image())
    options = {"n_bins": 1, "drop_duplicates": 0.6, "keep_ratio": 1.0}
    done = run(rows, models, tmp_path / "run", **options)
    vectors = np.load(done.path / "embeddings.npy")
    assert vectors[0] @ vectors[2] / np.linalg.norm(vectors[2]) > 0.6  # of one half alone
    found = pq.read_table(done.path / "selection.parquet")["duplicate_of"].to_pylist()
    assert found[2] in (None, -1)
    assert {*found[:2]} & {0, 1}
    assert any("of the images and of the texts" in note for note in done.manifest.notes)
