"""Run folders of anybody: verify finds what it claims to check, and every command says one line."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from forging import (
    BINS,
    FILES,
    NUMBERS,
    ORDER,
    ROWS,
    SUBSET,
    change_document,
    change_table,
    record_again,
    swap,
)

from dq_multimodal import InputError, Run, compress, resample, verify

N = 60


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A run of a source with class names, a float and a number."""
    place = tmp_path_factory.mktemp("tampered")
    kinds = {"text": "string", "x": "float32", "n": "int64"}
    features = Features({k: Value(v) for k, v in kinds.items()} | {"l": ClassLabel(2, ["a", "b"])})
    rows = {"text": [f"row {k}" for k in range(N)], "x": np.linspace(0, 1, N), "n": range(N)}
    rows["l"] = [k % 2 for k in range(N)]
    Dataset.from_dict(rows, features=features).to_parquet(place / "d.parquet")
    np.save(place / "e.npy", np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32))
    options = {"method": "dq", "ready_embeddings": str(place / "e.npy"), "label_column": "l"}
    return compress(
        str(place / "d.parquet"), n_bins=3, report=False, output_dir=place / "run", **options
    )


@pytest.fixture
def run(made, tmp_path):
    """A copy to be spoilt."""
    shutil.copytree(made.path, tmp_path / "run")
    return tmp_path / "run"


def change_features(run, old, new):
    table = pq.read_table(run / SUBSET)
    text = table.schema.metadata[b"huggingface"].decode().replace(old, new)
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), run / SUBSET)


def scaled(column):
    return pa.array([2 * value for value in column.to_pylist()], column.type)


def subset(column, change):
    return lambda run: change_table(run, SUBSET, column, change)


def selection(column, change):
    return lambda run: change_table(run, "selection.parquet", column, change)


def bins(column, change):
    return lambda run: change_table(run, "bins.parquet", column, change)


def embeddings(change):
    return lambda run: np.save(run / "embeddings.npy", change(np.load(run / "embeddings.npy")))


def manifest(change):
    return lambda run: change_document(run / "manifest.json", change)


def config(change):
    return lambda run: change_document(run / "config.yaml", change)


def without_rows(run):
    pq.write_table(pq.read_table(run / SUBSET).drop_columns(["dq_row"]), run / SUBSET)


SPOILT = {
    "class names": (ROWS, lambda run: change_features(run, '["a", "b"]', '["b", "a"]')),
    "class dropped": (ROWS, lambda run: change_features(run, '["a", "b"]', '["a", "b", "c"]')),
    "float64": (ROWS, subset("x", lambda c: c.cast("float64"))),
    "text for n": (ROWS, subset("n", lambda c: c.cast("string"))),
    "int32 for n": (ROWS, subset("n", lambda c: c.cast("int32"))),
    "no values": (ROWS, subset("n", lambda c: pa.nulls(len(c)))),
    "values": (ROWS, subset("x", swap)),
    "lists": (ROWS, subset("text", lambda c: pa.array([[v.as_py()] for v in c]))),
    "dq_row": (NUMBERS, subset("dq_row", swap)),
    "dq_row text": (NUMBERS, subset("dq_row", lambda c: c.cast("string"))),
    "no dq_row": (NUMBERS, without_rows),
    "dq_rank": (NUMBERS, subset("dq_rank", swap)),
    "row": (ORDER, selection("row", swap)),
    "order": (ORDER, selection("order", swap)),
    "kept": (ORDER, selection("kept", lambda c: pa.array([not v.as_py() for v in c]))),
    "order of another type": (ORDER, selection("order", lambda c: c.cast("int32"))),
    "gain": (BINS, selection("gain", swap)),
    "gains": (BINS, selection("gain", scaled)),
    "rank": (BINS, selection("rank", swap)),
    "stratum": (ORDER, selection("stratum", lambda c: pa.array([9] * N, pa.int32()))),
    "label": (ORDER, bins("label", swap)),
    "weight": (ORDER, bins("weight", scaled)),
    "size": (ORDER, bins("size", scaled)),
    "scaled embeddings": (BINS, embeddings(lambda rows: 2 * rows)),
    "embeddings of float64": (BINS, embeddings(lambda rows: rows.astype(float))),
    "no embeddings": (BINS, lambda run: (run / "embeddings.npy").write_bytes(b"x")),
    "labels": (ORDER, manifest(lambda m: m["labels"].reverse())),
    "kept rows": (ORDER, manifest(lambda m: m.update(kept=3))),
    "bytes": (FILES, manifest(lambda m: m["bytes"].update(source_files=3))),
    "dimension": (BINS, config(lambda c: c["embedding"].update(dimension=5))),
    "seed": (ORDER, config(lambda c: c["request"].update(seed=5))),
}


