"""Memory that runs short in the middle of a run: fewer weights are kept, the bits stay, and they
come back.
"""

from __future__ import annotations

import pytest
import torch
from families import Qwen3Moe
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core import DoesNotFitError
from ollm_core.memory.budgets import RESERVE_BYTES
from ollm_core.plugins.registry import Registry
from ollm_core.weights.eviction import Eviction, reserve_bytes

RESERVE = 200_000
FAMILIES = {"llama": LlamaAdapter, "qwen3-moe": Qwen3Moe}


@pytest.fixture(params=FAMILIES)
def open_model(request, tmp_path):
    """Opens a tiny random model, all of which fits."""
    adapter = FAMILIES[request.param]()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**adapter.tiny_config() | {"num_hidden_layers": 8})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")

    def load(**options):
        budgets = {"device_memory": "200MB", "host_memory": "100MB"}
        return ollm.load(
            tmp_path / "model",
            device="cpu",
            registry=Registry.of(adapter),
            **budgets | options,
        )

    return load


class Machine(Eviction):
    """The real thing, on a machine with `room` bytes for weights and a reserve, beside what each
    pass takes.
    """

    def __init__(self, model, room, seconds_a_look=0, seconds_a_pass=1.0):
        super().__init__(model.weights, self.free, reserve_bytes=RESERVE, clock=self.clock)
        self.room = room
        self.seconds_a_look = seconds_a_look
        self.seconds_a_pass = seconds_a_pass
        self.num_asked = self.others = 0
        model.engine._pass_planner.eviction = self

    now = 0

    def clock(self):
        self.now += getattr(self, "seconds_a_look", 0)
        return self.now

    def within(self, budgets, needed):
        self.now += self.seconds_a_pass
        self.others = needed.device + needed.host
        return super().within(budgets, needed)

    def relieve(self, num_done):
        self.others = 0  # taken by now
        super().relieve(num_done)

    def free(self):
        self.num_asked += 1
        return self.room + self.others - self._weights.in_memory.device


def steps(model, cache, ids, num_steps):
    """Logits of so many greedy steps, one by one."""
    found = []
    for _ in range(num_steps):
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        found.append(logits[0, -1])
        ids = logits[:, -1].argmax(-1)[:, None]
    return torch.stack(found), ids


def test_weights_give_way_and_come_back(open_model, ids):
    """Resident bytes fall when free memory does, grow when it is back, not before; every logit is
    that of a run without pressure. Memory is looked at once for each pass.
    """
    with open_model() as model:
        expected, _ = steps(model, model.new_cache(), ids(40)[None], 12)
        full, taken = model.stats.resident_bytes, model.weights.in_memory.device
        assert model.stats.times_short == 0
    with open_model() as model:
        machine = Machine(model, 10**9)
        cache = model.new_cache()
        first, token = steps(model, cache, ids(40)[None], 3)
        assert model.stats.resident_bytes == full
        told = []
        model.on_progress(told.append)
        machine.room = RESERVE + taken * 3 // 4  # another program takes the rest
        second, token = steps(model, cache, token, 3)
        kept = model.stats.resident_bytes
        assert 0 < kept < full
        assert model.weights.in_memory.device <= machine.room - RESERVE
        assert (model.stats.times_short, told[-1].given_up_bytes > 0) == (1, True)
        machine.room -= RESERVE // 2 - 1  # up and down a little: nothing moves
        third, token = steps(model, cache, token, 1)
        machine.room += RESERVE // 2 - 1
        fourth, token = steps(model, cache, token, 1)
        assert (model.stats.resident_bytes, model.stats.times_short) == (kept, 1)
        machine.room = RESERVE + 2 * taken
        fifth, token = steps(model, cache, token, 4)
        assert (model.stats.resident_bytes, model.stats.times_short) == (full, 1)
        assert told[-1].given_up_bytes == 0 < model.stats.most_given_up_bytes
        assert machine.num_asked == 12
    assert torch.equal(torch.cat([first, second, third, fourth, fifth]), expected)


def test_quick_passes_look_now_and_then(open_model, ids):
    """A look serves passes of a quarter of a second, unless one takes more; while memory is short
    each pass looks, and one after a failed allocation.
    """
    with open_model() as model:
        machine = Machine(model, 10**9, seconds_a_pass=0.1)
        cache = model.new_cache()
        _, token = steps(model, cache, ids(8)[None], 10)
        assert 3 <= machine.num_asked <= 5
        asked, taken = machine.num_asked, model.weights.in_memory.device
        machine.seconds_a_pass = 0
        model(input_ids=ids(120)[None], past_key_values=model.new_cache())  # takes more
        assert machine.num_asked == asked + 1
        machine.room, machine.seconds_a_pass = RESERVE + taken // 2, 0.3
        steps(model, cache, token, 1)
        assert model.stats.times_short == 1
        machine.seconds_a_pass, asked = 0.01, machine.num_asked
        _, token = steps(model, cache, token, 3)
        assert machine.num_asked == asked + 3
        machine.room = 10**9
        steps(model, cache, token, 2)
        asked = machine.num_asked
        steps(model, cache, token, 2)
        assert machine.num_asked == asked
        machine.give_way()
        steps(model, cache, token, 1)
        assert machine.num_asked == asked + 1


