"""Every contract between the parts, and nothing else.

Resources that own something are abstract base classes and context managers; swapped behaviour is a
callable Protocol. Letters in shapes: R rows of one call, T new tokens, S stored tokens, H query
heads, G key-value heads, D head dimension, C hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from ollm_core.types import (
    CacheKind,
    Capability,
    CatalogEntry,
    Config,
    Layout,
    TensorInfo,
    WeightPlan,
)

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from torch import Tensor

ADAPTER_API = "1.0"
"""The adapter contract that this core speaks. Another major is refused, a newer minor is warned
of.
"""


class ModelAdapter(ABC):
    """What a plugin provides for one model family. Pure declarations: no torch is needed to read
    them.
    """

    name: str
    """Short and unique, for instance `llama`."""
    adapter_api: str = ADAPTER_API
    model_types: tuple[str, ...]
    """The `model_type` values in config.json that this adapter opens."""
    quantizations: tuple[str, ...] = ()
    """The values of `quant_method` in config.json's `quantization_config` whose checkpoints it
    opens. A checkpoint with another is refused before `layout` is asked.
    """
    unstated_dtype: str = ""
    """What the family's checkpoints hold where config.json states no dtype, for instance
    `bfloat16`. Only for plans of models that are not on disk.
    """

    @property
    def capabilities(self) -> Mapping[str, Capability]:
        """Ability name to what is supported. Names: see `ollm_core.CAPABILITIES`. Missing
        means full.
        """
        return {}

    def catalog(self) -> Sequence[CatalogEntry]:
        """Models that can be named by id. The configs are the real ones, so that planning works
        offline.
        """
        return ()

    def text_config(self, config: Config) -> Config:
        """The part of config.json that describes the language model, as transformers' AutoConfig
        takes it: what every other declaration is given. Default: the config itself.
        """
        return config

    @abstractmethod
    def layout(self, config: Config) -> Layout:
        """Where the parts sit in the transformers module tree. Raises ConfigError for a config it
        cannot open.
        """

    @abstractmethod
    def weights(self, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
        """Which checkpoint tensors make which parameter. Pure data; raises CheckpointError for a
        foreign tensor.
        """

    @abstractmethod
    def caches(self, config: Config) -> Sequence[CacheKind]:
        """What each layer remembers, in layer order."""

    def tensors(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> Mapping[str, tuple[str, tuple[int, ...]]] | None:
        """What the checkpoint of `config` holds, so that it can be planned without its files:
        safetensors dtype and shape of each tensor that `weights` does not ignore.

        `shapes` are those of the parameters in the transformers module tree, `dtype` is the one
        that the config states, as safetensors names it. None, the default: not known.
        """
        return None

    @abstractmethod
    def tiny_config(self) -> Config:
        """A small config that has every feature of the family, for tests with random weights."""


class Closing(ABC):
    """A context manager that closes on exit. `close` may be called twice."""

    @abstractmethod
    def close(self) -> None:
        """Free everything this object owns."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ByteSource(Closing):
    """A reading engine: brings byte ranges of checkpoint files into memory that the caller owns."""

    name: str

    @abstractmethod
    def read(self, tensors: Sequence[TensorInfo], buffer: memoryview) -> Sequence[int]:
        """Read all `tensors` into `buffer` and return each one's byte offset in it. What lies at a
        multiple of 64 bytes in its file does so in the buffer.

        An offset equals the tensor's own in its file modulo 64 bytes.
        `buffer` is writable, page-aligned and at least `buffer_bytes(tensors)` long. May be called
        from several threads. Raises ReadError if the storage fails or a file is shorter than it was
        when it was opened.
        """

    @abstractmethod
    def buffer_bytes(self, tensors: Sequence[TensorInfo]) -> int:
        """Bytes of buffer that `read(tensors)` needs."""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes asked of the storage since this source was opened."""


class WeightStreamer(Closing):
    """Gives out parameters in the order of a weight pass, and reads ahead: after the last unit
    comes the first.
    """

    @abstractmethod
    def acquire(self, unit_idx: int) -> AbstractContextManager[Sequence[Tensor]]:
        """The parameters of one unit (a layer, or a part of the head) on the device, valid inside
        the context.

        Their order is the unit's. Raises ReadError if they cannot be read; the next pass may be
        tried again.
        """

    @abstractmethod
    def experts(
        self, layer_idx: int, expert_ids: Iterable[int]
    ) -> AbstractContextManager[Iterator[tuple[int, Sequence[Tensor]]]]:
        """Routed experts of one layer, each once and in ascending order, with their slices of the
        parameters of the layer's experts module, on the device.

        They are valid until the next step of the iterator. `expert_ids` are counted as
        `collections.Counter` does: a mapping says how many tokens go to each expert, which may
        decide what is kept. Raises ReadError at a step.
        """

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the input embedding, [N] -> [N, C], in the compute dtype on the device: a copy,
        which the caller may change.
        """

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Weight bytes read from storage since opening."""


@dataclass(frozen=True, slots=True)
class TierBytes:
    """Bytes held per tier."""

    device: int = 0
    host: int = 0
    disk: int = 0


class TiledBlocks(ABC, Iterator["tuple[Tensor, Tensor]"]):
    """What `KVStore.blocks` may give out where blocks of one length lie side by side: they can be
    taken together. A store that changes or checks what another's `blocks` gives needs not know.
    """

    @abstractmethod
    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same blocks in the same order, in place of them, as pairs of [B, G, n, D], each valid
        until the next step. To be asked for before the first step.
        """


