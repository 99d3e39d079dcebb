"""One weight pass of a model that is run by its own forward: that says what its layers are called
with, and makes logits of what the last one gives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_core.contracts.kv import KVStore
from ollm_core.device.offload import ActivationOffload
from ollm_core.engine.batch import Chunk, NewTokens
from ollm_core.engine.checkpoint import PassCheckpoint
from ollm_core.engine.own_call import OwnCall, own_attention
from ollm_core.engine.pass_planner import PassPlan
from ollm_core.engine.progress import PassReport
from ollm_core.model.own_forward import OwnForward
from ollm_core.model.skeleton import Skeleton
from ollm_core.profiling import Span
from ollm_core.weights.eviction import Eviction
from ollm_core.weights.streamer import TieredStreamer


@dataclass(frozen=True, slots=True, eq=False)
class OwnPass:
    """The loop of `WeightPass` for such a model; its fields are those."""

    own: OwnForward
    skeleton: Skeleton
    weights: TieredStreamer
    store: KVStore
    work: Sequence[NewTokens]
    plan: PassPlan
    eviction: Eviction | None
    span: Span
    checkpoint: PassCheckpoint

    def run(self, offload: ActivationOffload, report: PassReport) -> list[Tensor]:
        """Logits [num_logits, V] of each item of the work; `report` after each step."""
        own, skeleton, weights, work = self.own, self.skeleton, self.weights, self.work
        calls: list[OwnCall] = []
        for chunk in self.plan.chunks:
            calls.append(self._call(chunk, offload, calls[-1] if chunk.begin else None))
        widest = max(dtype.itemsize for dtype in own.facts.hidden_dtypes)
        hidden = [offload.store(call.enter(), widest) for call in calls]
        rows = max(len(chunk.rows) * chunk.num_tokens for chunk in self.plan.chunks)
        self.checkpoint.restore(hidden)
        first_layer = self.checkpoint.first_layer
        report.go_on(first_layer, first_layer * len(calls))
        for layer_idx in range(first_layer, len(skeleton.layers)):
            fetch = functools.partial(weights.experts, layer_idx)
            mixture = skeleton.routed.get(layer_idx)
            with (
                weights.acquire(layer_idx) as parameters,
                skeleton.bound(layer_idx, parameters, rows),
                mixture.fetching(fetch) if mixture else nullcontext(),
            ):
                del parameters  # a name would keep copies while the next layer's are made
                for i, call in enumerate(calls):
                    chunk_hidden = offload.fetch(hidden[i])
                    with self.span("layer", layer_idx=layer_idx):
                        output = call.run(layer_idx, chunk_hidden)
                    # On the device the old ones may be part of what layers are called with.
                    on_host = self.plan.hidden_on_host
                    hidden[i] = offload.put(hidden[i], output) if on_host else output
                    del chunk_hidden, output
                    if self.eviction:
                        self.eviction.relieve(layer_idx)
                    report()
            self.checkpoint.after_layer(layer_idx + 1, hidden)
            report.saved(self.checkpoint.saved_layers)
        row_logits: list[list[Tensor]] = [[] for _ in work]
        num_logits = sum(item.num_logits for item in work)
        with (
            weights.acquire(len(skeleton.layers)) as parameters,
            skeleton.bound_head(parameters, own.head_rows(num_logits, rows)),
            self.span("head"),
        ):
            del parameters
            for chunk, call, states in zip(self.plan.chunks, calls, hidden, strict=True):
                first = min(len(work[row].token_ids) - work[row].num_logits for row in chunk.rows)
                if first < chunk.end:
                    num_logits = chunk.end - max(first, chunk.begin)
                    logits = call.leave(offload.fetch(states), num_logits)
                    for place, row in enumerate(chunk.rows):
                        row_logits[row].append(logits[place])
        report()
        # Copies, as callers may change them: what is made in inference mode nobody may.
        whole = [torch.cat(chunks) for chunks in row_logits]
        return [row[-item.num_logits :] for item, row in zip(work, whole, strict=True)]

    def _call(self, chunk: Chunk, offload: ActivationOffload, before: OwnCall | None) -> OwnCall:
        work = [self.work[row] for row in chunk.rows]
        ids = torch.stack([item.token_ids[chunk.begin : chunk.end] for item in work])
        return OwnCall(
            self.own,
            self.store,
            [item.sequence for item in work],
            ids.to(self.weights.device),
            work[0].start + chunk.begin,
            self.weights.embed,
            own_attention(self.plan.attention, self.weights.device),
            alone=len(self.plan.chunks) == 1,
            offload=offload,
            before=before,
        )
