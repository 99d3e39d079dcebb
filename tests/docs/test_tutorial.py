"""The tutorial docs/adapter-tutorial.md, done word for word, each family in a fresh directory."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/adapter-tutorial.md"
SECTIONS = {"OLMo 2": "olmo2", "Granite": "granite", "Gemma 2": "gemma2"}
REAL_PIP = "OLLM_TUTORIAL_PIP"
"""Environment variable: let `pip install` run for real. `make template` sets it in a fresh virtual
environment; elsewhere the project is made importable as pip would, without touching the
environment.
"""
WHOLE = "OLLM_TUTORIAL_WHOLE"
"""Environment variable: the families, with commas, whose last `pytest` runs all checks. The others
run `SOME`, as all checks take half a minute for each.
"""
SOME = (
    "declaration.outside-layers,declaration.catalog,caches.kinds,weights.catalog-complete,"
    "weights.values,exact.decode"
)
MOST_LINES = 60
"""Of a family's own module."""


@dataclass(frozen=True)
class Step:
    """One code block: `console` with its commands, or `python` to be written to a file."""

    language: str
    text: str


def tutorial():
    """The code blocks of each section, in order."""
    sections = dict(part.split("\n", 1) for part in PAGE.read_text().split("\n## ")[1:])
    return {
        title: [Step(*block) for block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)]
        for title, text in sections.items()
    }  # fmt: skip


class Reader:
    """Does what the tutorial says about one `family`, in a workspace of its own."""

    def __init__(self, workspace, family):
        self.family = family
        self.directory = workspace / "start"  # a section may begin with `cd ..`
        self.site = workspace / "site"
        programs = workspace / "bin"
        for directory in (self.directory, programs):
            directory.mkdir()
        for name, module in {"pytest": "pytest", "ollm": "ollm_core.cli"}.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
            program.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "OLLM_LOAD_PLUGINS": f"ollm-adapter-{family},ollm-conformance",
        }

    @property
    def package(self):
        """Where the adapter's own files lie."""
        return self.directory / f"src/ollm_adapter_{self.family}"

    def do(self, step):
        """One block: a file is written, or each command run and its output compared."""
        if step.language == "python":
            self.write(step.text)
            return
        for part in step.text.removeprefix("$ ").split("\n$ "):
            command, *expected = part.strip().splitlines()
            self.run(command, expected)

    def run(self, command, expected):
        """One command; each of the `expected` lines must be in what it prints."""
        words = shlex.split(command)
        if words[0] == "cd":
            self.directory = (self.directory / words[1]).resolve(strict=True)
            return
        if words[0] == "pip":
            self._install(words)
            return
        if words == ["pytest"] and self.family not in os.environ.get(WHOLE, "").split(","):
            words += ["--ollm-checks", SOME]
        ran = subprocess.run(
            words, cwd=self.directory, env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        output = " ".join((ran.stdout + ran.stderr).split())
        for line in expected:
            assert line in output, f"{command}: expected {line!r} in\n{ran.stdout}{ran.stderr}"
        refused = any("fails check" in line for line in expected)
        assert (ran.returncode != 0) is refused, f"{command}:\n{ran.stdout}{ran.stderr}"

    def write(self, code):
        """The whole of the catalog."""
        assert "def tiny()" in code
        (self.package / "catalog.py").write_text(code)

    def _install(self, words):
        if os.environ.get(REAL_PIP):
            subprocess.run([sys.executable, "-m", *words], cwd=self.directory, check=True)
            return
        if words == ["pip", "install", "ollm-core", "ollm-conformance"]:
            return
        assert words == ["pip", "install", "-e", ".[dev]"]
        project = tomllib.loads((self.directory / "pyproject.toml").read_text())["project"]
        assert project["optional-dependencies"]["dev"]
        metadata = self.site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        ]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        self.environment["PYTHONPATH"] = f"{self.site}:{self.directory / 'src'}"


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_every_step_does_what_it_says(tmp_path, title):
    """Commands print what is shown, files are as written, and the adapter passes the suite."""
    steps = tutorial()
    reader = Reader(tmp_path, SECTIONS[title])
    for step in (*steps["Install"], *steps[title]):
        reader.do(step)
    assert reader.directory.name == f"ollm-adapter-{SECTIONS[title]}"
    for tool in (["check", "."], ["format", "--check", "."]):
        subprocess.run([sys.executable, "-m", "ruff", *tool], cwd=reader.directory, check=True)
    module = (reader.package / "__init__.py").read_text()
    assert "(FamilyAdapter):" in module
    assert len(module.splitlines()) <= MOST_LINES


def test_the_tutorial_has_its_steps():
    """Commands to make, pass, fail and list; code for the catalog."""
    found = {title: [step.language for step in steps] for title, steps in tutorial().items()}
    assert found == {
        "Install": ["console"],
        "OLMo 2": ["console", "console", "console", "python", "console"],
        "Granite": ["console", "python", "console"],
        "Gemma 2": ["console", "python", "console"],
        "Say what only you know": [],
        "Declare every part": [],
    }
