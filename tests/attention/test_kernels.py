"""Kernels of block-wise attention: every call that is made of FlashAttention 2 against a plain
reference of it, and what is done where it cannot be used.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import ollm
from ollm_conformance import AttentionConformance
from ollm_core import CacheKind, InputError
from ollm_core.attention import trial as attention_rates
from ollm_core.attention.blockwise import BlockwiseAttention, kernels_on
from ollm_core.attention.kernels import (
    CpuFlash,
    FlashKernel,
    Part,
    Products,
    flash_attn_2,
    torch_flash,
)
from ollm_core.attention.trial import require_flash, trial
from ollm_core.calibration import rates
from ollm_core.calibration.attention import measure_kernels
from ollm_core.cli.main import cli
from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.in_memory import DeviceKVStore
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.tracker import AllocationTracker, traced_peak
from ollm_core.testing import KVView

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
EVERY = frozenset({torch.float32, torch.float16, torch.bfloat16})
_PATH = Path(__file__).parents[1] / "flash_reference.py"
_SPEC = importlib.util.spec_from_file_location("flash_reference", _PATH)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

PACKAGE = FlashKernel("flash-attn", flash_attn_2, EVERY)
TORCH = FlashKernel("torch", torch_flash, EVERY)


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    """The reference in the place of the package, and of torch's operator on a CPU, which has none
    there.
    """
    package = ModuleType("flash_attn")
    package.flash_attn_func = reference.flash_attn_func
    here = pytest.MonkeyPatch()
    here.setitem(sys.modules, "flash_attn", package)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", reference.flash_attention_forward, "CPU")
    yield
    library._destroy()
    here.undo()


def called(kernel):
    """An instance that a class can have as an attribute."""
    return staticmethod(BlockwiseAttention((kernel, Products())))


class TestPackage(AttentionConformance):
    """Block-wise attention by the package flash-attn."""

    attention = called(PACKAGE)


class TestTorchFlash(AttentionConformance):
    """The same by torch's operator."""

    attention = called(TORCH)


class TestProducts(AttentionConformance):
    """The same by plain products alone."""

    attention = called(Products())


def attended(kernels, case):
    """What block-wise attention makes of a case, and the same by a plain sum in float64."""
    shape, num_past, num_new, window, sinks, block_size = case
    num_groups, group, head_dim = shape
    generator = torch.Generator().manual_seed(num_past + 1000 * num_new)
    keys, values = (
        torch.randn(num_groups, num_past + num_new, head_dim, generator=generator) for _ in "kv"
    )
    query = torch.randn(1, num_groups * group, num_new, head_dim, generator=generator)
    sink = torch.randn(num_groups * group, generator=generator) if sinks else None
    kind = CacheKind("full", num_kv_heads=num_groups, head_dim=head_dim)
    geometry = KVGeometry((kind,), torch.float32, CPU, block_size)
    with DeviceKVStore(geometry, MemoryAccount("memory", 10**9)) as store:
        sequence = store.new_sequence()
        if num_past:
            store.append(0, sequence, keys[:, :num_past], values[:, :num_past])
        attention = BlockwiseAttention(kernels)
        new = keys[None, :, num_past:], values[None, :, num_past:]
        view = KVView(*new, 0, (sequence,), (num_past,), store, attention)
        found = attention(
            torch.nn.Module(), query, view, scaling=0.3, sliding_window=window, s_aux=sink
        )
    scores = query[0].double() @ keys.repeat_interleave(group, 0).double().transpose(1, 2) * 0.3
    back = torch.arange(num_past, num_past + num_new)[:, None] - torch.arange(keys.shape[1])
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    scores.masked_fill_(hidden, -torch.inf)
    if sinks:
        scores = torch.cat([scores, sink.double().view(-1, 1, 1).expand(-1, num_new, 1)], 2)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    expected = (weights @ values.repeat_interleave(group, 0).double()).transpose(0, 1)
    return found[0], expected


CASES = st.tuples(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 16, 20])),
    st.integers(0, 90),
    st.integers(1, 70),
    st.none() | st.integers(2, 120),
    st.booleans(),
    st.sampled_from([1, 3, 16]),
)


@pytest.mark.parametrize("kernel", [PACKAGE, TORCH, Products(), CpuFlash()], ids=lambda k: k.name)
def test_every_shape_gives_a_plain_sum(kernel):
    """Groups, heads that are padded, pasts, windows, sinks and blocks of any size."""

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(CASES)
    def try_case(case):
        found, expected = attended((kernel, Products()), case)
        assert (found - expected).abs().max() < 2e-5

    try_case()


