"""Prefixes of token ids, kept in a directory with keys and values that tell them apart."""

from __future__ import annotations

from pathlib import Path

import torch

from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.memory.accounts import MemoryAccount

GEOMETRY = KVGeometry.uniform(2, 3, 5, torch.float32, torch.device("cpu"), block_size=4)


def open_store(directory, geometry=GEOMETRY, fingerprint="f00d"):
    """A store that keeps."""
    return PrefixCachingStore(
        geometry, MemoryAccount("memory", 10**8), Path(directory), fingerprint
    )


def expected_kv(token_ids, layer_idx, geometry=GEOMETRY):
    """Keys and values [2, G, T, D] that depend on every token before, as a model's do."""
    kind, made = geometry.kinds[layer_idx], []
    state = 17 + layer_idx
    for token in token_ids.tolist():
        state = (state * 31 + token) % 100_003
        generator = torch.Generator().manual_seed(state)
        made.append(torch.randn(2, kind.num_kv_heads, kind.head_dim, generator=generator))
    return torch.stack(made, dim=2).to(geometry.dtype)


def add(store, sequence, token_ids):
    """Let `sequence` hold exactly `token_ids`, in steps, and say so."""
    for begin in range(store.num_tokens(sequence), len(token_ids), 7):
        part = token_ids[begin : begin + 7]
        for layer_idx in range(2):
            both = expected_kv(token_ids[: begin + 7], layer_idx, store.geometry)[:, :, begin:]
            store.append(layer_idx, sequence, both[0], both[1])
        store.keep(sequence, begin, part)


def content(store, layer_idx, sequence):
    """Everything of one layer, [2, G, S, D]."""
    return torch.cat([torch.stack(pair) for pair in store.blocks(layer_idx, sequence)], dim=2)


def kept(directory, *prompts):
    """Fill a store with prompts and close it."""
    with open_store(directory) as store:
        for prompt in prompts:
            sequence, _ = store.find(prompt)
            add(store, sequence, prompt)


def numbers(num_tokens, seed=1):
    """Token ids [T]."""
    return torch.randint(0, 50, (num_tokens,), generator=torch.Generator().manual_seed(seed))
