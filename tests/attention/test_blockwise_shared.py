"""Blocks that several rows share are read once for all of them, and every row gets what a plain sum
over its own keys gives.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ollm_core import CacheKind
from ollm_core.attention.blockwise import BlockwiseAttention
from ollm_core.attention.kernels import CpuFlash, Products
from ollm_core.contracts.kv import KVGeometry
from ollm_core.engine.traced_cache import Sharing, TracedCache
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import DeviceKVStore
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.tracker import AllocationTracker, traced_peak
from ollm_core.testing import KVView

CPU = torch.device("cpu")
ERRORS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Forks:
    """Rows that are forked from one another: row i from `parents[i]`, an earlier one or none, at
    `cuts[i]` of its tokens, after which it has `own[i]` more; then come the new ones.
    """

    parents: tuple[int | None, ...]
    cuts: tuple[float, ...]
    own: tuple[int, ...]
    num_new: int = 1
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (2, 2)
    """KV heads, and query heads that share one."""
    head_dim: int = 8
    block_size: int = 4
    window: int | None = None

    @property
    def geometry(self):
        kind = CacheKind("full", num_kv_heads=self.heads[0], head_dim=self.head_dim)
        return KVGeometry((kind,), self.dtype, CPU, self.block_size)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def filled(self, store):
        """The view of the rows' new tokens, their query, sinks, and all keys and values by row."""
        object.__setattr__(self, "generator", torch.Generator().manual_seed(len(self.own)))
        groups, shared = self.heads
        sequences, keys = [], []
        for parent, cut, own in zip(self.parents, self.cuts, self.own, strict=True):
            sequence, before = None, torch.zeros(2, groups, 0, self.head_dim, dtype=self.dtype)
            if parent is not None:
                num_tokens = int(cut * keys[parent].shape[2])
                sequence = store.fork(sequences[parent], num_tokens)
                before = keys[parent][:, :, :num_tokens]
            sequences.append(store.new_sequence() if sequence is None else sequence)
            new = self.random(2, groups, own, self.head_dim)
            store.append(0, sequences[-1], new[0], new[1])
            keys.append(torch.cat([before, new], 2))
        starts = tuple(one.shape[2] for one in keys)
        new = self.random(2, len(keys), groups, self.num_new, self.head_dim)
        for row, sequence in enumerate(sequences):
            store.append(0, sequence, new[0, row], new[1, row])
        keys = [torch.cat([one, new[:, row]], 2) for row, one in enumerate(keys)]
        query = self.random(len(keys), groups * shared, self.num_new, self.head_dim)
        sinks = self.random(groups * shared) if self.sinks else None
        return KVView(new[0], new[1], 0, tuple(sequences), starts, store, None), query, sinks, keys

    def attended(self, view, query, sinks, kernel=None):
        with torch.no_grad():
            return BlockwiseAttention((kernel or CpuFlash(),))(
                nn.Module(), query, view, scaling=0.3, sliding_window=self.window, s_aux=sinks
            )

    def expected(self, query, sinks, keys):
        """A plain sum in float64."""
        rows = []
        for row, (k, v) in enumerate(keys):
            k, v = (t.repeat_interleave(self.heads[1], 0).double() for t in (k, v))
            scores = query[row].double() @ k.transpose(1, 2) * 0.3
            total = k.shape[1]
            back = torch.arange(total - self.num_new, total)[:, None] - torch.arange(total)
            hidden = back < 0 if self.window is None else (back < 0) | (back >= self.window)
            scores.masked_fill_(hidden, -torch.inf)
            if sinks is not None:
                extra = sinks.double().view(-1, 1, 1).expand(-1, self.num_new, 1)
                scores = torch.cat([scores, extra], 2)
            rows.append((scores.softmax(-1)[..., :total] @ v).transpose(0, 1))
        return torch.stack(rows)


