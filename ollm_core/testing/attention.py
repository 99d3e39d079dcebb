"""What attention is given and gives, in a model that is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ollm_core.contracts.attention import KVView
from ollm_core.engine.layer_call import LayerCall
from ollm_core.generate.causal_lm import StreamedModel


@dataclass(frozen=True, slots=True, eq=False)
class AttendedToken:
    """The last new token of a call's first row, and all that it may see: H query heads, G KV heads
    of dimension D, S keys.
    """

    layer_idx: int
    query: Tensor
    """[H, D]."""
    keys: Tensor
    """[G, S, D]."""
    values: Tensor
    """[G, S, D]."""
    options: dict[str, Any]
    """As the layer gives them: `scaling`, and for instance `sliding_window` and `s_aux` [H]."""
    output: Tensor
    """[H, D]."""


@contextmanager
def attended_tokens(model: StreamedModel) -> Iterator[list[AttendedToken]]:
    """One of each call of an attention function in the `with` block, in their order. None of a
    model that runs its layers by its own forward.
    """
    found: list[AttendedToken] = []
    skeleton = model.engine._skeleton
    real = skeleton.chunk_forward

    def chunk_forward(layer_idx: int) -> Callable[..., Tensor]:
        run = real(layer_idx)

        def watched(hidden: Tensor, **options: Any) -> Tensor:
            call = options["past_key_values"]
            if isinstance(call, LayerCall) and "update" not in vars(call):
                vars(call)["update"] = _watched(call.update, found)
            return run(hidden, **options)

        return watched

    skeleton.chunk_forward = chunk_forward  # type: ignore[method-assign] # of this model alone
    try:
        yield found
    finally:
        del skeleton.chunk_forward


def _watched(
    update: Callable[..., tuple[KVView, KVView]], found: list[AttendedToken]
) -> Callable[..., tuple[KVView, KVView]]:
    """An `update` whose views attend as before, and note it."""

    def updated(*given: object, **others: object) -> tuple[KVView, KVView]:
        view, _ = update(*given, **others)
        attend = view.attention

        def attention(
            module: torch.nn.Module,
            query: Tensor,
            view: KVView,
            *,
            scaling: float,
            **options: Any,
        ) -> Tensor:
            output = attend(module, query, view, scaling=scaling, **options)
            parts = [*view.past(0, options.get("sliding_window"))]
            parts.append((view.split(view.keys)[0], view.split(view.values)[0]))
            keys, values = (
                torch.cat([one.to(query.device) for one in each], dim=1)
                for each in zip(*parts, strict=True)
            )
            row = view.split(query)[0]
            token = row[:, -1].clone(), keys, values, {"scaling": scaling, **options}
            last = output[0, row.shape[1] - 1].clone()
            found.append(AttendedToken(view.layer_idx, *token, last))
            return output

        watched = replace(view, attention=attention)
        return watched, watched

    return updated
