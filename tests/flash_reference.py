"""What FlashAttention 2 computes (version 2.8.3), written plainly for a CPU."""

from __future__ import annotations

import torch

from ollm_core.attention.kernels import FlashKernel, flash_attn_2, torch_flash

EVERY = frozenset({torch.float32, torch.float16, torch.bfloat16})
PACKAGE = FlashKernel("flash-attn", flash_attn_2, EVERY)
TORCH = FlashKernel("torch", torch_flash, EVERY)


def flash_reference(query, keys, values, scaling, causal, window):
    """query [B, T, H, D], keys and values [B, n, G, D] -> output [B, T, H, D] in the query's dtype,
    log-sum-exp [B, H, T] in float32.

    `window` are the keys before and behind each query's place, the last query's being the last
    key; -1 on both sides is without end. On one side alone -1 is n keys, which is not without end
    where there are more queries than keys. A query that sees nothing gives 0 and infinity.
    """
    num_new, num_keys, head_dim = query.shape[1], keys.shape[1], query.shape[-1]
    assert query.dtype == keys.dtype == values.dtype
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert head_dim % 8 == 0
    assert head_dim <= 256
    assert query.shape[2] % keys.shape[2] == 0
    left, right = (-1 if side >= num_keys else side for side in window)
    causal = causal and num_new > 1
    right = 0 if causal else right
    if left < 0 <= right:
        left = num_new + num_keys if right == 0 else num_keys
    elif right < 0 <= left:
        right = num_keys
    group = query.shape[2] // keys.shape[2]
    q, k, v = (t.transpose(1, 2).float() for t in (query, keys, values))
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if left >= 0:
        place = torch.arange(num_new)[:, None] + num_keys - num_new
        key = torch.arange(num_keys)
        scores = scores.masked_fill((key < place - left) | (key > place + right), -torch.inf)
    lse = scores.logsumexp(-1)
    empty = lse == -torch.inf
    weights = (scores - lse[..., None]).exp().masked_fill(empty[..., None], 0.0)
    output = weights @ v.repeat_interleave(group, 1)
    return output.transpose(1, 2).to(query.dtype), lse.masked_fill(empty, torch.inf)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """The package's function, with its defaults."""
    assert not dropout_p
    assert not softcap
    scaling = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    output, lse = flash_reference(q, k, v, scaling, causal, window_size)
    return (output, lse, None) if return_attn_probs else output


def flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale=None, window_size_left=None, window_size_right=None, **others,
):  # fmt: skip
    """torch's operator `aten::_flash_attention_forward`."""
    assert cum_seq_q is cum_seq_k is None
    assert (max_q, max_k) == (query.shape[1], key.shape[1])
    assert not dropout_p
    assert not return_debug_mask
    assert not any(other is not None for other in others.values())
    window = tuple(-1 if side is None else side for side in (window_size_left, window_size_right))
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    output, lse = flash_reference(query, key, value, scaling, is_causal, window)
    return output, lse, torch.zeros(2), torch.zeros(()), torch.zeros(0)