@pytest.mark.parametrize("name", SPOILT)
def test_verify_finds_a_forgery_that_is_recorded_as_right(run, name):
    at, spoil = SPOILT[name]
    spoil(run)
    record_again(run)
    checks = verify(run)
    assert checks[at].result == "failed", checks


@pytest.mark.parametrize("column", ["rank", "bin"])
def test_bins_that_no_run_makes_are_seen_without_embeddings(run, column):
    (run / "embeddings.npy").unlink()
    selection(column, lambda c: pa.array([0] * N, c.type))(run)
    record_again(run)
    assert verify(run)[BINS].result == "failed"


UNSEEN = {
    "notes": manifest(lambda m: m["notes"].append("all is well")),
    "a hash": config(lambda c: c["source"]["files"][0].update(sha256="0" * 64)),
    "no digest": manifest(lambda m: m.pop("digest")),
    "no record": manifest(lambda m: m.pop("files")),
    "one byte": lambda run: (run / "bins.parquet").open("ab").write(b"x"),
    "one more file": lambda run: shutil.copy(run / SUBSET, run / "subset/part-00001.parquet"),
    "half a letter": manifest(lambda m: m["notes"].append("\ud800")),
    "no card": lambda run: (run / "README.md").unlink(),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_verify_compares_files_and_manifest_with_what_was_recorded(run, name):
    assert [check.result for check in verify(run)] == ["passed"] * 5
    UNSEEN[name](run)
    if name == "half a letter":
        with pytest.raises(InputError, match="it is no JSON"):
            verify(run)
    else:
        assert verify(run)[FILES].result == "failed"


ALIASES = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
HOSTILE = {
    "aliases": (lambda text: ALIASES + text, "it has YAML anchors"),
    "nested": (lambda text: text + f"z: {'[' * 20000}{']' * 20000}\n", "nested more than 20 deep"),
    "long": (lambda text: text + f"z: {'x' * 10**6}\n", "larger than 1,000,000 bytes"),
    "base 60": (
        lambda text: text + f"z: {'1:' * 20000}1\n",
        "value of more than 10,000 characters",
    ),
    "beyond floats": (lambda text: text + f"z: {'1:' * 400}1.5\n", "it is no YAML"),
    "code": (lambda text: text + "z: !!python/object/apply:os.getcwd []\n", "it has YAML tags"),
    "no number": (lambda text: text + 'z: !!int "-"\n', "it has YAML tags"),
    "date": (lambda text: text.replace("split: train", "split: 2001-99-99"), "it is no YAML"),
    "a list": (lambda _: "- request\n", "config must be dict, got list"),
    "bytes": (lambda _: b"\xff\xfe\x00", "must be text in UTF-8"),
    "number": (lambda text: text.replace("n_bins: 3", "n_bins: '3'"), "n_bins must be a whole"),
    "much": (lambda text: text.replace("n_bins: 3", f"n_bins: {2**70}"), "n_bins must be a whole"),
    "long number": (
        lambda text: text.replace("n_bins: 3", f"n_bins: 0x{'f' * 9000}"),
        "number of more than 400 characters",
    ),
    "nan": (lambda text: text.replace("alpha: 0.6", "alpha: .nan"), "alpha must .*, got nan"),
    "flag": (lambda text: text.replace("streaming: false", "streaming: 0"), "true or false, got 0"),
    "setting": (lambda text: text.replace("  draw:", "  drew:"), "does not know: drew"),
    "rows": (lambda text: text.replace("rows: 60", "rows: many"), "source.rows must be int"),
    "origin": (lambda text: text.replace("kind: file", "kind: [x]"), "source.kind must be"),
    "keys that collide": (
        lambda text: text + "".join(f"{1 + k * (2**61 - 1)}: x\n" for k in range(20000)),
        "it has keys that are no text",
    ),
    "other bins": (lambda text: text.replace("bins: dq", "bins: graphcut"), "its method is dq"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_of_anybody_ends_in_one_line(run, tmp_path, name):
    change, message = HOSTILE[name]
    file = run / "config.yaml"
    changed = change(file.read_text())
    file.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    for call in (Run, verify, lambda run: resample(run, 0.1, output_dir=tmp_path / "out")):
        with pytest.raises(InputError, match=f"config.yaml is not the config.yaml.*{message}"):
            call(run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("selection.parquet", "bin", 2**31 - 1),
        ("selection.parquet", "rank", -1),
        ("selection.parquet", "stratum", N),
        ("selection.parquet", "order", 2**62),
        ("bins.parquet", "bin", 2**31 - 1),
        ("bins.parquet", "stratum", None),
        (SUBSET, "dq_row", 2**62),
    ],
)
def test_no_number_of_a_table_asks_for_memory(run, tmp_path, name, column, value):
    def put(old):
        return pa.array([value, *old.to_pylist()[1:]], old.type)

    change_table(run, name, column, put)
    with pytest.raises(InputError, match=name if "sub" not in name else "does not hold the rows"):
        resample(run, 0.1, output_dir=tmp_path / "out")
    assert "failed" in {check.result for check in verify(run)}


def test_a_table_of_more_rows_than_its_bytes_can_hold_is_not_read(run, tmp_path):
    table = pq.read_table(run / "selection.parquet").take(pa.array(np.zeros(3 * 10**6, int)))
    pq.write_table(table, run / "selection.parquet", compression="zstd")
    with pytest.raises(InputError, match="cannot hold the 3,000,000 rows that it claims"):
        resample(run, 0.1, output_dir=tmp_path / "out")


def test_the_command_line_says_one_line_of_every_damage(run, cli, tmp_path):
    (run / "config.yaml").write_text(ALIASES + (run / "config.yaml").read_text())
    done = cli("resample", "run", "--keep-ratio", 0.1, "--output-dir", "out", code=2)
    assert done.stderr.count("\n") == 1 and "it has YAML anchors" in done.stderr
    shutil.copytree(run, tmp_path / "two")
    change_document(tmp_path / "two" / "config.yaml", lambda c: [c.pop(k) for k in "abcdefghij"])
    change_table(tmp_path / "two", SUBSET, "n", lambda c: c.cast("string"))
    done = cli("verify", "two", code=2)
    assert "failed   rows of the subset against the source" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: two is not what it says: rows")
    (tmp_path / "two" / "README.md").unlink()
    done = cli("push", "two", "me/two", code=2)
    assert done.stderr.startswith("error: the run in two is damaged: README.md is missing")


def test_an_edited_manifest_is_not_pushed(run):
    change_document(run / "manifest.json", lambda found: found["notes"].append("all is well"))
    with pytest.raises(InputError, match=r"damaged: manifest\.json"):
        Run(run).push_to_hub("me/x")


@pytest.mark.parametrize("name", ["manifest.json", "README.md", "config.yaml", SUBSET])
def test_files_without_an_end_are_one_line(run, name):
    (run / name).unlink()
    (run / name).symlink_to("/dev/zero")
    with pytest.raises(InputError):
        Run(run).write_report()
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(InputError):
        Run(run).write_report()
    with pytest.raises(InputError):
        resample(run, 0.5, output_dir=run.parent / "other").push_to_hub("me/x")
