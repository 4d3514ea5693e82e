"""Condensed sets as selections of eval/bench.py, on tiny drawn pictures."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness import images
from harness.bundle import Bundle
from harness.condensed import Added
from harness.encoders import find_place
from harness.made import GARMENTS, N_TEST_DIGITS, draw_garment, read_digits
from harness.prepare import prepare
from harness.results import read_lines
from harness.runner import Choices, describe, run_suite
from harness.suite import Job, read_suite
from harness.table import markdown, summarise
from PIL import Image
from test_bench_images import CPU, Line, Pack

from dq_multimodal.config import InputError

N_CLASSES, SIDE = 3, 8
QUICK = {"net_width": 4, "real_batch": 8, "iterations": 2}
SELECTIONS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "dm": {"condense": "dm", **QUICK},
    "dc": {"condense": "dc", "images_per_class": 3, "inner_loops": 1, "net_steps": 1, **QUICK},
    "mdc": {"condense": "dm", "images_per_class": 3, "multisize": True, **QUICK},
    "krr": {"condense": "krr", "learn_labels": True, **QUICK},
    "krr, hard": {"condense": "krr", "learn_labels": True, "use_soft": False, **QUICK},
    "random, bytes of krr": {"method": "random", "same_bytes_as": "krr"},
}


def write_pictures(path, n, seed, names=("a", "b", "c"), numbers=(0, 1, 2)):
    """Write grey pictures of three classes: a bright block at one of three places, and noise."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    rng = np.random.default_rng(seed)
    labels, files = np.arange(n) % N_CLASSES, []
    for label in labels:
        picture = rng.integers(0, 60, (SIDE, SIDE))
        picture[2 * label : 2 * label + 3, :] += 150
        Image.fromarray(picture.astype(np.uint8)).save(buffer := io.BytesIO(), "PNG")
        files.append({"bytes": buffer.getvalue()})
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=[*names])})
    rows = {"img": files, "label": np.array(numbers)[labels].tolist()}
    Dataset.from_dict(rows, features=features).to_parquet(path)


def write(folder, path, selections, *groups):
    group = {"task": "toy", "protocol": "short", "nets": ["convnet/4"], "draws": 2}
    task = {"kind": "image", "dataset": str(folder / "train.parquet")}
    short = {"like": "condensed", "epochs": None, "steps": 2}
    suite = {
        "decides": "Whether it works.",
        "tasks": {"toy": task | {"test": str(folder / "test.parquet")}},
        "protocols": {"short": short},
        "selections": selections,
        "compare": [group | {"images_per_class": [1, 2], "selections": [*selections]}, *groups],
    }
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    """No processes are started, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with pictures, the suite of all selections, and its bundle."""
    folder = tmp_path_factory.mktemp("condensed")
    write_pictures(folder / "train.parquet", 60, 0)
    write_pictures(folder / "test.parquet", 30, 1)
    suite = write(folder, folder / "toy.yaml", SELECTIONS)
    prepare(suite, folder / "bundle", folder / "work")
    return folder


def lines_of(folder):
    lines = Bundle(folder / "bundle").table("toy/selections").to_pylist()
    return {(line["selection"], line["keep"], line["draw"]): line for line in lines}


def set_of(folder, method, **options):
    """Open the set in the work folder that was made with such options."""
    from dq_multimodal.condensation.result import Condensed

    found = [Condensed(path) for path in (folder / "work" / "toy").glob(f"{method}-*")]
    fits = [x for x in found if all(getattr(x.request, k) == v for k, v in options.items())]
    assert len(fits) == 1
    return fits[0]


def pixels_of(rows):
    return np.stack([np.asarray(picture.convert("RGB")) for picture in rows["img"]])


@pytest.mark.parametrize("name", ["dm", "dc", "mdc"])
@pytest.mark.parametrize("n_images", [1, 2])
def test_packed_pictures_are_those_of_the_set_or_of_its_prefix(made, name, n_images):
    bundle, line = Bundle(made / "bundle"), lines_of(made)[(name, f"{n_images} a class", 1)]
    method, own = SELECTIONS[name]["condense"], SELECTIONS[name].get("images_per_class", n_images)
    options = {"images_per_class": own, "seed": 1, "multisize": name == "mdc"}
    kept = set_of(made, method, **options).dataset.select(range(N_CLASSES * n_images))
    assert (bundle.array("toy/train/images")[line["rows"]] == pixels_of(kept)).all()
    assert bundle.array("toy/train/labels")[line["rows"]].tolist() == [0, 1, 2] * n_images
    assert line["bytes"] == sum(
        len(value["bytes"]) for value in kept.cast_column("img", undecoded())["img"]
    )
    assert line["keep_ratio"] == N_CLASSES * n_images / 60 and not line["is_soft"]
    assert json.loads(line["condensed"])["iterations"] == 2 and line["selection_seconds"] > 0


def undecoded():
    from datasets import Image as ImageFeature

    return ImageFeature(decode=False)


