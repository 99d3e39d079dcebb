"""THE loop: one weight pass over a ragged list of sequences.

It knows layers, chunks and memory. It knows nothing about text, sampling or model families.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ollm_core.contracts.kv import KVStore
from ollm_core.device.offload import ActivationOffload
from ollm_core.engine.batch import Chunk, NewTokens
from ollm_core.engine.checkpoint import PassCheckpoint
from ollm_core.engine.layer_call import LayerCall, PositionEmbeddings
from ollm_core.engine.own_pass import OwnPass
from ollm_core.engine.pass_planner import PassPlan
from ollm_core.engine.progress import ProgressReporter
from ollm_core.engine.recurrent_call import RecurrentCall
from ollm_core.model.outside_layers import apply
from ollm_core.model.own_forward import OwnForward
from ollm_core.model.skeleton import Skeleton
from ollm_core.profiling import Span
from ollm_core.weights.eviction import Eviction
from ollm_core.weights.streamer import TieredStreamer


@dataclass(frozen=True, slots=True, eq=False)
class WeightPass:
    """One pass over `work`: each unit of weights is acquired once, for all chunks."""

    skeleton: Skeleton
    weights: TieredStreamer
    store: KVStore
    work: Sequence[NewTokens]
    plan: PassPlan
    progress: ProgressReporter
    eviction: Eviction | None
    """Asked after each call of a layer whether kept weights must give way."""
    span: Span
    checkpoint: PassCheckpoint
    """Written after a layer, and gone on with where there is one."""
    check: Callable[[], None] | None = None
    """Called with each report of progress; what it raises ends the pass."""

    def run(self) -> list[Tensor]:
        """Logits [num_logits, V] of each item of the work. The store then holds its keys, values
        and states, not committed.
        """
        skeleton, weights, device = self.skeleton, self.weights, self.weights.device
        given_up_bytes = self.eviction.shortage.now_bytes if self.eviction else 0
        num_layers, first_layer = len(skeleton.layers), self.checkpoint.first_layer
        report = self.progress.begin(
            self.work, self._num_reports, given_up_bytes, self.check, num_layers
        )
        offload = ActivationOffload(device, self.plan.hidden_on_host)
        if skeleton.own is not None:
            return self._own(skeleton.own).run(offload, report)
        hidden = [offload.store(self._embed(chunk)) for chunk in self.plan.chunks]  # [R, T, C]
        calls = [
            LayerCall(
                self.store, self.work, chunk, self.plan.attention, device, shares=self.plan.shares
            )
            for chunk in self.plan.chunks
        ]
        recurrent_calls = [
            RecurrentCall(self.store, self.work, chunk, call.positions)
            for chunk, call in zip(self.plan.chunks, calls, strict=True)
            if skeleton.recurrent
        ]
        rows = max(chunk.num_rows * chunk.num_tokens for chunk in self.plan.chunks)
        self.checkpoint.restore(hidden)
        report.go_on(first_layer, self._num_steps(first_layer))
        for layer_idx in range(first_layer, num_layers):
            with (
                weights.acquire(layer_idx) as parameters,
                skeleton.bound(layer_idx, parameters, rows),
            ):
                del parameters  # a name would keep copies while the next layer's are made
                forward = skeleton.chunk_forward(layer_idx)
                runs = recurrent_calls if layer_idx in skeleton.recurrent else calls
                for i, call in enumerate(calls):
                    chunk_hidden = offload.fetch(hidden[i])
                    embeddings = self._positions(layer_idx, chunk_hidden, call)
                    with self.span("layer", layer_idx=layer_idx):
                        hidden[i] = offload.put(
                            hidden[i], runs[i].run(forward, layer_idx, chunk_hidden, embeddings)
                        )
                    if self.eviction:
                        self.eviction.relieve(layer_idx)
                    report()
                del chunk_hidden
                if mixture := skeleton.mixtures.get(layer_idx):
                    fetch = functools.partial(weights.experts, layer_idx)
                    with self.span("experts", layer_idx=layer_idx):
                        mixture.run(hidden, offload, fetch, report)
            self.checkpoint.after_layer(layer_idx + 1, hidden)
            report.saved(self.checkpoint.saved_layers)
        return self._head(hidden, offload, report)

    def _own(self, own: OwnForward) -> OwnPass:
        return OwnPass(
            own,
            self.skeleton,
            self.weights,
            self.store,
            self.work,
            self.plan,
            self.eviction,
            self.span,
            self.checkpoint,
        )

    @property
    def _num_reports(self) -> int:
        """How often the pass reports after its beginning: when a chunk is through a layer or its
        experts, and after each shard of the head.
        """
        num_layers = len(self.skeleton.layers)
        return self._num_steps(num_layers) + len(self.weights.units) - num_layers

    def _num_steps(self, num_layers: int) -> int:
        """Reports of the first `num_layers`."""
        num_mixtures = sum(layer_idx < num_layers for layer_idx in self.skeleton.mixtures)
        return (num_layers + num_mixtures) * len(self.plan.chunks)

    def _embed(self, chunk: Chunk) -> Tensor:
        ids = torch.cat([self.work[row].token_ids[begin:end] for row, begin, end in chunk.spans])
        embedded = apply(self.skeleton.outside.after_embedding, self.weights.embed(ids))
        return embedded.view(chunk.num_rows, chunk.num_tokens, -1)

    def _positions(self, layer_idx: int, hidden: Tensor, call: LayerCall) -> PositionEmbeddings:
        """Cosines and sines of a chunk. Made anew for each layer of a long prompt, to hold
        little.
        """
        kind = self.skeleton.rotary_types[layer_idx]
        if kind in call.embeddings:
            return call.embeddings[kind]
        rotary = self.skeleton.rotary
        embeddings = self.skeleton.embeddings(rotary, layer_idx, hidden, call.positions)
        if len(self.plan.chunks) == 1:
            call.embeddings[kind] = embeddings
        return embeddings

    def _head(
        self, hidden: Sequence[Tensor], offload: ActivationOffload, report: Callable[[], None]
    ) -> list[Tensor]:
        """Logits [num_logits, V] per item. The head is walked once, shard by shard of the
        vocabulary, for all of them.
        """
        work, outside = self.work, self.skeleton.outside
        wanted: list[tuple[Chunk, Tensor]] = []  # normalised states [R, t, C]
        for chunk, states in zip(self.plan.chunks, hidden, strict=True):
            first = min(len(work[row].token_ids) - work[row].num_logits for row in chunk.rows)
            if first < chunk.end:
                normalised = self.skeleton.norm(apply(outside.before_norm, offload.fetch(states)))
                if chunk.lengths:
                    parts = zip(chunk.rows, normalised.split(chunk.lengths, dim=1), strict=True)
                    normalised = torch.cat([t[:, -work[row].num_logits :] for row, t in parts], 1)
                else:
                    normalised = normalised[:, max(first - chunk.begin, 0) :]
                wanted.append((chunk, apply(outside.before_head, normalised)))
        num_logits = sum(item.num_logits for item in work)
        shards: list[list[Tensor]] = [[] for _ in wanted]  # logits [R, t, v] of each chunk
        for unit_idx in range(len(self.skeleton.layers), len(self.weights.units)):
            with self.weights.acquire(unit_idx) as (weight,), self.span("head"):
                (matrix,) = self.skeleton.multiplied([weight], num_logits)
                for of_chunk, (_, states) in zip(shards, wanted, strict=True):
                    # As one matrix, which is what torch makes of it for weights that could be
                    # trained, like those of transformers: another kernel has other last bits.
                    logits = functional.linear(states.flatten(0, 1), matrix)
                    of_chunk.append(logits.unflatten(0, states.shape[:2]))
                del weight, matrix
            report()
        row_logits: list[list[Tensor]] = [[] for _ in work]
        for of_chunk, (chunk, _) in zip(shards, wanted, strict=True):
            logits = torch.cat(of_chunk, dim=-1) if len(of_chunk) > 1 else of_chunk[0]  # [R, t, V]
            apply(outside.after_head, logits)
            of_rows = logits.unbind()
            if chunk.lengths:
                of_rows = logits[0].split([work[row].num_logits for row in chunk.rows])
            for row, found in zip(chunk.rows, of_rows, strict=True):
                row_logits[row].append(found)
        rows = [torch.cat(chunks) if len(chunks) > 1 else chunks[0] for chunks in row_logits]
        return [row[-item.num_logits :] for item, row in zip(work, rows, strict=True)]
