"""The memory of a draft model: how much it needs for a text, and its part of the main model's
accounts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.weights import ByteSource
from ollm_core.engine.activations import Workspace
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.pass_planner import PassPlanner, Policy
from ollm_core.engine.torch_state import own_torch_state
from ollm_core.kv.simulated import simulated_store
from ollm_core.memory.accounts import Accounts, open_accounts
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.pair import PerMemory
from ollm_core.model.spec import ModelSpec
from ollm_core.plugins.registry import supports
from ollm_core.weights.eviction import Eviction
from ollm_core.weights.placement import Placement, ResidentWeights
from ollm_core.weights.streamer import TieredStreamer

PIECE = 256
"""Tokens that a draft model reads in one pass. Its weights are in memory, so more passes over a
prompt read nothing twice, and what a pass takes does not grow with the prompt.
"""

_NO_LIMIT = 1 << 62


class DraftMemory:
    """Tells what a draft model takes of memory, by going through a text without data."""

    def __init__(
        self,
        spec: ModelSpec,
        source: ByteSource,
        workspace: Workspace,
        blocks: str = "blockwise",
    ) -> None:
        """`source` is what its weights will be read with; nothing is read here. `blocks` is as in
        Policy.
        """
        self._spec = spec
        self._source = source
        self._workspace = workspace
        self.piece = PIECE if supports(spec.adapter, "chunked-prefill") else None
        """Tokens of a pass; None: all that there are."""
        # A draft may differ in its last bits from the model's own choice, so attention is the kind
        # whose memory does not grow, where the family has it.
        blockwise = supports(spec.adapter, "blockwise-attention")
        self._policy = Policy.of(spec, "blockwise" if blockwise else "exact", self.piece, blocks)
        self.forks = any(kind.states for kind in spec.kinds)
        """Whether drafts are made on a copy, because a state does not go back over many passes."""
        limit: int = spec.skeleton.max_positions
        self.max_positions = limit

    def pass_planner(
        self,
        accounts: Accounts,
        weights: TieredStreamer | ResidentWeights,
        eviction: Eviction | None = None,
    ) -> PassPlanner:
        """How its passes run."""
        return PassPlanner(self._policy, accounts, weights, self._workspace, eviction)

    @own_torch_state()
    def needed(self, num_tokens: int) -> PerMemory[int]:
        """The most that is held of each memory while a text grows to `num_tokens`, at least one,
        with all weights kept.
        """
        accounts, spec = open_accounts(PerMemory(_NO_LIMIT, _NO_LIMIT)), self._spec
        weights = ResidentWeights(
            spec.units,
            self._source,
            spec.dtype,
            spec.device,
            accounts,
            buffer_bytes=spec.skeleton.buffer_bytes,
            memory=spec.memory,
        )
        pass_planner = self.pass_planner(accounts, weights)
        with ExitStack() as stack:
            weights.reserve()
            stack.callback(weights.unreserve)
            stack.callback(weights.hold, Placement())
            store = simulated_store("device", spec.geometry, accounts, spec.memory)
            stack.callback(store.close)
            sequence = store.new_sequence()
            most = num_tokens - 1 if self.forks and num_tokens > 1 else num_tokens
            longest = min(self.piece or most, most)
            length = 0
            for end in sorted({longest, most}):  # the first piece and the last
                while length < end - longest:
                    step = min(end - longest - length, store.block_size)
                    store.advance(sequence, step, step)
                    store.commit(sequence)
                    length += step
                new = end - length
                ids = torch.zeros(new, dtype=torch.long)
                with pass_planner.admit(store, [NewTokens(sequence, ids, length)]):
                    store.advance(sequence, new, self.piece or new)
                store.commit(sequence)
                length = end
            if self.forks:
                copy = store.fork(sequence)
                with pass_planner.admit(store, [NewTokens(copy, ids[:1], length)]):
                    pass
        return accounts.map(lambda account: account.peak)


class DraftAccounts(Closing):
    """The part of a model's accounts that its draft model may fill."""

    def __init__(self, whole: Accounts, set_aside: Callable[[str, PerMemory[int]], None]) -> None:
        """Nothing yet. `set_aside` reserves in the accounts `whole`, with the model giving way."""
        self.accounts = open_accounts(PerMemory(0, 0))
        self._whole = whole
        self._set_aside = set_aside

    def resize(self, wanted: PerMemory[int]) -> None:
        """Let it be `wanted`, which is no less than is used. Raises DoesNotFitError with nothing
        changed.
        """
        device, host = self.accounts
        more = PerMemory(max(wanted.device - device.limit, 0), max(wanted.host - host.limit, 0))
        self._set_aside(MemoryKind.DRAFT_MODEL, more)
        whole, kind = self._whole, MemoryKind.DRAFT_MODEL
        whole.device.release(kind, device.limit + more.device - wanted.device)
        whole.host.release(kind, host.limit + more.host - wanted.host)
        device.limit, host.limit = wanted.device, wanted.host

    def close(self) -> None:
        """Give all of it back."""
        self.resize(PerMemory(0, 0))
