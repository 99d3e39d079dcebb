"""One call of a layer, followed on the meta device: no data, the same allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ollm_core.contracts.kv import KVGeometry, KVStore
from ollm_core.device.offload import ActivationOffload
from ollm_core.engine.layer_call import call_layer
from ollm_core.engine.own_call import OwnCall, own_attention
from ollm_core.engine.recurrent_call import StateCache
from ollm_core.engine.traced_cache import APART, Sharing, TracedCache, TracedStore
from ollm_core.errors import OllmError, UnsupportedError, one_line
from ollm_core.memory.tracker import OneExpertTaken, called_operations, traced_peak
from ollm_core.model.moe import Mixture, RoutedChunk
from ollm_core.model.own_forward import OwnForward
from ollm_core.model.skeleton import Skeleton


class TracedCall(NamedTuple):
    """One call of a layer, by all that its memory depends on."""

    layer_idx: int
    """Where the model's own forward is followed: -1 - n for its end, with n logits."""
    num_rows: int
    num_new: int
    num_past: int
    attention: str
    sharing: Sharing = APART


class LayerTrace:
    """Traces the layers of one model. Nothing is remembered but what layers hand on."""

    def __init__(self, skeleton: Skeleton, geometry: KVGeometry) -> None:
        self._skeleton = skeleton
        self._geometry = geometry
        self._known_handed: dict[tuple[int, int, int], Sequence[Tensor]] = {}

    def peak(self, call: TracedCall) -> int:
        """Peak bytes of a layer, its output counted, its input and its weights not."""
        if self._skeleton.own is not None:
            own = self._skeleton.own
            return max(self._own_peak(own, call, dtype) for dtype in own.facts.hidden_dtypes)
        return traced_peak(self._run(call, self._skeleton.chunk_forward(call.layer_idx)))

    def mixture(self, mixture: Mixture, num_tokens: int, alone: bool) -> tuple[int, int, int]:
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

    def handed(
        self, num_rows: int, num_new: int, num_past: int, attention: str
    ) -> Sequence[Tensor]:
        """What layers hand to the next one beside hidden states, without data: values of one size,
        whichever layer it is.
        """
        own, key = self._skeleton.own, (num_rows, num_new, num_past)
        if own is None or not own.facts.handed:
            return ()
        if key not in self._known_handed:
            dtype = max(own.facts.hidden_dtypes, key=lambda one: one.itemsize)
            found: list[Tensor] = []
            self._own_peak(own, TracedCall(0, *key, attention), dtype, found)
            self._known_handed[key] = tuple(torch.empty_like(one) for one in found)
        return self._known_handed[key]

    def check_halves(self, layers: Iterable[int]) -> None:
        """Raises UnsupportedError if the two halves of one of `layers` with routed experts compute
        anything else than the layer, as where a multiplier on its residual stream was left out.
        They are followed for one token after another: the fewest operations, with each kind of
        them.
        """
        for layer_idx in layers:
            mixture = self._skeleton.mixtures.get(layer_idx)
            if mixture is None:
                continue
            whole, halves = (
                called_operations(
                    self._run(TracedCall(layer_idx, 1, 1, 1, "blockwise"), forward),
                    mixture.dense_parameters,
                )
                for forward in (mixture.whole, mixture.halves)
            )
            if whole != halves:
                raise mixture.not_the_layer(whole, halves)

    def _own_peak(
        self,
        own: OwnForward,
        one: TracedCall,
        hidden_dtype: torch.dtype,
        handed: list[Tensor] | None = None,
    ) -> int:
        """The same of a layer that its model's own forward calls, with what that makes for it; of
        the end of that forward, with -1 - n logits, for a negative `layer_idx`. Either is given
        hidden states in `hidden_dtype`. What the layer hands on is added to `handed`.
        """
        layer_idx, num_rows, num_new, num_past, attention, _ = one
        meta, dtype, skeleton = torch.device("meta"), self._geometry.dtype, self._skeleton
        ids = torch.zeros(num_rows, num_new, dtype=torch.long, device=meta)
        store = TracedStore(self._geometry, num_past)
        before: Sequence[Tensor] = ()
        if layer_idx > 0:
            before = self.handed(num_rows, num_new, num_past, attention)
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

    def _run(self, call: TracedCall, forward: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """A call of `forward`, of a layer on the meta device, to be traced; what it is given is
        there before.
        """
        layer_idx, num_rows, num_new, num_past, attention, sharing = call
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
