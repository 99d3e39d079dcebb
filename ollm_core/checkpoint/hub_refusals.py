"""One clear line for anything that the hub's client raises, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from ollm_core.errors import DoesNotFitError, OllmError

_AGAIN = "pulling again keeps the files that are whole"


def refusal(repository: str, error: BaseException) -> OllmError:
    """The error that people see for one of the client, about `owner/name`."""
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{repository}"
    causes = list(_causes(error))

    def among(*kinds: type[BaseException]) -> BaseException | None:
        return next((one for one in causes if isinstance(one, kinds)), None)

    for one in causes:
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return DoesNotFitError("the disk is full", hint=f"make room; {_AGAIN}")
    if among(errors.OfflineModeIsEnabled):
        return OllmError(
            f"{repository} is not here, and HF_HUB_OFFLINE forbids to ask the hub",
            hint="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE",
        )
    if among(errors.GatedRepoError):
        return _gated(repository, page, logged_in=bool(get_token()))
    if among(errors.RepositoryNotFoundError):
        if get_token():
            return OllmError(
                f"the hub has no {repository} that your token may read",
                hint="check the spelling, or `hf auth login` with an account that may",
            )
        return OllmError(
            f"the hub has no {repository} that everybody may read",
            hint="check the spelling; for one that is private or gated, `hf auth login`",
        )
    if among(errors.HFValidationError):
        return OllmError(f"{repository!a} is no hub repository", hint="write it as owner/name")
    status = next((code for one in causes if (code := _status(one))), None)
    if status == 429:
        return OllmError(
            f"the hub refuses {repository} for now: too many requests",
            hint=f"wait some minutes; `hf auth login` raises the limit; {_AGAIN}",
        )
    if status in (401, 403):
        return OllmError(
            f"the hub refuses {repository} ({status})",
            hint=f"`hf auth login` with an account that may read {page}",
        )
    if status is not None:
        return OllmError(f"the hub answered {status} for {repository}", hint=f"later, {_AGAIN}")
    deepest = next((one for one in reversed(causes) if str(one).strip()), error)
    cause = (str(deepest).strip().splitlines() or [type(deepest).__name__])[0]
    return OllmError(
        f"cannot fetch {repository} from {constants.ENDPOINT}: {cause}",
        hint=f"check the connection; {_AGAIN}",
    )


def _gated(repository: str, page: str, *, logged_in: bool) -> OllmError:
    if logged_in:
        return OllmError(
            f"your token may not read {repository}, which is gated",
            hint=f"ask for access at {page}; some authors answer after hours or days",
        )
    return OllmError(
        f"{repository} is gated: you must accept its licence first",
        hint=f"accept it at {page}, then `hf auth login` (or set HF_TOKEN), and pull again",
    )


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
