"""A run for whose last token there is no memory is refused before its first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ollm
from ollm_core import DoesNotFitError
from ollm_core.engine.batch import NewTokens


def run(directory, prompts, num_new, mask=None, **options):
    """Greedy tokens, none of them the last of a text, and the model's stats or its refusal."""
    with ollm.load(directory, device="cpu", attention="exact", **options) as model:
        try:
            model.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
            )
        except DoesNotFitError as refused:
            return refused, model.stats
        return None, model.stats


@pytest.mark.parametrize("kv", ["device", "host"])
def test_the_least_that_is_named_does_and_less_is_refused_at_once(tiny, ids, kv):
    """Whichever memory the keys and values of 700 tokens are in."""
    name = f"{kv}_memory"
    budgets = {"device_memory": 4_000_000, "host_memory": 4_000_000, name: 200_000}
    for _ in range(5):
        refused, stats = run(tiny, ids(40)[None], 660, kv=kv, **budgets)
        if refused is None:
            break
        assert (stats.weight_passes, stats.weight_bytes_read) == (0, 0)
        assert refused.memory == name.replace("_", " ")
        budgets[name] = refused.needed_bytes
    assert refused is None
    assert stats.weight_passes == 660
    budgets[name] -= 1
    refused, stats = run(tiny, ids(40)[None], 660, kv=kv, **budgets)
    assert refused.needed_bytes == budgets[name] + 1
    assert stats.weight_passes == 0
    assert "after" in str(refused)


def test_padding_takes_no_room(tiny, ids):
    """Rows count as long as they are: the same host memory does for a batch that is padded."""
    prompts = ids(2 * 500).view(2, 500)
    mask = torch.ones_like(prompts)
    mask[0, :490] = 0
    budgets = {"device_memory": 8_000_000, "host_memory": 1, "kv": "host"}
    needed = {}
    for name, used in (("padded", mask), ("whole", None)):
        refused, _ = run(tiny, prompts, 8, used, **budgets)
        needed[name] = refused.needed_bytes
    assert needed["padded"] < needed["whole"]
    refused, stats = run(tiny, prompts, 8, mask, **budgets | {"host_memory": needed["padded"]})
    assert refused is None
    assert stats.weight_passes == 8


@pytest.fixture
def many(make_llama, ids):
    """A pass planner, its accounts, and a store with 90 sequences: of half of them the first two
    blocks are shared.
    """
    with ollm.load(make_llama(torch.bfloat16), device="cpu", kv="device") as model:
        cache = model.new_cache()
        store = cache.store
        document = store.new_sequence()
        model.engine.run(store, [NewTokens(document, ids(600), 0)])
        rows = [store.fork(document) for _ in range(45)] + [store.new_sequence() for _ in range(45)]
        yield model.engine._pass_planner, model.accounts.device, store, rows


def exactly(planner, store, work):
    """Whether a pass fits, by asking about as many rows as there are."""
    try:
        planner.choose(store, work)
    except DoesNotFitError:
        return False
    return True


def test_fewer_shapes_are_traced_and_what_fits_is_what_fitted(many):
    """Whatever the number of rows, their lengths and the memory that there is: the answer is that
    of asking about every number itself.
    """
    planner, account, store, rows = many
    whole = account.limit

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.integers(1, 90),
        st.integers(0, 89),
        st.lists(st.integers(0, 900), min_size=1, max_size=4),
        st.integers(-3000, 3000),
    )
    def check(number, first, lengths, beside):
        work = []
        for place in range(number):
            row = rows[(first + place) % len(rows)]
            start = max(lengths[place % len(lengths)], store.num_tokens(row))
            work.append(NewTokens(row, torch.zeros(1, dtype=torch.long), start))
        account.limit = 1
        try:
            planner.choose(store, work)
        except DoesNotFitError as error:
            least = error.needed_bytes
        for limit in (least - 1, least, least + beside, whole):
            account.limit = limit
            assert planner.fits(store, work) == exactly(planner, store, work)
        account.limit = least
        assert planner.fits(store, work)
        account.limit = least - 1
        assert not planner.fits(store, work)

    with torch.no_grad():
        check()
    account.limit = whole
