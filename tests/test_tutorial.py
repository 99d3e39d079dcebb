"""docs/adapter-tutorial.md, done word for word in a fresh directory, each of its families alone."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/adapter-tutorial.md"
FAMILIES = {"olmo2": "OLMo 2", "granite": "Granite", "gemma2": "Gemma 2"}
"""Each, and how the heading of its part begins."""
METHOD = r"    def layer_parameters.*?(?=\n\n    def catalog)"
PLACES = {
    "    def layer_parameters": ("__init__.py", METHOD),
    "    defaults = ": ("__init__.py", r"    defaults: Config = MappingProxyType\(\{\}\)"),
    "from ollm_core import": ("__init__.py", r"from ollm_core import [^\n]*"),
    "def config(": ("catalog.py", r"def config\(.*\Z"),
}
"""How code begins, the file that it goes into, and what is there in its place."""
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


def steps(heading):
    """The code blocks below the heading that begins so, in order; "": those before the first."""
    parts = PAGE.read_text().split("\n## ")
    (text,) = [part for part in parts[1:] if part.startswith(heading)] if heading else parts[:1]
    return [Step(*block) for block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)]


class Reader:
    """Does what the tutorial says, in a workspace of its own."""

    def __init__(self, workspace, family):
        self.directory = workspace / "before"
        self.directory.mkdir()
        self.family = family
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
            "OLLM_LOAD_PLUGINS": f"ollm-adapter-{family},ollm-conformance",
        }

    def follow(self, step):
        """Run its commands, or write its code."""
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
        """Put code where the template has what it replaces."""
        (place,) = [place for start, place in PLACES.items() if code.startswith(start)]
        name, replaced = place
        file = self.directory / f"src/ollm_adapter_{self.family}" / name
        end = "\n" if name == "catalog.py" else ""
        text, count = re.subn(
            replaced, lambda _: code.rstrip() + end, file.read_text(), flags=re.DOTALL
        )
        assert count == 1, f"{name} of the template has {count} places for:\n{code}"
        file.write_text(text)

    def _install(self, words):
        assert words[:2] == ["pip", "install"]
        if os.environ.get(REAL_PIP):
            subprocess.run([sys.executable, "-m", *words], cwd=self.directory, check=True)
        elif words[2:] == ["-e", ".[dev]"]:
            self._link()
        else:
            assert words[2:]
            assert all(version(name) for name in words[2:])

    def _link(self):
        """Make the project in the directory importable, as an installed distribution."""
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
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_does_what_it_says(tmp_path, family):
    """Commands print what is shown, files are as written, and the adapter passes the suite."""
    reader = Reader(tmp_path, family)
    for step in [*steps(""), *steps(FAMILIES[family])]:
        reader.follow(step)
    assert reader.directory.name == f"ollm-adapter-{family}"
    for tool in (["check", "."], ["format", "--check", "."]):
        subprocess.run([sys.executable, "-m", "ruff", *tool], cwd=reader.directory, check=True)
    module = (reader.directory / f"src/ollm_adapter_{family}/__init__.py").read_text()
    assert len(module.splitlines()) < 80


def test_the_tutorial_has_its_steps():
    """Commands to make, fail, pass and list, and code for what the template has otherwise."""
    headings = ("", *FAMILIES.values())
    languages = {heading: [step.language for step in steps(heading)] for heading in headings}
    assert languages == {
        "": ["console"],
        "OLMo 2": ["console", "console", "python", "console", "python", "console"],
        "Granite": ["console", "python", "python", "console"],
        "Gemma 2": ["console", *["python"] * 4, "console"],
    }
    for heading in FAMILIES.values():
        assert "\n$ pytest\n" in f"\n{steps(heading)[-1].text}", "the whole suite is run at last"
