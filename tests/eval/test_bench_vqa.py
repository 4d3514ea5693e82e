"""Questions on pictures in the benchmark: the trainer, the tasks, and what selections keep."""

import io
from pathlib import Path
from typing import Any

import joint_coverage
import numpy as np
import pyarrow.parquet as pq
import pytest
import readme
import torch
import yaml
from harness import images, vqa
from harness.bundle import Bundle
from harness.prepare import QuestionTask, hash_files, prepare
from harness.suite import Job, read_suite
from PIL import Image

from dq_multimodal import compress
from dq_multimodal.config import InputError

CPU = torch.device("cpu")
NAMES = ("dark", "light")
SETTINGS = {"batch_size": 16, "epochs": 12, "learning_rate": 0.01, "optimizer": "adamw"}
SETTINGS |= {"crop": "none", "precision": "float32"}


def ask(rng, n_pictures, side=8):
    """Give pictures, and for each the four questions of which half are about the other kind.

    Neither the picture nor the question alone says more than a coin.
    """
    kinds = rng.integers(0, 2, n_pictures)
    noise = rng.integers(0, 60, (n_pictures, side, side, 3))
    pictures = (180 * kinds[:, None, None, None] + noise).astype(np.uint8)
    asked = [(f"Is it {NAMES[k]}?", f"Is it not {NAMES[k]}?") for k in (0, 1)]
    texts, answers, places = [], [], []
    for place, kind in enumerate(kinds):
        for k in (0, 1):
            texts += asked[k]
            answers += [int(kind == k), int(kind != k)]
            places += [place, place]
    return pictures, np.array(places), texts, np.array(answers)


SCALE = np.array([[90, 95, 100, 1], [80, 85, 90, 0]])


class Pack:
    """Stands in for a bundle."""

    def __init__(self):
        rng = np.random.default_rng(0)
        known = {word: n for n, word in enumerate(("dark", "is", "it", "light", "not"), 1)}
        self.arrays = {}
        for split, n in (("train", 40), ("test", 25)):
            pictures, places, texts, answers = ask(rng, n)
            means = pictures.mean(axis=(1, 2))
            features = np.concatenate([means, np.ones((n, 1))], axis=1).astype(np.float32)
            parts = {"images": pictures, "features": features, "places": places, "labels": answers}
            parts["words"] = vqa.number_words(texts, known)
            self.arrays |= {f"t/{split}/{part}": array for part, array in parts.items()}
        self.arrays |= {"t/train/scale": SCALE.astype(np.float32), "t/n_words": np.array([9])}

    def array(self, name):
        return self.arrays[name]


PACK = Pack()


def train(net, rows=160, seed=0, **settings):
    protocol = vqa.Protocol(**(SETTINGS | settings))
    job = Job("t", protocol, net, np.arange(rows), 1.0, seed)
    return vqa.train(job, PACK, CPU, lambda share: None)


def test_words_are_numbers_and_unknown_ones_are_0():
    known = {"is": 1, "it": 2, "red": 3}
    found = vqa.number_words(["Is it red?", "is IT", "it's teal, is it?", ""], known)
    assert found.dtype == np.int16
    assert found.tolist() == [[1, 2, 3, 0, 0], [1, 2, 0, 0, 0], [2, 0, 0, 1, 2], [0] * 5]


@pytest.mark.parametrize("net", [vqa.PIXELS, vqa.FEATURES])
def test_what_neither_half_says_alone_is_learnt(net):
    found = train(net)
    assert found["metrics"]["test accuracy"]["last"] > 95
    assert set(found["metrics"]) == {"test accuracy", "accuracy, mean over answers"}
    assert found["steps"] == 120
    short = {"epochs": 2}
    assert train(net, **short)["metrics"] == train(net, **short)["metrics"]
    assert train(net, rows=8, **short)["metrics"]["test accuracy"]["last"] < 80


