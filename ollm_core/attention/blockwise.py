"""Attention block by block: the partial results are merged by their log-sum-exp, so no key is
needed twice.

Its memory does not grow with the context. The fused kernels are torch's own; the merge is that of
FlashAttention (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ollm_core.attention.options import CARRIED
from ollm_core.errors import UnsupportedError
from ollm_core.interfaces import KVView


def blockwise_attention(
    module: torch.nn.Module, query: Tensor, view: KVView, *, scaling: float, **options: Any
) -> Tensor:
    """See Attention. Accumulates in float32; refuses windows, sinks and soft caps."""
    for name, value in options.items():
        if value is not None and name not in CARRIED:
            raise UnsupportedError(f"block-wise attention does not know the option {name!r}")
    rows = [_one_row(query[row], view, row, scaling) for row in range(query.shape[0])]
    return torch.stack(rows)


def _one_row(query: Tensor, view: KVView, row: int, scaling: float) -> Tensor:
    """[H, T, D] -> [T, H, D]."""
    keys, values = view.keys[row], view.values[row]  # [G, T, D]
    num_heads, num_new, head_dim = query.shape
    group = num_heads // keys.shape[0]
    # A group's queries share their keys: folded into one long query, no key is repeated.
    folded = query.reshape(keys.shape[0], group * num_new, head_dim)
    if num_new == 1:
        total, total_lse = _partial(folded, keys, values, scaling, causal=False)
    else:
        repeated = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
        total, total_lse = _partial(query, *repeated, scaling, causal=True)
    total = total.reshape(folded.shape).float()  # [G, group * T, D]
    total_lse = total_lse.reshape(folded.shape[:2])
    for past_keys, past_values in view.past(row):
        part, part_lse = _partial(folded, past_keys, past_values, scaling, causal=False)
        merged = torch.logaddexp(total_lse, part_lse)
        total = total * (total_lse - merged).exp_()[..., None]
        total.addcmul_(part.float(), (part_lse - merged).exp_()[..., None])
        total_lse = merged
    return total.to(query.dtype).view(num_heads, num_new, head_dim).transpose(0, 1).contiguous()


def _partial(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention over some keys: [N, T, D] x [N, n, D] -> output [N, T, D], log-sum-exp [N, T]."""
    arguments = query[None], keys[None], values[None]
    if query.device.type == "cuda" and query.dtype != torch.float32:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *arguments, 0.0, causal, False, scale=scaling
        )
        return output[0], lse[0].float()
    if query.device.type in ("cpu", "meta"):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *arguments, 0.0, causal, scale=scaling
        )
        return output[0], lse[0].float()
    scores = torch.matmul(query, keys.transpose(1, 2)).float() * scaling
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).triu_(1)
        scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp_()
    return torch.matmul(weights.to(values.dtype), values), lse
