"""Which matrix products a model is given: torch's own, or those of this folder."""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ollm_core.device.dtypes import HALF
from ollm_core.errors import one_line
from ollm_core.products.primitives import bound_primitives
from ollm_core.products.products import CpuProducts
from ollm_core.products.small_batch import SmallBatch, load_kernel
from ollm_core.products.trial import trial

_X86 = frozenset({"x86_64", "AMD64"})

logger = logging.getLogger("ollm")


def choose_products(dtype: torch.dtype, device: torch.device, precision: str) -> CpuProducts | None:
    """What multiplies the weights of a model in `dtype` on `device`; None: torch itself.

    That is so wherever `precision` is "exact", in float32 and on a GPU. On a processor with
    instructions for products in `dtype` torch's own are taken but for one row. On others it has no
    fast kernel: it multiplies one number after another.
    """
    if device.type == "cpu":
        bound_primitives()
    if precision == "exact" or dtype not in HALF or device.type != "cpu":
        return None
    kernel = _small_batch() if dtype == torch.bfloat16 else None
    if not has_instructions(dtype):
        return CpuProducts(dtype, kernel)
    return CpuProducts(dtype, kernel, instructions=True) if kernel else None


_taken_away: ContextVar[bool] = ContextVar("taken_away", default=False)


@contextmanager
def without_instructions() -> Iterator[None]:
    """What is opened in the `with` block, by the same thread, takes the processor for one without
    instructions for half precision: for tests and benchmarks of what others have.
    """
    token = _taken_away.set(True)
    try:
        yield
    finally:
        _taken_away.reset(token)


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices in `dtype`, and torch makes use of it."""
    if _taken_away.get():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # On x86 that only says that torch converts in wide registers.
    if supported and platform.machine() in _X86:
        return bool(torch.cpu._is_avx512_bf16_supported())
    return supported


@functools.cache
def _small_batch() -> SmallBatch | None:
    """The compiled kernel, if there is one that passes its trial on this processor."""
    try:
        kernel = load_kernel()
        reason = trial(kernel)
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001 # a compiler without a directory for its results
        reason = one_line(error)
    if reason:
        logger.warning("the compiled matrix product is not used on this processor: %s", reason)
        return None
    return kernel
