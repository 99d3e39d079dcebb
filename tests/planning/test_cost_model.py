"""What a pass moves, told from sizes alone: exact numbers for a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ollm_adapter_llama import LlamaAdapter
from ollm_core.calibration.rates import Rate, find_rates
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.model.spec import inspect_model
from ollm_core.planning.cost_model import Estimate, PassCost, Product
from ollm_core.planning.dry_run import Budgets, DryRun, Scenario

ROOMY = Budgets(10**8, 10**8)
LAYERS = 12


@pytest.fixture
def dry_run_of(make_llama):
    """Of a tiny Llama that is stored in bfloat16, with 4 query and 2 KV heads of 16."""
    directory = make_llama(torch.bfloat16, num_hidden_layers=LAYERS)

    def make(dtype):
        return DryRun(
            inspect_model(
                LlamaAdapter(),
                read_config(directory),
                open_checkpoint(directory),
                {},
                dtype=dtype,
                device=torch.device("cpu"),
                where=directory,
                bare=True,
            )
        )

    return make


def test_exact_attention_copies_all_keys(dry_run_of):
    """A decode step writes KV in one piece, then for each query head, and reads that; block-wise it
    does not. The prompt's scores are gone through as well.
    """
    dry_run = dry_run_of("bfloat16")
    estimate = Estimate(dry_run.spec)
    scenario = Scenario(1000, 10, kv="device", attention="exact", chunk_size=256)
    costs = {}
    for attention in ("exact", "blockwise"):
        asked = replace(scenario, attention=attention)
        run = dry_run.run(ROOMY, asked)
        costs[attention] = estimate.prompt(run, asked), estimate.token(run, asked)
    (exact_prompt, exact), (prompt, token) = costs["exact"], costs["blockwise"]
    kept = LAYERS * 1000 * 2 * 16 * 2 * 2  # read once
    copied = LAYERS * 1000 * 2 * 16 * 2 * (2 + 2 * 4)
    assert exact.memory_bytes - token.memory_bytes == kept + copied
    assert exact.attention == token.attention == LAYERS * 1000 * 4 * 4 * 16
    assert exact.products == token.products
    ends = (256, 512, 768, 990)
    pairs = LAYERS * (256 * (256 + 512 + 768) + 222 * 990)
    scores = 8 * 4 * pairs * 2
    copied = LAYERS * sum(ends) * 2 * 16 * 2 * (2 + 2 * 4)
    assert exact_prompt.memory_bytes - prompt.memory_bytes == scores + copied
    hidden_pairs = pairs - LAYERS * 990 * 991 / 2
    assert exact_prompt.attention - prompt.attention == 4 * 4 * 16 * hidden_pairs


def test_streamed_weights_of_another_dtype_are_made_anew(dry_run_of):
    """Which a step pays for; with room for all of them it does not."""
    dry_run = dry_run_of("float32")
    estimate = Estimate(dry_run.spec)
    scenario = Scenario(200, 5, kv="disk", attention="blockwise")
    least = dry_run.least(scenario, Budgets(1, 1))
    tight, roomy = dry_run.run(least, scenario), dry_run.run(ROOMY, scenario)
    units = dry_run.spec.units.in_pass_order
    whole = sum(p.num_bytes(torch.float32) for unit in units for p in unit.parameters)
    assert tight.held.converted_bytes == whole - tight.held.resident_bytes > 0
    assert roomy.held.converted_bytes == 0
    more = estimate.token(tight, scenario).memory_bytes
    most = estimate.token(roomy, scenario).memory_bytes
    assert more - most == 2 * tight.held.converted_bytes


def test_weights_as_stored_are_not(dry_run_of):
    """Streamed bfloat16 is used where it was read."""
    dry_run = dry_run_of("bfloat16")
    scenario = Scenario(200, 5, kv="disk", attention="blockwise")
    held = dry_run.run(dry_run.least(scenario, Budgets(1, 1)), scenario).held
    assert held.streamed_bytes > 0 == held.converted_bytes


def test_what_is_multiplied_and_by_how_many_rows(dry_run_of):
    """Layers by a chunk of a prompt at a time, the head by last rows; a step by its sequences."""
    dry_run = dry_run_of("bfloat16")
    estimate = Estimate(dry_run.spec)
    scenario = Scenario(610, 10, batch=3, kv="device", attention="blockwise", chunk_size=256)
    run = dry_run.run(ROOMY, scenario)
    units = dry_run.spec.units
    dense = sum(
        p.shape[0] * p.shape[1] for u in units.layers for p in u.parameters if len(p.shape) == 2
    )
    prompt, token = estimate.prompt(run, scenario), estimate.token(run, scenario)
    layers, head = prompt.products
    assert (layers.weights, layers.rows, layers.times) == (dense, 200, 9)  # three chunks of each
    assert head.rows == 3
    assert [one.rows for one in token.products] == [3, 3]
    assert [one.times for one in token.products] == [1, 1]
    pairs = LAYERS * (600 * 601) / 2
    assert prompt.layer_calls == 2 * 9 * LAYERS + 3 * pairs / 256 / 256 / 4
    assert token.layer_calls == 2 * LAYERS + 3 * LAYERS * 610 / 256 / 4
    assert prompt.numbers == 600 * token.numbers + 3 * pairs / 256 * 4 * 16
    assert prompt.loaded_bytes == run.held.resident_bytes > 0 == token.loaded_bytes
    assert prompt.past_bytes == 0 == token.past_bytes


def test_kv_in_files_is_waited_for(dry_run_of):
    """At each step; a prompt's chunks compute long enough beside its reading."""
    dry_run = dry_run_of("bfloat16")
    estimate = Estimate(dry_run.spec)
    scenario = Scenario(610, 10, kv="disk", attention="blockwise", chunk_size=256)
    run = dry_run.run(ROOMY, scenario)
    token = estimate.token(run, scenario)
    assert token.past_bytes == estimate.kv_bytes(scenario) == token.disk_bytes > 0
    prompt = estimate.prompt(run, scenario)
    assert prompt.past_bytes == 0 < prompt.disk_bytes


