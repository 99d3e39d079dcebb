"""The page at `/`, for people: its three files, and what it asks beside OpenAI's addresses.

It needs nothing from elsewhere, and its headers forbid that. A document that is dropped on it is
read as text here, within limits, and is kept by nobody but the page.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ollm_core.documents.reading import read_opened
from ollm_core.errors import InputError
from ollm_core.server.answering import Stream, reading_body, tell
from ollm_core.server.client import READ_SECONDS, Client
from ollm_core.server.endpoint import Endpoint
from ollm_core.server.history import SECONDS
from ollm_core.server.openai import Completions, failed
from ollm_core.server.service import Service
from ollm_core.serving.asking.questions import check_length, question_prompts
from ollm_core.serving.openai.limits import MAX_TEXTS
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.requests import Asked
from ollm_core.serving.openai.served import Body
from ollm_core.serving.request import SamplingParams
from ollm_core.text.chat import encode_text
from ollm_core.text.prompts import PromptEncoder

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_MAX_NAME_CHARS = 100


def page_routes(service: Service) -> list[Route]:
    """The page's addresses."""
    directory = Path(__file__).with_name("page_files")

    def file(name: str, kind: str) -> Route:
        content = (directory / name).read_bytes()

        async def told(_: Request) -> Response:
            return Response(content, headers=HEADERS, media_type=kind)

        path = next(path for path, (other, _) in FILES.items() if other == name)
        return Route(path, told)

    reading = asyncio.Lock()

    async def state(_: Request) -> Response:
        async with reading:
            cached = await asyncio.to_thread(service.cached.read)
        return JSONResponse({**_state(service), "cached": cached})

    return [
        *(file(name, kind) for name, kind in FILES.values()),
        Route("/page/state", state),
        Route(
            "/page/document/{name}",
            Endpoint(service, "/page/document", _Document(service)),
            methods=["POST"],
        ),
        Route("/page/ask", Endpoint(service, "/page/ask", _Questions(service)), methods=["POST"]),
    ]


def _state(service: Service) -> dict[str, Any]:
    """What the page shows beside answers."""
    accounts = service.model.accounts
    current = service.watch.current
    service.history.note()
    return {
        "model": service.name,
        "positions": service.served.max_positions,
        "requests": {"taken": service.places.num_taken, "most": service.places.number},
        "memory": {
            "device": {"used": accounts.device.used, "limit": accounts.device.limit},
            "host": {"used": accounts.host.used, "limit": accounts.host.limit},
        },
        "history": {"seconds": SECONDS, "samples": service.history.read()},
        "pass": None if current is None else round(current.share, 3),
    }


class _Document:
    """A file as text, with the number of its tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, client: Client) -> None:
        """Raises InputError for what has no text, and what reading a body does."""
        parts: list[bytes] = []

        def keep(part: bytes) -> None:
            client.hold(len(part))
            parts.append(part)

        await client.read_parts(self._service.options.max_body_bytes, READ_SECONDS, keep)
        shown = "".join(filter(str.isprintable, client.params["name"]))[-_MAX_NAME_CHARS:]

        def read() -> tuple[str, list[str]]:
            remarks: list[str] = []
            return read_opened(io.BytesIO(b"".join(parts)), shown, remark=remarks.append), remarks

        text, remarks = await client.unless_gone(asyncio.to_thread(read))
        if not text.strip():
            raise InputError(f"{shown}: it is empty")
        num_tokens = await client.unless_gone(
            self._service.read(lambda: len(encode_text(self._service.tokenizer, text)))
        )
        forecast = self._service.forecasts.of(num_tokens)
        planned = None if forecast is None else {"seconds": forecast.seconds, "fits": forecast.fits}
        found = {"text": text, "tokens": num_tokens, "remarks": remarks, "plan": planned}
        await tell(client, found)


class _Questions:
    """Questions on a document, answered in one stream: browsers have six connections to a server,
    and these are to be in one weight pass. The chunks are those of chat; a choice is a question.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._chat = Completions(service, "chat")

    async def __call__(self, client: Client) -> None:
        """Raises what is to be told to the client, and ClientGoneError."""
        fields = await client.read_object(self._service.options.max_body_bytes)
        stream = Stream(self._service, client, failed)
        async with reading_body(self._service.read(lambda: self._body(fields))) as reading:
            await stream.run(reading, lambda body: self._chat.streamed(stream, body))

    def _body(self, fields: Mapping[str, Any]) -> Body:
        document, questions = fields.get("document"), fields.get("questions")
        if not isinstance(document, str):
            raise RefusedError("document: need text", param="document")
        if not isinstance(questions, list) or not all(isinstance(one, str) for one in questions):
            raise RefusedError("questions: need a list of texts", param="questions")
        if len(questions) > MAX_TEXTS:
            raise RefusedError(
                f"questions: need at most {MAX_TEXTS}, have {len(questions)}", param="questions"
            )
        encoder = PromptEncoder(self._service.tokenizer)
        prompts = question_prompts(encoder, document, questions)
        check_length(prompts, self._service.served.max_positions)
        forms = [encoder.answer_form(one) for one in prompts]
        shown = [one.control_ids(self._service.tokenizer) for one in forms]
        sampling = SamplingParams(temperature=0, max_tokens=fields.get("max_tokens", 256))
        return Body(
            asked=[
                Asked("chat", prompt, sampling.showing(ids), form=form)
                for prompt, form, ids in zip(prompts, forms, shown, strict=True)
            ],
            prompts=[None] * len(prompts),
            stream=True,
            with_usage=True,
        )
