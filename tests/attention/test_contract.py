"""The attention functions of core keep the contract."""

from __future__ import annotations

from ollm_conformance import AttentionConformance
from ollm_core.attention.blockwise import blockwise_attention
from ollm_core.attention.exact import exact_attention


class TestExactAttention(AttentionConformance):
    """transformers' own, over all keys in one piece."""

    attention = exact_attention
    exact = True


class TestBlockwiseAttention(AttentionConformance):
    """Partial results, merged."""

    attention = blockwise_attention
