"""What `ollm run` says of drafts, and what `load` refuses."""

from __future__ import annotations

import json

import pytest

import ollm
from ollm_core import InputError
from ollm_core.cli.main import main

TELLS = {"drafted_tokens", "accepted_tokens", "undrafted_passes"}


def run(capsys, directory, *options):
    """(stdout, stderr) of `ollm run`."""
    fixed = ["--prompt", "0 1 " * 9, "--raw", "--device", "cpu", "--max-new-tokens", "24"]
    with pytest.raises(SystemExit) as end:
        main(["run", str(directory), *fixed, *options])
    captured = capsys.readouterr()
    assert not end.value.code, captured.err
    return captured


def test_run_tells_of_drafts(capsys, chat):
    """With a draft source the report and the closing lines count drafts; without, neither does. The
    tokens are the same with the gate, a fixed number, and none.
    """
    plain = json.loads(run(capsys, chat, "--json").out)
    assert not TELLS & set(plain)
    gated = json.loads(run(capsys, chat, "--json", "--draft", "lookup").out)
    assert set(gated) >= TELLS
    fixed = json.loads(
        run(capsys, chat, "--json", "--draft", "lookup", "--num-draft-tokens", "4").out
    )
    assert plain["token_ids"] == gated["token_ids"] == fixed["token_ids"]
    for found in (gated, fixed):
        assert 0 <= found["accepted_tokens"] <= found["drafted_tokens"]
        drafted_passes = found["weight_passes"] - 1 - found["undrafted_passes"]
        assert found["num_new_tokens"] == found["weight_passes"] + found["accepted_tokens"]
        assert 0 <= drafted_passes <= found["drafted_tokens"]
    assert 0 < fixed["drafted_tokens"] <= 4 * fixed["weight_passes"]
    assert "draft tokens; " in run(capsys, chat, "--draft", "lookup").err
    assert "draft tokens; " not in run(capsys, chat).err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft": "lookup", "num_draft_tokens": 0}, "num_draft_tokens is 0, expected at least 1"),
        ({"num_draft_tokens": 4}, "num_draft_tokens needs a draft source"),
    ],
)
def test_a_number_that_means_nothing_is_refused(tiny, options, words):
    """A number of tokens below one, or without a draft source, is one line with a hint."""
    with pytest.raises(InputError, match=words) as refused:
        ollm.load(tiny, device="cpu", **options)
    assert refused.value.hint
