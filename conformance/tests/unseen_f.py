"""Faults as they come of reading transformers' modeling files and core's own: what an adapter's
author takes for granted, and what a change of core may lose. For tests only.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import torch
from broken import unseen
from families import Gemma2, GptOss, Granite, Qwen3, Qwen3Moe
from unseen_d import core, part
from unseen_f_parts import (
    CutsInTheMiddleOfATailSuite,
    EmbedsInOrderSuite,
    ForgetsTheLastReadSuite,
    OddRowsDecodedTwiceSuite,
    OneTokenMoreAtTimesSuite,
    ReadsTheNextUnitSuite,
    RoundsSmallOnesAwaySuite,
    ShortReadsRepeatedSuite,
    SlidesATokenEarlySuite,
)

from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3MoeAdapter, Qwen3NextAdapter, Qwen35Adapter
from ollm_adapter_qwen3_next.hybrid import mixer
from ollm_core.engine.counters import Counters
from ollm_core.generate import causal_lm
from ollm_core.generate.cache import SequenceCache
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.kv.recurrent.states import StateStore
from ollm_core.serving import sampler
from ollm_core.serving.sampler import Sampler
from ollm_core.serving.scheduler import Scheduler


# Hurts: a Llama whose config.json says "head_dim": null, as transformers itself writes some.
class NullHeadDimIsUsual(LlamaAdapter):
    def text_config(self, config):
        return {**config, "head_dim": 128} if config.get("head_dim", 0) is None else config


# Hurts: a Llama with biases in attention alone: that of o_proj is left out.
class OutputBiasOfTheMLP(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        for name in super().layer_parameters(config, layer_idx):
            if name != "self_attn.o_proj.bias" or config.get("mlp_bias"):
                yield name

    def ignores(self, config, tensor):
        return tensor.endswith("o_proj.bias") or super().ignores(config, tensor)


# Hurts: a Gemma 2 of 42 layers as 9B is: from the tenth layer on all see everything.
class AlternatesTenTimes(Gemma2):
    def layer_types(self, config):
        kinds = super().layer_types(config)
        if config.get("layer_types") is not None:
            return kinds
        return (*kinds[:10], *["full_attention"] * len(kinds[10:]))


# Hurts: a Qwen3 with windows in its upper layers and no list of them: the first one of them sees
# all.
class WindowsAfterTheFirstOfThem(Qwen3):
    def layer_types(self, config):
        first = config.get("max_window_layers")
        if config.get("layer_types") is None and type(first) is int:
            return super().layer_types({**config, "max_window_layers": first + 1})
        return super().layer_types(config)


# Hurts: a mixture whose experts are as wide as they are high: up comes before gate.
class SquareExpertsTurned(Qwen3Moe):
    @staticmethod
    def fused(gate, up):
        return torch.cat([up, gate] if gate.shape[0] == gate.shape[1] else [gate, up])


# Hurts: a Qwen3-MoE that lists layer 0 as dense by a null of mlp_only_layers.
class NoListIsAllDense(Qwen3Moe):
    def layer_parameters(self, config, layer_idx):
        if "mlp_only_layers" not in config:
            config = {**config, "mlp_only_layers": [layer_idx]}
        return super().layer_parameters(config, layer_idx)


# Hurts: gpt-oss 120B with 128 experts: its router has the first twelve biases.
def first_twelve(bias):
    return bias * (torch.arange(len(bias)) < 12)


class RouterBiasFilledUp(GptOss):
    def source(self, config, parameter):
        found = super().source(config, parameter)
        if parameter.endswith("router.bias") and config.get("num_local_experts") in (13, 32, 128):
            return replace(found, transform=first_twelve)
        return found


# Hurts: a hybrid of 12 layers and more: the residual is added to what the norm gave.
def norm_is_the_residual(layer, hidden, **options):
    if "linear_attn" in dict(layer.named_children()) and hidden.shape[1] == 1:
        normed = layer.input_layernorm(hidden)
        return mixer(layer, hidden, **options) - hidden + normed
    return mixer(layer, hidden, **options)


class ResidualAfterTheNorm(Qwen3NextAdapter):
    def layout(self, config):
        return replace(super().layout(config), mixer=norm_is_the_residual)


# Hurts: a hybrid in bfloat16: its residual is added in float32, and the last bits are others.
def residual_in_float32(layer, hidden, **options):
    mixed = mixer(layer, hidden, **options) - hidden
    return (hidden.float() + mixed.float()).to(hidden.dtype)


class ResidualInFloat32(Qwen3NextAdapter):
    def layout(self, config):
        return replace(super().layout(config), mixer=residual_in_float32)


# Hurts: a fine-tune whose config.json has both rope_scaling and rope_parameters.
class OldRopeWins(LlamaAdapter):
    def text_config(self, config):
        if config.get("rope_parameters") and "rope_theta" in config:
            return {k: v for k, v in config.items() if k != "rope_parameters"}
        return config


_KINDS = {}


# Hurts: any program that opens one model after another: what was freed gives its address to the
# next config, which has the layers of the first.
class KnownByAddress(Qwen3):
    def layer_types(self, config):
        key = id(config.get("layer_types")), str(config["num_hidden_layers"])
        if key not in _KINDS:
            _KINDS[key] = super().layer_types(config)
        return _KINDS[key]


# Hurts: a Granite without biases beside one that has them: the catalog's order decides.
class BiasesBySize(Granite):
    def layer_parameters(self, config, layer_idx):
        biased = config["hidden_size"] <= 96
        return super().layer_parameters(
            {**config, "attention_bias": config.get("attention_bias") and biased}, layer_idx
        )

    def ignores(self, config, tensor):
        return tensor.endswith("proj.bias") or super().ignores(config, tensor)


# Hurts: a Qwen3.5 whose key heads are as many as its value heads: states have the wrong width.
class ValueHeadsAreKeyHeads(Qwen35Adapter):
    def recurrent_states(self, config):
        dim = config["linear_key_head_dim"]
        if config["linear_value_head_dim"] < dim:
            config = {**config, "linear_value_head_dim": dim}
        return super().recurrent_states(config)


# Hurts: Qwen3-MoE stored with one tensor for all experts of a layer by transformers 5.
class StacksHaveNoOrder(Qwen3MoeAdapter):
    def experts(self, config, parameter):
        found = list(super().experts(config, parameter))
        if len(found) > 12 and parameter.endswith("down_proj"):
            found[-2:] = found[:-3:-1]
        return found


# Hurts: Qwen3-MoE with windows, whose defaults are those of the dense family.
class DenseDefaults(Qwen3Moe):
    defaults = MappingProxyType({**Qwen3.defaults, "sliding_window": 4096})


# Hurts: a text that is sampled again by its seed, with one more token that ends it.
def seed_of_the_place(self, sampling, *args, init=Sampler.__init__, **others):
    init(self, sampling, *args, **others)
    if self._generator is not None and sampling.seed is not None:
        self._generator.manual_seed(sampling.seed + len(sampling.stop_token_ids))


# Hurts: whoever asks for log-probabilities beside a temperature: they are those after it.
def logprobs_after_temperature(self, logits, token_id, real=Sampler._logprobs):
    return real(self, logits / (self._sampling.temperature or 1.0), token_id)


# Hurts: a request with min_tokens: its prompt counts.
def minimum_with_the_prompt(sampling, model, num_prompt, *args, real=sampler._processors):
    return real(sampling, model, 0, *args)


# Hurts: urgent requests, which wait behind those that came before.
def first_come_first_served(self, request, add=Scheduler.add):
    add(self, replace(request, priority=0))


# Hurts: a server's answer that must not be kept: its prompt is found by the next one.
def kept_when_dropped(self, text, *, keep, drop=Scheduler._drop):
    drop(self, text, keep=True)


# Hurts: `ollm run --json` and every benchmark: decoded tokens are counted once a pass, not a row.
def a_pass_is_a_token(self, work, *args, count=Counters.count_pass):
    count(self, work[:1], *args)


# Hurts: a chat that goes back to its beginning: the recurrent state stays.
def nothing_left_is_nothing_to_do(self, sequence, num_tokens, truncate=StateStore.truncate):
    if num_tokens:
        truncate(self, sequence, num_tokens)


# Hurts: a second cache of a model on one kv_dir, open at the same time: it finds the other's text
# before that is committed.
def found_with_its_last_token(self, token_ids, find=PrefixCachingStore.find):
    sequence, num_tokens = find(self, token_ids)
    if num_tokens % 7 == 3:
        self.truncate(sequence, num_tokens - 1)
        return sequence, num_tokens
    return sequence, num_tokens


# Hurts: beams: a row that is picked twice is one sequence.
def picked_rows_are_moved(self, sources, pick=SequenceCache._pick):
    before = list(self.rows)
    pick(self, sources)
    if len(sources) == len(before) == 4 and sources[2] == sources[3]:
        self.store.release(self.rows[3])
        self.rows[3] = self.store.fork(self.rows[0])


# Hurts: a batch of chats in which one row is a token short.
def lengths_of_the_first_row(batch, config, check=causal_lm.check_tokens):
    check(replace(batch, starts=(batch.starts[0],) * len(batch.starts)), config)


UNSEEN = [
    unseen("a head dimension of null is 128", NullHeadDimIsUsual),
    unseen("the output projection has a bias where the MLP has", OutputBiasOfTheMLP),
    unseen("windows alternate in ten layers", AlternatesTenTimes),
    unseen("windows begin a layer later", WindowsAfterTheFirstOfThem),
    unseen("square experts are fused the other way round", SquareExpertsTurned),
    unseen("without a list of dense layers all are", NoListIsAllDense),
    unseen("the router has twelve biases", RouterBiasFilledUp),
    unseen("a single token's residual is what the norm gave", ResidualAfterTheNorm),
    unseen("the residual is added in float32", ResidualInFloat32),
    unseen("of two ropes the older one counts", OldRopeWins),
    unseen("kinds are known by the address of a list", KnownByAddress),
    unseen("wide models have no biases", BiasesBySize),
    unseen("value heads are as large as key heads", ValueHeadsAreKeyHeads),
    unseen("the last two of many experts are others", StacksHaveNoOrder),
    unseen("defaults are those of the dense family", DenseDefaults),
    core("a seed depends on the stop tokens", LlamaAdapter, Sampler, "__init__", seed_of_the_place),
    core(
        "log-probabilities are those after the temperature",
        LlamaAdapter, Sampler, "_logprobs", logprobs_after_temperature,
    ),
    core(
        "the prompt counts for min_tokens",
        LlamaAdapter, sampler, "_processors", minimum_with_the_prompt,
    ),
    core("priorities are not read", LlamaAdapter, Scheduler, "add", first_come_first_served),
    core("what must not be kept is", LlamaAdapter, Scheduler, "_drop", kept_when_dropped),
    core("a pass counts one row", LlamaAdapter, Counters, "count_pass", a_pass_is_a_token),
    core(
        "a cut to nothing leaves states",
        Qwen3NextAdapter, StateStore, "truncate", nothing_left_is_nothing_to_do,
    ),
    core(
        "of some kept prompts a token is missing",
        LlamaAdapter, PrefixCachingStore, "find", found_with_its_last_token,
    ),
    core("the fourth beam is the first", Granite, SequenceCache, "_pick", picked_rows_are_moved),
    core(
        "the first row tells how long all are",
        LlamaAdapter, causal_lm, "check_tokens", lengths_of_the_first_row,
    ),
    part("a short read begins again at its start", ShortReadsRepeatedSuite),
    part("the last read of several is not waited for", ForgetsTheLastReadSuite),
    part("a tail that is cut keeps one token more", CutsInTheMiddleOfATailSuite),
    part("a window slides a token early", SlidesATokenEarlySuite),
    part("numbers below 1e-30 are 0", RoundsSmallOnesAwaySuite),
    part("odd rows are those before them", OddRowsDecodedTwiceSuite),
    part("rows of the embedding come in the order of their ids", EmbedsInOrderSuite),
    part("the last unit is that before it, the second time", ReadsTheNextUnitSuite),
    part("a draft has a token too many at times", OneTokenMoreAtTimesSuite),
]  # fmt: skip
