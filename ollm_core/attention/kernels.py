"""The kernels of blockwise attention: each computes one part, some queries over some keys, and the
log-sum-exp by which parts are merged.

Letters: G key-value heads, P query heads that share one, T queries, n keys, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ollm_core.device.buffers import round_up
from ollm_core.device.dtypes import HALF

_MOST_HEAD_DIM = 256  # of the flash kernels
_HEAD_UNIT = 8  # they take heads of a multiple of it
_SPLIT_ROWS = 64  # queries of one block of threads, where the kernels split keys among several
_SPLIT_KEYS = {64: 256, 128: 128, _MOST_HEAD_DIM: 64}  # by head size, the fewest of one split
_MOST_SPLITS = 128
_LARGEST_ROUNDED = 192  # up to it heads take a multiple of 32 in a split, others the most
_MOST_BLOCKS = 320  # from there on a device of 200 multiprocessors does not split


class Part(NamedTuple):
    """One call of a kernel. Queries and keys are aligned at their ends: query i of T stands at key
    i + n - T. Each query must see a key.
    """

    query: Tensor
    """[G, P, T, D]."""
    keys: Tensor
    """[G, n, D], or [B, G, n, D] for `Kernel.several`; as `values`."""
    values: Tensor
    scaling: float
    causal: bool = False
    """T is n, and each query sees its own key and those before."""
    before: int | None = None
    """At most so many keys before its own place. Without `causal` there are no more queries than
    keys, and each sees all keys behind.
    """
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""

    def hidden(self) -> Tensor:
        """[T, n], true where a query does not see a key."""
        num_new, num_keys, device = self.query.shape[2], self.keys.shape[1], self.keys.device
        rows = torch.arange(num_new, device=device)[:, None] + num_keys - num_new
        back = rows - torch.arange(num_keys, device=device)
        hidden = (back < 0) & self.causal
        return hidden if self.before is None else hidden | (back > self.before)


PartialResult = tuple[Tensor, Tensor]
"""Output [G, P, T, D] and the log-sum-exp of the scaled scores [G, P, T] in float32."""


class Kernel(ABC):
    """Computes a Part."""

    name: str
    causal: bool = True
    """Whether it can hide the keys behind each query's own."""
    windows: bool = True
    """Whether it can hide keys that are too far before it. A kernel that cannot is given all that
    is seen in whole, and `masked_products` does the rest.
    """
    caps: bool = False
    """Whether it can cap scores."""

    @abstractmethod
    def takes(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether it computes in this dtype, with heads of this size."""

    @abstractmethod
    def __call__(self, part: Part) -> PartialResult:
        """Attention of the part's queries over its keys."""

    def several(self, part: Part) -> PartialResult | None:
        """What B calls, one for each block of keys, would give, bit for bit, in one call: output
        [B, G, P, T, D] and log-sum-exp [B, G, P, T]. Nothing is hidden. None, as by default, if it
        cannot.
        """
        return None


class CpuFlash(Kernel):
    """torch's fused kernel on a CPU, in float32 whatever the dtype of keys and values. It repeats
    keys where it hides some.
    """

    name = "torch"
    windows = False

    def takes(self, dtype: torch.dtype, head_dim: int) -> bool:
        return True

    def __call__(self, part: Part) -> PartialResult:
        query, keys, values, scaling, causal, before, softcap = part
        assert before is None, "declared by `windows`"
        assert softcap is None, "declared by `caps`"
        shape = query.shape
        query, keys, values = query.float(), keys.float(), values.float()
        if causal:  # its mask counts queries from the first key: here there are as many
            group = query.shape[1]
            rows = query.flatten(0, 1)
            keys, values = (t.repeat_interleave(group, 0) for t in (keys, values))
        else:  # queries that share keys, as one long query
            rows = query.flatten(1, 2)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows[None], keys[None], values[None], 0.0, causal, scale=scaling
        )
        return output[0].reshape(shape), lse[0].reshape(shape[:3])

    def several(self, part: Part) -> PartialResult | None:
        """See Kernel. Not in half precision: all blocks would be widened at the same time."""
        query, keys, values, scaling, *_ = part
        if query.dtype in HALF:
            return None
        rows = query.flatten(1, 2)  # [G, P * T, D]
        shape = len(keys), *query.shape[:3]
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows.expand(len(keys), *rows.shape), keys, values, 0.0, False, scale=scaling
        )
        return output.reshape(*shape, -1), lse.reshape(shape)


