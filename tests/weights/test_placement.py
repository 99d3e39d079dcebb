"""Where units are kept: in even order, inside the budgets, the same bits, and a plan that knows."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from weight_units import unit_of

import ollm
from ollm_core import DoesNotFitError, InputError
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.cli.main import main
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.budgets import Budgets, LayerLimits
from ollm_core.memory.pair import PerMemory
from ollm_core.model.spec import inspect_model
from ollm_core.planning.dry_run import DryRun, Scenario
from ollm_core.plugins.registry import Registry
from ollm_core.weights.placement import spread_order
from ollm_core.weights.sources.posix import open_source
from ollm_core.weights.streamer import TieredStreamer
from ollm_core.weights.units import Units

NUM_LAYERS = 6
NEW = 3


@pytest.fixture
def model(make_llama):
    """Six layers in bfloat16."""
    return make_llama(torch.bfloat16, num_hidden_layers=NUM_LAYERS)


def generate(model, ids):
    """Greedy tokens, and the statistics after them."""
    found = model.generate(ids(40)[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return found.tolist(), model.stats


def dry_run(directory, device="cpu"):
    """A run of the model on paper, on a device that need not be here."""
    config = read_config(directory)
    return DryRun(
        inspect_model(
            Registry.discover().adapter_for(config),
            config,
            open_checkpoint(directory),
            {},
            dtype="auto",
            device=torch.device(device),
            where=directory,
            bare=True,
        )
    )


@pytest.mark.parametrize("layers", [0, 2, 5, NUM_LAYERS, 99])
def test_at_most_so_many(model, ids, layers):
    """In a budget for all: that many, or all there are. The tokens are those of a model that keeps
    everything, and the peaks those of the plan, byte for byte.
    """
    budgets = Budgets(10**8, 10**8)
    options = {"device": "cpu", "device_memory": budgets.device, "host_memory": budgets.host}
    with ollm.load(model, **options) as everything:
        expected, _ = generate(everything, ids)
    with ollm.load(model, **options, device_layers=layers) as opened:
        found, stats = generate(opened, ids)
    assert found == expected
    assert stats.device_layers == min(layers, NUM_LAYERS)
    scenario = Scenario(40 + NEW, NEW, layers=LayerLimits(layers, None))
    planned = dry_run(model).run(budgets, scenario)
    assert planned.held.num_device_layers == stats.device_layers
    assert planned.held.resident_bytes == stats.resident_bytes
    assert planned.device_peak.device_bytes == stats.device_peak_bytes
    assert planned.host_peak.host_bytes == stats.host_peak_bytes


def test_never_over_the_budget(model, ids):
    """More than fit are asked for: as many as fit are kept. The least budget is the same as
    without, but for a model that would be kept whole.
    """
    planner = dry_run(model)
    asked = Scenario(40 + NEW, NEW, kv="host", layers=LayerLimits(NUM_LAYERS - 1, None))
    least = planner.least(asked, Budgets(1, 1))
    layer_bytes = planner.spec.units.layers[0].file_bytes
    budgets = Budgets(least.device + 2 * layer_bytes, least.host)
    with ollm.load(
        model,
        device="cpu",
        device_memory=budgets.device,
        host_memory=budgets.host,
        kv="host",
        device_layers=NUM_LAYERS - 1,
    ) as opened:
        _, stats = generate(opened, ids)
    planned = planner.run(budgets, asked)
    assert 0 < stats.device_layers < NUM_LAYERS - 1
    assert stats.device_layers == planned.held.num_device_layers
    assert stats.device_peak_bytes == planned.device_peak.device_bytes <= budgets.device


def test_two_memories(model):
    """Beside a GPU, those for the host are others than those on the device."""
    planner, budgets = dry_run(model, "cuda:0"), Budgets(10**9, 10**9)
    for limits, expected in (
        (LayerLimits(2, 3), (2, 3)),
        (LayerLimits(2, None), (2, NUM_LAYERS - 2)),
        (LayerLimits(0, 0), (0, 0)),
        (LayerLimits(None, 1), (NUM_LAYERS, 0)),
    ):
        held = planner.run(budgets, Scenario(40 + NEW, NEW, layers=limits)).held
        assert (held.num_device_layers, held.num_host_layers) == expected


def test_changed_between_passes(model, ids):
    """As the predecessor's `offload_layers_to_cpu` does; None is as many as fit again."""
    with ollm.load(model, device="cpu", device_memory="50MB") as opened:
        counts = []
        for layers in (None, 1, 4, None):
            opened.keep_layers(layers)
            counts.append(generate(opened, ids)[1].device_layers)
        assert counts == [NUM_LAYERS, 1, 4, NUM_LAYERS]


