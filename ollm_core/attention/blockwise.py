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

_TILE = 256  # new tokens that are attended to together where a window cuts them


def blockwise_attention(
    module: torch.nn.Module,
    query: Tensor,
    view: KVView,
    *,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """See Attention. Accumulates in float32. Knows windows and sinks (`s_aux` [H]); refuses soft
    caps.
    """
    for name, value in options.items():
        if value is not None and name not in CARRIED:
            raise UnsupportedError(f"block-wise attention does not know the option {name!r}")
    rows = []
    for row in range(query.shape[0]):
        partials = _Partials(query[row], view, row, scaling, sliding_window)
        rows.append(partials.result(s_aux))
    return torch.stack(rows)


class _Partials:
    """Attention of the new tokens of one row, summed up over tiles of keys.

    Positions count from the first new token, so earlier keys have negative ones. A group's queries
    share their keys: they are folded into one long query, and no key is repeated.
    """

    def __init__(
        self, query: Tensor, view: KVView, row: int, scaling: float, window: int | None
    ) -> None:
        """`query` is [H, T, D]."""
        keys, values = view.keys[row], view.values[row]  # [G, T, D]
        num_groups, num_new = keys.shape[:2]
        self._query = query.unflatten(0, (num_groups, -1))  # [G, H / G, T, D]
        self._scaling = scaling
        self._window = window
        self._total: Tensor | None = None  # [G, H / G, T, D] float32
        self._lse: Tensor | None = None  # [G, H / G, T]
        if window is None or num_new <= window:
            self._add_new(keys, values, 0)
        else:
            for begin in range(0, num_new, _TILE):
                tile = slice(begin, begin + _TILE)
                self._add_new(keys[:, tile], values[:, tile], begin)
        position = view.first(row, window) - view.starts[row]
        for past_keys, past_values in view.past(row, window):
            self._add_before(past_keys, past_values, position, 0)
            position += past_keys.shape[1]

    def result(self, sinks: Tensor | None) -> Tensor:
        """[T, H, D]."""
        assert self._total is not None
        assert self._lse is not None
        total = self._total
        if sinks is not None:  # one more key without a value: it takes its part of the weight
            share = torch.sigmoid(self._lse - sinks.float().view(*self._lse.shape[:2], 1))
            total = total * share[..., None]
        return total.to(self._query.dtype).flatten(0, 1).transpose(0, 1).contiguous()

    def _add_new(self, keys: Tensor, values: Tensor, begin: int) -> None:
        """Keys of new tokens from `begin` on: seen by themselves and by later ones."""
        end = begin + keys.shape[1]
        part = self._query[:, :, begin:end]
        _, group, num_new, _ = part.shape
        if self._window is not None and num_new > self._window:
            self._add_masked(keys, values, begin, begin, end)
        elif num_new == 1:
            self._add_visible(keys, values, begin, end)
        else:
            repeated = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            output, lse = _partial(part.flatten(0, 1), *repeated, self._scaling, causal=True)
            self._merge(output.reshape(part.shape), lse.reshape(part.shape[:3]), begin, end)
        if end < self._query.shape[2]:
            self._add_before(keys, values, begin, end)

    def _add_before(self, keys: Tensor, values: Tensor, begin: int, first: int) -> None:
        """Keys from `begin` on, all before the query `first`, seen from there on as far as the
        window goes.
        """
        num_new = self._query.shape[2]
        if self._window is None:
            self._add_visible(keys, values, first, num_new)
            return
        whole = min(max(begin + self._window, first), num_new)  # from here on not all are seen
        end = min(max(begin + keys.shape[1] - 1 + self._window, first), num_new)
        if first < whole:
            self._add_visible(keys, values, first, whole)
        for tile in range(whole, end, _TILE):
            self._add_masked(keys, values, begin, tile, min(tile + _TILE, end))

    def _add_visible(self, keys: Tensor, values: Tensor, first: int, end: int) -> None:
        """Keys that the queries from `first` to `end` see all of."""
        part = self._query[:, :, first:end]
        folded = part.flatten(1, 2)  # [G, H / G * T, D]
        output, lse = _partial(folded, keys, values, self._scaling, causal=False)
        self._merge(output.reshape(part.shape), lse.reshape(part.shape[:3]), first, end)

    def _add_masked(self, keys: Tensor, values: Tensor, begin: int, first: int, end: int) -> None:
        """Keys from `begin` on, of which each query from `first` to `end` sees at least one."""
        assert self._window is not None
        part = self._query[:, :, first:end]
        at = torch.arange(first, end, device=keys.device)[:, None]
        back = at - torch.arange(begin, begin + keys.shape[1], device=keys.device)  # [T, n]
        hidden = (back < 0) | (back >= self._window)
        hidden = hidden.repeat(part.shape[1], 1)
        output, lse = _product(part.flatten(1, 2), keys, values, self._scaling, hidden)
        self._merge(output.reshape(part.shape), lse.reshape(part.shape[:3]), first, end)

    def _merge(self, output: Tensor, lse: Tensor, first: int, end: int) -> None:
        """Add a part for the queries from `first` to `end`."""
        whole = end - first == self._query.shape[2]
        if self._total is None or self._lse is None:
            if whole:
                self._total, self._lse = output.float(), lse
                return
            self._total = self._query.new_zeros(self._query.shape, dtype=torch.float32)
            self._lse = self._total.new_full(self._query.shape[:3], -torch.inf)
        total, old = self._total[:, :, first:end], self._lse[:, :, first:end]
        merged = torch.logaddexp(old, lse)
        total.mul_((old - merged).exp_()[..., None])
        total.addcmul_(output.float(), (lse - merged).exp_()[..., None])
        self._lse[:, :, first:end] = merged


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
    hidden = None
    if causal:
        shape = query.shape[1], keys.shape[1]
        hidden = torch.ones(shape, dtype=torch.bool, device=query.device).triu_(1)
    return _product(query, keys, values, scaling, hidden)


def _product(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `_partial`, in float32, with any mask: `hidden` [T, n] is true where a key is not seen."""
    scores = torch.matmul(query.float(), keys.float().transpose(1, 2)).mul_(scaling)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    return torch.matmul(weights, values.float()), lse
