"""Local files and folders: read by content, pinned by place, in full or with a note."""

import bz2
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.load import infer_module_for_data_files_list
from forging import change_document, record_again
from nasty_images import picture, save
from tqdm import tqdm

from dq_multimodal import InputError, Run, compress, verify
from dq_multimodal.data import listing, local
from dq_multimodal.data.source import from_memory, load_source, reload_source

N = 40
OWN = ["dq_row", "dq_bin", "dq_rank"]


def rows(word="row", n=N):
    return [{"text": f"{word} {k:03d}", "label": k % 2} for k in range(n)]


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".parquet", ".csv"):
        table = Dataset.from_list(found)
        table.to_csv(path) if path.suffix == ".csv" else table.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def write_pictures(folder, names):
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(save(picture((8, 8), seed=k)))
    return folder


def draw(source, folder, **options):
    options = {"method": "random", "keep_ratio": 1.0, "report": False, **options}
    source = str(source) if isinstance(source, Path) else source
    return compress(source, output_dir=folder, **options)


def results(run, n=3):
    return [check.result for check in verify(run)][:n]


def has_note(run, part):
    return any(part in note for note in run.manifest["notes"])


def keep_times(path, other):
    """Put another content at a path, with the times that were there, as cp -p does."""
    before = path.stat()
    path.unlink()
    path.write_bytes(other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["d.parquet", "d.csv", "d.jsonl", "folder"])
def test_a_file_replaced_with_its_time_kept_gives_the_new_rows(name, tmp_path):
    path = write(tmp_path / ("src/d.jsonl" if name == "folder" else name), rows("old"))
    source = path.parent if name == "folder" else path
    first = draw(source, tmp_path / "a")
    other = write(tmp_path / f"other{path.suffix}", rows("new")).read_bytes()
    keep_times(path, other)
    assert verify(first)[2].detail.endswith("its content has changed")
    with pytest.raises(InputError, match="its source had another content"):
        draw(source, tmp_path / "a")
    second = draw(source, tmp_path / "b")
    assert second.subset["text"][:] == [row["text"] for row in rows("new")]
    assert results(second) == ["passed"] * 3
    draw(first.subset.remove_columns(OWN), tmp_path / "c")
    with pytest.raises(InputError, match="its source had another content"):
        draw(second.subset.remove_columns(OWN), tmp_path / "c")


def test_a_subset_damaged_with_its_time_kept_is_seen(tmp_path):
    run = draw(write(tmp_path / "d.parquet", rows()), tmp_path / "r")
    assert results(run)[2] == "passed"
    part = run.path / "subset" / "part-00000.parquet"
    table = pq.read_table(part)
    text = pa.array([value.as_py().replace("row", "rob") for value in table["text"]])
    before = part.stat()
    pq.write_table(table.set_column(0, table.schema.field("text"), text), part)
    os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run.subset["text"][0] == "rob 000"
    assert results(run)[2] == "failed"


@pytest.mark.parametrize("name", ["d.jsonl", "pictures"])
def test_a_file_replaced_between_hash_and_reading_is_an_error(name, tmp_path, monkeypatch):
    if name == "pictures":
        source = write_pictures(tmp_path / name, ["a.png", "b.png"])
        path, other = source / "a.png", save(picture((8, 8), seed=9))
    else:
        path = source = write(tmp_path / name, rows("old"))
        other = write(tmp_path / "other.jsonl", rows("new")).read_bytes()
    hash_file = local.hash_file

    def hash_and_replace(found):
        digest = hash_file(found)
        if found == str(path):
            moment = path.stat().st_mtime_ns
            path.write_bytes(other)
            os.utime(path, ns=(moment, moment))
        return digest

    monkeypatch.setattr(local, "hash_file", hash_and_replace)
    with pytest.raises(InputError, match=f"has changed while it was read: {path.name}"):
        draw(source, tmp_path / "r")
    with pytest.raises(InputError):
        Run(tmp_path / "r")
    monkeypatch.undo()
    run = draw(source, tmp_path / "r", overwrite=True)
    assert results(run)[2] == "passed"
    if name == "d.jsonl":
        assert run.subset["text"][0] == "new 000"


