"""What a row or a body is refused with, and the checks that all of them share."""

from __future__ import annotations

from typing import Any

from ollm_core.errors import InputError
from ollm_core.files.untrusted_json import show


class RefusedError(InputError):
    """A row or a body that cannot be answered: `code` and `param` are those of OpenAI's errors."""

    def __init__(
        self, message: str, *, code: str = "invalid_request", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def unsupported(message: str, param: str) -> RefusedError:
    """For what would change an answer, and cannot be done."""
    return RefusedError(message, code="unsupported_parameter", param=param)


def check_text(name: str, text: str) -> None:
    """Raises RefusedError for what is no Unicode."""
    if not is_unicode(text):
        raise RefusedError(f"{name}: need Unicode text, have a lone surrogate", param=name)


def is_unicode(text: str) -> bool:
    """Whether it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether this is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def switch(name: str, value: Any) -> bool:
    """Raises RefusedError for what is neither true nor false."""
    if not isinstance(value, bool):
        raise RefusedError(f"{name}: need true or false, have {show(value)}", param=name)
    return value