def test_answers_count_the_same_in_their_mean():
    data = vqa.load_questions(PACK, "t", vqa.FEATURES, CPU)
    labels = data.test_labels.numpy()
    is_right = np.random.default_rng(1).random(len(labels)) < np.where(labels == 0, 0.9, 0.2)
    is_right[:90] = labels[:90] == 0
    found = data.measure(torch.from_numpy(is_right))
    naive = [np.mean([r for r, a in zip(is_right, labels, strict=True) if a == k]) for k in (0, 1)]
    assert found["test accuracy"] == pytest.approx(100 * is_right.mean())
    assert found["accuracy, mean over answers"] == pytest.approx(100 * np.mean(naive))


def test_scale_and_number_of_words_are_those_of_the_bundle_whatever_rows_it_holds():
    data = vqa.load_questions(PACK, "t", vqa.FEATURES, CPU)
    mean, spread = SCALE[:, :3]
    for split in ("train", "test"):
        raw, made = PACK.array(f"t/{split}/features"), getattr(data, split)[:, :3].numpy()
        np.testing.assert_allclose(made, (raw[:, :3] - mean) / spread, atol=1e-4)
    protocol, rows = vqa.Protocol(**SETTINGS), torch.arange(8)
    net, _ = data.start(vqa.FEATURES, rows, 4, protocol, torch.Generator(), None)
    assert net.words.num_embeddings == 9
    assert data.train[:, 3].abs().max() < 1e-3  # a constant says nothing, and does not blow up


def test_another_net_is_refused():
    with pytest.raises(InputError, match="the net of trainer vqa must be 'cnn and words' or"):
        train("resnet18")


def test_adamw_is_what_torch_makes_of_it():
    protocol = images.Protocol(batch_size=1, learning_rate=0.1, steps=1, optimizer="adamw")
    made = images.make_optimizer(torch.nn.Linear(2, 1), protocol)
    assert isinstance(made, torch.optim.AdamW) and made.defaults["weight_decay"] == 5e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_encoder):
    """Rows of pictures and questions, of which several share each, and an untrained encoder."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier

    place = tmp_path_factory.mktemp("vqa")
    features = Features(
        {
            "image": ImageFeature(),
            "question": Value("string"),
            "captions": List(Value("string")),
            "answer": ClassLabel(names=["no", "yes"]),
        }
    )
    rng = np.random.default_rng(0)
    for name, n in (("train", 24), ("test", 6)):
        pictures, places, texts, answers = ask(rng, n, side=16)
        files = []
        for picture in pictures:
            Image.fromarray(picture).save(buffer := io.BytesIO(), "PNG")
            files.append({"bytes": buffer.getvalue()})
        order = rng.permutation(len(texts))
        rows = {
            "image": [files[places[k]] for k in order],
            "question": [f"{texts[k]} {places[k] % 7}" for k in order],
            "captions": [[f"a {places[k]}", "b"] for k in order],
            "answer": answers[order].tolist(),
        }
        Dataset.from_dict(rows, features=features).to_parquet(place / f"{name}.parquet")
    torch.manual_seed(0)
    net = build_classifier("resnet10-narrow", 2, 16)
    about = Classifier("resnet10-narrow", 16, 2, ("a", "b"), (0.5,) * 3, (0.3,) * 3)
    save_classifier(net, about, place / "encoder")
    return place


MODALITIES = ("image", "text", "image-text")


def write(folder, encoder, path, selections=None, keep=0.25, **task):
    """Write a suite on the rows of a folder."""
    toy: dict[str, Any] = {"kind": "image-text", "text_columns": ["question"]}
    toy |= {"dataset": str(folder / "train.parquet"), "test": str(folder / "test.parquet")}
    toy |= {"encoder": {"image": str(folder / "encoder"), "text": str(encoder)}, "image_size": 16}
    named: dict[str, Any] = {m: {"method": "graphcut", "modality": m} for m in MODALITIES}
    named |= {"random": {"method": "random"}, "both": {"method": "graphcut"}}
    named |= {"more text": {"method": "graphcut", "text_share": 0.9}}
    selections = named if selections is None else selections
    group = {"task": "toy", "protocol": "short", "keep_ratios": [keep], "draws": 2}
    group |= {"nets": [vqa.PIXELS, vqa.FEATURES], "selections": list(selections)}
    suite = {
        "decides": "Whether it works.",
        "tasks": {"toy": toy | task},
        "protocols": {"short": {"trainer": "vqa", **SETTINGS, "epochs": 1}},
        "selections": selections,
        "compare": [group],
    }
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def made(folder, small_encoder):
    suite = write(folder, small_encoder, folder / "toy.yaml", unlabelled=True)
    prepare(suite, folder / "bundle", folder / "work")
    return Bundle(folder / "bundle")


def rows_of(bundle, selection):
    """Give the kept rows of a selection's first draw as (picture, words, answer)."""
    lines = bundle.table("toy/selections").to_pylist()
    at = next(x["rows"] for x in lines if (x["selection"], x["draw"]) == (selection, 0))
    parts = (bundle.array(f"toy/train/{part}") for part in ("places", "words", "labels"))
    places, words, labels = (part[at] for part in parts)
    pictures = bundle.array("toy/train/images")[places]
    return sorted(
        (a.tobytes(), b.tobytes(), int(c)) for a, b, c in zip(pictures, words, labels, strict=True)
    )