def test_the_predecessors_words(model, ids):
    """On a CPU both numbers are of its memory."""
    old = ollm.AutoInference(model, device="cpu")
    with old.model:
        old.offload_layers_to_cpu(layers_num=2)
        assert generate(old.model, ids)[1].device_layers == 2
        old.offload_layers_to_gpu_cpu(gpu_layers_num=1, cpu_layers_num=2)
        assert generate(old.model, ids)[1].device_layers == 3


def test_what_makes_no_sense_is_refused(model):
    """One line each."""
    with pytest.raises(InputError, match=r"^device_layers is -1, expected at least 0\. hint: "):
        ollm.load(model, device="cpu", device_layers=-1)
    with pytest.raises(InputError, match=r"^host_layers: need a GPU, have a CPU\. hint: "):
        ollm.plan(model, device="cpu", host_layers=2)


def test_plan_says_so(model, capfd):
    """In its table and in JSON."""
    arguments = ["plan", str(model), "--device", "cpu", "--context", "300", "--device-layers", "2"]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        assert ended.value.code == 0
        out, _ = capfd.readouterr()
        if more:
            assert json.loads(out)["placement"]["device_layers"] == 2
        else:
            assert "2 layers on the device, your limit is 2" in out


CPU = torch.device("cpu")


@given(num_units=st.integers(1, 200))
def test_spread_order_is_even(num_units):
    """It is a permutation, and any beginning of it leaves no gap over twice the even one."""
    order = spread_order(num_units)
    assert sorted(order) == list(range(num_units))
    for count in range(1, num_units + 1):
        kept = sorted(order[:count])
        gaps = [b - a for a, b in zip(kept, [*kept[1:], num_units], strict=True)]
        assert max(gaps) <= 2 * -(-num_units // count)


@settings(max_examples=15, deadline=None)
@given(
    budgets=st.lists(
        st.tuples(st.integers(0, 900_000), st.integers(0, 900_000)), min_size=1, max_size=4
    )
)
def test_fit_keeps_to_its_budget(tmp_path_factory, budgets):
    """Whatever budgets follow one another, every unit is right and no more is held than allowed.
    The placement is what is reserved, also where the account has refused part of it.
    """
    directory = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(101, 129 + i) for i in range(7)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(directory)
    cut = [unit_of(checkpoint, f"t{i}") for i in range(7)]
    units = Units(tuple(cut[:5]), (cut[5],), cut[6], checkpoint.tensors["t0"])
    account = MemoryAccount("device memory", 10**9)
    accounts = PerMemory(account, MemoryAccount("host memory", 0))
    source = open_source(list(checkpoint.files))
    with TieredStreamer(units, source, torch.float32, CPU, accounts) as weights:

        def held():
            return weights.resident.bytes_of(weights.resident.placement).device

        for budget, more in budgets:
            if budget < weights.least_bytes(budget):
                continue
            account.limit = account.used + more
            with suppress(DoesNotFitError):
                weights.fit(budget, 0)
            assert account.used - weights.fixed_device_bytes == held()
            account.limit = 10**9
            weights.fit(budget, 0)
            assert account.used - weights.fixed_device_bytes == held() <= budget
            for i in range(6):
                with weights.acquire(i) as (value,):
                    assert torch.equal(value, tensors[f"t{i}"])


def test_what_is_free_of_the_room_for_converting(tmp_path):
    """In another dtype than the stored one: of the largest unit nothing, of one half as large half
    of it. In the stored one there is no such room.
    """
    save_file(
        {"large": torch.zeros(64, 64).bfloat16(), "small": torch.zeros(32, 64).bfloat16()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    large, small, norm = (unit_of(checkpoint, *names) for names in (["large"], ["small"], []))
    units = Units((large, small), (large,), norm, checkpoint.tensors["large"])
    for dtype, free in ((torch.float32, [0, 32 * 64 * 4, 0]), (torch.bfloat16, [0, 0, 0])):
        accounts = PerMemory(MemoryAccount("device", 1 << 30), MemoryAccount("host", 1 << 30))
        source = open_source(list(checkpoint.files))
        with TieredStreamer(units, source, dtype, CPU, accounts) as weights:
            assert weights.spare_bytes == free
