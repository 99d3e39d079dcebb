"""Options of `ollm serve` beside those of `load`. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ollm_core.errors import InputError
from ollm_core.option_fields import about, counted, directory, said, size
from ollm_core.values import Count, PathLike, Size

_VERBS = ("serve",)
MAX_PORT = 65_535


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError(f"{name} is {value!r}, expected text")
    return value.strip()


def _key(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isascii() or len(value) < 8 or " " in value:
        raise InputError(f"{name}: need at least 8 ASCII characters without spaces")
    return value


def _port(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_PORT:
        raise InputError(f"{name} is {value!r}, expected a whole number from 0 to {MAX_PORT}")
    return value


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server listens, and what it lets clients do. Checked when the object is made."""

    host: str = said(
        "127.0.0.1",
        "Address to listen on.",
        "One that other machines can reach needs an `api_key`.",
        verbs=_VERBS,
        metavar="ADDRESS",
        user_only=True,
        check=_text,
    )
    port: Count = said(
        8000,
        "Port to listen on; 0 takes a free one, which is told.",
        verbs=_VERBS,
        least=0,
        check=_port,
    )
    api_key: str | None = said(
        None,
        "Key that clients must send, as Authorization: Bearer KEY.",
        "On a command line other users of the machine may see it: better set the variable.",
        verbs=_VERBS,
        metavar="KEY",
        unset="$OLLM_API_KEY, else none is asked for",
        user_only=True,
        secret=True,
        check=_key,
    )
    allowed_hosts: str | None = said(
        None,
        "Names that clients may call this server by, separated by commas.",
        "localhost, addresses and `host` always are. Other names are refused: a web page could "
        "have them lead here.",
        verbs=_VERBS,
        metavar="NAMES",
        user_only=True,
        unset="no more",
        check=_text,
    )
    allowed_origins: str | None = said(
        None,
        "Web sites whose pages may use this server, separated by commas, as https://example.org.",
        "* allows all of them, and needs an `api_key`.",
        verbs=_VERBS,
        metavar="ORIGINS",
        user_only=True,
        unset="none",
        check=_text,
    )
    max_requests: Count = counted(
        64,
        1,
        "Most requests at once, running or waiting; more are told to come again later.",
        verbs=_VERBS,
    )
    max_body: Size | None = size(
        None,
        "Most bytes of a request.",
        verbs=_VERBS,
        unset="16MiB",
    )
    files_dir: PathLike | None = directory(
        None,
        "Directory for files and batches of clients.",
        "It is the server's own: nothing outside it is read or written for a client. Batches that "
        "are not done go on when a server is started with it again.",
        verbs=_VERBS,
        unset="there are none",
        user_only=True,
    )
    files_budget: Size | None = size(
        None,
        "Most bytes of all files that clients have sent.",
        verbs=_VERBS,
        unset="1GB",
    )
    keep_seconds: Count = counted(
        3600,
        1,
        "Seconds that an answer stays after its end, if a client asked to have it kept.",
        verbs=_VERBS,
    )
    keep_budget: Size | None = size(
        None,
        "Most bytes of all answers that are kept, in host memory.",
        verbs=_VERBS,
        unset="64MB",
    )
    max_connections: Count = counted(512, 1, "Most open connections.", verbs=_VERBS)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                object.__setattr__(self, each.name, about(each).check(each.name, value))
        if self.api_key is None and "*" in self.origins:
            raise InputError(
                "allowed_origins is '*': need an API key, have none",
                hint="set OLLM_API_KEY, or name the origins",
            )

    @property
    def max_body_bytes(self) -> int:
        """`max_body` with its default."""
        return (16 << 20) if self.max_body is None else int(self.max_body)

    @property
    def files_budget_bytes(self) -> int:
        """`files_budget` with its default."""
        return 10**9 if self.files_budget is None else int(self.files_budget)

    @property
    def keep_budget_bytes(self) -> int:
        """`keep_budget` with its default."""
        return 64 * 10**6 if self.keep_budget is None else int(self.keep_budget)

    @property
    def hosts(self) -> tuple[str, ...]:
        """`allowed_hosts`, in lower case."""
        return _listed(self.allowed_hosts)

    @property
    def origins(self) -> tuple[str, ...]:
        """`allowed_origins`, in lower case."""
        return _listed(self.allowed_origins)


def _listed(names: str | None) -> tuple[str, ...]:
    parts = (one.strip().lower().rstrip("/") for one in (names or "").split(","))
    return tuple(one for one in parts if one)
