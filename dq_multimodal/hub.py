"""The Hub: push a run as one commit, and open a repository as a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from dq_multimodal import folder, subset
from dq_multimodal.card import FIGURE_TEXTS, FIGURES, REPO_ID
from dq_multimodal.config import InputError
from dq_multimodal.local_data import is_local
from dq_multimodal.run import Run
from dq_multimodal.selection import BINS_FILE, SELECTION_FILE
from dq_multimodal.source import first_line

PUSHED = (folder.CARD, folder.CONFIG, folder.MANIFEST, SELECTION_FILE, BINS_FILE)
EMPTY_REPOSITORY = {".gitattributes", folder.CARD, "LICENSE"}
"""What a repository may hold before its first push."""


def push(run: Run | str | Path, repo_id: str, *, private: bool = False) -> str:
    """Push a run: subset (config `default`), selection, config.yaml, manifest, card and figures.

    report.html and map.parquet stay where they are: they show rows that were not kept.

    All of it is one commit, so a reader never sees half a push: an error on the way leaves the
    repository as it was, and the next try uploads only what the Hub has not got. Files of an
    older subset that the new one does not have are deleted in the same commit. Folders of this
    machine are left out of what is pushed.

    Args:
        run: A run or its folder.
        repo_id: OWNER/NAME; made if it does not exist.
        private: Make a new repository private.

    Returns:
        The address of the commit.

    Raises:
        InputError: If the Hub is out of reach, refuses the token, or fails; if the repository
            holds other things, or is public and a private one was asked for.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    run = Run(run.path if isinstance(run, Run) else run)
    run.check_whole()
    figures = [run.path / FIGURES / name for name in FIGURE_TEXTS]
    figures = [path for path in figures if path.is_file()]
    paths = [run.path / name for name in PUSHED] + subset.subset_files(run.path) + figures
    contents: dict[str, Path | bytes] = {p.relative_to(run.path).as_posix(): p for p in paths}
    card = (run.path / folder.CARD).read_text(encoding="utf-8")
    config = _public_config(run)
    contents[folder.CONFIG] = config.encode()
    manifest = folder.record_config(run.manifest, config)
    contents[folder.MANIFEST] = folder.format_manifest(manifest).encode()
    advice = "the repository is as it was, or whole and new; try the same again"
    with one_line(f"push to {repo_id}", advice):
        api = HfApi()
        made = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        repo_id = made.repo_id  # with its owner
        contents[folder.CARD] = card.replace(REPO_ID, repo_id).encode()
        info = api.dataset_info(repo_id)
        there = {file.rfilename for file in info.siblings or []}
        if private and not info.private:
            raise InputError(f"{repo_id} is there already and public: nothing was pushed")
        if folder.CONFIG not in there and there - EMPTY_REPOSITORY:
            raise InputError(
                f"{repo_id} holds other things than a run of dq-multimodal: nothing was pushed, "
                "name a new repository"
            )
        ours = (subset.FOLDER + "/", FIGURES + "/")
        stale = {name for name in there if name.startswith(ours)} - set(contents)
        commit = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            repo_type="dataset",
            commit_message=f"{run.manifest['kept']:,} of {run.manifest['rows']:,} rows "
            f"by {run.request.method}",
        )
    return str(commit.commit_url)


def push_model(model_folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Push the files of a trained model or adapter, as one commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: If the Hub is out of reach, refuses the token, or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with one_line(f"push to {repo_id}", "try the same again"):
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise InputError(f"{repo_id} is there already and public: nothing was pushed")
        operations = [
            CommitOperationAdd(path.name, path)
            for path in sorted(model_folder.iterdir())
            if path.is_file() and path.name != "training_args.bin"  # holds local paths
        ]
        commit = api.create_commit(repo_id, operations=operations, commit_message="Trained model")
    return str(commit.commit_url)


def _public_config(run: Run) -> str:
    """Give config.yaml without the folders of this machine: a local path becomes its last part."""
    config = deepcopy(run.config)
    source, request, model = config["source"], config["request"], config["embedding"] or {}
    attribution = (config.get("patches") or {}).get("attribution_model") or {}
    scoring = config.get("scoring") or {}
    if source["kind"] in ("file", "folder"):
        source.pop("path", None)  # a run that comes from the Hub has none
        source["name"] = request["dataset"] = Path(source["name"]).name
    places = [
        (request, "embeddings"),
        (request, "embedding_model"),
        (request, "attribution_model"),
        (request, "mae_model"),
        (model, "file"),
        (model, "model"),
        (attribution, "model"),
        (scoring, "model"),
    ]
    for place, key in places:
        if place.get(key) and (is_local(place[key]) or place[key].count("/") > 1):
            place[key] = Path(place[key]).name
    return folder.format_config(config)


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

    if Path(name).exists():
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
