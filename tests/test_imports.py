"""Imports point one way, promised names are there, and what must be quick loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ollm
import ollm_core

ROOT = Path(ollm_core.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ORDER = [
    ["errors"],
    ["contracts", "files", "options"],
    ["memory", "profiling"],
    ["device", "plugins"],
    ["attention", "checkpoint"],
    ["kv", "text", "weights"],
    ["calibration", "model"],
    ["convert", "engine"],
    ["drafting", "planning"],
    ["generate"],
    ["loader"],
    ["api"],
    ["cli", "compat"],
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
    for path in FILES:
        part = MODULES[path].split(".")[1]
        for module in imported(path):
            other = module.split(".")[1]
            if part not in (other, "__init__") and RANK[other] >= RANK[part]:
                backward.add((MODULES[path], module))


def test_no_modules_import_each_other_in_a_circle():
    """Not within a folder either."""
    graph = {MODULES[path]: set(imported(path)) for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' imports '.join(reversed(error.args[1]))}") from None


def test_promised_names_are_there():
    """Everything in `__all__` can be imported and is documented."""
    for module in (ollm, ollm_core):
        for name in module.__all__:
            value = getattr(module, name)
            assert value.__doc__ or isinstance(value, (str, Mapping)), name


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
