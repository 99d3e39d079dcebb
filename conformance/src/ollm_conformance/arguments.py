"""What a call of a model may be given, by transformers' names: values that change nothing, and
values that change what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

GIVEN_ALWAYS = frozenset({"input_ids", "attention_mask", "past_key_values"})
"""Arguments of every call."""
OF_ITS_OWN = frozenset({"labels", "shift_labels", "num_items_in_batch"})
"""Arguments that the check of the loss has."""


def argument_values(mask: Tensor, hidden_size: int) -> Mapping[str, Sequence[Any]]:
    """Values of each argument for rows [B, T] of which `mask` says what is no padding."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    columns = torch.arange(mask.shape[1])
    lengths = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()], dtype=torch.int32)
    switches = None, False, True
    return {
        "position_ids": (None, positions, positions + 3, positions.flip(1)),
        "cache_position": (None, columns, columns + 1),
        "token_type_ids": (None, torch.zeros_like(mask), mask),
        "inputs_embeds": (None, torch.zeros(*mask.shape, hidden_size)),
        "use_cache": switches,
        "return_dict": (None, True),
        "logits_to_keep": (0, 1, 2, mask.shape[1], torch.tensor([-1, -3])),
        "is_causal": switches,
        "output_attentions": switches,
        "output_hidden_states": switches,
        "output_router_logits": switches,
        "cu_seq_lens_q": (None, lengths),
        "cu_seq_lens_k": (None, lengths),
        "max_length_q": (None, 3),
        "max_length_k": (None, 3),
        "seq_idx": (None, torch.zeros_like(mask, dtype=torch.int32)),
        "head_mask": (None, torch.zeros(1)),
        "encoder_hidden_states": (None, torch.zeros(*mask.shape, hidden_size)),
        "encoder_attention_mask": (None, mask),
        "no_such_argument": (None, 1),
    }
