"""The real clients against the fake Hub, so that tests which rely on it test something."""

import io
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import HfHubHTTPError, httpx

FILES = {"README.md": b"---\nlicense: mit\n---\n", "data/a.parquet": b"PAR1", "b.txt": b"b"}
OURS = {"repo_id": "me/name", "repo_type": "dataset"}


def commit(*paths, delete=(), **more):
    changes = [CommitOperationAdd(path, io.BytesIO(path.encode())) for path in paths]
    changes += [CommitOperationDelete(path) for path in delete]
    return HfApi().create_commit(operations=changes, commit_message="m", **OURS, **more).oid


def status_of(function, *given, **more):
    """What the Hub answered: a status, None if all is well, 0 if nothing."""
    try:
        function(*given, **more)
    except HfHubHTTPError as error:
        return error.response.status_code
    except httpx.TransportError:
        return 0


def test_commits(hub):
    api = HfApi()
    api.create_repo(private=True, **OURS)
    assert status_of(api.create_repo, **OURS) == 409
    start = hub.repos["me/name"].at().sha
    first = commit(*FILES, parent_commit=start)
    assert status_of(commit, "c.txt", parent_commit=start) == 412
    assert status_of(commit, "c.txt", delete=["absent.txt"]) == 404
    assert commit("b.txt") == first, "nothing has changed"
    second = commit(delete=["data/"])
    assert [c.parent for c in hub.repos["me/name"].commits] == [None, start, first]
    assert [*hub.files("me/name")] == [".gitattributes", "README.md", "b.txt"]
    info = api.dataset_info("me/name", revision=first, files_metadata=True)
    assert [file.rfilename for file in info.siblings if file.lfs] == ["data/a.parquet"]
    assert (info.private, api.dataset_info("me/name").sha) == (True, second)
    tree = api.list_repo_tree("me/name", recursive=True, revision=first, repo_type="dataset")
    assert {item.path for item in tree} == {".gitattributes", "data", *FILES}
    for repo, revision in (("me/none", None), ("me/name", "f" * 40)):
        assert status_of(api.dataset_info, repo, revision=revision) == 404


@pytest.mark.parametrize(
    ("token", "status", "reads"),
    [("read", 403, (None, None)), ("wrong", 401, (401, 401)), (None, 401, (None, 401))],
)
def test_tokens(hub, tmp_path, monkeypatch, token, status, reads):
    for name in ("me/name", "me/secret"):
        hub.add_repo(name, FILES, private=name == "me/secret")
    hub.patch(monkeypatch, tmp_path, token)
    assert status_of(HfApi().create_repo, "me/new", repo_type="dataset") == status
    assert status_of(commit, "c.txt") == status
    assert tuple(status_of(HfApi().dataset_info, name) for name in hub.repos) == reads
    assert [len(repo.commits) for repo in hub.repos.values()] == [1, 1]


def test_faults(hub):
    hub.add_repo("me/name", FILES)
    for fault in (500, "drop", "lose"):
        hub.fail_next("POST", "/commit/", fault)
    hub.fail_next("POST", "/preupload/", 503, Retry_After="0")
    hub.fail_next("GET", "/resolve/", "cut")
    assert [status_of(commit, f"{k}.txt") for k in range(4)] == [500, 0, 0, None]
    new = [sorted(set(c.files) - set(FILES)) for c in hub.repos["me/name"].commits]
    assert new == [[], ["2.txt"], ["2.txt", "3.txt"]]
    api = HfApi()
    assert Path(api.hf_hub_download(filename="b.txt", **OURS)).read_bytes() == b"b"
    found = [(method, path.rpartition("/")[2], status) for method, path, status in hub.requests]
    assert [s for *what, s in found if what == ["GET", "b.txt"]] == [200, 200]
    assert [s for _, path, s in hub.requests if "/preupload/" in path][:2] == [503, 200]
