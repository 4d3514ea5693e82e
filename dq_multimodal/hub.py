"""The Hub: push a run as one commit, and open a repository as a run."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dq_multimodal import card
from dq_multimodal.card import CARD, FIGURE_TEXTS, FIGURES
from dq_multimodal.config import InputError
from dq_multimodal.data.hub_errors import hub_errors
from dq_multimodal.data.local import last_part
from dq_multimodal.manifest import (
    CONDENSED,
    CONDENSED_FILES,
    CONFIG,
    FORMAT,
    MANIFEST,
    Config,
    ConfigFile,
    Manifest,
    has_mark,
    make,
)
from dq_multimodal.stages import subset
from dq_multimodal.stages.selection import BINS_FILE, SELECTION_FILE

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

PUSHED = (CARD, CONFIG, MANIFEST, SELECTION_FILE, BINS_FILE)
OUR_FILES = re.compile(
    rf"{subset.FOLDER}/part-\d{{5}}\.parquet|{FIGURES}/({'|'.join(map(re.escape, FIGURE_TEXTS))})"
)
"""Files of a run that another run may lack."""
EMPTY_REPOSITORY = {".gitattributes", CARD, "LICENSE"}
"""What a repository may hold before its first push."""
MODEL_MARK = "dq-multimodal.json"
MODEL_FORMAT = "dq-multimodal model 1"
MODEL_PLACE = re.compile(r'"\w*name_or_path": "(/[^"]+)"')
"""The folder of a model in the files of another that was made from it."""
CLIENT_ERRORS = (RuntimeError, ValueError)
"""Of a failed transfer, and of an answer that is not the Hub's, such as a login page."""
MAX_WAIT_SECONDS = 60
WAIT_SECONDS = 2
NO_WRITING = ("no_access", "read")
"""Roles in an organization that may not push."""
ROW_NAMES = ("label_column", "image_column", "text_columns", "columns", "column", "template")
"""Settings that name what is in the rows, never a place."""
PLACES = (
    *("dynamics", "target", "target_model", "ready_embeddings", "embedding_model"),
    *("attribution_model", "mae_model", "image_folder", "model", "file", "init", "experts"),
)
PATH = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"]+/)+([^\s/'\"]*)")

C = TypeVar("C", bound=ConfigFile)


@dataclass(frozen=True)
class Kind:
    """What of ours a repository may hold, and which file says so by its format."""

    name: str
    repo_type: Literal["dataset", "model"]
    mark: str
    format: str


RUN = Kind("run", "dataset", MANIFEST, FORMAT)
CONDENSED_SET = Kind("condensed set", "dataset", MANIFEST, CONDENSED)
MODEL = Kind("model", "model", MODEL_MARK, MODEL_FORMAT)


@dataclass(frozen=True)
class Remote:
    """What a repository holds before a push."""

    repo_id: str  # OWNER/NAME
    kind: Kind
    commit: str  # its head
    files: set[str]


def check_push(repo_id: str, *, private: bool = False, kind: Kind = RUN) -> str:
    """Raise unless a push may be tried, as `push` does; give the repository with its owner."""
    with hub_errors(f"push to {repo_id}", "try the same again", also=CLIENT_ERRORS):
        repo_id = _check_right(repo_id)
        _find(repo_id, private, kind)
    return repo_id


