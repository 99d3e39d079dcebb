"""Every script of examples/ runs, as it is, on a tiny model."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {
    "langchain_client": ("langchain_openai", "langchain-openai"),
    "lm_eval_scores": ("lm_eval", "lm_eval[api]"),
}
"""What is too heavy to be installed for the tests: those scripts are run where it is."""
PRINTED = {
    "langchain_client": r"(.*\n){4,}",
    "llm_plugin": r"(.*\n){2,}",
    "lm_eval_scores": r"model object: 9 log-likelihoods, .*\nserver: 9 log-likelihoods, .*\n",
    "openai_client": r"(.*\n)+8 answers at once\n",
    "pipeline": r"(.*\n)+",
    "structured_output": r"\{'city': '(Paris|Rome)', 'sure': (True|False)\}\n",
}
"""What each prints on stdout, whatever the model."""


def test_there_are_no_others():
    """Each script is run here, and stands in the README with what it shows."""
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"served"}
    told = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|", (EXAMPLES / "README.md").read_text(), re.M)
    assert scripts == PRINTED.keys() == set(told)


@pytest.mark.filterwarnings("default")  # of other people's packages
@pytest.mark.parametrize("name", sorted(PRINTED))
def test_an_example(name, tiny_chat, tmp_path, monkeypatch, capsys):
    """With a model's directory. One that gives the wrong log-likelihoods ends in an error."""
    module, package = PACKAGES.get(name, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"pip install {package}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [name, str(tiny_chat)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.fullmatch(PRINTED[name], capsys.readouterr().out)
