"""Whose a folder is: what a run may write, clear and call complete."""

import shutil

import numpy as np
import pytest
from datasets import Dataset, Features, Image
from nasty_images import picture, save

from dq_multimodal import InputError, Run, compress, resample, verify

N = 60


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A parquet file and embeddings of its rows, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = {"text": [f"row {k}" for k in range(N)], "label": [k % 3 for k in range(N)]}
    Dataset.from_dict(rows).to_parquet("d.parquet")
    np.save("e.npy", np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32))
    return tmp_path


def make(**options):
    given = {"method": "dq", "ready_embeddings": "e.npy", "report": False, "output_dir": "run"}
    return compress("d.parquet", **given | options)


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "names",
    [
        *(["README.md"], ["figures/own.png"], ["subset/part-00000.parquet"], ["report.html"]),
        *(["embeddings.npy", "selection.parquet"], ["config.yaml"], ["manifest.json"]),
        *(["manifest.json", "config.yaml"], ["manifest.json.tmp"], ["world.token"]),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_run_made_stays_as_it_is(source, names, overwrite):
    if "config.yaml" in names:
        made = make(output_dir="other").path / "config.yaml"
    for name in names:
        path = source / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"version": 3}')
        if name == "config.yaml":
            shutil.copy(made, path)
    before = content(source / "site")
    with pytest.raises(InputError, match=r"not a run folder and holds other files \("):
        make(output_dir="site", overwrite=overwrite)
    assert content(source / "site") == before


def test_files_of_others_in_a_run_folder_survive_an_overwrite(source):
    run = make()
    mine = [run.path / "notes.txt", run.path / "figures" / "own.png"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert make(seed=1, overwrite=True).request.seed == 1
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    stranger = run.path / "subset" / "mine.parquet"
    stranger.write_text("mine")
    before = content(run.path)
    with pytest.raises(InputError, match=r"mine.parquet was not written by a run"):
        make(seed=2, overwrite=True)
    with pytest.raises(InputError, match=r"mine.parquet was not written by a run"):
        make(seed=1)
    assert content(run.path) == before


@pytest.mark.parametrize(
    "how", ["plain", "glob", "home", "link", "dots", "folder", "link in folder", "memory"]
)
def test_no_input_within_the_output_folder_is_cleared(source, monkeypatch, how):
    run = make()
    inside = run.path / "subset" / "part-00000.parquet"
    monkeypatch.setenv("HOME", str(source))
    (source / "folder").mkdir()
    (source / "link.parquet").symlink_to(inside.absolute())
    (source / "folder" / "x.parquet").symlink_to(inside.absolute())
    rows = Dataset.from_dict({"text": ["a"] * 9})
    rows.save_to_disk(run.path / "mine")
    name = {
        "glob": "ru*/sub*/part-*.parquet",
        "home": f"~/{inside}",
        "link": "link.parquet",
        "dots": f"folder/../{inside}",
        "folder": "run/mine",
        "link in folder": "folder",
        "memory": Dataset.load_from_disk(run.path / "mine"),
    }.get(how, str(inside))
    if how in ("glob", "home", "link", "dots", "link in folder", "plain"):  # one without dq_row
        Dataset.from_dict({"text": ["a"] * 9}).to_parquet(inside)
    before = content(run.path)
    with pytest.raises(InputError, match="lies in the output folder run"):
        compress(name, method="random", output_dir="run", overwrite=True, report=False)
    assert content(run.path) == before


@pytest.mark.parametrize("option", ["ready_embeddings", "embedding_model", "image_folder"])
def test_no_other_input_is_cleared_either(source, option):
    if option == "image_folder":
        images = [{"bytes": save(picture(seed=0)), "path": None}] * N
        Dataset.from_dict({"image": images}, Features({"image": Image()})).to_parquet("d.parquet")
    run = make()
    (source / "link").symlink_to(run.path.absolute())
    before = content(run.path)
    value = "link/embeddings.npy" if option == "ready_embeddings" else "link"
    options = {"ready_embeddings": None} if option == "embedding_model" else {}
    with pytest.raises(InputError, match=r"link.* lies in the output folder run"):
        make(overwrite=True, n_bins=2, **options | {option: value})
    assert content(run.path) == before


@pytest.mark.parametrize("target", ["run", "link", "run/small", "run/subset", "link/../run"])
def test_a_run_is_not_resampled_into_itself(source, target):
    run = make()
    (source / "link").symlink_to(run.path.absolute())
    before = content(run.path)
    with pytest.raises(InputError, match=r"is the run to resample from|is not a run folder"):
        resample("run", 0.1, output_dir=target, overwrite=True)
    assert content(run.path) == before


@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
def test_a_damaged_run_is_not_complete_and_is_made_again(source, how):
    run = make()
    names = ("embeddings.npy", "selection.parquet", "bins.parquet", "README.md")
    wanted = content(run.path)
    for name in (*names, "subset/part-00000.parquet"):
        path = run.path / name
        data = path.read_bytes()
        if how == "gone":
            path.unlink()
            if name in names[1:3]:  # what commands that read runs need
                with pytest.raises(InputError, match=f"not whole: {name} is missing"):
                    Run(run.path)
        elif name != "README.md" or how == "empty":
            path.write_bytes(data[: len(data) // 2] if how == "cut" else b"")
        else:
            continue  # a card may be edited
        again = make()
        assert not again.was_complete, name
        assert path.read_bytes() == data, name
        assert [c.result for c in verify(again)] == ["passed"] * 5
        for file, before in wanted.items():
            assert file.name == "manifest.json" or file.read_bytes() == before
    assert make().was_complete


def test_what_was_changed_after_a_run_is_not_complete(source):
    run = make()
    file = run.path / "manifest.json"
    file.write_text(file.read_text().replace('"kept": 12', '"kept": 13'))
    with pytest.raises(InputError, match=r"manifest.json was changed after the run: use --over"):
        make()
    assert make(overwrite=True).manifest["kept"] == 12
    (run.path / "config.yaml").write_text("split: 2001-99-99")
    with pytest.raises(InputError, match=r"is not the config.yaml of a run: it is no YAML: use --"):
        make()
    assert not make(overwrite=True).was_complete
    (run.path / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"its config.yaml is missing"):
        make()
    assert Run(make(overwrite=True).path).manifest["kept"] == 12
