"""What clients are told when something is refused or fails: OpenAI's form, and Ollama's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollm_core.errors import DoesNotFitError, InputError, OllmError
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.session import SessionClosedError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class RefusedRequestError(OllmError):
    """A request that is refused by the server, with a status of HTTP. `code` and `param` are those
    of OpenAI's errors.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def fields(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def ollama_fields(self) -> dict[str, Any]:
        """In Ollama's."""
        return {"error": self.message}


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def refusal(error: Exception) -> RefusedRequestError:
    """What a client is told of an error. Nothing of one that nobody raised on purpose: it may
    repeat what was asked.
    """
    if isinstance(error, RefusedRequestError):
        return error
    if isinstance(error, RefusedError):
        return RefusedRequestError(400, error.message, code=error.code, param=error.param)
    if isinstance(error, SessionClosedError):
        return stopping()
    if isinstance(error, DoesNotFitError):
        return RefusedRequestError(400, _told(error), code="does_not_fit")
    if isinstance(error, InputError):
        return RefusedRequestError(400, _told(error), code="invalid_request")
    if isinstance(error, OllmError):
        return RefusedRequestError(500, _told(error), code="model_failed")
    if isinstance(error, OSError):
        return RefusedRequestError(500, "the storage failed", code="model_failed")
    return RefusedRequestError(500, "the server failed", code="server_error")


def stopping() -> RefusedRequestError:
    """What a client is told whose answer will not come."""
    return RefusedRequestError(503, "the server is being stopped, or has failed", code="stopped")


def _told(error: OllmError) -> str:
    return " ".join(f"{error.message}. {error.hint}".strip(" .").split())
