"""Push, load back and resample with the real Hub clients against a Hub on loopback."""

import json
import subprocess
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from huggingface_hub import close_session
from nasty_images import picture

from dq_multimodal.patches import restore

CARD = b"---\nlicense: cc-by-nc-4.0\n---\n# A source\n"


@pytest.fixture
def source(hub, tmp_path):
    """A dataset on the Hub, and embeddings of its rows."""
    rows = Dataset.from_dict(
        {"instruction": [f"Do {k}" for k in range(100)], "output": [f"ok {k}" for k in range(100)]}
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    np.save(tmp_path / "emb.npy", np.random.default_rng(0).normal(size=(100, 4)))
    data = (tmp_path / "rows.parquet").read_bytes()
    files = {"README.md": CARD, "data/train-00000-of-00001.parquet": data}
    return hub.add_repo("owner/source", files)


def test_compress_from_the_hub_push_load_and_resample(hub, source, cli, tmp_path):
    env = hub.env(tmp_path)
    done = cli(
        *("compress", "owner/source", "--ready-embeddings", "emb.npy", "--method", "dq"),
        *("--push-to-hub", "me/small", "--private"),
        env=env,
    )
    assert "pushed" in done.stdout
    files = hub.files("me/small")
    wanted = {"README.md", "config.yaml", "manifest.json", "selection.parquet", "bins.parquet"}
    wanted |= {f"figures/{name}.png" for name in ("map", "bins", "coverage")}
    wanted |= {"subset/part-00000.parquet"}  # the report stays at home: it shows rows not kept
    assert set(files) - {".gitattributes"} == wanted
    assert f"revision: {source}" in files["config.yaml"].decode()
    card = files["README.md"].decode()
    assert "license: cc-by-nc-4.0" in card
    assert source in card
    assert "20 of the 100 rows" in card
    assert 'load_dataset("me/small", split="train")' in card

    script = """
import json
from datasets import load_dataset
subset = load_dataset("me/small", split="train")
selection = load_dataset("me/small", "selection", split="train")
source = load_dataset("owner/source", split="train")
print(json.dumps([len(subset), len(selection), sum(selection["kept"]), subset.column_names,
    all(source[row["dq_row"]]["output"] == row["output"] for row in subset)]))
"""
    columns = ["instruction", "output", "dq_row", "dq_bin", "dq_rank"]
    command = [sys.executable, "-c", script]
    plain = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout.splitlines()[-1]) == [20, 100, 20, columns, True]

    ask = ("resample", "me/small", "--keep-ratio")
    assert json.loads(cli(*ask, 0.1, "--output-dir", "tenth", "--json").stdout)["kept"] == 10
    cli(*ask, 0.5, "--method", "random", "--output-dir", "half")
    for run in ("tenth", "half", "me/small"):
        checks = json.loads(cli("verify", run, "--json").stdout)
        assert [check["result"] for check in checks] == ["passed"] * 3 + ["skipped", "passed"]
    refused = cli(*ask, 0.1, "--method", "graphcut", "--output-dir", "no", code=2)
    assert "nor embeddings.npy" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compress owner/gone", "cannot read owner/gone: there is no such dataset on the Hub"),
        ("compress owner/source --revision v9", "owner/source: it has no such revision"),
        ("compress owner/source --config-name other", "cannot read owner/source"),
        ("resample owner/gone --keep-ratio 0.1", "owner/gone"),
        ("resample owner/source --keep-ratio 0.1", "was not pushed by dq-multimodal"),
        ("verify a/b/c", "neither a folder here nor a Hub id"),
    ],
)
def test_bad_repositories_are_one_clear_line(source, cli, arguments, message):
    done = cli(*arguments.split(), code=2)
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


def test_the_cache_serves_when_the_hub_is_gone(hub, source, cli, tmp_path):
    given = ("--ready-embeddings", "emb.npy", "--method", "dq", "--no-report")
    arguments = ("compress", "owner/source", *given, "--output-dir")
    cli(*arguments, "a")
    hub.__exit__(None, None, None)
    close_session()  # whose connections still have an end
    done = cli(*arguments, "b", "--keep-ratio", "0.1")
    assert "kept     10 rows" in done.stdout
    done = cli("push", "b", "me/x", code=2)
    assert "the Hub is out of reach" in done.stderr


def test_images_with_dropped_patches_come_back_from_the_hub(hub, small_classifier, cli, tmp_path):
    pictures = [picture((16, 16), seed=k) for k in range(30)]
    labels = [k % 3 for k in range(30)]
    features = Features({"img": Image(), "label": ClassLabel(names=["cat", "dog", "emu"])})
    rows = Dataset.from_dict({"img": pictures, "label": labels}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    cli(
        *("compress", "rows.parquet", "--embedding-model", small_classifier, "--n-bins", 2),
        *("--keep-ratio", 0.5, "--drop-ratio", 0.25, "--push-to-hub", "me/pictures"),
        "--no-report",
    )
    files = hub.files("me/pictures")
    card = files["README.md"].decode()
    assert "from dq_multimodal.patches import restore" in card
    for name in ("README.md", "config.yaml"):
        assert str(tmp_path) not in files[name].decode()
        assert str(small_classifier) not in files[name].decode()
    images = restore(load_dataset("me/pictures", split="train"))[:]["img"]
    assert (len(images), images[0].size, images[0].mode) == (15, (16, 16), "RGB")
    done = cli("resample", "me/pictures", "--keep-ratio", 0.2, "--output-dir", "small")
    assert "kept     6 rows" in done.stdout
    done = cli("resample", "me/pictures", "--keep-ratio", 0.9, code=2)
    assert "patches were not dropped" in done.stderr


def test_all_splits_of_a_hub_dataset_are_pushed_as_splits(hub, cli, tmp_path):
    files = {}
    for split, n_rows in {"train": 60, "test": 20}.items():
        path = tmp_path / f"{split}.parquet"
        Dataset.from_dict({"text": [f"{split} {k}" for k in range(n_rows)]}).to_parquet(path)
        files[f"data/{split}-00000-of-00001.parquet"] = path.read_bytes()
    hub.add_repo("owner/both", files)
    asked = ("--split", "all", "--method", "random", "--keep-ratio", 0.1)
    cli("compress", "owner/both", *asked, "--push-to-hub", "me/both")
    found = {split: rows["text"] for split, rows in load_dataset("me/both").items()}
    assert {split: len(texts) for split, texts in found.items()} == {"train": 6, "test": 2}
    assert all(text.startswith(split) for split, texts in found.items() for text in texts)
    assert 'load_dataset("me/both")' in hub.files("me/both")["README.md"].decode()
