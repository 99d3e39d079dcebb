"""The server's description of itself, at `/openapi.json`: OpenAPI 3.1. What bodies may have is told
from the declarations that check them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ollm_core.server import batches, kept_routes, ollama, response_bodies, systemone
from ollm_core.server.batch_routes import PURPOSES
from ollm_core.serving.openai.fields import SERVED
from ollm_core.serving.openai.schemas import (
    OBJECT,
    SWITCH,
    TEXT,
    Fields,
    Schema,
    any_of,
    body_schema,
    list_of,
    nullable,
    object_of,
    one_of,
    whole,
)

PATH = "/openapi.json"
_JSON, _EVENTS, _LINES = "application/json", "text/event-stream", "application/x-ndjson"
_COUNT = whole(0)
_REFUSED: Mapping[int, str] = {
    400: "Refused: why, and by which field",
    401: "The API key is missing or wrong",
    403: "The Host or Origin header is not allowed",
    404: "There is no such thing here",
    405: "Another method is needed",
    408: "The body did not come in time",
    409: "Not in the state that it is in",
    413: "Larger than this server takes",
    429: "Too many at once; Retry-After says when to come again",
    500: "The model failed",
    503: "The server is being stopped",
    507: "No room to keep it",
}
_ALWAYS = (400, 401, 403, 404, 405, 429, 500, 503)
_POSTED = (*_ALWAYS, 408, 409, 413, 507)
_ERROR = object_of(
    {
        "error": object_of(
            {
                "message": TEXT,
                "type": TEXT,
                "param": nullable(TEXT),
                "code": nullable(TEXT),
            },
            ["message", "type", "param", "code"],
        )
    },
    ["error"],
)
_OLLAMA_ERROR = object_of({"error": TEXT}, ["error"])


def _answer(names: Mapping[str, Schema]) -> Schema:
    """An object that has these, and may have more."""
    return object_of(names, [*names], more=True)


_USAGE = _answer({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_CHOICE = {"index": _COUNT, "finish_reason": nullable(TEXT), "logprobs": nullable(OBJECT)}
_CALL = _answer(
    {
        "id": TEXT,
        "type": one_of("function"),
        "function": object_of({"name": TEXT, "arguments": TEXT}, ["name", "arguments"]),
    }
)
_HEAD = {"id": TEXT, "created": _COUNT, "model": TEXT, "usage": _USAGE}
_MESSAGE = object_of(
    {
        "role": one_of("assistant"),
        "content": nullable(TEXT),
        "reasoning_content": TEXT,
        "tool_calls": list_of(_CALL, 1),
    },
    ["role", "content"],
    more=True,
)
_CHAT = _answer(
    {
        **_HEAD,
        "object": one_of("chat.completion"),
        "choices": list_of(_answer({**_CHOICE, "message": _MESSAGE}), 1),
    }
)
_COMPLETION = _answer(
    {
        **_HEAD,
        "object": one_of("text_completion"),
        "choices": list_of(_answer({**_CHOICE, "text": TEXT}), 1),
    }
)
_STATES = ("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
_RESPONSE = _answer(
    {
        "id": TEXT,
        "object": one_of("response"),
        "created_at": _COUNT,
        "status": one_of(*_STATES),
        "model": TEXT,
        "output": list_of(OBJECT),
        "error": nullable(OBJECT),
        "usage": nullable(OBJECT),
    }
)
_MODEL = _answer({"id": TEXT, "object": one_of("model"), "created": _COUNT, "owned_by": TEXT})
_DELETED = _answer({"id": TEXT, "object": TEXT, "deleted": one_of(True)})
_FILE = _answer({"id": TEXT, "object": one_of("file"), "bytes": _COUNT, "filename": TEXT})
_BATCH = _answer({"id": TEXT, "object": one_of("batch"), "status": TEXT, "endpoint": TEXT})
_UPLOAD = object_of(
    {"file": {"type": "string", "contentMediaType": "application/octet-stream"},
     "purpose": one_of(*PURPOSES)},
    ["file", "purpose"], more=True,
)  # fmt: skip
_NAMED_BODY = object_of({}, more=True)


_SHOWN = {_EVENTS: object_of({"data": TEXT, "event": TEXT}, ["data"], more=True)}
"""Parts of streams."""


def _listed(item: Schema) -> Schema:
    return _answer({"object": one_of("list"), "data": list_of(item)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one address."""

    about: str
    answer: Schema | None = None
    """None: no JSON."""
    fields: Fields | None = None
    body: Schema | None = None
    """Of a body that is not of fields."""
    types: Sequence[str] = ()
    """Of answers, beside JSON."""
    query: Mapping[str, Schema] | None = None
    body_type: str = _JSON


