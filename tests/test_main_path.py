"""From `load` to the call of a layer: five files, short enough to be read in one sitting."""

from __future__ import annotations

import ast
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import ollm
import ollm_core
from ollm_core.engine import layer_call
from ollm_core.generate.causal_lm import StreamedModel

ROOT = Path(ollm_core.__file__).parent
PATH = [
    "api.py",
    "generate/causal_lm.py",
    "engine/engine.py",
    "engine/weight_pass.py",
    "engine/layer_call.py",
]
MOST_FILES = 5
MOST_LINES = 700
"""Today's budget: what a newcomer reads to understand one decode step."""


def num_lines(name: str) -> int:
    """Lines of a file of the package."""
    return len((ROOT / name).read_text().splitlines())


def test_the_path_is_short():
    """At most so many files and lines."""
    lengths = {name: num_lines(name) for name in PATH}
    assert len(PATH) <= MOST_FILES
    assert sum(lengths.values()) <= MOST_LINES, lengths


@pytest.mark.parametrize(("one", "following"), [*pairwise(PATH)])
def test_each_file_knows_the_next(one, following):
    """It imports a name from it, and uses that."""
    module = f"ollm_core.{following.removesuffix('.py').replace('/', '.')}"
    tree = ast.parse((ROOT / one).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == module
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported & used, f"{one} uses nothing of {module}"


def test_nothing_else_is_between(tiny, ids, monkeypatch):
    """`load` gives the class of the second file, and where a layer is called, those after it are
    the files of the package that wait for it, in their order.
    """
    waiting: list[list[str]] = []
    real = layer_call.call_layer

    def called(*arguments):
        frame, names = sys._getframe(), []
        while frame := frame.f_back:
            if Path(frame.f_code.co_filename).is_relative_to(ROOT):
                names.append(Path(frame.f_code.co_filename).relative_to(ROOT).as_posix())
        waiting.append(list(dict.fromkeys(reversed(names))))
        return real(*arguments)

    monkeypatch.setattr(layer_call, "call_layer", called)
    with ollm.load(tiny, device="cpu") as model:
        assert isinstance(model, StreamedModel)
        model.generate(ids(5)[None], max_new_tokens=2, do_sample=False)
        num_layers = model.config.num_hidden_layers
    assert len(waiting) == 2 * num_layers
    # transformers' generate asks a model for its own way of sampling.
    assert {tuple(names) for names in waiting} == {("generate/hooks.py", *PATH[1:])}
