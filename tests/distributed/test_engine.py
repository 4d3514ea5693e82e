"""compress() on a Ray cluster, beside the local engine: the same rows, files and words."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from nasty_images import picture, save

from dq_multimodal import InputError, Run, compress, folder, verify
from dq_multimodal.config import NOT_ON_RAY
from dq_multimodal.core import partition
from dq_multimodal.data import shards
from dq_multimodal.data.store import Store
from dq_multimodal.stages import on_shards

ray = pytest.importorskip("ray", reason="Ray is not installed")


from dq_multimodal.distributed.cluster import Cluster  # noqa: E402

N = 600
TABLES = ("selection.parquet", "bins.parquet")


def slow(*case):
    """A case that make test leaves out."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def cluster():
    """One for all tests of this file: its workers load the libraries once."""
    ray.init(
        *("local",),
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2**28,
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few rows make several shards and groups: the driver cuts both."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 250)
    monkeypatch.setattr(shards, "IMAGE_ROWS", 20)
    monkeypatch.setattr(on_shards, "GROUP_ROWS", 200)


def make_rows(n_rows=N, size=8):
    """Vectors of twelve clouds, their text, and labels of three types, some missing."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(12, size))[rng.integers(12, size=n_rows)]
    vectors = (centres + rng.normal(size=(n_rows, size))).astype(np.float16)
    half = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), size)
    kinds = rng.choice(["b", "a", "\u00e9", "c d"], n_rows, p=[0.5, 0.3, 0.15, 0.05]).tolist()
    numbers = [int(k) for k in rng.integers(9, 12, size=n_rows)]
    holes = [None if k % 97 == 5 else kind for k, kind in enumerate(kinds)]
    columns = {"text": [f"row {k} of kind {kind}" for k, kind in enumerate(kinds)]}
    columns |= {
        "half": half,
        "vector": pa.array(vectors.astype(np.float32).tolist(), pa.list_(pa.float32())),
    }
    return pa.table({**columns, "kind": kinds, "number": numbers, "hole": holes})


@pytest.fixture(scope="module")
def table():
    return make_rows()


@pytest.fixture(scope="module")
def files(tmp_path_factory, table):
    """A folder of three parquet files of several row groups."""
    folder = tmp_path_factory.mktemp("files")
    for k in range(3):
        part = table.slice(200 * k, 200)
        pq.write_table(part, folder / f"data-{k}.parquet", row_group_size=70)
    return folder


def on_ray(data, place, **options):
    given = str(data) if isinstance(data, Path) else data
    return compress(given, engine="ray", output_dir=place, **{"report": False, **options})


def run_both(data, folder, *, local=None, **options):
    """Compress by both engines, and compare all that they write."""
    found = on_ray(data, folder / "ray", **options)
    options.pop("ray_storage", None)
    data = data if local is None else local
    given = str(data) if isinstance(data, Path) else data
    wanted = compress(given, output_dir=folder / "local", **{"report": False, **options})
    check_tables(found, wanted)
    alike = [
        [n.startswith("WARNING: nearly all") for n in r.manifest.notes] for r in (found, wanted)
    ]
    notes = [note for note, is_so in zip(wanted.manifest.notes, alike[1], strict=True) if not is_so]
    ours = [note for note, is_so in zip(found.manifest.notes, alike[0], strict=True) if not is_so]
    assert ours == notes and sum(alike[0]) == sum(alike[1])  # of other rows looked at
    for name in ("labels", "problems", "kept", "rows", "selection"):
        assert getattr(found.manifest, name, None) == getattr(wanted.manifest, name, None), name
    ours, theirs = (describe(run) for run in (found, wanted))
    if local is None:
        assert ours == theirs
    assert "failed" not in [check.result for check in verify(found)], verify(found)
    assert names_in(found.path) == names_in(wanted.path) or local is not None
    return found, wanted


def by_both(data, folder, **options):
    """Compress by both engines, and compare what they say of the rows."""
    kinds, asked = ("ray", "local"), {"report": False, **options}
    runs = [compress(str(data), engine=k, output_dir=folder / k, **asked) for k in kinds]
    for name in ("labels", "notes", "problems", "kept", "rows", "scores"):
        assert getattr(runs[0].manifest, name) == getattr(runs[1].manifest, name), name
    assert describe(runs[0]) == describe(runs[1])
    assert "failed" not in [check.result for check in verify(runs[0])], verify(runs[0])
    return runs


def describe(run):
    """What config.yaml says, but for the hash of a column, which files pin."""
    config = run.config.as_dict()
    (config.get("embedding") or {}).pop("sha256_of_float32", None)
    return config


def names_in(folder):
    """All files of a run; the subset may be in one or several."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if not name.startswith("subset/part-")}


def check_tables(found, wanted):
    for name in TABLES:
        ours, theirs = (pq.read_table(run.path / name) for run in (found, wanted))
        assert ours.schema.equals(theirs.schema, check_metadata=True)
        pd.testing.assert_frame_equal(ours.to_pandas(), theirs.to_pandas(), check_exact=True)
    ours, theirs = (run.subset.with_format("arrow")[:] for run in (found, wanted))
    assert found.subset.features == wanted.subset.features
    assert ours.equals(theirs)
    if (found.path / "embeddings.npy").exists():
        arrays = (np.load(run.path / "embeddings.npy") for run in (found, wanted))
        np.testing.assert_array_equal(*arrays)


VECTORS = {"ready_embeddings": "vector", "partition": "kmeans:5"}
CASES = {
    "parts": {"method": "dq", "ready_embeddings": "half", "partition": "kmeans:5"},
    "labels": {"method": "dq", "ready_embeddings": "vector", "label_column": "hole"},
    "graph cut": {"method": "graphcut", "ready_embeddings": "half", "label_column": "number"},
    "one stratum": {"method": "graphcut", "ready_embeddings": "vector", "keep_rows": 77},
    "blocks": {"method": "blocks", **VECTORS, "similarity": "euclidean", "keep_ratio": 0.5},
    "rank": {"method": "dq", **VECTORS, "draw": "rank", "seed": 7, "n_bins": 4},
    "random": {"method": "random", "label_column": "kind", "keep_rows": 123},
    "coverage": {"method": "coverage", "ready_embeddings": "half", "label_column": "kind"},
    "coverage of parts": {"method": "coverage", **VECTORS, "keep_rows": 77},
    "no strata": {"method": "random", "seed": 3},
    "auto": {"method": "auto", "ready_embeddings": "vector"},
    "slice": {"method": "dq", **VECTORS, "split": "train[:50%]"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_rows_are_those_of_the_local_engine(cluster, tmp_path, files, options):
    run_both(files, tmp_path, **options)


def test_a_file_of_vectors_and_very_large_parts_in_pieces(cluster, tmp_path, files, monkeypatch):
    monkeypatch.setattr(partition, "LARGE_ROWS", 40)  # of the driver: workers get their pieces
    values = np.random.default_rng(1).normal(size=(N, 5))
    values[100:400] = values[0]
    np.save(tmp_path / "v.npy", values)
    options = {"method": "dq", "partition": "kmeans:8", "ready_embeddings": str(tmp_path / "v.npy")}
    found, _ = run_both(files, tmp_path, **options)
    assert len(found.manifest.labels) > 8


def test_a_dataset_in_memory_with_class_labels(cluster, tmp_path, table):
    names = ["a", "none of these", "c d", "b", "\u00e9"]
    data = Dataset(table).cast_column("kind", ClassLabel(names=names))
    options = {"method": "dq", "ready_embeddings": "half", "label_column": "kind"}
    found, _ = run_both(data, tmp_path, **options)
    assert found.manifest.labels == ["a", "c d", "b", "\u00e9"]


@pytest.mark.parametrize("kind", ["url", "path"])
def test_parts_may_lie_elsewhere(cluster, tmp_path, files, kind):
    place = tmp_path / "elsewhere"
    place.mkdir()
    storage = f"file://{place}" if kind == "url" else str(place)
    options = {"method": "dq", **VECTORS, "report": True}
    run = on_ray(files, tmp_path / "run", ray_storage=storage, **options)
    assert list(place.rglob("*")) == []
    assert not (run.path / "parts").exists()
    local = compress(str(files), output_dir=tmp_path / "local", **{**options, "report": False})
    check_tables(run, local)
    assert "failed" not in [check.result for check in verify(run)]
    assert "part 0" in (run.path / "report.html").read_text()


def test_a_url_and_json_lines(cluster, tmp_path, table, files, monkeypatch):
    options = {"method": "dq", **VECTORS}
    run_both(f"file://{files}", tmp_path / "url", local=str(files), **options)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 20_000)
    path = tmp_path / "d.jsonl"
    table.drop_columns("half").to_pandas().to_json(path, orient="records", lines=True)
    run_both(path, tmp_path / "lines", **options)


@pytest.mark.parametrize("name", ["text", slow("messages")])
def test_text_is_embedded_as_here(cluster, tmp_path, small_encoder, name):
    rows = [f"the quick fox {k} " * (k % 5 + 1) for k in range(120)]
    rows[7] = rows[70] = ""
    if name == "messages":
        turns = [{"role": "assistant", "content": f"dog {k}"} for k in range(120)]
        rows = [[{"role": "user", "content": row}, t] for row, t in zip(rows, turns, strict=True)]
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({name: rows}), path, row_group_size=25)
    runs = by_both(path, tmp_path, method="dq", embedding_model=str(small_encoder), n_bins=4)
    ours, theirs = (np.load(run.path / "embeddings.npy") for run in runs)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if name == "text":
        assert {tuple(found.rows) for found in runs[0].manifest.problems.values()} == {(7, 70)}


@pytest.mark.parametrize("measure", [None, slow("texture")])
def test_adq_scores_rows_of_text(cluster, tmp_path, small_encoder, measure):
    texts = [f"the quick fox {k * k} jumps " * (k % 4 + 1) for k in range(120)]
    vectors = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32).tolist()
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": texts, "vector": vectors}), path, row_group_size=25)
    options = {"method": "adq", "embedding_model": str(small_encoder), "n_bins": 4}
    options |= {"ready_embeddings": "vector", "representativeness": measure}
    runs = by_both(path, tmp_path, **options)
    ours, theirs = (pq.read_table(run.path / "bins.parquet").to_pandas() for run in runs)
    assert np.isfinite(ours[["representativeness", "diversity", "weight"]]).all(axis=None)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-4)  # all rows are scored


