"""The folder of a condensed set: what is in it, who may write there, and what damage is told."""

import inspect
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from condensed_sets import LABELS, NAMES, make_rows, png, stand_in
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from forging import change_document, seal
from PIL import Image as Pillow

from dq_multimodal import Condensed, InputError, compress, condense, verify
from dq_multimodal.condensation import pipeline
from dq_multimodal.condensation.documents import CondensedManifest
from dq_multimodal.condensation.result import open_result
from dq_multimodal.files import describe_file

DATA = "data/train-00000.parquet"
FILES = {"config.yaml", "manifest.json", "README.md", "report.html", DATA, "figures/pictures.png"}


@pytest.fixture
def learner(monkeypatch):
    return stand_in(monkeypatch)


def make(folder, rows=None, **options):
    options = {"images_per_class": 2, "report": False} | options
    return condense(make_rows() if rows is None else rows, output_dir=folder / "set", **options)


def names_of(folder):
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {*found}


@pytest.mark.parametrize("is_grey", [False, True])
def test_the_rows_are_the_learnt_images_rounded_to_8_bits(learner, tmp_path, is_grey):
    made = make(tmp_path, make_rows(is_grey=is_grey), report=True)
    assert names_of(made.path) == FILES
    real, images = learner.calls[0][0], learner.given.images.numpy()
    n, channels, side, _ = images.shape
    rows = load_dataset("parquet", data_files=str(made.path / DATA), split="train")
    assert rows.column_names == ["img", "kind", "dq_order"]
    assert rows.features["kind"] == ClassLabel(names=NAMES)
    assert rows.features["dq_order"] == Value("int32")
    assert rows["dq_order"][:] == list(range(n)) and rows["kind"][:] == [0, 1, 2] * 2
    for k, picture in enumerate(rows["img"]):
        assert (picture.mode, picture.size) == ("L" if is_grey else "RGB", (side, side))
        found = np.asarray(picture).reshape(side, side, channels)
        for c in range(channels):
            wanted = images[k, c] * float(real.spread[c]) + float(real.mean[c])
            wanted = np.round(255 * np.minimum(np.maximum(wanted, 0), 1))
            assert np.array_equal(found[..., c], wanted)
    files = rows.cast_column("img", Image(decode=False))["img"]
    assert made.n_bytes == made.manifest.bytes.images == sum(len(f["bytes"]) for f in files)
    real_files = make_rows(is_grey=is_grey).cast_column("img", Image(decode=False))["img"]
    assert made.manifest.bytes.real_images == sum(len(file["bytes"]) for file in real_files)
    assert made.manifest.classes == NAMES and made.manifest.real_rows == 24
    assert made.manifest.mean == [pytest.approx(float(m)) for m in real.mean]
    assert made.manifest.learning_rate is None and not made.manifest.bytes.soft_labels


def test_numbers_that_are_not_rounded_and_soft_labels(learner, tmp_path):
    learner.soft, learner.rate = True, 0.0123
    made = make(tmp_path, method="krr", learn_labels=True, stored_as="float16")
    rows, given = made.dataset, learner.given
    assert rows.column_names == ["pixels", "kind", "soft_label", "dq_order"]
    pixels = np.array(rows["pixels"][:])
    real = learner.calls[0][0]
    wanted = (given.images * real.spread + real.mean).numpy()
    assert np.array_equal(pixels, wanted.astype(np.float16)) and (pixels < 0).any()
    assert np.array_equal(np.float32(rows["soft_label"][:]), given.targets.numpy())
    sizes = made.manifest.bytes
    assert (sizes.images, sizes.soft_labels) == (2 * pixels.size, 4 * 6 * 3)
    assert made.n_bytes == sizes.images + sizes.soft_labels
    assert made.manifest.learning_rate == pytest.approx(0.0123)
    text = (made.path / "README.md").read_text()
    assert "0.0123" in text and "number k is that of the class of row k" in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    scope = {"torch": torch, "images": None, "net": lambda _: torch.zeros(6, 3)}
    exec(code, scope | {"batch": rows.with_format("torch")[:]})
    assert rows.with_format("torch")[0]["pixels"].shape == (3, 8, 8)


