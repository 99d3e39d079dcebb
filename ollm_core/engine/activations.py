"""How much memory one chunk takes on its way through a layer: traced on the meta device, so exact
and quick.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ollm_core.attention.blockwise import most_blocks
from ollm_core.contracts.kv import KVGeometry, KVStore, SharedRun
from ollm_core.device.buffers import round_up
from ollm_core.device.offload import ActivationOffload
from ollm_core.engine.batch import NewTokens, Steps
from ollm_core.engine.layer_call import call_layer
from ollm_core.engine.own_call import OwnCall, own_attention
from ollm_core.engine.recurrent_call import StateCache
from ollm_core.engine.traced_cache import APART, Sharing, TracedCache, TracedStore
from ollm_core.errors import OllmError, UnsupportedError, one_line
from ollm_core.memory.tracker import OneExpertTaken, called_operations, traced_peak
from ollm_core.model.moe import Mixture, RoutedChunk
from ollm_core.model.own_forward import OwnForward
from ollm_core.model.skeleton import Skeleton
from ollm_core.model.spec import ModelSpec

_SAID_BYTES = 12  # a number that stands for keys, and a window
_Shape = tuple[int, int, int, int, str, Sharing]
"""layer_idx, num_rows, num_new, num_past, attention, sharing"""
_MOST_PACKED = 64  # shapes of packed calls that are remembered: hardly one comes again


class Workspace:
    """Answers "how many bytes" for the layers of one model. Results are remembered by shape."""

    def __init__(self, skeleton: Skeleton, geometry: KVGeometry) -> None:
        self._skeleton = skeleton
        self._geometry = geometry
        self._known: dict[_Shape, int] = {}
        self._known_handed: dict[tuple[int, int, int], Sequence[Tensor]] = {}
        self._known_packed: dict[_Shape, int] = {}
        self._known_mixtures: dict[tuple[int, int, bool], tuple[int, int, int]] = {}
        # One layer of each kind: what it remembers, and what it is made of.
        kinds: dict[Hashable, list[int]] = {}
        shared = () if skeleton.own is None else skeleton.own.facts.shared
        for layer_idx, (layer, cache) in enumerate(
            zip(skeleton.layers, geometry.kinds, strict=True)
        ):
            made_of = tuple((name, value.shape) for name, value in layer.named_parameters())
            mixture = skeleton.mixtures.get(layer_idx) or skeleton.routed.get(layer_idx)
            experts = mixture and mixture.slice_shapes
            found = sum(one.layer_idx < layer_idx for one in shared)  # of what others hand on
            kinds.setdefault((cache, type(layer), made_of, experts, found), []).append(layer_idx)
        self._alike: Mapping[int, Sequence[int]] = {one[0]: one for one in kinds.values()}
        """By the first of each kind, the layers that take as much."""
        self._bends = {kind.window - 1 for kind in geometry.kinds if kind.window is not None}
        self._grows = skeleton.grows
        """Whether something beside block-wise attention is as long as the past."""

    @classmethod
    def of(cls, spec: ModelSpec, proven: set[str] | None = None) -> Workspace:
        """That of a model whose halves of a layer are the layer; raises UnsupportedError for any
        other. `proven` names the models of which this is known, and remembers this one.
        """
        workspace = cls(spec.skeleton, spec.geometry)
        stated = f"{spec.adapter.name} {spec.config!r}"
        if proven is None or stated not in proven:
            workspace.check_halves()
            if proven is not None:
                proven.add(stated)
        return workspace

    @property
    def hidden_size(self) -> int:
        """Numbers in the hidden state of one token."""
        return self._skeleton.hidden_size

    @property
    def hidden_itemsize(self) -> int:
        """Bytes of one of these numbers, between layers."""
        if self._skeleton.own is None:
            return self._geometry.dtype.itemsize
        return max(one.itemsize for one in self._skeleton.own.facts.hidden_dtypes)

    @property
    def aligned(self) -> bool:
        """Whether rows of one call must come after equally many tokens."""
        return self._skeleton.own is not None

    @property
    def call_bytes(self) -> int:
        """What each chunk's call holds all the time, to say of layers how long their past is."""
        return 0 if self._skeleton.own is None else _SAID_BYTES * self._geometry.num_layers

    @property
    def steps(self) -> Steps:
        """Which tokens may share a call."""
        own = self._skeleton.own
        if own is None or not any(one.kind.states for one in own.facts.memories):
            return "together"  # layers declared recurrent see to it themselves
        return "drafted" if own.facts.continues else "all"

    def leaving_bytes(
        self, num_rows: int, num_new: int, num_past: int, num_logits: int, attention: str
    ) -> int:
        """Peak bytes of making `num_logits` logits of each row of what the last layer gives, where
        that is left to the model's own forward; else 0.
        """
        if self._skeleton.own is None:
            return 0
        past = round_up(num_past, self._geometry.block_size)
        if attention != "exact" and not self._grows:
            past = min(past, self._geometry.block_size)
        return self._remembered(-1 - num_logits, num_rows, num_new, past, attention, APART)

    def handed_bytes(self, num_rows: int, num_new: int, num_past: int, attention: str) -> int:
        """What layers hand to the next one beside hidden states, for `num_new` tokens in each of
        `num_rows` after `num_past`.
        """
        like = self._handed_like(num_rows, num_new, num_past, attention)
        return sum(one.nbytes for one in like)

    def _handed_like(
        self, num_rows: int, num_new: int, num_past: int, attention: str
    ) -> Sequence[Tensor]:
        """The same without data: layers hand on values of one size."""
        own, key = self._skeleton.own, (num_rows, num_new, num_past)
        if own is None or not own.facts.handed:
            return ()
        if key not in self._known_handed:
            dtype = max(own.facts.hidden_dtypes, key=lambda one: one.itemsize)
            found: list[Tensor] = []
            self._trace_own(own, 0, *key, attention, dtype, found)
            self._known_handed[key] = tuple(torch.empty_like(one) for one in found)
        return self._known_handed[key]

    def shared_bytes(self, num_tokens: int) -> int:
        """What layers keep of `num_tokens` for later ones that share their keys and values."""
        own = self._skeleton.own
        numbers = 0 if own is None else own.facts.shared_numbers
        return num_tokens * numbers * self._geometry.dtype.itemsize

    @property
    def vocab_size(self) -> int:
        """Logits of one token."""
        return int(self._skeleton.config.vocab_size)

    def product_bytes(self, num_logits: int) -> int:
        """What products of so many states with the head take, its output not counted."""
        products = self._skeleton.products if self._skeleton.own is None else None
        return products.scratch_bytes(num_logits, self.hidden_size) if products else 0

    def check_halves(self) -> None:
        """Raises UnsupportedError if the two halves of a layer with routed experts compute anything
        else than the layer, as where a multiplier on its residual stream was left out. They are
        followed for one token after another: the fewest operations, with each kind of them.
        """
        for layer_idx in self._alike:
            mixture = self._skeleton.mixtures.get(layer_idx)
            if mixture is None:
                continue
            whole, halves = (
                called_operations(
                    self._call(layer_idx, 1, 1, 1, "blockwise", forward),
                    mixture.dense_parameters,
                )
                for forward in (mixture.whole, mixture.halves)
            )
            if whole != halves:
                raise mixture.not_the_layer(whole, halves)

    def layer_bytes(
        self,
        num_rows: int,
        num_new: int,
        num_past: int,
        attention: str,
        sharing: Sharing = APART,
        spare: Sequence[int] = (),
    ) -> int:
        """Peak bytes of a layer for `num_new` tokens in each of `num_rows`, after `num_past`
        tokens: of the layer that takes most.

        The layer's output is counted, its input and its weights are not; nor are, by layer, the
        `spare` bytes that are there for larger weights than its own.
        """
        shape = num_rows, num_new, num_past, attention, sharing
        return max(
            max(
                self._one_layer(one, *shape) - min((spare[i] for i in alike if spare), default=0), 0
            )
            for one, alike in self._alike.items()
        )

    @property
    def packs(self) -> bool:
        """Whether rows of a call may be packed: all that layers remember are keys and values."""
        return self._skeleton.own is None and not self._skeleton.recurrent

    def runs(self, store: KVStore, work: Sequence[NewTokens]) -> Sequence[SharedRun]:
        """What the sequences of `work` share in the first layer that keeps all tokens."""
        full = [i for i, kind in enumerate(self._geometry.kinds) if kind.kind == "full"]
        sequences, starts = [item.sequence for item in work], [item.start for item in work]
        return store.shared_runs(full[0], sequences, starts) if full else ()

    def sharing(
        self, store: KVStore, work: Sequence[NewTokens], lengths: tuple[int, ...] = ()
    ) -> Sharing | None:
        """How the sequences of `work` share what they have; `lengths` are those of packed ones.
        None if layers differ, as they may where an error has left some cut and others not.
        """
        if len(work) < 2 or self._skeleton.own is not None:
            return APART
        sequences, starts = [item.sequence for item in work], [item.start for item in work]
        told = {
            tuple(store.shared_runs(layer_idx, sequences, starts))
            for layer_idx, kind in enumerate(self._geometry.kinds)
            if kind.kind == "full"
        }
        if len(told) > 1:
            return None
        runs = next(iter(told), ())
        if not runs:
            return APART
        ends = {row: run.end for run in runs for row in run.rows}
        num_own = max(start - ends.get(row, 0) for row, start in enumerate(starts))
        num_own = round_up(num_own, self._geometry.block_size)
        if lengths:
            return Sharing(tuple(run.rows for run in runs), lengths, num_own)
        sizes = len(ends), *sorted({len(run.rows) for run in runs})
        return Sharing(tuple(tuple(range(size)) for size in sizes), (), num_own)

    def _one_layer(
        self,
        layer_idx: int,
        num_rows: int,
        num_new: int,
        num_past: int,
        attention: str,
        sharing: Sharing,
    ) -> int:
        block_size, window = self._geometry.block_size, self._geometry.kinds[layer_idx].window
        shape = layer_idx, num_rows, num_new
        if self._skeleton.own is not None and attention == "exact":
            window = None  # masks of all layers are made together
        if layer_idx in self._skeleton.recurrent:
            return self._remembered(*shape, min(num_past, 1), attention, APART)
        below, above = num_past // block_size * block_size, round_up(num_past, block_size)
        if window is not None and not self._grows:
            # As many as are ever seen: their first block is then as long as any that is cut.
            apart = Sharing(lengths=sharing.lengths)
            return self._remembered(*shape, min(above, window - 1), attention, apart)
        if attention != "exact" and not self._grows:
            most = most_blocks(min(sharing.lengths, default=num_new)) * block_size
            if sharing.runs:
                above = sharing.num_own
                sharing = replace(sharing, num_own=0)
            return self._remembered(*shape, min(above, most), attention, sharing)
        # What an operation takes is a line in num_past. The peak is the highest of such lines, so
        # between two lengths it lies on or below the straight line from one peak to the other.
        # The lines have a bend where a window begins to slide.
        below = max([below, *(bend for bend in self._bends if bend <= num_past)])
        above = min([above, *(bend for bend in self._bends if bend >= num_past)])
        least = self._remembered(*shape, below, attention, APART)
        most = self._remembered(*shape, above, attention, APART)
        return least + -(-(most - least) * (num_past - below) // max(above - below, 1))

    def _remembered(self, *key: *_Shape) -> int:
        known = self._known_packed if key[-1].lengths else self._known
        if key not in known:
            if known is self._known_packed and len(known) == _MOST_PACKED:
                known.clear()
            known[key] = self._trace(*key)
        return known[key]

    def mixture_bytes(self, num_tokens: int, num_chunks: int, largest: int) -> tuple[int, int]:
        """What the MLP of a layer with routed experts takes for `num_tokens` in `num_chunks` of at
        most `largest`: peak bytes while it works on one, and bytes offloaded for all of them.

        Hidden states and weights are not counted; any expert may get all tokens of a chunk.
        """
        found = [(0, 0)]
        for layer_idx in self._alike:
            if mixture := self._skeleton.mixtures.get(layer_idx):
                key = layer_idx, largest, num_chunks == 1
                if key not in self._known_mixtures:
                    self._known_mixtures[key] = self._trace_mixture(mixture, *key[1:])
                work, per_token, per_chunk = self._known_mixtures[key]
                found.append((work, per_token * num_tokens + per_chunk * num_chunks))
        return max(work for work, _ in found), max(offloaded for _, offloaded in found)

    def _trace_mixture(
        self, mixture: Mixture, num_tokens: int, alone: bool
    ) -> tuple[int, int, int]:
        """Peak bytes for one chunk, bytes offloaded per token, and per chunk beside those. For one
        that is `alone` nothing is offloaded.
        """
        meta, dtype = torch.device("meta"), self._geometry.dtype
        offload = ActivationOffload(meta, on_host=False)
        hidden_size: int = self._skeleton.config.hidden_size
        hidden = torch.empty(1, num_tokens, hidden_size, dtype=dtype, device=meta)
        add = self._serving(mixture, num_tokens)

        if alone:
            return traced_peak(lambda: mixture.at_once(hidden, add)), 0, 0
        chunk = mixture.route(hidden, offload)
        work = max(
            traced_peak(lambda: mixture.route(hidden, offload)),
            traced_peak(lambda: add(chunk, offload)),
            traced_peak(lambda: mixture.finish(hidden, chunk.total)),
        )
        per_chunk = chunk.starts.nbytes
        return work, (chunk.num_bytes - per_chunk) // num_tokens, per_chunk

    def _serving(
        self, mixture: Mixture, num_tokens: int
    ) -> Callable[[RoutedChunk, ActivationOffload], None]:
        """What adds up what the experts say of a chunk, if one of them gets all of its tokens."""
        dtype = self._geometry.dtype
        slices = [torch.empty(one, dtype=dtype, device="meta") for one in mixture.slice_shapes]

        def serve(chunk: RoutedChunk, here: ActivationOffload) -> None:
            with OneExpertTaken(), mixture.bound(slices):
                mixture.add(chunk, 0, num_tokens, here)

        return serve

    def _trace(
        self,
        layer_idx: int,
        num_rows: int,
        num_new: int,
        num_past: int,
        attention: str,
        sharing: Sharing,
    ) -> int:
        if self._skeleton.own is not None:
            own = self._skeleton.own
            return max(
                self._trace_own(own, layer_idx, num_rows, num_new, num_past, attention, dtype)
                for dtype in own.facts.hidden_dtypes
            )
        forward = self._skeleton.chunk_forward(layer_idx)
        shape = layer_idx, num_rows, num_new, num_past
        return traced_peak(self._call(*shape, attention, forward, sharing))

    def _trace_own(
        self,
        own: OwnForward,
        layer_idx: int,
        num_rows: int,
        num_new: int,
        num_past: int,
        attention: str,
        hidden_dtype: torch.dtype,
        handed: list[Tensor] | None = None,
    ) -> int:
        """The same of a layer that its model's own forward calls, with what that makes for it; of
        the end of that forward, with -1 - n logits, for a negative `layer_idx`. Either is given
        hidden states in `hidden_dtype`. What the layer hands on is added to `handed`.
        """
        meta, dtype, skeleton = torch.device("meta"), self._geometry.dtype, self._skeleton
        ids = torch.zeros(num_rows, num_new, dtype=torch.long, device=meta)
        store = TracedStore(self._geometry, num_past)
        before: Sequence[Tensor] = ()
        if layer_idx > 0:
            before = self._handed_like(num_rows, num_new, num_past, attention)
        hidden = torch.empty(
            own.facts.hidden_shape(num_rows, num_new), dtype=hidden_dtype, device=meta
        )

        def embed(token_ids: Tensor) -> Tensor:
            return torch.empty(len(token_ids), own.embedding_size, dtype=dtype, device=meta)

        def work() -> Tensor:
            sequences = tuple(range(num_rows))
            call = OwnCall(
                own,
                cast("KVStore", store),
                sequences,
                ids,
                num_past,
                embed,
                own_attention(attention, self._geometry.device),
                alone=True,
            )
            if layer_idx < 0:
                rows = own.head_rows(num_rows * -(1 + layer_idx), num_rows * num_new)
                with skeleton.traced_head(rows):
                    return call.leave(hidden, -1 - layer_idx)
            with skeleton.traced(layer_idx, num_rows * num_new):
                return traced(call)

        def traced(call: OwnCall) -> Tensor:
            call.enter()  # what it returns, as `hidden` and `before`, is counted elsewhere
            call.pretend_shared(layer_idx, dtype)
            call.handed = [*before]
            output = call.run(layer_idx, hidden)
            if handed is not None:
                handed.extend(call.handed)
            return output

        mixture = skeleton.routed.get(layer_idx)
        with (
            skeleton.on_meta(),
            own.facts.answers(),
            mixture.serving(self._serving(mixture, num_rows * num_new))
            if mixture
            else nullcontext(),
        ):
            try:
                return traced_peak(work)
            except OllmError:
                raise
            except Exception as error:  # a model's code may raise anything
                part = f"layer {layer_idx}" if layer_idx >= 0 else "the head"
                raise UnsupportedError(
                    f"{part} cannot be run by itself: {one_line(error)}",
                    hint="a model is run layer by layer; this one is not made so",
                ) from error

    def _call(
        self,
        layer_idx: int,
        num_rows: int,
        num_new: int,
        num_past: int,
        attention: str,
        forward: Callable[..., Tensor],
        sharing: Sharing = APART,
    ) -> Callable[[], Tensor]:
        """A call of `forward`, of a layer on the meta device, to be traced; what it is given is
        there before.
        """
        hidden_size: int = self._skeleton.config.hidden_size
        hidden = torch.empty(
            num_rows, num_new, hidden_size, dtype=self._geometry.dtype, device="meta"
        )
        states = [
            torch.empty(shape, dtype=dtype, device="meta")
            for shape, dtype in self._geometry.state_shapes(layer_idx)
        ]

        def run() -> Tensor:
            with self._skeleton.traced(layer_idx, num_rows * num_new):
                return traced()

        def traced() -> Tensor:
            cache: object = TracedCache(self._geometry, num_past, attention, sharing)
            if states:
                past = states if num_past else None
                cache = StateCache(layer_idx, [past] * num_rows, hidden.device)
            positions = torch.arange(num_new, device="meta").expand(num_rows, num_new)
            embeddings = self._skeleton.embeddings(
                self._skeleton.meta_rotary, layer_idx, hidden, positions
            )
            return call_layer(forward, hidden, positions, embeddings, cache)

        return run