PICTURES = {f"{k:02d}.png": save(picture((16, 16), seed=k)) for k in range(45)}
KINDS = ("cat", "dog", "emu")


def write_pictures(place, *, is_folder):
    """Write pictures of three classes, a broken one among them: row 22 if they are in a table."""
    files = [*{**PICTURES, "22.png": b"no picture"}.items()]
    if is_folder:
        for k, (name, data) in enumerate(files):
            (place / KINDS[k % 3]).mkdir(parents=True, exist_ok=True)
            (place / KINDS[k % 3] / name).write_bytes(data)
        return place
    images = [{"bytes": data, "path": name} for name, data in files]
    features = Features({"image": Image(), "label": ClassLabel(names=[*KINDS])})
    rows = Dataset.from_dict({"image": images, "label": [k % 3 for k in range(45)]}, features)
    rows.to_parquet(place.with_suffix(".parquet"), batch_size=10)
    return place.with_suffix(".parquet")


@pytest.mark.parametrize(
    ("method", "is_folder"),
    [("random", True), slow("dq", False), slow("adq", True)],
)
def test_images(cluster, tmp_path, small_classifier, method, is_folder):
    data = write_pictures(tmp_path / "images", is_folder=is_folder)
    model = {} if method == "random" else {"embedding_model": str(small_classifier), "n_bins": 3}
    runs = by_both(data, tmp_path, method=method, **model)
    assert runs[0].manifest.labels == [*KINDS]
    assert len(runs[0].manifest.problems) == 1
    if method != "adq":  # whose scores may differ in their last digits
        check_tables(*runs)
    rows = runs[0].subset.cast_column("image", Image(decode=False))
    assert len(rows) == 9
    for row in rows:
        assert row["image"]["bytes"] == PICTURES[Path(row["image"]["path"]).name]