class Products(Kernel):
    """Matrix products in float32, in any dtype and on any device. What it takes grows with queries
    times keys, so it is given tiles.
    """

    name = "products"
    causal = False
    windows = False
    caps = True

    def takes(self, dtype: torch.dtype, head_dim: int) -> bool:
        return True

    def __call__(self, part: Part) -> PartialResult:
        assert not part.causal, "declared by `causal`"
        assert part.before is None, "declared by `windows`"
        return masked_products(part, None)


def masked_products(part: Part, hidden: Tensor | None) -> PartialResult:
    """As a kernel, with any mask: `hidden` [T, n] is true where a key is not seen. What the part
    itself says of that is not looked at.
    """
    query, keys, values, scaling, *_, softcap = part
    rows = query.flatten(1, 2)  # [G, P * T, D]
    scores = torch.matmul(rows.float(), keys.float().transpose(1, 2)).mul_(scaling)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores.masked_fill_(hidden.repeat(query.shape[1], 1), -torch.inf)
    # In place: torch's own log-sum-exp holds another copy of the scores, which no trace sees.
    most = scores.amax(-1, keepdim=True)
    total = scores.sub_(most).exp_().sum(-1, keepdim=True)
    output = torch.matmul(scores.div_(total), values.float())
    lse = most.add_(total.log_())
    return output.reshape(query.shape), lse.reshape(query.shape[:3])


FlashCall = Callable[[Tensor, Tensor, Tensor, float, bool, int], tuple[Tensor, Tensor]]
"""query [1, T, H, D], keys and values [1, n, G, D], scaling, whether causal, keys before (-1: all)
-> output [1, T, H, D], log-sum-exp [1, H, T or more].
"""


@dataclass(frozen=True, slots=True)
class FlashKernel(Kernel):
    """The kernels of FlashAttention 2 on CUDA, of torch or of the package flash-attn: query heads
    share keys as they are, windows need no tiles.
    """

    name: str
    call: FlashCall
    dtypes: frozenset[torch.dtype] = HALF

    def takes(self, dtype: torch.dtype, head_dim: int) -> bool:
        return dtype in self.dtypes and head_dim <= _MOST_HEAD_DIM

    def __call__(self, part: Part) -> PartialResult:
        query, keys, values, scaling, causal, before, softcap = part
        assert softcap is None, "declared by `caps`"
        num_groups, group, num_new, head_dim = query.shape
        if missing := -head_dim % _HEAD_UNIT:  # zeros change no score
            query, keys, values = (
                torch.nn.functional.pad(t, (0, missing)) for t in (query, keys, values)
            )
        arguments = (
            query.flatten(0, 1).transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
        )
        if query.device.type == "meta":
            output, lse = _described(*arguments)
        else:
            left = -1 if before is None else before
            output, lse = self.call(*arguments, scaling, causal, left)
        output = output[0, :, :, :head_dim].transpose(0, 1)
        heads = (num_groups, group)
        return output.unflatten(0, heads), lse[0, :, :num_new].float().unflatten(0, heads)


def torch_flash(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool, before: int
) -> tuple[Tensor, Tensor]:
    """A FlashCall: the kernels that torch has built in. That of `scaled_dot_product_attention`
    takes no windows, the one below it does.
    """
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, None, None, query.shape[1], keys.shape[1], 0.0, causal, False,
        scale=scaling,
        window_size_left=None if before < 0 else before,
        window_size_right=0 if causal and before >= 0 else None,
    )  # fmt: skip
    return output, lse


def flash_attn_2(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool, before: int
) -> tuple[Tensor, Tensor]:
    """A FlashCall: the package flash-attn, which is imported here."""
    from flash_attn import flash_attn_func

    output, lse, _ = flash_attn_func(
        query,
        keys,
        values,
        softmax_scale=scaling,
        causal=causal,
        window_size=(before, 0 if causal and before >= 0 else -1),
        return_attn_probs=True,  # which also gives the log-sum-exp; no probabilities are made
    )
    return output, lse


def _described(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What a FlashCall allocates, without data. Where there are few queries the kernels split the
    keys, and hold a float32 result of each split until they are merged.
    """
    _, num_new, num_heads, head_dim = query.shape
    shape = (1, num_heads, num_new)
    split_keys = next(count for most, count in _SPLIT_KEYS.items() if head_dim <= most)
    splits = min(-(-keys.shape[1] // split_keys), _MOST_SPLITS)
    rounded = round_up(head_dim, 32) if head_dim <= _LARGEST_ROUNDED else _MOST_HEAD_DIM
    partial: Tensor | None = None
    if splits > 1 and num_heads * -(-num_new // _SPLIT_ROWS) < _MOST_BLOCKS:
        partial = query.new_empty(splits, *shape, rounded + 1, dtype=torch.float32)
    output = torch.empty_like(query)
    lse = query.new_empty(shape, dtype=torch.float32)
    del partial
    return output, lse
