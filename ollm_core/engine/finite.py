"""Refuses logits that are NaN or infinite, so that no token is chosen from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ollm_core.errors import NotFiniteError


def require_finite(rows: Sequence[Tensor]) -> None:
    """Raise NotFiniteError if logits, [n, V] each, have a NaN or an infinity. A token may be ruled
    out by minus infinity; a position where all are is refused too.
    """
    # The highest of each position, and of these both ends: a NaN comes through to them.
    ends = [end for logits in rows for end in logits.amax(dim=-1).aminmax()]
    if bool(torch.stack(ends).isfinite().all()):
        return
    total = sum(logits.numel() for logits in rows)
    num_nan = sum(int(logits.isnan().sum()) for logits in rows)
    num_infinite = sum(int(logits.isinf().sum()) for logits in rows)
    raise NotFiniteError(
        f"the model's logits are not finite: {num_nan} of {total} are NaN and {num_infinite} "
        f"infinite, in {str(rows[0].dtype).removeprefix('torch.')}",
        hint="the weights are damaged, or overflow in this dtype: try --dtype float32 or bfloat16",
    )
