"""The dtypes that a model may be computed in, as torch has them."""

from __future__ import annotations

import torch

from ollm_core import values

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in values.DTYPES}
"""By name."""
HALF = frozenset({torch.float16, torch.bfloat16})
"""Those of half precision: devices multiply and attend in them by kernels of their own, if they
have any.
"""
