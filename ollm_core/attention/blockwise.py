"""Blockwise attention: block by block, with partial results merged by their log-sum-exp, so that no
key is needed twice.

Its memory does not grow with the context. What computes a part is a kernel; the merge is that of
FlashAttention (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ollm_core.attention.kernels import (
    CpuFlash,
    FlashKernel,
    Kernel,
    Part,
    Products,
    flash_attn_2,
    masked_products,
    torch_flash,
)
from ollm_core.attention.options import CARRIED
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import TiledBlocks
from ollm_core.errors import UnsupportedError

_TILE = 256  # tokens that are attended to together where a mask is made for them
_FLASH_CAPABILITY = (8, 0)  # of a CUDA device
_FEW = 16  # new tokens, of a step or a draft: their parts are small
_WAITING = 8  # parts of few tokens that are merged together


@dataclass(frozen=True, slots=True)
class BlockwiseAttention:
    """See Attention. Merges in float32. Knows windows and sinks (`s_aux` [H]), and soft caps where
    somebody has compared them with the family's own.
    """

    kernels: tuple[Kernel, ...]
    """The first that takes the dtype and the size of the heads is used; the last takes all. Scores
    are capped by plain products.
    """
    caps: bool = False
    """Whether it takes soft caps."""

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        view: KVView,
        *,
        scaling: float,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> Tensor:
        """`query` [R, H, T, D] -> [R, T, H, D]. Raises UnsupportedError for other options. Takes
        packed views.
        """
        if not self.caps:
            options["softcap"] = softcap
        for name, value in options.items():
            if value is not None and name not in CARRIED:
                raise UnsupportedError(
                    f"block-wise attention does not know the option {name!r} that "
                    f"{type(module).__name__} gives it",
                    hint="exact attention may; the adapter of such a family declares "
                    "blockwise-attention unsupported, and `auto` is then exact",
                )
        able = self.kernels if softcap is None else (Products(),)
        kernel = next(k for k in able if k.takes(query.dtype, query.shape[-1]))
        # A group's queries share their keys: they are folded into one long query.
        groups = view.keys.shape[1]
        folded = [row.unflatten(0, (groups, -1)) for row in view.split(query)]  # [G, H / G, T, D]
        how = scaling, sliding_window, softcap, kernel
        shared = {} if sliding_window is not None else _shared_parts(folded, view, how)
        rows = []
        new_tokens = zip(view.split(view.keys), view.split(view.values), strict=True)
        for row, (keys, values) in enumerate(new_tokens):
            partials = _Partials(folded[row], *how)
            partials.add_new_tokens(keys, values)
            part = shared.pop(row, None)
            begin = part.end if part else 0
            first = max(view.first(row, sliding_window), begin)
            past = view.past(row, sliding_window, begin)
            if part:
                partials.add(part.output, part.lse)
            partials.add_past(past, first - view.starts[row])
            rows.append(partials.result(s_aux))
        return torch.cat(rows)[None] if view.lengths else torch.stack(rows)


def kernels_on(device: torch.device, *, package: bool = False) -> tuple[Kernel, ...]:
    """The kernels for a device, which need not be here, best first: with `package`, those of
    flash-attn before torch's own.
    """
    if device.type != "cuda":
        return (CpuFlash(),)
    here = torch.cuda.is_available()
    if here and torch.cuda.get_device_capability(device) < _FLASH_CAPABILITY:
        return (Products(),)
    calls = {"flash-attn": flash_attn_2} if package else {"torch": torch_flash}
    return (*(FlashKernel(name, call) for name, call in calls.items()), Products())


def most_blocks(num_new: int) -> int:
    """So many earlier blocks take as much memory as any number, where `num_new` tokens attend."""
    return _WAITING if num_new <= _FEW else 2


def blockwise_attention(
    module: torch.nn.Module, query: Tensor, view: KVView, *, scaling: float, **options: Any
) -> Tensor:
    """BlockwiseAttention with the kernels of the device that `query` is on."""
    attend = BlockwiseAttention(kernels_on(query.device))
    return attend(module, query, view, scaling=scaling, **options)


class _SharedPart(NamedTuple):
    """Attention of one row's new tokens over the blocks that it shares with others."""

    end: int
    """The position after these blocks."""
    output: Tensor
    """[G, H / G, T, D] in float32."""
    lse: Tensor
    """[G, H / G, T]."""


_How = tuple[float, int | None, float | None, Kernel]
"""Scaling, window, soft cap and kernel."""


