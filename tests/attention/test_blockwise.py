"""Attention over a window of keys: every query sees its own, past and new."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config
from transformers.models.gemma2 import modeling_gemma2

from ollm_conformance import AttentionConformance
from ollm_core import CacheKind, UnsupportedError
from ollm_core.attention.blockwise import blockwise_attention
from ollm_core.attention.select import find_attention
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.in_memory import DeviceKVStore
from ollm_core.memory.accounts import MemoryAccount

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
}


def attention_case(window, num_past, num_new, softcap=None):
    """A Gemma 2 attention module, and a view of random keys in a store with small blocks."""
    config = Gemma2Config(
        **SIZES, attn_logit_softcapping=softcap, sliding_window=window, attn_implementation="eager"
    )
    module = modeling_gemma2.Gemma2Attention(config, 0)
    kind = CacheKind("sliding", num_kv_heads=2, head_dim=16, window=window)
    geometry = KVGeometry((kind,), torch.float32, torch.device("cpu"), block_size=8)
    store = DeviceKVStore(geometry, MemoryAccount("memory", 10**8))
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, num_past + num_new, 16, generator=generator) for _ in "kv")
    query = torch.randn(1, 4, num_new, 16, generator=generator)
    sequence = store.new_sequence()
    for part in (slice(0, num_past), slice(num_past, None)):
        if keys[:, part].shape[1]:
            store.append(0, sequence, keys[:, part], values[:, part])

    def view(attention):
        new = slice(num_past, None)
        return KVView(
            keys[None, :, new], values[None, :, new], 0, (sequence,), (num_past,), store,
            find_attention(attention, query.device),
        )  # fmt: skip

    return module.eval(), query, view, keys, values


@pytest.mark.parametrize("window", [2, 7, 8, 9, 30, 700])
@pytest.mark.parametrize(("num_past", "num_new"), [(0, 1), (5, 1), (40, 1), (37, 600), (0, 300)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_blockwise_against_a_plain_sum(window, num_past, num_new, sinks, softcap):
    """Every query sums over just the keys of its window, and the sink takes its share."""
    module, query, view, keys, values = attention_case(window, num_past, num_new)
    sink = torch.tensor([-1.0, 0.0, 1.5, 3.0]) if sinks else None
    attend = find_attention("blockwise", query.device, caps=True)
    options = {"scaling": 0.3, "sliding_window": window, "s_aux": sink, "softcap": softcap}
    found = attend(module, query, view("blockwise"), **options)
    scores = query[0].double() @ keys.repeat_interleave(2, 0).double().transpose(1, 2) * 0.3
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    back = torch.arange(num_past, num_past + num_new)[:, None] - torch.arange(keys.shape[1])
    scores.masked_fill_((back < 0) | (back >= window), -torch.inf)
    if sinks:
        scores = torch.cat([scores, sink.double().view(4, 1, 1).expand(4, num_new, 1)], 2)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    expected = (weights @ values.repeat_interleave(2, 0).double()).transpose(0, 1)
    assert (found[0] - expected).abs().max() < 1e-5


def test_soft_caps():
    """Exact attention caps as Gemma 2 does, inside its window; block-wise does so where it is asked
    to, and else refuses.
    """
    module, query, view, keys, values = attention_case(20, 50, 30, softcap=5.0)
    options = {"scaling": 0.25, "sliding_window": 20, "softcap": 5.0}
    found = find_attention("exact", query.device)(module, query, view("exact"), **options)
    back = torch.arange(19, 49)[:, None] - torch.arange(49)  # the window before, and the new ones
    mask = torch.zeros(30, 49).masked_fill_((back < 0) | (back >= 20), torch.finfo().min)
    seen = keys[None, :, 31:], values[None, :, 31:]
    expected, _ = modeling_gemma2.eager_attention_forward(
        module, query, *seen, mask[None, None], scaling=0.25, softcap=5.0
    )
    assert torch.equal(found, expected)
    attend = find_attention("blockwise", query.device, caps=True)
    assert (attend(module, query, view("blockwise"), **options) - expected).abs().max() < 1e-5
    with pytest.raises(UnsupportedError, match="'softcap'"):
        blockwise_attention(module, query, view("blockwise"), **options)


class TestBlockwiseAttention(AttentionConformance):
    """Partial results, merged."""

    attention = blockwise_attention
