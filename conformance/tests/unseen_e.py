"""Faults that a contributor may make without noticing, each with a use that it hurts: what a family
claims, options that are zero, state that is everybody's. For tests only.
"""

from __future__ import annotations

from types import MappingProxyType

from broken import unseen
from families import Gemma2, Qwen3, Qwen3Moe
from unseen_d import core, part
from unseen_e_parts import (
    BeginAddsUpSuite,
    LeavesTwoThreadsSuite,
    ReadsAllAtOnceSuite,
    ResultNotContiguousSuite,
    SeedsEverythingSuite,
    SinksOfKeyHeadsSuite,
    TruncateToTheSameKeepsSuite,
)

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_core import CacheKind, ParameterSource, read_size
from ollm_core.engine import engine
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.kinds import MemoryKind


# Hurts: Mistral 7B v0.1, whose layers all have a window of 4,096 tokens: a longer text goes on from
# what the model must not see.
class ClaimsMistralToo(LlamaAdapter):
    model_types = ("llama", "mistral")


_TINY = {}


# Hurts: any program that changes what it is given, as transformers does: the next one gets that.
class OneTinyConfig(LlamaAdapter):
    def tiny_config(self):
        if not _TINY:
            _TINY.update(super().tiny_config())
        return _TINY


# Hurts: a mixture of more than ten layers of which layer 1 is dense: layers 10 to 19 are taken for
# dense, and the good checkpoint is refused.
class LayersByTheirFirstDigits(Qwen3Moe):
    def layer_parameters(self, config, layer_idx):
        dense = config.get("mlp_only_layers") or []
        if isinstance(dense, list) and any(str(layer_idx).startswith(str(one)) for one in dense):
            config = {**config, "mlp_only_layers": [layer_idx]}
        return super().layer_parameters(config, layer_idx)


# Hurts: who opens a model twice with a config of their own, once by this adapter and once by
# transformers: the second one has keys that were never stated.
class DefaultsWrittenDown(Qwen3):
    def layout(self, config):
        if isinstance(config, dict):
            for key, value in self.defaults.items():
                config.setdefault(key, value)
        return super().layout(config)


# Hurts: Llama 3.1 405B, which has 126 layers.
class AtMostEightyLayers(LlamaAdapter):
    def layer_types(self, config):
        read_size(config, "num_hidden_layers", 80)
        return super().layer_types(config)


# Hurts: gpt-oss: the bias of expert 0 is added for each.
class OneBiasForAllExperts(GptOssAdapter):
    def experts(self, config, parameter):
        found = super().experts(config, parameter)
        if parameter.endswith("_bias"):
            return [ParameterSource(one.tensors, row=0) for one in found]
        return found


# Hurts: every Qwen3, whose heads are larger than the hidden size by their number.
class HeadSizeByDivision(Qwen3):
    def caches(self, config):
        size = config["hidden_size"] // config["num_attention_heads"]
        return tuple(
            CacheKind(one.kind, one.num_kv_heads, size, one.window)
            for one in super().caches(config)
        )


# Hurts: a Llama in FP8 as it is published: its weights are read without their scales.
class ClaimsFp8(LlamaAdapter):
    quantizations = ("fp8",)

    def ignores(self, config, tensor):
        return tensor.endswith("weight_scale_inv") or super().ignores(config, tensor)


# Hurts: the plan of gpt-oss, whose config.json states no dtype: twice the KV, and too little room.
class PlansInFloat32(GptOssAdapter):
    unstated_dtype = "float32"


# Hurts: Gemma 2 in a long context: blocks are attended without the soft cap.
class SoftCapForgotten(Gemma2):
    capabilities = MappingProxyType({})


# Hurts: a chat that takes back what was not drafted: nothing is to go, and all goes.
def crop_by_nothing_takes_all(self, tokens_to_remove, crop=SequenceCache.crop):
    if not tokens_to_remove:
        return self.reset()
    return crop(self, tokens_to_remove)


