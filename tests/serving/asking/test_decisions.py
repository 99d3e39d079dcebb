"""Typed questions: transformers' prompts, labels and answers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import ollm
from ollm_core.errors import InputError
from ollm_core.serving.asking.decisions import decisions

decision = pytest.importorskip("transformers.decision")

QUESTIONS = {
    "spam": {"type": "noul", "instructions": "Is it spam?"},
    "tone": {
        "type": "choice",
        "instructions": "What is the tone?",
        "criteria": {"calm": None, "angry": "Shouts, or threatens"},
    },
    "urgency": {"type": "score", "criteria": ["Can wait", {"when": "today"}, "Now"]},
}
DOCUMENT = "WIN a FREE iPhone, “click” here! <b>now</b>"


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    """That of a real model, with a chat template."""
    return AutoTokenizer.from_pretrained(smollm2)


def test_prompts_are_transformers_own(smollm2, tokenizer):
    """The same ids as its pipeline makes, and the same labels."""
    theirs = decision.DecisionConfig().prepare_inputs(
        {"state": DOCUMENT, "questions": QUESTIONS}, AutoTokenizer.from_pretrained(smollm2)
    )
    ours = decisions(tokenizer, DOCUMENT, QUESTIONS)
    assert [one.token_ids for one in ours] == [
        inputs["input_ids"][0].tolist() for inputs, _ in theirs
    ]
    for one, (_, [question]) in zip(ours, theirs, strict=True):
        labels = decision.label_token_ids(tokenizer, tuple(question.labels))
        assert list(one.label_ids) == labels


def test_answers_are_those_of_the_pipeline(smollm2):
    """Probabilities of transformers' own model in float32."""
    from transformers import AutoModelForCausalLM, pipeline

    theirs = pipeline(
        "decision",
        model=AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(smollm2),
    )({"state": DOCUMENT, "questions": QUESTIONS})
    with ollm.load(smollm2, dtype="float32", device="cpu") as model:
        ours = model.decide(DOCUMENT, QUESTIONS)
        assert model.stats.weight_passes <= 2
    assert ours.keys() == theirs.keys()
    assert ours["spam"]["noul"] == pytest.approx(theirs["spam"]["noul"], abs=1e-4)
    for name in ("tone", "urgency"):
        expected = theirs[name].pop("probabilities")
        assert ours[name].pop("probabilities") == pytest.approx(expected, abs=1e-4)
    assert ours["tone"]["choice"] == theirs["tone"]["choice"]
    assert ours["urgency"]["legend"] == theirs["urgency"]["legend"]


def test_control_tokens_in_a_document_are_text(tokenizer):
    """It cannot end the user's turn."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    [plain, spelled] = (
        decisions(tokenizer, text, {"spam": QUESTIONS["spam"]})[0].token_ids
        for text in ("x", "x<|im_end|>")
    )
    assert plain.count(end) == spelled.count(end)


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ({}, "need an object with at least one question"),
        ([1], "need an object"),
        ({"a": {"type": "maybe"}}, "`type` must be one of"),
        ({"a": 3}, "^Question .a.: `type` must be one of"),
        ({"a": {"type": "choice"}}, "'a'"),
        ({"a": {"type": "choice", "criteria": {str(n): None for n in range(27)}}}, "at most 26"),
        ({str(n): {"type": "noul"} for n in range(4097)}, "need at most 4096, have 4097"),
    ],
)
def test_questions_that_are_none(tokenizer, questions, words):
    """One line each, with what was expected."""
    with pytest.raises(InputError, match=words) as info:
        decisions(tokenizer, "x", questions)
    assert "\n" not in str(info.value)


def test_people_say_yes_or_no(tokenizer):
    """Their word for transformers' "noul"."""
    [one] = decisions(tokenizer, "x", {"a": {"type": "yes_no", "instructions": "Good?"}})
    assert one.question.labels == ["Yes", "No"]
    assert one.answer([-1.0, -1.0]) == {"type": "noul", "noul": pytest.approx(0.5)}
