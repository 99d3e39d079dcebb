"""A model of transformers is followed wherever it keeps what it remembers."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from ollm_conformance.kinds import same_kinds
from ollm_conformance.past import PastCalls
from ollm_core import CacheKind, StateShape

CUTS = (20, 21, 22, 26)


def made(model_type):
    """A tiny random model."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()


def texts():
    """Two of them, [1, T]."""
    return torch.randint(3, 250, (2, 1, CUTS[-1]), generator=torch.Generator().manual_seed(0))


def follow(calls, ids, past):
    """Logits of the last token of each call, one after the other as asked for."""
    for start, end in zip((0, *CUTS), CUTS, strict=False):
        yield calls.call(ids[:, start:end], past, last_only=True)


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "xlstm", "mamba2", "bart", "phi3"])
def test_texts_in_turns(model_type):
    """One model goes on with each of two texts as with that alone."""
    model = made(model_type)
    expected = []
    for ids in texts():
        calls = PastCalls(copy.deepcopy(model))
        expected.append(list(follow(calls, ids, calls.new_past())))
    calls = PastCalls(model)
    pasts = [calls.new_past() for _ in range(2)]
    runs = [follow(calls, ids, past) for ids, past in zip(texts(), pasts, strict=True)]
    found = list(zip(*runs, strict=True))
    assert [past.num_tokens for past in pasts] == [CUTS[-1]] * 2
    for logits, wanted in zip(found, zip(*expected, strict=True), strict=True):
        for one, other in zip(logits, wanted, strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(*found[-1])


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "xlstm", "lfm2"])
def test_a_copy_goes_on_by_itself(model_type):
    """What is remembered can be copied, and the copy goes on as the first would have."""
    calls, (first, second) = PastCalls(made(model_type)), texts()
    past = calls.new_past()
    calls.call(first[:, :20], past)
    copied = copy.deepcopy(past)
    expected = calls.call(second[:, 20:21], past)
    assert not torch.equal(calls.call(first[:, 21:22], copy.deepcopy(copied)), expected)
    assert torch.equal(calls.call(second[:, 20:21], copied), expected)


@pytest.mark.parametrize(
    ("model_type", "begins_anew"),
    [
        ("recurrent_gemma", True),  # one of whose two states counts
        ("jamba", True),
        ("mamba2", False),
        ("falcon_h1", False),
        ("xlstm", False),
        ("phi3", False),
    ],
)
def test_what_begins_anew(model_type, begins_anew):
    """With a call of several tokens, though something was before."""
    assert PastCalls(made(model_type)).begins_anew is begins_anew


def test_positions_go_on():
    """Bamba counts from 0 in each call that does not say where it is."""
    calls, ids = PastCalls(made("bamba")), texts()[0]
    whole = calls.call(ids, calls.new_past())
    past = calls.new_past()
    found = [calls.call(piece, past) for piece in ids.split((13, 13), dim=1)]
    assert (torch.cat(found, 1) - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_layers_show_what_is_kept():
    """As many as the decoder has, with the states that lie elsewhere."""
    ids = texts()[0]

    def past_of(model_type):
        calls = PastCalls(made(model_type))
        past = calls.new_past()
        calls.call(ids, past)
        return past

    states = StateShape((64, 3)), StateShape((64,), float32=True)
    recurrent = CacheKind("recurrent", 0, 0, None, states)
    sliding = CacheKind("sliding", 4, 16, 24)
    kinds = [recurrent, recurrent, sliding, recurrent]
    same_kinds(kinds, past_of("recurrent_gemma"), "RecurrentGemma")
    wrong = CacheKind("recurrent", 0, 0, None, states[:1])
    with pytest.raises(AssertionError, match="layer 1: expected states"):
        same_kinds([recurrent, wrong, *kinds[2:]], past_of("recurrent_gemma"), "RecurrentGemma")
    assert len(past_of("bart").layers) == 4
