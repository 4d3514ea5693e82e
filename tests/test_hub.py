"""Push, load back and resample with the real Hub clients against a Hub on loopback."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from fake_hub import FakeHub
from nasty_images import picture

MARK = b'{"format": "dq-multimodal run 1"}'
CARD = b"---\nlicense: cc-by-nc-4.0\n---\n# A source\n"


@pytest.fixture
def hub():
    with FakeHub() as fake:
        yield fake


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


def python(script, env, folder):
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compress_from_the_hub_push_load_and_resample(hub, source, cli, tmp_path):
    env = hub.env(tmp_path)
    done = cli(
        *("compress", "owner/source", "--embeddings", "emb.npy", "--keep-ratio", 0.2),
        *("--method", "dq"),
        *("--push-to-hub", "me/small", "--private"),
        env=env,
    )
    assert "pushed" in done.stdout
    files = hub.files("me/small")
    wanted = {
        "README.md",
        "config.yaml",
        "manifest.json",
        "selection.parquet",
        "bins.parquet",
        "subset/part-00000.parquet",
        "figures/map.png",
        "figures/bins.png",
        "figures/coverage.png",
    }  # fmt: skip, the report stays at home: it shows rows that were not kept
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
    got = json.loads(python(script, env, tmp_path).splitlines()[-1])
    assert got == [20, 100, 20, columns, True]

    arguments = ("resample", "me/small", "--keep-ratio", 0.1, "--output-dir", "tenth", "--json")
    assert json.loads(cli(*arguments, env=env).stdout)["kept"] == 10
    cli(
        *("resample", "me/small", "--keep-ratio", 0.5, "--method", "random"),
        *("--output-dir", "half"),
        env=env,
    )
    for folder in ("tenth", "half"):
        checks = json.loads(cli("verify", folder, "--json", env=env).stdout)
        assert [check["result"] for check in checks] == ["passed"] * 3 + ["skipped", "passed"]
    checks = json.loads(cli("verify", "me/small", "--json", env=env).stdout)
    assert [check["result"] for check in checks] == ["passed"] * 3 + ["skipped", "passed"]
    refused = cli(
        *("resample", "me/small", "--keep-ratio", 0.1, "--method", "graphcut"),
        *("--output-dir", "no"),
        env=env,
        code=2,
    )
    assert "nor embeddings.npy" in refused.stderr


def test_a_server_error_leaves_one_whole_revision(hub, cli, tmp_path):
    rows = {"text": [f"{k}" for k in range(50)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "d.parquet")
    env = hub.env(tmp_path)
    cli("compress", "d.parquet", "--method", "random", "--output-dir", "a", env=env)
    cli("compress", "d.parquet", "--method", "random", "--seed", 1, "--output-dir", "b", env=env)
    cli("push", "a", "me/d", env=env)
    before = hub.files("me/d")
    n_commits = len(hub.repos["me/d"].commits)

    for pattern, status, times in (("/commit/", 500, 2), ("info/lfs/objects/batch", 403, 1)):
        hub.fail_next("POST", pattern, status, times, Retry_After="0")
        done = cli("push", "b", "me/d", env=env, code=2)
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.stderr
        assert hub.files("me/d") == before
    hub.fail_next("POST", "/commit/", status="drop")
    cli("push", "b", "me/d", env=env, code=2)
    assert hub.files("me/d") == before

    hub.fail_next("PUT", ".*", status=500, times=1, Retry_After="0")
    cli("push", "b", "me/d", env=env)
    assert len(hub.repos["me/d"].commits) == n_commits + 1
    after = hub.files("me/d")
    for name in ("selection.parquet", "subset/part-00000.parquet"):
        assert after[name] == (tmp_path / "b" / name).read_bytes()
    assert b"seed: 1" in after["config.yaml"]
    assert not [name for name, data in after.items() if str(tmp_path).encode() in data]
    assert json.loads(after["manifest.json"])["complete"]

    cli("resample", "me/d", "--keep-ratio", 0.1, "--output-dir", "c", env=env)
    cli("push", "c", "me/d", env=env)
    assert b"keep_ratio: 0.1" in hub.files("me/d")["config.yaml"]


def test_a_lost_answer_is_made_good_by_trying_again(hub, cli, tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    env = hub.env(tmp_path)
    arguments = ("compress", "d.parquet", "--method", "random", "--keep-ratio", 0.5)
    hub.fail_next("POST", "/commit/", status="lose")
    cli(*arguments, "--output-dir", "a", "--push-to-hub", "me/d", env=env, code=2)
    cli(*arguments, "--output-dir", "a", "--push-to-hub", "me/d", env=env)
    ours = [c for c in hub.repos["me/d"].commits if "config.yaml" in c.files]
    assert len(ours) == 1


def test_files_of_a_larger_subset_do_not_stay_behind(hub, cli, tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    env = hub.env(tmp_path)
    hub.add_repo(
        "me/d",
        {"manifest.json": MARK, "subset/part-00007.parquet": b"old", "subset/notes.txt": b"mine"},
    )
    cli(
        *("compress", "d.parquet", "--method", "random", "--keep-ratio", 0.5),
        *("--output-dir", "a", "--push-to-hub", "me/d"),
        env=env,
    )
    subset = [name for name in hub.files("me/d") if name.startswith("subset/")]
    assert subset == ["subset/notes.txt", "subset/part-00000.parquet"]  # the notes are not ours


def test_a_name_without_owner_is_the_users(hub, cli, tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    arguments = ("--method", "random", "--keep-ratio", 0.5, "--push-to-hub", "small")
    cli("compress", "d.parquet", *arguments, env=hub.env(tmp_path))
    assert b'load_dataset("me/small"' in hub.files("me/small")["README.md"]


def test_a_push_never_lands_where_it_should_not(hub, cli, tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    cli("compress", "d.parquet", "--method", "random", "--keep-ratio", 0.5, "--output-dir", "a")
    hub.add_repo("me/public", {"README.md": b"# mine"}, private=False)
    hub.add_repo("me/source", {"README.md": b"# mine", "data/train.parquet": b"PAR1"})
    done = cli("push", "a", "me/public", "--private", env=hub.env(tmp_path), code=2)
    assert "me/public is there already and public: nothing was pushed" in done.stderr
    done = cli("push", "a", "me/source", env=hub.env(tmp_path), code=2)
    assert "me/source holds other things" in done.stderr
    for name in ("me/public", "me/source"):
        assert hub.files(name)["README.md"] == b"# mine"


@pytest.mark.parametrize(
    ("token", "message"),
    [("read", r"no right to write there.*write access"), (None, "token|refused|no right")],
)
def test_a_token_without_rights_is_one_clear_line(hub, cli, tmp_path, token, message):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    cli("compress", "d.parquet", "--method", "random", "--keep-ratio", 0.5, "--output-dir", "a")
    done = cli("push", "a", "me/new", env=hub.env(tmp_path, token=token), code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in done.stderr
    hub.add_repo("me/there", {"README.md": b"# there\n"})
    done = cli("push", "a", "me/there", env=hub.env(tmp_path, token=token), code=2)
    assert "Traceback" not in done.stderr
    assert "error: cannot push to me/there" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compress owner/gone", "no dataset owner/gone on the Hub that this token may read"),
        ("compress owner/source --revision v9", "has no revision 'v9'"),
        ("compress owner/source --config-name other", "cannot read owner/source"),
        ("resample owner/gone --keep-ratio 0.1", "owner/gone"),
        ("resample owner/source --keep-ratio 0.1", "was not pushed by dq-multimodal"),
        ("verify a/b/c", "neither a folder here nor a Hub id"),
    ],
)
def test_bad_repositories_are_one_clear_line(hub, source, cli, tmp_path, arguments, message):
    done = cli(*arguments.split(), env=hub.env(tmp_path), code=2)
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


def test_the_cache_serves_when_the_hub_is_gone(hub, source, cli, tmp_path):
    given = ("--embeddings", "emb.npy", "--method", "dq", "--no-report")
    arguments = ("compress", "owner/source", *given, "--output-dir")
    env = hub.env(tmp_path)
    cli(*arguments, "a", env=env)
    hub.__exit__(None, None, None)
    done = cli(*arguments, "b", "--keep-ratio", "0.1", env=env)
    assert "kept     10 rows" in done.stdout
    done = cli("push", "b", "me/x", env=env, code=2)
    assert "the Hub is out of reach" in done.stderr


def test_images_with_dropped_patches_come_back_from_the_hub(hub, small_classifier, cli, tmp_path):
    env = hub.env(tmp_path)
    pictures = [picture((16, 16), seed=k) for k in range(30)]
    labels = [k % 3 for k in range(30)]
    features = Features({"img": Image(), "label": ClassLabel(names=["cat", "dog", "emu"])})
    rows = Dataset.from_dict({"img": pictures, "label": labels}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    cli(
        *("compress", "rows.parquet", "--embedding-model", small_classifier, "--n-bins", 2),
        *("--keep-ratio", 0.5, "--drop-ratio", 0.25, "--push-to-hub", "me/pictures"),
        "--no-report",
        env=env,
    )
    files = hub.files("me/pictures")
    card = files["README.md"].decode()
    assert "from dq_multimodal.patches import restore" in card
    for name in ("README.md", "config.yaml"):
        assert str(tmp_path) not in files[name].decode()
        assert str(small_classifier) not in files[name].decode()
    script = """
import json
from datasets import load_dataset
from dq_multimodal.patches import restore
subset = load_dataset("me/pictures", split="train")
images = restore(subset)[:]["img"]
print(json.dumps([len(images), images[0].size, images[0].mode]))
"""
    got = json.loads(python(script, env, tmp_path).splitlines()[-1])
    assert got == [15, [16, 16], "RGB"]
    done = cli("resample", "me/pictures", "--keep-ratio", 0.2, "--output-dir", "small", env=env)
    assert "kept     6 rows" in done.stdout
    done = cli("resample", "me/pictures", "--keep-ratio", 0.9, env=env, code=2)
    assert "patches were not dropped" in done.stderr