@pytest.mark.parametrize("limit", [100, 3])
def test_a_renamed_class_folder_is_another_source(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "MAX_LISTED", limit)
    files = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    source = write_pictures(tmp_path / "p", files)
    run = draw(source, tmp_path / "r")
    names = [file["name"] for file in run.config["source"]["files"]]
    assert names == (files if limit == 100 else ["4 files"])
    assert run.subset.features["label"].names == ["cat", "dog"]
    (source / "dog").rename(source / "eel")
    assert verify(run)[2].detail.endswith("its content has changed")
    with pytest.raises(InputError, match="its source had another content"):
        draw(source, tmp_path / "r")


def test_a_pin_of_an_earlier_release_is_compared_as_far_as_it_goes(tmp_path, monkeypatch):
    source = write_pictures(tmp_path / "p", ["cat/0.png", "dog/1.png"])
    origin = load_source(str(source)).origin
    del origin["names"]  # that release wrote neither this nor the folders
    origin["files"] = [{**file, "name": file["name"][4:]} for file in origin["files"]]
    assert len(reload_source(origin).dataset) == 2
    monkeypatch.setattr(local, "MAX_LISTED", 1)
    with pytest.raises(InputError, match="or an earlier release pinned it"):
        reload_source({**origin, "files": [{"name": "2 files", "bytes": 9, "sha256": "0"}]})


