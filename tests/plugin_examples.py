"""The example of each hook on docs/plugins.md, and what tests of plugins share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ollm
from ollm_core.cli.main import main
from ollm_core.plugins import hookspecs

DOCS = Path(__file__).parents[1] / "docs" / "plugins.md"
HOOKS = [n for n, v in vars(hookspecs).items() if hasattr(v, f"{hookspecs.PROJECT}_spec")]
GREEDY = {"do_sample": False, "eos_token_id": None}


def example(hook):
    """The plugin module in the section of a hook."""
    section = DOCS.read_text().split(f"\n## {hook}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def run_cli(capsys, *arguments):
    """(exit code, stdout, stderr) of a command line."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def logits(directory, ids, **options):
    """Logits [T, V] of a prompt, and the model's stats."""
    with ollm.load(directory, device="cpu", chunk_size=64, **options) as model:
        return model(input_ids=ids[None]).logits[0], model.stats


USED = """
    from ollm_core import hookimpl

    def broken(*request):
        raise RuntimeError("no such thing\\nhere")

    def wrong(*request):
        return 3

    @hookimpl
    def ollm_kv_stores():
        return {"broken": broken, "wrong": wrong}

    @hookimpl
    def ollm_reading_engines():
        return {"broken": broken, "wrong": wrong}

    @hookimpl
    def ollm_draft_sources():
        return {"broken": broken, "wrong": wrong}

    @hookimpl
    def ollm_commands():
        return {"broken": broken, "wrong": wrong, "exits": exit}
"""


def statuses(registry):
    """What became of each plugin, by name."""
    return {plugin.name: plugin.status for plugin in registry.plugins}


def reason(registry, name):
    """What is told of one plugin, in one line."""
    (found,) = (plugin.reason for plugin in registry.plugins if plugin.name == name)
    assert "\n" not in found
    return found
