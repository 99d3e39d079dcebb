"""Attentions of the first round of unseen mutants (unseen_a.py), each with one fault."""

from __future__ import annotations

from dataclasses import replace

from unseen_turns import turn_attention

import ollm
from ollm_core.attention.blockwise import BlockwiseAttention
from ollm_core.attention.kernels import CpuFlash


def _tight(attention):
    def attend(module, query, view, **options):
        window = options.get("sliding_window")
        if window and query.shape[2] == 1 and set(view.starts) == {window - 1}:
            options["sliding_window"] = window - 1
        return attention(module, query, view, **options)

    return attend


# Hurts: the one decode step at which a text is as long as the window: it forgets the first token
# too early.
def forgets_when_the_window_is_just_full(*args, **options):
    model = ollm.load(*args, **options)
    turn_attention(model, _tight)
    return model


def _alike(attention):
    def attend(module, query, view, **options):
        if len(view.starts) > 2:
            view = replace(view, starts=(min(view.starts),) * len(view.starts))
        return attention(module, query, view, **options)

    return attend


# Hurts: three or more prompts of unequal lengths, decoded together: the longer ones do not see
# their last tokens.
def three_rows_have_one_past(*args, **options):
    model = ollm.load(*args, **options)
    turn_attention(model, _alike)
    return model


class RoundsSums(CpuFlash):
    def __call__(self, part):
        output, lse = super().__call__(part)
        return output, lse.to(part.query.dtype).float()

    def several(self, part):
        found = super().several(part)
        return found and (found[0], found[1].to(part.query.dtype).float())


def _rounded(attention):
    return BlockwiseAttention((RoundsSums(),)) if _is_blockwise(attention) else attention


def _is_blockwise(attention):
    return isinstance(attention, BlockwiseAttention)


# Hurts: long contexts in bfloat16, which are block-wise by default: parts are weighed with an error
# of some percent, more than transformers has.
def rounds_sums_in_half(*args, **options):
    model = ollm.load(*args, **options)
    turn_attention(model, _rounded)
    return model
