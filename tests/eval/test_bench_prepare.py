"""eval/bench.py prepare: the rows of a bundle are those that `compress` keeps."""

import io
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import bench
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from harness.bundle import Bundle
from harness.prepare import TextTask, prepare
from harness.results import read_lines
from harness.selections import read_row_list
from harness.suite import EVAL, read_suite
from harness.texts import split_held_out
from PIL import Image

from dq_multimodal import compress
from dq_multimodal.config import InputError

N_TRAIN, N_TEST, SIDE = 90, 30, 16
SELECTIONS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "plain random": {"method": "random", "by_class": False},
    "dq": {"method": "dq", "n_bins": 3},
    "ranked": {"method": "dq", "n_bins": 3, "draw": "rank"},
    "adq": {"method": "adq", "n_bins": 3},
    "graphcut": {"method": "graphcut"},
    "patches": {"method": "random", "drop_ratio": 0.25, "attribution": "random", "fill": "zero"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, an untrained encoder, dynamics, a published list of rows."""
    import torch
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier

    place, rng = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    for name, n in (("train", N_TRAIN), ("test", N_TEST)):
        labels, images = rng.integers(0, 3, n), []
        pixels = 70 * labels[:, None, None, None] + rng.integers(0, 70, (n, SIDE, SIDE, 3))
        for picture in pixels.astype(np.uint8):
            Image.fromarray(picture).save(buffer := io.BytesIO(), "PNG")
            images.append({"bytes": buffer.getvalue()})
        rows = {"img": images, "label": labels.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(place / f"{name}.parquet")
    torch.manual_seed(0)
    net = build_classifier("resnet10-narrow", 3, SIDE)
    about = Classifier("resnet10-narrow", SIDE, 3, ("a", "b", "c"), (0.5,) * 3, (0.3,) * 3)
    save_classifier(net, about, place / "encoder")
    np.save(place / "published.npy", np.array([88, 3, 41, 7, 12, 60]))
    own, other = rng.uniform(0, 0.6, (2, 4, N_TRAIN))
    other = np.minimum(other, 1 - own)
    values = np.stack([own, other, np.sqrt((1 - own) ** 2 + other**2)], axis=2)
    np.save(place / "dynamics.npy", values.astype(np.float16))
    return place


def group_of(*selections, **changes):
    found = {"task": "toy", "protocol": "short", "nets": ["resnet10-narrow"], "draws": 1}
    return {**found, "keep_ratios": [0.2], "selections": list(selections), **changes}


def write(folder, path, *groups, task=None, selections=None, **tasks):
    """Write a suite on the images of a folder."""
    toy = {"kind": "image", "dataset": str(folder / "train.parquet")}
    toy |= {"test": str(folder / "test.parquet"), "encoder": str(folder / "encoder")}
    published = {"row_list": str(folder / "published.npy")}
    suite = {
        "decides": "Whether it works.",
        "tasks": {"toy": toy | (task or {}), **tasks},
        "protocols": {"short": {"like": "small", "epochs": None, "steps": 2, "batch_size": 8}},
        "selections": SELECTIONS | {"published": published} | (selections or {}),
        "compare": list(groups),
    }
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return str(path)


def keep(folder, out, **options):
    """Keep 20 % of the images of a folder."""
    about = {"embedding_model": str(folder / "encoder"), "keep_ratio": 0.2, "report": False}
    return compress(str(folder / "train.parquet"), **about, **options, output_dir=out)


@pytest.fixture(scope="module")
def made(folder):
    """The bundle of all kinds of selections."""
    listed = group_of("random", "published", keep_ratios=["published"], draws=2)
    suite = write(folder, folder / "toy.yaml", group_of(*SELECTIONS, draws=2), listed)
    prepare(suite, folder / "bundle", folder / "work")
    return folder / "bundle"


def chosen(bundle, task="toy"):
    lines = bundle.table(f"{task}/selections").to_pylist()
    return {(line["selection"], line["keep"], line["draw"]): line for line in lines}


def pixels_of(folder, rows):
    files = pq.read_table(folder / "train.parquet")["img"].to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(files[row]["bytes"]))) for row in rows])


@pytest.mark.parametrize("name", ["random", "dq", "ranked", "adq", "graphcut"])
def test_the_rows_are_those_that_compress_keeps(folder, made, name):
    bundle, suite = Bundle(made), read_suite(str(folder / "toy.yaml"))
    labels = np.array(pq.read_table(folder / "train.parquet")["label"])
    # scores of adq depend on the seed of a run, and a suite makes them once, with seed 0
    start = keep(folder, folder / "runs" / name, **SELECTIONS[name])
    for draw in (0, 1):
        line, place = chosen(bundle)[(name, "0.2", draw)], folder / "runs" / f"{name}-{draw}"
        run = start.resample(0.2, seed=suite.draw_seed(name, draw), output_dir=place)
        assert len(line["rows"]) == 18 and line["keep_ratio"] == 0.2
        assert (bundle.array("toy/train/images")[line["rows"]] == pixels_of(folder, run.kept)).all()
        assert (bundle.array("toy/train/labels")[line["rows"]] == labels[run.kept]).all()


def test_random_is_by_class_and_a_published_list_is_kept_as_it_is(folder, made):
    bundle = Bundle(made)
    labels, lines = bundle.array("toy/train/labels"), chosen(bundle)
    whole = np.bincount(np.array(pq.read_table(folder / "train.parquet")["label"]))
    for draw in (0, 1):
        counts = np.bincount(labels[lines[("random", "0.2", draw)]["rows"]], minlength=3)
        assert np.abs(counts - 0.2 * whole).max() <= 1
    rows = [tuple(lines[(n, "0.2", d)]["rows"]) for n in ("random", "plain random") for d in (0, 1)]
    assert len(set(rows)) == 4
    line = lines[("published", "published", 0)]
    listed = bundle.array("toy/train/images")[line["rows"]]
    assert (listed == pixels_of(folder, [3, 7, 12, 41, 60, 88])).all()
    assert len(lines[("random", "published", 1)]["rows"]) == 6
    assert line["proxy_seconds"] is None


def test_dropped_patches_are_filled_and_the_others_as_they_were(folder, made):
    bundle, suite = Bundle(made), read_suite(str(folder / "toy.yaml"))
    line = chosen(bundle)[("patches", "0.2", 1)]
    seed = suite.draw_seed("patches", 1)
    run = keep(folder, folder / "runs" / "patches", method="random", seed=seed)
    filled = bundle.array("toy/train/images")[line["rows"]]
    is_hole = (filled == 0).all(axis=3)
    assert (is_hole.mean(axis=(1, 2)) > 0.24).all() and is_hole.mean() < 0.27
    assert (filled[~is_hole] == pixels_of(folder, run.kept)[~is_hole]).all()
    assert line["bytes"] > 0
    assert bundle.array("toy/test/images").shape == (N_TEST, SIDE, SIDE, 3)


def test_rows_and_weights_are_those_of_compress(folder, tmp_path):
    given = {"dynamics": str(folder / "dynamics.npy")}
    selections: dict[str, dict[str, Any]] = {
        "random": {"method": "random"},
        "coverage": {"method": "coverage"},
        "cad": {"method": "coverage", "difficulty": "cad", "noise_ratio": 0.2, **given},
        "sampled": {"method": "coverage", "use_weights": "sample"},
        "plain": {"method": "coverage", "use_weights": "none"},
        "blocks": {"method": "blocks"},
        "ccs": {"method": "ccs", **given},
        "dual": {"method": "dual", **given},
    }
    suite = write(folder, tmp_path / "w.yaml", group_of(*selections), selections=selections)
    prepare(suite, tmp_path / "bundle", tmp_path / "work")
    lines, read = chosen(Bundle(tmp_path / "bundle")), read_suite(suite)
    images = Bundle(tmp_path / "bundle").array("toy/train/images")
    for name, options in selections.items():
        line, use = lines[(name, "0.2", 0)], options.get("use_weights", "loss")
        own = {k: v for k, v in options.items() if k != "use_weights"}
        run = keep(folder, tmp_path / name, seed=read.draw_seed(name, 0), **own)
        assert (images[line["rows"]] == pixels_of(folder, run.kept)).all()
        if name in ("coverage", "cad", "sampled", "ccs"):
            np.testing.assert_allclose(line["weights"], run.subset["dq_weight"], rtol=1e-6)
            assert np.ptp(line["weights"]) > 0.1 and np.mean(line["weights"]) == pytest.approx(1)
            assert line["use_weights"] == use
        else:
            assert line["weights"] is None and line["use_weights"] == "none"
        assert "use_weights" not in json.loads(line["options"])
    same = [lines[(name, "0.2", 0)] for name in ("coverage", "sampled", "plain")]
    assert same[0]["rows"] == same[1]["rows"] == same[2]["rows"]
    assert same[0]["weights"] == same[1]["weights"]
    assert len({line["rows_digest"] for line in same}) == 3
    assert lines[("coverage", "0.2", 0)]["rows"] != lines[("cad", "0.2", 0)]["rows"]
    assert lines[("ccs", "0.2", 0)]["proxy_seconds"] is None


def test_selections_without_labels_have_one_stratum_and_the_same_embeddings(folder, tmp_path):
    group = group_of("random", "coverage")
    about = {"selections": {"coverage": {"method": "coverage"}}}
    about["blind"] = {"like": "toy", "unlabelled": True}
    suite = write(folder, tmp_path / "blind.yaml", group, {**group, "task": "blind"}, **about)
    prepare(suite, tmp_path / "bundle", tmp_path / "work")
    bundle = Bundle(tmp_path / "bundle")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["toy"]
    runs = sorted((tmp_path / "work" / "toy").iterdir())
    assert [p.name.split("-")[0] for p in runs] == [*["coverage"] * 2, "dq", *["random"] * 2]
    assert all(str(runs[2]) in (run / "config.yaml").read_text() for run in runs[:2])
    kept = {
        (task, name): np.bincount(bundle.array(f"{task}/train/labels")[line["rows"]], minlength=3)
        for task in ("toy", "blind")
        for (name, _, _), line in chosen(bundle, task).items()
    }
    assert all(found.sum() == 18 for found in kept.values())
    for name in ("random", "coverage"):
        assert np.abs(kept["toy", name] - 0.2 * N_TRAIN / 3).max() < 3
        assert kept["blind", name].tolist() != kept["toy", name].tolist()


def test_a_second_call_finds_it_complete_and_a_failed_one_leaves_it(folder, made, tmp_path, capsys):
    held = (made / "bundle.json").stat().st_mtime_ns
    prepare(str(folder / "toy.yaml"), made, folder / "work")
    assert "already complete" in capsys.readouterr().out
    assert (made / "bundle.json").stat().st_mtime_ns == held
    nowhere = {"test": str(folder / "nowhere.parquet")}
    suite = write(folder, tmp_path / "failed.yaml", group_of("random"), task=nowhere)
    with pytest.raises(InputError, match="nowhere"):
        prepare(suite, made, tmp_path / "work")
    assert Bundle(made).array("toy/train/images").shape[1:] == (SIDE, SIDE, 3)


def test_other_embeddings_make_another_bundle(folder, tmp_path):
    np.save(folder / "other.npy", np.zeros((N_TRAIN, 4), np.float32))
    asked = set()
    for task in ({}, {"embeddings": str(folder / "other.npy")}):
        suite = write(folder, tmp_path / "again.yaml", group_of("random"), task=task)
        prepare(suite, tmp_path / "bundle", tmp_path / "work")
        asked.add(Bundle(tmp_path / "bundle").about["asked"])
    assert len(asked) == 2


def test_prepared_moved_trained_without_the_data_and_laid_out(
    folder, tmp_path, monkeypatch, capsys
):
    few = group_of("random", "dq", keep_ratios=[0.3], draws=2)
    probe = {**few, "protocol": "probe", "nets": ["logistic regression"]}
    suite = write(folder, tmp_path / "moved.yaml", few, probe)
    results = ("--results", tmp_path / "moved.jsonl")
    flags = {
        "prepare": ("--bundle", folder / "few", "--work", folder / "work"),
        "run": ("--bundle", tmp_path / "few", *results),
        "table": (*results, "--figure", tmp_path / "moved.png"),
    }
    for name, given in flags.items():
        words = [name, suite, *map(str, given)]
        if name == "run":  # a process of its own, without the data
            shutil.move(folder / "few", tmp_path / "few")
            (folder / "train.parquet").rename(folder / "away.parquet")
            command = [sys.executable, str(EVAL / "bench.py"), *words, "--jobs", "1"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            (folder / "away.parquet").rename(folder / "train.parquet")
            assert done.returncode == 0, done.stderr
            continue
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        with pytest.raises(SystemExit) as stopped:
            bench.main()
        assert stopped.value.code == 0
    lines = read_lines(tmp_path / "moved.jsonl")
    assert len(lines) == 8 and all(line["rows"] == 27 for line in lines)
    said = capsys.readouterr().out
    assert "Whether it works." in said and said.count("| dq |") == 2


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ({"kind": "sound"}, {}, "kind must be one of image, text, image-text, got 'sound'"),
        ({"colour": 1}, {}, "no key colour"),
        ({"dataset": "/nowhere/*.parquet"}, {}, "/nowhere"),
        ({}, {"method": "best"}, "no method best"),
        ({}, {"method": "random", "row_list": "x"}, "a method or a row_list"),
        ({}, {"method": "random", "by_length": True}, "a method or a row_list"),
        ({}, {"method": "random", "use_weights": "both"}, "use_weights must be one of"),
        ({}, {"method": "random", "target": "task"}, "random: the task has no target"),
        ({}, {"method": "ccs", "dynamics": "/nowhere.npy"}, "/nowhere.npy"),
        ({}, {"method": "random", "n_bims": 3}, "n_bims"),
        ({}, {"method": "dq", "by_class": False}, "by_class false is for random"),
        ({}, {"method": "random", "seed": 3}, "seed"),
        ({}, {"method": "dq", "embeddings": "missing.npy"}, "embeddings"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_and_no_bundle(folder, tmp_path, task, options, said):
    changes = {"task": task, "selections": {"random": options} if options else {}}
    path = write(folder, tmp_path / "wrong.yaml", group_of("random"), **changes)
    with pytest.raises(InputError) as raised:
        prepare(path, tmp_path / "bundle", tmp_path / "work")
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "bundle" / "bundle.json").exists()


def test_the_order_of_selections_changes_no_row(folder, tmp_path):
    rows = []
    for k, names in enumerate((["random", "graphcut", "adq"], ["adq", "graphcut", "random"])):
        suite = write(folder, tmp_path / "order.yaml", group_of(*names))
        prepare(suite, tmp_path / f"bundle{k}", tmp_path / f"work{k}")
        bundle = Bundle(tmp_path / f"bundle{k}")
        lines, images = chosen(bundle), bundle.array("toy/train/images")
        rows.append({name: images[lines[(name, "0.2", 0)]["rows"]] for name in names})
        assert lines[("graphcut", "0.2", 0)]["proxy_seconds"] > 0.01
    assert all((rows[0][name] == rows[1][name]).all() for name in rows[0])


def test_the_digests_change_with_what_a_cell_depends_on(folder, tmp_path):
    other = tmp_path / "encoder"
    shutil.copytree(folder / "encoder", other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    of_train, found = {"test": str(folder / "train.parquet")}, []
    for k, task in enumerate(({}, {"encoder": str(other)}, {"image_size": 8}, of_train)):
        groups = (group_of("random"), group_of("random", protocol="probe"))
        suite = write(folder, tmp_path / "digest.yaml", *groups, task=task)
        prepare(suite, tmp_path / f"bundle{k}", tmp_path / f"work{k}")
        found.append(Bundle(tmp_path / f"bundle{k}").about["tasks"]["toy"]["digests"])
    assert found[1]["image"] == found[0]["image"] and found[1]["probe"] != found[0]["probe"]
    assert len({digests["image"] for digests in found}) == 3
    assert len({digests["probe"] for digests in found}) == 4


def test_published_lists_of_the_committed_suites_are_found(real_data):
    names = set()
    for path in sorted((EVAL / "suites").glob("*.yaml")):
        for name, options in read_suite(path.stem).selections.items():
            if "row_list" in options:
                names.add(name)
                assert len(read_row_list(name, options)) > 1000
    assert {"published dq", "alpagasus", "cherry"} <= names


def test_row_lists_of_json_records_and_wrong_ones(tmp_path):
    path = tmp_path / "lists.json"
    path.write_text(json.dumps([{"repo": "x", "indices": [5, 1]}, {"repo": "y", "indices": [2]}]))
    options = {"row_list": str(path), "where": {"repo": "x"}}
    assert read_row_list("mine", options).tolist() == [1, 5]
    for text in ("[1, 1]", "[-1, 3]", "[0.5]", "[]", "{", '[{"repo": "z"}]'):
        path.write_text(text)
        where = {"where": {"repo": "x"}} if "repo" in text else {}
        with pytest.raises(InputError, match="mine"):
            read_row_list("mine", {"row_list": str(path), **where})


def write_texts(folder, task, selections, *groups, **rows):
    """Write a suite on texts: rows.parquet and its YAML."""
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    group = {"task": "rows", "protocol": "sft_small", "nets": ["tiny"]}
    suite = {
        "decides": "Whether it works.",
        "tasks": {"rows": {"kind": "text", "dataset": str(folder / "rows.parquet"), **task}},
        "selections": {"random": {"method": "random"}, **selections},
        "compare": [group | {"selections": ["random", *selections]} | one for one in groups],
    }
    (folder / "rows.yaml").write_text(yaml.safe_dump(suite))
    return str(folder / "rows.yaml"), folder / "work"


def test_held_out_rows_are_in_no_selection(tmp_path, small_encoder):
    n_rows, n_held = 60, 20
    embeddings = np.random.default_rng(0).normal(size=(n_rows, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", embeddings)
    (tmp_path / "list.json").write_text(json.dumps(list(range(0, n_rows, 2))))
    kept, held = split_held_out(n_rows, n_held)
    task = {"embeddings": str(tmp_path / "rows.npy"), "held_out": n_held}
    selections = {
        "dq": {"method": "dq", "n_bins": 2},
        "even": {"row_list": str(tmp_path / "list.json")},
    }
    whole = {"keep_ratios": [1.0], "selections": ["random", "dq"]}
    listed = {"keep_ratios": ["even"], "selections": ["random", "even"]}
    rows = {"instruction": [f"say {k}" for k in range(n_rows)], "output": ["yes"] * n_rows}
    task["models"] = {"tiny": str(small_encoder)}
    suite, work = write_texts(tmp_path, task, selections, whole, listed, **rows)
    lines = TextTask(read_suite(suite), "rows", work).choose_all()
    assert len(kept) == 40 and sorted([*kept, *held]) == list(range(n_rows))
    with pytest.raises(InputError, match=r"held_out must lie in \[0, 60\), got 60"):
        split_held_out(n_rows, n_rows)
    found = {(line["selection"], line["keep"]): kept[line["rows"]] for line in lines}
    assert set(found[("dq", "1.0")]) == set(kept)
    assert found[("even", "even")].tolist() == [row for row in kept if row % 2 == 0]
    assert len(found[("random", "even")]) == len(found[("even", "even")])


def test_rows_for_a_target_and_the_longest_ones(tmp_path, small_encoder):
    rng, n_rows = np.random.default_rng(0), 40
    words = ["red", "blue", "seven", "eight", "cat", "dog"]
    texts = [" ".join(rng.choice(words, 3)) for _ in range(n_rows)]
    answers = ["x" * int(n) for n in rng.permutation(n_rows)]
    questions = [{"q": "seven eight seven", "a": str(k)} for k in range(8)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    about = {"dataset": str(tmp_path / "questions.jsonl"), "text_columns": ["q"]}
    task = {"encoder": str(small_encoder), "held_out": 4, "models": {"tiny": str(small_encoder)}}
    task |= {"target": {**about, "half": 0}, "tests": {"questions": {**about, "half": 1}}}
    selections = {"target": {"method": "random", "target": "task", "target_share": 0.6}}
    selections["longest"] = {"by_length": True}
    rows = {"instruction": texts, "output": answers}
    suite, work = write_texts(tmp_path, task, selections, {"keep_ratios": [0.25]}, **rows)
    made = TextTask(read_suite(suite), "rows", work)
    lines = {line["selection"]: line for line in made.choose_all()}
    target = pq.read_table(made.target["target"])
    assert len(target) == 4 and len(set(target["a"].to_pylist())) == 4
    kept = split_held_out(n_rows, 4)[0]
    by_length = sorted(range(36), key=lambda k: -len(answers[kept[k]]))
    assert lines["longest"]["rows"].tolist() == sorted(by_length[:9])
    run = compress(
        made.place,
        method="random",
        target_share=0.6,
        **made.target,
        embedding_model=str(small_encoder),
        keep_ratio=0.25,
        seed=read_suite(suite).draw_seed("target", 0),
        report=False,
        output_dir=tmp_path / "run",
    )
    assert lines["target"]["rows"].tolist() == run.kept.tolist()
    assert lines["target"]["rows"].tolist() != lines["random"]["rows"].tolist()
    assert lines["target"]["weights"] is None and lines["target"]["proxy_seconds"] is None


def test_texts_with_classes_are_probed(tmp_path, small_encoder):
    rng = np.random.default_rng(0)
    words = {"tea": "cup leaf hot", "sea": "wave salt deep"}
    topics = [list(words)[k] for k in rng.integers(0, 2, 60)]
    texts = [f"{words[label]} {k}" for k, label in enumerate(topics)]
    tests = pa.table({"text": texts[40:], "topic": topics[40:]})
    pq.write_table(tests, tmp_path / "test.parquet")
    task = {"test": str(tmp_path / "test.parquet"), "label_column": "topic"}
    task["encoder"] = str(small_encoder)
    group = {"protocol": "probe", "nets": ["logistic regression"], "keep_ratios": [0.5]}
    rows = {"text": texts[:40], "topic": topics[:40]}
    dq = {"dq": {"method": "dq", "n_bins": 2}}
    suite, work = write_texts(tmp_path, task, dq, group, **rows)
    prepare(suite, tmp_path / "bundle", work)
    bundle = Bundle(tmp_path / "bundle")
    labels = bundle.array("rows/train/labels")
    assert len(set(zip(labels.tolist(), topics[:40], strict=True))) == 2
    assert bundle.array("rows/test/features").shape[0] == 20
    for line in chosen(bundle, "rows").values():
        counts = np.bincount(labels[line["rows"]], minlength=2)
        assert len(line["rows"]) == 20
        assert np.abs(counts - 0.5 * np.bincount(labels)).max() <= 1
