"""The ASGI application: which address is answered by what, behind the guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ollm_core.server.client import Client
from ollm_core.server.endpoint import Answer, Endpoint
from ollm_core.server.errors import RefusedRequestError, refusal
from ollm_core.server.guard import Guard, cors_options
from ollm_core.server.kept_routes import KeptRoutes
from ollm_core.server.metrics import CONTENT_TYPE, metrics_page
from ollm_core.server.ollama import Generating, Told
from ollm_core.server.openai import Completions
from ollm_core.server.openapi import openapi_route
from ollm_core.server.page import page_routes
from ollm_core.server.responses import Responding
from ollm_core.server.service import Service
from ollm_core.server.systemone import Deciding

_OLLAMA = "/api/"
_MAX_SHOWN = 64 << 10  # bytes of a body of /api/show


def open_app(service: Service, more: Sequence[Route] = ()) -> ASGIApp:
    """The application, with `more` routes. The service stays the caller's."""
    options = service.options
    answers: dict[str, Answer] = {
        "/v1/chat/completions": Completions(service, "chat"),
        "/v1/completions": Completions(service, "completion"),
        "/v1/responses": Responding(service),
        "/v1/systemone": Deciding(service),
        "/api/chat": Generating(service, "chat"),
        "/api/generate": Generating(service, "completion"),
    }
    asked = [
        Route(path, _posted(service, path, answer), methods=["POST"])
        for path, answer in answers.items()
    ]
    middleware = []
    if options.origins:
        middleware.append(Middleware(CORSMiddleware, **cors_options(options.origins)))
    app = Starlette(
        routes=[
            *asked,
            *KeptRoutes(service).routes(),
            *_told(service),
            *page_routes(service),
            openapi_route(
                service.name, with_key=options.api_key is not None, with_files=bool(more)
            ),
            *more,
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _refused, Exception: _failed},
    )
    return Guard(
        app,
        hosts=[*options.hosts, options.host.lower()],
        origins=options.origins,
        api_key=options.api_key,
    )


def _posted(service: Service, path: str, answer: Answer) -> Endpoint:
    return Endpoint(service, path, answer, ollama=path.startswith(_OLLAMA))


def _told(service: Service) -> list[Route]:
    """Addresses that tell of the server and ask nothing of the model."""
    ollama = Told(service)
    pages: dict[str, Callable[[], dict[str, Any]]] = {
        "/v1/models": lambda: {"object": "list", "data": [_model(service)]},
        "/api/version": ollama.version,
        "/api/tags": ollama.tags,
        "/api/ps": ollama.running,
    }

    def page(make: Callable[[], dict[str, Any]]) -> Callable[[Request], Any]:
        async def told(_: Request) -> Response:
            return JSONResponse(make())

        return told

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.name:
            raise HTTPException(404, "there is no such model here")
        return JSONResponse(_model(service))

    async def health(_: Request) -> Response:
        is_open = service.session.is_open
        return JSONResponse({"status": "ok" if is_open else "failed"}, 200 if is_open else 503)

    async def metrics(_: Request) -> Response:
        text = metrics_page(
            service.meter,
            service.model.stats,
            places=(service.places.num_taken, service.places.number),
            texts=(service.session.num_waiting, service.session.num_running),
            kept=(service.kept.number, service.kept.num_bytes),
            disk_bytes_per_second=service.forecasts.disk_bytes_per_second,
        )
        return Response(text, media_type=CONTENT_TYPE)

    return [
        *(Route(path, page(make)) for path, make in pages.items()),
        Route("/v1/models/{name:path}", model),
        Route("/api/show", _Shown(ollama), methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
    ]


class _Shown:
    """`/api/show`, which is posted a name."""

    def __init__(self, ollama: Told) -> None:
        self._ollama = ollama

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with Client(scope, receive, send) as client:
            try:
                await client.read_object(_MAX_SHOWN)
            except RefusedRequestError as refused:
                await client.tell(refused.status, refused.ollama_fields)
            else:
                await client.tell(200, self._ollama.show())


def _model(service: Service) -> dict[str, Any]:
    """In OpenAI's form, with vLLM's field for its positions."""
    return {
        "id": service.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "ollm",
        "max_model_len": service.served.max_positions,
    }


async def _refused(request: Request, error: Exception) -> Response:
    """There is no such address, or another method is asked of it."""
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this address", 405: "need another method"}
    message = words.get(error.status_code, error.detail)
    headers = dict(error.headers or {})
    return _response(request, RefusedRequestError(error.status_code, message, headers=headers))


async def _failed(request: Request, error: Exception) -> Response:
    return _response(request, refusal(error))


def _response(request: Request, refused: RefusedRequestError) -> Response:
    is_ollama = request.url.path.startswith(_OLLAMA)
    fields = refused.ollama_fields if is_ollama else refused.fields
    return JSONResponse(fields, refused.status, refused.headers)
