"""How much memory the host has and how much is free, for the machine and this process's control
groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 says "no limit" with a number near 2**63
_UNKNOWN = 4 << 30  # where the system tells nothing


class HostMemory:
    """Reads a few lines of the kernel at each question: microseconds, no state."""

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        """`proc` and `cgroups` are where the kernel shows them."""
        self._proc = proc
        self._groups = list(_groups(proc / "self/cgroup", cgroups))

    def free(self) -> int:
        """Bytes that can be taken now without anybody else losing what is in use: what the machine
        has free or only caches, and no group's limit less what the group uses, its caches apart.
        """
        machine = _kib(self._proc / "meminfo", "MemAvailable:") or _UNKNOWN
        return max(min([machine, *(group.free() for group in self._groups)]), 0)

    def total(self) -> int:
        """Bytes that this process could ever have."""
        machine = _kib(self._proc / "meminfo", "MemTotal:") or _UNLIMITED
        return min([machine, *(group.limit() for group in self._groups)])

    def peak(self) -> int:
        """The most that this process ever held (VmHWM), or 0 where the system does not tell."""
        return _kib(self._proc / "self/status", "VmHWM:")


class _Group:
    """The files of one control group."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        """`names` of the limit, of what is used, and of the field of `memory.stat` that counts
        file pages which nobody used lately.
        """
        self._limit, self._used = directory / names[0], directory / names[1]
        self._stat, self._cache = directory / "memory.stat", names[2]

    def limit(self) -> int:
        return min(_number(self._limit, _UNLIMITED), _UNLIMITED)

    def free(self) -> int:
        limit = self.limit()
        if limit >= _UNLIMITED:
            return limit
        return limit - _number(self._used, 0) + _field(self._stat, self._cache)


_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_V2 = "memory.max", "memory.current", "inactive_file"


def _groups(told: Path, root: Path) -> Iterator[_Group]:
    """The group of this process and those above it, each of which may have a limit. In a container
    the path that is told may be the host's; then the group is what is mounted.
    """
    for line in _lines(told):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0":
            top, names = root, _V2
        elif "memory" in controllers.split(","):
            top, names = root / "memory", _V1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        directories = [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
        yield from (_Group(one, names) for one in directories if (one / names[0]).is_file())


def _number(path: Path, otherwise: int) -> int:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else otherwise


def _field(path: Path, name: str) -> int:
    pairs = (line.split() for line in _lines(path))
    return next((int(pair[1]) for pair in pairs if pair[0] == name), 0)


def _kib(path: Path, field: str) -> int:
    return next((int(one.split()[1]) << 10 for one in _lines(path) if one.startswith(field)), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def peak_process_bytes() -> int:
    """The most memory that this process ever held, or 0 where the system does not tell."""
    return HostMemory().peak()