class KVStore(Closing):
    """Keys and values of every layer for any number of sequences, stored per KV head, never
    repeated to query heads.

    A sequence's layers fill one after another during a weight pass; `num_tokens(sequence)` counts
    the tokens that every layer has. Not thread-safe: one weight pass at a time.
    """

    block_size: int
    """Tokens per block, the unit of allocation."""

    @abstractmethod
    def new_sequence(self) -> int:
        """A fresh, empty sequence."""

    @abstractmethod
    def growth_bytes(self, sequence: int, num_tokens: int, longest: int | None = None) -> TierBytes:
        """What `reserve` would take of each memory beyond what is held or reserved already. A pass
        is refused by it before anything runs.
        """

    @abstractmethod
    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        """Make sure that `sequence` can grow to `num_tokens` in every layer, by at most `longest`
        (default: all) in one `append`. Until `commit`, it can be truncated to its length now, which
        gives back all that was reserved and not used.

        Raises DoesNotFitError, with nothing changed, if memory or disk does not allow it.
        """

    def commit(self, sequence: int) -> None:
        """A pass has succeeded: what was kept only to undo it may go. By default nothing does."""
        return

    @abstractmethod
    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values`, each [G, T, D] in the store's dtype, after what this layer
        has.
        """

    @abstractmethod
    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of positions `first` to `num_tokens` (default: all) in order, as pairs of
        [G, n, D].

        They are on the compute device and valid until the next step of the iterator, which may be
        a TiledBlocks. Raises KVStoreError for positions that a sliding layer no longer has.
        """

    @property
    def in_place(self) -> bool:
        """Whether what `blocks` gives out are views of what is kept, all valid until the store next
        changes. By default it is not.

        `append` and `blocks` are then called in inference mode, which must not mark what is kept.
        """
        return False

    @abstractmethod
    def num_tokens(self, sequence: int, layer_idx: int | None = None) -> int:
        """Tokens stored in `layer_idx`, or, by default, in every layer."""

    @abstractmethod
    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Drop positions >= `num_tokens` from every layer, and what `reserve` took for more: also
        where there are no such positions. Idempotent. Raises KVStoreError, with nothing changed, if
        a layer has fewer, or slides and has let go of what it would need.
        """

    def can_truncate(self, sequence: int, num_tokens: int) -> bool:
        """Whether `truncate` would do it: what cuts several sequences asks for all of them first.
        By default it would.
        """
        return True

    @abstractmethod
    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        """A new sequence that shares the first `num_tokens` (default: all). Neither sees what the
        other adds.
        """

    @abstractmethod
    def release(self, sequence: int) -> None:
        """Forget a sequence and free what only it used. Unknown sequences are ignored."""

    @abstractmethod
    def tier_bytes(self) -> TierBytes:
        """Bytes held now, per tier."""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """KV bytes read from disk since opening."""


@runtime_checkable
class KeepsPrefixes(Protocol):
    """What a KVStore may be able to do beside: keep what its sequences hold when it is closed, and
    find it again in another store, by token ids.
    """

    def find(self, token_ids: Tensor) -> tuple[int, int]:
        """A new sequence that begins with the longest kept prefix of `token_ids` [T], and how many
        tokens it has; 0 if nothing is found. Damage of what is kept is not found, or raises
        DamagedKVError when it is read; it is then not found again.
        """

    def keep(self, sequence: int, start: int, token_ids: Tensor) -> None:
        """Say which tokens `sequence` holds from `start` on. Without it they are not kept. What
        fails is logged, never raised.
        """


@runtime_checkable
class KeepsStates(Protocol):
    """What a KVStore does beside for layers with a recurrent state, which is not one of keys and
    values and cannot be cut: each sequence can go back to the start of its last pass, and to before
    each of the pass's drafted tokens.
    """

    def expect(self, sequence: int, num_drafted: int) -> None:
        """Said before `reserve`: how many of the next pass's last tokens are drafted."""

    def state(self, layer_idx: int, sequence: int) -> Sequence[Tensor] | None:
        """The layer's state after all tokens that it has, each of its `CacheKind.states`, valid
        until the next call for that layer. None before the first token.
        """

    def put_state(
        self, layer_idx: int, sequence: int, num_new: int, state: Sequence[Tensor]
    ) -> None:
        """Store a copy of the state after `num_new` more tokens. Raises KVStoreError for another
        shape or dtype.
        """


@dataclass(frozen=True, slots=True)
class KVView:
    """What a layer's attention may see: the new keys and values of R rows, and the store for what
    came before.

    It stands where transformers expects the key tensor, and reaches the attention function through
    the layer.
    """

    keys: Tensor
    """[R, G, T, D], new, rotated."""
    values: Tensor
    """[R, G, T, D], new."""
    layer_idx: int
    sequences: tuple[int, ...]
    """One per row."""
    starts: tuple[int, ...]
    """Tokens of each row that come before the new ones."""
    store: KVStore
    attention: Attention

    def past(self, row: int, window: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Stored keys and values before the new tokens of `row`, as pairs of [G, n, D]: from
        `first(row, window)` on.
        """
        first = self.first(row, window)
        return self.store.blocks(self.layer_idx, self.sequences[row], self.starts[row], first)

    def kept(self, row: int, window: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """As `past`, but with the new tokens, of a store that is `in_place`."""
        first, end = self.first(row, window), self.starts[row] + self.keys.shape[2]
        return list(self.store.blocks(self.layer_idx, self.sequences[row], end, first))

    def first(self, row: int, window: int | None = None) -> int:
        """The first position that a new token of `row` may see. `window` counts tokens, the one
        that looks included; None is without end.
        """
        return 0 if window is None else max(self.starts[row] - window + 1, 0)


class Drafter(Protocol):
    """A draft source: guesses the next tokens, which the model then checks in one weight pass.

    A wrong guess costs time and never changes the text. One that holds resources may be `Closing`:
    it is then closed with the model.
    """

    def __call__(self, token_ids: Tensor, num_tokens: int) -> Tensor | Sequence[int]:
        """`token_ids` [S], all so far, on the CPU -> at most `num_tokens` ids [n] that may come
        next; none is allowed. The text may be another one than before, or empty.
        """


@runtime_checkable
class FollowsText(Protocol):
    """What a Drafter may be able to do beside, if it holds memory that grows with the text, and
    must read the text before it can draft.
    """

    def begin(self, num_tokens: int) -> None:
        """Before the first pass of a text that will have at most `num_tokens`; 0: none to draft
        for, as for a batch. Reserves what drafts for it take. Raises DoesNotFitError.
        """

    def catch_up(self, token_ids: Tensor) -> None:
        """Read what of `token_ids` [S], all so far, was not read yet, if that takes longer than a
        draft: what it takes is then not held against the draft.
        """


class Attention(Protocol):
    """Causal attention of new tokens over all earlier ones and themselves."""

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        view: KVView,
        *,
        scaling: float,
        **options: Any,
    ) -> Tensor:
        """`query` [R, H, T, D] -> [R, T, H, D]. `module` is the transformers attention module that
        asks.

        `options` are those that the module passes to any attention function; one that is not
        understood and not None is refused with UnsupportedError rather than ignored.
        """
