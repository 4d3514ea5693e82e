"""plan against what compress then makes, and the limit of memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from nasty_images import picture

from dq_multimodal import InputError, compress, plan
from dq_multimodal.byte_sizes import format_bytes, parse_bytes
from dq_multimodal.core.diversity import count_sampled, sample_bins
from dq_multimodal.data.row_sizes import cut_rows, measure_rows, read_blocks
from dq_multimodal.memory import Memory, bin_sizes, check_memory, measured_tensors
from dq_multimodal.planning import npy_bytes
from dq_multimodal.probes import foresee_picks, probe_encoder, spread, stretch, time_picks
from dq_multimodal.report_probes import count_tiled

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(300)]
    path = tmp_path_factory.mktemp("texts") / "texts.parquet"
    Dataset.from_dict({"text": rows, "kind": ["x", "y", "z"] * 100}).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8e9),
        ("500MB", 5e8),
        ("2GiB", 2**31),
        (" 1.5 gib ", 1.5 * 2**30),
        ("64kib", 65536),
        ("123456", 123456),
        ("10b", 10),
        (4096, 4096),
        ("1e9", 1e9),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1GB", "0", "nan", "inf", "8 G B", "8GBB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="max_memory must be a size such as 8GB"):
        parse_bytes(text)


def test_written_sizes_are_never_below_the_size():
    assert [format_bytes(s) for s in (7, 1000, 1_000_001, 2_340_000_000, 5 * 10**13)] == [
        *("7 bytes", "1 kB", "1.1 MB", "2.4 GB", "50,000 GB")
    ]


def test_need_is_the_base_and_the_greediest_stage():
    memory = Memory(100, {"a": 30, "b": 50}, 1000)
    assert (memory.need, memory.peak) == (150, 1150)
    check_memory(memory, 150)
    check_memory(memory, None)
    with pytest.raises(InputError, match=r"\(150 bytes\).*\(149\).*stage b"):
        check_memory(memory, 149)


MAPPED = """
import sys
import numpy as np
from dq_multimodal.memory import resident_bytes
before = resident_bytes()
mapped = np.load(sys.argv[1], mmap_mode="r")
assert mapped.sum() == 8_000_000
assert resident_bytes() - before < 32_000_000
held = np.ones(8_000_000)
assert resident_bytes() - before > 60_000_000
assert held[0] == 1
"""


def test_mapped_data_is_not_held(tmp_path):
    """In a process of its own: another's freed memory could be used again."""
    np.save(tmp_path / "big.npy", np.ones(8_000_000))
    subprocess.run([sys.executable, "-c", MAPPED, str(tmp_path / "big.npy")], check=True)


def test_tensors_are_counted_while_they_live():
    import torch

    with measured_tensors() as meter:
        first = torch.ones(1000)
        second = first.view(10, 100) + 1  # a view holds nothing of its own
        del first
        third = torch.zeros(500) + 0
    assert meter.peak == 8000
    assert meter.now == 6000
    assert second.numel() + third.numel() == 1500


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
    options = {"method": "dq", "embeddings": str(tmp_path / "emb.npy")}
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
    done = cli(*flags, "--overwrite", "--push-to-hub", "me/x")
    assert "keeps    30 rows (10 %) by random, seed 0" in done.stdout
    assert "a/run (nothing was written)" in done.stdout
    document = json.loads(cli(*flags, "--json").stdout)
    assert (document["rows"], document["kept"]) == (300, 30)
    assert document["memory"]["need"] > 0
    assert not list(tmp_path.iterdir())
    assert "'best' is not one of" in cli("plan", texts, "--method", "best", code=2).stderr


def test_both_commands_take_the_same_flags():
    import inspect

    from dq_multimodal import cli as commands

    assert inspect.signature(commands.plan) == inspect.signature(commands.compress)


class Paced:
    """An adapter whose rows take as long as they are: in ticks of a clock that it owns."""

    is_scored = False
    chunk_rows = None

    def __init__(self, lengths, monkeypatch):
        self.sizes, self.now = lengths, 0.0
        monkeypatch.setattr("dq_multimodal.probes.time.perf_counter", lambda: self.now)

    def lengths(self):
        return self.sizes

    def load(self, rows, view=None):
        return rows, {}

    def embed(self, rows):
        from dq_multimodal.adapters.base import Embedded

        self.now += float((5 + self.sizes[rows]).sum())
        return Embedded(np.zeros((len(rows), 2), dtype=np.float32))


@pytest.mark.parametrize("budget", [0.0, 1e5, 1e9])
def test_the_probe_is_not_fooled_by_batches_sorted_by_length(monkeypatch, budget):
    lengths = np.random.default_rng(0).geometric(0.01, size=20_000)
    adapter = Paced(lengths, monkeypatch)
    found = probe_encoder(adapter, np.arange(20_000), 64, budget=budget)
    assert found.seconds == pytest.approx(float((5 + lengths).sum()), rel=0.02)
    assert found.probed_rows < 10_000
    if not budget:
        assert found.probed_rows <= 3 * 64
    assert len(found.vectors) == found.probed_rows


