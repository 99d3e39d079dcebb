"""The memory of the GPU that torch would compute on, found without torch: for verbs that must be
quick. By NVIDIA's own library, which its driver brings.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def first_gpu() -> tuple[int, int] | None:
    """Free and all bytes of the first GPU that CUDA_VISIBLE_DEVICES leaves; None where there is
    none, or where the torch that is installed has no CUDA.
    """
    index = _first_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if index is None or not _torch_has_cuda():
        return None
    with suppress(OSError, AttributeError):
        return _memory(ctypes.CDLL(_LIBRARY), index)
    return None


def _first_visible(setting: str | None) -> int | None:
    """The index of a GPU; of one named in another way, 0, as most machines have one."""
    if setting is None:
        return 0
    first = setting.split(",")[0].strip()
    if first.isdecimal():
        return int(first)
    return 0 if first.startswith(("GPU-", "MIG-")) else None


def _torch_has_cuda() -> bool:
    try:
        return "+cpu" not in version("torch")
    except PackageNotFoundError:
        return False


def _memory(library: ctypes.CDLL, index: int) -> tuple[int, int] | None:
    if library.nvmlInit_v2():
        return None
    try:
        device, found = ctypes.c_void_p(), _Memory()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            return None
        if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(found)):
            return None
        return int(found.free), int(found.total)
    finally:
        library.nvmlShutdown()
