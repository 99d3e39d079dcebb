"""Hidden states on the host: the same bits, and a device peak that does not know the prompt's
length.
"""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_core.device.offload import ActivationOffload
from ollm_core.errors import DoesNotFitError

CPU = torch.device("cpu")


def test_what_is_offloaded_to_the_host_is_a_copy_and_comes_back_as_one():
    """On a CPU too, where both memories are one."""
    offload = ActivationOffload(CPU, on_host=True)
    value = torch.randn(2, 3)
    place = offload.store(value)
    fetched = offload.fetch(place)
    assert len({t.data_ptr() for t in (value, place, fetched)}) == 3
    assert torch.equal(fetched, value)
    again = offload.put(place, 2 * value)
    assert again.data_ptr() == place.data_ptr()
    assert torch.equal(offload.rows(again, torch.tensor([1])), 2 * value[1:])
    offload.add_rows(again, torch.tensor([0]), value[:1])
    assert torch.equal(again[0], 3 * value[0])
    half = offload.put(place, value.half())
    assert half.dtype == torch.float16
    assert half.data_ptr() == place.data_ptr()
    assert torch.equal(half, value.half())


@pytest.mark.parametrize("itemsize", [0, 4])
def test_what_gets_wider_stays_where_it_is_if_there_was_room_made_for_it(itemsize):
    """So that two sizes of one thing are never there at once."""
    offload = ActivationOffload(CPU, on_host=True)
    value = torch.randn(2, 3)
    place = offload.store(value.bfloat16(), itemsize)
    assert torch.equal(place, value.bfloat16())
    wider = offload.put(place, value)
    assert torch.equal(wider, value)
    assert (wider.data_ptr() == place.data_ptr()) == bool(itemsize)


def test_what_stays_on_the_device_is_not_copied():
    """There nothing moves but what a layer gives."""
    offload = ActivationOffload(CPU, on_host=False)
    value = torch.randn(2, 3)
    assert offload.store(value) is value
    assert offload.fetch(value) is value
    assert offload.put(value, torch.ones(2, 3)) is value
    assert torch.equal(value, torch.ones(2, 3))


OPTIONS = {"device": "cpu", "attention": "blockwise", "chunk_size": 64, "kv": "disk"}


def prefill(directory, prompt, **options):
    """Logits of the last position, the pass's plan, and the stats."""
    with ollm.load(directory, **OPTIONS, **options) as model:
        logits = model(input_ids=prompt[None], logits_to_keep=1).logits
        return logits, model.engine.counters.last_plan, model.stats


def least(directory, num_tokens):
    """The plan's least memory for a prompt."""
    plan = ollm.plan(directory, **OPTIONS, context=num_tokens + 1, max_new_tokens=1)
    return {
        "device_memory": plan.smallest_device_bytes,
        "host_memory": plan.smallest_host_bytes,
    }


@pytest.fixture
def make_wide(make_llama):
    """A model whose hidden states are most of what a prompt takes."""
    return lambda dtype: make_llama(dtype, hidden_size=256, intermediate_size=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_moves_hidden_states_to_the_host(make_wide, ids, dtype):
    """Where the device has no room for those of the whole prompt; and no bit changes."""
    directory, prompt = make_wide(dtype), ids(1024)
    roomy, plan, _ = prefill(directory, prompt)
    assert not plan.hidden_on_host
    budgets = least(directory, 1024)
    tight, plan, stats = prefill(directory, prompt, **budgets)
    assert plan.parts.host["hidden states"] == 1024 * 256 * dtype.itemsize
    assert stats.device_peak_bytes <= budgets["device_memory"]
    assert stats.host_peak_bytes <= budgets["host_memory"]
    assert torch.equal(roomy, tight)


def test_the_device_peak_does_not_grow_with_the_prompt(make_wide, ids):
    """But for ids and positions, 18 bytes of each token."""
    directory = make_wide(torch.float32)
    peaks = [
        prefill(directory, ids(n), **least(directory, n))[2].device_peak_bytes for n in (1024, 3072)
    ]
    assert peaks[1] - peaks[0] == (3072 - 1024) * 18


def test_less_than_the_least_of_either_memory_is_refused(make_wide, ids):
    """Before anything runs, by that memory's name."""
    directory = make_wide(torch.float32)
    budgets = least(directory, 1024)
    for name, num_bytes in budgets.items():
        with pytest.raises(DoesNotFitError) as refused:
            prefill(directory, ids(1024), **budgets | {name: num_bytes - 1})
        assert refused.value.memory == name.replace("_", " ")
        assert refused.value.needed_bytes == num_bytes
