"""What this machine has: devices, and memory that is free now."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ollm_core.errors import DeviceError

_CGROUP = Path("/sys/fs/cgroup")
ASSUMED_DEVICE_BYTES = 8 * 10**9
"""The memory of a GPU that is planned for and not here."""
_RESERVE_BYTES = 500_000_000
"""Left alone on each memory: the interpreter, torch's own buffers and the rest of the machine."""


def available_devices() -> list[str]:
    """Names that `pick_device` accepts here."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or else the CPU.

    Raises DeviceError, naming what there is, for a device that this machine does not have.
    """
    devices = available_devices()
    if name == "auto":
        return torch.device(devices[1] if len(devices) > 1 else "cpu")
    if (f"{name}:0" if name == "cuda" else name) not in devices:
        raise DeviceError(
            f"device {name!r} is not there",
            hint=f"this machine has: {', '.join(devices)}",
        )
    return torch.device(f"{name}:0" if name == "cuda" else name)


def planned_device(name: str) -> torch.device:
    """The device called `name`, as `pick_device`; one of CUDA need not be here."""
    if re.fullmatch(r"cuda(:\d{1,3})?", name):
        return torch.device(name if ":" in name else "cuda:0")
    return pick_device(name)


def default_memory(device: torch.device) -> tuple[int, int]:
    """`free_memory`; for a GPU that is not here, 8 GB and what is free on the host."""
    if device.type == "cpu" or str(device) in available_devices():
        return free_memory(device)
    return ASSUMED_DEVICE_BYTES, max(_free_host_bytes() - _RESERVE_BYTES, 1) * 9 // 10


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of device and host memory that a model may use by default: what is free, less a
    reserve.

    On a CPU both come out of the same memory: 70% counts as the device's, 20% as the host's.
    """
    host = max(_free_host_bytes() - _RESERVE_BYTES, 1)
    if device.type == "cpu":
        return host * 7 // 10, host * 2 // 10
    free, _ = torch.cuda.mem_get_info(device)
    return max(free - _RESERVE_BYTES, 1), host * 9 // 10


def peak_process_bytes() -> int:
    """The most memory that this process ever held (VmHWM), or 0 where the system does not tell."""
    return _kib_field(Path("/proc/self/status"), "VmHWM:")


def _free_host_bytes() -> int:
    available = _kib_field(Path("/proc/meminfo"), "MemAvailable:") or 4 << 30
    return min([available, *_cgroup_limits()])


def _kib_field(path: Path, field: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)


def _cgroup_limits() -> list[int]:
    """Memory limits of the control group that this process is in, versions 1 and 2."""
    limits = []
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in groups:
        number, controllers, group = line.split(":", 2)
        name = group.lstrip("/")
        if number == "0":
            path = _CGROUP / name / "memory.max"
        elif "memory" in controllers.split(","):
            path = _CGROUP / "memory" / name / "memory.limit_in_bytes"
        else:
            continue
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return limits
