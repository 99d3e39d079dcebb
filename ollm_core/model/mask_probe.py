"""Looks at the masks that a model's own forward makes: what they show, and that it is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ollm_core.memory.tracker import OperationMode, tensors_in
from ollm_core.model.own_forward import LayerArguments

MADE_UP = 0.375
"""Stands for any number that is not there."""


class NotSeen(Exception):
    """Why block-wise attention cannot be known to be right."""


class MadeUp(OperationMode):
    """Computes with the same number wherever there is no data: what a mask shows must not depend on
    that.
    """

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(one.is_meta for one in tensors_in(args, kwargs)):
            args, kwargs = _with_numbers(args), _with_numbers(kwargs)
        return func(*args, **kwargs)


def _with_numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            return value
        number = MADE_UP if value.dtype.is_floating_point else 1
        return torch.full((), number, dtype=value.dtype).expand(value.shape)
    if isinstance(value, (tuple, list)):
        return type(value)(_with_numbers(one) for one in value)
    if isinstance(value, dict):
        return {key: _with_numbers(one) for key, one in value.items()}
    return value


def mask_of(eager: LayerArguments, plain: LayerArguments) -> Tensor | None:
    """What a layer is given with `eager` attention alone, and not where masks are left to core.
    Raises NotSeen for any other difference.
    """
    if len(eager.args) != len(plain.args) or eager.options.keys() != plain.options.keys():
        raise NotSeen("its layers are called otherwise than with eager attention")
    pairs = [
        *zip(eager.args, plain.args, strict=True),
        *((value, plain.options[name]) for name, value in eager.options.items()),
    ]
    masks = [one for one, other in pairs if isinstance(one, Tensor) and other is None]
    others = sum(len(tensors_in(one)) - len(tensors_in(other)) for one, other in pairs)
    if len(masks) > 1 or others != len(masks):
        raise NotSeen("its layers are given more than one mask")
    return masks[0] if masks else None


def shows(mask: Tensor, start: int, window: int | None) -> bool:
    """Whether a mask [1, 1, T, S], of T tokens after `start`, hides what core's attention does, and
    changes nothing else. A layer with a `window` (tokens) is given no more keys than that shows.
    """
    if mask.dim() != 4 or mask.shape[:2] != (1, 1):
        return False
    num_new, num_keys = mask.shape[2:]
    if num_keys != num_new + (start if window is None else min(start, window - 1)):
        return False
    back = torch.arange(num_new)[:, None] + num_keys - num_new - torch.arange(num_keys)
    hidden = back < 0
    if window is not None:
        hidden |= back >= window
    if mask.dtype == torch.bool:
        return torch.equal(~mask[0, 0], hidden)
    lowest = torch.where(hidden, torch.finfo(mask.dtype).min, 0.0)
    return bool(torch.equal(mask[0, 0].clamp(min=torch.finfo(mask.dtype).min), lowest.to(mask)))