def test_memory_that_runs_short_in_a_long_prompt(open_model, ids):
    """Layers that had their turn go at once, before the pass is over, and what is kept of experts;
    the next pass keeps what there is room for. The logits are the same.
    """
    prompt = ids(600)[None]
    with open_model(chunk_size=64) as model:
        expected, _ = steps(model, model.new_cache(), prompt, 3)
        full = model.weights.in_memory.device
    with open_model(chunk_size=64) as model:
        machine = Machine(model, 10**9, seconds_a_look=1)
        held = []  # while the prompt is read

        def take(progress):
            if progress.stage == "prefill":
                held.append(model.weights.in_memory.device)
                if progress.steps_done == progress.steps_total // 2:
                    machine.room = full // 4  # another program takes the rest

        model.on_progress(take)
        cache = model.new_cache()
        first, token = steps(model, cache, prompt, 1)
        asked = machine.num_asked
        machine.seconds_a_look = machine.seconds_a_pass = 0  # right after it
        rest, _ = steps(model, cache, token, 2)
        assert machine.num_asked >= asked + 1
        found = torch.cat([first, rest])
        assert max(held) > full // 3
        assert held[-1] < max(held) // 2
        assert model.stats.times_short >= 1
        assert model.weights.in_memory.device <= max(machine.room, full // 4)
    assert torch.equal(found, expected)


def test_nothing_left_to_give(open_model, ids):
    """With no memory free at all a run goes on with the least that it can hold, and says so
    once.
    """
    with open_model() as model:
        expected, _ = steps(model, model.new_cache(), ids(40)[None], 4)
    with open_model() as model:
        Machine(model, 0)
        found, _ = steps(model, model.new_cache(), ids(40)[None], 4)
        assert model.stats.resident_bytes == 0
        assert model.stats.times_short == 1
    assert torch.equal(found, expected)


PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,  # in inference mode it is one operation
}


class Failing(TorchDispatchMode):
    """The next matrix products of a forward pass find no memory: `times` of them, after `after`."""

    def __init__(self, after, times):
        super().__init__()
        self.after, self.times = after, times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            self.after -= 1
            if self.after < 0 and self.times > 0 and args[0].device.type == "cpu":
                self.times -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return func(*args, **(kwargs or {}))


def test_a_failed_allocation_is_tried_again(open_model, ids):
    """With next to nothing kept; the logits are the same, the cache too, and weights come back
    some passes later.
    """
    with open_model() as model:
        expected, _ = steps(model, model.new_cache(), ids(40)[None], 16)
        full = model.stats.resident_bytes
    with open_model() as model:
        cache = model.new_cache()
        first, token = steps(model, cache, ids(40)[None], 2)
        with Failing(after=5, times=1) as failing:
            second, token = steps(model, cache, token, 1)
        assert failing.times == 0
        assert model.stats.resident_bytes == 0
        third, token = steps(model, cache, token, 13)
        assert model.stats.resident_bytes == full
        assert model.stats.times_short == 1
    assert torch.equal(torch.cat([first, second, third]), expected)


def test_what_fails_again_is_told(open_model, ids):
    """One line, and the cache is as before: the next pass is right."""
    with open_model() as model:
        cache = model.new_cache()
        _, token = steps(model, cache, ids(40)[None], 2)
        with (
            Failing(after=5, times=2),
            pytest.raises(DoesNotFitError, match=r"^out of memory .*Tried to allocate 2 GiB"),
        ):
            steps(model, cache, token, 1)
        assert cache.get_seq_length() == 41
        found, _ = steps(model, cache, token, 1)
    with open_model() as model:
        cache = model.new_cache()
        _, token = steps(model, cache, ids(40)[None], 2)
        expected, _ = steps(model, cache, token, 1)
    assert torch.equal(found, expected)


def test_a_small_container_keeps_less_free():
    """What a large machine leaves alone would be a third of it."""
    assert reserve_bytes(1_500 << 20) == 1_500 << 16
    assert reserve_bytes(24 << 30) == RESERVE_BYTES