@pytest.mark.parametrize(
    ("selection", "options"),
    [
        *((m, {"modality": m}) for m in MODALITIES),
        ("both", {}),
        ("more text", {"text_share": 0.9}),
        ("random", {"method": "random"}),
    ],
)
def test_the_rows_are_those_that_compress_keeps(
    folder, small_encoder, made, tmp_path, selection, options
):
    models = {"image": str(folder / "encoder"), "text": str(small_encoder)}
    both = f"{models['image']},{models['text']}"
    options = {"method": "graphcut", "modality": "image-text"} | options
    options["embedding_model"] = models.get(options["modality"], both)
    if options["modality"] != "image":
        options["text_columns"] = ["question"]
    if options["method"] == "random":
        seed = read_suite(str(folder / "toy.yaml")).draw_seed("random", 0)
        options |= {"seed": seed, "embedding_model": None}
    run = compress(
        str(folder / "train.parquet"),
        label_column="none",
        keep_ratio=0.25,
        report=False,
        output_dir=tmp_path / "run",
        **options,
    )
    table = pq.read_table(folder / "train.parquet").to_pylist()
    words = sorted({w for row in table for w in vqa.split_words(row["question"])})
    known = {word: number for number, word in enumerate(words, 1)}
    wanted = []
    for row in (table[k] for k in run.kept):
        picture = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        numbers = vqa.number_words([row["question"]], known)[0]
        numbers = np.pad(numbers, (0, made.array("toy/train/words").shape[1] - len(numbers)))
        wanted.append((picture.tobytes(), numbers.tobytes(), row["answer"]))
    assert rows_of(made, selection) == sorted(wanted)


def read_pixels(table):
    """Give the pixels of each row's picture as bytes."""
    files = (io.BytesIO(row["image"]["bytes"]) for row in table.to_pylist())
    return [np.asarray(Image.open(file)).tobytes() for file in files]


def test_every_picture_is_packed_once_and_all_nets_train(folder, made):
    suite = read_suite(str(folder / "toy.yaml"))
    lines = QuestionTask(suite, "toy", folder / "work" / "toy").choose_all()
    own = {"train": np.unique([row for line in lines for row in line["rows"]]), "test": range(24)}
    for part, rows in own.items():
        pixels = [picture.tobytes() for picture in made.array(f"toy/{part}/images")]
        used = set(read_pixels(pq.read_table(folder / f"{part}.parquet").take([*rows])))
        assert set(pixels) == used and len(pixels) == len(used)
        assert len(made.array(f"toy/{part}/features")) == len(pixels)
        assert len(made.array(f"toy/{part}/places")) == len(rows)
    line = made.table("toy/selections").to_pylist()[0]
    for net in (vqa.PIXELS, vqa.FEATURES):
        job = Job("toy", suite.protocol("short"), net, np.array(line["rows"]), 0.25, 0)
        assert vqa.train(job, made, CPU, lambda share: None)["steps"] == 1
    again = folder / "bundle" / "bundle.json"
    before = again.stat().st_mtime_ns
    prepare(str(folder / "toy.yaml"), folder / "bundle", folder / "work")
    assert again.stat().st_mtime_ns == before