def test_every_size_and_draw_has_pictures_of_its_own(made):
    lines = lines_of(made)
    digests = [line["rows_digest"] for line in lines.values()]
    assert len(set(digests)) == len(digests) == len(SELECTIONS) * 4
    images = Bundle(made / "bundle").array("toy/train/images")
    for n_images in (1, 2):
        drawn = [images[lines[("dm", f"{n_images} a class", draw)]["rows"]] for draw in (0, 1)]
        assert (drawn[0] != drawn[1]).any()
    one, two = (images[lines[("dc", f"{n} a class", 0)]["rows"]] for n in (1, 2))
    assert (one == two[:N_CLASSES]).all()  # a prefix


def test_soft_labels_stand_at_the_numbers_of_their_classes(tmp_path):
    """Also where a class between them has no rows."""
    for name, n in (("train", 60), ("test", 30)):
        write_pictures(tmp_path / f"{name}.parquet", n, n, "abcd", (0, 2, 3))
    suite = write(tmp_path, tmp_path / "toy.yaml", {"krr": SELECTIONS["krr"]})
    prepare(suite, tmp_path / "bundle", tmp_path / "work")
    bundle, line = Bundle(tmp_path / "bundle"), lines_of(tmp_path)[("krr", "1 a class", 0)]
    soft = bundle.array("toy/train/soft_labels")[line["rows"]]
    kept = set_of(tmp_path, "krr", images_per_class=1, seed=0).dataset
    assert (
        np.array_equal(soft[:, [0, 2, 3]], np.float32(kept["soft_label"])) and not soft[:, 1].any()
    )
    assert bundle.array("toy/train/labels")[line["rows"]].tolist() == [0, 2, 3]


def test_soft_labels_are_packed_and_counted_and_hard_ones_are_the_same_set(made):
    bundle, lines = Bundle(made / "bundle"), lines_of(made)
    soft, hard = (lines[(name, "2 a class", 0)] for name in ("krr", "krr, hard"))
    images = bundle.array("toy/train/images")
    assert (images[soft["rows"]] == images[hard["rows"]]).all()
    assert soft["is_soft"] and not hard["is_soft"]
    assert soft["bytes"] - hard["bytes"] == 4 * N_CLASSES * 2 * N_CLASSES
    learnt = np.array(set_of(made, "krr", images_per_class=2, seed=0).dataset["soft_label"])
    packed = bundle.array("toy/train/soft_labels")
    assert (packed[soft["rows"]] == learnt.astype(np.float32)).all()
    np.testing.assert_allclose(packed.sum(1), 1, rtol=1e-5)
    whole = lines[("random", "2 a class", 0)]["rows"]
    assert (packed[whole].argmax(1) == bundle.array("toy/train/labels")[whole]).all()


def test_same_bytes_are_as_many_rows_as_fit(made):
    lines, labels = lines_of(made), Bundle(made / "bundle").array("toy/train/labels")
    for n_images in (1, 2):
        for draw in (0, 1):
            keep = f"{n_images} a class"
            own = lines[("random, bytes of krr", keep, draw)]
            room = lines[("krr", keep, draw)]["bytes"]
            assert own["bytes"] <= room < own["bytes"] + 200  # a picture has about 100
            assert own["keep_ratio"] == N_CLASSES * n_images / 60
            assert np.ptp(np.bincount(labels[own["rows"]], minlength=N_CLASSES)) <= 1


def test_cells_are_trained_and_their_lines_say_what_the_set_is(made, tmp_path):
    suite, output = str(made / "toy.yaml"), tmp_path / "toy.jsonl"
    assert run_suite(suite, made / "bundle", output, device="cpu", n_jobs=1) == 0
    lines = read_lines(output)
    assert len(lines) == len(SELECTIONS) * 4
    for line in lines:
        is_condensed = "condense" in SELECTIONS[line["selection"]]
        assert (line["condensed"] is not None) == is_condensed
        assert line["labels"] == ("soft" if line["selection"] == "krr" else "hard")
        assert line["steps"] == 2 and line["bytes"] > 0
    assert all(line["condensed"]["learnt_rate"] is None for line in lines if line["condensed"])
    (group,) = summarise(lines)
    assert {row.n_images for row in group.rows} == {1, 2}
    assert "| 2 a class | mdc " in markdown([group])


def test_sets_are_made_once_and_other_pixels_are_other_cells(made, tmp_path, monkeypatch):
    from dq_multimodal.condensation import pipeline

    few = {name: SELECTIONS[name] for name in ("random", "dm")}
    monkeypatch.setattr(pipeline, "run_loop", None)  # everything is there already
    suite = write(made, tmp_path / "toy.yaml", few)
    prepare(suite, tmp_path / "bundle", made / "work")
    monkeypatch.undo()
    other = {**few, "dm": few["dm"] | {"init": "noise"}}
    suite = write(made, tmp_path / "toy.yaml", other)
    prepare(suite, tmp_path / "other", made / "work")
    found = []
    for folder in ("bundle", "other"):
        read, choices = read_suite(suite), Choices(Bundle(tmp_path / folder))
        cells = [cell for cell in read.cells if cell.selection == "dm"]
        for cell in cells:
            line = choices.of(cell)
            choices.lines[cell.task, cell.selection, cell.keep, cell.draw] = line | {
                "options": "{}"
            }
        found += [describe(cell, read, choices)["digest"] for cell in cells]
    assert len(set(found)) == len(found) == 8


