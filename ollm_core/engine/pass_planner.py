"""Before a weight pass: what it needs of each memory, how it will be cut, and whether it fits at
all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch

from ollm_core.attention.trial import require_flash
from ollm_core.contracts.kv import KVStore
from ollm_core.engine.activations import Workspace
from ollm_core.engine.batch import Chunk, NewTokens, cut_chunks
from ollm_core.engine.row_steps import round_rows, round_sharing, row_steps
from ollm_core.engine.traced_cache import APART, Sharing
from ollm_core.errors import DoesNotFitError
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.budgets import Budgets
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.pair import PerMemory, added
from ollm_core.memory.sizes import format_size
from ollm_core.model.spec import ModelSpec
from ollm_core.plugins.registry import require, supports
from ollm_core.weights.eviction import Eviction
from ollm_core.weights.placement import HELD_KINDS, ResidentWeights
from ollm_core.weights.streamer import TieredStreamer

_POSITION_BYTES = 8
_TOKEN_BYTES = 10  # an id, and twice whether it is padding


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user fixed. Attention "auto" is `blocks`, where the family has that; a `chunk_size`
    of None leaves the choice to the pass.
    """

    attention: str
    chunk_size: int | None
    blocks: str = "blockwise"
    """What "auto" takes."""
    may_chunk: bool = True
    """Whether the family allows a prompt in chunks."""
    may_step: bool = False
    """Whether it allows one token at a time where it does not allow chunks."""
    may_use_blocks: bool = True
    """Whether the family allows block-wise attention."""

    @classmethod
    def of(
        cls, spec: ModelSpec, attention: str, chunk_size: int | None, blocks: str = "blockwise"
    ) -> Policy:
        """That of a model. Raises UnsupportedError for a fixed attention or chunk size that the
        family does not have, InputError for "flash" in another dtype or on a CPU.
        """
        if attention not in ("auto", "exact"):
            require(spec.adapter, "blockwise-attention")
        may_chunk = supports(spec.adapter, "chunked-prefill")
        own = spec.skeleton.own
        may_step = not may_chunk and own is not None and not own.facts.continues
        if chunk_size is not None and not (may_step and chunk_size == 1):
            require(spec.adapter, "chunked-prefill")
        if attention == "flash":
            require_flash(spec.device, spec.dtype, here=False)
        return cls(
            blocks if (attention, blocks) == ("blockwise", "products") else attention,
            chunk_size,
            blocks=blocks,
            may_chunk=may_chunk,
            may_step=may_step,
            may_use_blocks=supports(spec.adapter, "blockwise-attention"),
        )


@dataclass(frozen=True, slots=True)
class PassPlan:
    """How a weight pass will run, and what it takes beside weights and KV."""

    chunks: tuple[Chunk, ...]
    chunk_size: int
    attention: str
    hidden_on_host: bool
    parts: PerMemory[Mapping[str, int]]
    """By what they are for."""
    shares: bool = False
    """Whether blocks that several rows have stored are read once for all of them."""

    @property
    def needed(self) -> PerMemory[int]:
        """Bytes of each memory."""
        return self.parts.map(lambda parts: sum(parts.values()))


