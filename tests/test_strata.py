"""Strata are named with their sizes, and none is lost without a word."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from nasty_images import picture, save

from dq_multimodal import InputError, Run, compress, verify


@pytest.fixture
def hundred(tmp_path):
    """100 classes of 3 rows, c000 of 4 rows, with embeddings."""
    labels = [f"c{k % 100:03d}" for k in range(300)] + ["c000"]
    vectors = np.random.default_rng(0).normal(size=(301, 4)).tolist()
    rows = {"text": [f"row {k}" for k in range(301)], "kind": labels, "vec": vectors}
    Dataset.from_dict(rows).to_parquet(tmp_path / "d.parquet")
    return tmp_path / "d.parquet"


@pytest.mark.parametrize("method", ["dq", "graphcut", "random"])
def test_classes_that_lose_all_rows_are_said_and_can_be_kept(hundred, tmp_path, cli, method):
    flags = ("--method", method, "--keep-ratio", 0.1, "--label-column", "kind", "--no-report")
    flags = (*flags, *(("--ready-embeddings", "vec", "--n-bins", 2) if method != "random" else ()))
    said = cli("compress", hundred, *flags, "--output-dir", "a").stdout
    kinds = np.array(Dataset.from_parquet(str(hundred))["kind"])
    plain = Run(tmp_path / "a")
    n_lost = 100 - len(set(kinds[plain.kept]))
    assert n_lost >= 70
    assert f"note     {n_lost} strata of 100 (c0" in said
    assert "of which no row is kept; compress --keep-every-class keeps" in said
    assert "strata   kind, 100 strata, 3 (c001) to 4 (c000) rows" in said
    said = cli("compress", hundred, *flags, "--keep-every-class", "--output-dir", "b").stdout
    assert "kept     100 rows" in said and "no row is kept" not in said
    assert "100 rows are kept where the keep ratio asks for 30, so that each" in said
    run = Run(tmp_path / "b")
    assert sorted(kinds[run.kept]) == sorted(set(kinds))
    # The rest of the order is what it was, and smaller subsets lie inside larger ones.
    rest = np.setdiff1d(np.arange(301), np.flatnonzero(run.order < 100))
    assert (np.argsort(run.order[rest]) == np.argsort(plain.order[rest])).all()
    assert "failed" not in [check.result for check in verify(run)]
    more = run.resample(0.5, output_dir=tmp_path / "c")
    assert len(more.kept) == round(0.5 * 301) and set(run.kept) <= set(more.kept)
    assert not any("keep ratio asks" in note for note in more.manifest["notes"])
    less = plain.resample(0.02, output_dir=tmp_path / "d")
    notes = [note for note in less.manifest["notes"] if "no row is kept" in note]
    assert len(notes) == 1 and notes[0].startswith("94 strata of 100")


def test_a_ratio_that_keeps_none_keeps_one_of_each_and_no_label_no_class(hundred, tmp_path):
    few = {"method": "random", "keep_ratio": 0.001, "report": False, "keep_every_class": True}
    run = compress(str(hundred), output_dir=tmp_path / "a", label_column="kind", **few)
    assert len(run.subset) == 100
    with pytest.raises(InputError, match="keep_every_class is for rows with labels: name their"):
        compress(str(hundred), output_dir=tmp_path / "b", **few)


def test_rows_without_a_label_are_not_those_labelled_so(tmp_path):
    for missing, names in (([0, 2], ["(no label)", "((no label))"]), ([], ["(no label)", "x"])):
        labels = [None if k in missing else "(no label)" for k in range(8)]
        labels = labels if missing else ["x", *labels[1:]]
        rows = Dataset.from_dict({"text": list("abcdefgh"), "label": labels})
        settings = {"method": "random", "keep_ratio": 0.5, "report": False}
        run = compress(rows, label_column="label", output_dir=tmp_path / names[1], **settings)
        assert run.manifest["labels"] == names
        found = run.manifest["problems"].get("no label, a stratum of their own", {"rows": []})
        assert found["rows"] == missing


def make_folders(root, names, n_each):
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(n_each + k):
            (root / name / f"{j}.png").write_bytes(save(picture((8, 8), seed=10 * k + j)))


def test_folders_named_by_numbers_are_asked_about(tmp_path, cli):
    make_folders(tmp_path / "shards", [f"{k:03d}" for k in range(4)], 2)
    make_folders(tmp_path / "classes", ["cat", "dog"], 2)
    flags = ("--method", "random", "--keep-ratio", 0.5, "--no-report")
    question = "the folders 000 ... 003 are taken for 4 classes: if they are shards"
    for more in ((), ("--streaming",)):
        said = cli("compress", "shards", *flags, *more, "--output-dir", f"a{len(more)}").stdout
        assert question in said and "--label-column none" in said
        assert "strata   label, 4 strata, 2 (000) to 5 (003) rows" in said
    said = cli("compress", "classes", *flags, "--output-dir", "b").stdout
    assert "shards" not in said and "2 strata, 2 (cat) to 3 (dog) rows" in said
    planned = json.loads(cli("plan", "shards", *flags, "--json").stdout)
    assert planned["strata_rows"] == "4 strata, 2 (000) to 5 (003) rows"
    assert any(question in note for note in planned["notes"])
    run = compress(
        str(tmp_path / "shards"), method="random", label_column="none", report=False,
        output_dir=tmp_path / "c",
    )  # fmt: skip
    assert not any("shards" in note for note in run.manifest["notes"])
    # Numbers that are labels of rows, not folders: nothing to ask.
    rows = Dataset.from_parquet(str(tmp_path / "a0" / "subset" / "part-00000.parquet"))
    rows = rows.remove_columns(["dq_row", "dq_bin", "dq_rank"])
    plain = compress(rows, method="random", report=False, output_dir=tmp_path / "d")
    assert not any("shards" in note for note in plain.manifest["notes"])
    assert (
        pq.read_table(plain.path / "bins.parquet")["label"].to_pylist() == plain.manifest["labels"]
    )
