"""A service over a tiny model with a tokenizer, and a gate that holds its passes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ollm_core.api import load
from ollm_core.contracts.progress import Progress
from ollm_core.server import answering
from ollm_core.server.app import open_app
from ollm_core.server.forecast import Forecast, Forecasts
from ollm_core.server.service import Service
from ollm_core.server_options import ServerOptions
from ollm_core.serving.openai.requests import Defaults


class Gate:
    """Holds a pass at its first step while it is shut."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open = threading.Event()
        self._open.set()
        self.held = threading.Event()
        """A pass is there."""
        service.model.on_progress(self._on_progress)

    def shut(self) -> None:
        """From the next step on."""
        self.held.clear()
        self._open.clear()

    def open(self) -> None:
        """Let it go on."""
        self._open.set()

    def _on_progress(self, progress: Progress) -> None:
        self._service.watch(progress)
        if not self._open.is_set():
            self.held.set()
            assert self._open.wait(60)


@pytest.fixture(scope="module")
def model(tiny_chat) -> Iterator[Any]:
    """Float32: greedy tokens do not depend on what runs beside them."""
    with load(tiny_chat, device="cpu", chunk_size=64) as opened:
        yield opened


@pytest.fixture(scope="module")
def service(model) -> Iterator[Service]:
    """Of the model."""
    options = ServerOptions(max_requests=12, max_body=100_000)
    forecasts = Forecasts([Forecast(200, 20.0, True)])
    with Service(model, "tiny", options, Defaults(max_tokens=16), 0, forecasts) as opened:
        yield opened


@pytest.fixture
def gate(service) -> Iterator[Gate]:
    """Of the service."""
    made = Gate(service)
    yield made
    made.open()
    service.model.on_progress(service.watch)


@pytest.fixture(autouse=True)
def _long_readings(monkeypatch) -> None:
    """A busy machine may take long to read a body, whose refusal then still has a status."""
    monkeypatch.setattr(answering, "_READ_SECONDS", 60.0)


@pytest.fixture
def app(service) -> Any:
    """Its application."""
    return open_app(service)
