"""A Hugging Face Hub on loopback, for tests that run the real clients in subprocesses.

It answers what `huggingface_hub` and `datasets` ask about dataset repositories, and about those of
models (`models/OWNER/NAME` in `repos`), as the real Hub does, keeps every revision of the one
branch, `main`, and lets answers fail when a test says so.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_PATH = re.compile(r"\.(arrow|bin|gif|gz|jpe?g|np[yz]|parquet|png|pt|safetensors|tar|webp|zip)$")
# A status: answered, nothing done. "drop": the connection closes, nothing done. "lose": all done,
# the connection closes before the answer. "cut": all done, it closes half way through the answer.
# A function: called, then answered as always.
Fault = int | Literal["drop", "lose", "cut"] | Callable[[], object]


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: str) -> None:
        self.status = status
        self.body = {"error": message, "errors": [{"message": message}], **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    parent: str | None
    files: Mapping[str, bytes]
    lfs: frozenset[str]  # which of the files are LFS objects

    def oid(self, path: str) -> str:  # by which the client sees that a file has changed
        data = self.files[path]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data)
        return (hashlib.sha256(data) if path in self.lfs else git).hexdigest()

    def entries(self) -> dict[str, dict[str, Any]]:  # all folders and files, as the Hub lists them
        folders = {str(folder) for path in self.files for folder in PurePosixPath(path).parents}
        folder: dict[str, Any] = {"type": "directory", "oid": self.sha, "size": 0}
        entries = {path: folder | {"path": path} for path in folders - {"."}}
        for path, data in self.files.items():
            file = {"type": "file", "path": path, "oid": self.oid(path), "size": len(data)}
            lfs = file | {"sha256": self.oid(path), "pointerSize": 134}
            entries[path] = file | ({"lfs": lfs} if path in self.lfs else {})
        return dict(sorted(entries.items()))

    def preupload(self, path: str, size: int, **_: str) -> dict[str, Any]:
        mode = "lfs" if LFS_PATH.search(path) or size > 10_000_000 else "regular"
        there = {"oid": self.oid(path)} if path in self.files else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, **there}


@dataclass
class Repo:
    id: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)  # oldest first

    def at(self, revision: str = "main") -> Commit:  # or a sha, or its first 7 or more digits
        for commit in reversed(self.commits):
            if revision == "main" or (len(revision) >= 7 and commit.sha.startswith(revision)):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def append(self, message: str, files: Mapping[str, bytes], lfs: set[str]) -> Commit:
        parent = self.commits[-1].sha if self.commits else None
        tree = MappingProxyType(dict(sorted(files.items())))
        sha = hashlib.sha1(repr((self.id, parent, message, tree)).encode()).hexdigest()
        self.commits.append(Commit(sha, message, parent, tree, frozenset(lfs)))
        return self.commits[-1]

    def commit(self, objects: Mapping[str, bytes], header: Any, *operations: Any) -> Commit:
        if not self.at().sha.startswith(header["value"].get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files, lfs = dict(self.at().files), set(self.at().lfs)
        for key, value in (operation.values() for operation in operations):
            path, new = value["path"], {}
            is_folder, prefix = key == "deletedFolder", path.rstrip("/") + "/"
            gone = {p for p in files if (p.startswith(prefix) if is_folder else p == path)}
            if key == "file":
                new = {path: base64.b64decode(value["content"], validate=True)}
            elif key == "lfsFile":
                new = {path: objects[value["oid"]]}
            elif not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            files = {p: data for p, data in files.items() if p not in gone} | new
            lfs = (lfs - gone) | (set(new) if key == "lfsFile" else set())
        return self.append(header["value"]["summary"], files, lfs)


def read_card(readme: bytes) -> dict[str, Any]:
    """The YAML front matter of a README; ValueError or yaml.YAMLError if it is no mapping."""
    parts = re.split(r"^---\s*$", readme.decode(), maxsplit=2, flags=re.MULTILINE)
    return dict(yaml.safe_load(parts[1]) or {}) if len(parts) == 3 and not parts[0].strip() else {}


def key_of(kind: str, owner: str, name: str) -> str:
    """The key of a repository in `repos`."""
    return f"models/{owner}/{name}" if kind == "models" else f"{owner}/{name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, else every answer waits for a delayed ACK
    server: "FakeHub"

    def log_message(self, *_: object) -> None: ...  # `requests` is the log

    def serve(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault, headers = self.server.take_fault(self.command, self.path)
        self.status, self.headers_out = 200, dict(headers)
        try:
            if callable(fault):
                fault()
            if isinstance(fault, int):
                raise Refusal(fault, "Injected error")
            body = b"" if fault == "drop" else self.answer(content)
        except Refusal as refusal:
            self.status, body = refusal.status, refusal.body
            self.headers_out |= refusal.headers
        except (ValueError, LookupError, TypeError, yaml.YAMLError) as error:
            self.status, body = 400, Refusal(400, f"Malformed: {error!r}").body  # 5xx: tried again
        self.status = 0 if fault in ("drop", "lose") else self.status
        self.server.requests.append((self.command, self.path, self.status))
        if self.status:
            body = body if isinstance(body, bytes) else json.dumps(body, default=str).encode()
            defaults = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            self.send_response(self.status)
            for header in (defaults | self.headers_out).items():
                self.send_header(*header)
            self.end_headers()
            shown = 0 if self.command == "HEAD" else len(body) // (2 if fault == "cut" else 1)
            self.wfile.write(body[:shown])
        self.close_connection |= isinstance(fault, str)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def answer(self, content: bytes) -> Any:
        hub, url = self.server, urlsplit(self.path)
        parts, query = [*map(unquote, url.path.split("/")[1:])], parse_qs(url.query)
        if parts[2:3] == ["resolve"] or parts[2:3] == ["info"]:
            parts = ["models", *parts]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in ("write", "read", None):
            raise Refusal(401, "Invalid credentials in Authorization header")
        match (self.command, *parts):
            case "PUT", "lfs", oid if hashlib.sha256(content).hexdigest() == oid:
                hub.lfs_objects[oid] = content  # as behind a signed address: no token
                return {}
            case "POST", "lfs", oid if oid in hub.lfs_objects:
                return {}
            case "GET", "api", "whoami-v2" if token:
                auth = {"type": "access_token", "accessToken": {"displayName": "-", "role": token}}
                user = {"type": "user", "id": "0", "name": "me", "orgs": [], "auth": auth}
                return user | hub.user
            case "POST", "api", "validate-yaml":
                empty = not read_card(json.loads(content)["content"].encode())
                return {"errors": [], "warnings": [{"message": "empty metadata"}] if empty else []}
            case "POST", "api", "repos", "create":
                return hub.create_repo(token, **json.loads(content))
            case "POST", kind, owner, name, "info", "lfs", "objects", "batch":
                hub.find_repo(token, key_of(kind, owner, name.removesuffix(".git")), write=True)
                objects = json.loads(content)["objects"]
                for item in [o for o in objects if o["oid"] not in hub.lfs_objects]:
                    action = {"href": f"{hub.url}/lfs/{item['oid']}"}
                    item["actions"] = {"upload": action, "verify": action}
                return {"objects": objects}
            case "GET" | "HEAD", kind, owner, name, "resolve", revision, *path:
                repo = hub.find_repo(token, key_of(kind, owner, name))
                return self.resolve(repo.at(revision), "/".join(path))
            case _, "api", "datasets" | "models" as kind, owner, name, *rest:
                write = rest[:1] in (["preupload"], ["commit"])
                repo = hub.find_repo(token, key_of(kind, owner, name), write=write)
                return self.answer_repo(repo, rest, query, content)
        raise Refusal(404 if token else 401, f"No {self.command} {self.path}", "RepoNotFound")

    def answer_repo(self, repo: Repo, rest: list[str], query: Any, content: bytes) -> Any:
        match (self.command, *rest):
            case ("GET",) | ("GET", "revision", _):
                commit = repo.at(*rest[1:])
                entries = commit.entries() if "blobs" in query else {}
                siblings = [{"rfilename": path} | entries.get(path, {}) for path in commit.files]
                card = read_card(commit.files.get("README.md", b""))
                info = {"id": repo.id.removeprefix("models/"), "sha": commit.sha, "gated": False}
                info |= {"siblings": siblings}
                info |= {"private": repo.private} | ({"cardData": card} if card else {})
                return info | {"tags": card.get("tags", [])}
            case "GET", "refs":
                main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.at().sha}
                return {"branches": [main], "converts": [], "tags": [], "pullRequests": []}
            case "GET", "tree", revision, *path:
                entries, folder = repo.at(revision).entries(), PurePosixPath(*path)
                deep = None if query.get("recursive") == ["true"] else 1
                inside = [p for p in entries if folder in list(PurePosixPath(p).parents)[:deep]]
                if path and not inside:
                    raise Refusal(404, "Folder not found", "EntryNotFound")
                return [entries[p] for p in inside]
            case "POST", "paths-info", revision:
                entries = repo.at(revision).entries()
                return [entries[p] for p in parse_qs(content.decode())["paths"] if p in entries]
            case "POST", "preupload", revision:
                head, wanted = repo.at(revision), json.loads(content)["files"]
                return {"files": [head.preupload(**file) for file in wanted]}
            case "POST", "commit", "main" if not query:
                hub, lines = self.server, map(json.loads, content.splitlines())
                with hub.lock:
                    sha = repo.commit(hub.lfs_objects, *lines).sha
                page = "" if repo.id.startswith("models/") else "datasets/"
                url = f"{hub.url}/{page}{repo.id.removeprefix('models/')}/commit/{sha}"
                return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}
        raise Refusal(404, f"No {self.command} {self.path}")

    def resolve(self, commit: Commit, path: str) -> bytes:
        self.headers_out["X-Repo-Commit"] = commit.sha
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data, etag = commit.files[path], f'"{commit.oid(path)}"'
        self.headers_out |= {"ETag": etag, "Content-Type": "application/octet-stream"}
        if path in commit.lfs:
            self.headers_out |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
            if start >= end:
                raise Refusal(416, f"The file has {len(data)} bytes")
            self.headers_out["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            self.status, data = 206, data[start:end]
        return data


class FakeHub(ThreadingHTTPServer):
    """The server; a context manager. `repos` and `requests` may be read at any time."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path with query, status or 0
        self.user: dict[str, Any] = {}  # what whoami answers besides: orgs, auth
        self.lfs_objects: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.faults: list[tuple[str, str, Fault, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def env(self, folder: Path, token: str | None = "write") -> dict[str, str]:
        """Environment of a subprocess that sees this Hub and keeps its caches in `folder`."""
        ours = re.compile("HF_|HUGGING|TRANSFORMERS_OFFLINE")
        env = {key: value for key, value in os.environ.items() if not ours.match(key)}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return env | ({"HF_TOKEN": token} if token else {})

    def patch(self, monkeypatch: Any, folder: Path, token: str | None = "write") -> None:
        """Let the clients in this process see this Hub, and keep their cache in `folder`."""
        import datasets.config
        from huggingface_hub import close_session, constants

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        values |= {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": False}
        for name, value in (values | {"HF_HUB_DISABLE_XET": True}).items():
            monkeypatch.setattr(constants, name, value)
        for name, value in {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(datasets.config, name, value)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", token or "")
        close_session()

    def add_repo(self, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> str:
        """Put a revision of exactly these files at the head of a repository; return its sha."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id))
        repo.private = private
        return repo.append("Add files", files, set(filter(LFS_PATH.search, files))).sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return dict(self.repos[repo_id].at(revision).files)

    def fail_next(
        self, method: str, path_regex: str, status: Fault = 500, times: int = 1, **headers: str
    ) -> None:
        """Let the next `times` matching requests fail; `Retry_After="0"`: clients wait only 1 s."""
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        self.faults += [(method, path_regex, status, headers)] * times

    def take_fault(self, method: str, path: str) -> tuple[Fault | None, dict[str, str]]:
        with self.lock:
            met = [f for f in self.faults if f[0] == method and re.search(f[1], path)]
            return self.faults.pop(self.faults.index(met[0]))[2:] if met else (None, {})

    def find_repo(self, token: str | None, repo_id: str, write: bool = False) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (token is None and (write or repo.private)):
            message = "Repository not found" if token else "Invalid username or password."
            raise Refusal(404 if token else 401, message, "RepoNotFound")
        if write and token != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def create_repo(self, token: str | None, name: str, type: str = "model", **given: Any) -> Any:
        owner = given.get("organization") or "me"
        if token != "write":
            raise Refusal(403 if token else 401, f"You may not create a {type} under {owner}")
        repo_id, path = key_of(f"{type}s", owner, name), f"{type}s/{owner}/{name}"
        url = f"{self.url}/{path.removeprefix('models/')}"
        with self.lock:
            if repo_id in self.repos:
                raise Refusal(409, f"You already created this {type} repo: {repo_id}", url=url)
            repo = Repo(repo_id, given.get("visibility") == "private" or bool(given.get("private")))
            repo.append("initial commit", {".gitattributes": b""}, set())
            self.repos[repo_id] = repo  # only now, so that nobody sees it without a commit
        return {"url": url, "name": f"{owner}/{name}"}