@st.composite
def forks(draw):
    num_rows = draw(st.integers(2, 7))
    return Forks(
        tuple(
            draw(st.none() | st.integers(0, row - 1) if row else st.none())
            for row in range(num_rows)
        ),
        tuple(draw(st.sampled_from([1.0, 1.0, 0.7, 0.4, 0.0])) for _ in range(num_rows)),
        tuple(draw(st.integers(0, 50)) for _ in range(num_rows)),
        draw(st.sampled_from([1, 1, 2, 5, 16, 17, 40])),
        draw(st.booleans()),
        draw(st.sampled_from(sorted(ERRORS, key=str))),
        draw(st.sampled_from([(1, 1), (2, 2), (1, 4), (3, 3)])),
        window=draw(st.sampled_from([None, None, None, 9])),
    )


@settings(
    max_examples=120 * int(os.environ.get("OLLM_EXAMPLES", "1")), deadline=None,
    derandomize=True, database=None,
)  # fmt: skip
@given(forks(), st.sampled_from([CpuFlash(), Products()]))
def test_every_row_gets_a_plain_sum(case, kernel):
    """Forks of forks, rows that share nothing, any number of new tokens, sinks, windows."""
    with DeviceKVStore(case.geometry, MemoryAccount("memory", 10**9)) as store:
        view, query, sinks, keys = case.filled(store)
        found = case.attended(view, query, sinks, kernel)
    expected = case.expected(query, sinks, keys)
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < ERRORS[case.dtype]


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(forks(), st.integers(1, 7))
def test_every_store_gives_the_same_bits(case, run_slots):
    """In memory and on disk, where blocks lie in runs of any length."""
    account = MemoryAccount("memory", 10**9)
    with DeviceKVStore(case.geometry, account) as store:
        expected = case.attended(*case.filled(store)[:3])
    with tempfile.TemporaryDirectory() as name:
        options = {"staging_bytes": run_slots * 4096}
        with DiskKVStore(case.geometry, account, Path(name), "f00d", **options) as store:
            assert torch.equal(case.attended(*case.filled(store)[:3]), expected)


@dataclass(eq=False)
class Counted(DeviceKVStore):
    """Says how often each block is given out."""

    geometry: KVGeometry
    given: Counter = field(default_factory=Counter)

    def __post_init__(self):
        super().__init__(self.geometry, MemoryAccount("memory", 10**9))
        real = self._storage.read

        def read(layer_idx, blocks):
            self.given.update(blocks)
            return real(layer_idx, blocks)

        self._storage.read = read


@pytest.mark.parametrize("num_new", [1, 5, 40])
def test_each_block_is_read_once(num_new):
    """Of two documents with three questions each, one of which has two samples, and a text that is
    alone.
    """
    case = Forks(
        (None, None, 0, 0, 0, 1, 1, 1, 7, None), (1.0,) * 10,
        (41, 30, 9, 10, 3, 8, 9, 20, 5, 33), num_new,
    )  # fmt: skip
    with Counted(case.geometry) as store:
        view, query, sinks, keys = case.filled(store)
        found = case.attended(view, query, sinks)
        assert set(store.given.values()) == {1}
        assert len(store.given) > 30
        apart = Counter(store.given)
        store.given.clear()
        alone = case.attended(replace(view, shares=False), query, sinks)
        assert store.given.keys() == apart.keys()
        assert max(store.given.values()) == 5  # the fourth to seventh row, and what they are from
    assert (found - alone).abs().max() < 1e-5
    assert (found.double() - case.expected(query, sinks, keys)).abs().max() < 1e-5


def test_rows_that_share_nothing_have_the_bits_they_had_alone():
    """Beside rows that share, and where all are alone."""
    case = Forks((None, None, 1, 1, None), (1.0,) * 5, (30, 41, 9, 3, 22), 2)
    with DeviceKVStore(case.geometry, MemoryAccount("memory", 10**9)) as store:
        view, query, sinks, _ = case.filled(store)
        found = case.attended(view, query, sinks)
        for row in (0, 4):
            alone = KVView(
                view.keys[row : row + 1], view.values[row : row + 1], 0,
                (view.sequences[row],), (view.starts[row],), store, None,
            )  # fmt: skip
            assert torch.equal(case.attended(alone, query[row : row + 1], sinks)[0], found[row])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(forks(), st.lists(st.integers(1, 30), min_size=7, max_size=7), st.booleans())