@pytest.mark.parametrize("method", ["dq", slow("random"), slow("adq")])
def test_images_with_text(cluster, tmp_path, small_classifier, small_encoder, method):
    path = tmp_path / "rows.parquet"
    files = [*PICTURES.values()]
    files[22], files[30] = b"no picture", None
    images = [[] if data is None else [{"bytes": data, "path": None}] for data in files]
    texts = [f"<image> the quick fox {k % 5}" for k in range(44)] + [""]
    kinds = Features({"images": List(Image()), "text": Value("string")})
    Dataset.from_dict({"images": images, "text": texts}, kinds).to_parquet(path, batch_size=10)
    model = {"embedding_model": f"{small_classifier},{small_encoder}", "n_bins": 3}
    runs = by_both(path, tmp_path, method=method, **({} if method == "random" else model))
    assert runs[0].config.rows.modality == "image-text"
    problems = {what: found.rows for what, found in runs[0].manifest.problems.items()}
    assert problems["an image that cannot be read"] == [22]
    assert (problems["no image"], problems["no text at all"]) == ([30], [44])
    if method == "random":
        check_tables(*runs)
    else:
        ours, theirs = (np.load(run.path / "embeddings.npy") for run in runs)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def stop_in(stage, monkeypatch):
    """Let the first of the tasks of a stage be done, and the driver end there."""
    do = Cluster.do

    def end(self, what, task, numbers, **how):
        if what == stage:
            list(do(self, what, task, numbers[:1], **how))
            raise KeyboardInterrupt
        yield from do(self, what, task, numbers, **how)

    monkeypatch.setattr(Cluster, "do", end)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize(
    "stage",
    ["bins", *map(slow, ("embeddings", "parts", "order", "selection", "subset"))],
)
def test_a_stopped_run_goes_on_where_it_was(
    cluster, tmp_path, files, whole, monkeypatch, stage, where
):
    storage = {} if where == "here" else {"ray_storage": str(tmp_path / "elsewhere")}
    options = {**RESUMED, **storage}
    with monkeypatch.context() as patch:
        stop_in(stage, patch)
        with pytest.raises(KeyboardInterrupt):
            on_ray(files, tmp_path / "run", **options)
    [parts] = [path.parent for path in tmp_path.rglob("embeddings") if path.is_dir()]
    before = {path: path.stat().st_mtime_ns for path in parts.rglob("*.json")}
    assert parts / stage / "00000.json" in before
    assert parts / stage / "00001.json" not in before
    done, finish = {}, folder.finish

    def look(*given):
        done.update(seen(parts))
        finish(*given)

    monkeypatch.setattr(folder, "finish", look)
    run = on_ray(files, tmp_path / "run", **options)
    assert {path: done[path] for path in before} == before  # none was made again
    assert len(done) > len(before)
    check_tables(run, whole)
    assert "failed" not in [check.result for check in verify(run)]


