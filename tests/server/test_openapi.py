"""The server's description: it has all addresses, and schemathesis finds nothing that is not as it
says.
"""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from asgi_calls import calls
from calling_model import CALLS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from ollm_core.api import load
from ollm_core.server.app import open_app
from ollm_core.server.batch_routes import BatchRoutes
from ollm_core.server.batches import Batches
from ollm_core.server.file_store import FileStore
from ollm_core.server.openapi import PATH
from ollm_core.server.service import Service
from ollm_core.server_options import ServerOptions
from ollm_core.serving.openai.requests import Defaults

KEY = "a-long-key"
HEADERS = {"authorization": f"Bearer {KEY}"}
OF_THE_PAGE = ("/", "/page")


@pytest.fixture(scope="module")
def service(tiny_chat):
    """Of a model whose chat template takes functions; with a key."""
    options = ServerOptions(max_body=200_000, api_key=KEY, allowed_hosts="testserver")
    with load(tiny_chat, device="cpu") as model:
        model.tokenizer.chat_template = CALLS
        with Service(model, "tiny", options, Defaults(max_tokens=2)) as opened:
            yield opened


@pytest.fixture(scope="module")
def app(service, tmp_path_factory):
    """With files and batches."""
    with (
        FileStore(tmp_path_factory.mktemp("files"), 10**6) as store,
        Batches(service, store) as batches,
    ):
        yield open_app(service, BatchRoutes(service, store, batches).routes())


def routes(app):
    """Methods and addresses that are answered."""
    inner = app._app
    return {
        (method.lower(), route.path.replace(":path}", "}"))
        for route in inner.routes
        for method in route.methods or ()
        if method != "HEAD" and not (route.path == "/" or route.path.startswith("/page"))
    }


def test_every_address_is_described(app, service):
    """And none that is not there; without files, nothing of files."""
    told = calls(app, (PATH,), headers=HEADERS)[0].fields()
    described = {(method, path) for path, each in told["paths"].items() for method in each}
    assert described == routes(app)
    assert told["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    bare = open_app(service)
    told = calls(bare, (PATH,), headers=HEADERS)[0].fields()
    assert not [path for path in told["paths"] if "files" in path or "batches" in path]


def test_it_is_under_the_key(app):
    """As all else."""
    assert calls(app, (PATH,))[0].status == 401


@pytest.mark.parametrize("num_examples", [3, pytest.param(60, marks=pytest.mark.soak)])
def test_it_is_true(app, service, num_examples):
    """What it allows and what it does not, of each address: no failure, and only answers that it
    tells of.
    """
    schema = schemathesis.openapi.from_asgi(PATH, app, headers=HEADERS)
    statuses = Counter()
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            try:
                check(operation, mode, num_examples, statuses)
            except Unsatisfiable:
                continue  # nothing of it can be wrong
    posted = {label for label, mode, status in statuses if mode == "POSITIVE" and status == 200}
    assert {"POST /api/chat", "POST /api/generate"} <= posted
    assert not [one for one in statuses if one[2] >= 500]
    assert service.session.is_open


def check(operation, mode, num_examples, statuses):
    """One of its addresses."""

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        response = case.call(headers=HEADERS)
        statuses[operation.label, mode.name, response.status_code] += 1
        # What is allowed may still be refused: a prompt may be too long, a schema none.
        excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
        case.validate_response(response, headers=HEADERS, excluded_checks=excluded)
        if mode.is_positive and response.status_code == 400:
            assert b"not known" not in response.content
            assert b"openapi.json" not in response.content

    run()