@pytest.mark.parametrize("kind", LABELS)
def test_labels_keep_their_type_and_values(learner, tmp_path, kind):
    feature, values = LABELS[kind]
    made = make(tmp_path, make_rows(label=feature, labels=values), label_column="kind")
    present = sorted(set(values))
    assert made.dataset.features["kind"] == feature
    assert made.dataset["kind"][:] == present * 2
    assert made.manifest.classes == (NAMES if kind == "names" else [*map(str, present)])
    assert {check.result for check in verify(made)} == {"passed", "skipped"}


def test_a_prefix_is_a_set(learner, tmp_path):
    made = make(tmp_path, images_per_class=3)
    assert made.prefix(2)["dq_order"][:] == list(range(6))
    assert made.prefix(1)["kind"][:] == [0, 1, 2]
    for wrong in (0, 4, 1.5, True):
        with pytest.raises(InputError, match="whole number from 1 to 3"):
            made.prefix(wrong)


def test_plain_datasets_load_the_folder(learner, tmp_path):
    made = make(tmp_path)
    loaded = load_dataset(str(made.path), cache_dir=str(tmp_path))
    assert {*loaded} == {"train"} and loaded["train"].num_rows == 6
    assert loaded["train"].features == made.dataset.features


def test_the_history_is_thinned_by_means(learner, tmp_path):
    learner.n_losses, learner.choices = 1001, [(100, 2, 1), (200, 1, 0)]
    made = make(tmp_path, images_per_class=3, multisize=True)
    losses = [1 / (k + 1) for k in range(1001)]
    assert made.manifest.loss_every == 3
    wanted = [np.mean(losses[k : k + 3]) for k in range(0, 1001, 3)]
    assert np.allclose(made.manifest.losses, wanted, rtol=1e-5)
    assert made.manifest.choices == [[100, 2, 1], [200, 1, 0]]


def test_the_same_request_is_done_once(learner, tmp_path):
    make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    again = make(tmp_path)
    assert again.was_complete and len(learner.calls) == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before
    with pytest.raises(InputError, match=r"another condensed set \(seed 0 there, 1 asked\): use"):
        make(tmp_path, seed=1)
    with pytest.raises(InputError, match="its source had another content"):
        make(tmp_path, make_rows(seed=1))
    assert not make(tmp_path, seed=1, overwrite=True).was_complete
    assert make(tmp_path, seed=1).was_complete and len(learner.calls) == 2
    assert not make(tmp_path, seed=1, overwrite=True).was_complete


def test_what_is_lost_is_made_again(learner, tmp_path):
    made = make(tmp_path, report=True)
    wanted = {name: (made.path / name).read_bytes() for name in FILES - {"manifest.json"}}
    for name in ("report.html", "figures/pictures.png", "README.md"):
        (made.path / name).unlink()
        (made.path / "state.safetensors").write_bytes(b"left behind by a kill at the very end")
        assert make(tmp_path, report=True).was_complete
    (made.path / "report.html").write_text("<html>torn")
    make(tmp_path, report=True)
    assert len(learner.calls) == 1 and names_of(made.path) == FILES
    assert {name: (made.path / name).read_bytes() for name in wanted} == wanted
    (made.path / DATA).write_bytes(b"PAR1")
    assert not make(tmp_path, report=True).was_complete
    assert len(learner.calls) == 2 and (made.path / DATA).read_bytes() == wanted[DATA]


def test_an_unfinished_set_goes_on_from_its_state(tmp_path, monkeypatch):
    def stopped(real, config, state, first=None):
        state.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_loop", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    with pytest.raises(InputError, match="has not finished"):
        Condensed(tmp_path / "set")
    learner = stand_in(monkeypatch)
    with pytest.raises(InputError, match="seed 0 there, 1 asked"):
        make(tmp_path, seed=1)
    assert (tmp_path / "set" / "state.safetensors").read_bytes() == b"half"
    made = make(tmp_path)
    assert len(learner.calls) == 1 and made.manifest.resumed == ["loop"]
    assert not (made.path / "state.safetensors").exists()


