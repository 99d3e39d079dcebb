"""Sampling: transformers' own choices, token by token, with a generator of each text's own."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from ollm_core.errors import InputError
from ollm_core.serving.offline import run_all
from ollm_core.serving.request import Request, SamplingParams
from ollm_core.serving.sampler import Sampler

CPU = torch.device("cpu")


def sampler(model=None, num_prompt=2, ends=(2,), index=0, **sampling):
    """One for a prompt of two tokens."""
    config = model or GenerationConfig()
    return Sampler(SamplingParams(**sampling), config, num_prompt, ends, CPU, index)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_a_seed_gives_the_text_of_generate(model, ids, how):
    """The same seed, the same tokens as transformers' `generate` from the same random state."""
    torch.manual_seed(11)
    theirs = model.generate(
        torch.tensor([ids(20)]),
        max_new_tokens=12,
        do_sample=True,
        eos_token_id=None,
        **{"top_k": 0, **how},
    )
    request = Request(
        token_ids=ids(20), wanted=SamplingParams(seed=11, max_tokens=12, ignore_eos=True, **how)
    )
    with model.open_scheduler() as scheduler:
        [[answer]] = run_all(scheduler, [request])
    assert answer.token_ids == theirs[0, 20:].tolist()


def test_a_seed_repeats_a_text_whatever_runs_beside_it(model, ids):
    """Alone, and among others that sample too."""

    def request(seed):
        sampling = SamplingParams(seed=seed, max_tokens=9, ignore_eos=True)
        return Request(token_ids=ids(30, seed), wanted=sampling)

    with model.open_scheduler() as scheduler:
        [[alone]] = run_all(scheduler, [request(5)])
        together = run_all(scheduler, [request(seed) for seed in (3, 5, 8)])
    assert together[1][0].token_ids == alone.token_ids


def test_what_the_checkpoint_must_not_say(ids):
    """Suppressed tokens, bad words and the end before `min_tokens` are never chosen."""
    logits = torch.arange(8.0)
    config = GenerationConfig(suppress_tokens=[7], bad_words_ids=[[6]])
    choose = sampler(config, ends=(5,), temperature=0, min_tokens=2)
    assert choose.choose([1, 1], logits)[0] == 4
    assert choose.choose([1, 1, 4, 4], logits)[0] == 5
    assert logits.tolist() == list(range(8))  # the model's own are not changed


@pytest.mark.parametrize(("ignore_eos", "first"), [(False, 4), (True, 5)])
def test_what_ends_a_text_is_not_chosen_before_min_tokens(ignore_eos, first):
    """The model's end, unless it is ignored, and token ids of one's own; as vLLM has it."""
    more = {"stop_token_ids": [7, 6], "ignore_eos": ignore_eos, "temperature": 0}
    choose = sampler(GenerationConfig(), ends=(5,), min_tokens=2, **more)
    assert choose.choose([1, 1], torch.arange(8.0))[0] == first
    assert choose.choose([1, 1, 4, 4], torch.arange(8.0))[0] == 7


def test_log_probabilities_are_the_models_own():
    """Before temperature and the like; the new token's own and the most likely ones."""
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    found, told = sampler(temperature=5.0, seed=1, logprobs=2).choose([1, 1], logits)
    expected = logits.log_softmax(-1)
    assert told.logprob == pytest.approx(float(expected[found]))
    assert [token_id for token_id, _ in told.top] == [1, 3]
    assert told.top[0][1] == pytest.approx(float(expected[1]))
    assert sampler(temperature=0).choose([1], logits)[1] is None
    assert sampler(temperature=0, logprobs=0).choose([1], logits)[1].top == ()


def test_a_sampling_function_of_ones_own():
    """It gets the tokens so far and the logits, and its word counts."""
    seen = []

    def third(token_ids, logits):
        seen.append((list(token_ids), logits.dtype, logits.shape))
        return torch.tensor(3)

    assert sampler(choose=third).choose([1, 9], torch.zeros(5))[0] == 3
    assert seen == [([1, 9], torch.float32, (5,))]


def test_logits_processors_of_ones_own():
    """In transformers' form."""

    def only_two(token_ids, scores):
        assert token_ids.shape == (1, 3)
        return scores.index_fill(1, torch.tensor([0, 1, 3]), -torch.inf)

    chosen = sampler(temperature=0, logits_processors=[only_two])
    assert chosen.choose([1, 1, 1], torch.tensor([5.0, 4.0, 1.0, 9.0]))[0] == 2


@pytest.mark.parametrize(
    ("choose", "words"),
    [
        (lambda *_: 99, "token id 99, the vocabulary has 5"),
        (lambda *_: "x", "a sampling function failed"),
        (lambda *_: 1 / 0, "division by zero"),
    ],
)
def test_a_sampling_function_that_fails_is_told_in_one_line(choose, words):
    """As bad input: the model did nothing wrong."""
    with pytest.raises(InputError, match=words):
        sampler(choose=choose).choose([1], torch.zeros(5))


def test_a_temperature_that_leaves_no_numbers_is_told_in_one_line():
    """As bad input, of this text alone: torch's own error would end the pass of all others."""
    for sampling in ({"temperature": 1e-44}, {"temperature": 1.0, "repetition_penalty": 1e-44}):
        with pytest.raises(InputError, match="no numbers"):
            sampler(**sampling).choose([1, 1], torch.tensor([3.0, 5.0, 4.0]))
