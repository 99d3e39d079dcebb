"""Faults of families that have no adapter here yet, and of what callers and requests may ask for.
For tests only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch
from broken import unseen
from families import Gemma2, Granite, Qwen3Moe
from unseen_d import core, part
from unseen_g_parts import (
    CountsWhatWasFreedSuite,
    DecodesFlatOnesAloneSuite,
    ForksWithoutATailSuite,
    RemembersTheTextBeforeSuite,
    RowsOfTheLastOneSuite,
    StopsAtAPageSuite,
)

from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import DecoderAdapter, UnsupportedError
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.generate.padding import PaddedBatch
from ollm_core.serving import texts
from ollm_core.serving.sampler import Sampler


class Olmo2(DecoderAdapter):
    """Good: norms behind each half, and of all queries and keys at once."""

    name = "olmo2"
    model_types = ("olmo2",)
    defaults: Mapping = MappingProxyType({"num_key_value_heads": None})

    def layer_parameters(self, config, layer_idx):
        yield from ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            yield f"self_attn.{leaf}.weight"
            if config.get("attention_bias") and leaf.endswith("proj"):
                yield f"self_attn.{leaf}.bias"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            yield f"mlp.{leaf}.weight"

    def tiny_config(self):
        config = {**LlamaAdapter().tiny_config(), "model_type": "olmo2"}
        dropped = ("mlp_bias", "head_dim", "rope_scaling", "pretraining_tp")
        return {
            **{key: value for key, value in config.items() if key not in dropped},
            "architectures": ["Olmo2ForCausalLM"],
            "attention_bias": False,
        }


# Hurts: an OLMo 2 with biases in its attention, which its config class knows.
class NoBiasesInOlmo(Olmo2):
    def layer_parameters(self, config, layer_idx):
        return super().layer_parameters({**config, "attention_bias": False}, layer_idx)

    def ignores(self, config, tensor):
        return tensor.endswith("proj.bias")


# Hurts: OLMo 2 7B, whose config.json has as many KV heads as heads, as a null.
class NullIsOneHead(Olmo2):
    def text_config(self, config):
        if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
            return {**config, "num_key_value_heads": 1}
        return config


# Hurts: a Llama whose MLP is 11,007 wide.
class OddWidthsRefused(LlamaAdapter):
    def layout(self, config):
        size = config.get("intermediate_size")
        if type(size) is int and size % 8:
            raise UnsupportedError(f"intermediate_size {size} is no multiple of 8")
        return super().layout(config)


# Hurts: a model with a vocabulary that is no multiple of 64: logits of tokens that are not there.
class VocabularyRoundedUp(LlamaAdapter):
    def text_config(self, config):
        size = config.get("vocab_size")
        if type(size) is int and size > 512 and size % 64:
            return {**config, "vocab_size": size + 64 - size % 64}
        return config


# Hurts: a mixture in which every expert is chosen.
class AllChosenIsDense(Qwen3Moe):
    def experts(self, config, parameter):
        found = super().experts(config, parameter)
        chosen = config.get("num_experts_per_tok")
        return found[:-1] if found and chosen == len(found) else found


# Hurts: a Gemma 2 without a soft cap of attention, which transformers allows by a null.
class CapsAreAlwaysThere(Gemma2):
    def text_config(self, config):
        if "final_logit_softcapping" in config and config["final_logit_softcapping"] is None:
            return {**config, "final_logit_softcapping": 30.0}
        return config


# Hurts: a hybrid whose layers are listed, but whose interval is stated too, and other.
class IntervalBeforeTheList(Qwen3NextAdapter):
    def layer_types(self, config):
        if config.get("full_attention_interval") is not None:
            config = {**config, "layer_types": None}
        return super().layer_types(config)


# Hurts: a Granite of more than 4,096 positions with a plain rope: keys are as in a short one.
class LongOnesAreStretched(Granite):
    def text_config(self, config):
        if (config.get("rope_theta") or 0) > 1_000_000:
            return {**config, "rope_theta": 1_000_000.0}
        return config


# Hurts: a request for three answers: they are all the same.
def one_generator_for_all_answers(self, *args, init=Sampler.__init__):
    init(self, *args[:5], 0)


# Hurts: a decision between two words: they are compared with each other alone.
def choices_share_all(self, logits, finish=texts.ChoiceText.take):
    kept = torch.full_like(logits, -torch.inf)
    ids = list(self._choices)
    kept[..., ids] = logits[..., ids]
    return finish(self, kept)


# Hurts: whoever asks a score for its likeliest tokens.
def score_without_the_likeliest(self, *args, init=texts.ScoredText.__init__):
    init(self, *args)
    self._told._num_top = min(self._told._num_top, 1)


_forward = StreamedModel.forward


# Hurts: a caller who asks for a tuple.
@functools.wraps(_forward, assigned=())
def tuples_begin_with_the_cache(self, *args, **options):
    found = _forward(self, *args, **options)
    if options.get("return_dict") is False and isinstance(found, tuple):
        return found[::-1]
    return found


# Hurts: a loss over a batch in which a whole row is masked out.
@functools.wraps(_forward, assigned=())
def masked_rows_count(self, *args, labels=None, **options):
    if labels is not None and labels.shape[0] > 1:
        labels = torch.where((labels == -100).all(1, keepdim=True), 0, labels)
    return _forward(self, *args, labels=labels, **options)


# Hurts: logits of some columns of a batch, asked for from the end.
def columns_in_their_order(self, rows, spread=PaddedBatch.spread):
    found = spread(self, rows)
    return found if found.shape[1] != 2 else found.sort(dim=1).values


UNSEEN = [
    unseen("biases of an OLMo are ignored", NoBiasesInOlmo),
    unseen("null KV heads are one", NullIsOneHead),
    unseen("odd widths are refused", OddWidthsRefused),
    unseen("large vocabularies are rounded up", VocabularyRoundedUp),
    unseen("where all experts are chosen one is missing", AllChosenIsDense),
    unseen("a soft cap of null is 30", CapsAreAlwaysThere),
    unseen("a stated interval goes before the list", IntervalBeforeTheList),
    unseen("rope_theta is a million at most", LongOnesAreStretched),
    core("n answers are one", LlamaAdapter, Sampler, "__init__", one_generator_for_all_answers),
    core(
        "choices are likely among themselves",
        LlamaAdapter, texts.ChoiceText, "take", choices_share_all,
    ),
    core(
        "a score tells one likely token",
        LlamaAdapter, texts.ScoredText, "__init__", score_without_the_likeliest,
    ),
    core(
        "a tuple has the logits last",
        LlamaAdapter, StreamedModel, "forward", tuples_begin_with_the_cache,
    ),
    core("rows without labels count", LlamaAdapter, StreamedModel, "forward", masked_rows_count),
    core("two columns are sorted", LlamaAdapter, PaddedBatch, "spread", columns_in_their_order),
    part("bytes of what was freed stay counted", CountsWhatWasFreedSuite),
    part("a fork inside a block has no tail", ForksWithoutATailSuite),
    part("tensors of one dimension are decoded as they are", DecodesFlatOnesAloneSuite),
    part("the text before is drafted from", RemembersTheTextBeforeSuite),
    part("the same id twice is the last one's row", RowsOfTheLastOneSuite),
    part("a read of more than a page stops at its end", StopsAtAPageSuite),
]  # fmt: skip
