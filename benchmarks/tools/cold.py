"""What a cold, timed run needs of the kernel and of the clock. Free of torch, so that programs
without it are measured by the same code.

A cold run drops the checkpoint from the page cache before every weight pass, outside the measured
time, so that each pass starts as it would if the model were much larger than memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

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
    return proc_field("/proc/self/io", "read_bytes")


@dataclass(frozen=True, slots=True)
class Counts:
    """What this process has taken of the machine so far."""

    read_bytes: int
    """From storage."""
    cpu_seconds: float
    """Of all its threads."""

    @classmethod
    def now(cls) -> Self:
        """As the kernel has counted them."""
        return cls(read_from_storage(), time.process_time())


class ColdFiles:
    """Called before every weight pass: drops `files` from the page cache, unless `warm`."""

    def __init__(self, files: Iterable[Path], *, warm: bool = False) -> None:
        self.cpu_seconds: list[float] = []
        """What each call has taken of the processor."""
        self._files = () if warm else tuple(files)

    def __call__(self) -> None:
        started = time.thread_time()
        drop_from_cache(self._files)
        self.cpu_seconds.append(time.thread_time() - started)


class PeakAnonymousMemory:
    """Context manager that samples this process's anonymous memory; `num_bytes` is the peak."""

    def __init__(self, interval_seconds: float = 0.01) -> None:
        self.num_bytes = 0
        self._interval = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self.num_bytes = max(self.num_bytes, proc_field("/proc/self/status", "RssAnon") * 1024)

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
    def step_seconds(self) -> list[float]:
        """Of each token after the first."""
        return [end - start for end, start in zip(self.ends[1:], self.starts, strict=False)]

    @property
    def decode_seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def dropping_seconds(self) -> float:
        """Time in `between_tokens` after the first token and before the last."""
        return self.ends[-1] - self.ends[0] - self.decode_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        return (len(self.ends) - 1) / self.decode_seconds


def told(
    name: str,
    num_prompt_tokens: int,
    timing: Timing[Any],
    counts: Sequence[Counts],
    dropping: ColdFiles,
    peak_anonymous_bytes: int,
) -> dict[str, Any]:
    """The line that every measured program prints. MB are 2**20 bytes, GB are 10**9.

    `counts` are from before the first call of `dropping`, and from the end of every token. What
    the calls took of the processor is left out.
    """
    before, first, last = counts[0], counts[1], counts[-1]
    cpu_seconds = last.cpu_seconds - before.cpu_seconds - sum(dropping.cpu_seconds[:-1])
    read_bytes = last.read_bytes - before.read_bytes
    decode_rate = (last.read_bytes - first.read_bytes) / timing.decode_seconds
    return {
        "peer": name,
        "prompt": num_prompt_tokens,
        "new": len(timing.tokens),
        "prefill_s": round(timing.prefill_seconds, 3),
        "decode_tok_s": round(timing.decode_tokens_per_second, 4),
        "read_mb_per_pass": round(read_bytes / len(timing.tokens) / 2**20, 1),
        "decode_gb_s": round(decode_rate / 1e9, 3),
        "cpu_s": round(cpu_seconds, 2),
        "peak_anon_mb": peak_anonymous_bytes >> 20,
        "memory_cap_bytes": memory_cap(),
        "tokens": timing.tokens,
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


def proc_field(path: str, key: str) -> int:
    """The number on the line of `path` that begins with `key` and a colon."""
    with open(path) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
