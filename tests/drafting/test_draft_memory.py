"""Memory of a draft model: set aside before the run, used, and refused in one line."""

from __future__ import annotations

import pytest
from draft_models import GREEDY, load, text_of

from ollm_core import DoesNotFitError
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.tracker import AllocationTracker


@pytest.mark.parametrize("family", ["gpt", "qwen"])
def test_what_it_takes_is_set_aside(make, ids, family):
    """Before the first pass, to the byte of its accounts: all weights stay in memory, no pass goes
    past its part, and torch allocates no more than that; a batch needs none of it for KV.
    """
    main, draft, prompt = make("llama", 3), make(family), ids(300)
    with load(main, draft, device_memory="30MB", host_memory="30MB") as model:
        drafter = model._drafter
        opened = model.accounts.device.kinds[MemoryKind.DRAFT_MODEL]
        model.generate(prompt[None], max_new_tokens=8, **GREEDY)
        own = drafter.part.accounts
        assert model.accounts.device.kinds[MemoryKind.DRAFT_MODEL] == own.device.limit > opened
        held = sum(own.device.kinds.get(kind, 0) for kind in ("weights", "resident weights"))
        with AllocationTracker("cpu") as tracker:
            drafter._forget()
            drafter(prompt, 10)
        assert 0 < tracker.peak <= own.device.limit - held
        for account in (own.device, own.host, model.accounts.device, model.accounts.host):
            assert account.peak <= account.limit
        file_bytes = (draft / "model.safetensors").stat().st_size
        assert drafter.engine._weights.resident_bytes > 0.8 * (file_bytes - 2 * 199 * 64 * 4)
        model.generate(prompt[:40].view(2, 20), max_new_tokens=3, **GREEDY)
        assert model.accounts.device.kinds[MemoryKind.DRAFT_MODEL] == opened
        assert own.device.used <= opened
    for account in (own.device, own.host, model.accounts.device, model.accounts.host):
        assert account.used == 0


def test_no_more_is_set_aside_than_is_used(make, ids):
    """A text that is read in the largest pieces, the last one at its end, takes all but a
    fiftieth of what is set aside for it.
    """
    with load(make("llama"), make("llama")) as model:
        drafter, text = model._drafter, ids(520)
        drafter.begin(520)
        drafter.catch_up(text[:265])
        drafter.catch_up(text)
        drafter(text[:-2], 2)
        own = drafter.part.accounts.device
        assert 0.98 * own.limit <= own.peak <= own.limit


def test_what_does_not_fit_is_refused_before_the_run(make, ids):
    """With one line that names what would do, and that does."""
    main, draft, prompt = make("llama"), make("llama", 1), ids(30)
    plain, _ = text_of(main, prompt, 12)
    refused = refusal_of(main, prompt, draft, 600_000)
    assert "for draft model beside the model" in str(refused)
    assert "allow at least" in str(refused)
    for _ in range(6):  # each names what is missing at that moment
        budget, refused = (
            refused.needed_bytes,
            refusal_of(main, prompt, draft, refused.needed_bytes),
        )
        if refused is None:
            break
        assert refused.needed_bytes > budget
    text, stats = text_of(main, prompt, 12, draft=draft, device_memory=budget, kv="host")
    assert text.equal(plain)
    assert stats.device_peak_bytes <= budget


def refusal_of(main, prompt, draft, budget):
    """What is said of too little device memory, or None."""
    try:
        text_of(main, prompt, 12, draft=draft, device_memory=budget, kv="host")
    except DoesNotFitError as refused:
        return refused
    return None


def test_kept_weights_give_way_to_longer_drafts(make, make_llama, ids):
    """The draft model's KV of a longer text takes the place of weights, comes back after it, and
    what leaves none to stream through is refused; shorter texts go on as before.
    """
    main, prompt = make_llama(name="main", num_hidden_layers=12), ids(30)
    with load(main, make("llama"), device_memory="4MB", kv="host") as model:

        def kept(num_tokens):
            model.generate(ids(num_tokens)[None], max_new_tokens=2, **GREEDY)
            assert model.stats.device_peak_bytes <= 4_000_000
            return model.weights.num_device_layers

        text = model.generate(prompt[None], max_new_tokens=12, **GREEDY)
        numbers = [kept(n) for n in (30, 1500, 30)]
        assert numbers[0] == numbers[2] > numbers[1] > 0
        with pytest.raises(DoesNotFitError, match="device memory: need"):
            kept(4000)
        assert model.generate(prompt[None], max_new_tokens=12, **GREEDY).equal(text)
        assert kept(30) == numbers[0]