def test_other_folders_are_left_alone(learner, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match=r"not a condensed set and holds other files \(thesis"):
        make(tmp_path)
    (tmp_path / "set" / "thesis.txt").unlink()
    run = compress(make_rows(), method="random", report=False, output_dir=tmp_path / "run")
    with pytest.raises(InputError, match="is not a condensed set"):
        condense(make_rows(), output_dir=run.path, overwrite=True)
    made = make(tmp_path)
    with pytest.raises(InputError, match="is not a run folder"):
        compress(make_rows(), method="random", output_dir=made.path, overwrite=True)
    with pytest.raises(InputError, match="is a condensed set: smaller ones are its first rows"):
        type(run)(made.path)
    with pytest.raises(InputError, match="is not the folder of a condensed set"):
        Condensed(run.path)
    assert type(open_result(made.path)) is Condensed and type(open_result(run.path)) is type(run)
    (made.path / "data" / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"mine.parquet was not written by a run"):
        make(tmp_path, seed=1, overwrite=True)


def test_inputs_are_not_overwritten(learner, tmp_path):
    made = make(tmp_path)
    (made.path / "rows.parquet").write_bytes(b"")
    make_rows().to_parquet(made.path / "rows.parquet")
    with pytest.raises(InputError, match="lies in the output folder"):
        condense(str(made.path / "rows.parquet"), output_dir=made.path, overwrite=True)


def test_bad_input_is_one_line(learner, tmp_path):
    texts = Dataset.from_dict({"text": ["a", "b"]})
    features = Features(make_rows().features | {"img": List(Image())})
    several = make_rows().map(lambda row: {"img": [row["img"]]}, features=features)
    lone = make_rows().remove_columns("kind")
    for rows, options, message in (
        (texts, {}, "condense makes pictures, and dataset has none: its columns are text; text"),
        (several, {}, "img holds several images a row: one is wanted"),
        (lone, {}, "condense needs classes, and dataset has none: name --label-column"),
        (make_rows().rename_column("kind", "dq_order"), {}, "has the column dq_order, which"),
        (make_rows(), {"label_column": "none"}, "condense needs classes"),
        (make_rows(), {"image_column": "kind"}, "must hold images"),
        (make_rows(), {"images_per_class": 0}, "images_per_class must be a whole number"),
        (make_rows(), {"image_per_class": 1}, "did you mean images_per_class"),
        (make_rows(), {"net": "convnet-d4"}, "convnet-d4 needs at least 16 px, got 8"),
        (make_rows(), {"init": "nowhere"}, "init must be random, noise or a run"),
    ):
        with pytest.raises(InputError, match=message):
            make(tmp_path, rows, **options)
        assert not (tmp_path / "set").exists()


def test_the_first_rows_of_a_run_are_what_it_begins_with(learner, tmp_path):
    rows = make_rows(60)
    run = compress(rows, method="random", seed=5, report=False, output_dir=tmp_path / "run")
    made = make(tmp_path, rows, init=str(run.path), images_per_class=3)
    real, _, first = learner.calls[0]
    for k in range(3):
        members = [row for row in range(60) if row % 3 == k]
        wanted = sorted(members, key=lambda row: run.order[row])[:3]
        assert real.rows[first[k::3]].tolist() == wanted
    digest = describe_file(run.path / "selection.parquet")["sha256"]
    assert made.config.pins == {"init": digest}
    with pytest.raises(InputError, match="is of other rows"):
        condense(make_rows(seed=3), init=run.path, images_per_class=2, output_dir=tmp_path / "b")


