"""eval/bench.py prepare: the rows of a bundle are those that `compress` keeps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from eval_scripts import EVAL, load_script

load_script("measure")  # puts eval/ on the path

from harness.bundle import Bundle  # noqa: E402
from harness.prepare import prepare  # noqa: E402
from harness.results import read_lines  # noqa: E402
from harness.selections import read_row_list  # noqa: E402
from harness.suite import read_suite  # noqa: E402
from harness.texts import split_held_out  # noqa: E402

from dq_multimodal import compress  # noqa: E402
from dq_multimodal.config import InputError  # noqa: E402

N_TRAIN, N_TEST, SIDE = 90, 30, 16
SELECTIONS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "plain random": {"method": "random", "by_class": False},
    "dq": {"method": "dq", "n_bins": 3},
    "ranked": {"method": "dq", "n_bins": 3, "draw": "rank"},
    "adq": {"method": "adq", "n_bins": 3},
    "graphcut": {"method": "graphcut"},
    "published": {"row_list": "published.npy"},
    "patches": {"method": "random", "drop_ratio": 0.25, "attribution": "random", "fill": "zero"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, an untrained encoder, and a published list of rows."""
    import torch
    from datasets import ClassLabel, Dataset, Features, Image

    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier

    place, rng = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    for name, n in (("train", N_TRAIN), ("test", N_TEST)):
        labels = rng.integers(0, 3, n)
        pixels = 70 * labels[:, None, None, None] + rng.integers(0, 70, (n, SIDE, SIDE, 3))
        images = [{"bytes": _png(image)} for image in pixels.astype(np.uint8)]
        rows = {"img": images, "label": labels.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(place / f"{name}.parquet")
    torch.manual_seed(0)
    net = build_classifier("resnet10-narrow", 3, SIDE)
    about = Classifier("resnet10-narrow", SIDE, 3, ("a", "b", "c"), (0.5,) * 3, (0.3,) * 3)
    save_classifier(net, about, place / "encoder")
    np.save(place / "published.npy", np.array([88, 3, 41, 7, 12, 60]))
    return place


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, name: str, **changes: Any) -> str:
    task = {
        "kind": "image",
        "dataset": str(folder / "train.parquet"),
        "test": str(folder / "test.parquet"),
        "encoder": str(folder / "encoder"),
    }
    selections = {k: dict(v) for k, v in SELECTIONS.items()}
    selections["published"]["row_list"] = str(folder / "published.npy")
    group = {
        "task": "toy",
        "protocol": "short",
        "nets": ["resnet10-narrow"],
        "keep_ratios": [0.2],
        "selections": [k for k in SELECTIONS if k != "published"],
        "draws": 2,
    }
    suite = {
        "decides": "Whether it works.",
        "tasks": {"toy": task},
        "protocols": {"short": {"like": "small", "epochs": None, "steps": 2, "batch_size": 8}},
        "selections": selections,
        "compare": [
            group,
            {**group, "keep_ratios": ["published"], "selections": ["random", "published"]},
        ],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**suite, **changes}, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """The bundle of all kinds of selections."""
    prepare(write(folder, "toy"), folder / "bundle", folder / "work")
    return folder / "bundle"


def chosen(bundle: Bundle) -> dict[tuple[str, str, int], dict[str, Any]]:
    lines = bundle.table("toy/selections").to_pylist()
    return {(line["selection"], line["keep"], line["draw"]): line for line in lines}


def pixels_of(folder: Path, rows: np.ndarray) -> np.ndarray:
    import io

    from PIL import Image

    files = pq.read_table(folder / "train.parquet")["img"].to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(files[row]["bytes"]))) for row in rows])