@pytest.mark.slow
def test_sets_that_are_made_side_by_side_are_those_that_are_made_in_turn(
    made, tmp_path, monkeypatch
):
    few = {name: SELECTIONS[name] for name in ("random", "dm")}
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    prepare(write(made, tmp_path / "toy.yaml", few), tmp_path / "bundle", tmp_path / "work")
    lines = Bundle(tmp_path / "bundle").table("toy/selections").to_pylist()
    own = {key: line["rows_digest"] for key, line in lines_of(made).items() if key[0] in few}
    assert [*own.values()] == [line["rows_digest"] for line in lines]


def test_digests_differ_where_one_pixel_or_label_does():
    pixels, classes = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])
    soft = np.eye(2, dtype=np.float32)
    one = Added(pixels, classes, soft)
    other = pixels.copy()
    other[1, 2, 3, 0] = 1
    changed = [
        replace(one, images=other),
        replace(one, classes=classes[::-1]),
        replace(one, soft=soft * 0.5),
        replace(one, soft=None),
    ]
    assert len({x.digest for x in (one, *changed)}) == 5
    assert one.digest == Added(pixels.copy(), classes.copy(), soft.copy()).digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"condense": "dm", "spin": 3}, "no option spin of condense"),
        ({"condense": "dm", "stored_as": "float16"}, "no option stored_as"),
        ({"condense": "dm", "use_soft": True, **QUICK}, "learns no labels"),
        ({"method": "random", "same_bytes_as": "nothing"}, "no selection nothing"),
    ],
)
def test_wrong_condensed_selections_are_one_line(made, tmp_path, changes, said):
    suite = write(made, tmp_path / "w.yaml", {"random": {"method": "random"}, "x": changes})
    with pytest.raises(InputError, match=said):
        prepare(suite, tmp_path / "bundle", tmp_path / "work")


def test_the_loss_of_soft_labels_is_the_soft_cross_entropy(monkeypatch):
    """One step of plain SGD from known weights: the gradient of - sum_k y_k log p_k by hand."""

    nets = []
    monkeypatch.setattr(images, "build_net", lambda *a: nets.append(Line()) or nets[-1])
    pack, given = Pack(), np.random.default_rng(0).dirichlet([1, 1], 96).astype(np.float32)
    pack.arrays["t/train/soft_labels"] = given
    same = {"crop": "none", "mirror": False, "momentum": 0.0, "weight_decay": 0.0, "epochs": 1}
    protocol = images.Protocol(batch_size=8, learning_rate=0.1, precision="float32", **same)
    job = Job("t", protocol, "line", np.arange(8), 1.0, 0, is_soft=True)
    images.train(job, pack, CPU, lambda share: None)
    pixels = pack.arrays["t/train/images"][:8].astype(float)
    features = ((pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))).mean((1, 2))
    slope = np.zeros(2)
    for x, y in zip(features, given, strict=False):
        logits = torch.full((2,), 0.1 * x.sum(), dtype=torch.float64, requires_grad=True)
        p = logits.exp() / logits.exp().sum()
        (-(torch.tensor(y) * p.log()).sum() / 8).backward()
        slope += logits.grad.numpy()
    np.testing.assert_allclose(nets[0].line.bias.detach().numpy(), -0.1 * slope, atol=1e-6)


def test_the_eval_net_is_the_one_of_the_papers():
    net = images.build_net("convnet-d3", 10, 32)
    assert sum(p.numel() for p in net.parameters()) == 320_010  # as in the papers' code
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    net = images.build_net("convnet/4", 3, 8)
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert max(p.shape[0] for p in net.parameters()) == 4


def test_made_sets_have_parts_without_rows_in_common(tmp_path, monkeypatch):
    from harness import made

    monkeypatch.setattr(made, "FOLDER", tmp_path)
    train, test = read_digits("train"), read_digits("test")
    assert len(test[0]) == N_TEST_DIGITS and len(train[0]) == 1797 - N_TEST_DIGITS
    assert train[0].shape[1:] == (8, 8) and train[0].max() == 255
    place = find_place("made:digits-test")
    before = (tmp_path / "digits-test-1.parquet").read_bytes()
    (tmp_path / "digits-test-1.parquet").unlink()
    assert made.make_pictures("digits-test") == place
    assert (tmp_path / "digits-test-1.parquet").read_bytes() == before
    for name in ("digits", "digits-all", "shoes-train"):
        with pytest.raises(InputError, match="there are digits-train"):
            made.make_pictures(name)
    for name in GARMENTS:
        one, same, other = (draw_garment(name, np.random.default_rng(k)) for k in (0, 0, 1))
        assert (one == same).all() and (one != other).any()
        assert 0.05 < (one > 0).mean() < 0.7 and not one[0, 0]