def seen(parts):
    return {path: path.stat().st_mtime_ns for path in parts.rglob("*.json")}


RESUMED = {"method": "dq", **VECTORS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, files):
    place = tmp_path_factory.mktemp("whole")
    return compress(str(files), output_dir=place, report=False, **RESUMED)


def test_a_finished_run_is_found_again(cluster, tmp_path, files, monkeypatch):
    options = {"method": "dq", **VECTORS}
    run = on_ray(files, tmp_path / "run", **options)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    asked = []
    do = Cluster.do
    monkeypatch.setattr(
        Cluster, "do", lambda self, what, *a, **k: asked.append(what) or do(self, what, *a, **k)
    )
    again = on_ray(files, tmp_path / "run", **options)
    assert again.was_complete
    assert asked == ["files"]
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    with pytest.raises(InputError, match=r"another run .*n_bins"):
        on_ray(files, tmp_path / "run", n_bins=4, **options)
    other = on_ray(files, tmp_path / "run", overwrite=True, n_bins=4, **options)
    assert not other.was_complete
    assert other.request.n_bins == 4
    (run.path / "selection.parquet").unlink()
    mended = on_ray(files, tmp_path / "run", n_bins=4, **options)
    assert not mended.was_complete
    assert "failed" not in [check.result for check in verify(mended)]
    local = compress(str(files), output_dir=tmp_path / "run", report=False, n_bins=4, **options)
    assert local.was_complete  # the engine is not what makes another run


def test_the_commands_that_read_a_run(cluster, tmp_path, files, command, hub):
    options = {"method": "dq", **VECTORS, "keep_ratio": 0.3}
    run = on_ray(files, tmp_path / "run", **options)
    local = compress(str(files), output_dir=tmp_path / "local", report=False, **options)
    command(tmp_path, "report", "run")
    assert "part 0" in (tmp_path / "run" / "report.html").read_text()
    drawn = [
        other.resample(0.1, output_dir=tmp_path / f"r{k}") for k, other in enumerate((run, local))
    ]
    check_tables(*drawn)
    command(tmp_path, "push", "run", "me/run")
    assert hub.files("me/run")["selection.parquet"] == (run.path / "selection.parquet").read_bytes()