@pytest.mark.parametrize("name", ["random", "dq", "ranked", "adq", "graphcut"])
def test_the_rows_are_those_that_compress_keeps(folder: Path, made: Path, name: str) -> None:
    bundle, suite = Bundle(made), read_suite(str(folder / "toy.yaml"))
    labels = np.array(pq.read_table(folder / "train.parquet")["label"])
    for draw in (0, 1):
        line = chosen(bundle)[(name, "0.2", draw)]
        # scores of adq depend on the seed of a run, and a suite makes them once, with seed 0
        start = compress(
            str(folder / "train.parquet"),
            **SELECTIONS[name],
            embedding_model=str(folder / "encoder"),
            keep_ratio=0.2,
            report=False,
            output_dir=folder / "runs" / name,
        )
        run = start.resample(
            0.2,
            seed=suite.draw_seed(name, draw),
            output_dir=folder / "runs" / f"{name}-{draw}",
        )
        assert len(line["rows"]) == 18 and line["keep_ratio"] == 0.2
        assert (bundle.array("toy/train/images")[line["rows"]] == pixels_of(folder, run.kept)).all()
        assert (bundle.array("toy/train/labels")[line["rows"]] == labels[run.kept]).all()


def test_random_is_by_class_and_plain_random_is_not(folder: Path, made: Path) -> None:
    bundle = Bundle(made)
    labels, lines = bundle.array("toy/train/labels"), chosen(bundle)
    whole = np.bincount(np.array(pq.read_table(folder / "train.parquet")["label"]))
    for draw in (0, 1):
        counts = np.bincount(labels[lines[("random", "0.2", draw)]["rows"]], minlength=3)
        assert np.abs(counts - 0.2 * whole).max() <= 1
    rows = [tuple(lines[(n, "0.2", d)]["rows"]) for n in ("random", "plain random") for d in (0, 1)]
    assert len(set(rows)) == 4


def test_a_published_list_is_kept_as_it_is_with_random_beside_it(folder: Path, made: Path) -> None:
    bundle = Bundle(made)
    images, lines = bundle.array("toy/train/images"), chosen(bundle)
    listed = images[lines[("published", "published", 0)]["rows"]]
    assert (listed == pixels_of(folder, np.array([3, 7, 12, 41, 60, 88]))).all()
    assert len(lines[("random", "published", 1)]["rows"]) == 6
    assert lines[("published", "published", 0)]["proxy_seconds"] is None


def test_dropped_patches_are_filled_and_the_others_as_they_were(folder: Path, made: Path) -> None:
    bundle, suite = Bundle(made), read_suite(str(folder / "toy.yaml"))
    line = chosen(bundle)[("patches", "0.2", 1)]
    run = compress(
        str(folder / "train.parquet"),
        method="random",
        keep_ratio=0.2,
        seed=suite.draw_seed("patches", 1),
        report=False,
        output_dir=folder / "runs" / "patches",
    )
    filled = bundle.array("toy/train/images")[line["rows"]]
    whole = pixels_of(folder, run.kept)
    is_hole = (filled == 0).all(axis=3)
    assert (is_hole.mean(axis=(1, 2)) > 0.24).all() and is_hole.mean() < 0.27
    assert (filled[~is_hole] == whole[~is_hole]).all()
    assert line["bytes"] > 0
    test_images = bundle.array("toy/test/images")
    assert test_images.shape == (N_TEST, SIDE, SIDE, 3)


def dynamics_of(folder: Path) -> str:
    """Write dynamics of the training rows, four epochs by chance, and give their file."""
    rng = np.random.default_rng(1)
    own, other = rng.uniform(0, 0.6, (2, 4, N_TRAIN))
    other = np.minimum(other, 1 - own)
    values = np.stack([own, other, np.sqrt((1 - own) ** 2 + other**2)], axis=2)
    np.save(folder / "dynamics.npy", values.astype(np.float16))
    return str(folder / "dynamics.npy")


