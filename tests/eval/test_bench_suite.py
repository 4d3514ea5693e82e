"""Suites, bundles and results files of eval/harness: what is asked, carried and written down."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from harness.bundle import PART_BYTES, Bundle, BundleWriter
from harness.results import appending, key_of, read_lines
from harness.suite import (
    EVAL,
    at_ratio,
    images_of,
    is_same_rows,
    read_suite,
    resolve,
    results_of,
    trainer_of,
)

from dq_multimodal.config import InputError

SUITE: dict[str, Any] = {
    "decides": "Whether it works.",
    "tasks": {
        "toy": {"kind": "image", "dataset": "toy.parquet", "test": "test.parquet"},
        "words": {"kind": "text", "dataset": "words.parquet"},
    },
    "protocols": {"quick": {"like": "probe"}},
    "selections": {
        "random": {"method": "random"},
        "dq": {"method": "dq"},
        "ranked": {"method": "dq", "draw": "rank"},
        "published": {"row_list": "rows.npy"},
        "dc": {"condense": "dc"},
        "dc at 10": {"condense": "dc", "images_per_class": 10},
    },
    "compare": [
        {
            "task": "toy",
            "protocol": "quick",
            "nets": ["logistic regression"],
            "keep_ratios": [0.1, 0.5],
            "selections": ["random", "ranked"],
            "draws": 2,
            "seeds": 2,
        }
    ],
}


def write(folder, **changes):
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}, sort_keys=False))
    return str(path)


def group(**changes):
    return [{**SUITE["compare"][0], **changes}]


def per_class(sizes, *selections, **changes):
    """Make a group of images a class."""
    changes = {"protocol": "condensed", "selections": list(selections) or ["random"]} | changes
    (found,) = group(images_per_class=sizes, **changes)
    del found["keep_ratios"]
    return [found]


def test_images_a_class_are_a_size(tmp_path):
    compare = per_class([1, 10], "random", "dc at 10")
    cells = read_suite(write(tmp_path, compare=compare)).cells
    assert [c.keep for c in cells[:4]] == ["1 a class"] * 2 + ["10 a class"] * 2
    assert [images_of(c.keep) for c in cells[:4]] == [1, 1, 10, 10]
    assert [*map(images_of, (0.1, 1.0, "published", "a class", "x a class"))] == [None] * 5


def test_a_group_is_one_draw_of_everything_after_the_other(tmp_path):
    cells = read_suite(write(tmp_path)).cells
    places = [(c.draw, c.seed, c.keep, c.selection) for c in cells if not c.is_fixed]
    assert places == [(d, s, k, "random") for d in (0, 1) for s in (0, 1) for k in (0.1, 0.5)]
    assert [(c.draw, c.seed, c.keep) for c in cells if c.is_fixed] == [(0, 0, 0.1), (0, 0, 0.5)]


def test_pairs_share_the_training_seed_and_no_two_selections_the_draw(tmp_path):
    suite = read_suite(
        write(tmp_path, compare=group(protocol="paper", selections=["random", "dq"]))
    )
    seeds = {(c.draw, c.seed): c.training_seed for c in suite.cells if c.selection == "random"}
    assert len(set(seeds.values())) == 4
    assert all(seeds[(c.draw, c.seed)] == c.training_seed for c in suite.cells)
    drawn = [suite.draw_seed(name, draw) for name in SUITE["selections"] for draw in range(10)]
    assert len(set(drawn)) == len(drawn)


def test_only_training_without_noise_makes_same_rows_a_fixed_cell(tmp_path):
    trained = read_suite(write(tmp_path, compare=group(protocol="paper"))).cells
    assert not any(cell.is_fixed for cell in trained) and len(trained) == 16
    whole = read_suite(write(tmp_path, compare=group(keep_ratios=[1.0], selections=["dq"]))).cells
    assert [cell.is_fixed for cell in whole] == [True]
    listed = group(keep_ratios=["published"], selections=["random", "published"], seeds=1)
    found = read_suite(write(tmp_path, compare=listed)).cells
    assert [(c.selection, c.is_fixed) for c in found] == [
        ("random", False),
        ("published", True),
        ("random", False),
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compare": group(task="other")}, "no task other"),
        ({"compare": group(protocol="other")}, "no protocol other"),
        ({"compare": group(selections=["other"])}, "no selection other"),
        ({"compare": group(keep_ratios=[0])}, "in (0, 1] or name a row list, got 0"),
        ({"compare": group(keep_ratios=[1.5])}, "got 1.5"),
        ({"compare": group(keep_ratios=["dq"])}, "got dq"),
        ({"compare": group(drawz=3)}, "no key drawz"),
        ({"compare": [{"task": "toy"}]}, "compare[0] has no nets"),
        ({"compare": group(images_per_class=[1])}, "wanted keep_ratios or images_per_class"),
        *[({"compare": per_class([x])}, "images_per_class") for x in (0, 0.5, "1")],
        ({"compare": per_class([11], "dc at 10")}, "dc at 10 has 10 images a class, asked for 11"),
        ({"compare": group(selections=["dc"])}, "dc is condensed: wanted images_per_class"),
        ({"compare": per_class([1], "dc", protocol="quick")}, "dc is condensed, and protocol"),
        ({"selektions": {}}, "no key selektions"),
        *[({"compare": group(keep_ratios=[x])}, "(0, 1]") for x in (True, float("nan"), None, [1])],
        *[({"decides": x}, "decides must ") for x in (5, None, "", " ", ["x"])],
        *[({"compare": x}, "compare must ") for x in ([], {}, None, "toy")],
        *[({"compare": [x]}, "compare[0] must be") for x in (None, "toy", [])],
        *[({"compare": group(nets=x)}, "nets must ") for x in (None, "resnet18", [], {})],
        *[({"compare": group(selections=x)}, "selections must ") for x in (None, "dq", [])],
        *[({"compare": group(keep_ratios=x)}, "keep_ratios must ") for x in (None, 0.1, "a", [])],
        ({"compare": group(nets=[5])}, "nets[0] must be str, got 5"),
        *[({"compare": group(draws=x)}, "draws must be") for x in ("3", 1.5, 0, -1, None, True)],
        *[({"compare": group(seeds=x)}, "seeds must be") for x in ("3", 0, None, 1001)],
        ({"compare": group(task=["toy"])}, "task must be str"),
        ({"compare": group(protocol=None)}, "protocol must be str"),
        *[({"selections": x}, "selections must be dict") for x in (None, ["dq"], "dq")],
        *[({"selections": {"dq": x}}, "selections.dq must be dict") for x in (None, "dq", [])],
        ({"selections": {}}, "selections must not be empty"),
        ({"selections": {1: {"method": "dq"}}}, "selections must be str, got 1"),
        *[({"tasks": x}, "tasks must be dict") for x in (None, [], "toy")],
        *[({"protocols": x}, "protocols must be dict") for x in (None, [], "quick")],
        (
            {"protocols": {"quick": {}}},
            "protocol quick: trainer must be one of image, text, probe, vqa",
        ),
        ({"protocols": {"quick": {"trainer": "probe"}}}, "protocol quick: "),
        ({"protocols": {"quick": {"like": ["probe"]}}}, "no ['probe']"),
        (
            {"tasks": {"toy": {"kind": "sound"}}},
            "kind must be one of image, text, image-text, got 'sound'",
        ),
        ({"compare": group(protocol="sft")}, "protocol sft is for text, and task toy is of image"),
        (
            {"compare": group(task="words", protocol="paper")},
            "is for image, and task words is",
        ),
        ({"protocols": {"quick": {"like": "nothing"}}}, "no nothing"),
        ({"protocols": {"quick": {"like": "quick"}}}, "no quick"),
        ({"protocols": {"quick": {"like": "probe", "spin": 3}}}, "protocol quick"),
    ],
)
def test_a_wrong_suite_is_one_line(tmp_path, changes, said):
    with pytest.raises(InputError) as raised:
        read_suite(write(tmp_path, **changes))
    assert said in str(raised.value)


def test_the_probe_takes_images_and_texts_and_one_is_1(tmp_path):
    asked = group(task="words", keep_ratios=[1, 1.0], selections=["dq"])
    (cell,) = read_suite(write(tmp_path, compare=asked)).cells
    assert (cell.keep, type(cell.keep)) == (1.0, float)
    asked = group(nets=["a", "a"], protocol="paper", keep_ratios=[1.0, 1], draws=1, seeds=1)
    assert len(read_suite(write(tmp_path, compare=asked)).cells) == 2


@pytest.mark.parametrize(
    ("name", "options", "keep", "is_same"),
    [
        ("a", {"method": "graphcut"}, 0.1, True),
        ("a", {"method": "dq", "draw": "rank"}, 0.1, True),
        ("a", {"method": "adq", "draw": "rank"}, 0.1, True),
        ("a", {"method": "random", "draw": "rank"}, 0.1, False),
        ("a", {"method": "dq"}, 0.1, False),
        ("a", {"method": "coverage", "difficulty": "cad"}, 0.1, True),
        ("a", {"method": "blocks"}, 0.1, False),
        ("a", {"by_length": True}, 0.1, True),
        ("a", {"row_list": "a.npy"}, "a", True),
        ("a", {"row_list": "a.npy"}, "b", False),
        ("a", {"row_list": "a.npy"}, 0.1, False),
        ("a", {"method": "dq"}, "a", False),
    ],
)
def test_which_selections_take_the_same_rows_in_every_draw(name, options, keep, is_same):
    assert is_same_rows(name, options, keep) is is_same


def test_a_suite_has_its_whole_name_and_not_the_results_of_another(tmp_path):
    written = write(tmp_path)
    dotted = Path(written).rename(tmp_path / "a.b.yaml")
    assert read_suite(str(dotted)).name == "a.b"
    assert results_of(str(dotted)) == EVAL / "results" / "a.b.jsonl"
    of_small = EVAL / "results" / "small.jsonl"
    assert results_of("small") == results_of(str(EVAL / "suites" / "small.yaml")) == of_small
    assert results_of(str(EVAL / "suites" / ".." / "suites" / "small.yaml")) == of_small
    with pytest.raises(InputError, match=r"--results.*small\.yaml"):
        results_of(str(dotted.rename(tmp_path / "small.yaml")))


GOOD: dict[str, dict[str, Any]] = {
    "image": {"batch_size": 16, "learning_rate": 0.1, "epochs": 1},
    "text": {"batch_size": 4, "learning_rate": 1e-3, "steps": 6},
    "probe": {"penalties": {1: 250}},
}


@pytest.mark.parametrize(
    ("trainer", "settings", "said"),
    [
        ("image", {"epochs": None}, "wanted epochs or steps, got None and None"),
        ("image", {"steps": 5}, "wanted epochs or steps, got 1 and 5"),
        ("image", {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ("image", {"batch_size": {0.1: 4}}, "rising keys up to 1.0"),
        ("image", {"batch_size": {0.5: 4, 0.1: 8, 1.0: 9}}, "rising keys up to 1.0"),
        ("image", {"learning_rate": float("nan")}, "learning_rate must lie in (0, inf), got nan"),
        ("image", {"warmup": 1.0}, "warmup must lie in [0, 1), got 1.0"),
        ("image", {"crop": "wrap"}, "crop must be one of none, zero, reflect, got 'wrap'"),
        ("image", {"cutout": -1}, "cutout must be a whole number of at least 0, got -1"),
        ("image", {"mirror": "yes"}, "mirror must be true or false"),
        ("text", {"steps": None}, "wanted steps or response_tokens, got None and None"),
        ("text", {"response_tokens": 5}, "wanted steps or response_tokens, got 6 and 5"),
        ("text", {"steps": {0.5: 3}}, "steps by keep ratio must have rising keys up to 1"),
        ("text", {"steps": {1: 0}}, "steps must be a whole number of at least 1, got 0"),
        ("text", {"test_rows": 0}, "test_rows must be a whole number"),
        ("text", {"learning_rate": 0}, "learning_rate must lie in (0, inf), got 0"),
        ("text", {"learning_rate": "1e-5"}, "learning_rate must lie in (0, inf), got '1e-5'"),
        ("text", {"precision": "some"}, "precision must be one of auto, bf16, float32"),
        ("probe", {"penalties": {}}, "rising keys up to 1.0"),
        ("probe", {"penalties": {0.5: 250}}, "rising keys up to 1.0"),
        ("probe", {"penalties": {1: True}}, "penalties must lie in (0, inf), got True"),
        ("probe", {"tolerance": 0}, "tolerance must lie in (0, inf), got 0"),
        ("probe", {"max_iterations": 2.5}, "max_iterations must be a whole number"),
    ],
)
def test_settings_that_mean_nothing_are_one_line(trainer, settings, said):
    trainer_of(trainer).Protocol(**GOOD[trainer])
    with pytest.raises(InputError) as raised:
        trainer_of(trainer).Protocol(**(GOOD[trainer] | settings))
    assert said in str(raised.value)


def test_the_named_protocols_are_those_of_the_papers():
    found = resolve("protocol", yaml.safe_load((EVAL / "protocols.yaml").read_text()))
    named = {name: trainer_of(s.pop("trainer")).Protocol(**s) for name, s in found.items()}
    count_steps = trainer_of("image").count_steps
    assert count_steps(named["paper"], 50_000, 1.0) == (128, 200 * 390)
    assert named["paper_steps"].steps == 200 * 390
    assert at_ratio(named["paper_batch16"].batch_size, 0.125) == 16
    assert all(at_ratio(named["probe"].penalties, ratio) == 250 for ratio in (0.001, 0.3, 1))


def test_every_committed_suite_can_be_read():
    paths = sorted((EVAL / "suites").glob("*.yaml"))
    assert paths
    for path in paths:
        suite = read_suite(path.stem)
        assert suite.cells and suite.decides, path


def test_a_bundle_gives_back_what_was_added_in_parts(tmp_path):
    writer = BundleWriter(tmp_path / "bundle")
    array = np.random.default_rng(0).integers(0, 255, (40, 1000, 1000), dtype=np.uint8)
    table = pa.table({"ids": [[k, k + 1] for k in range(1000)]})
    (tmp_path / "model.gguf").write_bytes(array.tobytes())
    writer.add_array("a/images", array)
    writer.add_array("a/none", np.zeros((0, 3), np.float32))
    writer.add_table("a/texts", table)
    writer.add_file("models/m/model.gguf", tmp_path / "model.gguf")
    writer.finish({"tasks": {}})
    parts = list((tmp_path / "bundle" / "parts").iterdir())
    assert max(part.stat().st_size for part in parts) <= PART_BYTES
    moved = (tmp_path / "bundle").rename(tmp_path / "moved")
    (tmp_path / "model.gguf").unlink()
    bundle = Bundle(moved)
    assert (bundle.array("a/images") == array).all() and bundle.array("a/none").shape == (0, 3)
    assert bundle.table("a/texts").equals(table) and not bundle.names("a/other")
    assert (bundle.folder("models/m") / "model.gguf").read_bytes() == array.tobytes()


def test_a_bundle_that_is_not_whole_is_refused(tmp_path):
    writer = BundleWriter(tmp_path)
    writer.add_array("x", np.arange(9))
    with pytest.raises(InputError, match="is no bundle"):
        Bundle(tmp_path)
    writer.finish({"tasks": {}})
    part = next((tmp_path / "parts").iterdir())
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(InputError, match="not as it was written"):
        Bundle(tmp_path).array("x")
    part.unlink()
    with pytest.raises(InputError, match="is missing"):
        Bundle(tmp_path).array("x")


def test_a_bundle_is_not_written_over_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other things"):
        BundleWriter(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


LINE = {
    "task": "toy", "selection": "dq", "keep": 0.1, "protocol": "quick", "net": "n", "draw": 0,
    "seed": 0, "digest": "d", "device": {"type": "cpu"}, "metrics": {"loss": {"last": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("cut_short", [True, False])
def test_what_a_kill_left_of_a_line_is_dropped_and_a_whole_line_kept(tmp_path, cut_short):
    path, other = tmp_path / "toy.jsonl", {**LINE, "draw": 1}
    path.write_text(json.dumps(LINE) + ("\n" + json.dumps(LINE)[:40] if cut_short else ""))
    assert read_lines(path) == [LINE]
    with appending(path) as append:
        assert read_lines(path) == [LINE]
        append(other)
    assert read_lines(path) == [LINE, other]
    assert key_of(LINE) != key_of(LINE, "cuda") and key_of(LINE) != key_of(other)


def test_a_results_file_has_one_writer_and_only_results(tmp_path):
    path = tmp_path / "toy.jsonl"
    with appending(path), pytest.raises(InputError, match="another run"), appending(path):
        pass
    without = {name: value for name, value in LINE.items() if name != "metrics"}
    for wrong in ({}, [], without, {**LINE, "metrics": {"loss": {}}}, {**LINE, "net": []}):
        path.write_text(json.dumps(LINE) + "\n" + json.dumps(wrong) + "\n")
        with pytest.raises(InputError, match="line 2 is no result"):
            read_lines(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="line 1 is no result"):
        read_lines(path)
    with pytest.raises(InputError, match=r"cannot read .* Is a directory"):
        read_lines(tmp_path)
    with pytest.raises(InputError, match=r"cannot write .* Is a directory"), appending(tmp_path):
        pass
    with pytest.raises(InputError, match="cannot write"), appending(path / "below.jsonl"):
        pass