@pytest.mark.parametrize("kernel", [PACKAGE, TORCH, Products()], ids=lambda k: k.name)
@pytest.mark.parametrize("window", [None, 2, 255, 256, 257, 300, 1000])
def test_more_tokens_than_a_tile_or_a_block(kernel, window):
    """More queries than a block has keys is where a window that is open on one side goes wrong."""
    found, expected = attended((kernel, Products()), ((2, 2, 8), 601, 530, window, True, 256))
    assert (found - expected).abs().max() < 2e-5


def test_heads_that_flash_does_not_take():
    """Larger than 256, or in float32: the next kernel, the same result."""
    found, expected = attended((PACKAGE, Products()), ((1, 2, 264), 20, 9, 7, True, 16))
    assert (found - expected).abs().max() < 2e-5
    half = FlashKernel("flash-attn", flash_attn_2)
    assert not half.takes(torch.float32, 128)
    assert not half.takes(torch.bfloat16, 264)
    assert half.takes(torch.float16, 256)


def test_kernels_of_a_device():
    """Torch's own unless the package is asked for; products take what is left."""
    assert [k.name for k in kernels_on(CPU)] == ["torch"]
    if not torch.cuda.is_available():
        assert [k.name for k in kernels_on(GPU)] == ["torch", "products"]
        assert [k.name for k in kernels_on(GPU, package=True)] == ["flash-attn", "products"]


@pytest.mark.parametrize("dtype", sorted(EVERY, key=str), ids=str)
def test_a_trial_passes_what_is_right(dtype):
    """Each kernel, in each dtype."""
    for kernel in (PACKAGE, TORCH, Products(), CpuFlash()):
        for head_dim in (64, 20):
            assert trial(kernel, CPU, dtype, head_dim) == ""


def _wrong(change):
    def call(query, keys, values, scaling, causal, before):
        return change(query, keys, values, scaling, causal, before)

    return FlashKernel("wrong", call, EVERY)


def _top_left(query, keys, values, scaling, causal, before):
    more = query.shape[1] - keys.shape[1]
    window = (before - more if before >= 0 else -1, 0 if causal else -1)
    return reference.flash_reference(query, keys, values, scaling, causal, window)


def _heads_in_turn(query, keys, values, *options):
    group = query.shape[2] // keys.shape[2]
    keys, values = (t.repeat(1, 1, group, 1) for t in (keys, values))
    return flash_attn_2(query, keys, values, *options)


def _base_two(*arguments):
    output, lse = flash_attn_2(*arguments)
    return output, lse / 0.6931


WRONG = {
    "no scaling": lambda q, k, v, _, *rest: flash_attn_2(q, k, v, q.shape[-1] ** -1, *rest),
    "not causal": lambda q, k, v, s, _, before: flash_attn_2(q, k, v, s, False, before),
    "no windows": lambda q, k, v, s, causal, _: flash_attn_2(q, k, v, s, causal, -1),
    "a window of one more": lambda *a: flash_attn_2(*a[:5], a[5] + (a[5] >= 0)),
    "windows from the first key": _top_left,
    "query heads in turn": _heads_in_turn,
    "another log-sum-exp": _base_two,
    "no log-sum-exp": lambda *a: (flash_attn_2(*a)[0], None),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_trial_fails_what_is_wrong(what):
    """A build, a version or a device that computes something else is not used."""
    assert trial(_wrong(WRONG[what]), CPU, torch.float16, 32)


def test_without_the_package(monkeypatch):
    """One line that says what to do, where it is asked for by name."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "flash_attn" in trial(FlashKernel("flash-attn", flash_attn_2), CPU, torch.float16, 64)
    monkeypatch.setattr(attention_rates, "_flash_trial", lambda *_: "ModuleNotFoundError: none")
    with pytest.raises(InputError, match="which does not work here: ModuleNotFound") as refused:
        require_flash(GPU, torch.bfloat16, here=True)
    assert "ollm-core[flash-attn]" in refused.value.hint
    require_flash(GPU, torch.bfloat16, here=False)


def test_refused_by_name(tiny):
    """On a CPU, and in a plan for float32."""
    with pytest.raises(InputError, match="on CUDA, not in float32 on cpu"):
        ollm.load(tiny, device="cpu", attention="flash")
    memory = {"device_memory": "1GB", "host_memory": "1GB"}
    with pytest.raises(InputError, match="not in float32 on cuda"):
        ollm.plan(tiny, device="cuda", attention="flash", context=64, max_new_tokens=4, **memory)


def test_a_plan_goes_by_what_was_measured(monkeypatch, tmp_path, tiny):
    """The package where it is faster by a tenth and works; the memory is the same."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    options = {
        "device": "cuda", "dtype": "bfloat16", "device_memory": "1GB", "host_memory": "1GB",
        "context": 400, "max_new_tokens": 4,
    }  # fmt: skip
    forced = ollm.plan(tiny, attention="flash", **options)
    own = ollm.plan(tiny, attention="blockwise", **options)
    assert (forced.placement["attention"], own.placement["attention"]) == ("flash", "blockwise")
    assert forced.device_peak_bytes == own.device_peak_bytes

    def chosen(works, **found):
        key = rates._device_key(GPU)
        rates.rates_file().parent.mkdir(parents=True, exist_ok=True)
        rates.rates_file().write_text(json.dumps({key: {"attention bfloat16": found}}))
        monkeypatch.setattr(rates, "flash_works", lambda *_: works)
        return rates.fastest_blocks(GPU, torch.bfloat16)

    assert chosen(True, blockwise=1e12, flash=1.05e12) == "blockwise"
    assert chosen(False, blockwise=1e12, flash=2e12) == "blockwise"
    assert chosen(True) == "blockwise"
    assert chosen(True, blockwise=1e12, flash=2e12) == "flash"
    assert rates.fastest_blocks(GPU, torch.float16) == "blockwise"
    assert ollm.plan(tiny, **options).placement["attention"] == "flash"


