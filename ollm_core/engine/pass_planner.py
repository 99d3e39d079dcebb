"""Before a weight pass: what it needs of each memory, how it will be cut, and whether it fits at
all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from ollm_core.attention.trial import require_flash
from ollm_core.contracts.kv import KVStore, TierBytes
from ollm_core.engine.activations import Workspace
from ollm_core.engine.batch import Chunk, NewTokens, cut_chunks
from ollm_core.errors import DoesNotFitError
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.sizes import format_size
from ollm_core.model.spec import ModelSpec
from ollm_core.plugins.registry import require, supports
from ollm_core.weights.eviction import Pressure
from ollm_core.weights.placement import HELD_KINDS, HeldWeights
from ollm_core.weights.streamer import TieredWeights

EXACT_CONTEXT = 8192
"""Tokens up to which attention "auto" is exact. Beyond, the exact form would cost more memory than
it is worth.
"""

_POSITION_BYTES = 8
_TOKEN_BYTES = 10  # an id, and twice whether it is padding


@dataclass(frozen=True, slots=True)
class Accounts:
    """The two memories of a model."""

    device: MemoryAccount
    host: MemoryAccount


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user fixed: None or "auto" leaves the choice to the pass."""

    attention: str
    chunk_size: int | None
    blocks: str = "blockwise"
    """What "auto" takes where attention is not exact."""
    may_chunk: bool = True
    """Whether the family allows a prompt in chunks."""
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
        if chunk_size is not None:
            require(spec.adapter, "chunked-prefill")
        if attention == "flash":
            require_flash(spec.device, spec.dtype, here=False)
        return cls(
            blocks if (attention, blocks) == ("blockwise", "products") else attention,
            chunk_size,
            blocks=blocks,
            may_chunk=supports(spec.adapter, "chunked-prefill"),
            may_use_blocks=supports(spec.adapter, "blockwise-attention"),
        )


@dataclass(frozen=True, slots=True)
class Needed:
    """Bytes that a pass takes beside weights and KV, by what they are for."""

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> TierBytes:
        """All of it."""
        return TierBytes(sum(self.device.values()), sum(self.host.values()))


@dataclass(frozen=True, slots=True)
class PassPlan:
    """How a weight pass will run, and what it takes beside weights and KV."""

    chunks: tuple[Chunk, ...]
    chunk_size: int
    attention: str
    hidden_on_host: bool
    parts: Needed

    @property
    def needed(self) -> TierBytes:
        """Bytes of each memory."""
        return self.parts.total


