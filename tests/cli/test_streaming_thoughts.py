"""What a model thinks is shown beside its answer, and is no part of it."""

from __future__ import annotations

import io
import json

import pytest
from thinking_model import ANSWER, THOUGHT, make_thinking


@pytest.fixture
def thinking(tmp_path):
    """A model that thinks."""
    return make_thinking(tmp_path / "thinking")


def test_a_run_shows_thoughts_on_stderr(ollm, thinking):
    """And tells of them apart in JSON; without a template all is text."""
    code, out, err = ollm("run", thinking, "--prompt", "1 + 2?", "--device", "cpu")
    assert code == 0, err
    assert out.strip() == ANSWER
    assert THOUGHT in err
    _, out, _ = ollm("run", thinking, "--prompt", "1 + 2?", "--device", "cpu", "--json")
    told = json.loads(out)
    assert (told["text"], told["reasoning"]) == (ANSWER, THOUGHT)
    _, out, _ = ollm("run", thinking, "--raw", "--prompt", "1 + 2?]", "--device", "cpu")
    assert out.strip().startswith(THOUGHT)


def test_answers_to_questions_are_without(ollm, thinking, tmp_path):
    """Of one, shown as it comes; of several, not shown; from Python beside the text."""
    document = tmp_path / "a.txt"
    document.write_text("One and two.")
    asked = ["ask", thinking, "--file", document, "--device", "cpu", "-q", "1 + 2?"]
    code, out, err = ollm(*asked)
    assert code == 0, err
    assert out == f"{ANSWER}\n"
    assert THOUGHT in err
    _, out, err = ollm(*asked, "-q", "2 + 1?")
    assert out.count(ANSWER) == 2
    assert THOUGHT not in out + err
    _, out, _ = ollm(*asked, "--json")
    [answer] = json.loads(out)["answers"]
    assert (answer["text"], answer["reasoning"]) == (ANSWER, THOUGHT)


def test_a_chat_goes_on_without_its_thoughts(ollm, thinking, tmp_path, monkeypatch):
    """Its messages have what was said."""
    saved = tmp_path / "talk.json"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"1 + 2?\n/save {saved}\n"))
    code, out, err = ollm("chat", thinking, "--device", "cpu")
    assert code == 0, err
    assert out.strip() == ANSWER
    assert THOUGHT in err
    talk = json.loads(saved.read_text())["messages"]
    assert [one["content"] for one in talk] == ["1 + 2?", ANSWER]
