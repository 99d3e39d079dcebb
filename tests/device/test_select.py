"""Devices by name: those that are here, and those that a plan is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ollm_core import InputError
from ollm_core.device.select import pick_device, planned_device
from ollm_core.errors import DeviceError
from ollm_core.values import device_name


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), -1, np.int64(-1)])
def test_a_device(device: Any):
    """By name, itself, or by the number that a pipeline of transformers takes."""
    assert pick_device(device) == torch.device("cpu")


def test_devices_that_need_not_be_here():
    """Numbers are GPUs."""
    assert planned_device(1) == planned_device(torch.device("cuda", 1)) == torch.device("cuda:1")
    assert device_name(torch.device("cuda")) == "cuda"


@pytest.mark.parametrize("device", [None, True, 1.0, -2, [0], {"": 0}])
def test_what_is_no_device(device: Any):
    """One line."""
    with pytest.raises(InputError, match=r"device is .*'cuda:0'"):
        pick_device(device)


def test_a_device_of_torch_that_cannot_compute():
    """As any that is not there."""
    with pytest.raises(DeviceError, match="no device 'meta'"):
        pick_device(torch.device("meta"))
