"""The real clients against the fake Hub, so that tests which rely on it test something."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub

HUB = """
import io, json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete as Delete, HfApi
api, seen, of_dataset = HfApi(), {}, {"repo_type": "dataset"}

def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, getattr(response, "status_code", None), str(error)]

def add(path, data):
    return CommitOperationAdd(path, io.BytesIO(data))

def commit(*operations, repo="me/name", **kwargs):
    return api.create_commit(repo, operations, commit_message="m", **of_dataset, **kwargs).oid
"""
CARD = b"""---
license: mit
configs:
- config_name: default
  data_files: data/*.parquet
- config_name: selection
  data_files: selection.parquet
---
# A card
"""


def make_parquet(values: list[int]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": values}), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "README.md": CARD,
    "data/train-0.parquet": make_parquet([1, 2]),
    "data/train-1.parquet": make_parquet([3]),
    "selection.parquet": make_parquet([7, 8, 9]),
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


def run(hub: FakeHub, folder: Path, code: str, token: str | None = "write") -> Any:
    """Run client code in a process of its own; return what it left in `seen`."""
    code = f"{HUB}\nfiles = {FILES!r}\n{code}\nprint(json.dumps(seen))"
    command, env = [sys.executable, "-c", code], hub.env(folder, token)
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def statuses_of(hub: FakeHub, method: str, ending: str) -> list[int]:
    """What the requests of this method to paths of this ending were answered."""
    return [status for m, path, status in hub.requests if m == method and path.endswith(ending)]


def test_commits(hub: FakeHub, tmp_path: Path) -> None:
    code = """
seen["me"] = api.whoami()["name"]
seen["url"] = api.create_repo("me/name", private=True, **of_dataset)
seen["twice"] = error_of(api.create_repo, "me/name", **of_dataset)
api.create_repo("me/name", exist_ok=True, **of_dataset)
start = api.dataset_info("me/name").sha
first = commit(*[add(*item) for item in files.items()], parent_commit=start)
second = commit(add("README.md", b"---\\nlicense: apache-2.0\\n---\\n"), Delete("data/"))
unchanged = commit(add("selection.parquet", files["selection.parquet"]))
seen["shas"] = [start, first, second, unchanged, api.dataset_info("me/name").sha]
seen["stale"] = error_of(commit, Delete("README.md"), parent_commit=first)
seen["absent"] = error_of(commit, add("a.txt", b"a"), Delete("absent.txt"))
seen["yaml"] = error_of(commit, add("README.md", b"---\\na: [\\n---\\n"))
info = api.dataset_info("me/name", revision=first, files_metadata=True)
seen["info"] = [info.card_data.license, info.private, info.siblings[0].size]
seen["lfs"] = [file.rfilename for file in info.siblings if file.lfs]
at = {"revision": first, **of_dataset}
seen["trees"] = [
    [item.path for item in api.list_repo_tree("me/name", **at)],
    [item.path for item in api.list_repo_tree("me/name", "data", **at)],
    [item.path for item in api.list_repo_tree("me/name", recursive=True, **at)],
    [item.path for item in api.get_paths_info("me/name", ["data", "no", "README.md"], **at)],
]
seen["refs"] = [ref.target_commit for ref in api.list_repo_refs("me/name", **of_dataset).branches]
path = "data/train-1.parquet"
seen["same"] = open(api.hf_hub_download("me/name", path, **at), "rb").read() == files[path]
for key, repo, path, revision in [
    ("entry", "me/name", path, None), ("revision", "me/name", path, "f" * 40),
    ("repo", "me/other", path, None),
]:
    seen[key] = error_of(api.hf_hub_download, repo, path, revision=revision, **of_dataset)
seen["info of none"] = error_of(api.dataset_info, "me/other")
seen["model"] = error_of(api.model_info, "me/name")
"""
    seen = run(hub, tmp_path, code)
    repo = hub.repos["me/name"]
    start, first, second = repo.commits
    assert seen["me"] == "me"
    assert seen["url"] == f"{hub.url}/datasets/me/name"
    assert seen["twice"][:2] == ["HfHubHTTPError", 409]
    assert seen["shas"] == [start.sha, first.sha, second.sha, second.sha, second.sha]
    assert [commit.parent for commit in repo.commits] == [None, start.sha, first.sha]
    assert hub.files("me/name", first.sha) == FILES | {".gitattributes": b""}
    assert set(hub.files("me/name")) == {".gitattributes", "README.md", "selection.parquet"}
    assert seen["lfs"] == sorted(first.lfs) == sorted(set(FILES) - {"README.md"})
    assert seen["info"] == ["mit", True, 0]
    assert seen["stale"][:2] == ["HfHubHTTPError", 412]
    assert seen["absent"][:2] == ["RemoteEntryNotFoundError", 404]
    assert seen["yaml"][0] == "ValueError"
    top = [".gitattributes", "README.md", "data", "selection.parquet"]
    parts = ["data/train-0.parquet", "data/train-1.parquet"]
    assert seen["trees"] == [top, parts, [*top[:3], *parts, top[3]], ["data", "README.md"]]
    assert seen["refs"] == [second.sha]
    assert seen["same"]
    assert seen["entry"][0] == "RemoteEntryNotFoundError"
    assert seen["revision"][0] == "RevisionNotFoundError"
    assert (
        seen["repo"][0] == seen["info of none"][0] == seen["model"][0] == "RepositoryNotFoundError"
    )


def test_datasets(hub: FakeHub, tmp_path: Path) -> None:
    first = hub.add_repo("me/name", FILES)
    hub.add_repo("me/name", FILES | {"selection.parquet": make_parquet([0])})
    hub.add_repo("me/plain", {"train.parquet": make_parquet([4]), "notes.txt": b"no card"})
    code = f"""
from datasets import Dataset, load_dataset
from huggingface_hub.utils import get_session
def load(*args, **kwargs):
    return list(load_dataset(*args, split="train", **kwargs)["x"])
seen["default"], seen["plain"] = load("me/name"), load("me/plain")
seen["selection"] = load("me/name", "selection"), load("me/name", "selection", revision="{first}")
seen["streaming"] = load("me/name", streaming=True)
for name in ("default", "other"):
    Dataset.from_dict({{"x": [5, 6]}}).push_to_hub("me/pushed", name)
seen["pushed"] = load("me/pushed"), load("me/pushed", "other")
seen["none"] = error_of(load, "me/none")
readme = "{hub.url}/datasets/me/name/resolve/main/README.md"
seen["part"] = get_session().get(readme, headers={{"Range": "bytes=4-10"}}).text
"""
    seen = run(hub, tmp_path, code)
    assert seen["default"] == seen["streaming"] == [1, 2, 3]
    assert seen["selection"] == [[0], [7, 8, 9]]
    assert seen["plain"] == [4]
    assert seen["pushed"] == [[5, 6], [5, 6]]
    assert seen["none"][0] == "DatasetNotFoundError"
    assert seen["part"] == "license"


def test_tokens(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_repo("me/name", FILES)
    hub.add_repo("me/secret", FILES, private=True)
    code = """
seen["create"] = error_of(api.create_repo, "me/new", **of_dataset)
seen["commit"] = error_of(commit, add("a.txt", b"a"))
seen["public"] = error_of(api.dataset_info, "me/name")
seen["private"] = error_of(api.dataset_info, "me/secret")
"""
    seen = {token: run(hub, tmp_path, code, token) for token in ("read", "wrong", None)}
    assert {key: error and error[:2] for key, error in seen["read"].items()} == {
        "create": ["HfHubHTTPError", 403],
        "commit": ["HfHubHTTPError", 403],
        "public": None,
        "private": None,
    }
    assert "write token" in seen["read"]["commit"][2]
    assert {error[1] for error in seen["wrong"].values()} == {401}
    assert seen[None]["public"] is None
    assert seen[None]["private"][:2] == ["RepositoryNotFoundError", 401]
    assert seen[None]["create"][1] == seen[None]["commit"][1] == 401
    assert [len(repo.commits) for repo in hub.repos.values()] == [1, 1]


def test_faults(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_repo("me/name", FILES)
    for fault in (500, "drop", "lose"):
        hub.fail_next("POST", "/commit/", fault)
    hub.fail_next("POST", "/preupload/", 503, Retry_After="0")
    hub.fail_next("GET", "/resolve/", "cut")
    code = """
seen["errors"] = [error_of(commit, add(f"{i}.txt", b"a")) for i in range(4)]
path = api.hf_hub_download("me/name", "selection.parquet", **of_dataset)
seen["same"] = open(path, "rb").read() == files["selection.parquet"]
"""
    seen = run(hub, tmp_path, code)
    assert seen["errors"][0][:2] == ["HfHubHTTPError", 500]
    assert seen["errors"][1][0] == seen["errors"][2][0] == "RemoteProtocolError"
    assert seen["errors"][3] is None
    assert [sorted(set(commit.files) - set(FILES)) for commit in hub.repos["me/name"].commits] == [
        [],
        ["2.txt"],
        ["2.txt", "3.txt"],
    ]
    assert seen["same"]
    assert statuses_of(hub, "GET", "selection.parquet") == [200, 200]
    assert statuses_of(hub, "POST", "/preupload/main") == [503, 200, 200, 200, 200]
    assert statuses_of(hub, "POST", "/commit/main") == [500, 0, 0, 200]
