"""docs/architecture.md shows the tree that is there, and the imports that are tested."""

from __future__ import annotations

import re
from pathlib import Path

from test_imports import ORDER
from test_main_path import PATH

import ollm_core

ROOT = Path(ollm_core.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs/architecture.md").read_text()


def section(heading: str) -> str:
    """What stands below a heading, up to the next of its kind."""
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_folders():
    """Every folder has its line, and no other has one."""
    told = re.findall(r"^\| `([\w/]+)/` \|", section("Folders"), re.M)
    there = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")} - {"."}
    assert set(told) == there
    assert len(told) == len(there)


def test_files_that_are_named():
    """Each is there, and the walk links the files of the main path."""
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE))
    assert len(named) > len(PATH)
    places = ROOT, ROOT.parent
    assert not {name for name in named if not any((at / name).is_file() for at in places)}
    assert re.findall(r"\]\(\.\./ollm_core/([\w/]+\.py)\)", PAGE) == PATH


def test_rows_of_imports():
    """Those of tests/test_imports.py, in their order."""
    rows = re.findall(r"^\| \d+ \| (.+) \|$", section("Imports"), re.M)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == [set(names) for names in ORDER]


def test_names_of_the_walk():
    """Each class, method and function that the walk names is defined in core; transformers' own,
    the loop's argument and the user's calls aside.
    """
    others = {"generate", "input_ids", "transformers", "with", "ollm-adapter-transformers"}
    named = set(re.findall(r"`([A-Za-z_][\w.-]*)`", section("The walk: five files"))) - others
    named = {name for name in named if not name.endswith(".py")}
    code = "".join(path.read_text() for path in sorted(ROOT.rglob("*.py")))
    assert {"WeightPass.run", "LayerCall.update", "padded_batch"} <= named
    for name in named:
        for part in name.split("."):
            defined = re.search(rf"^ *(?:(?:def|class) {part}\b|{part}: )", code, re.M)
            assert defined, f"{name}: core has no {part}"
