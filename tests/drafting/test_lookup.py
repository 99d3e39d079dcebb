"""Draft sources change how many weight passes a text takes, and never the text."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria

import ollm
from ollm_conformance import DrafterConformance
from ollm_core.contracts.closing import Closing
from ollm_core.drafting.lookup import LookupDrafter
from ollm_core.drafting.text_drafts import NUM_DRAFT_TOKENS
from ollm_core.errors import PluginError

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def drafted(tiny, monkeypatch):
    """Opens a tiny model with a drafter, for drafts of a fixed length; without one, the plain
    model.
    """
    opened = []

    def open_model(drafter=None, **options):
        model = ollm.load(tiny, device="cpu", chunk_size=64, **options)
        model.draft_with(drafter or model._drafter, NUM_DRAFT_TOKENS)
        opened.append(model)
        return model

    yield open_model
    for model in opened:
        model.close()


class Oracle:
    """Knows the text; right for `num_right` tokens of each draft, then wrong."""

    def __init__(self, text, num_right=NUM_DRAFT_TOKENS):
        self.text, self.num_right, self.seen = text, num_right, []

    def __call__(self, token_ids, num_tokens):
        self.seen.append(token_ids.tolist())
        draft = self.text[len(token_ids) : len(token_ids) + num_tokens].clone()
        draft[self.num_right :] = (draft[self.num_right :] + 1) % 199
        return draft


def drafter_of(kind, text):
    """A drafter by what it proposes."""
    return {
        "nothing": lambda *_: [],
        "nonsense": lambda ids, k: torch.randint(0, 199, (k,)),
        "the truth": Oracle(text),
        "half the truth": Oracle(text, 4),
        "more than asked": lambda ids, k: text[len(ids) : len(ids) + 3 * k],
        "int32": lambda ids, k: text[len(ids) : len(ids) + k].int(),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("nothing", 40), ("nonsense", None), ("the truth", 5), ("half the truth", 9),
        ("more than asked", 5), ("int32", 5),
    ],
)  # fmt: skip
def test_any_draft_keeps_the_tokens(drafted, ids, kind, passes):
    """Whatever is proposed the greedy tokens are the same; right guesses save weight passes."""
    prompt = ids(100)
    plain = drafted()
    text = plain.generate(prompt[None], max_new_tokens=40, **GREEDY)[0]
    assert plain.stats.weight_passes == 40
    model = drafted(drafter_of(kind, text))
    assert model.generate(prompt[None], max_new_tokens=40, **GREEDY)[0].equal(text)
    if passes:
        assert model.stats.weight_passes == passes
    assert (model.stats.prefill_tokens, model.stats.decode_tokens) == (100, 39)


def test_lookup(drafted, ids):
    """The built-in source is transformers' prompt lookup, and saves passes where text repeats."""
    prompt = ids(12).repeat(6)
    plain = drafted()
    text = plain.generate(prompt[None], max_new_tokens=60, **GREEDY)
    model = drafted(draft="lookup")
    assert model.generate(prompt[None], max_new_tokens=60, **GREEDY).equal(text)
    assert model.stats.weight_passes < 60
    assert LookupDrafter()(torch.tensor([5, 6, 7, 8, 5, 6]), 3).tolist() == [7, 8, 5]
    assert LookupDrafter()(torch.tensor([5, 6, 7]), 3).tolist() == []


@pytest.mark.parametrize("at", range(12))
def test_the_text_ends_where_it_would(drafted, ids, at):
    """End-of-sequence, the length and stopping criteria end the text at the same token, though it
    was drafted past them.
    """
    prompt = ids(30)
    plain = drafted()
    text = plain.generate(prompt[None], max_new_tokens=30, **GREEDY)[0]

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 31 + at)

    for options in (
        {"max_new_tokens": 1 + at, **GREEDY},
        {"max_new_tokens": 30, "stopping_criteria": [After()], **GREEDY},
        {"max_new_tokens": 30, "do_sample": False, "eos_token_id": int(text[30 + at])},
    ):
        expected = plain.generate(prompt[None], pad_token_id=0, **options)
        model = drafted(Oracle(text))
        assert model.generate(prompt[None], pad_token_id=0, **options).equal(expected)


def test_a_draft_stays_inside_the_positions(make_llama, ids):
    """Near the model's last position a draft is cut, where plain decoding still goes on."""
    directory = make_llama(max_position_embeddings=64)
    with ollm.load(directory, device="cpu") as model:
        text = model.generate(ids(50)[None], max_new_tokens=14, **GREEDY)[0]
        model._drafter = Oracle(torch.cat([text, ids(30)]))
        model._num_draft_tokens = NUM_DRAFT_TOKENS
        assert model.generate(ids(50)[None], max_new_tokens=14, **GREEDY)[0].equal(text)


