"""What the benchmarks share: a cold, timed `generate`, the kernel's counts, the machine.

A cold run drops the checkpoint from the page cache before every weight pass, outside the measured
time, so that each pass starts as it would if the model were much larger than memory.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

Snapshot = TypeVar("Snapshot")


def checkpoint_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in name order."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"no *.safetensors in {checkpoint}; make_checkpoint.py writes some")
    return files


def drop_from_cache(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the cached pages of `files`."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_from_storage() -> int:
    """Bytes this process caused to be read from storage: the kernel's count, page faults too."""
    return _proc_field("/proc/self/io", "read_bytes")


class PeakAnonymousMemory:
    """Context manager that samples this process's anonymous memory; `num_bytes` is the peak."""

    def __init__(self, interval_seconds: float = 0.01) -> None:
        self.num_bytes = 0
        self._interval = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self.num_bytes = max(self.num_bytes, _proc_field("/proc/self/status", "RssAnon") * 1024)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()


@dataclass
class Timing(Generic[Snapshot]):
    """One generation: its new tokens and when each came; what `between_tokens` took is left out."""

    started: float
    tokens: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    """When work on the token after `ends[i]` began."""
    snapshots: list[Snapshot] = field(default_factory=list)
    """What `snapshot()` returned at each of `ends`."""

    @property
    def prefill_seconds(self) -> float:
        return self.ends[0] - self.started

    @property
    def decode_seconds(self) -> float:
        return sum(end - start for end, start in zip(self.ends[1:], self.starts, strict=False))

    @property
    def dropping_seconds(self) -> float:
        """Time in `between_tokens` after the first token and before the last."""
        return self.ends[-1] - self.ends[0] - self.decode_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        return (len(self.ends) - 1) / self.decode_seconds


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
            "memory_bytes": _proc_field("/proc/meminfo", "MemTotal") * 1024,
            "kernel": f"{platform.system()} {platform.release()}",
            "filesystem": _filesystem(checkpoint),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("ollm-core", "torch", "transformers")},
        },
    }


def memory_cap() -> int | None:
    """The memory limit of this process's cgroup in bytes (see capped.sh), or None."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            limit = Path("/sys/fs/cgroup/memory" + group, "memory.limit_in_bytes")
        elif not controllers:
            limit = Path("/sys/fs/cgroup" + group, "memory.max")
        else:
            continue
        text = limit.read_text().strip() if limit.exists() else "max"
        if text != "max" and int(text) < 1 << 60:
            return int(text)
    return None


def _proc_field(path: str, key: str) -> int:
    with open(path) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


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
