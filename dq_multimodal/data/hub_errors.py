"""What the client of the Hub raises, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from dq_multimodal.config import InputError
from dq_multimodal.files import first_line


class HubFailed(InputError):
    """The Hub failed or refused: what is in its cache may serve."""


class HubOutOfReach(HubFailed):
    """There is no way to the Hub."""


@contextmanager
def hub_errors(
    what: str,
    advice: str,
    *,
    missing: str = "no such repository, or no right to it",
    also: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn whatever the client of the Hub raises into one line.

    Args:
        what: What was tried, such as "push to me/x".
        advice: What to do where the Hub fails.
        missing: What to say where there is no such repository.
        also: Other errors that the client raises, such as for a failed upload or a bad answer.

    Raises:
        HubOutOfReach: If there is no way to the Hub.
        HubFailed: If it answers that it failed, or refuses.
        InputError: If the name is none, or nothing is there by that name.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import HfHubHTTPError, httpx

    def cannot(why: object) -> str:
        return f"cannot {what}: {why}"

    try:
        yield
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(cannot("neither a folder here nor a Hub id OWNER/NAME")) from error
    except LocalTokenNotFoundError as error:
        raise InputError(cannot("no token here, log in with `hf auth login`")) from error
    except LocalEntryNotFoundError as error:
        raise HubOutOfReach(cannot(f"the Hub is out of reach; {advice}")) from error
    except RepositoryNotFoundError as error:
        raise InputError(cannot(missing)) from error
    except RevisionNotFoundError as error:
        raise InputError(cannot("it has no such revision")) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        why = f"the Hub failed ({first_line(error)}); {advice}"
        if status in (409, 412):
            why = (
                f"somebody wrote there at the same time ({status}), and nothing of this was "
                "written; try the same again"
            )
        elif status in (401, 403):
            why = (
                f"the Hub refused the token ({status}), which has no right to that: log in with "
                "`hf auth login`"
            )
        raise HubFailed(cannot(why)) from error
    except (httpx.HTTPError, ConnectionError) as error:
        raise HubOutOfReach(cannot(f"the Hub is out of reach; {advice}")) from error
    except also as error:
        raise HubFailed(cannot(f"{first_line(error)}; {advice}")) from error
