"""Tests whether an attention kernel works on a device, by running it beside plain products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ollm_core.attention.blockwise import kernels_on
from ollm_core.attention.kernels import Kernel, Part, masked_products
from ollm_core.device.dtypes import HALF
from ollm_core.errors import InputError

_LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of an output in a trial, whose values are of the size of 1."""
_LARGEST_LSE_ERROR = 1e-2
_HEAD_DIM = 128
_FAILURES = (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError)
"""What a kernel of another version, build or device raises."""


class _Case(NamedTuple):
    """The shape of one call of a kernel, and which keys it must hide."""

    num_new: int
    num_keys: int
    causal: bool = False
    before: int | None = None


def _cases(kernel: Kernel) -> Iterator[_Case]:
    for num_new, num_keys in ((1, 300), (5, 256), (300, 256)):
        yield _Case(num_new, num_keys)
    if kernel.causal:
        yield _Case(1, 1, causal=True)
        yield _Case(150, 150, causal=True)
    if kernel.windows:
        yield _Case(150, 150, causal=True, before=17)
        yield _Case(100, 256, before=30)
        yield _Case(40, 41, before=0)


def trial(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why `kernel` cannot be used on `device`, in one line; empty if every kind of call gave what
    plain products give.
    """
    if not kernel.takes(dtype, head_dim):
        return f"it does not compute in {dtype} with heads of {head_dim}"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    num_groups, group, scaling = 2, 3, head_dim**-0.5
    for case in _cases(kernel):
        query = random(num_groups, group, case.num_new, head_dim)
        keys, values = (random(num_groups, case.num_keys, head_dim) for _ in range(2))
        part = Part(query, keys, values, scaling, case.causal, case.before)
        expected, expected_lse = masked_products(part, part.hidden())
        try:
            output, lse = kernel(part)
            wrong = (output.float() - expected).abs().max() > _LARGEST_ERROR[dtype]
            wrong |= (lse - expected_lse).abs().max() > _LARGEST_LSE_ERROR
            if not bool(torch.isfinite(output).all()) or bool(wrong):
                return f"it gives other numbers than plain products do for {case}"
        except _FAILURES as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def require_flash(device: torch.device, dtype: torch.dtype, *, here: bool) -> None:
    """Raises InputError unless the package flash-attn can be used: for such a device and dtype, and
    where the device is `here`, by a trial.
    """
    hint = "use attention='blockwise', which has kernels of torch"
    if device.type != "cuda" or dtype not in HALF:
        raise InputError(
            f"attention 'flash' computes in float16 and bfloat16 on CUDA, not in "
            f"{str(dtype).removeprefix('torch.')} on {device}",
            hint=hint,
        )
    if here and (reason := _flash_trial(device, dtype)):
        raise InputError(
            f"attention 'flash' needs the package flash-attn, which does not work here: {reason}",
            hint=f"pip install 'ollm-core[flash-attn]', or {hint}",
        )


def _flash_trial(device: torch.device, dtype: torch.dtype) -> str:
    return trial(kernels_on(device, package=True)[0], device, dtype, _HEAD_DIM)


def flash_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the package flash-attn can be used on `device`, which need not be here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return not _flash_trial(device, dtype)


def blocks_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's own kernels for `device` pass their trial; of one that is not here, or in a
    dtype that they leave to products, that is taken for granted.
    """
    if device.type != "cuda" or dtype not in HALF or not torch.cuda.is_available():
        return True
    return not trial(kernels_on(device)[0], device, dtype, _HEAD_DIM)
