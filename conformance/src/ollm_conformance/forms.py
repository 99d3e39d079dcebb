"""Checkpoints as families publish them: the tensors that transformers would write, packed as
config.json says, and how transformers itself opens that without packed arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils.quantization_config import Mxfp4Config

from ollm_core import Config

_PACKED = ("gate_up_proj", "down_proj")  # which transformers 5.17 does not name yet
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between 0, 0.5, 1, 1.5, 2, 3, 4 and 6


def as_published(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of a checkpoint in the form that `quantization_config` names. On the meta device
    too.
    """
    if _method(config) is None:
        return dict(tensors)
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.rpartition(".")[2] in _PACKED:
            stored |= zip((f"{name}_blocks", f"{name}_scales"), _mxfp4(value), strict=True)
        else:
            stored[name] = value
    return stored


def reference_options(config: Config) -> dict[str, Any]:
    """What `from_pretrained` needs beside the directory, to give a model in plain floats."""
    return {"quantization_config": Mxfp4Config(dequantize=True)} if _method(config) else {}


def _method(config: Config) -> str | None:
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found["quant_method"]
    if method != "mxfp4":
        raise AssertionError(f"the suite can write checkpoints in mxfp4, not in {method!r}")
    return str(method)


def _mxfp4(value: Tensor) -> tuple[Tensor, Tensor]:
    """[E, in, out] -> blocks [E, out, in / 32, 16] and scales [E, out, in / 32]: the nearest
    numbers that there are.
    """
    groups = value.float().transpose(1, 2).unflatten(-1, (-1, 32))  # [E, out, in / 32, 32]
    exponents = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    scaled = groups * torch.exp2(-exponents)[..., None]
    middles = torch.tensor(_MIDDLES, device=value.device)
    codes = (scaled.abs()[..., None] > middles).sum(-1) + 8 * scaled.signbit()
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponents + 127).to(torch.uint8)
