"""Any order of calls of a KV store against the plain model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor

from ollm_conformance.compare import same_bits
from ollm_conformance.parts.lists import KVShape, ListKVStore
from ollm_core import KVStore, MemoryAccount, TierBytes

SHARES = st.one_of(st.just(1.0), st.floats(0, 1))
"""How much of a sequence is kept: often all of it."""


@dataclass(frozen=True, slots=True)
class OpenStore:
    """A store under test."""

    store: KVStore
    account: MemoryAccount
    """All memory it holds."""
    directory: Path
    """All files it has."""
    shape: KVShape
    empty_bytes: int
    """What `account` held when the store was opened."""

    def fill(self, sequence: int, num_tokens: int, seed: int = 0) -> list[Tensor]:
        """Append random tokens to every layer; returns what was given, [2, G, T, D] per layer."""
        return [
            self.append(layer_idx, sequence, num_tokens, 100 * seed + layer_idx)
            for layer_idx in range(self.shape.num_layers)
        ]

    def append(self, layer_idx: int, sequence: int, num_tokens: int, seed: int) -> Tensor:
        """Append random tokens to one layer; returns them, [2, G, T, D]."""
        new = self.shape.random(num_tokens, seed)
        self.store.append(layer_idx, sequence, new[0].clone(), new[1].clone())
        return new

    def content(self, layer_idx: int, sequence: int, num_tokens: int | None = None) -> Tensor:
        """What the store gives, [2, G, S, D]."""
        return self.shape.join(self.store.blocks(layer_idx, sequence, num_tokens))

    def expect(self, sequence: int, layers: list[Tensor], what: str) -> None:
        """Raises AssertionError unless each layer holds exactly what `layers` does."""
        for layer_idx, expected in enumerate(layers):
            told = f"{what}, layer {layer_idx}"
            num_tokens = self.store.num_tokens(sequence, layer_idx)
            assert num_tokens == expected.shape[2], (
                f"{told}: expected {expected.shape[2]} tokens, got {num_tokens}"
            )
            same_bits(self.content(layer_idx, sequence), expected, told)


class KVStoreMachine(RuleBasedStateMachine):
    """Whatever is done, the store holds what the plain model does."""

    def __init__(self, open_store: Callable[[ExitStack], OpenStore]) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.opened = open_store(self.stack)
        self.store, self.account = self.opened.store, self.opened.account
        self.model = ListKVStore(self.opened.shape)
        self.pairs: list[tuple[int, int]] = []
        self.seed = 0

    def pick(self, index: int) -> tuple[int, int]:
        """One sequence, as the store and the model name it."""
        return self.pairs[index % len(self.pairs)]

    @initialize(length=st.integers(1, 9))
    def begin(self, length: int) -> None:
        """A sequence and its fork, which both have grown."""
        self.new()
        self.append(0, [length])
        self.fork(0, 1.0)
        self.append(0, [3])
        self.append(1, [4])

    @rule()
    def new(self) -> None:
        self.pairs.append((self.store.new_sequence(), self.model.new_sequence()))

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 9), lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3))
    def append(self, index: int, lengths: list[int]) -> None:
        sequence, expected = self.pick(index)
        for layer_idx in range(self.opened.shape.num_layers):
            for length in lengths:
                self.seed += 1
                new = self.opened.append(layer_idx, sequence, length, self.seed)
                self.model.append(layer_idx, expected, new[0], new[1])

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 9), extra=st.integers(0, 20))
    def reserve(self, index: int, extra: int) -> None:
        sequence, _ = self.pick(index)
        length = self.store.num_tokens(sequence) + extra
        used = self.account.used
        growth = self.store.growth_bytes(sequence, length)
        self.store.reserve(sequence, length)
        taken = self.account.used - used
        assert taken <= growth.device + growth.host, (
            f"expected at most {growth} taken by a reservation, got {taken} bytes"
        )
        left = self.store.growth_bytes(sequence, length)
        assert left == TierBytes(), f"expected no growth after the reservation, got {left}"

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 9), share=SHARES)
    def truncate(self, index: int, share: float) -> None:
        sequence, expected = self.pick(index)
        length = int(share * self.model.num_tokens(expected))
        self.store.truncate(sequence, length)
        self.model.truncate(expected, length)

    @precondition(lambda self: self.pairs and len(self.pairs) < 6)
    @rule(index=st.integers(0, 9), share=SHARES)
    def fork(self, index: int, share: float) -> None:
        sequence, expected = self.pick(index)
        length = int(share * self.model.num_tokens(expected))
        self.pairs.append((self.store.fork(sequence, length), self.model.fork(expected, length)))

    @precondition(lambda self: self.pairs)
    @rule(index=st.integers(0, 9))
    def release(self, index: int) -> None:
        sequence, expected = self.pick(index)
        self.store.release(sequence)
        self.model.release(expected)
        self.pairs.remove((sequence, expected))

    @invariant()
    def same_content(self) -> None:
        """Every layer of every sequence, whole and the first half of it."""
        for sequence, expected in self.pairs:
            layers = self.model.layers[expected]
            self.opened.expect(sequence, layers, f"sequence {sequence}")
            for layer_idx, layer in enumerate(layers):
                half = layer.shape[2] // 2
                found = self.opened.content(layer_idx, sequence, half)
                assert torch.equal(found, layer[:, :, :half]), (
                    f"sequence {sequence}, layer {layer_idx}: expected the first {half} tokens of "
                    "what it has, got others"
                )

    @invariant()
    def nothing_is_lost(self) -> None:
        """Without sequences a store holds what it held when it was opened; it never tells of more
        memory than it holds.
        """
        used, tiers = self.account.used, self.store.tier_bytes()
        assert tiers.device + tiers.host <= used, (
            f"expected at most the {used} bytes of memory that are reserved to be told, got {tiers}"
        )
        assert self.pairs or used == self.opened.empty_bytes, (
            f"expected {self.opened.empty_bytes} bytes held without sequences, got {used}"
        )

    def teardown(self) -> None:
        self.stack.close()