def test_places_are_spread_and_all_of_them_come():
    for n in (1, 2, 3, 10, 97):
        found = list(spread(n))
        assert sorted(found) == list(range(n))
        assert found[: min(n, 2)] == [0, n - 1][: min(n, 2)]
    assert list(spread(9))[2:5] == [4, 2, 6]


def test_rows_are_measured_by_their_offsets():
    rows = [
        {
            "text": "a" * k if k % 5 else None,
            "turns": [{"role": "u", "content": "x" * k}] * (k % 3) if k % 4 else None,
            "file": {"bytes": b"q" * k, "path": "zz"} if k % 7 else None,
            "vector": [1.0] * k,
            "is_odd": k % 2 == 1,
        }
        for k in range(120)
    ]
    dataset = Dataset.from_list(rows)
    wanted = [
        len(row["text"] or "")
        + sum(1 + len(turn["content"]) for turn in row["turns"] or [])
        + (len(row["file"]["bytes"]) + 2 if row["file"] else 0)
        + 8 * len(row["vector"])
        + 1
        for row in rows
    ]
    assert measure_rows(dataset).tolist() == wanted
    assert measure_rows(dataset.select(range(30, 77))).tolist() == wanted[30:77]
    assert measure_rows(dataset.select([5, 99, 3])).tolist() == [wanted[k] for k in (5, 99, 3)]
    sizes = np.array([1, 2, 300, 1, 1, 1, 1, 400, 90, 10, 1])
    assert list(cut_rows(sizes, 3, 100)) == [
        (0, 2),
        (2, 3),
        (3, 6),
        (6, 7),
        (7, 8),
        (8, 10),
        (10, 11),
    ]


def test_long_rows_behind_short_ones_are_seen(tmp_path):
    texts = [f"short {k}" for k in range(5000)] + ["long " * 600_000] * 6
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data.parquet")
    options = {"method": "random", "keep_ratio": 1.0, "report": False}
    stages = plan(str(tmp_path / "data.parquet"), **options)["memory"]["stages"]
    assert 2e7 < stages["rows"] < 1e8
    assert stages["subset"] > 6e7
    blocks = [len(block["text"]) for block in read_blocks(Dataset.from_dict({"text": texts}), 4096)]
    assert blocks == [4096, 906, 2, 2]


def test_a_long_selection_is_foreseen(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)
    strata = np.zeros(300, dtype=np.int64)
    monkeypatch.setattr("dq_multimodal.probes.PICK_ROWS", 32)
    assert foresee_picks(vectors, strata, 3, "cosine", 0, can_part=True) is None
    monkeypatch.setattr("dq_multimodal.probes.MANY_ROWS", 300)
    assert foresee_picks(vectors, strata, 3, "cosine", 0, can_part=True) is None
    monkeypatch.setattr("dq_multimodal.probes.LONG_SECONDS", 0.0)
    line = foresee_picks(vectors, strata, 3, "cosine", 0, can_part=True)
    assert line.startswith("the selection will take about 0 minutes")
    assert "--partition kmeans" in line
    line = foresee_picks(vectors, strata, 3, "cosine", 0, can_part=False)
    assert "partition" not in line


def test_stand_ins_for_bins_and_rows():
    strata = np.array([0] * 7 + [1] * 4)
    assert bin_sizes(strata, 3) == [3 + 2, 2 + 1, 2 + 1]
    members = np.repeat([0, 1, 2], [5000, 40, 700])
    picks = sample_bins(members, np.arange(len(members)))
    assert np.bincount(members[picks]).tolist() == [count_sampled(s) for s in (5000, 40, 700)]
    rows = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    assert stretch(rows, 4).shape == (4, 3)
    more = stretch(rows, 25)
    assert (more.shape, more.dtype) == ((25, 3), np.float32)
    np.testing.assert_array_equal(more[:10], rows)
    assert time_picks(rows, strata, 3, "cosine") > 0


def test_pairs_of_the_search_are_those_of_its_tiles():
    for n in (10, 2048, 2049, 9000):
        wanted = sum(
            len(range(n)[start : start + 2048]) * len(range(n)[other : other + 8192])
            for start in range(0, n, 2048)
            for other in range(start, n, 8192)
        )
        assert count_tiled(n) == wanted


def test_bytes_of_an_array_file(tmp_path):
    for shape, kind in (((300, 16), np.float32), ((7, 2), np.float16), ((123_456, 1), np.float16)):
        np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=kind, shape=shape)
        assert npy_bytes(shape, kind) == (tmp_path / "a.npy").stat().st_size
