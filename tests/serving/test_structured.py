"""Answers that follow a JSON schema."""

from __future__ import annotations

import json
import socket
import sys

import pytest
import torch

from ollm_core.api import load
from ollm_core.errors import InputError, UnsupportedError
from ollm_core.serving.request import Request, SamplingParams
from ollm_core.serving.structured import Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tiny_chat):
    """Of random weights: what it says by itself is no JSON."""
    with load(tiny_chat, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def grammars(model):
    """Of its tokenizer."""
    return Grammars(model.tokenizer, model.served.vocab_size, model.served.end_ids)


def answered(model, grammars, schema, **sampling):
    """Answers that follow a schema."""
    ids = model.tokenizer("hello")["input_ids"]
    wanted = SamplingParams(
        max_tokens=150, logits_processors=[grammars.follow(schema, len(ids))], **sampling
    )
    [answers] = model.answer([Request(token_ids=ids, wanted=wanted)])
    return answers


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_several_answers_follow_it_side_by_side(model, grammars, temperature):
    """Each its own way, to its own end, whatever the model would say."""
    answers = answered(model, grammars, PERSON, n=3, temperature=temperature, seed=3)
    found = [json.loads(one.text) for one in answers]
    for one in found:
        assert list(one) == ["name", "age", "kind"]
        assert 0 <= one["age"] <= 99
        assert one["kind"] in ("cat", "dog")
    assert {one.finish_reason for one in answers} == {"stop"}
    assert (len({one.text for one in answers}) > 1) == (temperature > 0)


def test_its_mask_is_what_may_come_next(model, grammars):
    """Also for tokens that it has not met in their order."""
    follows = grammars.follow({"enum": [12, 345]}, 2)

    def allowed(text):
        ids = torch.tensor([[7, 7, *model.tokenizer(text)["input_ids"]]])
        scores = follows(ids, torch.zeros(1, model.served.vocab_size))[0]
        return {model.tokenizer.decode([one]) for one in torch.nonzero(scores == 0)[:, 0].tolist()}

    assert allowed("34") == {"5"}
    assert allowed("") == {"1", "3"}
    assert allowed("1") == {"2"}
    assert allowed("12") == {"</s>"}


@pytest.mark.parametrize("schema", [{"type": "nope"}, {"type": "string", "pattern": "("}])
def test_what_is_no_schema_is_refused(grammars, schema):
    """In one line."""
    with pytest.raises(InputError, match="the schema: ") as refused:
        grammars.follow(schema, 1)
    assert "\n" not in str(refused.value)


def test_a_schema_elsewhere_is_not_fetched(grammars):
    """Nobody is asked for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/schema"
        for reference in (url, "file:///etc/passwd"):
            with pytest.raises(InputError, match="the schema: "):
                grammars.follow({"$ref": reference}, 1)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_without_the_extra_it_says_what_to_install(grammars, monkeypatch):
    """Whoever asks for it; nobody else needs it."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match="need the package llguidance") as refused:
        grammars.follow(PERSON, 1)
    assert "ollm-core[structured]" in refused.value.hint


def test_a_model_without_an_end_is_refused(model):
    """Its answers would never be whole."""
    with pytest.raises(UnsupportedError, match="an end of text"):
        Grammars(model.tokenizer, model.served.vocab_size, []).follow(PERSON, 1)
