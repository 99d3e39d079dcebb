"""Imports point one way, promised names are there, and what must be quick loads no torch."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

import ollm
import ollm_core
import ollm_core.kv
import ollm_core.testing

ROOT = Path(ollm_core.__file__).parent
DOCS = ROOT.parent / "docs"
FILES = sorted(ROOT.rglob("*.py"))
ORDER = [
    ["errors"],
    ["contracts", "files", "values"],
    ["memory", "profiling"],
    ["device", "documents", "plugins"],
    ["attention", "checkpoint", "option_fields", "products"],
    ["kv", "server_options", "text", "weights"],
    ["calibration", "model"],
    ["convert", "engine", "options"],
    ["drafting", "planning"],
    ["serving"],
    ["generate"],
    ["loader"],
    ["api"],
    ["llm", "server"],
    ["cli", "compat", "testing"],
]
"""The folders and single modules of `ollm_core`, from the ground up. Each may import those in rows
above its own, and none of its own row.
"""

RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """The modules of `ollm_core` that a file imports, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} has a relative import"
            assert node.module
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES.values() else node.module for name in inside]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            assert not name.startswith("ollm_adapter"), f"{path} imports an adapter"
            if name.startswith("ollm_core."):
                yield name


def test_imports_between_folders_point_one_way():
    """Each folder imports only those that stand above it in ORDER, which has all of them."""
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert parts - {"__init__"} == RANK.keys()
    backward = set()
    for path in FILES:
        part = MODULES[path].split(".")[1]
        for module in imported(path):
            other = module.split(".")[1]
            if part not in (other, "__init__") and RANK[other] >= RANK[part]:
                backward.add((MODULES[path], module))
    assert not backward


def test_no_modules_import_each_other_in_a_circle():
    """Not within a folder either."""
    graph = {MODULES[path]: set(imported(path)) for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' imports '.join(reversed(error.args[1]))}") from None


def test_promised_names_are_there():
    """Everything in `__all__` can be imported and is documented."""
    for module in (ollm, ollm_core, ollm_core.testing):
        for name in module.__all__:
            value = getattr(module, name)
            assert value.__doc__ or isinstance(value, (str, Mapping)), name


def test_constants_for_tests_are_documented():
    """A constant that `ollm_core.testing` exports says what it is where it is assigned."""
    exported = {name for name in ollm_core.testing.__all__ if name.isupper()}
    for path in ROOT.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for node, after in pairwise(body):
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    exported.discard(ast.unparse(target))
    assert not exported


def test_what_plugins_need_is_told():
    """Each name that `ollm_core` exports is in the pages for authors of plugins."""
    pages = "".join((DOCS / page).read_text() for page in ("plugins.md", "adapters.md"))
    for name in ollm_core.__all__:
        assert re.search(rf"`{name}\b", pages), name


def test_the_suite_needs_no_inner_module():
    """The conformance suite, its template, adapters with their tests, and the examples of the docs
    import `ollm_core` and `ollm_core.testing` alone.
    """
    root = ROOT.parent
    texts = {
        path: path.read_text()
        for directory in (root / "conformance/src", *root.glob("adapters/*"))
        for pattern in ("*.py", "*.jinja")
        for path in directory.rglob(pattern)
        if ".venv" not in path.parts
    }
    assert sum("from ollm_core.testing import" in text for text in texts.values()) > 20
    for page in [*DOCS.rglob("*.md"), root / "README.md", root / "conformance/README.md"]:
        texts[page] = page.read_text()
    for path, text in texts.items():
        for module in re.findall(r"^ *(?:from|import) (ollm_core[\w.]*)", text, re.MULTILINE):
            assert module in ("ollm_core", "ollm_core.testing"), f"{path} imports {module}"


@pytest.mark.parametrize("name", sorted(ollm_core._MOVED))
def test_names_that_moved_warn(name):
    """What `ollm_core` exported before is still there, and says where it is now."""
    home, exported = ollm_core._MOVED[name]
    with pytest.warns(DeprecationWarning, match=rf"ollm_core\.{name} is now {exported}\.{name},"):
        found = getattr(ollm_core, name)
    assert found is getattr(importlib.import_module(exported), name)
    assert found is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("name", ["HostKVStore", "KVGeometry"])
def test_parts_of_stores_warn_where_they_were(name):
    """docs/plugins.md once had plugins import them from `ollm_core.kv`."""
    with pytest.warns(
        DeprecationWarning, match=rf"ollm_core\.kv\.{name} is now ollm_core\.{name},"
    ):
        assert getattr(ollm_core.kv, name) is getattr(ollm_core, name)


def test_a_name_that_was_never_there():
    """Is an AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="'ollm_core' has no attribute 'Nothing'"):
        _ = ollm_core.Nothing
    with pytest.raises(ImportError):
        exec("from ollm_core import Nothing")


def test_importing_the_package_loads_no_torch():
    """`import ollm` and the contracts are cheap."""
    code = "import ollm, ollm_core, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_of_transformers_is_replaced():
    """No file of the core assigns to an attribute of a transformers module."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                text = ast.unparse(target)
                assert not text.startswith(("transformers.", "modeling_")), f"{path}: {text}"


def test_every_opening_says_whose_code_may_run():
    """Each call of transformers that could run a checkpoint's code names trust_remote_code: left
    out, transformers asks on stdin.
    """
    root = ROOT.parent
    directories = [
        ROOT,
        root / "conformance/src",
        root / "benchmarks",
        *root.glob("adapters/*/src"),
    ]
    found = 0
    for path in (file for directory in directories for file in directory.rglob("*.py")):
        tree = ast.parse(path.read_text())
        modules = {
            alias.asname or alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr not in ("from_pretrained", "from_config") or (
                modules.get(owner) == "airllm"  # another program's class of that name
            ):
                continue
            names = [keyword.arg for keyword in node.keywords]
            assert "trust_remote_code" in names, f"{path}:{node.lineno}: {owner} does not say"
            found += 1
    assert found > 10