_FOLLOWED: Mapping[str, Schema] = {"stream": SWITCH, "starting_after": whole(0, 10**9 - 1)}
_ALL: Mapping[tuple[str, str], Operation] = {
    ("post", "/v1/chat/completions"): Operation(
        about="Answer a chat", answer=_CHAT, fields=SERVED["chat"], types=[_EVENTS]
    ),
    ("post", "/v1/completions"): Operation(
        about="Go on with texts", answer=_COMPLETION, fields=SERVED["completion"], types=[_EVENTS]
    ),
    ("post", "/v1/responses"): Operation(
        about="Answer a chat in turns",
        answer=_RESPONSE,
        fields=response_bodies.FIELDS,
        types=[_EVENTS],
    ),
    ("get", kept_routes.CHAT): Operation(
        about="An answer that was kept", answer=_CHAT, types=[_EVENTS], query=_FOLLOWED
    ),
    ("delete", kept_routes.CHAT): Operation(about="Forget an answer", answer=_DELETED),
    ("get", kept_routes.RESPONSE): Operation(
        about="A response that was kept", answer=_RESPONSE, types=[_EVENTS], query=_FOLLOWED
    ),
    ("delete", kept_routes.RESPONSE): Operation(about="Forget a response", answer=_DELETED),
    ("post", kept_routes.CANCEL): Operation(
        about="End a response of the background", answer=_RESPONSE
    ),
    ("post", "/v1/systemone"): Operation(
        about="Typed decisions as probabilities",
        answer=_answer({"model": TEXT, "answers": OBJECT, "usage": OBJECT}),
        fields=systemone.FIELDS,
    ),
    ("get", "/v1/models"): Operation(about="The model", answer=_listed(_MODEL)),
    ("get", "/v1/models/{name}"): Operation(about="The model, by its name", answer=_MODEL),
    ("post", "/api/chat"): Operation(
        about="Answer a chat, as Ollama",
        answer=OBJECT,
        fields=ollama.FIELDS["chat"],
        types=[_LINES],
    ),
    ("post", "/api/generate"): Operation(
        about="Answer a prompt, as Ollama",
        answer=OBJECT,
        fields=ollama.FIELDS["completion"],
        types=[_LINES],
    ),
    ("get", "/api/version"): Operation(about="Ollama's version", answer=_answer({"version": TEXT})),
    ("get", "/api/tags"): Operation(
        about="The model, as Ollama", answer=_answer({"models": list_of(OBJECT)})
    ),
    ("get", "/api/ps"): Operation(
        about="What runs, as Ollama", answer=_answer({"models": list_of(OBJECT)})
    ),
    ("post", "/api/show"): Operation(
        about="More of the model, as Ollama",
        answer=_answer({"details": OBJECT, "model_info": OBJECT, "capabilities": list_of(TEXT)}),
        body=_NAMED_BODY,
    ),
    ("get", "/health"): Operation(
        about="Whether it answers", answer=_answer({"status": one_of("ok", "failed")})
    ),
    ("get", "/metrics"): Operation(
        about="Prometheus' text format", answer=None, types=["text/plain"]
    ),
    ("get", PATH): Operation(about="This", answer=_answer({"openapi": TEXT, "paths": OBJECT})),
}
_WITH_FILES: Mapping[tuple[str, str], Operation] = {
    ("post", "/v1/files"): Operation(
        about="Send a file", answer=_FILE, body=_UPLOAD, body_type="multipart/form-data"
    ),
    ("get", "/v1/files"): Operation(about="All files", answer=_listed(_FILE)),
    ("get", "/v1/files/{id}"): Operation(about="A file", answer=_FILE),
    ("delete", "/v1/files/{id}"): Operation(about="Remove a file", answer=_DELETED),
    ("get", "/v1/files/{id}/content"): Operation(
        about="What is in a file", answer=None, types=["application/octet-stream"]
    ),
    ("post", "/v1/batches"): Operation(
        about="Answer the rows of a file", answer=_BATCH, fields=batches.FIELDS
    ),
    ("get", "/v1/batches"): Operation(about="All batches", answer=_listed(_BATCH)),
    ("get", "/v1/batches/{id}"): Operation(about="A batch", answer=_BATCH),
    ("post", "/v1/batches/{id}/cancel"): Operation(about="End a batch", answer=_BATCH),
}


def describe(name: str, *, with_key: bool, with_files: bool) -> dict[str, Any]:
    """The description of a server of the model `name`."""
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), one in ({**_ALL, **(_WITH_FILES if with_files else {})}).items():
        paths.setdefault(path, {})[method] = _operation(method, path, one, with_key=with_key)
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"oLLM-core, {name}", "version": version("ollm-core")},
        "paths": paths,
        **({"components": {"securitySchemes": schemes}} if with_key else {}),
    }


def _operation(method: str, path: str, one: Operation, *, with_key: bool) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": f"{method} {path}",
        "summary": one.about,
        "responses": _answers(method, path, one),
    }
    if with_key and path != "/health":
        made["security"] = [{"key": []}]
    parameters = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {**TEXT, "minLength": 1}}
        for part in path.split("/")
        if part.startswith("{")
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in (one.query or {}).items()
    ]
    if parameters:
        made["parameters"] = parameters
    body = one.body if one.fields is None else body_schema(one.fields)
    if body is not None:
        made["requestBody"] = {"required": True, "content": {one.body_type: {"schema": body}}}
    return made


def _answers(method: str, path: str, one: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": _SHOWN.get(kind, TEXT)} for kind in one.types}
    if one.answer is not None:
        content[_JSON] = {"schema": one.answer}
    found: dict[str, Any] = {"200": {"description": "Answered", "content": content}}
    error = any_of(_ERROR, _OLLAMA_ERROR) if path.startswith("/api/") else _ERROR
    for status in _POSTED if method == "post" else _ALWAYS:
        schema = one.answer if path == "/health" and status == 503 else error
        found[str(status)] = {
            "description": _REFUSED[status],
            "content": {_JSON: {"schema": schema}},
        }
    return found


def openapi_route(name: str, *, with_key: bool, with_files: bool) -> Route:
    """The address that tells it."""
    told = json.dumps(describe(name, with_key=with_key, with_files=with_files)).encode()

    async def page(_: Request) -> Response:
        return Response(told, media_type=_JSON)

    return Route(PATH, page)
