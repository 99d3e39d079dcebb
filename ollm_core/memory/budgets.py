"""Memory limits of a model: the ones that you set, or defaults from what is free now. No other part
decides on this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollm_core.errors import DoesNotFitError, InputError
from ollm_core.memory.host import HostMemory
from ollm_core.memory.pair import PerMemory
from ollm_core.memory.sizes import format_size, parse_size
from ollm_core.values import Count, Size, count

if TYPE_CHECKING:
    import torch

RESERVE_BYTES = 500_000_000
"""Left alone on each memory: the interpreter, torch's own buffers and the rest of the machine."""
ASSUMED_DEVICE_BYTES = 8 * 10**9
"""The memory of a GPU that is planned for and not here."""
DEVICE_DEFAULT = "free memory now, less 500 MB; on a CPU 70% of that"
HOST_DEFAULT = "90% of free memory now, less 500 MB; on a CPU 20% of that"
"""The rules below in words, for people."""


Budgets = PerMemory[int]
"""Bytes that may be held of the device's and of the host's memory."""

LayerLimits = PerMemory[int | None]
"""The most layers that are kept on the device and in host memory, inside the budgets. None: as many
as these allow. Parts of the head and routed experts are not counted.
"""

NO_LAYER_LIMITS: LayerLimits = PerMemory(None, None)


def layer_limits(
    device: torch.device, device_layers: Count | None, host_layers: Count | None
) -> LayerLimits:
    """What the user states. Raises InputError for a number below zero, and for the host's where
    the CPU is the device.
    """
    limits: LayerLimits = PerMemory(
        None if device_layers is None else count("device_layers", device_layers, 0),
        None if host_layers is None else count("host_layers", host_layers, 0),
    )
    if host_layers is not None and device.type == "cpu":
        raise InputError(
            "host_layers: need a GPU, have a CPU",
            hint="on a CPU, use device_layers (--device-layers)",
        )
    return limits


def default_budgets(device: torch.device) -> Budgets:
    """What a model may use where the user states nothing. Of a GPU that is not here, 8 GB are
    assumed.
    """
    if device.type == "cpu":
        return default_shares(None)
    gpu = _gpu_memory(device)
    return default_shares(gpu[0] if gpu else ASSUMED_DEVICE_BYTES + RESERVE_BYTES)


def default_shares(free_gpu_bytes: int | None) -> Budgets:
    """The default for a GPU with so many bytes free, or for the CPU where that is None."""
    host = max(HostMemory().free() - RESERVE_BYTES, 1)
    if free_gpu_bytes is None:
        return PerMemory(host * 7 // 10, host * 2 // 10)
    return PerMemory(max(free_gpu_bytes - RESERVE_BYTES, 1), host * 9 // 10)


def stated_budgets(
    device: torch.device,
    device_memory: Size | None,
    host_memory: Size | None,
    *,
    must_be_there: bool = True,
) -> Budgets:
    """The sizes that the user states, as `8GB`, or the default for None. Raises InputError for what
    is no size.

    With `must_be_there`, raises DoesNotFitError for more than this machine has in all: nothing
    could keep such a promise. More than is free now is allowed, for others may go.
    """
    default = default_budgets(device)
    on_device = default.device if device_memory is None else parse_size(device_memory)
    on_host = default.host if host_memory is None else parse_size(host_memory)
    if must_be_there:
        host = HostMemory().total()
        gpu = _gpu_memory(device)
        if device_memory is not None:
            _check("device_memory", on_device, gpu[1] if gpu else host, default)
        if host_memory is not None:
            _check("host_memory", on_host, host, default)
            if device_memory is not None and device.type == "cpu":  # one memory
                both = "device_memory and host_memory together"
                _check(both, on_device + on_host, host, default)
    return PerMemory(on_device, on_host)


def _check(name: str, num_bytes: int, there: int, default: Budgets) -> None:
    if num_bytes > there:
        raise DoesNotFitError(
            f"{name}: the limit is {format_size(num_bytes)}, the machine has {format_size(there)}",
            hint="set a lower limit; the defaults are now "
            f"{format_size(default.device)} device memory, {format_size(default.host)} host memory",
        )


def _gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Free and all bytes of a GPU, if it is here."""
    import torch

    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        return None
    return torch.cuda.mem_get_info(device)
