"""`ollm run --draft model`: what it tells, what it refuses and with which exit code; and what the
gate makes of a source that must read the text first.
"""

from __future__ import annotations

import json

import pytest

from ollm_core.cli.main import main
from ollm_core.drafting.controller import DraftLengthController, FixedLength


def run(capsys, directory, *options):
    """(exit code, stdout, stderr) of `ollm run`."""
    fixed = ["--prompt", "0 1 " * 9, "--raw", "--device", "cpu", "--max-new-tokens", "12"]
    with pytest.raises(SystemExit) as end:
        main(["run", str(directory), *fixed, *options])
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


@pytest.fixture
def chat(make_llama):
    """A tiny random Llama with a tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = make_llama(bos_token_id=None, eos_token_id=None)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(199)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


def test_run_tells_of_the_drafts_of_a_model(capsys, chat):
    """The tokens are those without drafts; drafted and right ones are told, as JSON and at the
    end.
    """
    _, plain, _ = run(capsys, chat, "--json")
    drafting = ["--draft", "model", "--draft-model", str(chat), "--num-draft-tokens", "5"]
    _, found, _ = run(capsys, chat, "--json", *drafting)
    plain, found = json.loads(plain), json.loads(found)
    assert found["token_ids"] == plain["token_ids"]
    assert found["drafted_tokens"] == found["accepted_tokens"] == 9  # 1, 5 + 1, 4 + 1
    assert found["weight_passes"] == 3 < plain["weight_passes"]
    assert "accepted 9/9 draft tokens" in run(capsys, chat, *drafting)[2]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--draft", "model"], 2, "--draft-model"),
        (["--draft-model", "x"], 2, "--draft model"),
        (["--draft", "model", "--draft-model", "./gone"], 2, "there is no directory"),
        (["--draft", "model", "--draft-model", "no-such-id"], 4, "no-such-id"),
        (["--draft", "model", "--draft-model", "llama3-1B-chat"], 2, "ollm pull llama3-1B-chat"),
    ],
)
def test_what_names_no_draft_model(capsys, chat, tmp_path, options, code, words):
    """One line, a hint, and the exit code of its kind."""
    found, out, err = run(capsys, chat, *options, "--models-dir", str(tmp_path))
    assert (found, out) == (code, "")
    assert words in err
    assert "hint: " in err
    assert "Traceback" not in err


def test_a_draft_model_that_does_not_fit(capsys, chat):
    """Exit code 3, and the number that would do."""
    drafting = ["--draft", "model", "--draft-model", str(chat)]
    code, out, err = run(capsys, chat, *drafting, "--device-memory", "1MB")
    assert (code, out) == (3, "")
    assert "for draft model beside the model" in err
    assert "allow at least" in err


COSTS = [1 + 0.01 * num_checked for num_checked in range(11)]


def decoded(gate, prompt_seconds, reading_seconds, num_right, num_passes=300):
    """(tokens, seconds with the prompt, passes until the first draft) of a text on a simulated
    clock, whose source first reads for some seconds.
    """
    gate.started(prompt_seconds)
    tokens, seconds, first = 0, prompt_seconds, None
    for turn in range(num_passes):
        asked = gate.ask(10)
        if asked:
            gate.caught_up(reading_seconds)
            seconds, reading_seconds = seconds + reading_seconds, 0.0
            asked = gate.ask(10)
        checked = gate.answered(asked, asked, 0.001) if asked else 0
        if checked and first is None:
            first = turn
        took = COSTS[checked]
        gate.checked(checked, min(num_right, checked), took)
        tokens, seconds = tokens + 1 + min(num_right, checked), seconds + took
    return tokens, seconds, first


def test_reading_the_prompt_is_paid_from_the_prompts_twentieth():
    """A source that reads the prompt in a twentieth of the prompt's time is drafted with at once,
    and what never pays takes no more than a twentieth of the whole text.
    """
    tokens, _, first = decoded(DraftLengthController(10), 100.0, 4.0, num_right=10)
    assert first < 5
    assert tokens > 2000
    tokens, seconds, _ = decoded(DraftLengthController(10), 100.0, 4.0, num_right=0)
    assert seconds <= 1.05 * (100.0 + tokens * COSTS[0])


def test_reading_that_takes_longer_is_paid_back_first():
    """What it took beyond that is earned by plain passes before anything is drafted."""
    tokens, seconds, first = decoded(DraftLengthController(10), 100.0, 14.0, num_right=0)
    assert first is None or first > 100
    assert seconds <= 1.05 * (100.0 + tokens * COSTS[0]) + 14.0
    soon = decoded(DraftLengthController(10), 0.0, 1.0, num_right=10)[2]
    assert 15 < soon < 60


def test_a_fixed_number_does_not_wait():
    """Reading changes nothing for it."""
    gate = FixedLength(4)
    gate.caught_up(99.0)
    assert gate.ask(9) == 4
