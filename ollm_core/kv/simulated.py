"""Simulated KV stores for dry runs: they reserve what the real ones would, and hold no data."""

from __future__ import annotations

from dataclasses import replace

import torch

from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.memory import DeviceMemory
from ollm_core.kv.block_store import BlockKVStore
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.kv.recurrent.states import state_store
from ollm_core.kv.tiers import TIERS
from ollm_core.memory.accounts import Accounts

_META = torch.device("meta")


class SimulatedKVStore(BlockKVStore):
    """The block tables and accounts of a store in `tier`, a key of `TIERS`."""

    def __init__(
        self,
        tier: str,
        geometry: KVGeometry,
        accounts: Accounts,
        memory: DeviceMemory,
    ) -> None:
        """`memory` is that of the device that is planned for. Raises DoesNotFitError."""
        bare = replace(geometry, device=_META)
        storage, memory = TIERS[tier].simulate(bare, accounts, memory)
        super().__init__(bare, storage, accounts.device, memory)

    def advance(self, sequence: int, num_tokens: int, longest: int) -> None:
        """Let `num_tokens` more tokens be there in each layer, as calls of `append` with at most
        `longest` would.
        """
        for layer_idx in range(self.geometry.num_layers):
            table = self._table(layer_idx, sequence)
            # A layer that keeps everything does the same in one call.
            most = longest if self.geometry.kinds[layer_idx].window else num_tokens
            for done in range(0, num_tokens, most):
                for _ in self._manager.room(layer_idx, table, min(most, num_tokens - done)):
                    pass


class SimulatedHybridStore(HybridKVStore):
    """The same for a model with recurrent layers."""

    def __init__(
        self,
        tier: str,
        geometry: KVGeometry,
        accounts: Accounts,
        memory: DeviceMemory,
    ) -> None:
        """See SimulatedKVStore."""
        bare = replace(geometry, device=_META)
        states = state_store(tier, bare, accounts, memory, _META)
        self._planned = SimulatedKVStore(tier, geometry.attention_layers(), accounts, memory)
        super().__init__(bare, self._planned, states)

    def advance(self, sequence: int, num_tokens: int, longest: int) -> None:
        """See SimulatedKVStore."""
        self._planned.advance(sequence, num_tokens, longest)
        for layer_idx, shapes in self._states.shapes.items():
            state = [torch.empty(shape, dtype=dtype, device=_META) for shape, dtype in shapes]
            self.put_state(layer_idx, sequence, num_tokens, state)


def simulated_store(
    tier: str, geometry: KVGeometry, accounts: Accounts, memory: DeviceMemory
) -> SimulatedKVStore | SimulatedHybridStore:
    """What stands for the store that a run would have. Raises DoesNotFitError."""
    recurrent = not geometry.is_plain
    return (SimulatedHybridStore if recurrent else SimulatedKVStore)(
        tier, geometry, accounts, memory
    )
