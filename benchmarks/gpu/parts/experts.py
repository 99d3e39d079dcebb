"""Layers of a large mixture of experts in their true shapes: with all experts on the card, in host
memory and on the disk, and the tokens of un-offloaded transformers beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.parts.checkpoints import Checkpoint, experts, remove
from benchmarks.gpu.parts.runs import (
    disk_limit,
    fault_of,
    measured,
    planned,
    prompt_of,
    share,
    told_of,
)
from benchmarks.gpu.parts.work import OutOfTime, Tell, Work
from ollm_conformance.subject import Reference
from ollm_core.planning.plan import Plan

_LAYERS = 4
_PART = 0.1  # of the checkpoint's bytes may be held beside what must be


def run(work: Work, tell: Tell, family: str) -> None:
    """A finding for each tier, then one for transformers. Raises OutOfTime."""
    checkpoint = experts(work, family, _LAYERS)
    try:
        _measure(work, tell, checkpoint)
    finally:
        remove(checkpoint)  # the disk may be small


def _measure(work: Work, tell: Tell, checkpoint: Checkpoint) -> None:
    limit = disk_limit(checkpoint)
    num_tokens, num_new = (20, 3) if work.small else (256, 8)
    found: dict[str, Any] = {}
    options = {"kv": "device", "attention": "exact", "chunk_size": num_tokens}
    for tier, memory in _tiers(planned(work, checkpoint, num_tokens, num_new, options)):
        if work.seconds_left < 8:
            raise OutOfTime(f"experts {tier} were not measured, nor what comes after")
        one = measured(
            work,
            checkpoint,
            num_tokens,
            num_new,
            warming=True,
            **options,
            **memory,
        )
        one["disk_limit_gb_s"], one["share_of_disk"] = round(limit, 3), share(one, limit)
        found = found or one
        hit = one["experts_hit"] / max(one["experts_routed"], 1)
        told = f"{told_of(one)}; {hit:.0%} of the experts found in memory"
        tell(f"experts {tier}", told, fault=fault_of(one, found), **one)
    if work.seconds_left < 15:
        raise OutOfTime("tokens of transformers were not compared")
    _compare(work, tell, checkpoint, found, num_new)


def _tiers(plan: Plan) -> Iterator[tuple[str, dict[str, int]]]:
    """Where experts are to be, and the memory for that: of what is short there is the least that
    does, and a part of the experts' bytes more.
    """
    more = int(_PART * plan.weight_bytes)
    device = {"device_memory": plan.smallest_device_bytes + more}
    yield "on the card", {}
    yield "in host memory", device
    yield "on disk", {**device, "host_memory": plan.smallest_host_bytes + more}


def _compare(
    work: Work, tell: Tell, checkpoint: Checkpoint, found: dict[str, Any], num_new: int
) -> None:
    """The tokens of the un-offloaded model on the same device."""
    num_tokens = found["prompt_tokens"]
    try:
        reference = Reference(checkpoint.path, torch.bfloat16, work.device, num_tokens)
        prompt = prompt_of(reference.model, num_tokens)[0]  # type: ignore[arg-type]
        tokens, logits = reference.greedy(prompt, num_new)
    except torch.OutOfMemoryError:
        tell("transformers", "tokens not compared: its model does not fit on the card")
        return
    best = logits.float().topk(2, dim=-1).values
    same = tokens == found["tokens"]
    tell(
        "transformers",
        f"tokens {'the same' if same else 'DIFFERENT'}",
        fault="" if same else f"tokens {found['tokens']}, those of transformers are {tokens}",
        tokens=tokens,
        margins=[round(float(margin), 5) for margin in best[:, 0] - best[:, 1]],
    )