class PassPlanner:
    """Chooses the first way to run a pass that fits, dropping resident weights for it where that
    helps.
    """

    def __init__(
        self,
        policy: Policy,
        accounts: Accounts,
        weights: TieredStreamer | ResidentWeights,
        workspace: Workspace,
        eviction: Eviction | None = None,
    ) -> None:
        """Without `eviction`, what others take of the machine is not looked at."""
        self.eviction = eviction
        self._policy = policy
        self._accounts = accounts
        self._weights = weights
        self._workspace = workspace
        self._hidden_size = workspace.hidden_size
        self._vocab_size = workspace.vocab_size
        self._itemsize = weights.dtype.itemsize
        self._hidden_bytes = workspace.hidden_size * workspace.hidden_itemsize
        self._memory = weights.memory

    @property
    def exact(self) -> bool:
        """Whether exact attention was asked for."""
        return self._policy.attention == "exact"

    @contextmanager
    def admit(self, store: KVStore, work: Sequence[NewTokens]) -> Iterator[PassPlan]:
        """Hold the memory of a pass over `work`. Raises DoesNotFitError, naming what would do,
        before anything runs.

        A pass that is refused, fails or is interrupted leaves each sequence of the store as long as
        it was, and gives back what was reserved for it.
        """
        plan, growth = self.choose(store, work)
        needed = added(plan.needed, growth)
        budgets = self._weight_budgets(needed)
        if self.eviction is not None:
            budgets = self.eviction.within(budgets, needed)
        self._weights.fit(*budgets)
        device, host = self._accounts
        with ExitStack() as undo:
            for item in work:
                undo.callback(store.truncate, item.sequence, item.start)
                store.reserve(item.sequence, item.start + len(item.token_ids), plan.chunk_size)
            with (
                device.holding(MemoryKind.ACTIVATIONS, plan.needed.device),
                host.holding(MemoryKind.ACTIVATIONS, plan.needed.host),
            ):
                yield plan
            undo.pop_all()

    def choose(
        self, store: KVStore, work: Sequence[NewTokens], step: int = 1
    ) -> tuple[PassPlan, PerMemory[int]]:
        """How a pass over `work` would run, and what its KV would take; with a `step`, as much as
        that or more. Holds nothing. Raises DoesNotFitError.
        """
        smallest: PerMemory[int] | None = None
        for plan in self._candidates(store, work, step):
            growth = self._growth(store, work, plan)
            missing = self._missing(added(plan.needed, growth))
            if not any(missing):
                return plan, growth
            smallest = min(smallest or missing, missing)
        assert smallest is not None
        raise self._refusal(work, smallest)

    def fits(self, store: KVStore, work: Sequence[NewTokens]) -> bool:
        """Whether `admit` would let a pass over `work` through. Holds nothing. Numbers of rows are
        asked about only as closely as it takes: what is traced for one does for many.
        """
        for step in row_steps(len(work)):
            with suppress(DoesNotFitError):
                self.choose(store, work, step)
                return True
        return False

    def set_aside(self, kind: str, num_bytes: PerMemory[int]) -> None:
        """Reserve `num_bytes` for what stands beside the model; kept weights give way to it. Raises
        DoesNotFitError, with nothing reserved, where too little would be left to stream through.
        """
        missing = self._missing(num_bytes)
        for account, wanted, lacking in zip(self._accounts, num_bytes, missing, strict=True):
            if lacking and wanted:
                raise DoesNotFitError(
                    f"{account.name}: need {format_size(wanted)} for {kind} beside the model, "
                    f"can spare {format_size(max(wanted - lacking, 0))} "
                    f"(limit {format_size(account.limit)})",
                    hint=f"allow at least {account.limit + lacking} bytes, or go without",
                    memory=account.name,
                    needed_bytes=account.limit + lacking,
                )
        device, host = self._accounts
        if num_bytes.device > device.free or num_bytes.host > host.free:
            self._weights.fit(*self._weight_budgets(num_bytes))
        with ExitStack() as undo:
            device.reserve(kind, num_bytes.device)
            undo.callback(device.release, kind, num_bytes.device)
            host.reserve(kind, num_bytes.host)
            undo.pop_all()

    def _candidates(
        self, store: KVStore, work: Sequence[NewTokens], step: int
    ) -> Iterator[PassPlan]:
        longest = max(len(item.token_ids) for item in work)
        attention = self._policy.attention
        if attention == "auto":
            attention = self._policy.blocks if self._policy.may_use_blocks else "exact"
        first = 2048 if self._memory.is_own else 512
        sizes = [self._policy.chunk_size or first]
        if not self._policy.may_chunk:
            sizes = [self._policy.chunk_size or max(longest, first)]
        while (
            self._policy.may_chunk
            and self._policy.chunk_size is None
            and sizes[-1] > 64
            and longest > 64
        ):
            sizes.append(sizes[-1] // 2)
        together = self._together(store, work, attention)
        for size in sizes:
            aligned, steps = self._workspace.aligned, self._workspace.steps
            apart = tuple(cut_chunks(work, size, aligned=aligned, steps=steps))
            ways = [(apart, (APART,) * len(apart))]
            if attention != "exact":
                chunks = tuple(cut_chunks(work, size, together=together)) if together else apart
                sharing = [self._sharing(store, work, chunk) for chunk in chunks]
                known = tuple(one for one in sharing if one is not None)
                if len(known) == len(chunks) and any(one.runs for one in known):
                    ways.insert(0, (chunks, known))  # where there is memory to compute so
            for hidden_on_host in (False, True):
                for cut, shared in ways:
                    needed = self._needed(work, cut, attention, hidden_on_host, shared, step)
                    shares = any(one.runs for one in shared)
                    yield PassPlan(cut, size, attention, hidden_on_host, needed, shares)

    def _together(
        self, store: KVStore, work: Sequence[NewTokens], attention: str
    ) -> list[tuple[int, ...]]:
        """Rows that have their first block in common, where they may be packed: in the order in
        which they share most.
        """
        may_pack = self._workspace.rows.packs and self._policy.may_chunk and attention != "exact"
        if not may_pack or len({len(item.token_ids) for item in work}) == 1:
            return []
        runs = self._workspace.rows.runs(store, work)
        rows = sorted(
            {row for run in runs for row in run.rows},
            key=lambda row: [number for number, run in enumerate(runs) if row in run.rows],
        )
        return [tuple(row for row in rows if row in run.rows) for run in runs if run.first == 0]

    def _sharing(self, store: KVStore, work: Sequence[NewTokens], chunk: Chunk) -> Sharing | None:
        """How the rows of a chunk share what they have stored, as `RowSharing.of` says."""
        return self._workspace.rows.of(store, [work[row] for row in chunk.rows], chunk.lengths)

    def _needed(
        self,
        work: Sequence[NewTokens],
        chunks: Sequence[Chunk],
        attention: str,
        on_host: bool,
        sharing: Sequence[Sharing],
        step: int,
    ) -> PerMemory[Mapping[str, int]]:
        """`sharing` is that of each of `chunks`, whose rows are rounded up to `step`."""
        num_tokens = sum(len(item.token_ids) for item in work)
        hidden = num_tokens * self._hidden_bytes
        shapes: dict[tuple[int, int], int] = {}
        layers: dict[tuple[int, int, Sharing], int] = {}
        handed = [0]
        for chunk, shared in zip(chunks, sharing, strict=True):
            past = max(work[row].start for row in chunk.rows) + chunk.begin
            shape = chunk.num_rows, chunk.num_tokens
            if chunk.num_tokens == 1 and not chunk.lengths:
                shape, shared = (round_rows(shape[0], step), 1), round_sharing(shared, step)
            shapes[shape] = max(shapes.get(shape, 0), past)
            call = *shape, shared
            layers[call] = max(layers.get(call, 0), past)
            handed.append(self._workspace.handed_bytes(*shape, past, attention))
        hidden += sum(handed)
        if len(chunks) > 1:  # of what was there before, too
            hidden += self._workspace.shared_bytes(num_tokens + sum(one.start for one in work))
        layer = max(
            self._workspace.layer_bytes(
                num_rows, num_new, past, attention, shared, self._weights.spare_bytes
            )
            for (num_rows, num_new, shared), past in layers.items()
        )
        largest = max(num_rows * num_new for num_rows, num_new in shapes)
        experts, offloaded = self._workspace.mixture_bytes(num_tokens, len(chunks), largest)
        num_logits = sum(item.num_logits for item in work)
        # Logits in parts and whole, the highest, the normalised rows, float32 copies to choose
        # tokens from.
        head = num_logits * (2 * self._vocab_size + 1 + self._hidden_size) * self._itemsize
        head += len(work) * self._vocab_size * 2 * torch.float32.itemsize
        head += self._workspace.product_bytes(num_logits)
        head += 4 * largest * self._hidden_size * torch.float32.itemsize  # the norm's own
        head += max(
            self._workspace.leaving_bytes(*shape, past, min(num_logits, shape[1]), attention)
            for shape, past in shapes.items()
        )
        tokens = num_tokens * (_POSITION_BYTES + (0 if self._memory.is_own else _TOKEN_BYTES))
        if self._workspace.aligned:
            tokens += num_tokens * _POSITION_BYTES  # the ids of each call, too
        tokens += len(chunks) * self._workspace.call_bytes
        if on_host:
            chunk_bytes = largest * self._hidden_bytes + max(handed)
            if offloaded:  # parts of a chunk on their way from and to the host
                experts += 2 * chunk_bytes
                offloaded += 2 * chunk_bytes if self._memory.is_own else 0
            device = _device_parts(layer, experts, head, hidden=chunk_bytes, positions=tokens)
            return PerMemory(
                device, {MemoryKind.HIDDEN_STATES: hidden, MemoryKind.ROUTED_TOKENS: offloaded}
            )
        experts += offloaded
        device = _device_parts(layer, experts, head, hidden=hidden, positions=tokens)
        return PerMemory(device, {})

    def _growth(self, store: KVStore, work: Sequence[NewTokens], plan: PassPlan) -> PerMemory[int]:
        parts = [
            store.growth_bytes(item.sequence, item.start + len(item.token_ids), plan.chunk_size)
            for item in work
        ]
        return PerMemory(sum(part.device for part in parts), sum(part.host for part in parts))

    def _weight_budgets(self, taken: PerMemory[int]) -> Budgets:
        """Bytes that the weights may hold while others take `taken` of each memory."""
        free = self._accounts.map(
            lambda account: account.free + sum(account.kinds.get(kind, 0) for kind in HELD_KINDS)
        )
        return PerMemory(free.device - taken.device, free.host - taken.host)

    def _missing(self, taken: PerMemory[int]) -> PerMemory[int]:
        """Bytes of each memory that lack where others take `taken`; zeros if it fits."""
        allowed = self._weight_budgets(taken)
        least = self._memory.reads(self._weights.least_bytes(allowed.device))
        return PerMemory(max(least.device - allowed.device, 0), max(least.host - allowed.host, 0))

    def _refusal(self, work: Sequence[NewTokens], missing: PerMemory[int]) -> DoesNotFitError:
        """`missing` are bytes of each memory, of which one is not 0."""
        num_tokens = sum(len(item.token_ids) for item in work)
        past = max(item.start for item in work)
        after = f" after {past}" if past else ""
        account = self._accounts.device if missing.device else self._accounts.host
        needed = account.limit + (missing.device or missing.host)
        steps = self._policy.may_step and self._policy.chunk_size is None
        instead = ", or chunk_size=1, one token after the other" if steps else ""
        return DoesNotFitError(
            f"{account.name}: need {format_size(needed)} for a pass over {num_tokens} new "
            f"tokens{after}, limit {format_size(account.limit)}",
            hint=f"allow at least {needed} bytes, or fewer tokens at once{instead}",
            memory=account.name,
            needed_bytes=needed,
        )


def _device_parts(
    layer: int, experts: int, logits: int, *, hidden: int, positions: int
) -> dict[str, int]:
    """What a pass takes of the device. Of the first three, which are never there together, only
    the largest counts.
    """
    by_turns = {
        MemoryKind.LAYER: layer,
        MemoryKind.EXPERT_WORK: experts,
        MemoryKind.LOGITS: logits,
    }
    most = max(by_turns, key=lambda kind: by_turns[kind])
    return {
        most: by_turns[most],
        MemoryKind.HIDDEN_STATES: hidden,
        MemoryKind.POSITIONS: positions,
    }