def test_packed_rows_get_what_each_gets_alone(case, lengths, shares):
    """Rows with different numbers of new tokens, one after another in one row of a call."""
    lengths = tuple(min(n, case.num_new) for n in lengths)[: len(case.own)]
    with DeviceKVStore(case.geometry, MemoryAccount("memory", 10**9)) as store:
        view, query, sinks, _ = case.filled(store)

        def packed(rows):
            parts = [row[:, :length] for row, length in zip(rows, lengths, strict=True)]
            return torch.cat(parts, 1)[None]

        together = replace(
            view, keys=packed(view.keys), values=packed(view.values), lengths=lengths,
            shares=shares,
        )  # fmt: skip
        found = case.attended(together, packed(query), sinks)[0].split(lengths)
        for row, (length, one) in enumerate(zip(lengths, found, strict=True)):
            part = slice(row, row + 1)
            alone = replace(
                view, keys=view.keys[part, :, :length], values=view.values[part, :, :length],
                sequences=view.sequences[part], starts=view.starts[part],
            )  # fmt: skip
            expected = case.attended(alone, query[part, :, :length], sinks)[0]
            error = (one.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
            assert error < ERRORS[case.dtype]
            assert shares or torch.equal(one, expected)


MEMORY_CASES = {
    "one document": ((None, *(0,) * 15), (1.0,) * 16),
    "two documents": ((None, None, *(0, 1) * 7), (1.0,) * 16),
    "a chain": ((None, *range(15)), (1.0,) * 16),
    "samples": ((None, *(0,) * 7, *(3,) * 8), (1.0,) * 16),
    "some alone": ((None, *(0,) * 5, *(None,) * 10), (1.0,) * 16),
}


@pytest.mark.parametrize("num_new", [1, 2, 17])
@pytest.mark.parametrize("name", MEMORY_CASES)
@pytest.mark.parametrize(
    ("tier", "dtype"),
    [("device", torch.float32), ("device", torch.bfloat16), ("disk", torch.float32)],
)
def test_what_is_allocated_is_what_is_planned(tmp_path, tier, name, num_new, dtype):
    """Never more, and hardly less, whatever the rows share."""
    parents, cuts = MEMORY_CASES[name]
    own = tuple(16 * 20 + 5 if parent is None else 150 for parent in parents)
    case = Forks(parents, cuts, own, num_new, False, dtype, (2, 4), 64, 16)
    account = MemoryAccount("memory", 10**9)
    store = DeviceKVStore(case.geometry, account)
    if tier == "disk":
        store = DiskKVStore(case.geometry, account, tmp_path, "f00d")
    with store:
        view, query, _, _ = case.filled(store)
        attention = BlockwiseAttention((CpuFlash(),))
        with torch.no_grad(), AllocationTracker("cpu") as tracker:
            result = attention(nn.Module(), query, view, scaling=0.3)
            del result
        runs = view.shared_runs()
    sizes = len({row for run in runs for row in run.rows}), *sorted({len(r.rows) for r in runs})
    sharing = Sharing(tuple(tuple(range(size)) for size in sizes))
    options = {"dtype": dtype, "device": "meta"}
    new = torch.empty(view.keys.shape, **options)
    planned_query = torch.empty(query.shape, **options)
    block = torch.empty(case.geometry.block_shape(0), **options)
    cache = TracedCache(case.geometry, 8 * 16, "blockwise", sharing)
    planned_view, _ = cache.update(new, new, 0)
    planned = traced_peak(lambda: attention(nn.Module(), planned_query, planned_view, scaling=0.3))
    assert tracker.peak <= planned <= 1.1 * tracker.peak + block.nbytes  # it makes one to look at
