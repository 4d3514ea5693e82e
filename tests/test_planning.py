"""plan against what compress then makes, and the limit of memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from nasty_images import picture

from dq_multimodal import InputError, compress, plan
from dq_multimodal.config import format_bytes, parse_bytes
from dq_multimodal.planning.trials import Memory

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(autouse=True)
def _no_haste(monkeypatch):
    """However busy the machine, the samples are as large as they may be."""
    monkeypatch.setattr("dq_multimodal.planning.trials.MODEL_SECONDS", 1e3)
    monkeypatch.setattr("dq_multimodal.planning.trials.PLAIN_SECONDS", 1e3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(300)]
    path = tmp_path_factory.mktemp("texts") / "texts.parquet"
    Dataset.from_dict({"text": rows, "kind": ["x", "y", "z"] * 100}).to_parquet(path)
    return path


def test_sizes_are_read():
    sizes = {"8GB": 8e9, "500MB": 5e8, "2GiB": 2**31, " 1.5 gib ": 1.5 * 2**30, "64kib": 65536}
    sizes |= {"123456": 123456, "10b": 10, 4096: 4096, "1e9": 1e9}
    assert {text: parse_bytes(text) for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1GB", "0", "nan", "inf", "8 G B", "8GBB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="max_memory must be a size such as 8GB"):
        parse_bytes(text)


def test_written_sizes_are_never_below_the_size():
    assert [format_bytes(s) for s in (7, 1000, 1_000_001, 2_340_000_000, 5 * 10**13)] == [
        *("7 bytes", "1 kB", "1.1 MB", "2.4 GB", "50,000 GB")
    ]


def test_need_is_the_base_and_the_stage_that_takes_most():
    memory = Memory(100, {"a": 30, "b": 50}, 1000)
    assert (memory.need, memory.peak) == (150, 1150)
    memory.check(150)
    with pytest.raises(InputError, match=r"\(149\).*stage b"):
        memory.check(149)


MAPPED = """
import sys
import numpy as np
from dq_multimodal.planning.trials import resident_unmapped
before = resident_unmapped()
mapped = np.load(sys.argv[1], mmap_mode="r")
assert mapped.sum() == 8_000_000
assert resident_unmapped() - before < 32_000_000
held = np.ones(8_000_000)
assert resident_unmapped() - before > 60_000_000
assert held[0] == 1
"""


def test_mapped_data_is_not_held(tmp_path):
    """In a process of its own: another's freed memory could be used again."""
    np.save(tmp_path / "big.npy", np.ones(8_000_000))
    subprocess.run([sys.executable, "-c", MAPPED, str(tmp_path / "big.npy")], check=True)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "adq"},
        {"method": "adq", "label_column": "kind", "representativeness": "surprisal"},
        {"method": "graphcut", "keep_ratio": 0.5},
        {"method": "random", "keep_ratio": 0.1},
    ],
)
def test_plan_says_what_compress_makes(texts, small_encoder, tmp_path, options):
    options = {"embedding_model": str(small_encoder), "report": False, **options}
    said = plan(str(texts), output_dir=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    run = compress(str(texts), output_dir=tmp_path / "run", **options)
    check(said, run)
    assert json.loads(json.dumps(said)) == said
    has_scores = options["method"] == "adq"
    assert ("scores" in said["seconds"]) == ("scores" in run.manifest["seconds"]) == has_scores
    assert (said["probe"] is not None) == (options["method"] != "random")
    assert all(value >= 0 for value in said["seconds"].values())


def check(said, run):
    """Compare a plan with the run that followed it."""
    assert (said["rows"], said["kept"]) == (run.manifest["rows"], run.manifest["kept"])
    assert said["strata"] == len(run.manifest["labels"])
    assert said["bytes"]["source_data"] == run.manifest["bytes"]["source_data"]
    for name in ("subset_data", "subset_files"):
        assert said["bytes"][name] == pytest.approx(run.manifest["bytes"][name], rel=0.2), name
    vectors = run.path / "embeddings.npy"
    assert said["disk"].get("embeddings.npy") == (
        vectors.stat().st_size if vectors.exists() else None
    )
    for name in ("selection.parquet", "bins.parquet"):
        size = (run.path / name).stat().st_size
        assert said["disk"][name] == pytest.approx(size, rel=0.35), name


def test_plan_of_ready_embeddings_and_its_report(texts, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(300, 12)).astype(np.float16)
    np.save(tmp_path / "emb.npy", vectors)
    options = {"method": "dq", "ready_embeddings": str(tmp_path / "emb.npy")}
    said = plan(str(texts), output_dir=tmp_path / "run", **options)
    run = compress(str(texts), output_dir=tmp_path / "run", **options)
    check(said, run)
    assert said["embedding"]["dimension"] == 12
    files = ["report.html", "map.parquet", *(run.path / "figures").glob("*")]
    made = sum((run.path / name).stat().st_size for name in files)
    assert 1 / 1.5 < said["disk"]["report"] / made < 1.5
    assert said["seconds"]["report"] > 0


@pytest.mark.parametrize("drop_ratio", [0.0, 0.25])
def test_plan_of_images(small_classifier, tmp_path, drop_ratio):
    names = ["cat", "dog", "emu"]
    features = Features({"img": Image(), "label": ClassLabel(names=names)})
    rows = {"img": [picture((32, 32), k) for k in range(60)], "label": [0, 1, 1] * 20}
    rows = Dataset.from_dict(rows, features=features)
    options = {"embedding_model": str(small_classifier), "report": False, "n_bins": 3}
    options |= {"drop_ratio": drop_ratio, "keep_ratio": 0.4, "method": "dq"}
    said = plan(rows, output_dir=tmp_path / "run", **options)
    assert said["modality"] == "image"
    run = compress(rows, output_dir=tmp_path / "run", **options)
    check(said, run)
    assert ("patches" in said["memory"]["stages"]) == bool(drop_ratio)


def test_the_limit_refuses_before_anything_is_written(cli, texts, small_encoder, tmp_path):
    flags = (texts, "--embedding-model", small_encoder, "--no-report")
    done = cli("compress", *flags, "--max-memory", "50MB", code=2)
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "this run needs" in errors[0]
    assert "--max-memory 50 MB (50,000,000)" in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    done = cli("plan", texts, "--method", "random", "--max-memory", "5 apples", code=2)
    assert "max_memory must be a size such as 8GB, 500MB or 2GiB, got 5 apples" in done.stderr
    with pytest.raises(InputError, match=r"more than --max-memory 1 kB \(1,000\)"):
        plan(str(texts), method="random", max_memory="1kB")


def test_another_limit_is_the_same_run(texts, tmp_path):
    options = {"method": "random", "report": False, "output_dir": tmp_path / "run"}
    compress(str(texts), max_memory="100GB", **options)
    run = compress(str(texts), max_memory=10**12, **options)
    assert run.was_complete
    assert compress(str(texts), **options).was_complete
    assert "max_memory" not in (run.path / "config.yaml").read_text()
    assert compress(str(texts), max_memory=1, **options).was_complete, "it needs no work any more"


def test_plan_of_the_command_line(cli, texts, tmp_path):
    flags = ("plan", texts, "--method", "random", "--keep-ratio", "0.1", "--output-dir", "a/run")
    done = cli(*flags)
    assert "keeps    30 rows (10 %) by random, seed 0" in done.stdout
    assert "a/run (nothing was written)" in done.stdout
    document = json.loads(cli(*flags, "--json").stdout)
    assert (document["rows"], document["kept"]) == (300, 30)
    assert document["memory"]["need"] > 0
    assert not list(tmp_path.iterdir())
    assert "got 'best'" in cli("plan", texts, "--method", "best", code=2).stderr


def test_long_rows_behind_short_ones_are_seen(tmp_path):
    texts = [f"short {k}" for k in range(5000)] + ["long " * 600_000] * 6
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data.parquet")
    options = {"method": "random", "keep_ratio": 1.0, "report": False}
    stages = plan(str(tmp_path / "data.parquet"), **options)["memory"]["stages"]
    assert 6e7 < stages["subset"] < 1e9


@pytest.fixture
def many(tmp_path):
    """6,000 rows, most of them behind a sample, every tenth of them long."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 9 + 90 * (k % 10 == 0))) for k in range(6000)]
    Dataset.from_dict({"text": texts, "kind": ["x", "y"] * 3000}).to_parquet(tmp_path / "m.parquet")
    np.save(tmp_path / "emb.npy", rng.normal(size=(6000, 16)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dq", "ready_embeddings": "emb.npy", "label_column": "kind"},
        {"method": "coverage", "ready_embeddings": "emb.npy", "drop_duplicates": 0.9},
        {"method": "random", "keep_rows": 500, "cap_by": "kind", "cap": 300},
    ],
    ids=lambda options: options["method"],
)
def test_samples_speak_for_all_rows(many, monkeypatch, options):
    monkeypatch.chdir(many)
    monkeypatch.setattr("dq_multimodal.planning.trials.PLAIN_ROWS", 1500)
    before = sorted(many.rglob("*"))
    said = plan("m.parquet", report=False, **options)
    assert sorted(many.rglob("*")) == before, "nothing is written"
    run = compress("m.parquet", output_dir="run", report=False, **options)
    check(said, run)
    assert "selection" in said["seconds"] and "target" not in said["seconds"]


def test_a_target_takes_part(texts, small_encoder, tmp_path):
    Dataset.from_dict({"text": [f"the fox {k}" for k in range(30)]}).to_parquet(
        tmp_path / "t.parquet"
    )
    options = {"method": "random", "embedding_model": str(small_encoder), "report": False}
    said = plan(str(texts), target=str(tmp_path / "t.parquet"), **options)
    assert said["seconds"]["target"] > 0
    assert said["memory"]["stages"]["target"] >= 4 * 30 * 300
    assert said["disk"]["embeddings.npy"] == 128 + 300 * 16 * 4
    with pytest.raises(InputError, match="missing"):
        plan(str(texts), target=str(tmp_path / "missing.parquet"), **options)
    with pytest.raises(InputError, match="leaves at most"):
        plan(str(texts), method="random", report=False, cap_by="kind", cap=2)


def test_what_is_left_out_is_said(many, monkeypatch):
    monkeypatch.chdir(many)
    options = {"method": "dq", "ready_embeddings": "emb.npy", "report": False}
    notes = plan("m.parquet", partition="kmeans:3", **options)["notes"]
    assert notes == ["the seconds do not count parting the rows by k-means"]
    notes = plan("m.parquet", method="random", report=False, streaming=True)["notes"]
    assert notes == ["the figures are of the first rows of the stream, read once"]
