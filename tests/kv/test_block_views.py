"""Steps and drafts take several stored blocks in one call of the kernel: the same bits as block by
block, wherever the store has them.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ollm_core import CacheKind, TiledBlocks
from ollm_core.attention.blockwise import BlockwiseAttention, most_blocks
from ollm_core.attention.kernels import CpuFlash, Part, Products
from ollm_core.contracts.kv import KVGeometry
from ollm_core.engine.traced_cache import TracedCache
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import DeviceKVStore, HostKVStore
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.tracker import AllocationTracker, traced_peak
from ollm_core.testing import KVView

CPU = torch.device("cpu")
BLOCK = 4
ERRORS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """New tokens of one row after a past. G KV heads, each shared by P query heads."""

    num_past: int
    num_new: int
    window: int | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (2, 2)
    """G and P."""
    head_dim: int = 8
    block_size: int = BLOCK

    @property
    def geometry(self):
        kind = CacheKind("full", num_kv_heads=self.heads[0], head_dim=self.head_dim)
        return KVGeometry((kind,), self.dtype, CPU, self.block_size)

    def tensors(self):
        """Query [1, H, T, D], keys and values [G, S, D], sinks [H]."""
        generator = torch.Generator().manual_seed(self.num_past)
        groups, shared = self.heads
        total = self.num_past + self.num_new

        def some(*shape):
            return torch.randn(*shape, generator=generator).to(self.dtype)

        keys, values = (some(groups, total, self.head_dim) for _ in "kv")
        query = some(1, groups * shared, self.num_new, self.head_dim)
        return query, keys, values, some(groups * shared) if self.sinks else None

    def attended(self, store, kernels=None):
        """What block-wise attention makes of it, [1, T, H, D]; `store` is empty, and its blocks may
        be anywhere: another sequence grows beside.
        """
        query, keys, values, sinks = self.tensors()
        sequence, other = store.new_sequence(), store.new_sequence()
        step = 5 * self.block_size + 1
        for begin in range(0, self.num_past, step):
            part = slice(begin, min(begin + step, self.num_past))
            store.append(0, sequence, keys[:, part], values[:, part])
            store.append(0, other, values[:, part], keys[:, part])
        new = slice(self.num_past, None)
        store.append(0, sequence, keys[:, new], values[:, new])
        attention = BlockwiseAttention(kernels or (CpuFlash(),))
        view = KVView(
            keys[None, :, new], values[None, :, new], 0, (sequence,), (self.num_past,), store,
            attention,
        )  # fmt: skip
        with torch.no_grad():
            return attention(
                nn.Module(), query, view, scaling=0.3, sliding_window=self.window, s_aux=sinks
            )

    def expected(self):
        """The same by a plain sum in float64."""
        query, keys, values, sinks = self.tensors()
        shared = self.heads[1]
        keys, values = (t.repeat_interleave(shared, 0).double() for t in (keys, values))
        scores = query[0].double() @ keys.transpose(1, 2) * 0.3
        back = torch.arange(self.num_past, keys.shape[1])[:, None] - torch.arange(keys.shape[1])
        hidden = back < 0 if self.window is None else (back < 0) | (back >= self.window)
        scores.masked_fill_(hidden, -torch.inf)
        if sinks is not None:
            extra = sinks.double().view(-1, 1, 1).expand(-1, self.num_new, 1)
            scores = torch.cat([scores, extra], 2)
        weights = scores.softmax(-1)[..., : keys.shape[1]]
        return (weights @ values).transpose(0, 1)[None]


class Split(TiledBlocks):
    """Pairs of [G, n, D], those of one length put together by any numbers."""

    def __init__(self, pairs, numbers):
        self.pairs = pairs
        self.numbers = itertools.cycle(numbers)

    def __next__(self):
        return next(self.pairs)

    def tiles(self):
        for _, alike in itertools.groupby(self.pairs, key=lambda pair: pair[0].shape):
            while together := list(itertools.islice(alike, next(self.numbers))):
                keys, values = zip(*together, strict=True)
                yield torch.stack(keys), torch.stack(values)


def split_store(case, numbers):
    class SplitKVStore(DeviceKVStore):
        def blocks(self, *arguments):
            return Split(super().blocks(*arguments), numbers)

    return SplitKVStore(case.geometry, MemoryAccount("memory", 10**9))


CASES = st.builds(
    Case,
    num_past=st.integers(0, 130),
    num_new=st.sampled_from([1, 2, 5, 11, 16, 17]),
    window=st.none() | st.integers(2, 140),
    sinks=st.booleans(),
    dtype=st.sampled_from(sorted(ERRORS, key=str)),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 4), (3, 3)]),
)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(CASES, st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_any_split_gives_a_plain_sum_and_the_bits_of_single_blocks(case, numbers):
    """Windows that begin inside a block, sinks, blocks that are not full, tiles of any size."""
    with split_store(case, numbers) as store:
        found = case.attended(store)
    with DeviceKVStore(case.geometry, MemoryAccount("memory", 10**9)) as store:
        single = case.attended(store)
    expected = case.expected()
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < ERRORS[case.dtype]
    assert torch.equal(found, single)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(CASES, st.integers(1, 7))
def test_every_store_gives_the_same_bits(case, run_slots):
    """On the device, in host memory and on disk, where blocks lie in runs of any length."""
    account = MemoryAccount("memory", 10**9)
    with DeviceKVStore(case.geometry, account) as store:
        expected = case.attended(store)
    with HostKVStore(case.geometry, account) as store:
        assert torch.equal(case.attended(store), expected)
    with tempfile.TemporaryDirectory() as name:
        options = {"staging_bytes": run_slots * 4096}
        with DiskKVStore(case.geometry, account, Path(name), "f00d", **options) as store:
            assert torch.equal(case.attended(store), expected)


@dataclass(frozen=True, slots=True)
class Counted(CpuFlash):
    """Says how many blocks each call was given."""

    calls: list = field(default_factory=list)

    def __call__(self, part):
        self.calls.append(1)
        return CpuFlash.__call__(self, part)

    def several(self, part):
        found = CpuFlash.several(self, part)
        if found is not None:
            self.calls.append(len(part.keys))
        return found


@pytest.mark.parametrize("num_new", [1, 5])
def test_blocks_on_disk_are_taken_together(tmp_path, num_new):
    """As many as are merged together; one that is not full alone, and new tokens too. A prompt has
    them one by one.
    """
    case = Case(20 * BLOCK + 3, num_new)
    geometry, account = case.geometry, MemoryAccount("memory", 10**9)
    for new, expected in ((case, [1, 8, 8, 4, 1]), (Case(case.num_past, 17), [1] * 22)):
        kernel = Counted()
        with DiskKVStore(geometry, account, tmp_path, "f00d") as store:
            one = store.new_sequence()
            _, keys, values, _ = new.tensors()
            store.append(0, one, keys, values)
            view = KVView(
                keys[None, :, case.num_past :], values[None, :, case.num_past :], 0, (one,),
                (case.num_past,), store, None,
            )  # fmt: skip
            BlockwiseAttention((kernel,))(nn.Module(), new.tensors()[0], view, scaling=0.3)
        assert kernel.calls == expected


def test_a_store_that_says_blocks_anew_is_heard(tmp_path):
    """What wraps or overrides `blocks` alone is what attention sees, on disk too."""

    class Silent(DiskKVStore):
        def blocks(self, *arguments):
            for keys, values in super().blocks(*arguments):
                yield keys, torch.zeros_like(values)

    case = Case(90, 1, heads=(1, 1))
    account = MemoryAccount("memory", 10**9)
    with Silent(case.geometry, account, tmp_path, "f00d") as store:
        found = case.attended(store)
    query, keys, values, _ = case.tensors()
    weights = (query[0].double() @ keys.double().transpose(1, 2) * 0.3).softmax(-1)
    only_new = weights[..., -1:] * values[:, None, -1].double()
    assert (found[0].double() - only_new).abs().max() < 1e-5


class Ready(TiledBlocks):
    """Tiles that are there, to be taken any number of times."""

    def __init__(self, tiles):
        self.found = list(tiles)

    def __next__(self):
        raise AssertionError("tiles are taken where there are some")

    def tiles(self):
        return iter(self.found)


def opened(tier, case, directory):
    """An empty store."""
    account = MemoryAccount("memory", 10**9)
    if tier == "disk":
        return DiskKVStore(case.geometry, account, directory, "f00d")
    return DeviceKVStore(case.geometry, account)


def allocated(tier, case, directory):
    """Peak bytes of block-wise attention over a store."""
    query, keys, values, _ = case.tensors()
    new = slice(case.num_past, None)
    attention = BlockwiseAttention((CpuFlash(),))
    with opened(tier, case, directory) as store:
        sequence = store.new_sequence()
        store.append(0, sequence, keys, values)
        if tier == "together":  # and what puts them together is not looked at
            pairs = store.blocks(0, sequence, case.num_past)
            ready = Ready(Split(pairs, [8, 3, 5]).tiles())
            store.blocks = lambda *_: ready
        view = KVView(
            keys[None, :, new], values[None, :, new], 0, (sequence,), (case.num_past,), store,
            attention,
        )  # fmt: skip
        with torch.no_grad(), AllocationTracker("cpu") as tracker:
            result = attention(nn.Module(), query, view, scaling=0.3)
            del result
    return tracker.peak


def planned(case):
    """The same by a trace of as many blocks as matter."""
    groups, shared = case.heads
    past = min(case.num_past, most_blocks(case.num_new) * case.block_size)
    attention = BlockwiseAttention((CpuFlash(),))
    options = {"dtype": case.dtype, "device": "meta"}
    new = torch.empty(1, groups, case.num_new, case.head_dim, **options)
    query = torch.empty(1, groups * shared, case.num_new, case.head_dim, **options)
    block = torch.empty(case.geometry.block_shape(0), **options)
    view, _ = TracedCache(case.geometry, past, "blockwise").update(new, new, 0)
    peak = traced_peak(lambda: attention(nn.Module(), query, view, scaling=0.3))
    return peak - block.nbytes  # it makes one to look at


@pytest.mark.parametrize("dtype", sorted(ERRORS, key=str), ids=str)
@pytest.mark.parametrize("num_new", [1, 5, 16])
@pytest.mark.parametrize("tier", ["device", "disk", "together"])
def test_what_is_allocated_is_what_is_planned(tmp_path, tier, num_new, dtype):
    """From one block to many more than are merged together: never more, and hardly less."""
    for num_blocks in (1, 3, 8, 9, 30):
        case = Case(
            16 * num_blocks, num_new, dtype=dtype, heads=(2, 4), head_dim=64, block_size=16
        )  # fmt: skip
        found = allocated(tier, case, tmp_path)
        assert found <= planned(case) <= 1.1 * found


def test_half_precision_comes_block_by_block():
    """Several blocks of it would be widened together; products always come one by one."""
    for dtype in ERRORS:
        query, keys = torch.zeros(2, 4, 5, 8, dtype=dtype), torch.zeros(3, 2, 16, 8, dtype=dtype)
        part = Part(query, keys, keys, 1.0)
        assert (CpuFlash().several(part) is not None) == (dtype == torch.float32)
        assert Products().several(part) is None
