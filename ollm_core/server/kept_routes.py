"""Answers that are kept, fetched again: `/v1/responses/{id}` and `/v1/chat/completions/{id}`, in
OpenAI's form.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl

from starlette.routing import Route

from ollm_core.files.untrusted_json import show
from ollm_core.server.client import Client, as_json
from ollm_core.server.endpoint import Answer, Endpoint, routes_of
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.kept import KeptAnswer, follow, stop, tell_whole
from ollm_core.server.service import Service
from ollm_core.serving.openai.refused import RefusedError

CHAT, RESPONSE = "/v1/chat/completions/{id}", "/v1/responses/{id}"
CANCEL = f"{RESPONSE}/cancel"
_PREFIXES = {CHAT: "chatcmpl-", RESPONSE: "resp_", CANCEL: "resp_"}
_DELETED = {CHAT: "chat.completion.deleted", RESPONSE: "response"}
_IGNORED = {"include", "include[]", "include_obfuscation"}
_MAX_FIELDS = 16
_MAX_DIGITS = 9


class KeptRoutes:
    """Answers for them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Each address with what it answers."""
        answers: Mapping[tuple[str, str], Answer] = {
            ("GET", CHAT): self._fetch(CHAT),
            ("DELETE", CHAT): self._remove(CHAT),
            ("GET", RESPONSE): self._fetch(RESPONSE),
            ("DELETE", RESPONSE): self._remove(RESPONSE),
            ("POST", CANCEL): self._cancel,
        }
        return routes_of(
            {
                (method, path): Endpoint(self._service, path, answer, needs_place=False)
                for (method, path), answer in answers.items()
            }
        )

    def _get(self, client: Client, path: str) -> KeptAnswer:
        answer_id = client.params["id"]
        if not answer_id.startswith(_PREFIXES[path]):
            raise RefusedRequestError(404, "there is no such answer here", code="not_found")
        return self._service.kept.get(answer_id)

    def _fetch(self, path: str) -> Answer:
        async def fetch(client: Client) -> None:
            wanted = _query(client.query)
            answer = self._get(client, path)
            await client.drain()
            if wanted.pop("stream"):
                await follow(client, answer, wanted["starting_after"])
            elif answer.so_far is not None:
                await client.tell(200, answer.so_far())
            else:
                await tell_whole(client, answer)

        return fetch

    def _remove(self, path: str) -> Answer:
        async def remove(client: Client) -> None:
            answer = self._get(client, path)
            await self._service.kept.remove(answer.answer_id)
            told = {"id": answer.answer_id, "object": _DELETED[path], "deleted": True}
            await client.tell(200, told)

        return remove

    async def _cancel(self, client: Client) -> None:
        answer = self._get(client, CANCEL)
        if answer.so_far is not None:
            answer.whole = as_json({**answer.so_far(), "status": "cancelled"})
            await stop(answer)
        await client.drain()
        await tell_whole(client, answer)


def _query(query: bytes) -> dict[str, int]:
    """`stream` and `starting_after`. Raises RefusedError."""
    found = {"stream": 0, "starting_after": -1}
    try:
        pairs = parse_qsl(
            query.decode(), keep_blank_values=True, strict_parsing=bool(query),
            max_num_fields=_MAX_FIELDS,
        )  # fmt: skip
    except ValueError:
        raise RefusedError("the query is none") from None
    for name, value in pairs:
        if name == "stream" and value in ("true", "false"):
            found[name] = int(value == "true")
        elif name == "starting_after" and value.isdecimal() and value.isascii():
            found[name] = int(value[:_MAX_DIGITS])
        elif name in found:
            raise RefusedError(f"{name}: cannot be {show(value)}", param=name)
        elif name not in _IGNORED:
            raise RefusedError(f"{show(name)} in the query is not known", code="unknown_parameter")
    return found
