"""LLM: prompts and answers in the words of vLLM."""

from __future__ import annotations

import pytest

from ollm import LLM, SamplingParams
from ollm_core.errors import InputError

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(smollm2):
    """A real model with a tokenizer and a chat template."""
    with LLM(smollm2, dtype="float32", device="cpu") as opened:
        yield opened


def test_prompts_in_all_forms(llm):
    """Text, token ids and vLLM's dictionaries give one answer, in the order of the prompts."""
    text = "The capital of France is"
    ids = llm.model.token_ids(text)
    forms = [text, "Water boils at", ids, {"prompt": text}, {"prompt_token_ids": ids}]
    found = llm.generate(forms, GREEDY)
    answers = [one.outputs[0].text for one in found]
    assert answers[0].startswith(" Paris")
    assert answers[0] == answers[2] == answers[3] == answers[4] != answers[1]
    assert [one.prompt for one in found] == [text, "Water boils at", None, text, None]
    assert found[0].prompt_token_ids == ids
    [alone] = llm.generate(text, GREEDY)
    assert alone.outputs[0].text == answers[0]


def test_each_prompt_has_its_own_sampling(llm):
    """Its length, its log-probabilities, its number of answers."""
    short = SamplingParams(temperature=0, max_tokens=2, logprobs=3)
    several = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)
    one, two = llm.generate(["The capital of France is"] * 2, [short, several])
    assert len(one.outputs[0].token_ids) == 2
    told = one.outputs[0].logprobs
    assert [len(each.top) for each in told] == [3, 3]
    assert one.outputs[0].cumulative_logprob == pytest.approx(sum(x.logprob for x in told))
    assert [output.index for output in two.outputs] == [0, 1, 2]
    assert two.outputs[0].cumulative_logprob is None


def test_conversations(llm):
    """By the model's chat template; a text that ends the answer is not part of it."""
    question = [{"role": "user", "content": "What is the capital of France? One word."}]
    [found] = llm.chat(question, SamplingParams(temperature=0, max_tokens=12, stop="."))
    assert "Paris" in found.outputs[0].text
    assert "." not in found.outputs[0].text
    both = llm.chat([question, question], GREEDY)
    assert len(both) == 2


def test_wrong_numbers_of_sampling_params(llm):
    """And prompts without a text."""
    with pytest.raises(InputError, match="need one, or one for each of 1 prompts, have 2"):
        llm.generate("x", [GREEDY, GREEDY])
    with pytest.raises(InputError, match="a prompt needs"):
        llm.generate([{"text": "x"}], GREEDY)
    assert llm.generate([], GREEDY) == []


def test_streams(llm):
    """Token by token, the text of a whole answer; the next turn goes on from what was read, several
    may be read in turns, and one that is left ends.
    """
    question = {"role": "user", "content": "What is the capital of France? One word."}
    [whole] = llm.chat([question], GREEDY)
    events = list(llm.stream([question], GREEDY))
    assert len(events) == 7
    text = "".join(event.text for event in events)
    assert text == whole.outputs[0].text
    assert events[-1].reason == "length"
    left = llm.stream([question], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    next(left)
    more = [question, {"role": "assistant", "content": text}, question]
    turns = llm.stream(more, GREEDY)
    first = [next(turns).text, next(left).text]
    left.close()
    *rest, end = turns
    [alone] = llm.chat(more, GREEDY)
    assert "".join([first[0], *(event.text for event in (*rest, end))]) == alone.outputs[0].text
    assert end.counts.num_cached_tokens >= len(whole.prompt_token_ids)
    with pytest.raises(InputError, match="need one answer, have n=2"):
        next(llm.stream([question], SamplingParams(n=2)))


def test_a_stream_of_a_closed_model_ends(smollm2):
    """With an error, and not never."""
    with LLM(smollm2, dtype="float32", device="cpu") as llm:
        stream = llm.stream([{"role": "user", "content": "Hello"}], GREEDY)
        next(stream)
    with pytest.raises(InputError, match="closed"):
        list(stream)
