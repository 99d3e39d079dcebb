"""The plugin, through `llm` itself: its Python API and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import llm
import pytest
from click.testing import CliRunner
from llm import plugins

import llm_ollm
import ollm

SHORT = {"max_tokens": 5, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def model(models_dir: Path):
    """The tiny one, as `llm` finds it."""
    found = []
    llm_ollm.register_models(found.append)
    (one,) = [each for each in found if each.model_id == "ollm/tiny"]
    yield one
    one.close()


def expected(models_dir: Path, *messages: tuple[str, str]) -> str:
    """What `ollm` itself answers."""
    told = [{"role": role, "content": content} for role, content in messages]
    with ollm.LLM(models_dir / "tiny", device="cpu", dtype="float32") as opened:
        [found] = opened.chat(told, ollm.SamplingParams(temperature=0, max_tokens=5))
    return found.outputs[0].text


def test_the_entry_point_is_this_module():
    """Of the group that `llm` looks at."""
    (found,) = entry_points(group="llm", name="ollm")
    assert found.load() is llm_ollm


def test_an_answer_is_streamed(model, models_dir):
    """In pieces, whose text is that of `ollm`; what it took is told."""
    response = model.prompt("w1 w2", system="w3", **SHORT)
    pieces = list(response)
    assert len(pieces) > 1
    assert "".join(pieces) == expected(models_dir, ("system", "w3"), ("user", "w1 w2"))
    usage = response.usage()
    assert (usage.input, usage.output) == (6, 5)
    assert response.response_json["finish_reason"] == "length"


def test_a_conversation_goes_on(model, models_dir):
    """The second turn has the first before it, of which nothing is computed again."""
    conversation = model.conversation()
    first = conversation.prompt("w1 w2", stream=False, **SHORT).text()
    second = conversation.prompt("w4", **SHORT)
    assert second.text() == expected(
        models_dir, ("user", "w1 w2"), ("assistant", first), ("user", "w4")
    )
    assert second.response_json["num_cached_tokens"] >= 3


def test_sampling_options(model):
    """A seed repeats a text, another one gives another."""
    options = {**SHORT, "temperature": 5.0, "top_k": 40, "max_tokens": 12}
    texts = [model.prompt("w1", seed=seed, **options).text() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(ValueError, match="temperature"):
        model.prompt("w1", temperature=-1)


def test_opening_options_open_it_again(model):
    """Only other ones."""
    model.prompt("w1", **SHORT).text()
    first = model._opened
    model.prompt("w1", **{**SHORT, "max_tokens": 2}).text()
    assert model._opened is first
    model.prompt("w1", **SHORT, device_memory="50MB").text()
    assert model._opened is not first


def test_errors_are_those_of_llm(model):
    """What `ollm` refuses, and why."""
    with pytest.raises(llm.ModelError, match="device memory: need"):
        model.prompt("w1", **SHORT, device_memory="1KB").text()


def test_a_models_directory_that_is_none(tmp_path, monkeypatch):
    """Takes no other model of `llm` away."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("OLLM_MODELS", str(tmp_path / "file"))
    llm_ollm.register_models(pytest.fail)


def test_the_command_line(models_dir: Path, monkeypatch):
    """`llm -m` answers, `llm -c` goes on, and both are logged."""
    monkeypatch.setattr(plugins, "LLM_LOAD_PLUGINS", "llm-ollm")  # before it loads them all
    from llm.cli import cli

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    options = [word for name, value in SHORT.items() for word in ("-o", name, str(value))]
    first = run("-m", "ollm/tiny", *options, "w1 w2")
    assert first.strip() == expected(models_dir, ("user", "w1 w2")).strip()
    run("-c", *options, "w4")
    (_, second) = json.loads(run("logs", "--json", "-n", "2"))
    assert second["prompt"] == "w4"
    assert second["input_tokens"] > 10


def test_looking_around_loads_no_torch(models_dir: Path):
    """`llm models` is quick, and has ours."""
    code = "import sys; from llm.cli import cli\ntry: cli(['models'])\nfinally: print(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LLM_LOAD_PLUGINS": "llm-ollm"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "ollm/tiny" in done.stdout
    assert "'torch'" not in done.stdout
