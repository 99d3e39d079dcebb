"""Keeps the caller's torch settings (autocast, default device and dtype) from changing a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_AUTOCASTS = ("cpu", "cuda")
"""Types of device that models compute on."""


@contextmanager
def own_torch_state() -> Iterator[None]:
    """As if nobody had called torch.autocast, set_default_device, inference_mode or enable_grad:
    dtypes are the model's, what names no device is made in host memory, and what stays (KV,
    weights, the tracing of a plan) is not marked by an inference mode that ends. Also a decorator.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device_type in _AUTOCASTS:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))  # makes every call slower, so only if needed
        yield
