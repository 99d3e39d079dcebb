"""What memory is held for: each kind is spelled once, and accounts take a plugin's own beside."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

import ollm_core
from ollm_core import DoesNotFitError
from ollm_core.memory import kinds
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.kinds import OTHER_COLOUR, MemoryKind, colour_of, label_of

ROOT = Path(ollm_core.__file__).parent
NOT_IN_PLANS = {MemoryKind.ACTIVATIONS, MemoryKind.LOSS, MemoryKind.DRAFT_MODEL}


def test_every_kind_that_a_plan_shows_has_a_colour_of_its_own():
    """So that none is drawn grey; and a label that no other has, in either memory."""
    shown = [kind for kind in MemoryKind if kind not in NOT_IN_PLANS]
    assert len({kind.colour for kind in shown} - {OTHER_COLOUR}) == len(shown)
    assert len({kind.label for kind in MemoryKind}) == len(MemoryKind)


def test_no_other_module_spells_a_kind():
    """Of those whose name is no plain word: they are given as members, not as strings."""
    names = {kind.value for kind in MemoryKind if " " in kind}
    assert len(names) > 10
    for path in ROOT.rglob("*.py"):
        if os.path.samefile(path, kinds.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                pytest.fail(f"{path}:{node.lineno} spells {node.value!r}")


def test_names_are_keys_of_json_and_of_messages():
    """As they were before there were members."""
    held = {MemoryKind.KV_BLOCKS: 1, "table of a plugin": 2}
    text = '{"kv blocks": 1, "table of a plugin": 2}'
    assert json.dumps(held) == text
    assert json.dumps(json.loads(json.dumps(held, indent=2))) == text
    assert repr(held) == text.replace('"', "'")
    assert held["kv blocks"] == 1


def test_a_plugin_reserves_under_its_own_name():
    """It is called that, and drawn grey; a refusal names it."""
    account = MemoryAccount("host memory", 10)
    account.reserve("table", 4)
    account.reserve(MemoryKind.KV_BLOCKS, 3)
    assert account.kinds == {"table": 4, "kv blocks": 3}
    assert (label_of("table"), colour_of("table")) == ("table", OTHER_COLOUR)
    assert label_of("kv blocks") == "KV blocks"
    told = "host memory: need 5 B for table, 3 B free (limit 10 B)"
    with pytest.raises(DoesNotFitError) as refused:
        account.reserve("table", 5)
    assert refused.value.message == told