def test_rows_and_weights_are_those_of_compress(folder: Path, tmp_path: Path) -> None:
    given = {"dynamics": dynamics_of(folder)}
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
    group = yaml.safe_load(Path(write(folder, "weighted")).read_text())["compare"][0]
    group |= {"selections": list(selections), "draws": 1}
    suite = write(folder, "weighted", selections=selections, compare=[group])
    prepare(suite, tmp_path / "bundle", tmp_path / "work")
    lines, read = chosen(Bundle(tmp_path / "bundle")), read_suite(suite)
    images = Bundle(tmp_path / "bundle").array("toy/train/images")
    for name, options in selections.items():
        line, use = lines[(name, "0.2", 0)], options.get("use_weights", "loss")
        run = compress(
            str(folder / "train.parquet"),
            **{k: v for k, v in options.items() if k != "use_weights"},
            embedding_model=str(folder / "encoder"),
            keep_ratio=0.2,
            seed=read.draw_seed(name, 0),
            report=False,
            output_dir=tmp_path / name,
        )
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


def test_selections_without_labels_have_one_stratum_and_the_same_embeddings(
    folder: Path, tmp_path: Path
) -> None:
    suite = yaml.safe_load(Path(write(folder, "blind")).read_text())
    group = suite["compare"][0] | {"selections": ["random", "coverage"], "draws": 1}
    suite["selections"]["coverage"] = {"method": "coverage"}
    suite["tasks"]["blind"] = {"like": "toy", "unlabelled": True}
    suite["compare"] = [group, {**group, "task": "blind"}]
    (tmp_path / "blind.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    prepare(str(tmp_path / "blind.yaml"), tmp_path / "bundle", tmp_path / "work")
    bundle = Bundle(tmp_path / "bundle")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["toy"]
    runs = sorted((tmp_path / "work" / "toy").iterdir())
    assert [p.name.split("-")[0] for p in runs] == [*["coverage"] * 2, "dq", *["random"] * 2]
    assert all(str(runs[2]) in (run / "config.yaml").read_text() for run in runs[:2])
    kept = {
        (task, line["selection"]): np.bincount(
            bundle.array(f"{task}/train/labels")[line["rows"]], minlength=3
        )
        for task in ("toy", "blind")
        for line in bundle.table(f"{task}/selections").to_pylist()
    }
    assert all(found.sum() == 18 for found in kept.values())
    for name in ("random", "coverage"):
        assert np.abs(kept["toy", name] - 0.2 * N_TRAIN / 3).max() < 3
        assert kept["blind", name].tolist() != kept["toy", name].tolist()


def test_a_second_call_finds_it_complete(folder: Path, made: Path, capsys: Any) -> None:
    held = (made / "bundle.json").stat().st_mtime_ns
    prepare(str(folder / "toy.yaml"), made, folder / "work")
    assert "already complete" in capsys.readouterr().out
    assert (made / "bundle.json").stat().st_mtime_ns == held


def test_other_places_make_another_bundle(folder: Path, tmp_path: Path) -> None:
    group = yaml.safe_load(Path(write(folder, "again")).read_text())["compare"][0]
    suite = yaml.safe_load(
        Path(write(folder, "again", compare=[{**group, "selections": ["random"]}])).read_text()
    )
    asked = []
    for extra in ({}, {"embeddings": "other.npy"}):
        suite["tasks"]["toy"] |= extra
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(suite))
        np.save(folder / "other.npy", np.zeros((N_TRAIN, 4), np.float32))
        if extra:
            suite["tasks"]["toy"]["embeddings"] = str(folder / "other.npy")
            (tmp_path / "again.yaml").write_text(yaml.safe_dump(suite))
        prepare(str(tmp_path / "again.yaml"), tmp_path / "bundle", tmp_path / "work")
        asked.append(Bundle(tmp_path / "bundle").about["asked"])
    assert asked[0] != asked[1]


