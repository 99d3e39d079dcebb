"""Llama-3-8B with 100,000 tokens of context, weights streamed and KV on the disk, in the memory of
an 8 GB card: all layers if time and disk allow, else as many as they do.
"""

from __future__ import annotations

import shutil
from typing import Any

from benchmarks.gpu.parts.checkpoints import LLAMA, Checkpoint, cut, llama
from benchmarks.gpu.parts.runs import disk_limit, fault_of, measured, share, told_of
from benchmarks.gpu.parts.work import OutOfTime, Tell, Work

_TOKENS = 100_000
_NEW = 3
_FEW_LAYERS = 2
_SPARE_BYTES = 2_000_000_000


def run(work: Work, tell: Tell, _: str = "") -> None:
    """A short prompt first, to see how long a long one takes; then few layers; then as many as can
    be. Raises OutOfTime.
    """
    whole = llama(work)
    few = cut(work, whole, LLAMA, min(_FEW_LAYERS, whole.num_layers))
    limit = disk_limit(few)
    most = 260 if work.small else _TOKENS
    short = _one(work, tell, few, most // 10, limit, warming=True)
    num_tokens = _length(work, short, most)
    if num_tokens < most:
        left_out = f"a prompt of {most} tokens was not tried, for lack of time"
        _one(work, tell, few, num_tokens, limit)
        raise OutOfTime(left_out)
    found = _one(work, tell, few, most, limit)
    num_layers = min(_layers(work, few, found), whole.num_layers)
    if num_layers > few.num_layers:
        _one(work, tell, cut(work, whole, LLAMA, num_layers), most, limit)
    if num_layers < whole.num_layers:
        raise OutOfTime(f"{max(num_layers, few.num_layers)} of {whole.num_layers} layers were run")


def _one(
    work: Work,
    tell: Tell,
    checkpoint: Checkpoint,
    num_tokens: int,
    limit: float,
    *,
    warming: bool = False,
) -> dict[str, Any]:
    """A run, told."""
    memory = {"device_memory": "7500MB", "host_memory": "12GB"}
    if work.small:
        memory = {"device_memory": "40MB", "host_memory": "100MB"}
    found = measured(work, checkpoint, num_tokens, _NEW, kv="disk", attention="blockwise", **memory)
    found["disk_limit_gb_s"], found["share_of_disk"] = round(limit, 3), share(found, limit)
    name = f"{num_tokens} tokens, {checkpoint.num_layers} layers"
    tell(name, told_of(found), fault=fault_of(found), **found)
    return found


def _length(work: Work, short: dict[str, Any], most: int) -> int:
    """As long a prompt as may be expected to take most of the time that is left; a prompt ten times
    as long takes about thirty times the time.
    """
    num_tokens, seconds = most, short["prefill_seconds"] * 30
    while seconds > 0.7 * work.seconds_left and num_tokens > short["prompt_tokens"]:
        num_tokens, seconds = num_tokens * 3 // 4, seconds * 0.65
    return max(num_tokens, short["prompt_tokens"])


def _layers(work: Work, few: Checkpoint, found: dict[str, Any]) -> int:
    """How many there is time and disk for, by what few have taken; all that is not a layer's too
    is counted as one.
    """
    steps = sum(found["step_seconds"])
    seconds = (found["prefill_seconds"] + steps) / few.num_layers
    in_time = int(0.8 * work.seconds_left / max(seconds, 1e-3))
    room = shutil.disk_usage(work.directory).free - (0 if work.small else _SPARE_BYTES)
    on_disk = room * few.num_layers // max(found["kv_disk_bytes"], 1)
    return min(in_time, on_disk)
