"""What a walk has opened, what it should hold, and what must be true after each step."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ollm_conformance.compare import same_bits
from ollm_conformance.held import same_lengths
from ollm_conformance.seeds import drawn
from ollm_conformance.subject import Subject
from ollm_conformance.walk.rows import Row, common
from ollm_core import CacheKind, MemoryAccount, TierBytes
from ollm_core.testing import SequenceCache, StreamedModel, supports

_SLIDES_BACK = 40
"""Tokens that a layer with a window can go back by."""


@dataclass(eq=False, slots=True)
class Slot:
    """A cache, and what it should have. `sequences` are used by the engine's own calls, `rows` by
    transformers' face; a cache has one kind of them.
    """

    name: str
    cache: SequenceCache
    tier: str
    empty: TierBytes
    """What it held when it was opened."""
    rows: list[Row] = field(default_factory=list)
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    """[B, S], with padding."""
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    """[B, S]: 0 at padding."""
    sequences: dict[int, Row] = field(default_factory=dict)
    fresh: bool = False
    """Whether the last thing that happened to it is a pass, to whose start any family goes back."""


class World:
    """One opened model with its caches, beside what they should be."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.reference = subject.reference()
        self.kinds: list[CacheKind] = list(subject.adapter.caches(subject.config))
        self.tiers = [t for t in ("device", "host", "disk") if self.can(f"kv-{t}")]
        self.directory = subject.new_directory()
        self.kept: list[Tensor] = []
        """Every text that was ever stored on disk, [T] each."""
        self.slots: list[Slot] = []
        self.told = ""
        """What the step that goes on does."""
        config = self.reference.model.config.get_text_config()
        self.longest = min(400, config.max_position_embeddings // 2)
        self.random_state = torch.get_rng_state()
        self.weight_kinds: list[set[str]] = [set(), set()]
        self.open()
        for layers in (None, 0, None):  # kept, and read anew
            self.model.keep_layers(device=layers)
            self.model(input_ids=self.subject.prompt(1)[None])
            for kinds, account in zip(self.weight_kinds, self._accounts(), strict=True):
                kinds |= {kind for kind, used in account.kinds.items() if used}

    def can(self, capability: str) -> bool:
        """Whether the adapter says so."""
        return supports(self.subject.adapter, capability)

    def open(self) -> None:
        """Open the model; KV on disk is kept."""
        options: dict[str, Any] = {"kv": self.tiers[0]}
        if "disk" in self.tiers:
            options |= {"kv": "disk", "kv_dir": self.directory, "keep_kv": True}
        self.model: StreamedModel = self.subject.open(**options)
        self.config_before = self.model.generation_config.to_dict()

    def close(self) -> None:
        """Close it with all that it has opened."""
        self.model.close()
        self.slots.clear()

    def end(self) -> None:
        """Close it, and look whether something is left."""
        self.close()
        for account in self._accounts():
            assert not account.used, f"{account.name}: expected nothing held, got {account.kinds}"

    def new_slot(self, draw: random.Random) -> Slot:
        """An empty cache in some tier."""
        tier = draw.choice(self.tiers)
        cache = self.model.new_cache(kv=tier)
        names = {slot.name for slot in self.slots}
        name = next(letter for letter in "ABCDEFGH" if letter not in names)
        slot = Slot(name, cache, tier, cache.store.tier_bytes())
        self.slots.append(slot)
        return slot

    def close_slot(self, slot: Slot) -> None:
        """Close its cache."""
        slot.cache.close()
        self.slots.remove(slot)

    def tokens(self, draw: random.Random, num_tokens: int) -> Tensor:
        """Random ones, which sometimes say again what they have said."""
        generator = drawn(draw.randrange(1 << 30))
        period = num_tokens if draw.random() < 0.7 else min(num_tokens, 1 + draw.randrange(9))
        piece = torch.randint(5, self.subject.vocab_size, (max(period, 1),), generator=generator)
        return piece.repeat(-(-num_tokens // len(piece)))[:num_tokens]

    def length(self, draw: random.Random) -> int:
        """Of a prompt: mostly short, at times of two chunks, or longer than a block of KV."""
        kind = draw.random()
        if kind < 0.1:
            return 250 + draw.randrange(40) if self.longest >= 300 else 20
        return 90 + draw.randrange(40) if kind < 0.3 else 1 + draw.randrange(30)

    def may_go_back(self, row: Row, num_tokens: int, *, fresh: bool) -> bool:
        """Whether every family of the kind promises that a row goes back to so many tokens."""
        back = len(row) - num_tokens
        if num_tokens == 0 or back == 0:
            return True
        kinds = {kind.kind for kind in self.kinds}
        if any(kind.states for kind in self.kinds) and not (fresh and back == row.last):
            return False
        return "sliding" not in kinds or back <= _SLIDES_BACK

    def remember(self, slot: Slot) -> None:
        """Note what may be found again."""
        if slot.tier == "disk":
            self.kept += [row.ids for row in (*slot.rows, *slot.sequences.values()) if len(row)]

    def at_most_kept(self, ids: Tensor) -> int:
        """The most tokens that may be found of a prompt [T]."""
        return common(ids, self.kept)

    def check(self) -> None:
        """Raises AssertionError unless all is as it should be."""
        for slot in self.slots:
            self._check_slot(slot)
        self._check_memory()
        same_bits(torch.get_rng_state(), self.random_state, "torch's random state")
        assert torch.get_default_dtype() == torch.float32, "expected the default dtype as before"
        found = self.model.generation_config.to_dict()
        changed = {key for key in found if found[key] != self.config_before.get(key)}
        assert not changed, f"generation_config: expected it as before, got other {sorted(changed)}"

    def _check_slot(self, slot: Slot) -> None:
        cache, store, what = slot.cache, slot.cache.store, f"cache {slot.name}"
        num_columns = slot.mask.shape[1] if slot.rows else 0
        found = cache.get_seq_length()
        assert found == num_columns, f"{what}: expected {num_columns} positions, got {found}"
        if slot.rows:
            same_bits(torch.stack(cache.kept).long(), slot.mask, f"{what}: what is no padding")
            lengths = [len(row) for row in slot.rows]
            same_lengths(store, cache.rows, lengths, len(cache), what)
        sequences = slot.sequences
        lengths = [len(row) for row in sequences.values()]
        same_lengths(store, list(sequences), lengths, len(cache), what)
        held, empty = store.tier_bytes(), slot.empty
        if not cache.rows and not sequences:
            for name in ("device", "host"):
                wanted, got = getattr(empty, name), getattr(held, name)
                assert got == wanted, (
                    f"{what}, empty again: expected {wanted} bytes of {name} memory, got {got}"
                )
        longest = max((len(row) for row in (*slot.rows, *sequences.values())), default=0)
        least = self._least_bytes(longest)
        total = held.device + held.host + held.disk
        assert total >= least, f"{what}: expected at least {least} bytes, got {total}"

    def _least_bytes(self, num_tokens: int) -> int:
        """Of keys and values of so many tokens, without windows."""
        size = self.model.dtype.itemsize
        full = [kind for kind in self.kinds if kind.kind == "full"]
        return sum(2 * size * kind.num_kv_heads * kind.head_dim * num_tokens for kind in full)

    def _accounts(self) -> tuple[MemoryAccount, MemoryAccount]:
        accounts = self.model.accounts
        return accounts.device, accounts.host

    def _check_memory(self) -> None:
        """Beside weights the accounts have what the caches say that they hold."""
        stores = [slot.cache.store.tier_bytes() for slot in self.slots]
        for account, weights, name in zip(
            self._accounts(), self.weight_kinds, ("device", "host"), strict=True
        ):
            expected = sum(getattr(held, name) for held in stores)
            kinds = {k: used for k, used in account.kinds.items() if k not in weights and used}
            assert sum(kinds.values()) == expected, (
                f"{account.name} beside weights: expected the {expected} bytes of "
                f"{len(stores)} caches, got {kinds}"
            )
            total = sum(account.kinds.values())
            assert account.used == total, (
                f"{account.name}: expected {total} bytes, the sum of its kinds, got {account.used}"
            )
