"""The verb `serve`: answers over HTTP."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ollm_core.cli.completion import model_argument
from ollm_core.cli.forecast import forecasts_of
from ollm_core.cli.missing import EXTRAS
from ollm_core.cli.models import fetch_if
from ollm_core.cli.options import debug_option, options_of
from ollm_core.cli.report import summary
from ollm_core.cli.streaming import ProgressBar
from ollm_core.cli.waiting import wait_asleep_beside_others
from ollm_core.errors import OllmError
from ollm_core.options import LoadOptions
from ollm_core.server_options import ServerOptions
from ollm_core.values import parse_tokens

DEFAULT_CONTEXT = 8192


@click.command(short_help="Answer over HTTP, as OpenAI's and Ollama's servers do.")
@model_argument
@click.option("--pull", is_flag=True, help="Download MODEL first, if it is not on disk.")
@options_of("serve")
@debug_option
def serve(model: str, pull: bool, max_new_tokens: int, context: str | None, **options: Any) -> None:
    """Answer requests to MODEL over HTTP, many in each weight pass.

    OpenAI's addresses are below /v1, Ollama's below /api. Only this machine is listened to, unless
    --host says otherwise, which needs an API key. Ctrl-C ends it.
    """
    if absent := EXTRAS["serve"].absent:
        raise OllmError(
            f"ollm serve: need the package {absent}, have none",
            hint="pip install 'ollm-core[serve]'",
        )
    names = ServerOptions.__dataclass_fields__
    told = ServerOptions(**{name: options[name] for name in names})
    if click.get_current_context().ensure_object(dict).get("debug"):
        _log_requests()
    if not options["device"].startswith("cuda"):
        wait_asleep_beside_others()
    from ollm_core.server.app import open_app
    from ollm_core.server.batch_routes import BatchRoutes
    from ollm_core.server.listening import Listener, address_of, bound

    with bound(told) as listener:
        fetch_if(model, options["models_dir"], pull)
        from ollm_core.api import load
        from ollm_core.server.batches import Batches
        from ollm_core.server.file_store import FileStore
        from ollm_core.server.service import Service
        from ollm_core.serving.openai.requests import Defaults

        forecasts = forecasts_of(model, options)
        name = Path(model).name if os.path.isdir(model) else model
        loading = {one: options[one] for one in LoadOptions.__dataclass_fields__ if one in options}
        progress = ProgressBar(name)
        try:
            opened = load(model, **loading, on_progress=progress)
        finally:
            progress.close()
        with opened:
            positions = opened.served.max_positions
            most = DEFAULT_CONTEXT if context is None else parse_tokens(context)
            expected = most if positions is None else min(most, positions)
            kv_dir = None if options["kv_dir"] is None else Path(options["kv_dir"])
            defaults = Defaults(max_tokens=max_new_tokens)
            with ExitStack() as stack:
                service = stack.enter_context(
                    Service(opened, name, told, defaults, expected, forecasts, kv_dir)
                )
                more = []
                if told.files_dir is not None:
                    store = FileStore(Path(told.files_dir), told.files_budget_bytes)
                    stack.enter_context(store)
                    batches = stack.enter_context(Batches(service, store))
                    more = BatchRoutes(service, store, batches).routes()
                app = open_app(service, more)
                address = address_of(listener)
                click.echo(f"{name} at {address}/v1 and {address}/api, Ctrl-C ends", err=True)
                # Streams are told of the end while there is still somebody to tell them.
                Listener(app, told, stack.close).run([listener])
            layers = options["device_layers"], options["host_layers"]
            drafting = options["draft"] != "none"
            click.echo("\n" + summary(opened.stats, *layers, drafting=drafting), err=True)


def _log_requests() -> None:
    """A line on stderr for each request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("ollm.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
