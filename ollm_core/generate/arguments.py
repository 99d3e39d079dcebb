"""Arguments of transformers' causal models that a streamed model does not act on.

One rule for all: what is not given (None) is fine, what says only what happens anyway is fine, and
anything else is refused by name. Those that it acts on are parameters of `StreamedModel.forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ollm_core.errors import InputError, UnsupportedError
from ollm_core.generate.padding import PaddedBatch


def _never(value: object, batch: PaddedBatch) -> bool:
    return False


def _false(value: object, batch: PaddedBatch) -> bool:
    return value is False


def _true(value: object, batch: PaddedBatch) -> bool:
    return value is True


def _zeros(value: object, batch: PaddedBatch) -> bool:
    return isinstance(value, Tensor) and not bool(value.any())


def _positions(value: object, batch: PaddedBatch) -> bool:
    """Whether real tokens stand where they follow the row's earlier ones."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != batch.ids.shape[1]:
        return False
    if value.shape[0] not in (1, len(batch.ids)):
        return False
    return bool(((value.to("cpu") == batch.positions) | ~batch.kept).all())


def _cache_positions(value: object, batch: PaddedBatch) -> bool:
    """Whether these are the positions of the padded batch."""
    num_new = batch.ids.shape[1]
    expected = torch.arange(batch.num_past, batch.num_past + num_new, device="cpu")
    return isinstance(value, Tensor) and torch.equal(value.to("cpu", torch.long), expected)


FINE: Mapping[str, tuple[Callable[[object, PaddedBatch], bool], str]] = {
    "position_ids": (_positions, "tokens stand after each other, counted without padding"),
    "cache_position": (_cache_positions, "new positions follow those in the cache"),
    "token_type_ids": (_zeros, "a text has one part"),
    "is_causal": (_true, "a token sees no later one"),
    "output_attentions": (_false, "attentions are never there as a whole"),
    "output_hidden_states": (_false, "hidden states are not kept"),
    "output_router_logits": (_false, "router logits are not kept"),
    "inputs_embeds": (_never, "it takes input_ids"),
    "encoder_hidden_states": (_never, "there is no encoder"),
    "encoder_attention_mask": (_never, "there is no encoder"),
    "cu_seq_lens_q": (_never, "each text has a row of its own"),
    "cu_seq_lens_k": (_never, "each text has a row of its own"),
    "max_length_q": (_never, "each text has a row of its own"),
    "max_length_k": (_never, "each text has a row of its own"),
    "seq_idx": (_never, "each text has a row of its own"),
    "head_mask": (_never, "all heads attend"),
}
"""By name: whether a value says what happens anyway, and what that is."""


def refuse_others(arguments: Mapping[str, Any], batch: PaddedBatch) -> None:
    """Raise UnsupportedError for the first argument that would change something, InputError for one
    that no model has.
    """
    for name, value in arguments.items():
        if value is None:
            continue
        if name not in FINE:
            raise InputError(
                f"forward: no argument {name!a:.40}",
                hint="see the documentation of ollm_core.generate.causal_lm.StreamedModel.forward",
            )
        fine, why = FINE[name]
        if not fine(value, batch):
            raise UnsupportedError(f"a streamed model takes no other {name}: {why}")