def test_prepared_moved_trained_without_the_data_and_laid_out(folder: Path, tmp_path: Path) -> None:
    group = yaml.safe_load((Path(write(folder, "toy"))).read_text())["compare"][0]
    few = {**group, "selections": ["random", "dq"], "keep_ratios": [0.3]}
    probe = {**few, "protocol": "probe", "nets": ["logistic regression"]}
    suite = write(folder, "moved", compare=[few, probe])

    def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(EVAL / "bench.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    done = bench("prepare", suite, "--bundle", folder / "few", "--work", folder / "work")
    assert done.returncode == 0, done.stderr
    shutil.move(folder / "few", tmp_path / "few")
    (folder / "train.parquet").rename(folder / "away.parquet")
    try:
        results = ("--results", tmp_path / "moved.jsonl")
        done = bench("run", suite, "--bundle", tmp_path / "few", *results)
        assert done.returncode == 0, done.stderr
    finally:
        (folder / "away.parquet").rename(folder / "train.parquet")
    lines = read_lines(tmp_path / "moved.jsonl")
    assert len(lines) == 8 and all(line["rows"] == 27 for line in lines)
    done = bench("table", suite, *results, "--figure", tmp_path / "moved.png")
    assert done.returncode == 0, done.stderr
    assert "Whether it works." in done.stdout and done.stdout.count("| dq |") == 2


@pytest.mark.parametrize(
    ("task", "selections", "said"),
    [
        ({"kind": "sound"}, {}, "kind must be image or text, got 'sound'"),
        ({"colour": 1}, {}, "no key colour"),
        ({"dataset": "/nowhere/*.parquet"}, {}, "/nowhere"),
        ({}, {"random": {"method": "best"}}, "no method best"),
        ({}, {"random": {"method": "random", "row_list": "x"}}, "a method or a row_list"),
        ({}, {"random": {"method": "random", "by_length": True}}, "a method or a row_list"),
        ({}, {"random": {"method": "random", "use_weights": "both"}}, "use_weights must be one of"),
        ({}, {"random": {"method": "random", "target": "task"}}, "random: the task has no target"),
        ({}, {"random": {"method": "ccs", "dynamics": "/nowhere.npy"}}, "/nowhere.npy"),
        ({}, {"random": {"method": "random", "n_bims": 3}}, "n_bims"),
        ({}, {"random": {"method": "dq", "by_class": False}}, "by_class false is for random"),
        ({}, {"random": {"method": "random", "seed": 3}}, "seed"),
        ({}, {"random": {"method": "dq", "embeddings": "missing.npy"}}, "embeddings"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_and_no_bundle(
    folder: Path, tmp_path: Path, task: Any, selections: Any, said: str
) -> None:
    suite = yaml.safe_load(Path(write(folder, "wrong")).read_text())
    suite["tasks"]["toy"] |= task
    suite["selections"] |= selections
    suite["compare"] = [{**suite["compare"][0], "selections": ["random"]}]
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(suite))
    with pytest.raises(InputError) as raised:
        prepare(str(path), tmp_path / "bundle", tmp_path / "work")
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "bundle" / "bundle.json").exists()


def test_the_order_of_selections_changes_no_row(folder: Path, tmp_path: Path) -> None:
    rows = []
    for k, names in enumerate((["random", "graphcut", "adq"], ["adq", "graphcut", "random"])):
        group = yaml.safe_load(Path(write(folder, "order")).read_text())["compare"][0]
        group |= {"selections": names, "draws": 1}
        suite = write(folder, f"order{k}", compare=[group])
        prepare(suite, tmp_path / f"bundle{k}", tmp_path / f"work{k}")
        bundle = Bundle(tmp_path / f"bundle{k}")
        lines = chosen(bundle)
        images = bundle.array("toy/train/images")
        rows.append({name: images[lines[(name, "0.2", 0)]["rows"]] for name in names})
        assert lines[("graphcut", "0.2", 0)]["proxy_seconds"] > 0.01
    assert all((rows[0][name] == rows[1][name]).all() for name in rows[0])


def test_the_digests_change_with_what_a_cell_depends_on(folder: Path, tmp_path: Path) -> None:
    group = yaml.safe_load(Path(write(folder, "digest")).read_text())["compare"][0]
    group |= {"selections": ["random"], "draws": 1}
    probe = {**group, "protocol": "probe"}
    other = tmp_path / "encoder"
    shutil.copytree(folder / "encoder", other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    found = []
    for k, task in enumerate(
        (
            {},
            {"encoder": str(other)},
            {"image_size": 8},
            {"test": str(folder / "train.parquet")},
        )
    ):
        suite = yaml.safe_load(Path(write(folder, "digest", compare=[group, probe])).read_text())
        suite["tasks"]["toy"] |= task
        path = tmp_path / "digest.yaml"
        path.write_text(yaml.safe_dump(suite))
        prepare(str(path), tmp_path / f"bundle{k}", tmp_path / f"work{k}")
        found.append(Bundle(tmp_path / f"bundle{k}").about["tasks"]["toy"]["digests"])
    assert found[1]["image"] == found[0]["image"] and found[1]["probe"] != found[0]["probe"]
    assert len({digests["image"] for digests in found}) == 3
    assert len({digests["probe"] for digests in found}) == 4


def test_published_lists_of_the_committed_suites_are_found(real_data: Path) -> None:
    names = set()
    for path in sorted((EVAL / "suites").glob("*.yaml")):
        for name, options in read_suite(path.stem).selections.items():
            if "row_list" in options:
                names.add(name)
                assert len(read_row_list(name, options)) > 1000
    assert {"published dq", "alpagasus", "cherry"} <= names


def test_a_failed_call_leaves_the_bundle_before(folder: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "bundle")
    suite = yaml.safe_load(Path(write(folder, "failed")).read_text())
    suite["tasks"]["toy"]["test"] = str(folder / "nowhere.parquet")
    (tmp_path / "failed.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises(InputError, match="nowhere"):
        prepare(str(tmp_path / "failed.yaml"), tmp_path / "bundle", tmp_path / "work")
    assert Bundle(tmp_path / "bundle").array("toy/train/images").shape[1:] == (SIDE, SIDE, 3)


def test_row_lists_of_json_records_and_wrong_ones(tmp_path: Path) -> None:
    path = tmp_path / "lists.json"
    path.write_text(json.dumps([{"repo": "x", "indices": [5, 1]}, {"repo": "y", "indices": [2]}]))
    options = {"row_list": str(path), "where": {"repo": "x"}}
    assert read_row_list("mine", options).tolist() == [1, 5]
    for text, wrong in (
        ("[1, 1]", {}),
        ("[-1, 3]", {}),
        ("[0.5]", {}),
        ("[]", {}),
        ("{", {}),
        ('[{"repo": "z"}]', {"where": {"repo": "x"}}),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match="mine"):
            read_row_list("mine", {"row_list": str(path), **wrong})


def test_held_out_rows_are_in_no_selection(tmp_path: Path, small_encoder: Path) -> None:
    n_rows, n_held = 60, 20
    rows = {"instruction": [f"say {k}" for k in range(n_rows)], "output": ["yes"] * n_rows}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    embeddings = np.random.default_rng(0).normal(size=(n_rows, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", embeddings)
    (tmp_path / "list.json").write_text(json.dumps(list(range(0, n_rows, 2))))
    kept, held = split_held_out(n_rows, n_held)
    task = {
        "kind": "text",
        "dataset": str(tmp_path / "rows.parquet"),
        "embeddings": str(tmp_path / "rows.npy"),
        "held_out": n_held,
        "models": {"tiny": str(small_encoder)},
    }
    common = {"task": "rows", "protocol": "sft_small", "nets": ["tiny"]}
    suite = {
        "decides": "Whether it works.",
        "tasks": {"rows": task},
        "selections": {
            "random": {"method": "random"},
            "dq": {"method": "dq", "n_bins": 2},
            "even": {"row_list": str(tmp_path / "list.json")},
        },
        "compare": [
            {**common, "keep_ratios": [1.0], "selections": ["random", "dq"]},
            {**common, "keep_ratios": ["even"], "selections": ["random", "even"]},
        ],
    }
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(suite))
    from harness.prepare import TextTask

    read = read_suite(str(tmp_path / "rows.yaml"))
    lines = TextTask(read, "rows", tmp_path / "work").choose_all()
    assert len(kept) == 40 and not set(kept) & set(held)
    found = {(line["selection"], line["keep"]): kept[line["rows"]] for line in lines}
    assert set(found[("dq", "1.0")]) == set(kept)
    assert found[("even", "even")].tolist() == [row for row in kept if row % 2 == 0]
    assert len(found[("random", "even")]) == len(found[("even", "even")])


def test_rows_for_a_target_and_the_longest_ones(tmp_path: Path, small_encoder: Path) -> None:
    rng, n_rows = np.random.default_rng(0), 40
    words = ["red", "blue", "seven", "eight", "cat", "dog"]
    texts = [" ".join(rng.choice(words, 3)) for _ in range(n_rows)]
    answers = ["x" * int(n) for n in rng.permutation(n_rows)]
    rows = {"instruction": texts, "output": answers}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    questions = [{"q": "seven eight seven", "a": str(k)} for k in range(8)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    about = {"dataset": str(tmp_path / "questions.jsonl"), "text_columns": ["q"]}
    task = {
        "kind": "text",
        "dataset": str(tmp_path / "rows.parquet"),
        "encoder": str(small_encoder),
        "held_out": 4,
        "target": {**about, "half": 0},
        "tests": {"questions": {**about, "half": 1}},
        "models": {"tiny": str(small_encoder)},
    }
    group = {
        "task": "rows",
        "protocol": "sft_small",
        "nets": ["tiny"],
        "keep_ratios": [0.25],
        "selections": ["random", "target", "longest"],
    }
    suite = {
        "decides": "Whether it works.",
        "tasks": {"rows": task},
        "selections": {
            "random": {"method": "random"},
            "target": {"method": "random", "target": "task", "target_share": 0.6},
            "longest": {"by_length": True},
        },
        "compare": [group],
    }
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(suite))
    from harness.prepare import TextTask

    read = read_suite(str(tmp_path / "rows.yaml"))
    made = TextTask(read, "rows", tmp_path / "work")
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
        seed=read.draw_seed("target", 0),
        report=False,
        output_dir=tmp_path / "run",
    )
    assert lines["target"]["rows"].tolist() == run.kept.tolist()
    assert lines["target"]["rows"].tolist() != lines["random"]["rows"].tolist()
    assert lines["target"]["weights"] is None and lines["target"]["proxy_seconds"] is None


def test_texts_with_classes_are_probed(tmp_path: Path, small_encoder: Path) -> None:
    rng = np.random.default_rng(0)
    words = {"tea": "cup leaf hot", "sea": "wave salt deep"}
    for name, n in (("train", 40), ("test", 20)):
        labels = [list(words)[k] for k in rng.integers(0, 2, n)]
        texts = [f"{words[label]} {k}" for k, label in enumerate(labels)]
        pq.write_table(pa.table({"text": texts, "topic": labels}), tmp_path / f"{name}.parquet")
    task = {
        "kind": "text",
        "dataset": str(tmp_path / "train.parquet"),
        "test": str(tmp_path / "test.parquet"),
        "label_column": "topic",
        "encoder": str(small_encoder),
    }
    suite = {
        "decides": "Whether it works.",
        "tasks": {"topics": task},
        "selections": {"random": {"method": "random"}, "dq": {"method": "dq", "n_bins": 2}},
        "compare": [
            {
                "task": "topics",
                "protocol": "probe",
                "nets": ["logistic regression"],
                "keep_ratios": [0.5],
                "selections": ["random", "dq"],
            }
        ],
    }
    (tmp_path / "topics.yaml").write_text(yaml.safe_dump(suite))
    prepare(str(tmp_path / "topics.yaml"), tmp_path / "bundle", tmp_path / "work")
    bundle = Bundle(tmp_path / "bundle")
    labels = bundle.array("topics/train/labels")
    topics = pq.read_table(tmp_path / "train.parquet")["topic"].to_pylist()
    assert len({(label, topic) for label, topic in zip(labels.tolist(), topics, strict=True)}) == 2
    assert bundle.array("topics/test/features").shape[0] == 20
    for line in bundle.table("topics/selections").to_pylist():
        counts = np.bincount(labels[line["rows"]], minlength=2)
        assert len(line["rows"]) == 20
        assert np.abs(counts - 0.5 * np.bincount(labels)).max() <= 1