def test_what_others_put_into_the_parts_is_refused(cluster, tmp_path, files, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in("bins", patch)
        with pytest.raises(KeyboardInterrupt):
            on_ray(files, tmp_path / "run", **RESUMED)
    mine = tmp_path / "run" / "parts" / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(InputError, match=r"parts/mine\.txt was not written by a run"):
        on_ray(files, tmp_path / "run", **RESUMED)
    assert mine.read_text() == "mine"


def test_a_source_that_changed_is_refused(cluster, tmp_path, table, monkeypatch):
    path = tmp_path / "d.parquet"
    pq.write_table(table, path, row_group_size=100)
    with monkeypatch.context() as patch:
        stop_in("bins", patch)
        with pytest.raises(KeyboardInterrupt):
            on_ray(path, tmp_path / "run", **RESUMED)
    pq.write_table(table.slice(0, 599), path, row_group_size=100)
    with pytest.raises(InputError, match=r"another run .*its source had another content"):
        on_ray(path, tmp_path / "run", **RESUMED)

    do = Cluster.do

    def touch(self, what, *rest, **how):
        if what == "subset":
            os.utime(path, ns=(0, 0))
        yield from do(self, what, *rest, **how)

    monkeypatch.setattr(Cluster, "do", touch)
    with pytest.raises(InputError, match=r"has changed while it was read: d\.parquet"):
        on_ray(path, tmp_path / "other", **RESUMED)
    assert not (tmp_path / "other" / "subset").exists()


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "row 459 holds NaN"), (None, "vectors of one size, got 7 to 8")]
)
def test_vectors_that_are_none_are_refused(cluster, tmp_path, table, value, message):
    vectors = table["vector"].to_pylist()
    vectors[459] = [value] * 8 if value is not None else [1.0] * 7
    bad = table.set_column(2, "vector", pa.array(vectors, pa.list_(pa.float32())))
    pq.write_table(bad, tmp_path / "d.parquet", row_group_size=100)
    with pytest.raises(InputError, match=message) as error:
        on_ray(tmp_path / "d.parquet", tmp_path / "run", **RESUMED)
    assert "\n" not in str(error.value)