LAYOUTS = {
    "classes": ["cat/0.png", "cat/b.JPG", "dog/2.png", "dog-1/3.png"],
    "uneven": ["cat/0.png", "cat/x/1.png", "2.png"],
    "splits": ["train/0.png", "test/1.png", "test/2.png"],
    "splits and classes": ["train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png"],
    "names": ["train_0.png", "train_1.png", "test_2.png", "3.png"],
    "twice": ["train/train-a/0.png", "train/train-a/1.png"],
    "hidden": [".h/0.png", "__x__/1.png", "a/2.png", "b/3.png", "b/.4.png"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_pictures_has_the_rows_that_datasets_reads(layout, tmp_path):
    def show(found, is_short):
        values = found.with_format("arrow")[[*range(len(want))]].to_pylist()
        return [  # a stream has the files themselves
            {**row, "image": Path(row["image"]["path"]).name} if is_short else row for row in values
        ]

    source = write_pictures(tmp_path / "p", LAYOUTS[layout])
    wanted = load_dataset(str(source), cache_dir=str(tmp_path / "cache"))
    for split, want in wanted.items():
        for streaming in (False, True):
            got = load_source(str(source), split=split, streaming=streaming).dataset
            assert got.features == want.features
            assert show(got, streaming) == show(want, streaming)
    if layout == "splits and classes":
        both = load_source(str(source), split="train[50%:]+validation").dataset
        assert both["label"][:] == [1, 0, 1]
        assert len(load_source(str(source), split="all").dataset) == 4


def test_pictures_described_by_metadata_are_read_with_it(tmp_path):
    latin = write_pictures(tmp_path / "l", ["a.png"])
    (latin / "metadata.csv").write_text("file_name,word\na.png,café\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"l/metadata\.csv is not UTF-8 text"):
        load_source(str(latin))
    source = write_pictures(tmp_path / "p", ["a.png", "b.png"])
    (source / "metadata.csv").write_text("file_name,word\nb.png,x\na.png,y\n")
    for streaming in (False, True):
        found = load_source(str(source), streaming=streaming).dataset
        assert found[[0, 1]]["word"] == ["x", "y"]


def test_what_a_folder_holds_and_is_not_read_is_said(tmp_path, cli):
    names = [f"{kind}/{k}.png" for kind in ("cat", "dog") for k in range(6)]
    source = write_pictures(tmp_path / "p", [*names, "dog/x.avif", "dog/y.avif", "z.heic"])
    (source / "README.md").write_text("pictures")
    (tmp_path / "elsewhere").mkdir()
    (source / "more").symlink_to(tmp_path / "elsewhere")
    done = cli("compress", "p", "--method", "random", "--output-dir", "r", "--no-report")
    note = "3 files of the folder not read: 2 .avif, 1 .heic, such as dog/x.avif"
    assert done.stdout.count(note) == 1
    assert "1 folder in it not entered (links, runs, or not readable): more" in done.stdout
    assert Run(tmp_path / "r").manifest["rows"] == 12
    (source / "train_1.png").write_bytes(save(picture((8, 8))))
    split = draw(source, tmp_path / "s")
    assert split.manifest["rows"] == 1
    assert has_note(split, "15 files of the folder not read: 12 .png")
    for path in source.rglob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"it holds 2 \.avif, 1 \.heic, such as dog/x\.avif"):
        draw(source, tmp_path / "t")


def test_lists_and_annotations_beside_pictures_do_not_win(tmp_path):
    voc = write_pictures(tmp_path / "voc", [f"JPEGImages/{k}.jpg" for k in range(8)])
    lists = [f"ImageSets/Main/{name}.txt" for name in ("train", "val")]
    for name in (*lists, *(f"Annotations/{k}.xml" for k in range(8))):
        write(voc / name, [])
    run = draw(voc, tmp_path / "r")
    assert run.manifest["rows"] == 8
    assert run.subset.column_names[0] == "image"
    assert has_note(run, "10 files of the folder not read: 8 .xml, 2 .txt")
    yolo = write_pictures(tmp_path / "yolo", [f"images/train/{k}.jpg" for k in range(4)])
    for k in range(4):
        write(yolo / f"labels/train/{k}.txt", [])
    assert draw(yolo, tmp_path / "y").manifest["rows"] == 4
    table = write_pictures(tmp_path / "table", [f"images/{k}.jpg" for k in range(8)])
    write(table / "train.jsonl", rows())
    run = draw(table, tmp_path / "t")
    assert run.manifest["rows"] == N
    assert has_note(run, "8 files of the folder not read: 8 .jpg")


def test_a_huge_tree_that_is_no_data_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "PROBED_FILES", 50)
    for k in range(200):
        write(tmp_path / "home" / f"{k % 7}" / f"{k}.py", [])
    one = write(tmp_path / "home" / "0" / "a.json", rows())
    with pytest.raises(InputError, match=r"is no folder of data: of the first [0-9]+ files in it"):
        draw(tmp_path / "home", tmp_path / "r")
    assert draw(one, tmp_path / "r").manifest["rows"] == N


def test_a_folder_that_may_not_be_entered_is_left_out(tmp_path, monkeypatch):
    write(tmp_path / "a.json", rows())
    write(tmp_path / "shut" / "b.json", rows())
    stat, access = os.stat, os.access

    def fail_inside(path, *args, **options):
        if os.fspath(path).startswith(f"{tmp_path}/shut/"):
            raise PermissionError
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", fail_inside)  # as for another user, with mode 744
    monkeypatch.setattr(os, "access", lambda path, mode: "shut" not in path and access(path, mode))
    assert not listing._is_run(f"{tmp_path}/shut")
    found = listing.list_data(tmp_path, "d")
    assert found.by_split == {"train": [f"{tmp_path}/a.json"]}
    assert found.note == "1 folder in it not entered (links, runs, or not readable): shut/"


MIXED = [
    *(["a.csv", "b.json"], ["a.json", "b.parquet"], ["a.xml", "b.txt"], ["a.tar.gz", "b.JSONL"]),
    *(["metadata.jsonl", "a.csv"], ["metadata.csv", "metadata.jsonl"], ["a.b.csv", "c.txt"]),
    *(["a.lance", "b.arrow"], ["a.tar", "b.tar", "c.csv"], ["a.npy"], ["a"], ["a.PNG", "b.csv"]),
]


@pytest.mark.parametrize("files", MIXED)
def test_the_reader_is_that_of_datasets(files):
    reader, options = infer_module_for_data_files_list(files)
    assert listing._infer_reader(Path("d"), files) == ((reader, options) if reader else None)


def test_splits_of_different_kinds_are_named(tmp_path):
    write(tmp_path / "train.csv", rows())
    (tmp_path / "test.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"files of different kinds \(train: csv, test: text\)"):
        load_source(str(tmp_path))


def test_hashing_counts_files(tmp_path, monkeypatch):
    bars = []

    def show(*args, **options):
        bars.append(tqdm(*args, **options))
        return bars[-1]

    monkeypatch.setattr(local, "tqdm", show)
    monkeypatch.setattr(local, "HASHED_TOGETHER", 2)
    paths = [str(write(tmp_path / f"{k}.json", rows())) for k in range(5)]
    pinned = local.PinnedFiles(paths, tmp_path, "d")
    assert [(bar.n, bar.total, bar.unit) for bar in bars] == [(5, 5, "file")]
    assert [file["name"] for file in pinned.describe()] == [f"{k}.json" for k in range(5)]


def test_a_run_inside_the_folder_is_no_part_of_it(tmp_path, cli):
    write(tmp_path / "a.json", rows())
    common = ("compress", ".", "--method", "random", "--no-report", "--output-dir", "runs/r")
    cli(*common)
    assert "already complete" in cli(*common).stdout
    assert Run(tmp_path / "runs" / "r").manifest["rows"] == N
    (tmp_path / "pipes").mkdir()  # which would hold up whoever reads them
    for name in ("config.yaml", "manifest.json", "b.jsonl"):
        os.mkfifo(tmp_path / "pipes" / name)
    assert len(load_source(str(tmp_path)).dataset) == N


def test_data_saved_with_a_format_is_read_without_it(tmp_path):
    data = Dataset.from_list([{**row, "vector": [1.0, 2.0]} for row in rows()])
    data.with_format("torch", columns=["label"]).save_to_disk(tmp_path / "one")
    two = DatasetDict(train=data.with_format("numpy"), test=data.select([0, 1]))
    two.save_to_disk(tmp_path / "two")
    run = draw(tmp_path / "one", tmp_path / "a", label_column="label")
    assert run.subset.column_names[:3] == ["text", "label", "vector"]
    assert run.manifest["labels"] == ["0", "1"]
    assert load_source(str(tmp_path / "two")).dataset["vector"][0] == [1.0, 2.0]
    both = draw(tmp_path / "two", tmp_path / "b", split="train[:3]+test")
    assert both.manifest["rows"] == 5
    names = {Path(file["name"]).parent.name for file in both.config["source"]["files"]}
    assert names == {"train", "test"}
    assert draw(tmp_path / "two", tmp_path / "c", split="all").manifest["rows"] == N + 2
    assert results(both) == ["passed"] * 3


def test_saved_data_by_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(rows()).save_to_disk("saved")
    run = draw("saved", "run", keep_ratio=0.5)
    assert results(run, 5) == [*["passed"] * 3, "skipped", "passed"]
    assert run.config["source"]["files"][0]["name"] == "dataset_info.json"
    state = json.loads(Path("saved/state.json").read_text())
    state["_data_files"][0]["filename"] = "../saved/" + state["_data_files"][0]["filename"]
    Path("saved/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="names data outside its folder"):
        draw("saved", "other")


def make_splits(place, kind):
    """Make 40 train and 10 test rows in one of the forms that datasets have."""
    sizes = {"train": N, "test": 10}
    if kind == "pictures":
        for split, n in sizes.items():
            write_pictures(place, [f"{split}/{'ab'[k % 2]}/{k}.png" for k in range(n)])
        return str(place)
    splits = DatasetDict({k: Dataset.from_list(rows(k, n)) for k, n in sizes.items()})
    if kind == "loaded":
        return splits
    if kind == "saved":
        splits.save_to_disk(place)
    else:
        for split, data in splits.items():
            write(place / f"{split}.{kind}", list(data))
    return str(place)


@pytest.mark.parametrize("label", [None, "label"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "loaded", "pictures"])
def test_all_splits_keep_their_share_and_load_as_splits(kind, label, tmp_path):
    source = make_splits(tmp_path / "d", kind)
    options = {"split": "all", "label_column": label or "none"}
    run = draw(source, tmp_path / "r", keep_ratio=0.4, **options)
    sizes = run.config.source.splits
    assert dict(sizes) == {"train": N, "test": 10}
    classes = ["a", "b"] if kind == "pictures" else ["0", "1"]
    pairs = [f"{split}: {name}" for split in sizes for name in classes]
    assert run.manifest.labels == (pairs if label else [*sizes])
    smaller = run.resample(0.2, output_dir=tmp_path / "s")
    for share, found in ((0.4, run), (0.2, smaller)):
        subset = load_dataset(str(found.path))
        n_rows = {split: len(data) for split, data in subset.items()}
        assert n_rows == {"train": share * N, "test": share * 10}
        assert max(subset["train"]["dq_row"]) < N <= min(subset["test"]["dq_row"])
        assert "failed" not in results(found, 5)
        assert kind == "loaded" or results(found) == ["passed"] * 3
    if kind == "jsonl":
        assert all(text.startswith("test") for text in subset["test"]["text"])


def test_a_split_of_which_no_row_is_kept_has_no_files(tmp_path):
    sizes = {"train": N, "test": 1}
    splits = DatasetDict({k: Dataset.from_list(rows(k, n)) for k, n in sizes.items()})
    options = {"split": "all", "keep_ratio": 0.1, "label_column": "none"}
    run = draw(splits, tmp_path / "r", **options)
    assert {k: len(v) for k, v in load_dataset(str(run.path)).items()} == {"train": 4}


def test_splits_of_tables_name_no_file_of_this_machine(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"SECRET")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    splits = DatasetDict()
    for n_rows, name in enumerate("ab", 1):
        value = {"bytes": None, "path": str(tmp_path / "secret.png")}
        file = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({"image": pa.array([value] * n_rows, kind)}), file)
        splits[name] = load_dataset("parquet", data_files=file)["train"]
    with pytest.raises(InputError, match="secret"):
        from_memory(splits.cast_column("image", Image(decode=False)), "all")


@pytest.mark.parametrize(
    "splits", [{"train": 1, "all": 2}, {"a-b": 1, "c": 2}, {}, {"train": 2, "test": "text"}]
)
def test_a_loaded_dict_that_cannot_be_joined_is_refused_in_one_line(splits):
    rows = {2: {"x": [1, 2]}, 1: {"x": [1]}, "text": {"x": ["a"]}}
    loaded = DatasetDict({k: Dataset.from_dict(rows[v]) for k, v in splits.items()})
    with pytest.raises(InputError):
        from_memory(loaded, "all")


def test_a_saved_dataset_of_all_splits_has_none(tmp_path):
    make_splits(tmp_path / "d", "parquet")
    joined = load_dataset(str(tmp_path / "d"), split="all").shuffle(seed=0)
    joined.save_to_disk(tmp_path / "s")
    assert load_source(str(tmp_path / "s"), split="all").origin["splits"] is None


@pytest.mark.parametrize("splits", [{}, {"a": 10, "b": 5}, {"a": 51, "b": -1}, {"a\n# b": 50}])
def test_splits_that_are_not_those_of_the_rows_are_seen(splits, tmp_path):
    source = make_splits(tmp_path / "d", "jsonl")
    run = draw(source, tmp_path / "r", split="all", label_column="none")
    document = yaml.safe_load((run.path / "config.yaml").read_text())
    document["source"]["splits"] = splits
    (run.path / "config.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match="splits are not those"):
        Run(run.path)


def test_a_run_that_did_not_tell_splits_apart_is_another_run(tmp_path):
    source = make_splits(tmp_path / "d", "jsonl")
    run = draw(source, tmp_path / "r", split="all", label_column="none")
    change_document(run.path / "config.yaml", lambda document: document["source"].pop("splits"))
    record_again(run.path)
    with pytest.raises(InputError, match="its splits were not told apart"):
        draw(source, tmp_path / "r", split="all", label_column="none")


def test_all_splits_are_not_for_a_stream_or_a_partition(tmp_path):
    source = make_splits(tmp_path / "d", "jsonl")
    for options in ({"streaming": True}, {"method": "dq", "partition": "kmeans:2"}):
        with pytest.raises(InputError, match="split"):
            draw(source, tmp_path / "r", split="all", **options)


WORDS = [f"row {k}" for k in range(N)]
ARRAYS = {
    "string_view": pa.array(WORDS, pa.string_view()),
    "large_string": pa.array(WORDS, pa.large_string()),
    "binary_view": pa.array([word.encode() for word in WORDS], pa.binary_view()),
    "views in lists": pa.array([[word] for word in WORDS], pa.list_(pa.string_view())),
    "dictionary": pa.array([word[-1] for word in WORDS]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", [*ARRAYS, "webdataset"])
def test_streams_have_the_rows_and_types_of_the_whole(kind, tmp_path):
    source = tmp_path / "d.parquet"
    if kind == "webdataset":
        source = tmp_path / "w"
        source.mkdir()
        with tarfile.open(source / "train-0.tar", "w") as tar:
            for k in range(N):
                meta = json.dumps({"a": k, "b": None if k % 2 else "x"}).encode()
                files = {"json": meta, "cls": b"1", "png": save(picture((8, 8), k))}
                for ending, data in files.items():
                    member = tarfile.TarInfo(f"{k:04d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    else:
        pq.write_table(pa.table({"text": WORDS, "x": ARRAYS[kind]}), source)
    runs = [draw(source, tmp_path / f"{s}", keep_ratio=0.5, streaming=s) for s in (False, True)]
    assert runs[0].subset.features == runs[1].subset.features
    plain, stream = (run.subset.with_format("arrow")[:].to_pylist() for run in runs)
    assert plain == stream
    if kind == "webdataset":
        assert {row["__url__"] for row in plain} == {"train-0.tar"}  # not where it lies here
        assert "failed" not in {result for run in runs for result in results(run, 5)}


def test_configurations_of_a_folder(tmp_path, cli):
    card = "---\nconfigs:\n"
    for name, n in (("en", 30), ("fr", 20)):
        write(tmp_path / "m" / name / "train.jsonl", rows(name, n))
        card += f"- config_name: {name}\n  data_files: {name}/*.jsonl\n"
    (tmp_path / "m" / "README.md").write_text(card + "---\n")
    common = ("compress", "m", "--method", "random", "--output-dir", "r")
    assert "--config-name (en, fr)" in cli(*common, code=2).stderr
    missing = cli(*common, "--config-name", "de", code=2).stderr
    assert "no configuration 'de', only en, fr" in missing
    cli(*common, "--config-name", "fr")
    assert Run(tmp_path / "r").manifest["rows"] == 20
    assert results(tmp_path / "r") == ["passed"] * 3
    with pytest.raises(InputError, match="config_name is for the Hub and for folders"):
        draw(tmp_path / "m" / "en" / "train.jsonl", tmp_path / "s", config_name="en")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json.gz", "folder/d.csv"])
def test_text_that_is_not_utf8_is_one_line_that_names_the_file(name, streaming, tmp_path):
    line = '{"text": "café"}\n' if "json" in name else "text,n\ncafé,1\n"
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    source = path.parent if "/" in name else path

    def put(encoding):
        data = (line * 30).encode(encoding)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    for encoding, advice in (("latin-1", "0xe9"), ("utf-16", "iconv -f UTF-16 -t UTF-8")):
        put(encoding)
        with pytest.raises(InputError, match=f"{path} is not UTF-8 text .*{advice}") as raised:
            draw(source, tmp_path / "r", streaming=streaming)
        assert "\n" not in str(raised.value)
    put("utf-8-sig")
    assert draw(source, tmp_path / "s", streaming=streaming).subset["text"][0] == "café"


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.ndjson", "d.tsv", "d.tsv.gz", "d.csv.bz2"])
def test_compressed_files_and_other_endings(name, tmp_path):
    lines = [("text", "label"), *((row["text"], str(row["label"])) for row in rows())]
    text = "".join(("\t" if "tsv" in name else ",").join(line) + "\n" for line in lines)
    if "json" in name:
        text = "".join(json.dumps(row) + "\n" for row in rows())
    pack = {"gz": gzip.compress, "bz2": bz2.compress}.get(name.rsplit(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(text.encode()))
    run = draw(tmp_path / name, tmp_path / "a")
    assert run.subset.select_columns(["text", "label"]).to_list() == rows()
    stream = draw(tmp_path / name, tmp_path / "b", streaming=True)
    assert stream.subset.to_list() == run.subset.to_list()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("separator", "text", "first"),
    [
        (";", 'text;price\n"a;b";1,5\n' + "x;2\n" * 9, {"text": "a;b", "price": "1,5"}),
        ("\t", "text\tn\n" + "a, b\t1\n" * 9, {"text": "a, b", "n": 1}),
        (",", "text\n" + "one; two\n" + "three\n" * 9, {"text": "one; two"}),
    ],
)
def test_other_separators_are_found_and_recorded(separator, text, first, streaming, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    run = draw(tmp_path / "d.csv", tmp_path / "r", streaming=streaming)
    assert run.subset.select_columns(list(first))[0] == first
    assert run.config["source"].get("separator", ",") == separator
    (tmp_path / "e.csv").write_text("text|price\na|1\n")
    with pytest.raises(InputError, match=r"separated in different ways: .*e\.csv"):
        draw(tmp_path / "*.csv", tmp_path / "s")


def test_rows_under_a_key_of_a_json_file(tmp_path, cli):
    found = [{**row, "created_at": 1700000000 + k, "code": "007"} for k, row in enumerate(rows())]
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": found}))
    common = ("compress", "d.json", "--method", "random", "--output-dir", "r", "--keep-ratio", 1)
    for more in ((), ("--streaming",)):
        assert "(--field data)" in cli(*common, *more, code=2).stderr
    assert "no key 'rows', only version, data" in cli(*common, "--field", "rows", code=2).stderr
    cli(*common, "--field", "data")
    run = Run(tmp_path / "r")
    assert run.subset.remove_columns(OWN).to_list() == found
    assert results(run) == ["passed"] * 3
    stream = draw(tmp_path / "d.json", tmp_path / "s", field="data", streaming=True)
    assert stream.subset["code"][:] == run.subset["code"][:]
    (tmp_path / "l.json").write_text(json.dumps({"lines": ["one", "two"]}))
    with pytest.raises(InputError, match=r"\(--field lines\)"):
        draw(tmp_path / "l.json", tmp_path / "l")
    assert draw(tmp_path / "l.json", tmp_path / "l", field="lines").subset["text"][0] == "one"
    with pytest.raises(InputError, match=r"field is for \.json files"):
        draw(write(tmp_path / "d.csv", rows()), tmp_path / "t", field="data")


@pytest.mark.parametrize("key", ["packed", "{folder}/outside", "../../../../up"])
def test_any_key_of_a_json_file_is_a_key_and_no_place(key, tmp_path):
    key = key.format(folder=tmp_path)
    found = [{"text": f"t {k}", "answer": ["42", 42, [1]][k % 3], "x": k + 1 / 3} for k in range(N)]
    (tmp_path / "d.json").write_text(json.dumps({key: found}))
    run = draw(tmp_path / "d.json", tmp_path / "run", field=key)
    assert run.subset.remove_columns(OWN).to_list() == found
    assert {path.name for path in tmp_path.iterdir()} == {"d.json", "run"}