class Admission:
    """Chooses the first way to run a pass that fits, dropping resident weights for it where that
    helps.
    """

    def __init__(
        self,
        policy: Policy,
        accounts: Accounts,
        weights: TieredWeights | HeldWeights,
        workspace: Workspace,
        pressure: Pressure | None = None,
    ) -> None:
        """Without `pressure`, what others take of the machine is not looked at."""
        self.pressure = pressure
        self._policy = policy
        self._accounts = accounts
        self._weights = weights
        self._workspace = workspace
        self._hidden_size = workspace.hidden_size
        self._vocab_size = workspace.vocab_size
        self._itemsize = weights.dtype.itemsize
        self._one_memory = weights.one_memory

    @property
    def exact(self) -> bool:
        """Whether every pass has exact attention, whatever it takes."""
        return self._policy.attention == "exact"

    @contextmanager
    def admit(self, store: KVStore, work: Sequence[NewTokens]) -> Iterator[PassPlan]:
        """Hold the memory of a pass over `work`. Raises DoesNotFitError, naming what would do,
        before anything runs.

        A pass that is refused, fails or is interrupted leaves each sequence of the store as long as
        it was, and gives back what was reserved for it.
        """
        plan, growth = self.choose(store, work)
        needed = _sum(plan.needed, growth)
        budgets = self._weight_budgets(needed)
        if self.pressure is not None:
            budgets = self.pressure.within(*budgets, needed)
        self._weights.fit(*budgets)
        device, host = self._accounts.device, self._accounts.host
        with ExitStack() as undo:
            for item in work:
                undo.callback(store.truncate, item.sequence, item.start)
                store.reserve(item.sequence, item.start + len(item.token_ids), plan.chunk_size)
            with (
                device.holding("activations", plan.needed.device),
                host.holding("activations", plan.needed.host),
            ):
                yield plan
            undo.pop_all()

    def choose(self, store: KVStore, work: Sequence[NewTokens]) -> tuple[PassPlan, TierBytes]:
        """How a pass over `work` would run, and what its KV would take. Holds nothing. Raises
        DoesNotFitError.
        """
        smallest: tuple[int, int] | None = None
        for plan in self._candidates(work):
            growth = self._growth(store, work, plan)
            missing = self._missing(_sum(plan.needed, growth))
            if not any(missing):
                return plan, growth
            smallest = min(smallest or missing, missing)
        assert smallest is not None
        raise self._refusal(work, *smallest)

    def fits(self, store: KVStore, work: Sequence[NewTokens]) -> bool:
        """Whether `admit` would let a pass over `work` through. Holds nothing."""
        try:
            self.choose(store, work)
        except DoesNotFitError:
            return False
        return True

    def set_aside(self, kind: str, num_bytes: TierBytes) -> None:
        """Reserve `num_bytes` for what stands beside the model; kept weights give way to it. Raises
        DoesNotFitError, with nothing reserved, where too little would be left to stream through.
        """
        missing = self._missing(num_bytes)
        for account, wanted, lacking in zip(
            (self._accounts.device, self._accounts.host),
            (num_bytes.device, num_bytes.host),
            missing,
            strict=True,
        ):
            if lacking and wanted:
                raise DoesNotFitError(
                    f"{kind} needs {format_size(wanted)} of {account.name} beside the model, "
                    f"{format_size(max(wanted - lacking, 0))} of {format_size(account.limit)} "
                    "can be spared",
                    hint=f"allow at least {account.limit + lacking} bytes, or go without",
                    memory=account.name,
                    needed_bytes=account.limit + lacking,
                )
        device, host = self._accounts.device, self._accounts.host
        if num_bytes.device > device.free or num_bytes.host > host.free:
            self._weights.fit(*self._weight_budgets(num_bytes))
        with ExitStack() as undo:
            device.reserve(kind, num_bytes.device)
            undo.callback(device.release, kind, num_bytes.device)
            host.reserve(kind, num_bytes.host)
            undo.pop_all()

    def _candidates(self, work: Sequence[NewTokens]) -> Iterator[PassPlan]:
        context = max(item.start + len(item.token_ids) for item in work)
        longest = max(len(item.token_ids) for item in work)
        attention = self._policy.attention
        if attention == "auto":
            blocks = self._policy.blocks
            names = ["exact", blocks] if context <= EXACT_CONTEXT else [blocks]
            names = names if self._policy.may_use_blocks else ["exact"]
        else:
            names = [attention]
        first = 512 if self._one_memory else 2048
        sizes = [self._policy.chunk_size or first]
        if not self._policy.may_chunk:
            sizes = [max(longest, first)]
        while (
            self._policy.may_chunk
            and self._policy.chunk_size is None
            and sizes[-1] > 64
            and longest > 64
        ):
            sizes.append(sizes[-1] // 2)
        for name in names:
            for size in sizes:
                chunks = tuple(cut_chunks(work, size))
                for hidden_on_host in (False, True):
                    needed = self._needed(work, chunks, name, hidden_on_host)
                    yield PassPlan(chunks, size, name, hidden_on_host, needed)

    def _needed(
        self, work: Sequence[NewTokens], chunks: Sequence[Chunk], attention: str, on_host: bool
    ) -> Needed:
        num_tokens = sum(len(item.token_ids) for item in work)
        hidden = num_tokens * self._hidden_size * self._itemsize
        shapes: dict[tuple[int, int], int] = {}
        for chunk in chunks:
            past = max(work[row].start for row in chunk.rows) + chunk.begin
            shape = len(chunk.rows), chunk.num_tokens
            shapes[shape] = max(shapes.get(shape, 0), past)
        layer = max(
            self._workspace.layer_bytes(*shape, past, attention) for shape, past in shapes.items()
        )
        largest = max(len(chunk.rows) * chunk.num_tokens for chunk in chunks)
        experts, parked = self._workspace.mixture_bytes(num_tokens, len(chunks), largest)
        num_logits = sum(item.num_logits for item in work)
        # Logits in parts and whole, the highest, the normalised rows, float32 copies to choose
        # tokens from.
        head = num_logits * (2 * self._vocab_size + 1 + self._hidden_size) * self._itemsize
        head += len(work) * self._vocab_size * 2 * torch.float32.itemsize
        head += 4 * largest * self._hidden_size * torch.float32.itemsize  # the norm's own
        tokens = num_tokens * (_POSITION_BYTES + (_TOKEN_BYTES if self._one_memory else 0))
        if on_host:
            chunk_bytes = largest * self._hidden_size * self._itemsize
            if parked:  # parts of a chunk on their way from and to the host
                experts += 2 * chunk_bytes
                parked += 0 if self._one_memory else 2 * chunk_bytes
            device = {"hidden states": chunk_bytes, "positions": tokens}
            return Needed(
                _largest({"layer": layer, "experts' work": experts, "logits": head}) | device,
                {"hidden states": hidden, "routed tokens": parked},
            )
        busy = {"layer": layer, "experts' work": experts + parked, "logits": head}
        return Needed(_largest(busy) | {"hidden states": hidden, "positions": tokens})

    def _growth(self, store: KVStore, work: Sequence[NewTokens], plan: PassPlan) -> TierBytes:
        parts = [
            store.growth_bytes(item.sequence, item.start + len(item.token_ids), plan.chunk_size)
            for item in work
        ]
        return TierBytes(sum(part.device for part in parts), sum(part.host for part in parts))

    def _weight_budgets(self, taken: TierBytes) -> tuple[int, int]:
        """Bytes that the weights may hold of device and host while others take `taken` of them."""
        budgets = []
        for account, num_bytes in (
            (self._accounts.device, taken.device),
            (self._accounts.host, taken.host),
        ):
            held = sum(account.kinds.get(kind, 0) for kind in HELD_KINDS)
            budgets.append(account.free + held - num_bytes)
        return budgets[0], budgets[1]

    def _missing(self, taken: TierBytes) -> tuple[int, int]:
        """Bytes of device and host memory that lack where others take `taken`; zeros if it
        fits.
        """
        device, host = self._weight_budgets(taken)
        ring = self._weights.least_bytes(device)
        if self._one_memory:
            return max(ring - device, 0), max(-host, 0)
        return max(-device, 0), max(ring - host, 0)

    def _refusal(self, work: Sequence[NewTokens], device: int, host: int) -> DoesNotFitError:
        """`device` and `host` are the bytes that are missing there, of which one is not 0."""
        num_tokens = sum(len(item.token_ids) for item in work)
        past = max(item.start for item in work)
        after = f" after {past}" if past else ""
        account, missing = (
            (self._accounts.device, device) if device else (self._accounts.host, host)
        )
        needed = account.limit + missing
        return DoesNotFitError(
            f"a pass over {num_tokens} new tokens{after} needs {format_size(needed)} of "
            f"{account.name}, {format_size(account.limit)} is allowed",
            hint=f"allow at least {needed} bytes, or give it fewer tokens at once",
            memory=account.name,
            needed_bytes=needed,
        )


def _sum(one: TierBytes, other: TierBytes) -> TierBytes:
    return TierBytes(one.device + other.device, one.host + other.host)


def _largest(parts: Mapping[str, int]) -> dict[str, int]:
    """What takes most, of parts that are never there together."""
    most = max(parts, key=lambda name: parts[name])
    return {most: parts[most]}
