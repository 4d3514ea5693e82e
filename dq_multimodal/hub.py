"""The Hub: push a run as one commit, and open a repository as a run."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dq_multimodal import card, documents, folder
from dq_multimodal.card import FIGURE_TEXTS, FIGURES
from dq_multimodal.config import InputError
from dq_multimodal.data.local import last_part
from dq_multimodal.data.source import first_line
from dq_multimodal.files import expand_home
from dq_multimodal.run import Run
from dq_multimodal.stages import subset
from dq_multimodal.stages.selection import BINS_FILE, SELECTION_FILE

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

PUSHED = (folder.CARD, folder.CONFIG, folder.MANIFEST, SELECTION_FILE, BINS_FILE)
OUR_FILES = re.compile(
    rf"{subset.FOLDER}/part-\d{{5}}\.parquet|{FIGURES}/({'|'.join(map(re.escape, FIGURE_TEXTS))})"
)
"""Files of a run that another run may lack."""
EMPTY_REPOSITORY = {".gitattributes", folder.CARD, "LICENSE"}
"""What a repository may hold before its first push."""
MODEL_MARK = "dq-multimodal.json"
MODEL_FORMAT = "dq-multimodal model 1"
MODEL_PLACE = re.compile(r'"\w*name_or_path": "(/[^"]+)"')
"""The folder of a model in the files of another that was made from it."""
MAX_WAIT_SECONDS = 60
WAIT_SECONDS = 2
NO_WRITING = ("no_access", "read")
"""Roles in an organization that may not push."""
ROW_NAMES = ("label_column", "image_column", "text_columns", "columns", "column", "template")
"""Settings that name what is in the rows, never a place."""
PLACES = (
    "dynamics",
    "target",
    "target_model",
    "embeddings",
    "embedding_model",
    "attribution_model",
    "mae_model",
    "image_folder",
    "model",
    "file",
)
PATH = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"]+/)+([^\s/'\"]*)")

Kind = Literal["dataset", "model"]


@dataclass(frozen=True)
class Remote:
    """What a repository holds before a push.

    Attributes:
        repo_id: OWNER/NAME.
        commit: Its head.
        files: Their paths.
        is_ours: Whether it holds what an earlier push made.
    """

    repo_id: str
    commit: str
    files: set[str]
    is_ours: bool


def check_push(repo_id: str, *, private: bool = False, kind: Kind = "dataset") -> str:
    """Raise unless a push to a repository may be tried: its name, the token, what is there.

    Returns:
        The repository with its owner.

    Raises:
        InputError: If the Hub is out of reach or refuses the token; if the repository holds
            other things than a push of ours, or is public and a private one was asked for.
    """
    with one_line(f"push to {repo_id}", "try the same again"):
        repo_id = _check_right(repo_id, kind)
        _find(repo_id, private, kind)
    return repo_id


def push(run: Run | str | Path, repo_id: str, *, private: bool = False) -> str:
    """Push a run: subset (config `default`), selection, config.yaml, manifest, card and figures.

    report.html and map.parquet stay where they are: they show rows that were not kept.

    All of it is one commit on the head that was looked at, so a reader never sees half a push,
    and two at once never mix: an error on the way leaves the repository as it was, and the next
    try uploads only what the Hub has not got. Files of an older subset that the new one does not
    have are deleted in the same commit; files of others stay, and so does what others wrote into
    the card. Folders of this machine are left out of what is pushed.

    Args:
        run: A run or its folder.
        repo_id: OWNER/NAME; made if it does not exist.
        private: Make a new repository private.

    Returns:
        The address of the commit.

    Raises:
        InputError: If the Hub is out of reach, refuses the token, or fails; if the repository
            holds other things, changes meanwhile, or is public and a private one was asked for.
    """
    run = Run(run.path if isinstance(run, Run) else run)
    run.check_whole()
    figures = [run.path / FIGURES / name for name in FIGURE_TEXTS]
    figures = [path for path in figures if path.is_file()]
    paths = [run.path / name for name in PUSHED] + subset.subset_files(run.path) + figures
    contents: dict[str, Path | bytes] = {p.relative_to(run.path).as_posix(): p for p in paths}
    config = public_config(run.config)
    config_text = folder.format_config(config)
    manifest = folder.record_config(_public_manifest(run), config_text)
    contents[folder.CONFIG] = config_text.encode()
    contents[folder.MANIFEST] = folder.format_manifest(manifest).encode()

    def fill(remote: Remote) -> set[str]:
        contents[folder.CARD] = _make_card(run, config, manifest, remote).encode()
        return {name for name in remote.files if OUR_FILES.fullmatch(name)} - set(contents)

    message = f"{manifest['kept']:,} of {manifest['rows']:,} rows by {run.request.method}"
    return _push(repo_id, "dataset", private, contents, fill, message)


def push_model(model_folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Push the files of a trained model or adapter, as one commit.

    A card that is in the repository stays. Folders of this machine are left out.

    Returns:
        The address of the commit.

    Raises:
        InputError: As `push` does.
    """
    contents: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted(model_folder.iterdir())
        if path.is_file() and path.name != "training_args.bin"  # holds local paths
    }
    texts = {
        name: (model_folder / name).read_text(encoding="utf-8")
        for name in contents
        if name.endswith((".json", ".md", ".jinja"))
    }
    places = {place for text in texts.values() for place in MODEL_PLACE.findall(text)}
    for name, text in texts.items():
        for place in sorted(places, key=len, reverse=True):
            text = text.replace(place, Path(place).name)
        contents[name] = text.encode()
    contents[MODEL_MARK] = json.dumps({"format": MODEL_FORMAT}).encode()

    def fill(remote: Remote) -> set[str]:
        if folder.CARD in remote.files:
            contents.pop(folder.CARD, None)
        return set()

    return _push(repo_id, "model", private, contents, fill, "Trained model")


