"""`ollm decide`: typed questions on a document, as probabilities."""

from __future__ import annotations

import json

import pytest
from one_line import is_one_line_error

pytest.importorskip("transformers.decision")

QUESTIONS = {
    "spam": {"type": "yes_no", "instructions": "Is it spam?"},
    "tone": {"type": "choice", "criteria": {"calm": None, "angry": "Shouts"}},
    "urgency": {"type": "score", "criteria": ["Can wait", "Today"]},
}


@pytest.fixture
def files(tmp_path):
    """A document, and questions on it."""
    document, questions = tmp_path / "doc.txt", tmp_path / "questions.json"
    document.write_text("WIN a FREE iPhone!")
    questions.write_text(json.dumps(QUESTIONS))
    return document, questions


def test_decide(ollm, smollm2, files):
    """Probabilities that sum to 1, in at most two passes; bars for people."""
    document, questions = files
    arguments = ["decide", smollm2, "--file", document, questions, "--device", "cpu"]
    code, out, err = ollm(*arguments, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["answers"].keys() == QUESTIONS.keys()
    assert 0 <= report["answers"]["spam"]["noul"] <= 1
    for name in ("tone", "urgency"):
        assert sum(report["answers"][name]["probabilities"].values()) == pytest.approx(1)
    assert report["weight_passes"] <= 2
    code, out, err = ollm(*arguments)
    assert code == 0
    assert [line for line in out.splitlines() if not line.startswith("  ")][1].startswith("tone: ")
    assert "█" in out
    assert "weights read" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "questions.json: must be a JSON object"),
        ("{", "questions.json"),
        ("{}", "need an object with at least one question"),
        ('{"a": {"type": "maybe"}}', "`type` must be one of"),
        ('{"state": "x", "questions": {"a": {"type": "noul"}}}', "has a state of its own"),
    ],
)
def test_questions_that_are_none(ollm, smollm2, files, text, words):
    """One line, and nothing on stdout."""
    document, questions = files
    questions.write_text(text)
    code, out, err = ollm("decide", smollm2, "--file", document, questions, "--device", "cpu")
    assert (code, out) == (2, "")
    assert is_one_line_error(err)
    assert words in err