def push(
    folder: Path, config: Config, manifest: Manifest, repo_id: str, *, private: bool = False
) -> str:
    """Push a run: subset (config `default`), selection, config.yaml, manifest, card and figures.

    report.html and map.parquet stay where they are: they show rows that were not kept.

    All of it is one commit on the head that was looked at, so a reader never sees half a push,
    and two at once never mix: an error on the way leaves the repository as it was, and the next
    try uploads only what the Hub has not got. Files of an older subset that the new one does not
    have are deleted in the same commit; files of others stay, and so does what others wrote into
    the card. Folders of this machine are left out of what is pushed.

    Args:
        folder: The run folder, with its config and manifest.
        repo_id: OWNER/NAME; made if it does not exist, private if it is to be.

    Returns:
        The address of the commit.

    Raises:
        InputError: If the Hub is out of reach, refuses the token, or fails; if the repository
            holds other things, changes meanwhile, or is public and a private one was asked for.
    """
    shorten, config = shortener(config), public_config(config)
    figures = [folder / FIGURES / name for name in FIGURE_TEXTS]
    paths = [*(folder / name for name in PUSHED), *subset.subset_files(folder)]
    paths += [path for path in figures if path.is_file()]
    contents: dict[str, Path | bytes] = {p.relative_to(folder).as_posix(): p for p in paths}
    contents[CONFIG] = config.format().encode()
    manifest = manifest.make_public(shorten, config.format(), contents)
    contents[MANIFEST] = manifest.format().encode()

    matter = card.make_matter(folder, config, manifest)
    make_body = partial(card.make_body, folder, config, manifest)
    message = f"{manifest.kept:,} of {manifest.rows:,} rows by {config.request.method}"
    text = CardText(folder, matter, make_body)
    return push_contents(RUN, contents, text, OUR_FILES, repo_id, message, private=private)


@dataclass(frozen=True)
class CardText:
    """What we write into a card: the front matter, and the section for a repository."""

    folder: Path  # where the local card is
    matter: card.Matter
    make_body: Callable[[str], str]


def push_contents(
    kind: Kind,
    contents: dict[str, Path | bytes],
    text: CardText,
    ours: re.Pattern[str],
    repo_id: str,
    message: str,
    *,
    private: bool = False,
) -> str:
    """Push files and a card as `push` does; files of ours that the new ones lack are deleted."""

    def fill(remote: Remote) -> set[str]:
        local, there = card.open_card(text.folder), card.Card()
        if CARD in remote.files:  # ours, with what was typed into the local one and the one there
            there = card.open_card(_download(remote, CARD).parent)
        merged, body = local.merge(text.matter), text.make_body(remote.repo_id)
        written = there.with_text_of(local).with_section(text.matter, body, merged)
        contents[CARD] = written.encode()
        return {name for name in remote.files if ours.fullmatch(name)} - set(contents)

    return _push(repo_id, kind, private, contents, fill, message)


def shortener(config: ConfigFile) -> Callable[[str], str]:
    """Give what leaves the folders of this machine out of a text."""
    places = sorted({str(Path(place).parent) + "/" for place in _places(config.as_dict())}, key=len)

    def shorten(text: str) -> str:
        for place in reversed(places):
            text = text.replace(place, "")
        return PATH.sub(r"\1", text)

    return shorten


