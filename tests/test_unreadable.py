"""Rows whose image cannot be decoded are left out of the subset, whatever chooses it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from nasty_images import image_rows, picture, save

from dq_multimodal import InputError, compress, pipeline, verify
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.stages import preparation

N = 60
BROKEN = {3: b"", 17: b"no picture at all", 31: None, 44: "cut", 58: "cut png"}
LOST = [3, 17, 44, 58]
"""Row 31 has no image, which a training loop can see: it stays a candidate."""


def make_rows(broken=True):
    """Pictures of two classes, 40 and 20 rows, some of them broken."""
    files = [save(picture((16, 16), seed=k)) for k in range(N)]
    if broken:
        jpeg = save(picture((200, 150)), "JPEG", quality=95)
        found = BROKEN | {44: jpeg[: len(jpeg) // 2], 58: files[58][:-40]}
        files = [found.get(k, file) for k, file in enumerate(files)]
    images = [
        None if file is None else {"bytes": file, "path": f"some/where/pic_{k:02d}.png"}
        for k, file in enumerate(files)
    ]
    labels = [int(k % 3 == 0) for k in range(N)]
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    path = tmp_path_factory.mktemp("broken") / "data.parquet"
    make_rows().to_parquet(path)
    return path


def selection(run):
    return pq.read_table(run.path / "selection.parquet").to_pandas()


def options(small_classifier, **more):
    plain = {"method": "dq", "report": False, "n_bins": 3, "batch_size": 16}
    return {"embedding_model": str(small_classifier), **plain, **more}


def check(run, ratio):
    """Sizes, marks, order, tables, subset and the checks of verify agree."""
    table = selection(run)
    assert np.flatnonzero(table.unreadable).tolist() == LOST
    n_kept = round(ratio * (N - len(LOST)))
    assert table.kept.sum() == run.manifest["kept"] == len(run.subset) == n_kept
    assert sorted(table.order) == list(range(N))
    assert (table.order[LOST] >= N - len(LOST)).all() and not table.kept[LOST].any()
    assert ((table.order < n_kept) == table.kept).all()
    share = table.kept[table.stratum == 1].sum() - n_kept * 19 / 56  # row 3 is the dog that is lost
    assert abs(share) <= 1
    by_bin = pq.read_table(run.path / "bins.parquet").to_pandas()
    assert by_bin["size"].sum() == N and by_bin["kept"].sum() == n_kept
    assert [row["image"] is None for row in run.subset].count(True) <= 1
    assert "failed" not in [found.result for found in verify(run)]


@pytest.mark.parametrize("method", ["adq", "dq", "graphcut", "random"])
def test_every_method_leaves_them_out_and_resample_too(broken, small_classifier, tmp_path, method):
    settings = options(small_classifier, method=method, score_rows=5)
    run = compress(str(broken), keep_ratio=0.3, output_dir=tmp_path / "r", **settings)
    check(run, 0.3)
    for ratio in (1.0, 0.1):
        drawn = run.resample(ratio, output_dir=tmp_path / f"r{ratio}")
        check(drawn, ratio)
    other = run.resample(0.5, method="random", output_dir=tmp_path / "other")
    check(other, 0.5)
    assert set(run.kept) <= set(run.resample(0.5, output_dir=tmp_path / "more").kept)
    kept = compress(
        str(broken), keep_ratio=0.3, output_dir=tmp_path / "k", keep_unreadable=True, **settings
    )
    assert "unreadable" not in selection(kept)
    assert len(kept.subset.with_format("arrow")) == round(0.3 * N)
    np.testing.assert_array_equal(kept.bins.bin, run.bins.bin)  # the bins part all rows as ever
    assert not any("left out" in note for note in kept.manifest["notes"])


def test_the_command_line_names_them(broken, small_classifier, tmp_path, cli):
    for method in ("dq", "random"):
        flags = ("--method", method, "--keep-ratio", 1.0, "--embedding-model", small_classifier)
        flags = (*flags, "--n-bins", 3, "--output-dir", method, "--no-report")
        planned = json.loads(cli("plan", broken, *flags, "--json").stdout)
        assert planned["kept"] == 56
        said = cli("compress", broken, *flags).stdout
        note = (
            "4 rows whose image cannot be decoded are left out of the subset "
            "(--keep-unreadable keeps such rows): row 3 (pic_03.png), row 17 (pic_17.png), "
            "row 44 (pic_44.png), row 58 (pic_58.png)"
        )
        assert note in said and note in planned["notes"]
        assert "kept     56 rows" in said
        assert "2 rows with an image that is cut short, left out of the subset: rows 44, 58" in said
        assert "1 row with no image, still candidates: row 31" in said
        assert note in (tmp_path / method / "README.md").read_text()
    cli("compress", broken, *flags, "--keep-unreadable", code=2)  # another run is there
    done = cli("compress", broken, *flags, "--keep-unreadable", "--overwrite", "--drop-ratio", 0)
    assert "left out" not in done.stdout and "kept     60 rows" in done.stdout


def test_without_broken_images_the_rows_are_those_of_before(small_classifier, tmp_path):
    rows = make_rows(broken=False)
    for method in ("adq", "dq", "graphcut", "random"):
        settings = options(small_classifier, method=method, score_rows=5, keep_ratio=0.4)
        one = compress(rows, output_dir=tmp_path / f"{method}1", **settings)
        two = compress(rows, output_dir=tmp_path / f"{method}2", keep_unreadable=True, **settings)
        np.testing.assert_array_equal(one.order, two.order)
        assert not selection(one).unreadable.any()


def test_ready_embeddings_streams_and_patches(broken, small_classifier, tmp_path):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(N, 5)))
    settings = options(small_classifier, keep_ratio=0.5)
    given = compress(
        str(broken), ready_embeddings=str(tmp_path / "v.npy"), output_dir=tmp_path / "a", **settings
    )
    check(given, 0.5)
    for method in ("dq", "random"):
        settings["method"] = method
        stream = compress(str(broken), streaming=True, output_dir=tmp_path / method, **settings)
        check(stream, 0.5)
    settings |= {"method": "dq", "drop_ratio": 0.3, "attribution": "random", "patch_size": 4}
    dropped = compress(str(broken), output_dir=tmp_path / "p", patch_coding="webp", **settings)
    reasons = dropped.manifest["patches"]["originals"]
    assert dropped.manifest["patches"]["images"] == 28 and sum(reasons.values()) <= 1, reasons


def test_a_stopped_run_knows_them_all(broken, small_classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "MAX_LISTED", 1)
    monkeypatch.setattr(preparation, "MAX_NAMED", 2)

    def stop(*_):
        raise KeyboardInterrupt

    for method in ("dq", "random"):
        settings = options(small_classifier, method=method, keep_ratio=0.5)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "order_by_method", stop)
            with pytest.raises(KeyboardInterrupt):
                compress(str(broken), output_dir=tmp_path / method, **settings)
        monkeypatch.setattr(ImageAdapter, "check_images", None)  # not once more
        run = compress(str(broken), output_dir=tmp_path / method, **settings)
        monkeypatch.undo()
        check(run, 0.5)
        monkeypatch.setattr(preparation, "MAX_NAMED", 2)
    assert any("row 17 (pic_17.png), ... (2 more, see" in note for note in run.manifest["notes"])


def test_nothing_left_is_one_clear_line(small_classifier, tmp_path):
    files = [b"x"] * 9
    bad, mixed = image_rows(files), image_rows([*files, save(picture()), save(picture())])
    with pytest.raises(InputError, match=r"none of the 9 images can be decoded.*--keep-unreadable"):
        compress(bad, output_dir=tmp_path / "a", **options(small_classifier))
    few = options(small_classifier, keep_ratio=0.1)
    with pytest.raises(InputError, match="none of the 2 rows whose image can be decoded: ask"):
        compress(mixed, output_dir=tmp_path / "b", **few)


def test_notes_outlive_a_lost_file(broken, tmp_path, small_classifier):
    asked = options(small_classifier, keep_ratio=0.02, label_column="label")
    run = compress(str(broken), output_dir=tmp_path / "run", **asked)
    assert any("no row is kept" in note for note in run.manifest["notes"])
    (run.path / "embeddings.npy").unlink()
    again = compress(str(broken), output_dir=tmp_path / "run", **asked)
    assert again.manifest["notes"] == run.manifest["notes"]
