"""What `ollm_core.testing` gives to tests does what it says, on a tiny Llama."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core import ConfigError, OllmError, ReadError
from ollm_core.errors import PluginError
from ollm_core.testing import (
    DryRun,
    NewTokens,
    Registry,
    TierTracker,
    bound_parameters,
    check_declarations,
    check_model,
    counted_reads,
    failing_reads,
    hold_weights,
    open_checkpoint,
    open_dry_run,
    plan_run,
    read_config,
    run_pass,
    share_traces,
    weight_tensors,
)

IDS = torch.arange(10, 30)


@pytest.fixture
def small(tiny):
    """A model that keeps no layer, so that each pass reads."""
    with ollm.load(tiny, device="cpu", device_memory="1GB", device_layers=0) as model:
        yield model


def test_parameters_are_those_of_the_checkpoint(tiny):
    """`bound_parameters` gives each tensor of the checkpoint, kept or streamed, whole."""
    adapter, config = LlamaAdapter(), read_config(tiny)
    shapes = {name: tensor.shape for name, tensor in open_checkpoint(tiny).tensors.items()}
    for all_of_them in (True, False):
        with ollm.load(tiny, device="cpu", device_memory="1GB") as model:
            hold_weights(model, all_of_them=all_of_them)
            kept = model.stats.device_layers
            found = dict(bound_parameters(model, adapter.layout(config)))
        assert kept == (adapter.layout(config).num_layers if all_of_them else 0)
        assert {name: tuple(value.shape) for name, value in found.items()} == shapes


def test_reads_are_counted(small):
    """A pass asks for the tensors of `weight_tensors`, each once, and only inside of the block."""
    model, wanted = small, {tensor.name for tensor in weight_tensors(small)}
    model(input_ids=IDS[None])  # which reads ahead for the next
    with counted_reads(model) as seen:
        for _ in range(2):
            model(input_ids=IDS[None])
    assert seen.keys() <= wanted
    assert any(".layers.1." in name for name in seen)
    before = seen.total()
    model(input_ids=IDS[None])
    assert seen.total() == before


def test_reads_fail_and_the_model_goes_on(small):
    """After so many reads each is refused, and none is after the block."""
    expected = small(input_ids=IDS[None]).logits
    for after in (0, 1):
        with failing_reads(small, after):
            with suppress(ReadError):  # what was read ahead is used up
                small(input_ids=IDS[None])
            with pytest.raises(ReadError, match="the disk is gone"):
                small(input_ids=IDS[None])
    assert torch.equal(small(input_ids=IDS[None]).logits, expected)


def test_a_pass_over_rows(small):
    """`run_pass` gives the logits that `forward` gives, row by row, and the store the tokens."""
    cache = small.new_cache()
    store = cache.store
    rows = [NewTokens(store.new_sequence(), ids, 0, len(ids)) for ids in (IDS, IDS[:7])]
    for row, logits in zip(rows, run_pass(small, store, rows), strict=True):
        expected = small(input_ids=row.token_ids[None]).logits[0]
        torch.testing.assert_close(logits, expected)
        assert store.num_tokens(row.sequence) == len(row.token_ids)


def test_traces_are_shared_by_key(tiny):
    """A second model of one key traces nothing that the first has traced, one of another does."""
    traces = {}
    sizes = []
    for key in ("one", "one", "two"):
        with ollm.load(tiny, device="cpu", device_memory="1GB") as model:
            share_traces(model, traces, key)
            model(input_ids=IDS[None])
        sizes.append([len(known) for known, _ in traces.values()])
    first, second, third = sizes
    assert first[0] > 0
    assert second == first
    assert third == first * 2


def test_a_plan_is_what_the_run_holds(tiny):
    """The peaks that `plan_run` tells are those of the run's accounts, in the limits it gives; a
    subclass that plans wrong is heard.
    """

    class Twice(DryRun):
        def run(self, budgets, scenario, **options):
            return super().run(budgets, replace(scenario, context=2 * scenario.context), **options)

    adapter = LlamaAdapter()
    registry = Registry.of(adapter)
    options = {"num_tokens": 22, "num_new": 2, "kv": "host", "chunk_size": None}
    for roomy in (False, True):
        plan = plan_run(open_dry_run(adapter, tiny, registry), roomy=roomy, **options)
        with ollm.load(
            tiny,
            device="cpu",
            device_memory=plan.device_memory,
            host_memory=plan.host_memory,
            attention="exact",
            kv="host",
        ) as model:
            model.generate(IDS[None], max_new_tokens=2, do_sample=False)
            stats = model.stats
        assert stats.device_peak_bytes == plan.device_peak <= plan.device_memory
        assert stats.host_peak_bytes == plan.host_peak <= plan.host_memory
    wrong = plan_run(open_dry_run(adapter, tiny, registry, make=Twice), roomy=True, **options)
    assert wrong.device_peak > plan.device_peak


def test_memory_is_told_apart(small):
    """KV counts for the host unless it is on the device; both go down when the cache is closed."""
    for on_device in (True, False):
        with TierTracker(kv_on_device=on_device) as tracker:
            cache = small.new_cache(kv="device" if on_device else "host")
            small(input_ids=IDS[None], past_key_values=cache)
            held = cache.store.tier_bytes()
            stored = held.device if on_device else held.host
            host = tracker.host_used
            cache.close()
        assert stored
        assert tracker.peak
        assert host == (0 if on_device else stored)
        assert tracker.host_used == 0


def test_declarations_are_checked_in_turn(tiny):
    """What is not what it is called is a PluginError, what the adapter refuses is its own error."""

    class NoLayout(LlamaAdapter):
        def layout(self, config):
            return None

    config, names = read_config(tiny), list(open_checkpoint(tiny).tensors)
    check_declarations(LlamaAdapter(), config, lambda text: names)
    with pytest.raises(PluginError, match="layout"):
        check_declarations(NoLayout(), config, lambda text: names)
    with pytest.raises(ConfigError):
        check_declarations(LlamaAdapter(), {**config, "hidden_size": -1}, lambda text: names)


def test_a_model_that_core_cannot_run():
    """The layout must lead to the modules of transformers' model."""
    config, layout = (
        LlamaAdapter().tiny_config(),
        LlamaAdapter().layout(LlamaAdapter().tiny_config()),
    )
    check_model(config, layout)
    with pytest.raises(OllmError, match=r"model\.nothing"):
        check_model(config, replace(layout, norm="model.nothing"))