def _push(
    repo_id: str,
    kind: Kind,
    private: bool,
    contents: dict[str, Path | bytes],
    fill: Callable[[Remote], set[str]],
    message: str,
) -> str:
    """Make one commit.

    Args:
        repo_id: Where to.
        kind: Of repository.
        private: Make a new one private.
        contents: The files.
        fill: Sets those that depend on what is there, and gives those to delete.
        message: Of the commit.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    advice = "the repository is as it was, or whole and new; try the same again"
    with one_line(f"push to {repo_id}", advice):
        api, repo_id = HfApi(), _check_right(repo_id, kind)
        remote = _find(repo_id, private, kind)
        if remote is None:
            api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
            remote = _find(repo_id, private, kind)
        if remote is None:
            raise InputError(f"{repo_id} is there, and this token may not look into it")
        stale = fill(remote)

        def commit() -> str:
            made = api.create_commit(
                repo_id,
                operations=[
                    *(CommitOperationAdd(name, content) for name, content in contents.items()),
                    *(CommitOperationDelete(name) for name in sorted(stale)),
                ],
                repo_type=kind,
                commit_message=message,
                parent_commit=remote.commit,
            )
            return str(made.commit_url)

        return _try_twice(commit)


def _try_twice(commit: Callable[[], str]) -> str:
    """Try once more where the Hub is busy or failed for a moment, when it says or soon."""
    from huggingface_hub.utils import HfHubHTTPError

    try:
        return commit()
    except HfHubHTTPError as error:
        status = error.response.status_code
        seconds = _seconds_to_wait(error)
        if status != 429 and status < 500:
            raise
        if seconds > MAX_WAIT_SECONDS:
            raise InputError(
                f"the Hub failed ({status}) and asks to wait {seconds:,.0f} s: nothing was "
                "pushed, try the same again then"
            ) from error
        print(  # noqa: T201
            f"the Hub failed ({status}): one more try in {seconds:.0f} s", file=sys.stderr
        )
    time.sleep(seconds)
    return commit()


def _seconds_to_wait(error: "HfHubHTTPError") -> float:
    """Read how long the Hub asks to wait: seconds, a date, or the limit of its rate."""
    from huggingface_hub.utils import parse_ratelimit_headers

    asked = error.response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return float(asked)
    if asked:
        try:
            return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
        except ValueError:
            return WAIT_SECONDS
    limit = parse_ratelimit_headers(error.response.headers)
    return limit.reset_in_seconds if limit is not None else WAIT_SECONDS


def _check_right(repo_id: str, kind: Kind) -> str:
    """Give a repository with its owner.

    Raises:
        InputError: If it is no name, or the token cannot write there.
    """
    from huggingface_hub import whoami
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"cannot push to {repo_id}: it is no Hub id OWNER/NAME") from error
    me = whoami(cache=True)
    if "/" not in repo_id:
        repo_id = f"{me['name']}/{repo_id}"
    owner = repo_id.split("/")[0]
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read" or not _may_write(token.get("fineGrained"), owner, repo_id):
        raise InputError(
            f"cannot push to {repo_id}: this token has no right to write there; make one with "
            "write access and log in with `hf auth login`"
        )
    if owner.lower() == me["name"].lower():
        return repo_id
    for group in me.get("orgs") or []:
        if group["name"].lower() == owner.lower():
            if group.get("roleInOrg") in NO_WRITING and not group.get("resourceGroups"):
                raise InputError(
                    f"cannot push to {repo_id}: {me['name']} has no right to write there, only "
                    f"the role {group['roleInOrg']} in {owner}"
                )
            return repo_id
    raise InputError(
        f"cannot push to {repo_id}: {owner} is neither {me['name']}, whose token this is, nor an "
        "organization of theirs"
    )


def _may_write(rights: dict[str, Any] | None, owner: str, repo_id: str) -> bool:
    """Say whether a fine-grained token, or one that is not (None), may write."""
    if not rights or "scoped" not in rights:
        return True
    names = {owner.lower(), repo_id.lower()}
    return any(
        str((scope.get("entity") or {}).get("name", "")).lower() in names
        and "repo.write" in (scope.get("permissions") or [])
        for scope in rights["scoped"]
    )


def _find(repo_id: str, private: bool, kind: Kind) -> Remote | None:
    """Look at a repository; None where there is none yet.

    Raises:
        InputError: If it is nothing to push to.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = HfApi().repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise InputError(f"{repo_id} is there already and public: nothing was pushed")
    files = {file.rfilename for file in getattr(info, "siblings", None) or []}
    is_ours = _is_ours(repo_id, kind, str(info.sha), files)
    if not is_ours and files - EMPTY_REPOSITORY:
        what = "run" if kind == "dataset" else "model"
        raise InputError(
            f"{repo_id} holds other things than a {what} of dq-multimodal "
            f"({min(files - EMPTY_REPOSITORY)}): nothing was pushed, name a new repository"
        )
    return Remote(repo_id, str(info.sha), files, is_ours)


