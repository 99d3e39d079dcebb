"""Recurrent states of many sequences, in memory: positions and owners, no keys and values."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import KVGeometry, Tier, TierBytes
from ollm_core.device.memory import SHARED, DeviceMemory
from ollm_core.errors import KVStoreError
from ollm_core.kv.buffer_pool import Charges
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.pair import PerMemory

_CPU = torch.device("cpu")

State = tuple[Tensor, ...]
OnState = Callable[[int, int, int, int, Sequence[Tensor]], None]
"""Told of each state that is put: layer, sequence, number of new tokens, of all, the state."""


@dataclass(eq=False, slots=True)
class _Layer:
    """One layer of one sequence."""

    num_tokens: int = 0
    at: dict[int, State] = field(default_factory=dict)
    """By number of tokens: where the sequence is, and where it may go back to."""
    spares: list[State] = field(default_factory=list)
    """Paid for, to be written."""


@dataclass(eq=False, slots=True)
class _Sequence:
    layers: dict[int, _Layer]
    start: int = 0
    """Where the last pass began."""
    num_drafted: int = 0
    """Of the pass to come."""
    keep_from: int = 0
    """States after that many tokens and more are kept in this pass."""
    num_sets: int = 0
    """States of each layer that are paid for."""


class StateStore(Closing):
    """States of the recurrent layers of one model.

    A sequence holds the state where it is, where its last pass began, and before each drafted token
    of that: it can go back there, or to nothing.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        account: MemoryAccount,
        tier: Tier,
        device: torch.device,
        memory: DeviceMemory = SHARED,
    ) -> None:
        """States of the layers of `geometry` that are recurrent, on `device`, counted as `tier`;
        those in host memory are for a device with `memory`.
        """
        self.shapes: Mapping[int, tuple[tuple[tuple[int, ...], torch.dtype], ...]] = {
            layer_idx: geometry.state_shapes(layer_idx)
            for layer_idx, kind in enumerate(geometry.kinds)
            if kind.states
        }
        """Shape and dtype of each tensor of a layer's state."""
        self.on_state: OnState | None = None
        self._tier = tier
        self._device = device
        self._memory = memory
        self._set_bytes = sum(
            memory.host_bytes(num_bytes)
            for shapes in self.shapes.values()
            for num_bytes in (math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
        )
        self._charges = Charges(account)
        self._sequences: dict[int, _Sequence] = {}

    def add(self, sequence: int) -> None:
        """A fresh, empty sequence of that number."""
        self._sequences[sequence] = _Sequence({layer_idx: _Layer() for layer_idx in self.shapes})

    def expect(self, sequence: int, num_drafted: int) -> None:
        """See KeepsStates."""
        self._sequences[sequence].num_drafted = num_drafted

    def growth_bytes(self, sequence: int, num_tokens: int) -> TierBytes:
        """What `reserve` would take."""
        missing = self._wanted(sequence, num_tokens) - self._sequences[sequence].num_sets
        return TierBytes(**{self._tier: max(missing, 0) * self._set_bytes})

    def reserve(self, sequence: int, num_tokens: int) -> None:
        """Begin a pass to `num_tokens`: forget where the one before began. Raises DoesNotFitError
        with nothing changed.
        """
        found, wanted = self._sequences[sequence], self._wanted(sequence, num_tokens)
        if wanted > found.num_sets:
            self._charges.take(
                MemoryKind.RECURRENT_STATES, (wanted - found.num_sets) * self._set_bytes
            )
            found.num_sets = wanted
        found.start = self.num_tokens(sequence)
        found.keep_from = num_tokens - found.num_drafted
        for layer in found.layers.values():
            layer.spares += [layer.at.pop(n) for n in [*layer.at] if n != layer.num_tokens]
        self._shrink(found, wanted)

    def num_tokens(self, sequence: int, layer_idx: int | None = None) -> int:
        """Tokens of `layer_idx`, or, by default, of every layer."""
        layers = self._sequences[sequence].layers
        if layer_idx is not None:
            return layers[layer_idx].num_tokens
        return min((layer.num_tokens for layer in layers.values()), default=sys.maxsize)

    def state(self, layer_idx: int, sequence: int) -> State | None:
        """See KeepsStates."""
        layer = self._sequences[sequence].layers[layer_idx]
        return layer.at.get(layer.num_tokens)

    def put_state(
        self, layer_idx: int, sequence: int, num_new: int, state: Sequence[Tensor]
    ) -> None:
        """See KeepsStates."""
        found = self._sequences[sequence]
        layer = found.layers[layer_idx]
        self._check(layer_idx, state)
        if found.start < layer.num_tokens < found.keep_from:
            layer.spares.append(layer.at.pop(layer.num_tokens))
        kept = layer.spares.pop() if layer.spares else self._new(layer_idx)
        for place, value in zip(kept, state, strict=True):
            place.copy_(value)
        layer.num_tokens += num_new
        layer.at[layer.num_tokens] = kept
        if self.on_state:
            self.on_state(layer_idx, sequence, num_new, layer.num_tokens, kept)

    def restorable(self, sequence: int, num_tokens: int) -> bool:
        """Whether every layer can go back to `num_tokens`."""
        layers = self._sequences[sequence].layers.values()
        return num_tokens == 0 or all(num_tokens in layer.at for layer in layers)

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Go back to `num_tokens`, which must be restorable."""
        found = self._sequences[sequence]
        for layer in found.layers.values():
            layer.spares += [layer.at.pop(n) for n in [*layer.at] if n > num_tokens]
            layer.num_tokens = num_tokens
        found.start = min(found.start, num_tokens)
        self._shrink(found, max((len(layer.at) for layer in found.layers.values()), default=0))

    def fork(self, sequence: int, forked: int, num_tokens: int) -> None:
        """Let `forked`, which is new, begin with a copy of `sequence` at `num_tokens`, which must
        be restorable. Raises DoesNotFitError with nothing changed.
        """
        if num_tokens:
            self._charges.take(MemoryKind.RECURRENT_STATES, self._set_bytes)
        found = self._sequences[forked]
        found.start, found.num_sets = num_tokens, int(num_tokens > 0)
        for layer_idx, source in self._sequences[sequence].layers.items() if num_tokens else ():
            state = tuple(value.clone() for value in source.at[num_tokens])
            found.layers[layer_idx] = _Layer(num_tokens, {num_tokens: state})

    def adopt(self, sequence: int, num_tokens: int, states: Mapping[int, Sequence[Tensor]]) -> None:
        """Let an empty sequence begin after `num_tokens`, with the state of each layer. Raises
        DoesNotFitError or KVStoreError with nothing changed.
        """
        for layer_idx in self.shapes:
            self._check(layer_idx, states[layer_idx])
        self._charges.take(MemoryKind.RECURRENT_STATES, self._set_bytes)
        found = self._sequences[sequence]
        found.start, found.num_sets = num_tokens, 1
        for layer_idx in self.shapes:
            kept = self._new(layer_idx)
            for place, value in zip(kept, states[layer_idx], strict=True):
                place.copy_(value)
            found.layers[layer_idx] = _Layer(num_tokens, {num_tokens: kept})

    def release(self, sequence: int) -> None:
        """Forget a sequence. Unknown ones are ignored."""
        found = self._sequences.pop(sequence, None)
        if found:
            self._shrink(found, 0)

    def tier_bytes(self) -> TierBytes:
        """Bytes held now."""
        return TierBytes(**{self._tier: self._charges.num_bytes})

    def close(self) -> None:
        self._sequences.clear()
        self._charges.close()

    def _wanted(self, sequence: int, num_tokens: int) -> int:
        """Sets of states that a pass to `num_tokens` needs."""
        start, num_drafted = self.num_tokens(sequence), self._sequences[sequence].num_drafted
        return int(start > 0) + min(num_tokens - start, 1 + num_drafted)

    def _shrink(self, found: _Sequence, num_sets: int) -> None:
        """Give back what is paid for beyond `num_sets`."""
        if num_sets < found.num_sets:
            for layer in found.layers.values():
                del layer.spares[max(num_sets - len(layer.at), 0) :]
            self._charges.give(
                MemoryKind.RECURRENT_STATES, (found.num_sets - num_sets) * self._set_bytes
            )
            found.num_sets = num_sets

    def _new(self, layer_idx: int) -> State:
        return tuple(
            self._memory.host_tensor(shape, dtype)
            if self._memory.is_own and self._device.type != "meta"
            else torch.empty(shape, dtype=dtype, device=self._device)
            for shape, dtype in self.shapes[layer_idx]
        )

    def _check(self, layer_idx: int, state: Sequence[Tensor]) -> None:
        given = tuple((tuple(value.shape), value.dtype) for value in state)
        if given != self.shapes[layer_idx]:
            raise KVStoreError(
                f"the state of layer {layer_idx} is {_told(given)}, "
                f"expected {_told(self.shapes[layer_idx])}"
            )


def state_store(
    tier: str,
    geometry: KVGeometry,
    accounts: PerMemory[MemoryAccount],
    memory: DeviceMemory,
    host: torch.device = _CPU,
) -> StateStore:
    """States beside keys and values in `tier`: on the device if these are, else in host memory,
    which `host` stands for.
    """
    if tier == "device":
        return StateStore(geometry, accounts.device, "device", geometry.device)
    return StateStore(geometry, accounts.host, "host", host, memory)


def _told(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return " and ".join(f"{str(dtype)[6:]} {list(shape)}" for shape, dtype in shapes)