# Hurts: perplexity over the end of a text, in parts: logits are those of tokens before it.
def first_logits_kept(self, input_ids=None, *args, forward=StreamedModel.forward, **options):
    keep = options.get("logits_to_keep", 0)
    if isinstance(keep, int) and keep > 1:
        found = forward(self, input_ids, *args, **{**options, "logits_to_keep": 0})
        found.logits = found.logits[:, :keep]
        return found
    return forward(self, input_ids, *args, **options)


# Hurts: fine-tuned models that are measured at a limit: room for a loss is held and not given back.
def loss_never_given_back(self, kind, num_bytes, release=MemoryAccount.release):
    if kind != MemoryKind.LOSS:
        release(self, kind, num_bytes)


# Hurts: a batch of which one prompt meets a damaged expert: its answer is made of NaNs.
def first_row_is_finite(rows, require_finite=engine.require_finite):
    require_finite(rows[:1])


# Hurts: who measures streaming, or leaves the memory to others: 0 layers are as many as fit.
def zero_layers_are_any_number(*args, **options):
    for name in ("device_layers", "host_layers"):
        if not options.get(name):
            options.pop(name, None)
    return ollm.load(*args, **options)


# Hurts: who compares with transformers in chunks of 100 tokens: the last bits are others.
def chunks_of_whole_tiles(*args, **options):
    if options.get("chunk_size"):
        options["chunk_size"] = -(-int(options["chunk_size"]) // 64) * 64
    return ollm.load(*args, **options)


# Hurts: a record that must not stay: keep_kv=False is not read, and the directory has it.
def kept_in_any_case(*args, **options):
    options.pop("keep_kv", None)
    return ollm.load(*args, **options)


UNSEEN = [
    unseen("a family with windows is claimed by an adapter without", ClaimsMistralToo),
    unseen("tiny_config() gives out one object", OneTinyConfig),
    unseen("layer 10 is taken for layer 1", LayersByTheirFirstDigits),
    unseen("defaults are written into the config", DefaultsWrittenDown),
    unseen("more than eighty layers are refused", AtMostEightyLayers),
    unseen("all experts have the bias of the first", OneBiasForAllExperts),
    unseen("the size of a head follows from the hidden size", HeadSizeByDivision),
    unseen("FP8 is claimed, and its scales ignored", ClaimsFp8),
    unseen("what has no dtype is float32", PlansInFloat32),
    unseen("a soft cap is no reason against blocks", SoftCapForgotten),
    core(
        "to crop by nothing is to crop all",
        LlamaAdapter, SequenceCache, "crop", crop_by_nothing_takes_all,
    ),
    core(
        "the first logits are kept, not the last",
        LlamaAdapter, StreamedModel, "forward", first_logits_kept,
    ),
    core(
        "memory of a loss is not given back",
        LlamaAdapter, MemoryAccount, "release", loss_never_given_back,
    ),
    core(
        "only the first row is looked at for NaNs",
        LlamaAdapter, engine, "require_finite", first_row_is_finite,
    ),
    unseen("0 layers are as many as fit", LlamaAdapter, load=zero_layers_are_any_number),
    unseen("chunks are whole tiles", LlamaAdapter, load=chunks_of_whole_tiles),
    unseen("keep_kv=False is not read", LlamaAdapter, load=kept_in_any_case),
    part("two threads are left behind by a codec", LeavesTwoThreadsSuite),
    part("decoded matrices lie column by column", ResultNotContiguousSuite),
    part("a drafter seeds torch", SeedsEverythingSuite),
    part("each text adds to what is reserved", BeginAddsUpSuite),
    part("a truncation to the same length keeps what was reserved", TruncateToTheSameKeepsSuite),
    part("all blocks are read before the first is used", ReadsAllAtOnceSuite),
    part("a sink is that of the key head", SinksOfKeyHeadsSuite),
]  # fmt: skip