def _shared_parts(query: Sequence[Tensor], view: KVView, how: _How) -> dict[int, _SharedPart]:
    """By row, for those of `query`, [G, H / G, T, D] each, that share blocks with others: each is
    read once. All new tokens see all of the past, so those of several rows are as one long query
    (Hydragen, Juravsky et al. 2024, arXiv:2402.05099).
    """
    runs = view.shared_runs()
    paths: dict[int, list[int]] = {}  # the runs that a row is in, in their order
    for number, run in enumerate(runs):
        for row in run.rows:
            paths.setdefault(row, []).append(number)
    if not paths:
        return {}
    order = sorted(paths, key=paths.__getitem__)  # in it the rows of each run are neighbours
    ends = itertools.accumulate(query[row].shape[2] for row in order)
    tokens = {
        row: slice(end - query[row].shape[2], end) for row, end in zip(order, ends, strict=True)
    }
    queries = torch.cat([query[row] for row in order], 2)  # [G, H / G, N, D]
    output = torch.zeros_like(queries, dtype=torch.float32)
    lse = output.new_full(output.shape[:3], -torch.inf)
    for run in runs:
        part = slice(
            min(tokens[row].start for row in run.rows), max(tokens[row].stop for row in run.rows)
        )
        into = output[:, :, part], lse[:, :, part]
        partials = _Partials(queries[:, :, part], *how, into)
        partials.add_past(view.shared(run), run.first)
    return {
        row: _SharedPart(runs[paths[row][-1]].end, output[:, :, part], lse[:, :, part])
        for row, part in tokens.items()
    }


