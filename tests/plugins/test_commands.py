"""Verbs that plugins bring to `ollm`."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner
from plugin_examples import USED, run_cli

from ollm_core.cli.main import cli


@pytest.mark.parametrize("verb", ["adapter", "conformance"])
def test_a_verb_of_another_distribution(verb, monkeypatch, capsys):
    """Without ollm-conformance its verbs say what to install; they are not in --help."""
    monkeypatch.setenv("OLLM_LOAD_PLUGINS", "ollm-adapter-llama")
    code, out, err = run_cli(capsys, verb, "new", "olmo2")
    assert (code, out) == (4, "")
    assert f"`ollm {verb}` is a verb of ollm-conformance" in err
    assert "hint: pip install ollm-conformance" in err
    assert f"  {verb} " not in run_cli(capsys, "--help")[1]


def test_the_verb_counts(registry, tmp_path, capsys):
    """The example verb does what it says."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert registry.offers("ollm_commands")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert run_cli(capsys, "count-tokens", tmp_path, "a b a")[:2] == (0, "3\n")


@pytest.mark.parametrize(("name", "words"), [("broken", "no such"), ("wrong", "is a int")])
def test_a_verb_that_cannot_be_loaded(install, capsys, name, words):
    """It is listed, fails in one line when it is run, and hurts no other verb."""
    install(bad=USED)
    code, out, _ = run_cli(capsys, "--help")
    assert code == 0
    assert re.search(rf"{name} +\(cannot be loaded\)", out)
    code, out, err = run_cli(capsys, name, "--option", "x")
    assert (code, out) == (4, "")
    assert err.startswith(f"error: command {name!r} of bad")
    assert words in err
    assert run_cli(capsys, "plugins")[0] == 0


VERBS = """
    import click
    from ollm_core import DoesNotFitError, hookimpl

    @click.group()
    def verbs():
        "Several."

    @verbs.command()
    def returns():
        return "no exit code"

    @verbs.command()
    def refuses():
        raise DoesNotFitError("too large", hint="less")

    @verbs.command()
    @click.pass_context
    def ends(context):
        context.exit(7)

    @hookimpl
    def ollm_commands():
        return {"verbs": lambda: verbs}
"""


@pytest.mark.parametrize(
    ("name", "code", "err"),
    [("returns", 0, ""), ("refuses", 3, "error: too large\nhint: less\n"), ("ends", 7, "")],
)
def test_exit_codes_of_verbs(install, capsys, name, code, err):
    """A plugin's verb has the exit codes and errors of oLLM's own; what it returns is no code."""
    install(good=VERBS)
    assert run_cli(capsys, "verbs", name) == (code, "", err)


def test_help_needs_no_runner(registry):
    """The group works in click's own test runner too, as authors of verbs will use it."""
    assert registry.plugins
    assert "count-tokens" in CliRunner().invoke(cli, ["--help"]).output
