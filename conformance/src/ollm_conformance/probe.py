"""Run by path in a fresh interpreter: reads an adapter's declarations and looks at what that did.

Arguments: the adapter's module, its class, JSON of `sys.path`. Exits with a line that says what was
wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ollm_core import ModelAdapter


def main(module: str, name: str, path: str) -> None:
    """Exit with a message, or return if nothing was wrong."""
    sys.path[:] = json.loads(path)
    stray = io.StringIO()
    with contextlib.redirect_stdout(stray), contextlib.redirect_stderr(stray):
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        read_declarations(found())  # type: ignore[operator]
    if stray.getvalue():
        sys.exit(f"expected no output, got {stray.getvalue()[:200]!r}")
    if "torch" in sys.modules:
        sys.exit("expected declarations that need no torch, got torch imported")


def read_declarations(adapter: ModelAdapter) -> None:
    """Ask an adapter everything; one that looks at each model of transformers by itself, what it
    says before.
    """
    from ollm_core import ModelAdapter  # where `sys.path` is the caller's

    adapter.catalog()
    config = adapter.tiny_config()
    if type(adapter).for_model is not ModelAdapter.for_model:
        return
    adapter.layout(config)
    adapter.caches(config)
    with contextlib.suppress(Exception):  # for an empty checkpoint it must refuse
        adapter.weights(config, [])


if __name__ == "__main__":
    main(*sys.argv[1:])
