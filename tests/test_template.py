"""The template for adapters: what it makes works as it is, and odd answers are refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import copier
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ollm
from ollm_conformance.new_adapter import TEMPLATE
from ollm_core.plugins.registry import Registry

ROOT = Path(__file__).parents[1]
LONGEST = {
    "family": "a2345678901234567890_234",
    "model_type": "m" * 32,
    "class_name": "C" * 32,
    "repo": f"{'o' * 30}/{'r' * 33}",
    "author": 'Zoë "the \\ one" 𝒜',
    "license": "MIT",
}


def render(directory, **answers):
    """A project made from the template, without asking."""
    copier.run_copy(str(TEMPLATE), directory, data=answers, defaults=True, quiet=True)
    return directory


def run_tool(project, *command):
    """A tool of this environment in the project's directory; it must find nothing wrong."""
    ran = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project,
        env={**os.environ, "MYPYPATH": str(project / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The project of the default answers, importable, and its registry."""
    project = render(tmp_path / "ollm-adapter-mistral")
    monkeypatch.syspath_prepend(project / "src")
    yield project, Registry.discover([_entry_point(project)])
    for name in [name for name in sys.modules if name.startswith("ollm_adapter_mistral")]:
        del sys.modules[name]


def _entry_point(project):
    declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    ((name, value),) = declared["entry-points"]["ollm.adapters"].items()
    return EntryPoint(name, value, "ollm.adapters")


def test_default_answers_make_an_adapter(installed):
    """It loads as a plugin, and its module declares nothing but names; the tensors are those that
    transformers builds from its configs.
    """
    project, registry = installed
    assert [(plugin.name, plugin.status) for plugin in registry.plugins] == [("mistral", "ok")]
    (module,) = project.glob("src/*/__init__.py")
    assert len(module.read_text().splitlines()) <= 40
    ((_, entry, _),) = registry.catalog()
    tiny = registry.adapter_for({"model_type": "mistral"}).tiny_config()
    for config in (tiny, entry.config):
        adapter = registry.adapter_for(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**copy.deepcopy(dict(config)))
            )
        names = set(model.state_dict())
        plan = adapter.weights(config, names)
        assert plan.parameters.keys() == names
        assert not plan.ignored
    assert entry.num_parameters == sum(p.numel() for p in model.parameters())


def test_its_model_is_exact(installed, reference, ids, tmp_path):
    """A random model of the generated family gives transformers' logits bit for bit."""
    _, registry = installed
    torch.manual_seed(0)
    tiny = registry.adapter_for({"model_type": "mistral"}).tiny_config()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny), dtype=torch.float32)
    model.save_pretrained(tmp_path / "tiny")
    expected = reference(tmp_path / "tiny", torch.float32).run(ids(100), 32)
    with ollm.load(
        tmp_path / "tiny", device="cpu", chunk_size=32, attention="exact", registry=registry
    ) as opened:
        assert torch.equal(opened(input_ids=ids(100)[None]).logits[0], expected)


@pytest.mark.parametrize("answers", [{}, LONGEST], ids=["default", "longest"])
@pytest.mark.parametrize("config", [[], ["--config", str(ROOT / "pyproject.toml")]])
def test_style(tmp_path, answers, config):
    """What it makes passes ruff, with its own configuration and with this repository's; which
    packages are its own, and so the order of imports, it knows best itself.
    """
    project = render(tmp_path / "project", **answers)
    run_tool(project, "ruff", "check", *config, *(["--ignore", "I001"] if config else []), ".")
    run_tool(project, "ruff", "format", "--check", *config, ".")


def test_longest_answers_make_valid_files(tmp_path):
    """Answers of the greatest length, with quotes in the name, leave no file malformed."""
    project = render(tmp_path / "longest", **LONGEST)
    declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert declared["name"] == "ollm-adapter-a2345678901234567890-234"
    assert declared["authors"] == [{"name": LONGEST["author"]}]
    assert f"Copyright (c) {LONGEST['author']}\n" in (project / "LICENSE").read_text()
    for path in project.rglob("*"):
        assert "{{" not in path.name
        if path.is_file() and path.parent.name != "workflows":
            assert "{{" not in path.read_text(), path


def test_workflow_keeps_its_own_braces(tmp_path):
    """The braces that belong to the CI service are still there."""
    project = render(tmp_path / "project")
    assert "${{ matrix.python }}" in (project / ".github/workflows/ci.yml").read_text()


ODD = {
    "family": [
        "", "my-family", "Mistral", "2fast", "a__b", "_a", "a_", "a b", "a\n", "é", "class", "a.b",
        "../x", "{{ 7 * 7 }}", "x" * 25,
    ],
    "model_type": ["", "Mistral", "a b", '"', "a\n", "-a", "x" * 33],
    "class_name": ["", "mistralAdapter", "My Adapter", "My-Adapter", "None", "A\n", "ModelAdapter"],
    "repo": ["", "name", "a/b/c", "/b", "a/", "../x", 'a/"b', "a/b c", "a/b\n", "o/" + "r" * 63],
    "author": ["", "  ", "a\nb", "a\x1b[31m", "x" * 101],
    "license": ["", "GPL-3.0", "mit"],
}  # fmt: skip


@pytest.mark.parametrize(("question", "answer"), [(q, a) for q, odd in ODD.items() for a in odd])
def test_odd_answers_are_refused(tmp_path, question, answer):
    """Hyphens, capitals, keywords, quotes, paths and control characters make no project."""
    with pytest.raises(ValueError, match=question):
        render(tmp_path / "project", **{question: answer})
    assert not (tmp_path / "project").exists()