def test_a_draft_that_does_not_fit_is_cut(make_llama, ids):
    """Where memory bears a step and no draft of ten, fewer or none are drafted, and nothing is
    refused that goes without drafts.
    """
    directory = make_llama(vocab_size=9000)  # each checked token has a row of logits

    def run(num_bytes, drafter=None):
        with ollm.load(directory, device="cpu", device_memory=num_bytes, kv="host") as model:
            model._drafter, model._num_draft_tokens = drafter, NUM_DRAFT_TOKENS
            text = model.generate(ids(9)[None], max_new_tokens=20, **GREEDY)[0]
            assert model.stats.device_peak_bytes <= num_bytes
            return text, model.stats.weight_passes

    text, passes = run(3_000_000)  # two of the head's 2.3 MB would be too much
    assert passes == 20
    found = [run(num_bytes, Oracle(text)) for num_bytes in (3_000_000, 3_400_000, 5_000_000)]
    assert all(one.equal(text) for one, _ in found)
    passes = [number for _, number in found]
    assert 20 > passes[0] > passes[1] > passes[2] == 3


def test_batches_and_beams_are_decoded_plainly(drafted, ids):
    """More than one row goes without a draft: the drafter is not asked, the tokens are the same."""
    batch = torch.stack([ids(20, seed=1), ids(20, seed=2)])
    plain, oracle = drafted(), Oracle(ids(99))
    model = drafted(oracle)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        rows = batch[:1] if options else batch
        expected = plain.generate(rows, max_new_tokens=6, **GREEDY, **options)
        assert model.generate(rows, max_new_tokens=6, **GREEDY, **options).equal(expected)
    assert oracle.seen == []


def test_second_turn_and_a_crop(drafted, ids):
    """A cache that was drafted into goes on like any other."""
    prompt = ids(60)
    plain = drafted()
    text = plain.generate(prompt[None], max_new_tokens=20, **GREEDY)[0]
    more = torch.cat([text, ids(25, seed=4)])
    expected = plain.generate(more[None], max_new_tokens=20, **GREEDY)[0]
    model = drafted(Oracle(text, 3))
    cache = model.new_cache()
    found = model.generate(prompt[None], past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert found[0].equal(text)
    assert cache.get_seq_length() == 79
    model._drafter = Oracle(expected, 3)
    found = model.generate(more[None], past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert found[0].equal(expected)
    assert model.stats.prefill_tokens == 60 + 26


def test_sampling_is_transformers_assisted_sampling(drafted, tiny, reference, ids):
    """With a seed, lookup samples what transformers samples with prompt lookup after a first token
    of its own.
    """
    prompt = ids(12).repeat(6)
    options = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 24, "eos_token_id": None}
    model = drafted(lambda *_: [])
    torch.manual_seed(3)
    found = model.generate(prompt[None], **options)
    torch.manual_seed(3)
    plain = reference(tiny, torch.float32).model.generate(prompt[None], **options)
    assert found.equal(plain)  # with no draft, one token at a time
    sampled = drafted(draft="lookup")
    torch.manual_seed(3)
    first = sampled.generate(prompt[None], **options)
    torch.manual_seed(3)
    assert sampled.generate(prompt[None], **options).equal(first)
    assert first.shape == (1, 96)


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        ([5, 199], "token id 199, the vocabulary has 199"),
        ([-1], "token id -1"),
        ([0.5], "float32"),
        ([[1, 2]], r"\[1, 2\]"),
        ("text", "'text', expected token ids"),
        (None, "None, expected token ids"),
    ],
)
def test_what_is_no_draft_is_refused(drafted, ids, draft, words):
    """A draft of anything but token ids is one line, and the model can still be used."""
    model = drafted(lambda *_: draft)
    with pytest.raises(PluginError, match=words):
        model.generate(ids(5)[None], max_new_tokens=4, **GREEDY)
    model._drafter = None
    assert model.generate(ids(5)[None], max_new_tokens=4, **GREEDY).shape == (1, 9)


def test_a_drafter_is_closed_with_the_model(drafted):
    """A draft source that holds something is closed when the model is."""

    class Holding(Closing):
        closed = False

        def __call__(self, token_ids, num_tokens):
            return []

        def close(self):
            self.closed = True

    drafter = Holding()
    drafted(drafter).close()
    assert drafter.closed


class TestLookup(DrafterConformance):
    """What followed the last tokens before."""

    @classmethod
    def open_drafter(cls, request):
        return LookupDrafter()
