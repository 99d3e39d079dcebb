"""`ollm ask`: one document, many questions."""

from __future__ import annotations

import json
import re

import pytest
from one_line import is_one_line_error

from ollm_core.api import load


@pytest.fixture
def document(tmp_path):
    """One of 40 characters, which are tokens here."""
    path = tmp_path / "doc.md"
    path.write_text("# Title\n\nA document of a few short words.\n")
    return path


def test_ask(ollm, tiny_chat, document):
    """Each answer is that of the question asked alone, below its question on stdout."""
    arguments = [
        "ask", tiny_chat, "--file", document, "-q", "why?", "-q", "who is it?",
        "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 6,
    ]  # fmt: skip
    code, out, err = ollm(*arguments, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    asked = [answer["question"] for answer in report["answers"]]
    assert asked == ["why?", "who is it?"]
    for question, answer in zip(asked, report["answers"], strict=True):
        code, alone, _ = ollm(
            "run", tiny_chat, "--file", document, "--prompt", question, "--device", "cpu",
            "--dtype", "float32", "--max-new-tokens", 6, "--json",
        )  # fmt: skip
        assert json.loads(alone)["token_ids"] == answer["token_ids"]
    assert report["weight_passes"] <= 2 + 6
    code, out, err = ollm(*arguments)
    assert code == 0
    assert out.startswith("## why?\n\n")
    assert "\n## who is it?\n\n" in out
    assert "tokens with 1 document, 2 questions" in err
    assert "weights read" in err


def test_what_is_kept_is_told_and_not_forecast(ollm, tiny_chat, document, tmp_path, monkeypatch):
    """A second process says how much of the document it need not read."""
    asked = []
    monkeypatch.setattr(
        "ollm_core.cli.ask.forecast", lambda *_: asked.append(_) or f"{_[2]} less {_[4]}"
    )
    arguments = [
        "ask", tiny_chat, "--file", document, "-q", "why?", "--device", "cpu",
        "--max-new-tokens", 2, "--kv-dir", tmp_path / "kv",
    ]  # fmt: skip
    _, _, first = ollm(*arguments)
    _, _, second = ollm(*arguments)
    num_tokens = int(re.match(r"(\d+) tokens", first)[1])
    assert "kept" not in first
    assert f"\n{num_tokens} less 0\n" in first
    num_kept = int(re.search(r"(\d+) of them are kept", second)[1])
    assert 0 < num_kept < num_tokens
    assert f"\n{num_tokens} less {num_kept}\n" in second
    assert f"{num_kept} prompt tokens reused" in second


def test_one_question_is_answered_as_it_is_made(ollm, tiny_chat, document):
    """Its text alone is on stdout."""
    arguments = [
        "ask", tiny_chat, "--file", document, "-q", "why?", "--device", "cpu",
        "--max-new-tokens", 6,
    ]  # fmt: skip
    _, report, _ = ollm(*arguments, "--json")
    code, out, _ = ollm(*arguments)
    assert code == 0
    assert out == json.loads(report)["answers"][0]["text"] + "\n"


def test_several_documents_and_a_file_of_questions(ollm, tiny_chat, tmp_path, document):
    """Documents are named; blank lines are no questions."""
    other, questions = tmp_path / "b.txt", tmp_path / "questions.txt"
    other.write_text("Second")
    questions.write_text("one?\n\n two?\n")
    code, out, _ = ollm(
        "ask", tiny_chat, "--file", document, "--file", other, "--questions", questions,
        "--device", "cpu", "--max-new-tokens", 2, "--json",
    )  # fmt: skip
    assert code == 0
    answers = json.loads(out)["answers"]
    assert [answer["question"] for answer in answers] == ["one?", "two?"]
    text = "[user]# doc.md\n\n# Title\n\nA document of a few short words.\n\n# b.txt\n\nSecond"
    assert answers[0]["num_prompt_tokens"] == len(f"{text}\n\none?[assistant]")


def test_past_the_positions(ollm, tiny_chat, tmp_path):
    """Refused with both numbers; in parts when asked for."""
    document = tmp_path / "long.txt"
    document.write_text("A line of words.\n" * 20)
    arguments = [
        "ask", tiny_chat, "--file", document, "-q", "why?", "--device", "cpu",
        "--max-new-tokens", 4,
    ]  # fmt: skip
    code, out, err = ollm(*arguments)
    assert (code, out) == (2, "")
    assert is_one_line_error(err)
    assert "the model has 256 positions" in err
    assert "--map-reduce" in err
    code, out, err = ollm(*arguments, "--map-reduce")
    assert "parts" in err
    assert code in (0, 2)  # a model of 256 positions may have no room for the answers


def test_a_document_in_parts(tiny_chat):
    """Each question is asked of each part, and of the answers."""
    with load(tiny_chat, device="cpu", dtype="float32") as model:
        told = []
        document = "word " * 60
        [answer] = model.ask(
            document,
            ["why?"],
            _few(),
            map_reduce=True,
            on_prompts=lambda *numbers: told.append(numbers),
        )
    [(num_tokens, num_parts)] = told
    assert num_tokens > 256
    assert num_parts > 1
    assert answer.token_ids


def _few():
    from ollm_core.serving.request import SamplingParams

    return SamplingParams(temperature=0, max_tokens=2)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ([], 2, "there is no question"),
        (["-q", " "], 2, "question 1 is empty"),
        (["-q", "x", "--seed", "1"], 2, "--seed needs a --temperature above 0"),
        (["-q", "x", "--draft", "lookup"], 2, "No such option '--draft'"),
        (["--questions", "absent"], 2, "cannot read"),
    ],
)
def test_what_cannot_be_asked(ollm, tiny_chat, document, more, code, words):
    """One line, and nothing on stdout."""
    found, out, err = ollm("ask", tiny_chat, "--file", document, "--device", "cpu", *more)
    assert (found, out) == (code, "")
    assert words in err
