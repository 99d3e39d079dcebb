"""Block-wise attention for a layer of a model that is run by its own forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ollm_core.attention.exact import family_eager, known_options
from ollm_core.contracts.attention import Attention, KVView

_SINKS = frozenset({"s_aux"})
"""Eager attention finds them in the module."""


@dataclass(frozen=True, slots=True)
class OwnLayerAttention:
    """See Attention. Sees what the masks of the model's own forward show, whatever window the layer
    hands on, and takes keys and values of different sizes, which are stored in one. Options that
    the family's eager attention does not name change nothing there, and nothing here.
    """

    attention: Attention
    window: int | None
    """Of the masks; None: all earlier tokens."""
    value_dim: int
    """Numbers of a value; as they are stored there may be more, which are 0."""

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        view: KVView,
        *,
        scaling: float,
        **options: Any,
    ) -> Tensor:
        """`query` [R, H, T, K] -> [R, T, H, V]."""
        known = known_options(family_eager(module)) | _SINKS
        options = {name: value for name, value in options.items() if name in known}
        options["sliding_window"] = self.window
        if lacking := view.keys.shape[-1] - query.shape[-1]:
            query = functional.pad(query, (0, lacking))  # zeros change no score
        output = self.attention(module, query, view, scaling=scaling, **options)
        if output.shape[-1] == self.value_dim:
            return output
        return output[..., : self.value_dim].contiguous()
