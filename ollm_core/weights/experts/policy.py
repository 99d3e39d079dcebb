"""Chooses which routed experts stay resident: those that get the largest share of their layer's
tokens.

Shares are forgotten by and by, and a newcomer replaces another expert only if it beats it by a
margin. So a long prompt, which asks for every expert once, cannot flush what decoding needs, and
few experts are copied. benchmarks/experts/expert_policies.py compares this with other policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Generic, TypeVar

import torch

ExpertId = tuple[int, int]
"""Layer and number of an expert."""

Kept = TypeVar("Kept")

_HALF_LIFE = 8
"""How often each expert of a layer is chosen, on the average, until an old share counts half."""
_MARGIN = 1.25


class ExpertShares:
    """Each expert's share of the tokens of its layer."""

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        """`num_experts` by layer. At first all experts of a layer have equal shares."""
        ends = list(accumulate(num_experts.values(), initial=0))
        self.first = dict(zip(num_experts, ends, strict=False))
        """Where each layer begins in `values`."""
        equal = [1 / n for n in num_experts.values() for _ in range(n)]
        self.values = torch.tensor(equal, dtype=torch.float32)
        self._num_experts = num_experts

    def of(self, layer_idx: int) -> list[float]:
        """The shares of a layer's experts."""
        first = self.first[layer_idx]
        shares: list[float] = self.values[first : first + self._num_experts[layer_idx]].tolist()
        return shares

    def note(self, layer_idx: int, counts: Mapping[int, int]) -> None:
        """Take in that a layer sent so many tokens to each of these experts."""
        total = sum(counts.values())
        if not total:
            return
        first, num_experts = self.first[layer_idx], self._num_experts[layer_idx]
        old = 0.5 ** (total / (_HALF_LIFE * num_experts))
        shares = self.values[first : first + num_experts]
        new = torch.tensor(list(counts.values()), dtype=torch.float32) * ((1 - old) / total)
        shares.mul_(old).index_add_(0, torch.tensor(list(counts)), new)


class ExpertTier(Generic[Kept]):
    """The experts that one memory keeps, and what it holds for each: never more than `capacity`."""

    def __init__(self, shares: ExpertShares) -> None:
        self.capacity = 0
        self._shares = shares
        self._kept: dict[ExpertId, Kept] = {}
        self._is_kept = torch.zeros(len(shares.values), dtype=torch.bool)
        self._ids = [
            (layer_idx, e)
            for layer_idx, num_experts in shares._num_experts.items()
            for e in range(num_experts)
        ]

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, expert: ExpertId) -> Kept:
        return self._kept[expert]

    def plan(
        self, layer_idx: int, wanted: Iterable[int], newcomers: Iterable[int]
    ) -> dict[int, ExpertId | None]:
        """Which of a layer's `newcomers` should be put here, and what goes for each: None where
        there is room. No expert of the layer that is `wanted` now goes.
        """
        shares = self._shares.of(layer_idx)
        ranked = sorted(newcomers, key=lambda e: -shares[e])
        room = self.capacity - len(self._kept)
        found: dict[int, ExpertId | None] = dict.fromkeys(ranked[:room])
        rest = ranked[room:]
        for e, (share, place) in zip(rest, self._least(layer_idx, wanted, len(rest)), strict=False):
            if shares[e] <= _MARGIN * share:
                break
            found[e] = self._ids[place]
        return found

    def put(self, expert: ExpertId, kept: Kept) -> None:
        """Keep an expert, for which there is room."""
        assert len(self._kept) < self.capacity, "what goes is popped first"
        self._kept[expert] = kept
        self._is_kept[self._place(expert)] = True

    def pop(self, expert: ExpertId) -> Kept:
        """Keep an expert no longer."""
        self._is_kept[self._place(expert)] = False
        return self._kept.pop(expert)

    def resize(self, capacity: int) -> None:
        """Keep at most `capacity`: those with the least shares go."""
        self.capacity = capacity
        if len(self._kept) > capacity:
            for place in self._order()[: len(self._kept) - capacity]:
                self.pop(self._ids[place])

    def _place(self, expert: ExpertId) -> int:
        return self._shares.first[expert[0]] + expert[1]

    def _least(
        self, layer_idx: int, wanted: Iterable[int], count: int
    ) -> Iterator[tuple[float, int]]:
        """Share and place of up to `count` kept experts, least share first, none that is wanted."""
        if not count or not self._kept:
            return iter(())
        may_go = self._is_kept.clone()
        may_go[torch.tensor([self._shares.first[layer_idx] + e for e in wanted])] = False
        places = may_go.nonzero().flatten()
        least = self._shares.values[places].topk(min(count, len(places)), largest=False)
        return zip(least.values.tolist(), places[least.indices].tolist(), strict=True)

    def _order(self) -> list[int]:
        places = self._is_kept.nonzero().flatten()
        found: list[int] = places[self._shares.values[places].argsort()].tolist()
        return found
