"""What the benchmarks share: a cold, timed `generate`, the machine, and what `cold` has."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.tools.cold import (
    PeakAnonymousMemory,
    Snapshot,
    Timing,
    checkpoint_files,
    drop_from_cache,
    memory_cap,
    proc_field,
    read_from_storage,
)

__all__ = [
    "PeakAnonymousMemory",
    "Timing",
    "checkpoint_files",
    "drop_from_cache",
    "environment",
    "finish",
    "memory_cap",
    "random_prompt",
    "read_from_storage",
    "timed_generate",
]


class _Mark(StoppingCriteria):
    """Never stops; notes the time, calls `between_tokens`, and notes the time again."""

    def __init__(
        self,
        timing: Timing[Snapshot],
        snapshot: Callable[[], Snapshot],
        between_tokens: Callable[[], None],
    ) -> None:
        self._timing = timing
        self._snapshot = snapshot
        self._between_tokens = between_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self._timing.ends.append(time.perf_counter())
        self._timing.snapshots.append(self._snapshot())
        self._between_tokens()
        self._timing.starts.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def timed_generate(
    model: Any,
    prompt: Tensor,
    num_new_tokens: int,
    *,
    snapshot: Callable[[], Snapshot],
    between_tokens: Callable[[], None],
    **options: Any,
) -> Timing[Snapshot]:
    """Greedy `model.generate` of `num_new_tokens` (at least 2) after `prompt` [1, T], timed.

    `between_tokens` is called before the prompt and after every token, outside the measured time.
    """
    between_tokens()
    timing: Timing[Snapshot] = Timing(time.perf_counter())
    with torch.inference_mode():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            stopping_criteria=StoppingCriteriaList([_Mark(timing, snapshot, between_tokens)]),
            **options,
        )
    timing.tokens = output[0, prompt.shape[1] :].tolist()
    return timing


def random_prompt(num_tokens: int) -> Tensor:
    """The same token ids everywhere, [1, num_tokens], below 49,000."""
    return torch.randint(10, 49000, (1, num_tokens), generator=torch.Generator().manual_seed(0))


def environment(checkpoint: Path) -> dict[str, Any]:
    """When and where: date, machine and library versions, with no host name and no path."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": proc_field("/proc/meminfo", "MemTotal") * 1024,
            "kernel": f"{platform.system()} {platform.release()}",
            "filesystem": _filesystem(checkpoint),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("ollm-core", "torch", "transformers")},
        },
    }


def finish(record: dict[str, Any], path: Path | None) -> None:
    """Write a record to `path`, if there is one, and as the last line on stdout."""
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _filesystem(path: Path) -> str:
    """Type of the file system that holds `path`: that of the longest mount point above it."""
    path = path.resolve()
    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, kind = line.partition(" - ")[::2]
        mounts[Path(mount.split()[4])] = kind.split()[0]
    return next(mounts[parent] for parent in (path, *path.parents) if parent in mounts)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
