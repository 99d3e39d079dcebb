"""A tiny Llama that is run as tests run models."""

from __future__ import annotations

import torch

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core.testing import (
    NewTokens,
    bound_parameters,
    hold_weights,
    open_checkpoint,
    read_config,
    run_pass,
    save_each_layer,
    share_traces,
)

IDS = torch.arange(10, 30)


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


def test_each_layer_can_be_saved(tiny, tmp_path):
    """However quick a pass is, it writes how far it is after each layer."""
    saved = []
    with ollm.load(tiny, device="cpu", device_memory="1GB", kv="disk", kv_dir=tmp_path) as model:
        assert save_each_layer(model)
        model.on_progress(lambda progress: saved.append(progress.saved_layers))
        model(input_ids=torch.arange(10, 20).repeat(30)[None], logits_to_keep=1)
        assert sorted({*saved}) == [*range(model.config.num_hidden_layers + 1)]
