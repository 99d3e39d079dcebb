"""The geometry of keys and values: sizes in bytes, and what a window needs."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ollm_core import CacheKind, KVGeometry, StateShape

CPU = torch.device("cpu")
KINDS = (
    CacheKind("full", num_kv_heads=3, head_dim=5),
    CacheKind("sliding", num_kv_heads=2, head_dim=7, window=6),
    CacheKind("recurrent", states=(StateShape((4, 3)), StateShape((2, 2), float32=True))),
)


def test_bytes_of_each_kind():
    """Keys and values of a block; a state in its own dtype or in float32."""
    geometry = KVGeometry(KINDS, torch.bfloat16, CPU, block_size=4)
    assert [geometry.block_bytes(i) for i in (0, 1)] == [2 * 3 * 4 * 5 * 2, 2 * 2 * 4 * 7 * 2]
    assert geometry.state_bytes(2) == 4 * 3 * 2 + 2 * 2 * 4
    buffer = torch.zeros(1000, dtype=torch.uint8)
    block = geometry.as_block(1, buffer)
    assert (block.shape, block.dtype) == ((2, 2, 4, 7), torch.bfloat16)
    block.fill_(1)
    assert buffer.count_nonzero() == geometry.block_bytes(1)  # 1.0 is 0x3f80
    assert geometry.attention_layers().kinds == KINDS[:2]
    blocks = 3 * geometry.block_bytes(0) + 2 * geometry.block_bytes(1)  # of 9 tokens, 4 a block
    assert geometry.sequence_bytes(9) == blocks + geometry.state_bytes(2)


@pytest.mark.parametrize("window", [1, 2, 6, 300])
def test_a_window_needs_what_transformers_keeps(window):
    """To go on after any number of tokens, one at a time."""
    kind = CacheKind("sliding", 1, 1, window=window)
    geometry = KVGeometry((kind,), torch.float32, CPU)
    layer = DynamicSlidingWindowLayer(sliding_window=window)
    for num_tokens in range(1, 400):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
        kept = num_tokens - geometry.first_needed(0, num_tokens)
        assert kept == max(min(num_tokens, window - 1), 1)
        assert kept >= layer.keys.shape[2] or window == 1
    assert KVGeometry(KINDS, torch.float32, CPU).first_needed(0, 1000) == 0