def _is_ours(repo_id: str, kind: Kind, commit: str, files: set[str]) -> bool:
    """Say whether a repository has our mark; that of earlier releases is the version they name."""
    mark = folder.MANIFEST if kind == "dataset" else MODEL_MARK
    if mark not in files:
        return False
    path = _download(repo_id, mark, kind, commit)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    if not isinstance(found, dict):
        return False
    if kind == "model":
        return found.get("format") == MODEL_FORMAT
    versions = found.get("versions")
    is_older = isinstance(versions, dict) and "dq-multimodal" in versions
    return found.get("format") == documents.FORMAT or (
        "format" not in found and is_older and folder.CONFIG in files
    )


def _make_card(run: Run, config: dict[str, Any], manifest: dict[str, Any], remote: Remote) -> str:
    """Write the card to push: ours, with what was typed into the local one and the one there."""
    matter = card.make_matter(config, manifest)
    body = card.make_body(run.path, config, manifest, remote.repo_id)
    local = card.open_card(run.path, run.config, run.manifest)
    there = _open_card(remote).with_text_of(local)
    return there.with_section(matter, body, local.merge(matter))


def _open_card(remote: Remote) -> card.Card:
    """Read the card of a repository, with what tells an untouched one of an earlier release."""
    figures = [f"{FIGURES}/{name}" for name in FIGURE_TEXTS]
    beside = [folder.CONFIG, folder.MANIFEST, BINS_FILE, *figures]
    if folder.CARD not in remote.files:
        return card.Card()
    place = _download(remote.repo_id, folder.CARD, "dataset", remote.commit).parent
    found = card.open_card(place, {}, {})
    if found.has_section or not remote.is_ours:
        return found
    for name in remote.files.intersection(beside):
        _download(remote.repo_id, name, "dataset", remote.commit)
    config, manifest = folder.read_config(place) or {}, folder.read_manifest(place)
    return card.open_card(place, config, manifest, remote.repo_id)