def test_what_a_net_reads_does_not_depend_on_the_other_cells(folder, small_encoder, made):
    few = {"random": {"method": "random"}}
    suite = write(folder, small_encoder, folder / "few.yaml", few, unlabelled=True, keep=0.02)
    prepare(suite, folder / "few", folder / "work")
    other = Bundle(folder / "few")
    assert len(other.array("toy/train/images")) < len(made.array("toy/train/images"))
    assert other.about["tasks"]["toy"]["digests"] == made.about["tasks"]["toy"]["digests"]
    task = QuestionTask(read_suite(suite), "toy", folder / "work" / "toy")
    table = pq.read_table(folder / "train.parquet")
    first = np.unique(read_pixels(table), return_index=True)[1]
    mean, spread = task.halves[0][first].mean(axis=0), task.halves[0][first].std(axis=0)
    words = {word for text in table["question"].to_pylist() for word in vqa.split_words(text)}
    for bundle in (made, other):
        scale = bundle.array("toy/train/scale")
        np.testing.assert_allclose(scale, [mean, spread], rtol=1e-4, atol=1e-6)
        assert bundle.array("toy/n_words").tolist() == [len(words) + 1]


def test_a_file_of_embeddings_is_that_of_its_numbers(folder, small_encoder, tmp_path):
    suite = read_suite(write(folder, small_encoder, tmp_path / "toy.yaml"))
    task = QuestionTask(suite, "toy", tmp_path / "work")
    first = task.chooser.join({})
    before, at = np.load(first), Path(first).stat().st_mtime_ns
    assert task.chooser.join({}) == first and Path(first).stat().st_mtime_ns == at
    image, text = task.halves
    task.halves = (image[::-1], text)  # as of other weights in the same place
    changed = np.load(task.chooser.join({}))
    assert not np.allclose(changed, before)
    np.testing.assert_array_equal(changed[:, : image.shape[1]], before[::-1, : image.shape[1]])
    assert not [*(tmp_path / "work").glob("*.tmp")]


