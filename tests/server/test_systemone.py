"""Decisions over HTTP: those of `model.decide`."""

from __future__ import annotations

import pytest
from asgi_calls import calls

PATH = "/v1/systemone"
QUESTIONS = {
    "spam": {"type": "noul", "instructions": "Spam?"},
    "tone": {"type": "choice", "instructions": "Tone?", "criteria": {"calm": None, "angry": None}},
}


@pytest.fixture(scope="module")
def model(smollm2):
    """Its labels are tokens."""
    from ollm_core.api import load

    with load(smollm2, device="cpu", dtype="float32") as opened:
        yield opened


def test_decisions_are_those_of_the_model(app, model):
    """In the form of transformers' server."""
    body = {"model": "x", "state": "Buy now!", "questions": QUESTIONS}
    [made] = calls(app, (PATH, body))
    fields = made.fields()
    expected = model.decide("Buy now!", QUESTIONS)
    assert fields.keys() == {"model", "answers", "usage"}
    assert fields["answers"]["spam"]["noul"] == pytest.approx(expected["spam"]["noul"], abs=1e-4)
    assert fields["answers"]["tone"]["choice"] == expected["tone"]["choice"]
    assert fields["usage"]["output_tokens"] == 0
    assert fields["usage"]["input_tokens"] > 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": 3}, "state: need a text"),
        ({"questions": {}}, "questions: need an object"),
        ({"questions": {"a": {"type": "guess"}}}, "a"),
        ({"assets": {"i": {}}}, "assets: this model reads text alone"),
        ({"colour": 1}, "'colour' in the body is not known"),
    ],
)
def test_wrong_requests_are_refused(app, change, words):
    """With 400 and a reason."""
    [made] = calls(app, (PATH, {"state": "x", "questions": QUESTIONS, **change}))
    assert made.status == 400
    assert words in made.fields()["error"]["message"]


def test_a_state_may_be_an_object(app):
    """It is shown as JSON, as transformers shows it."""
    one, other = calls(
        app,
        (PATH, {"state": {"é": [1]}, "questions": QUESTIONS}),
        (PATH, {"state": '{"é": [1]}', "questions": QUESTIONS}),
    )
    assert one.status == 200
    assert one.fields()["usage"] == other.fields()["usage"]