DAMAGE = {
    "no json": ("manifest.json", lambda text: text[:-20]),
    "a list": ("manifest.json", lambda _: "[1]"),
    "deep": ("manifest.json", lambda _: "[" * 100_000),
    "another kind": ("manifest.json", ("rows", "6")),
    "no classes": ("manifest.json", ("classes", [])),
    "one too many": ("manifest.json", ("rows", 7)),
    "fewer a class": ("manifest.json", ("rows", 3)),
    "a huge side": ("manifest.json", ("side", 10**6)),
    "four channels": ("manifest.json", ("channels", 4)),
    "no spread": ("manifest.json", ("spread", [0, 0, 0])),
    "no mean": ("manifest.json", ("mean", [])),
    "nan": ("manifest.json", ("losses", [float("nan")])),
    "choices": ("manifest.json", ("choices", [[1]])),
    "a later release": ("manifest.json", ("format", "dq-multimodal condensed 2")),
    "unfinished": ("manifest.json", ("complete", False)),
    "no yaml": ("config.yaml", lambda _: "{"),
    "an anchor": ("config.yaml", lambda text: text + "x: &a [*a]\n"),
    "no request": ("config.yaml", ("request", None)),
    "a new setting": ("config.yaml", ("request", {"dataset": "x", "magic": 1})),
    "a bad setting": ("config.yaml", ("request", {"dataset": "x", "method": "magic"})),
    "no column": ("config.yaml", ("image_column", 3)),
    "no source": ("config.yaml", ("source", {})),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_documents_of_anybody_end_in_one_line(learner, tmp_path, what):
    path = make(tmp_path).path
    name, change = DAMAGE[what]
    if callable(change):
        (path / name).write_text(change((path / name).read_text()))
    else:
        change_document(path / name, lambda document: document.update([change]))
    with pytest.raises(InputError) as caught:
        Condensed(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def write_rows(path, change):
    table = pq.read_table(path)
    changed = change(table)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def put(table, name, values, kind=None):
    at = table.column_names.index(name)
    return table.set_column(at, name, pa.array(values, kind or table.schema.field(name).type))


def put_picture(table, data, row=4):
    files = table["img"].to_pylist()
    files[row] = {"bytes": data, "path": None}
    return put(table, "img", files)


def soften(table, change):
    values = table["soft_label"].to_pylist()
    return put(table, "soft_label", change(values))


TAMPERED = {
    "fewer rows": ("rows", lambda t: t.slice(0, 5)),
    "other order": ("rows", lambda t: put(t, "dq_order", [0, 2, 1, 3, 4, 5])),
    "wide order": ("rows", lambda t: put(t, "dq_order", range(6), pa.int64())),
    "classes not in turn": ("rows", lambda t: put(t, "kind", [0, 1, 2, 1, 0, 2])),
    "no class": ("rows", lambda t: put(t, "kind", [0, 1, 2, 0, 1, None])),
    "a class that is not there": ("rows", lambda t: put(t, "kind", [0, 1, 2, 0, 1, 9])),
    "a column more": ("rows", lambda t: t.append_column("x", pa.array(range(6)))),
    "a column less": ("rows", lambda t: t.drop_columns(["dq_order"])),
    "another picture": ("pictures", lambda t: put_picture(t, png(np.ones((8, 8, 3), np.uint8)))),
    "a larger one": ("pictures", lambda t: put_picture(t, png(np.ones((9, 9, 3), np.uint8)))),
    "a grey one": ("pictures", lambda t: put_picture(t, png(np.ones((8, 8), np.uint8)))),
    "none": ("pictures", lambda t: put_picture(t, None)),
    "half of one": ("pictures", lambda t: put_picture(t, png(np.ones((8, 8, 3), np.uint8))[:50])),
    "a label too few": ("soft labels", lambda t: soften(t, lambda v: [*v[:5], v[5][:2]])),
    "no soft label": ("soft labels", lambda t: soften(t, lambda v: [*v[:5], None])),
    "a nan": ("soft labels", lambda t: soften(t, lambda v: [*v[:5], [0.1, float("nan"), 1]])),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_verify_finds_rows_that_were_changed_and_recorded_again(learner, tmp_path, what):
    """Bytes and SHA-256 are forged with them, so that nothing but the content tells."""
    learner.soft = True
    path = make(tmp_path, method="krr", learn_labels=True).path
    assert [check.result for check in verify(path)] == ["passed"] * 3 + ["skipped", "passed"]
    name, change = TAMPERED[what]
    write_rows(path / DATA, change)
    assert "files and manifest" in failed(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][DATA] = describe_file(path / DATA)
    manifest["bytes"]["file"] = manifest["files"][DATA]["bytes"]
    (path / "manifest.json").write_text(json.dumps(seal(manifest)))
    found = failed(path)
    assert name in found and "files and manifest" not in found


def failed(path):
    return {check.name for check in verify(path) if check.result == "failed"}


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
def test_verify_and_push_find_files_that_are_lost_or_changed(learner, tmp_path, name):
    path = make(tmp_path, report=True).path
    content = (path / name).read_bytes()
    (path / name).write_bytes(content.replace(b"e", b"f", 1))
    is_card = name == "README.md"  # which anybody may edit
    if name != "config.yaml":  # where it is another setting, and no set any more
        assert ("files and manifest" in failed(path)) != is_card
    (path / name).unlink()
    is_shown = name in ("report.html", "figures/pictures.png")
    if name == "config.yaml":
        with pytest.raises(InputError, match="not the folder of a condensed set"):
            verify(path)
        return
    assert ("files and manifest" in failed(path)) != is_shown
    if not is_shown:
        with pytest.raises(InputError, match=f"is damaged: {re.escape(name)} is missing"):
            Condensed(path).check_whole()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", ("learning_rate", 0.5)),
        ("manifest.json", ("losses", [0.0])),
        ("manifest.json", ("notes", ["all is well"])),
        ("manifest.json", ("classes", ["ant", "cow", "bee"])),
        ("manifest.json", ("versions", {})),
        ("config.yaml", ("pins", {"init": "0"})),
    ],
)
def test_verify_finds_documents_that_were_changed(learner, tmp_path, name, change):
    path = make(tmp_path).path
    change_document(path / name, lambda document: document.update([change]))
    assert "files and manifest" in failed(path)
    with pytest.raises(InputError, match="is damaged"):
        Condensed(path).push_to_hub("me/x")


def test_a_link_is_not_pushed(learner, tmp_path):
    path = make(tmp_path).path
    (tmp_path / "secret").write_text("secret")
    (path / "README.md").unlink()
    (path / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"README\.md is a link"):
        Condensed(path).push_to_hub("me/x")


def test_verify_compares_with_the_source_where_it_can_be_had(learner, tmp_path):
    make_rows().to_parquet(tmp_path / "rows.parquet")
    path = make(tmp_path, str(tmp_path / "rows.parquet")).path
    assert [check.result for check in verify(path)][3] == "passed"
    manifest = json.loads((path / "manifest.json").read_text())
    near, off = ([m + by for m in manifest["mean"]] for by in (5e-4, 0.01))
    (path / "manifest.json").write_text(json.dumps(seal(manifest | {"mean": near})))
    assert not failed(path)  # another decoder of JPEG is no damage
    for change in ({"real_rows": 23}, {"mean": off}, {"spread": [1, 1, 1]}):
        (path / "manifest.json").write_text(json.dumps(seal(manifest | change)))
        assert failed(path) == {"source"}
    make_rows(seed=1).to_parquet(tmp_path / "rows.parquet")
    check = verify(path)[3]
    assert check.result == "skipped" and "is not what it was" in check.detail


def test_float16_numbers_that_are_none_are_found(learner, tmp_path):
    path = make(tmp_path, stored_as="float16").path
    table = pq.read_table(path / DATA)
    storage = table["pixels"].combine_chunks()
    storage = getattr(storage, "storage", storage)
    values = np.array(storage.to_pylist(), dtype=np.float16)
    values[2, 1, 3, 4] = np.nan
    lists = pa.array(values.tolist(), type=storage.type)
    at = table.column_names.index("pixels")
    changed = table.set_column(at, "pixels", lists)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path / DATA)
    assert failed(path) == {"pictures", "files and manifest"}