def test_pictures_that_rows_only_name_are_told_apart(tmp_path):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    files = {"a.png": b"one", "b.png": b"two", "c.png": b"one"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    rows = [{"bytes": None, "path": str(tmp_path / name)} for name in files]
    rows += [{"bytes": b"two", "path": None}, None]
    dataset = Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()}))
    a, b, c, d, none = hash_files(dataset, "image")
    assert a == c and b == d and len({a, b, none}) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "dq", "modality": "sound"}, "modality must be"),
        ({"method": "dq", "drop_ratio": 0.25}, "drop_ratio is for tasks of kind image"),
        ({"method": "dq", "embeddings": "x.npy"}, "embeddings"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(folder, small_encoder, tmp_path, options, said):
    path = write(folder, small_encoder, tmp_path / "wrong.yaml", selections={"wrong": options})
    with pytest.raises(InputError) as raised:
        prepare(path, tmp_path / "bundle", tmp_path / "work")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_each_caption_can_be_a_row(folder, small_encoder, tmp_path):
    options = {"text_columns": ["captions"], "unnest": "captions"}
    path = write(folder, small_encoder, tmp_path / "flat.yaml", **options)
    task = QuestionTask(read_suite(path), "toy", tmp_path / "work")
    table = pq.read_table(folder / "train.parquet").to_pylist()
    rows = task.source.dataset
    assert rows["captions"][:] == [text for row in table for text in row["captions"]]
    assert rows["answer"][:] == [row["answer"] for row in table for _ in row["captions"]]
    image, text = task.halves
    assert len(image) == len(text) == task.n_rows == 2 * len(table)
    assert (image[0::2] == image[1::2]).all() and (text[1::2] == text[1]).all()


def test_rows_change_places_by_a_seed(folder, small_encoder, tmp_path):
    found = {}
    for seed in (0, 0, 1):
        path = write(folder, small_encoder, tmp_path / "shuffled.yaml", shuffle=seed)
        task = QuestionTask(read_suite(path), "toy", tmp_path / "work")
        rows = [(x["question"], x["answer"]) for x in task.source.dataset.remove_columns("image")]
        assert rows == found.setdefault(seed, rows)
    table = pq.read_table(folder / "train.parquet").to_pylist()
    own = [(row["question"], row["answer"]) for row in table]
    assert len({tuple(own), *map(tuple, found.values())}) == 3
    assert all(sorted(rows) == sorted(own) for rows in found.values())


def test_every_selection_is_measured(folder, small_encoder, tmp_path, monkeypatch):
    labels = {"label_column": "answer", "unlabelled": True}
    suite = write(folder, small_encoder, tmp_path / "toy.yaml", **labels)
    monkeypatch.setattr(joint_coverage, "SUITE", suite)
    monkeypatch.setattr(joint_coverage, "PROTOCOL", "short")
    monkeypatch.setattr(joint_coverage, "RATIOS", (0.25,))
    found = joint_coverage.measure_task("toy", tmp_path / "work")
    assert found["rows"] == 96 and found["pictures"] == 24 and found["answers"] == 2
    assert [line["selection"] for line in found["lines"]] == [
        *MODALITIES,
        "random",
        "both",
        "more text",
    ]
    by_name = {line["selection"]: line for line in found["lines"]}
    assert by_name["both"] == by_name["image-text"] | {"selection": "both"}
    assert all(line["draws"] == joint_coverage.DRAWS for line in found["lines"])
    table = readme.kept({"tasks": {"easy_vqa_unlabelled": found}}).splitlines()
    assert len(table) == 3 and table[2].startswith("| easy-VQA | 25 % | random |")


def test_coverage_of_kept_rows_is_by_its_definition():
    rng = np.random.default_rng(3)
    n, kept = 60, np.array([4, 9, 9 + 1, 33, 58])
    pictures, texts, answers = rng.integers(0, 9, n), rng.integers(0, 5, n), rng.integers(0, 3, n)
    image, text = rng.normal(size=(9, 6))[pictures], 3 * rng.normal(size=(5, 4))[texts]
    codes = {
        "pictures": pictures,
        "texts": texts,
        "pairs": texts * 10 + answers,
        "answers": answers,
    }
    rows = joint_coverage.Rows(image, text, codes)
    assert rows.count() == {key: len(set(code.tolist())) for key, code in codes.items()}
    found = rows.measure(kept)
    for key, half in (("pictures", image), ("texts", text)):
        nearest = []
        for row in half:
            cosines = [row @ half[k] / np.linalg.norm(row) / np.linalg.norm(half[k]) for k in kept]
            nearest.append(1 - max(cosines))
        assert found[f"distance of {key}"] == pytest.approx(np.mean(nearest), abs=1e-9)
        cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in half] for b in half]
        assert rows.spread()[key] == pytest.approx([np.mean(cosines), np.std(cosines)], abs=1e-9)
    for key, code in codes.items():
        share = len({code[k] for k in kept}) / len(set(code.tolist()))
        assert found[f"kept of {key}"] == pytest.approx(share)
    shares = [np.mean([answers[k] == a for k in kept]) for a in set(answers.tolist())]
    assert found["smallest answer"] == pytest.approx(min(shares))
    entropy = -sum(share * np.log2(share) for share in shares if share)
    assert found["entropy of answers"] == pytest.approx(entropy)
