"""Who may ask: by the name that this server is called by, by the page that asks, and by key."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from ollm_core.server.client import Client
from ollm_core.server.errors import RefusedRequestError

logger = logging.getLogger("ollm.server")

OPEN_PATHS = frozenset({"/", "/page.css", "/page.js", "/health"})
"""That need no key: they are the same for all, but for whether the server answers."""
_LOCAL = frozenset({"localhost", "ip6-localhost"})


class Guard:
    """Refuses before anything of a body is read:

    - a Host that is a name other than those told: a page of anybody may have a name of its own lead
      to this machine (DNS rebinding). An address is no name, and leads where it says.
    - an Origin other than the server's own and those told: browsers send with a request which page
      it comes from, and it need not be allowed to read an answer to have it computed.
    - a key other than the one told.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str],
        origins: Iterable[str],
        api_key: str | None,
    ) -> None:
        self._app = app
        self._hosts = _LOCAL.union(hosts)
        self._origins = frozenset(origins)
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers: dict[bytes, list[bytes]] = {}
            for name, value in scope["headers"]:
                headers.setdefault(name.lower(), []).append(value)
            try:
                self._check(scope, headers)
            except RefusedRequestError as refused:
                async with Client(scope, receive, send) as client:
                    await client.tell(refused.status, refused.fields, refused.headers)
                return
        elif scope["type"] != "lifespan":
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 # was told; its words may be a client's
            logger.error("%s", type(error).__name__)

    def _check(self, scope: Scope, headers: dict[bytes, list[bytes]]) -> None:
        host = _only(headers, b"host")
        if host is None or not self._is_host(host):
            raise RefusedRequestError(
                403,
                "the Host header names none of this server's hosts; see --allowed-hosts",
                code="host_not_allowed",
            )
        origin = _only(headers, b"origin")
        if origin is not None and not self._is_origin(origin, host):
            raise RefusedRequestError(
                403,
                "the Origin header names no allowed web site; see --allowed-origins",
                code="origin_not_allowed",
            )
        is_asked = scope["method"] == "OPTIONS" or scope["path"] in OPEN_PATHS
        if self._key is not None and not is_asked and not self._has_key(headers):
            raise RefusedRequestError(
                401,
                "need the API key of this server, as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_host(self, value: str) -> bool:
        name = _name_of(f"//{value}")
        return name is not None and (name in self._hosts or _is_address(name))

    def _is_origin(self, value: str, host: str) -> bool:
        origin = value.lower()
        if "*" in self._origins or origin in self._origins:
            return True
        return origin in (f"http://{host.lower()}", f"https://{host.lower()}")

    def _has_key(self, headers: dict[bytes, list[bytes]]) -> bool:
        assert self._key is not None
        scheme, _, given = (_only(headers, b"authorization") or "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._key)
        return right and scheme.lower() == "bearer"


def _only(headers: dict[bytes, list[bytes]], name: bytes) -> str | None:
    """The header's value, None where it is not there. Two of one are as none that is right."""
    values = headers.get(name, [])
    if len(values) > 1:
        return ""
    return values[0].decode("latin-1").strip() if values else None


def _name_of(url: str) -> str | None:
    """The host's name in lower case, without its port; None where it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return parts.hostname


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in _LOCAL


def cors_options(origins: Iterable[str]) -> dict[str, Any]:
    """What Starlette's CORSMiddleware is to do."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST", "DELETE"],
        "allow_headers": ["authorization", "content-type"],
        "expose_headers": ["retry-after", "ollm-answer-id"],
    }
