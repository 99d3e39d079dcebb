"""Measures how fast the attention kernels are on a device."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from ollm_core.attention.blockwise import kernels_on
from ollm_core.attention.kernels import Kernel, Part, Products
from ollm_core.attention.trial import _HEAD_DIM, trial

_HEADS = (8, 4)  # key-value heads, and query heads for each: of a Llama 3.1 8B
_NEW_TOKENS = 512
_BLOCK_TOKENS = 256
_NUM_BLOCKS = 64  # a past of 16,384 tokens
_FEW_BLOCKS = 8
_REPEATS = 3


def measure_attention(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP per second, over a long past in blocks, of each kernel that works on `device`, by the
    attention that uses it: "blockwise" and "flash", and "products", which every device has.
    """
    kernels: dict[str, Kernel] = {"products": Products()}
    kernels["blockwise"] = kernels_on(device)[0]
    if device.type == "cuda":
        kernels["flash"] = kernels_on(device, package=True)[0]
    return measure_kernels(
        {name: k for name, k in kernels.items() if not trial(k, device, dtype, _HEAD_DIM)},
        device,
        dtype,
    )


def measure_blocks(
    device: torch.device, dtype: torch.dtype, head_dim: int = _HEAD_DIM
) -> dict[int, float]:
    """FLOP per second of block-wise attention over a past in blocks, by new tokens: one, as in
    decoding, and a chunk of a prompt.
    """
    kernel = kernels_on(device)[0]
    if trial(kernel, device, dtype, head_dim):
        kernel = Products()
    blocks = _FEW_BLOCKS if device.type == "cpu" else _NUM_BLOCKS
    return {
        num_new: measure_kernels(
            {"": kernel},
            device,
            dtype,
            num_new=num_new,
            num_blocks=blocks * times,
            head_dim=head_dim,
        )[""]
        for num_new, times in ((1, 8), (_NEW_TOKENS, 1))
    }


def measure_kernels(
    kernels: Mapping[str, Kernel],
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_new: int = _NEW_TOKENS,
    num_blocks: int = _NUM_BLOCKS,
    head_dim: int = _HEAD_DIM,
) -> dict[str, float]:
    """FLOP per second of each over so many blocks, the best of some tries, in turns."""
    num_groups, group = _HEADS
    query = torch.randn(num_groups, group, num_new, head_dim, device=device).to(dtype)
    keys = torch.randn(num_groups, _BLOCK_TOKENS, head_dim, device=device).to(dtype)
    part = Part(query, keys, keys, head_dim**-0.5)
    flops = 4 * num_groups * group * num_new * num_blocks * _BLOCK_TOKENS * head_dim
    found = dict.fromkeys(kernels, 0.0)
    for _ in range(_REPEATS):
        for name, kernel in kernels.items():
            start = time.perf_counter()
            for _ in range(num_blocks):
                kernel(part)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[name] = max(found[name], flops / max(time.perf_counter() - start, 1e-9))
    return found