def test_rows_without_class_or_picture_are_noted(learner, tmp_path):
    rows = make_rows()
    columns = {
        name: rows.cast_column("img", Image(decode=False))[name][:] for name in ("img", "kind")
    }
    columns["kind"][4] = None
    columns["img"][7] = {"bytes": b"no picture", "path": None}
    features = Features(rows.features | {"kind": ClassLabel(names=[*NAMES, "dog\n", "emu"])})
    made = make(tmp_path, Dataset.from_dict(columns, features))
    note = "2 rows have no class or no picture that can be read, and taught nothing: 4, 7"
    empty = "2 classes have no pictures, and none are made: dog, emu"
    assert made.manifest.notes == [note, empty] and made.manifest.real_rows == 22
    assert note in (made.path / "README.md").read_text()


def test_every_option_is_in_the_signature():
    shown = inspect.signature(condense).parameters
    assert next(iter(shown)) == "dataset" and shown["images_per_class"].default == 10
    assert "images_per_class: Synthetic images of each class." in condense.__doc__


def test_the_card_says_how_to_load_and_whose_work_it_is(learner, tmp_path):
    licence = "---\nlicense: cc-by-4.0\n---\n"
    folder = tmp_path / "source"
    for k, row in enumerate(make_rows()):
        place = folder / NAMES[row["kind"]]
        place.mkdir(parents=True, exist_ok=True)
        row["img"].save(place / f"{k}.png")
    (folder / "README.md").write_text(licence)
    made = make(tmp_path, str(folder), image_folder=None, augment=("flip",))
    text = (made.path / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert front["size_categories"] == ["n<1K"]
    assert "learnt for `convnet` of width 128, with the augmentations flip: train" in text
    for part in ("2110.04181", "2102.08259", "Synthetic is not anonymous", "`ant`, `bee`, `cow`"):
        assert part in text
    assert "MDC" not in text and "soft_label" not in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    scope = {}
    code = code.replace('"OWNER/NAME"', f"{str(made.path)!r}, cache_dir={str(tmp_path)!r}")
    exec(code, scope)
    assert scope["dataset"].num_rows == 6 and scope["smaller"]["label"][:] == [0, 1, 2]


def test_the_bytes_of_the_real_pictures_are_those_of_their_files(learner, tmp_path):
    """Names of files are not counted; files in a folder are, and a slice counts its own rows."""
    folder, sizes = tmp_path / "source", []
    for k, row in enumerate(make_rows(30)):
        place = folder / NAMES[row["kind"]] / f"{k:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        row["img"].save(place)
        sizes.append(place.stat().st_size)
    assert make(tmp_path, str(folder)).manifest.bytes.real_images == sum(sizes)
    rows = make_rows(30)
    files = [file["bytes"] for file in rows.cast_column("img", Image(decode=False))["img"]]
    named = [{"bytes": file, "path": "a name of a file.png"} for file in files]
    columns = {"img": named, "kind": rows["kind"][:]}
    half = Dataset.from_dict(columns, rows.features).select(range(29, 11, -1))
    found = condense(half, images_per_class=2, report=False, output_dir=tmp_path / "half").manifest
    assert found.bytes.real_images == sum(map(len, files[12:])) and found.real_rows == 18


def test_images_of_the_patch_store_are_condensed(learner, tmp_path, small_classifier):
    """Their holes filled, their side as stored, and the bytes of their records counted."""
    how = {"drop_ratio": 0.25, "attribution_model": str(small_classifier), "report": False}
    how |= {"method": "random", "keep_ratio": 1.0, "output_dir": tmp_path / "run"}
    run = compress(make_rows(side=32), **how)
    made = make(tmp_path, run.subset)
    real = learner.calls[0][0]
    assert real.side == 32 and len(real.images) == 24
    assert made.dataset.features["img"] == Image()
    stored = run.manifest.bytes.stored_images
    assert made.manifest.bytes.real_images == pytest.approx(stored, rel=0.01)


def test_a_sheet_of_the_pictures_is_drawn(learner, tmp_path):
    made = make(tmp_path)
    sheet = Pillow.open(io.BytesIO((made.path / "figures/pictures.png").read_bytes()))
    assert sheet.size == (2 * 68 + 4, 3 * 68 + 4)
    first = np.asarray(made.dataset[0]["img"])
    assert np.array_equal(np.asarray(sheet)[4:68:8, 4:68:8], first)
    second_of_last = np.asarray(made.dataset[5]["img"])
    assert np.array_equal(np.asarray(sheet)[140:204:8, 72:136:8], second_of_last)


def test_a_manifest_says_what_it_is_before_all_else(learner, tmp_path):
    text = (make(tmp_path).path / "manifest.json").read_text()
    assert text.startswith('{\n  "format": "dq-multimodal condensed 1"')
    assert json.loads(text)["format"] == CondensedManifest.FORMAT