def push_model(model_folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Push the files of a trained model or adapter as `push` does, and give the same.

    A card that is in the repository stays. Folders of this machine are left out.
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
        if CARD in remote.files:
            contents.pop(CARD, None)
        return set()

    return _push(repo_id, MODEL, private, contents, fill, "Trained model")


def _push(
    repo_id: str,
    kind: Kind,
    private: bool,
    contents: dict[str, Path | bytes],
    fill: Callable[[Remote], set[str]],
    message: str,
) -> str:
    """Make one commit.

    Before it, `fill` sets those contents that depend on what is there, and gives the files to
    delete.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    advice = "the repository is as it was, or whole and new; try the same again"
    with hub_errors(f"push to {repo_id}", advice, also=CLIENT_ERRORS):
        api, repo_id = HfApi(), _check_right(repo_id)
        remote = _find(repo_id, private, kind)
        if remote is None:
            api.create_repo(repo_id, repo_type=kind.repo_type, private=private, exist_ok=True)
            remote = _find(repo_id, private, kind)
        if remote is None:
            raise InputError(f"{repo_id} is there, and this token may not look into it")
        stale = fill(remote)

        def commit() -> str:
            adds = [CommitOperationAdd(name, content) for name, content in contents.items()]
            try:
                made = api.create_commit(
                    repo_id,
                    [*adds, *map(CommitOperationDelete, sorted(stale))],
                    repo_type=kind.repo_type,
                    commit_message=message,
                    parent_commit=remote.commit,
                )
            except (ValueError, RuntimeError) as error:  # a bad front matter, or a failed upload
                why = " ".join(str(error).split())
                raise InputError(f"cannot push to {repo_id}: {why}") from error
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


def _check_right(repo_id: str) -> str:
    """Give a repository with its owner, if it is a name and the token can write there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"cannot push to {repo_id}: it is no Hub id OWNER/NAME") from error
    me = HfApi().whoami()
    if "/" not in repo_id:
        repo_id = f"{me['name']}/{repo_id}"
    owner = repo_id.split("/")[0]
    token = (me.get("auth") or {}).get("accessToken") or {}
    refused = f"cannot push to {repo_id}: "
    if token.get("role") == "read" or not _may_write(token.get("fineGrained"), owner, repo_id):
        raise InputError(
            refused + "this token has no right to write there; make one with write access and log "
            "in with `hf auth login`"
        )
    if owner.lower() == me["name"].lower():
        return repo_id
    groups = [g for g in me.get("orgs") or [] if g["name"].lower() == owner.lower()]
    if not groups:
        raise InputError(
            f"{refused}{owner} is neither {me['name']}, whose token this is, nor an organization "
            "of theirs"
        )
    if groups[0].get("roleInOrg") in NO_WRITING and not groups[0].get("resourceGroups"):
        raise InputError(
            f"{refused}{me['name']} has no right to write there, only the role "
            f"{groups[0]['roleInOrg']} in {owner}"
        )
    return repo_id


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
    """Look at a repository, if it may be pushed to; None where there is none yet."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = HfApi().repo_info(repo_id, repo_type=kind.repo_type)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise InputError(f"{repo_id} is there already and public: nothing was pushed")
    files = {file.rfilename for file in getattr(info, "siblings", None) or []}
    remote = Remote(repo_id, kind, str(info.sha), files)
    strange = files - EMPTY_REPOSITORY
    if strange and not _is_ours(remote):
        raise InputError(
            f"{repo_id} holds other things than a {kind.name} of dq-multimodal ({min(strange)}): "
            "nothing was pushed, name a new repository"
        )
    return remote


def _is_ours(remote: Remote) -> bool:
    """Say whether a repository has our mark."""
    mark = remote.kind.mark
    return mark in remote.files and has_mark(_download(remote, mark), remote.kind.format)


def _download(remote: Remote, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo_type = remote.kind.repo_type
    return Path(hf_hub_download(remote.repo_id, name, repo_type=repo_type, revision=remote.commit))


def public_config(config: C) -> C:
    """Give config.yaml without the folders of this machine: a local path becomes its last part."""
    found = _strip(config.as_dict())
    origins = {"dataset": found["source"], "target": (found.get("target") or {}).get("source")}
    for setting, origin in origins.items():
        if origin is None:
            continue
        origin.pop("image_folder", None)
        if origin["kind"] in ("file", "folder"):
            origin.pop("path", None)  # a run that comes from the Hub has none
            name = Path(origin["name"]).name or origin["name"]
            origin["name"] = found["request"][setting] = name
    return make(type(config), found)


def _strip(value: Any, key: str = "") -> Any:
    """Leave folders out of all settings that name a place."""
    if isinstance(value, dict):
        return {name: _strip(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_strip(entry, key) for entry in value]
    if not isinstance(value, str) or key in ROW_NAMES:
        return value
    if key not in PLACES and not value.startswith(("/", "~")):
        return value
    return (
        ",".join(map(last_part, value.split(","))) if key == "embedding_model" else last_part(value)
    )


def _places(value: Any) -> Iterator[str]:
    """Find all absolute paths in settings."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _places(part)
    elif isinstance(value, str):
        yield from (p for p in (value, *value.split(",")) if p.startswith("/") and p.strip("/"))


def download(name: str, revision: str | None = None) -> Path:
    """Download a run that `push` made, and give its folder."""
    from huggingface_hub import snapshot_download

    advice = "give a run folder, or check the name and the network"
    with hub_errors(f"open {name}", advice, also=CLIENT_ERRORS):
        path = snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[*PUSHED, subset.FOLDER + "/*", CONDENSED_FILES],
        )
    if not (Path(path) / CONFIG).is_file():
        raise InputError(f"{name} on the Hub was not pushed by dq-multimodal: no {CONFIG}")
    return Path(path)
