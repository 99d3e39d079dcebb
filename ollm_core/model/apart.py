"""Whether the experts of a layer may be run one by one, and what they say added up by core."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ollm_core.memory.tracker import OneExpertTaken

_TOKENS = 3


def run_apart(experts: nn.Module) -> bool:
    """Whether a module with stacked experts, on the meta device, adds up what they say in the dtype
    of what it gives: core adds up what single experts give, and in bfloat16 the sum of rounded
    numbers is not the rounded sum. False too where its code cannot be followed.
    """
    plain = copy.deepcopy(experts).to(torch.bfloat16)
    sizes = {size for one in plain.parameters() for size in one.shape[1:]}
    return any(_is_plain(plain, size) for size in sorted(sizes))


def _is_plain(experts: nn.Module, size: int) -> bool:
    """The same, for a module that is given states of `size` numbers; False if it takes others."""
    states = torch.empty(_TOKENS, size, dtype=torch.bfloat16, device="meta")
    chosen = torch.zeros(_TOKENS, 1, dtype=torch.int64, device="meta")
    weights = torch.empty(_TOKENS, 1, dtype=torch.float32, device="meta")
    with torch.inference_mode(False), torch.no_grad(), _Sums() as seen:
        try:
            output = experts(states, chosen, weights)
        except Exception:  # noqa: BLE001 - a model's code may raise anything
            return False
    return bool(output.shape == states.shape and seen.dtypes <= {output.dtype})


class _Sums(OneExpertTaken):
    """Notes the dtypes of what is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        aten = torch.ops.aten
        if func.overloadpacket in (aten.index_add_, aten.index_put_, aten.scatter_add_, aten.add_):
            self.dtypes.add(args[0].dtype)
        return super().seen(func, args, kwargs)
