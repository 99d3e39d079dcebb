"""Runs of a hybrid store, kept in a directory with states that tell them apart."""

from __future__ import annotations

import torch

from ollm_core import CacheKind, StateShape
from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.kv.in_memory import DeviceKVStore
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.kv.recurrent.prefix_cache import PrefixCachingHybridStore
from ollm_core.kv.recurrent.snapshots import StateFiles
from ollm_core.kv.recurrent.states import StateStore
from ollm_core.memory.accounts import MemoryAccount

FULL = CacheKind("full", 1, 2)
RECURRENT = CacheKind("recurrent", states=(StateShape((3, 2)), StateShape((2, 2), float32=True)))
CPU = torch.device("cpu")
GEOMETRY = KVGeometry((RECURRENT, FULL, RECURRENT), torch.bfloat16, CPU, block_size=4)
RECURRENT_LAYERS = (0, 2)
PROMPT = list(range(1, 22))


def new_store(limit=1 << 20):
    """A hybrid store, and the account of its states."""
    account = MemoryAccount("memory", limit)
    states = StateStore(GEOMETRY, account, "device", CPU)
    attention = DeviceKVStore(GEOMETRY.attention_layers(), MemoryAccount("kv", 1 << 20))
    return HybridKVStore(GEOMETRY, attention, states), account


def state_after(token_ids, layer_idx):
    """A state that depends on every token and the layer."""
    value = (hash((layer_idx, *token_ids)) % 250) / 2
    return torch.full((3, 2), value, dtype=torch.bfloat16), torch.full((2, 2), value + 0.25)


def run(store, sequence, before, new, num_drafted=0, chunk=3, layers=(0, 1, 2)):
    """A pass as the engine makes it, of which only `layers` are reached."""
    store.expect(sequence, num_drafted)
    total = len(before) + len(new)
    store.reserve(sequence, total, chunk)
    for layer_idx in layers:
        done = 0
        while done < len(new):
            count = min(chunk, len(new) - done, max(len(new) - num_drafted - done, 1))
            if layer_idx == 1:
                keys = torch.tensor(new[done : done + count], dtype=torch.bfloat16)
                keys = keys[None, :, None].expand(1, count, 2)
                store.append(1, sequence, keys, keys)
            else:
                known = [*before, *new[: done + count]]
                store.put_state(layer_idx, sequence, count, state_after(known, layer_idx))
            done += count


def check_tokens(store, sequence, token_ids):
    """The store holds exactly these."""
    assert store.num_tokens(sequence) == len(token_ids)
    keys = [k for k, _ in store.blocks(1, sequence)]
    found = torch.cat(keys, dim=1)[0, :, 0].tolist() if keys else []
    assert found == token_ids
    for layer_idx in RECURRENT_LAYERS:
        state = store.state(layer_idx, sequence)
        if not token_ids:
            assert state is None
            continue
        for value, expected in zip(state, state_after(token_ids, layer_idx), strict=True):
            assert torch.equal(value, expected)


def keeping(directory, geometry=GEOMETRY):
    account = MemoryAccount("memory", 64 << 20)
    attention = PrefixCachingStore(geometry.attention_layers(), account, directory, "model")
    states = StateStore(geometry, account, "host", CPU)
    return PrefixCachingHybridStore(
        geometry, attention, states, StateFiles(directory, geometry, "model")
    )


def keep_a_run(directory, prompt, answer=(), chunk=4):
    with keeping(directory) as store:
        sequence = store.new_sequence()
        run(store, sequence, [], prompt, chunk=chunk)
        store.commit(sequence)
        store.keep(sequence, 0, torch.tensor(prompt))
        known = list(prompt)
        for token in answer:
            run(store, sequence, known, [token])
            store.commit(sequence)
            store.keep(sequence, len(known), torch.tensor([token]))
            known.append(token)


def found(directory, wanted):
    """How many of `wanted` another store finds; what it has of them is right."""
    with keeping(directory) as store:
        sequence, num_tokens = store.find(torch.tensor(wanted))
        check_tokens(store, sequence, wanted[:num_tokens])
        rest = wanted[num_tokens:]
        if rest:
            run(store, sequence, wanted[:num_tokens], rest)
            check_tokens(store, sequence, wanted)
        return num_tokens
