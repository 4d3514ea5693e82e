"""The Hub: push a run as one commit, and open a repository as a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dq_multimodal import folder, subset
from dq_multimodal.card import REPO_ID
from dq_multimodal.config import InputError
from dq_multimodal.run import Run
from dq_multimodal.selection import BINS_FILE, SELECTION_FILE
from dq_multimodal.source import first_line

PUSHED = (folder.CARD, folder.CONFIG, folder.MANIFEST, SELECTION_FILE, BINS_FILE)


def push(run: Run | str | Path, repo_id: str, *, private: bool = False) -> str:
    """Push a run: subset (config `default`), selection, config.yaml, manifest and card.

    All of it is one commit, so a reader never sees half a push: an error on the way leaves the
    repository as it was, and the next try uploads only what the Hub has not got. Files of an
    older subset that the new one does not have are deleted in the same commit.

    Args:
        run: A run or its folder.
        repo_id: OWNER/NAME; made if it does not exist.
        private: Make a new repository private.

    Returns:
        The address of the commit.

    Raises:
        InputError: If the Hub is out of reach, refuses the token, or fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    run = run if isinstance(run, Run) else Run(run)
    files = [run.path / name for name in PUSHED]
    files += sorted((run.path / subset.FOLDER).glob("*.parquet"))
    names = {str(path.relative_to(run.path).as_posix()): path for path in files}
    request, kept = run.request, run.manifest["kept"]
    with _one_line(
        f"push to {repo_id}", "the repository is as it was, or whole and new; try the same again"
    ):
        api = HfApi()
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        there = api.list_repo_files(repo_id, repo_type="dataset")
        stale = [n for n in there if n.startswith(subset.FOLDER + "/") and n not in names]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            for name, path in names.items()
            if name != folder.CARD
        ]
        text = (run.path / folder.CARD).read_text(encoding="utf-8").replace(REPO_ID, repo_id)
        operations.append(CommitOperationAdd(folder.CARD, text.encode()))
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        commit = api.create_commit(
            repo_id,
            operations=operations,
            repo_type="dataset",
            commit_message=f"{kept:,} of {run.manifest['rows']:,} rows by {request.method}",
        )
    return str(commit.commit_url)


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
    with _one_line(f"open {name}", "give a run folder, or check the name and the network"):
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
def _one_line(what: str, advice: str) -> Iterator[None]:
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
