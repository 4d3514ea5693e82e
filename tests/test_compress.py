"""compress, resample and verify through the Python interface."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from dq_multimodal import InputError, Run, compress, resample, verify
from dq_multimodal.core import make_bins, order_rows
from dq_multimodal.manifest import Problem

N = 240


@pytest.fixture
def source(tmp_path):
    """A parquet file with more kinds of columns than text, and its embeddings."""
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "instruction": [f"Do thing {k % 50}" for k in range(N)],
            "input": ["" if k % 3 else f"with {k}" for k in range(N)],
            "output": [None if k == 7 else f"done {k} ü \N{SNOWMAN}" for k in range(N)],
            "score": pa.array(rng.normal(size=N), pa.float32()),
            "tags": [["a", None], [], None] * (N // 3),
            "meta": [{"id": k, "when": None} for k in range(N)],
            "kind": [("x", "y", None)[k % 3] for k in range(N)],
        }
    )
    path = tmp_path / "data.parquet"
    pq.write_table(table, path)
    np.save(tmp_path / "emb.npy", rng.normal(size=(N, 8)).astype(np.float16))
    return path


def options(source, **more):
    return {
        "ready_embeddings": str(source.parent / "emb.npy"),
        "method": "dq",
        "report": False,
        **more,
    }


def test_a_run_holds_what_the_contract_says(source, tmp_path):
    run = compress(str(source), keep_ratio=0.25, output_dir=tmp_path / "run", **options(source))
    emb = np.load(tmp_path / "emb.npy").astype(np.float32)
    bins = make_bins(emb, 10)
    order = order_rows(bins)
    kept = np.flatnonzero(order < 60)

    stored = np.load(tmp_path / "run" / "embeddings.npy")
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, emb)
    selection = pq.read_table(tmp_path / "run" / "selection.parquet")
    assert selection.column_names == ["row", "stratum", "bin", "rank", "gain", "order", "kept"]
    np.testing.assert_array_equal(selection["bin"], bins.bin)
    np.testing.assert_array_equal(selection["rank"], bins.rank)
    np.testing.assert_array_equal(selection["order"], order)
    by_bin = pq.read_table(tmp_path / "run" / "bins.parquet").to_pydict()
    assert by_bin["size"] == [24] * 10
    assert by_bin["kept"] == [6] * 10

    subset = run.subset
    assert subset["dq_row"][:] == kept.tolist()
    assert subset["dq_bin"][:] == bins.bin[kept].tolist()
    whole = load_dataset("parquet", data_files=str(source), split="train")
    assert subset.remove_columns(["dq_row", "dq_bin", "dq_rank"]).to_list() == [
        whole[k] for k in kept.tolist()
    ]
    assert {k: v for k, v in subset.features.items() if not k.startswith("dq_")} == whole.features
    assert run.manifest.problems == {"an empty output": Problem(count=1, rows=[7])}
    assert "60 of the 240 rows" in (run.path / "README.md").read_text()
    np.testing.assert_array_equal(run.kept, kept)
    assert [check.result for check in verify(run)] == ["passed"] * 5


def test_subsets_are_nested_and_of_the_size_asked(source, tmp_path):
    run = compress(str(source), keep_ratio=0.5, output_dir=tmp_path / "run", **options(source))
    before: set[int] = set()
    for ratio in (0.01, 0.1, 0.25, 0.333, 0.5, 0.9, 1.0):
        drawn = run.resample(ratio, output_dir=tmp_path / f"r{ratio}")
        kept = set(drawn.kept.tolist())
        assert len(kept) == len(drawn.subset) == round(ratio * N)
        assert before <= kept
        before = kept
        assert {check.result for check in verify(drawn)} <= {"passed", "skipped"}
    whole = load_dataset("parquet", data_files=str(source), split="train")
    all_rows = drawn.subset.remove_columns(["dq_row", "dq_bin", "dq_rank"])
    assert all_rows.to_list() == whole.to_list()


@pytest.mark.parametrize("partition", ["none", "kmeans:4"])
@pytest.mark.parametrize("method", ["dq", "graphcut", "random"])
def test_resample_equals_compress(source, tmp_path, method, partition):
    first = "dq" if method != "dq" else "graphcut"
    asked = options(source, partition=partition)
    other = compress(str(source), output_dir=tmp_path / "a", **asked | {"method": first})
    drawn = resample(other, 0.3, method=method, seed=5, output_dir=tmp_path / "b")
    asked |= {"method": method, "keep_ratio": 0.3, "seed": 5}
    straight = compress(str(source), output_dir=tmp_path / "c", **asked)
    np.testing.assert_array_equal(drawn.order, straight.order)
    rows = [run.subset.select_columns(["dq_row", "output"]).to_list() for run in (drawn, straight)]
    assert rows[0] == rows[1]
    assert {check.result for check in verify(drawn)} <= {"passed", "skipped"}


def test_random_needs_no_encoder_and_no_text(tmp_path):
    rows = Dataset.from_dict({"number": list(range(100))})
    run = random_run(rows, tmp_path, keep_ratio=0.1)
    assert len(run.subset) == 10
    assert not (run.path / "embeddings.npy").exists()
    assert set(run.subset["dq_bin"][:]) == {None}
    with pytest.raises(InputError, match="dq needs bins"):
        resample(run, 0.2, method="dq", output_dir=tmp_path / "no")
    assert resample(run, 0.05, output_dir=tmp_path / "five").manifest["kept"] == 5
    with pytest.raises(InputError, match="the source cannot give them"):
        resample(run, 0.2, output_dir=tmp_path / "more")
    assert not (tmp_path / "more").exists()
    with pytest.raises(InputError, match="the source cannot give them"):
        resample(run, 0.2, output_dir=tmp_path / "five", overwrite=True)
    assert Run(tmp_path / "five").manifest["kept"] == 5  # what was there is there still


def test_strata_keep_their_proportions_and_missing_labels_are_one(source, tmp_path):
    asked = options(source, label_column="kind", keep_ratio=0.1)
    run = compress(str(source), output_dir=tmp_path / "run", **asked)
    assert run.manifest["labels"] == ["x", "y", "(no label)"]
    labels = run.subset["kind"][:]
    assert [labels.count(kind) for kind in ("x", "y", None)] == [8, 8, 8]
    assert len(pq.read_table(run.path / "bins.parquet")) == 30


def test_class_labels_and_their_names_survive(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict(
        {"text": [str(k) for k in range(20)], "label": [0, 1] * 10}, features=features
    )
    run = random_run(rows, tmp_path, label_column="label", keep_ratio=0.5)
    assert run.subset.features["label"].names == ["no", "yes"]
    assert sorted(run.subset["label"][:]) == [0] * 5 + [1] * 5


@pytest.mark.parametrize("kind", ["fixed", "list", "double"])
def test_embeddings_from_a_column(tmp_path, kind):
    values = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    types = {"fixed": pa.list_(pa.float32(), 4), "list": pa.list_(pa.float32())}
    column = pa.array(values.tolist(), types.get(kind, pa.list_(pa.float64())))
    pq.write_table(pa.table({"text": ["x"] * 50, "vec": column}), tmp_path / "d.parquet")
    run = compress(str(tmp_path / "d.parquet"), ready_embeddings="vec", output_dir=tmp_path / "run")
    np.testing.assert_array_equal(np.load(run.path / "embeddings.npy"), values)
    assert run.subset["vec"][0] == pytest.approx(values[run.kept[0]].tolist())


@pytest.mark.parametrize(
    "how", ["json", "jsonl", "csv", "parquet", "glob", "folder", "saved", "dict"]
)
def test_every_kind_of_source(tmp_path, how):
    rows = Dataset.from_dict({"prompt": [f"q{k}" for k in range(30)], "completion": ["a"] * 30})
    place = tmp_path / "src"
    place.mkdir()
    if how == "saved":
        rows.save_to_disk(str(place))
    elif how == "dict":
        DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(place))
    elif how == "csv":
        rows.to_csv(place / "d.csv")
    elif how in ("json", "jsonl"):
        rows.to_json(place / f"d.{how}")
    else:
        rows.select(range(10)).to_parquet(place / "a.parquet")
        rows.select(range(10, 30)).to_parquet(place / "b.parquet")
    names = {"json": "d.json", "jsonl": "d.jsonl", "csv": "d.csv", "parquet": "b.parquet"}
    name = place / {**names, "glob": "*.parquet"}.get(how, "")
    run = random_run(str(name), tmp_path, keep_ratio=0.5)
    assert run.manifest["kept"] == (10 if how == "parquet" else 15)
    assert all(check.result != "failed" for check in verify(run))
    assert verify(run)[2].result == "passed"


def test_embeddings_of_the_whole_split_serve_a_slice(source, tmp_path):
    values = np.load(tmp_path / "emb.npy").astype(np.float32)
    for split, rows in (("train[:90%]", slice(0, 216)), ("train[200:]", slice(200, None))):
        run = compress(str(source), split=split, output_dir=tmp_path / split, **options(source))
        np.testing.assert_array_equal(np.load(run.path / "embeddings.npy"), values[rows])
    np.save(tmp_path / "emb.npy", values[:200])
    with pytest.raises(InputError, match="each of the 216 rows"):
        compress(str(source), split="train[:216]", output_dir=tmp_path / "no", **options(source))


def test_the_small_encoder_end_to_end(source, tmp_path, small_encoder):
    options = {"embedding_model": str(small_encoder), "batch_size": 16}
    run = compress(str(source), output_dir=tmp_path / "run", **options)
    assert len(run.subset) == 48
    assert run.config["embedding"]["dimension"] == 16
    assert run.config["rows"]["template"] == "{instruction} {input} {output}"
    assert [check.result for check in verify(run)] == ["passed"] * 5
    again = compress(str(source), output_dir=tmp_path / "run", **options)
    assert again.manifest == run.manifest


def test_a_run_from_before_a_setting_was_known_is_still_the_same(source, tmp_path):
    run = compress(str(source), output_dir=tmp_path / "run", **options(source))
    file = run.path / "config.yaml"
    config = yaml.safe_load(file.read_text())
    del config["request"]["streaming"]
    file.write_text(yaml.safe_dump(config))
    assert compress(str(source), output_dir=run.path, **options(source)).was_complete
    with pytest.raises(InputError, match=r"another run .*streaming False there, True asked"):
        compress(str(source), output_dir=run.path, streaming=True, **options(source))


def test_a_changed_source_is_noticed(source, tmp_path):
    run = compress(str(source), output_dir=tmp_path / "run", **options(source))
    table = pq.read_table(source)
    pq.write_table(table.set_column(2, "output", [["changed"] * N]), source)
    assert "has changed" in verify(run)[2].detail
    with pytest.raises(InputError, match="has changed"):
        run.resample(0.5, output_dir=tmp_path / "more")
    with pytest.raises(InputError, match="another content"):
        compress(str(source), output_dir=tmp_path / "run", **options(source))


def random_run(source, tmp_path, **more):
    options = {"method": "random", "keep_ratio": 1, "output_dir": tmp_path / "run"}
    return compress(source, **options | more)


@pytest.mark.parametrize("kind", ["saved", "dict", "object"])
def test_a_slice_of_any_source_is_a_slice(tmp_path, kind):
    rows = Dataset.from_dict({"text": [str(k) for k in range(40)]})
    if kind == "saved":
        rows.save_to_disk(str(tmp_path / "src"))
    elif kind == "dict":
        DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "src"))
    source = rows if kind == "object" else str(tmp_path / "src")
    run = random_run(source, tmp_path, split="train[75%:]")
    assert run.subset["text"][:] == [str(k) for k in range(30, 40)]
    if kind == "dict":
        assert len(random_run(source, tmp_path, split="test", overwrite=True).subset) == 1
        with pytest.raises(InputError, match="has no split 'dev', only train, test"):
            random_run(source, tmp_path, split="dev", overwrite=True)


def test_a_saved_dataset_may_hold_caches(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "src"))
    run = random_run(str(tmp_path / "src"), tmp_path)
    load_from_disk(str(tmp_path / "src")).map(lambda row: {"text": row["text"] * 2})
    assert verify(run)[2].result == "passed"


def test_a_folder_has_the_splits_that_its_file_names_tell(tmp_path):
    (tmp_path / "src").mkdir()
    for name, n in (("train-0.parquet", 30), ("test-0.parquet", 10)):
        Dataset.from_dict({"text": ["x"] * n}).to_parquet(tmp_path / "src" / name)
    assert len(random_run(str(tmp_path / "src"), tmp_path).subset) == 30
    run = random_run(str(tmp_path / "src"), tmp_path, split="test", overwrite=True)
    assert len(run.subset) == 10
    assert [file["name"] for file in run.config["source"]["files"]] == ["test-0.parquet"]
    with pytest.raises(InputError, match="has no split 'dev', only"):
        random_run(str(tmp_path / "src"), tmp_path, split="dev", overwrite=True)


def test_brackets_in_paths(tmp_path):
    folder = tmp_path / "a[1] b"
    folder.mkdir()
    Dataset.from_dict({"text": ["x"] * 4}).to_parquet(folder / "part-1.parquet")
    run = random_run(str(folder / "part-1.parquet"), folder, keep_ratio=0.5)
    assert len(run.resample(0.25, output_dir=tmp_path / "x[1]").subset) == 1


def test_nan_is_a_value_like_any_other(tmp_path):
    rows = pa.table({"text": ["a", "b"], "x": [float("nan"), 1.0], "y": [[float("nan")], []]})
    pq.write_table(rows, tmp_path / "d.parquet")
    run = random_run(str(tmp_path / "d.parquet"), tmp_path)
    assert verify(run)[2].result == "passed"


def test_a_format_of_the_dataset_changes_nothing(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]})
    more = {"label_column": "label", "keep_ratio": 0.5, "overwrite": True}
    wanted = random_run(rows, tmp_path, **more).subset["text"][:]
    for shaped in (rows.with_format("torch"), rows.with_format("arrow"), rows.with_transform(dict)):
        run = random_run(shaped, tmp_path, **more)
        assert run.manifest["labels"] == ["0", "1"]
        assert run.subset["text"][:] == wanted


def test_pictures_by_path_become_part_of_the_subset(tmp_path):
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "p.png")
    rows = Dataset.from_dict({"image": [str(tmp_path / "p.png")] * 3, "text": ["a", "b", "c"]})
    run = random_run(rows.cast_column("image", ImageFeature()), tmp_path)
    assert [check.result for check in verify(run)][:2] == ["passed"] * 2
    rows.cast_column("image", ImageFeature()).to_parquet(tmp_path / "pics.parquet")
    again = random_run(
        str(tmp_path / "pics.parquet"), tmp_path, image_folder=tmp_path, overwrite=True
    )
    assert verify(again)[2].result == "passed"
    (tmp_path / "p.png").unlink()
    assert run.subset[2]["image"].size == (3, 2)
    with pytest.raises(InputError, match="column image holds Image, not text"):
        random_run(
            rows.cast_column("image", ImageFeature()),
            tmp_path,
            method="dq",
            text_columns=["image"],
            overwrite=True,
        )


def test_rows_with_nothing_to_embed_are_refused(tmp_path, small_encoder):
    with pytest.raises(InputError, match="no row of dataset has anything to embed"):
        rows = Dataset.from_dict({"text": ["", " "]})
        random_run(rows, tmp_path, method="dq", embedding_model=small_encoder, n_bins=1)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_of_another_content_is_not_taken_for_this_one(source, tmp_path):
    compress(str(source), output_dir=tmp_path / "run", **options(source))
    np.save(tmp_path / "emb.npy", np.ones((N, 8), dtype=np.float32))
    with pytest.raises(InputError, match="its embeddings had another content"):
        compress(str(source), output_dir=tmp_path / "run", **options(source))


def test_verify_of_a_broken_subset_fails_and_says_so(source, tmp_path):
    run = compress(str(source), output_dir=tmp_path / "run", **options(source))
    file = next((run.path / "subset").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:100])
    found = [check.result for check in verify(run)]
    assert found == ["passed", "failed", "failed", "passed", "failed"]


def test_several_splits_of_a_folder_are_all_pinned(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("train", "test"):
        Dataset.from_dict({"text": [name]}).to_parquet(tmp_path / "src" / f"{name}.parquet")
    run = random_run(str(tmp_path / "src"), tmp_path, split="train+test")
    assert sorted(run.subset["text"][:]) == ["test", "train"]
    Dataset.from_dict({"text": ["other"]}).to_parquet(tmp_path / "src" / "test.parquet")
    with pytest.raises(InputError, match="another content"):
        random_run(str(tmp_path / "src"), tmp_path, split="train+test")


def test_own_columns_in_the_source_are_refused(tmp_path):
    rows = Dataset.from_dict({"text": ["a"], "dq_row": [1]})
    with pytest.raises(InputError, match="already has the column dq_row"):
        random_run(rows, tmp_path)