WRONG = {
    "streaming": ["--streaming"],
    "target": ["--target", "t.parquet"],
    "dynamics": ["--dynamics", "d.npy"],
    "drop_duplicates": ["--drop-duplicates", "0.9"],
    "cap_by": ["--cap-by", "kind", "--cap", "5"],
    "max_memory": ["--max-memory", "4GB"],
    "keep_every_class": ["--keep-every-class"],
    "drop_ratio": ["--drop-ratio", "0.5"],
    "got all": ["--split", "all"],
    "gradients": ["--image-embedding", "gradients"],
    "engine must be": ["--engine", "rya"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_the_engine_cannot_do_is_refused_in_one_line(cli, message):
    done = cli("compress", "d.parquet", "--engine", "ray", *WRONG[message], code=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_setting_that_the_engine_does_not_know_is_tried():
    assert {*NOT_ON_RAY} - {"difficulty"} <= WRONG.keys()  # which needs dynamics


def test_ray_that_is_not_installed_is_named_in_one_line(cli, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = cli("compress", "d.parquet", "--engine", "ray", code=2)
    assert done.stderr == "error: engine ray needs Ray: pip install 'dq-multimodal[ray]'\n"


def test_more_bins_or_rows_than_there_are(cluster, tmp_path, files):
    for options, message in (
        ({"n_bins": 601}, "n_bins must be at most the 600 rows, got 601"),
        ({"keep_rows": 601}, "keep_rows must be at most the 600 rows, got 601"),
        ({"ready_embeddings": "none"}, "none"),
        ({"partition": "kmeans:601"}, "600"),
        ({"label_column": "kind"}, "partition is for rows without labels"),
    ):
        with pytest.raises(InputError, match=message):
            on_ray(files, tmp_path / "run", **{"method": "dq", **VECTORS, **options})
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dataset_on_the_hub(tmp_path, table, hub, command):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100)
    hub.add_repo("me/data", {"data/train-0.parquet": buffer.getvalue()})
    words = ("--method", "dq", "--ready-embeddings", "vector", "--no-report", "--output-dir")
    env = hub.env(tmp_path)
    for name in ("ray", "local"):
        command(tmp_path, "compress", "me/data", "--engine", name, *words, name, env=env)
    check_tables(Run(tmp_path / "ray"), Run(tmp_path / "local"))
    assert describe(Run(tmp_path / "ray")) == describe(Run(tmp_path / "local"))


def test_a_slice_takes_its_rows_of_a_file_of_all_embeddings(cluster, files, tmp_path):
    np.save(tmp_path / "v.npy", np.random.default_rng(1).normal(size=(N, 6)))
    given = {"method": "dq", "ready_embeddings": str(tmp_path / "v.npy"), "partition": "kmeans:2"}
    run_both(files, tmp_path, split="train[30%:55%]+train[80%:]", **given)


def test_a_path_with_brackets_resumes(cluster, files, tmp_path, monkeypatch):
    place, given = tmp_path / "a[1]*", {"method": "dq", "ready_embeddings": "half"}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dq_multimodal.distributed.engine.make_groups", stop)
        with pytest.raises(KeyboardInterrupt):
            on_ray(files, place, **given)
    run = on_ray(files, place, **given)
    assert np.load(place / "embeddings.npy").any(axis=1).all()
    assert {check.result for check in verify(run)} == {"passed"}


def test_lost_embeddings_are_made_again_before_the_run_ends(cluster, files, tmp_path, monkeypatch):
    place, given = tmp_path / "r", {"method": "dq", "ready_embeddings": "half"}
    with monkeypatch.context() as patch:
        patch.setattr("dq_multimodal.distributed.engine.make_groups", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            on_ray(files, place, **given)
    (place / "embeddings.npy").unlink()
    on_ray(files, place, **given)
    assert np.load(place / "embeddings.npy").any(axis=1).all()


def test_shards_without_files_have_lines_in_kept_files_too(cluster, tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for k in range(20):
        (place / f"{k}.png").write_bytes(save(picture(seed=k)))
    places = [str(place / f"{k}.png") for k in range(20)]
    data = [{"bytes": Path(p).read_bytes(), "path": None} for p in places[:10]]
    data += [{"bytes": None, "path": p} for p in places[10:]]
    rows = Dataset.from_dict({"image": data * 2}, features=Features({"image": Image()}))
    run = on_ray(rows, tmp_path / "r", method="random", keep_ratio=0.5)
    lines = (tmp_path / "r" / "subset" / "kept_files.txt").read_text().split("\n")[:-1]
    names = [Path(p).name if k % 20 >= 10 else "" for k, p in enumerate([*places, *places])]
    assert [Path(line).name for line in lines] == [names[row] for row in run.kept]


def test_storage_inside_the_dataset_is_refused(files):
    with pytest.raises(InputError, match="lies in the dataset"):
        on_ray(files, files.parent / "r", method="random", ray_storage=str(files / "work"))


def test_facts_name_no_files(cluster, files, tmp_path, monkeypatch):
    """What somebody wrote into a folder of parts leads to no file of this machine."""
    secret = tmp_path / "secret.parquet"
    pq.write_table(pa.table({"a": [1]}), secret)
    place = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr("dq_multimodal.distributed.engine.join_tables", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            on_ray(files, place, method="random")
    [key] = (place / "parts").iterdir()
    (key / "subset").mkdir()
    facts = {"files": "../../../secret", "rows": 1, "bytes": 0, "named": False}
    (key / "subset" / "00000.json").write_text(
        str(facts).replace("'", '"').replace("False", "false")
    )
    with pytest.raises((InputError, ValueError)):
        on_ray(files, place, method="random")
    assert not (place / "subset").exists()


def test_a_task_that_ends_its_workers_is_given_up(tmp_path, monkeypatch):
    def fall(*_):
        raise SystemExit  # as a worker that dies: no facts

    monkeypatch.setattr(on_shards, "MOST_TRIES", 3)
    asked = on_shards.__version__, Store(str(tmp_path)), "bins", fall, 7, tmp_path
    for _ in range(3):
        with pytest.raises(SystemExit):
            on_shards.do_once(*asked)
    with pytest.raises(InputError, match="task 7 of bins has ended 3 workers"):
        on_shards.do_once(*asked)
    with pytest.raises(SystemExit):  # another start tries again
        on_shards.do_once(*asked)
    with pytest.raises(InputError, match=r"a machine has dq-multimodal .* the driver 9\.9"):
        on_shards.do_once("9.9", *asked[1:])