def _download(repo_id: str, name: str, kind: Kind, commit: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, name, repo_type=kind, revision=commit))


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """Give config.yaml without the folders of this machine: a local path becomes its last part."""
    config = deepcopy(config)
    origins = {"dataset": config["source"], "target": (config.get("target") or {}).get("source")}
    for setting, origin in origins.items():
        if origin is None:
            continue
        origin.pop("image_folder", None)
        if origin["kind"] in ("file", "folder"):
            origin.pop("path", None)  # a run that comes from the Hub has none
            name = Path(origin["name"]).name or origin["name"]
            origin["name"] = config["request"][setting] = name
    return _strip(config)


def _strip(value: Any, key: str = "") -> Any:
    """Leave folders out of all settings that name a place."""
    if isinstance(value, dict):
        return {name: _strip(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_strip(entry, key) for entry in value]
    if not isinstance(value, str) or key in ROW_NAMES:
        return value
    return last_part(value) if key in PLACES or value.startswith(("/", "~")) else value


def _public_manifest(run: Run) -> dict[str, Any]:
    """Give the manifest without the folders of this machine that its notes name."""
    places = sorted({str(Path(place).parent) + "/" for place in _places(run.config)}, key=len)

    def shorten(text: str) -> str:
        for place in reversed(places):
            text = text.replace(place, "")
        return PATH.sub(r"\1", text)

    notes = [shorten(note) for note in run.manifest["notes"]]
    problems = {shorten(what): rows for what, rows in run.manifest["problems"].items()}
    return {**run.manifest, "notes": notes, "problems": problems}


def _places(value: Any) -> Iterator[str]:
    """Find all absolute paths in settings."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _places(part)
    elif isinstance(value, str) and value.startswith("/") and value.strip("/"):
        yield value


def open_run(name: str | Path, revision: str | None = None) -> Run:
    """Open a run folder, or a repository on the Hub that `push` made.

    A repository lacks the embeddings, so `resample` can draw from it what follows from its bins.

    Args:
        name: Folder, or OWNER/NAME.
        revision: Branch, tag or commit of the repository.

    Raises:
        InputError: If it is neither, or the Hub is out of reach.
    """
    from huggingface_hub import snapshot_download

    if expand_home(name).exists():
        return Run(name)
    with one_line(f"open {name}", "give a run folder, or check the name and the network"):
        path = snapshot_download(
            str(name),
            repo_type="dataset",
            revision=revision,
            allow_patterns=[*PUSHED, subset.FOLDER + "/*"],
        )
    if not (Path(path) / folder.CONFIG).is_file():
        raise InputError(f"{name} on the Hub was not pushed by dq-multimodal: no {folder.CONFIG}")
    return Run(path)


@contextmanager
def one_line(what: str, advice: str) -> Iterator[None]:
    """Turn what the Hub client raises into one line."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import HfHubHTTPError, httpx

    try:
        yield
    except InputError:
        raise
    except HFValidationError:
        raise InputError(f"cannot {what}: neither a folder here nor a Hub id OWNER/NAME") from None
    except LocalTokenNotFoundError as error:
        raise InputError(f"cannot {what}: no token here, log in with `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"cannot {what}: the Hub is out of reach; {advice}") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"cannot {what}: no such repository, or no right to it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (409, 412):
            raise InputError(
                f"cannot {what}: somebody wrote there at the same time ({status}), and nothing of "
                "this was written; try the same again"
            ) from error
        if status in (401, 403):
            raise InputError(
                f"cannot {what}: the Hub refused the token ({status}), which has no right to "
                "write there; make one with write access and log in with `hf auth login`"
            ) from error
        raise InputError(
            f"cannot {what}: the Hub failed ({first_line(error)}); {advice}"
        ) from error
    except (httpx.HTTPError, ConnectionError) as error:
        raise InputError(f"cannot {what}: the Hub is out of reach; {advice}") from error
    except RuntimeError as error:  # what an upload that failed for good raises
        raise InputError(f"cannot {what}: {first_line(error)}; {advice}") from error
    except ValueError as error:  # a front matter that the Hub does not take
        raise InputError(f"cannot {what}: {' '.join(str(error).split())}") from error
