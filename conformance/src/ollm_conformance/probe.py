"""Run by path in a fresh interpreter: reads an adapter's declarations and looks at what that did.

Arguments: the adapter's module, its class, JSON of `sys.path`, and the transformers modeling module
to watch, or nothing to see that no torch is imported. Exits with a line that says what was wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys


def main(module: str, name: str, path: str, watched: str) -> None:
    """Exit with a message, or return if nothing was wrong."""
    sys.path[:] = json.loads(path)
    before = picture(watched) if watched else {}
    stray = io.StringIO()
    with contextlib.redirect_stdout(stray), contextlib.redirect_stderr(stray):
        read_declarations(module, name)
    if stray.getvalue():
        sys.exit(f"expected no output, got {stray.getvalue()[:200]!r}")
    if not watched:
        if "torch" in sys.modules:
            sys.exit("expected declarations that need no torch, got torch imported")
        return
    after = picture(watched)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    if changed:
        sys.exit(
            f"expected transformers untouched, got changes to {', '.join(sorted(changed)[:5])}"
        )


def read_declarations(module: str, name: str) -> None:
    """Import the adapter and ask it everything."""
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    adapter = found()  # type: ignore[operator]
    adapter.catalog()
    config = adapter.tiny_config()
    adapter.layout(config)
    adapter.caches(config)
    with contextlib.suppress(Exception):  # for an empty checkpoint it must refuse
        adapter.weights(config, [])


def picture(watched: str) -> dict[str, int]:
    """What transformers' tables, base class and the family's module hold, by identity."""
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modeling = importlib.import_module(watched)
    holders: dict[str, dict[str, object]] = {watched: dict(vars(modeling))}
    for thing in (PreTrainedModel, *vars(modeling).values()):
        if isinstance(thing, type):
            holders[thing.__name__] = dict(vars(thing))
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        holders[type(table).__name__] = {key: table[key] for key in table}
    return {
        f"{holder}.{key}": id(value)
        for holder, things in holders.items()
        for key, value in things.items()
        if not key.startswith("__")
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