class _Partials:
    """Attention of the new tokens of one row, or of the rows that share blocks, summed up over
    tiles of keys.

    Positions count from the first new token, so earlier keys have negative ones.
    """

    def __init__(
        self,
        query: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        kernel: Kernel,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`query` is [G, H / G, T, D]. What is summed up goes into output and log-sum-exp `into`,
        where these are given; they have what was there before.
        """
        self._query = query
        self._scaling = scaling
        self._window = window
        self._softcap = softcap
        self._kernel = kernel
        self._into = into
        self._total: Tensor | None  # [G, H / G, T, D] float32
        self._lse: Tensor | None  # [G, H / G, T]
        self._total, self._lse = into or (None, None)
        # Parts [n, G, H / G, T, D] and [n, G, H / G, T] that are not merged yet.
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._num_waiting = 0  # blocks, whatever number of calls they came from
        self._few = query.shape[2] <= _FEW

    def add_new_tokens(self, keys: Tensor, values: Tensor) -> None:
        """Those of the queries' own tokens, [G, T, D] each."""
        num_new = keys.shape[1]
        step = num_new if self._hides(num_new) else _TILE
        for begin in range(0, num_new, step):
            tile = slice(begin, begin + step)
            self._add_new(keys[:, tile], values[:, tile], begin)

    def add_past(self, past: Iterator[tuple[Tensor, Tensor]], position: int) -> None:
        """Earlier keys and values, as `KVStore.blocks` gives them, from `position` on. They come
        last: what waits is merged.
        """
        if self._few and isinstance(past, TiledBlocks):
            for past_keys, past_values in past.tiles():
                self._add_tile(past_keys, past_values, position)
                position += past_keys.shape[0] * past_keys.shape[2]
        else:
            for past_keys, past_values in past:
                self._add_before(past_keys, past_values, position, 0)
                position += past_keys.shape[1]
        if self._waiting:
            self._merge_waiting()

    def add(self, output: Tensor, lse: Tensor) -> None:
        """A part that was summed up elsewhere, [G, H / G, T, D] and [G, H / G, T]."""
        self._merge(output, lse, 0, self._query.shape[2])

    def result(self, sinks: Tensor | None) -> Tensor:
        """[T, H, D]."""
        assert self._total is not None
        assert self._lse is not None
        total = self._total
        if sinks is not None:  # one more key without a value: it takes its part of the weight
            share = torch.sigmoid(self._lse - sinks.float().view(*self._lse.shape[:2], 1))
            total = total * share[..., None]
        return total.to(self._query.dtype).flatten(0, 1).transpose(0, 1).contiguous()

    def _hides(self, num_new: int) -> bool:
        """Whether the kernel itself hides what new tokens do not see of as many keys."""
        cut = self._window is not None and num_new > self._window
        return self._kernel.causal and (self._kernel.windows or not cut)

    def _add_new(self, keys: Tensor, values: Tensor, begin: int) -> None:
        """Keys of new tokens from `begin` on: seen by themselves and by later ones."""
        num_new = keys.shape[1]
        end = begin + num_new
        if num_new == 1:
            self._add_visible(keys, values, begin, end)
        elif self._hides(num_new):
            cut = self._window is not None and num_new > self._window
            before = self._window - 1 if self._window is not None and cut else None
            self._add_part(keys, values, begin, end, causal=True, before=before)
        else:
            self._add_masked(keys, values, begin, begin, end)
        if end < self._query.shape[2]:
            self._add_before(keys, values, begin, end)

    def _add_tile(self, keys: Tensor, values: Tensor, begin: int) -> None:
        """Blocks of earlier keys [B, G, n, D], of which the first is at `begin`. The parts are
        those of the blocks one by one, and so are the groups that they are merged in.
        """
        num_blocks, num_keys = keys.shape[0], keys.shape[2]
        done = 0
        while done < num_blocks:
            at = begin + done * num_keys
            seen = self._window is None or at + self._window >= self._query.shape[2]
            count = min(num_blocks - done, _WAITING - self._num_waiting) if seen else 1
            tile = slice(done, done + count)
            found = None
            if count > 1:
                found = self._kernel.several(
                    Part(self._query, keys[tile], values[tile], self._scaling)
                )
            if found is None:
                self._add_before(keys[done], values[done], at, 0)
                done += 1
            else:
                self._let_wait(*found)
                done += count

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
        if whole < end and self._kernel.windows:  # fewer queries than keys
            before = begin + keys.shape[1] - 1 + self._window - end
            self._add_part(keys, values, whole, end, before=before)
            return
        for tile in range(whole, end, _TILE):
            self._add_masked(keys, values, begin, tile, min(tile + _TILE, end))

    def _add_visible(self, keys: Tensor, values: Tensor, first: int, end: int) -> None:
        """Keys that the queries from `first` to `end` see all of."""
        if self._kernel.causal:
            self._add_part(keys, values, first, end)
            return
        for begin in range(0, keys.shape[1], _TILE):
            tile = slice(begin, begin + _TILE)
            self._add_part(keys[:, tile], values[:, tile], first, end)

    def _add_part(
        self,
        keys: Tensor,
        values: Tensor,
        first: int,
        end: int,
        *,
        causal: bool = False,
        before: int | None = None,
    ) -> None:
        """What the kernel makes of the queries from `first` to `end`."""
        query = self._query[:, :, first:end]
        part = Part(query, keys, values, self._scaling, causal, before, self._softcap)
        output, lse = self._kernel(part)
        self._merge(output, lse, first, end)

    def _add_masked(self, keys: Tensor, values: Tensor, begin: int, first: int, end: int) -> None:
        """Keys from `begin` on, of which each query from `first` to `end` sees at least one."""
        query = self._query[:, :, first:end]
        at = torch.arange(first, end, device=keys.device)[:, None]
        back = at - torch.arange(begin, begin + keys.shape[1], device=keys.device)  # [T, n]
        hidden = back < 0
        if self._window is not None:
            hidden |= back >= self._window
        part = Part(query, keys, values, self._scaling, softcap=self._softcap)
        output, lse = masked_products(part, hidden)
        self._merge(output, lse, first, end)

    def _merge(self, output: Tensor, lse: Tensor, first: int, end: int) -> None:
        """Add a part for the queries from `first` to `end`."""
        whole = end - first == self._query.shape[2]
        if self._few and whole and self._total is not None:
            self._let_wait(output[None], lse[None])
            return
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

    def _let_wait(self, outputs: Tensor, lses: Tensor) -> None:
        """Add parts [n, G, H / G, T, D] and [n, G, H / G, T], of all queries, when there are some.

        Which are merged together is a matter of their number alone, not of how they came: bits do
        not depend on where a store has its blocks.
        """
        self._waiting.append((outputs, lses))
        self._num_waiting += len(outputs)
        if self._num_waiting == _WAITING:
            self._merge_waiting()

    def _merge_waiting(self) -> None:
        """Make one of the parts that wait and of what there is, which is seen by all queries."""
        assert self._total is not None
        assert self._lse is not None
        parts = [(self._total[None], self._lse[None]), *self._waiting]
        # In one layout: sums depend on it, and `cat` takes one that suits its parts.
        outputs, lses = (torch.cat(alike).contiguous() for alike in zip(*parts, strict=True))
        highest = lses.amax(0)
        weights = (lses - highest).exp_()
        whole = weights.sum(0)
        self._total = outputs.mul_(weights[..., None]).sum(0).div_(whole[..., None])
        self._lse = whole.log_().add_(highest)
        if self._into is not None:
            total, lse = self._into
            self._total, self._lse = total.copy_(self._total), lse.copy_(self._lse)
        self._waiting.clear()  # only now: what is planned for are all of them, whoever holds some
        self._num_waiting = 0