def test_seconds_add_up_on_the_device_and_not_with_the_disk():
    """What the device does comes one after the other, while the disk reads."""
    rates = replace(
        find_rates(Path(), torch.device("cpu"), torch.float32),
        disk=Rate(100.0, ""),
        memory=Rate(10.0, ""),
        layer=Rate(2.0, ""),
        states=Rate(5.0, ""),
        products={1: 4.0, 8: 16.0},
        blocks={64: {1: 2.0, 512: 8.0}, 128: {1: 7.0}},
        fresh=Rate(200.0, ""),
    )
    cost = PassCost(
        disk_bytes=300,
        bus_bytes=0,
        memory_bytes=20,
        products=[Product(weights=6, rows=1, times=2), Product(weights=1, rows=8)],
        attention=4,
        new_tokens=1,
        head_dim=80,
        exact_attention=False,
        layer_calls=6,
        numbers=10,
        converting_seconds=0.5,
        loaded_bytes=50,
        past_bytes=25,
    )
    device = 20 / 10 + 2 * 6 * 2 / 4 + 2 * 8 / 16 + 4 / 2 + 6 / 2 + 10 / 5 + 0.5
    waiting = 50 / 100 + 50 / 200 + 25 / 100
    assert cost.seconds(rates) == {"disk": 3, "memory": device + waiting}
    assert cost.seconds(replace(rates, products={1: 64.0}))["compute"] < device
    uploaded = replace(rates, bus=Rate(50.0, ""))
    assert cost.seconds(uploaded) == {"disk": 3, "bus": 0, "memory": device}
    exact = replace(cost, exact_attention=True)
    assert exact.seconds(rates)["memory"] == device + waiting - 4 / 2 + 4 / 4
