"""Exact attention: the contract, and the same bits where blocks lie in place or are copied."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from ollm_conformance import AttentionConformance
from ollm_core.attention.exact import exact_attention
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import CacheKind, KVGeometry, KVStore
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import DeviceKVStore, HostKVStore
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.kv.recurrent.states import StateStore
from ollm_core.memory.accounts import MemoryAccount

HEAD_DIM = 8
BLOCK = 4


class CopiedKVStore(DeviceKVStore):
    """As one whose blocks are valid only until the next."""

    in_place = False


@st.composite
def cases(draw):
    groups = draw(st.integers(1, 3))
    return {
        "groups": groups,
        "heads": groups * draw(st.integers(1, 3)),
        "past": draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)),
        "num_new": draw(st.sampled_from([1, 2, 5, 11])),
        "window": draw(st.none() | st.integers(1, 12)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "seed": draw(st.integers(0, 1000)),
    }


def geometry(case):
    kind = CacheKind("full", case["groups"], HEAD_DIM)
    if case["window"]:
        kind = CacheKind("sliding", case["groups"], HEAD_DIM, window=case["window"])
    return KVGeometry((kind,), case["dtype"], torch.device("cpu"), BLOCK)


def attended(case, store: KVStore) -> torch.Tensor:
    """The attention of new tokens of all rows, after what each row has."""
    random = torch.Generator().manual_seed(case["seed"])
    groups, heads, num_new = case["groups"], case["heads"], case["num_new"]

    def some(*shape):
        return torch.randn(*shape, generator=random).to(case["dtype"])

    rows = len(case["past"])
    keys, values = (some(rows, groups, num_new, HEAD_DIM) for _ in range(2))
    sequences = tuple(store.new_sequence() for _ in range(rows))
    for row, (sequence, past) in enumerate(zip(sequences, case["past"], strict=True)):
        store.append(0, sequence, some(groups, past, HEAD_DIM), some(groups, past, HEAD_DIM))
        store.append(0, sequence, keys[row], values[row])
    config = LlamaConfig(
        hidden_size=heads * HEAD_DIM, num_attention_heads=heads, num_key_value_heads=groups
    )
    module = LlamaAttention(config, 0).eval()
    view = KVView(keys, values, 0, sequences, tuple(case["past"]), store, exact_attention)
    query = some(rows, heads, num_new, HEAD_DIM)
    return exact_attention(
        module, query, view, scaling=0.3, sliding_window=case["window"], dropout=0.0
    )


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_the_bits_are_those_of_blocks_one_by_one(case):
    """Any past, block borders and windows; as many groups as heads, too, where eager attention
    takes the keys as they are.
    """
    account = MemoryAccount("memory", 10**8)
    with torch.no_grad(), DeviceKVStore(geometry(case), account) as store:
        found = attended(case, store)
    with torch.no_grad(), CopiedKVStore(geometry(case), account) as store:
        expected = attended(case, store)
    assert torch.equal(found, expected)


def test_which_stores_are(tmp_path):
    """Those whose blocks lie where attention computes, alone or beside states."""
    plain = geometry({"groups": 1, "window": None, "dtype": torch.float32})
    account = MemoryAccount("memory", 10**8)
    with HostKVStore(plain, account) as store:
        assert store.in_place
        states = StateStore(plain, account, "host", torch.device("cpu"))
        assert HybridKVStore(plain, store, states).in_place
    with DiskKVStore(plain, account, tmp_path, "f00d") as store:
        assert not store.in_place


class TestExactAttention(AttentionConformance):
    """transformers' own, over all keys in one piece."""

    attention = exact_attention
    exact = True
