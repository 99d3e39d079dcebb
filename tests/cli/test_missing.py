"""What `ollm doctor` says is not there."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

from ollm_core.cli.missing import EXTRAS, Extra, missing

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
FOR_CHANGES = {"dev", "docs"}
"""Extras of who changes oLLM."""


def test_every_extra_is_told():
    """With the modules that its packages bring."""
    assert EXTRAS.keys() == PROJECT["optional-dependencies"].keys() - FOR_CHANGES
    for extra in EXTRAS.values():
        assert extra.modules
        assert extra.gain


def test_modules_are_those_of_the_packages():
    """What is installed for the tests is not missing: a misspelled module would be."""
    absent = {name for name, extra in EXTRAS.items() if extra.absent}
    assert absent <= {"ray", "flash-attn", "kvikio-cu12", "kvikio-cu13"}
    assert Extra(("json", "no_such_module"), "").absent == "no_such_module"


def test_what_a_machine_lacks(monkeypatch):
    """Each is told where it would bring something, with how to get it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("pypdf", "kvikio") else find(name),
    )
    here = {one.name: one for one in missing("cpu", ["direct"], 1)}
    assert here["documents"].hint == "pip install 'ollm-core[documents]'"
    assert "GPU" in here
    assert not {"kvikio-cu12", "direct reads", "adapters"} & here.keys()
    there = {one.name for one in missing("cuda:0", ["mmap"], 0)}
    assert {"kvikio-cu12", "direct reads", "adapters"} <= there
    assert "GPU" not in there
