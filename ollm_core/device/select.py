"""Which devices this machine has, and which one a name means."""

from __future__ import annotations

import re

import torch

from ollm_core.errors import DeviceError
from ollm_core.values import Device, device_name


def available_devices() -> list[str]:
    """Names that `pick_device` accepts here."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def pick_device(device: Device) -> torch.device:
    """What `device` names (see `device_name`); "auto" is the first GPU, or else the CPU.

    Raises DeviceError, naming what there is, for a device that this machine does not have.
    """
    name = device_name(device)
    devices = available_devices()
    if name == "auto":
        return torch.device(devices[1] if len(devices) > 1 else "cpu")
    if (f"{name}:0" if name == "cuda" else name) not in devices:
        raise DeviceError(
            f"no device {name!r} on this machine",
            hint=f"one of: {', '.join(devices)}",
        )
    return torch.device(f"{name}:0" if name == "cuda" else name)


def planned_device(device: Device) -> torch.device:
    """What `device` names, as `pick_device`; one of CUDA need not be here."""
    name = device_name(device)
    if re.fullmatch(r"cuda(:\d{1,3})?", name):
        return torch.device(name if ":" in name else "cuda:0")
    return pick_device(name)
