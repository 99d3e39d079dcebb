"""Safetensors files whose data begins at a multiple of 64 bytes, written once and in one go."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ollm_core.device.buffers import as_memoryview
from ollm_core.weights.units import TORCH_DTYPES

_ALIGNMENT = 64


def save_aligned(tensors: Mapping[str, Tensor], path: Path) -> int:
    """Write `tensors`, which are on the CPU, to `path`, down to the disk; returns their bytes.

    Matrix libraries want float32 aligned so, and what lies elsewhere would be copied. Wide numbers
    come first, so that each lies at a multiple of its own size.
    """
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda pair: -pair[1].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in ordered:
        begin, end = end, end + value.nbytes
        place = {"shape": list(value.shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": names[value.dtype], **place}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb", buffering=0) as file:
        _write(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        for _, value in ordered:
            raw = value.contiguous().flatten().view(torch.uint8)
            _write(file.fileno(), as_memoryview(raw))
        os.fsync(file.fileno())
    return end


def _write(descriptor: int, data: memoryview) -> None:
    """All of it: the kernel takes less than 2 GiB at once, and on a full disk less than asked."""
    while data:
        data = data[os.write(descriptor, data) :]
