"""Runs routes, each for one client: within its place, with refusals in its protocol's form, counted
and logged. No log line has anything that a client has sent but the path of its route.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ollm_core.server.client import Client
from ollm_core.server.errors import ClientGoneError, RefusedRequestError, refusal
from ollm_core.server.service import Service

logger = logging.getLogger("ollm.server")

Answer = Callable[[Client], Awaitable[None]]
_GONE = 499


class Endpoint:
    """A route of a service."""

    def __init__(
        self,
        service: Service,
        path: str,
        answer: Answer,
        *,
        ollama: bool = False,
        needs_place: bool = True,
    ) -> None:
        """`answer` tells its client all; what it raises is told if nothing was before. One that
        `needs_place` is told to come again later where there is none.
        """
        self._service, self._path, self._answer = service, path, answer
        self._ollama, self._needs_place = ollama, needs_place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), 200
        async with Client(scope, receive, send) as client:
            try:
                with ExitStack() as stack:
                    if self._needs_place:
                        place = stack.enter_context(self._service.places.taken())
                        client.hold, client.take_place = place.hold, stack.pop_all
                    await self._answer(client)
            except ClientGoneError:
                status = _GONE
            except Exception as error:  # noqa: BLE001 # the last resort of one request
                refused = refusal(error)
                status = refused.status
                if status == 500:
                    logger.error("%s: %s", self._path, type(error).__name__)
                await self._tell(client, refused)
        self._service.meter.requests[self._path, status] += 1
        logger.info("%s: %d after %.1f s", self._path, status, time.monotonic() - began)

    async def _tell(self, client: Client, refused: RefusedRequestError) -> None:
        if client.has_started:
            return  # it sees that the answer is not whole
        fields = refused.ollama_fields if self._ollama else refused.fields
        with suppress(ClientGoneError):
            await client.tell(refused.status, fields, refused.headers)


def routes_of(endpoints: Mapping[tuple[str, str], Endpoint]) -> list[Route]:
    """A route for each path of (method, path), which knows all of its methods: another one is
    refused with their names.
    """
    by_path: dict[str, dict[str, Endpoint]] = {}
    for (method, path), endpoint in endpoints.items():
        by_path.setdefault(path, {})[method] = endpoint
    return [Route(path, _ByMethod(found), methods=[*found]) for path, found in by_path.items()]


class _ByMethod:
    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._endpoints = dict(endpoints)
        if "GET" in endpoints:  # for which the same is done, and no body sent
            self._endpoints["HEAD"] = endpoints["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoints[scope["method"]](scope, receive, send)
