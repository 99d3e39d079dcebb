"""Kernels of block-wise attention: every call that is made of FlashAttention 2 against a plain
reference of it, and what is done where it cannot be used.
"""

from __future__ import annotations

import pytest
import torch
from flash_reference import PACKAGE, TORCH
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_conformance import AttentionConformance
from ollm_core import CacheKind
from ollm_core.attention.blockwise import BlockwiseAttention, kernels_on
from ollm_core.attention.kernels import (
    CpuFlash,
    FlashKernel,
    Part,
    Products,
    flash_attn_2,
)
from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.in_memory import DeviceKVStore
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.tracker import AllocationTracker, traced_peak
from ollm_core.testing import KVView

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
pytestmark = pytest.mark.usefixtures("stand_ins")


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
