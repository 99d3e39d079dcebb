"""The tutorial in CONTRIBUTING.md, done word for word in a fresh directory."""

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

ROOT = Path(__file__).parents[1]
TITLE = "## Write an adapter in 30 minutes\n"
METHOD = r"    def layer_parameters.*?(?=\n\n    def catalog)"
REAL_PIP = "OLLM_TUTORIAL_PIP"
"""Environment variable: let `pip install` run for real. `make template` sets it in a fresh virtual
environment; elsewhere the project is made importable as pip would, without touching the
environment.
"""


@dataclass(frozen=True)
class Step:
    """One code block: `console` with its commands, or `python` to be written to a file."""

    language: str
    text: str


def tutorial():
    """The code blocks of the tutorial, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(TITLE)[1].split("\n## ")[0]
    return [Step(*block) for block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)]


class Reader:
    """Does what the tutorial says, in a workspace of its own."""

    def __init__(self, workspace):
        self.directory = workspace
        self.site = workspace / "site"
        programs = workspace / "bin"
        programs.mkdir()
        for name, module in {"pytest": "pytest", "ollm": "ollm_core.cli"}.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
            program.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "OLLM_LOAD_PLUGINS": "ollm-adapter-olmo2,ollm-conformance",
        }

    def run(self, command, expected):
        """One command; each of the `expected` lines must be in what it prints."""
        words = shlex.split(command)
        if words[0] == "cd":
            self.directory = (self.directory / words[1]).resolve()
        elif words[0] == "pip":
            self._install(words)
        else:
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
        """A method replaces the template's; anything else is the whole of catalog.py."""
        package = self.directory / "src/ollm_adapter_olmo2"
        if not code.startswith("    def layer_parameters"):
            assert "def tiny()" in code
            (package / "catalog.py").write_text(code)
            return
        module = package / "__init__.py"
        text, count = re.subn(METHOD, lambda _: code.rstrip(), module.read_text(), flags=re.DOTALL)
        assert count == 1
        module.write_text(text)

    def _install(self, words):
        assert words == ["pip", "install", "--no-deps", "-e", "."]
        if os.environ.get(REAL_PIP):
            subprocess.run([sys.executable, "-m", *words], cwd=self.directory, check=True)
            return
        project = tomllib.loads((self.directory / "pyproject.toml").read_text())["project"]
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
def test_every_step_does_what_it_says(tmp_path):
    """Commands print what is shown, files are as written, and the adapter passes the suite."""
    reader = Reader(tmp_path)
    for step in tutorial():
        if step.language == "python":
            reader.write(step.text)
            continue
        for part in step.text.removeprefix("$ ").split("\n$ "):
            command, *expected = part.strip().splitlines()
            reader.run(command, expected)
    assert reader.directory.name == "ollm-adapter-olmo2"
    for tool in (["check", "."], ["format", "--check", "."]):
        subprocess.run([sys.executable, "-m", "ruff", *tool], cwd=reader.directory, check=True)
    module = (reader.directory / "src/ollm_adapter_olmo2/__init__.py").read_text()
    assert len(module.splitlines()) < 60


def test_the_tutorial_has_its_steps():
    """Commands to make, fail, pass and list; code for the layer and the catalog."""
    languages = [step.language for step in tutorial()]
    assert languages == ["console", "console", "python", "console", "python", "console"]