def test_kernels_of_torch_that_fail_their_trial(monkeypatch, tiny):
    """Products do what "blockwise" and "auto" ask for, and the plan counts their scores."""
    options = {
        "device": "cuda", "dtype": "bfloat16", "device_memory": "1GB", "host_memory": "1GB",
        "context": 600, "max_new_tokens": 4, "attention": "blockwise",
    }  # fmt: skip
    own = ollm.plan(tiny, **options)
    monkeypatch.setattr(rates, "blocks_work", lambda *_: False)
    other = ollm.plan(tiny, **options)
    assert (own.placement["attention"], other.placement["attention"]) == ("blockwise", "products")
    assert other.device_peak_bytes > own.device_peak_bytes
    assert rates.fastest_blocks(GPU, torch.bfloat16) == "products"


def test_measured_in_turns():
    """A rate for each kernel that is given."""
    found = measure_kernels(
        {"blockwise": CpuFlash(), "products": Products()}, CPU, torch.float32,
        num_new=16, num_blocks=2,
    )  # fmt: skip
    assert set(found) == {"blockwise", "products"}
    assert all(rate > 0 for rate in found.values())


@pytest.mark.parametrize("num_new", [1, 70, 700])
def test_products_take_what_is_traced(num_new):
    """To the byte: scores are made in tiles, and the trace for a device sees them."""

    def work(device):
        view_keys = torch.zeros(1, 2, num_new, 16, device=device)
        past = torch.zeros(2, 256, 16, device=device)

        class Store:
            def blocks(self, *_):
                return iter([(past, past)] * 2)

        attention = BlockwiseAttention((Products(),))
        view = KVView(view_keys, view_keys, 0, (0,), (512,), Store(), attention)
        query = torch.zeros(1, 8, num_new, 16, device=device)
        return attention(torch.nn.Module(), query, view, scaling=1.0)

    with torch.no_grad(), AllocationTracker("cpu") as tracker:
        result = work(CPU)
        del result
    assert traced_peak(lambda: work(torch.device("meta"))) == tracker.peak
    assert tracker.peak < 40 * 8 * num_new * 256 + 10**6


def test_a_flash_kernel_is_traced_with_its_splits():
    """Few queries over many keys: a float32 result for each split, until they are merged."""

    def peak(num_new, num_keys, head_dim=128):
        def work():
            query = torch.empty(2, 4, num_new, head_dim, dtype=torch.float16, device="meta")
            keys = torch.empty(2, num_keys, head_dim, dtype=torch.float16, device="meta")
            return PACKAGE(Part(query, keys, keys, 1.0))

        return traced_peak(work) - 2 * (2 * num_keys + 8 * num_new) * head_dim

    few = 8 * 64 * (2 * 128 + 4)
    assert peak(64, 128) == few
    assert peak(64, 512) == few + 4 * 8 * 64 * 129 * 4
    assert peak(64 * 40, 512) == 40 * few
    for head_dim, splits, rounded in ((16, 2, 32), (80, 4, 96), (192, 8, 192), (200, 8, 256)):
        least = 8 * 64 * (2 * head_dim + 4)
        assert peak(64, 512, head_dim) == least + splits * 8 * 64 * (rounded + 1) * 4


def test_the_doctor_tells(monkeypatch, tmp_path):
    """What it has kept for the device, beside the other rates."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ollm_core.calibration.disk._TRIAL_BYTES", 1 << 20)
    rates.rates_file().parent.mkdir(parents=True)
    found = {"attention bfloat16": {"blockwise": 2e12, "flash": 3e12, "products": 1e12}}
    rates.rates_file().write_text(json.dumps({rates._device_key(CPU): found}))
    options = ["doctor", "--device", "cpu", "--models-dir", str(tmp_path)]
    told = CliRunner().invoke(cli, options)
    assert told.exit_code == 0, told.output
    assert (
        "flash attention is the fastest: blockwise 2000, flash 3000, products 1000" in told.output
    )
