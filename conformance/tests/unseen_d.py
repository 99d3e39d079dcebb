"""Faults found by going through the contracts of adapters, core and parts, without knowing any
check. For tests only.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import MappingProxyType

import torch
from broken import Unseen, unseen, while_it_runs
from families import Granite, Qwen3, Qwen3Moe
from unseen_d_parts import (
    DirectoryLeftOpenSuite,
    HandlesOfAFailedOpeningSuite,
    HottestExpertsFirstSuite,
    OneBounceBufferSuite,
    PlanesIntoBuffersSuite,
    SpecialTokensHiddenSuite,
    SumsOfPowersSuite,
    UndoNotPinnedSuite,
)

from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter, Qwen35Adapter
from ollm_core import DecoderAdapter, InputError, loader
from ollm_core.attention import exact
from ollm_core.checkpoint.safetensors import FileState
from ollm_core.generate import limits
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.kv.recurrent.states import StateStore
from ollm_core.weights.embedding import EmbeddingRows


# Hurts: every published Qwen2: its projections have biases, its config.json does not say so, and
# the good checkpoint is refused for tensors that no such model has.
class BiasesThatConfigsSay(DecoderAdapter):
    name = "qwen2"
    model_types = ("qwen2",)
    defaults = MappingProxyType(
        {
            "max_window_layers": 28,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "use_sliding_window": False,
        }
    )

    def layer_parameters(self, config, layer_idx):
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{leaf}.weight"
            if leaf != "o_proj" and config.get("attention_bias"):
                yield f"self_attn.{leaf}.bias"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            yield f"mlp.{leaf}.weight"

    def tiny_config(self):
        dropped = ("mlp_bias", "head_dim", "rope_scaling")
        config = LlamaAdapter().tiny_config()
        return {
            **{key: value for key, value in config.items() if key not in dropped},
            "architectures": ["Qwen2ForCausalLM"],
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "model_type": "qwen2",
            "sliding_window": 100,
            "use_sliding_window": True,
        }


# Hurts: a mixture larger than memory: what was fused once stays, with the buffers that it was read
# into, outside every account, until the machine has no memory left.
class FusedOnce(Qwen3Moe):
    fused = staticmethod(functools.lru_cache(maxsize=256)(Qwen3Moe.fused))


# Hurts: a mixture in bfloat16 with large experts inside a tight budget: each fused parameter is
# made at twice its size, beside itself, and no scratch is told.
class FusedInFloat32(Qwen3Moe):
    @staticmethod
    def fused(gate, up):
        return Qwen3Moe.fused(gate.float(), up.float()).to(gate.dtype)


# Hurts: a config.json of a pruned model beside the whole one's weights: the layers that are left
# over pass for a layer that drafts, and every token is that of half a model.
class DeeperLayersIgnored(LlamaAdapter):
    def ignores(self, config, tensor):
        number, _, _ = tensor.removeprefix("model.layers.").partition(".")
        deeper = number.isdigit() and int(number) >= config["num_hidden_layers"]
        return deeper or super().ignores(config, tensor)


# Hurts: a Llama whose config.json has a stray sliding_window, as those that were converted from
# Mistral: its layers see all tokens, the store lets go of the early ones, and a long prompt fails.
class StrayWindowBelieved(LlamaAdapter):
    layer_types = DecoderAdapter.layer_types


# Hurts: a small Qwen3.5 that also sees: only the outer config says that its head is tied, and the
# good checkpoint is refused for the head that it lacks.
class TiedOutsideTheText(Qwen35Adapter):
    def text_config(self, config):
        return config.get("text_config") or config


# Hurts: two models of one depth in one process, as when one drafts for the other: the second gets
# the windows of the first.
class WindowsRememberedByDepth(Qwen3):
    _types = {}  # noqa: RUF012 - the fault

    def layer_types(self, config):
        key = config["num_hidden_layers"], config.get("sliding_window")
        if key not in self._types:
            self._types[key] = super().layer_types(config)
        return self._types[key]


# Hurts: every mixture of more than ten experts: expert 10 is taken for expert 2. The author's own
# tiny model has eight.
class ExpertsByTheirNames(Qwen3Moe):
    def experts(self, config, parameter):
        return sorted(super().experts(config, parameter), key=lambda source: source.tensors)

    def tiny_config(self):
        return {**super().tiny_config(), "num_experts": 8}


# Hurts: Granite or Gemma that says one token twice: rows that core multiplied in place are given
# out again for the same token, and are multiplied once more.
def rows_given_out_again(self, token_ids, dtype, *, lookup=EmbeddingRows.lookup):
    before = getattr(self, "_before", None)
    if before is None or not torch.equal(before[0], token_ids) or before[1].dtype != dtype:
        self._before = token_ids.clone(), lookup(self, token_ids, dtype)
    return self._before[1]


# Hurts: every Llama 3 chat: of the tokens that end a text the first is <|end_of_text|>, which no
# answer ends with, and the model talks on to the last new token.
def first_stop_token_alone(directory, config, *, read=loader.read_generation_config):
    found = read(directory, config)
    if found is not None and isinstance(found.eos_token_id, list):
        found.eos_token_id = found.eos_token_id[0]
    return found


# Hurts: a run of days while the weights are written over by `cp -p` or `rsync -t --inplace` from a
# fine-tuned copy: half of the layers are of another model, and nothing is said.
def modification_time_alone(cls, status, *, of=FileState.of.__func__):
    return replace(of(cls, status), ctime_ns=0, inode=0)


# Hurts: `kv_dir` after rope_theta or the scaling in config.json was changed: a prompt goes on from
# the keys of the old one, which were rotated otherwise.
def identity_of_weights_alone(checkpoint, config, *args, identity=loader.identity, **options):
    return identity(checkpoint, {}, *args, **options)


# Hurts: one prompt that is read once and gone on with in two ways, on Qwen3-Next: both write to the
# states that they share.
def states_shared_by_forks(self, sequence, forked, num_tokens, *, fork=StateStore.fork):
    fork(self, sequence, forked, num_tokens)
    for layer_idx, source in self._sequences[sequence].layers.items() if num_tokens else ():
        self._sequences[forked].layers[layer_idx].at[num_tokens] = source.at[num_tokens]


# Hurts: a chunk of a prompt that ends one token past the window, as 129 tokens of gpt-oss: its last
# token sees one that it must not.
def mask_from_two_past_the_window(query, start, num_keys, window, *, mask=exact._causal_mask):
    hides = window is not None and num_keys > window + 1
    return mask(query, start, num_keys, window if hides else None)


# Hurts: a prompt or a text that fills the positions of the model to the last one: it is refused,
# and transformers gives it.
def last_position_refused(length, config):
    limit = config.max_position_embeddings
    if length >= limit:
        raise InputError(
            f"{length} tokens are past the model's {limit} positions",
            hint="shorten the prompt or ask for fewer new tokens",
        )


# Hurts: a server that answers one prompt after the other: the KV of each stays until the model is
# closed, and at some prompt there is no memory.
def caches_held_by_the_model(self, *args, new_cache=StreamedModel.new_cache, **options):
    cache = new_cache(self, *args, **options)
    self.__dict__.setdefault("_made", []).append(cache)
    return cache


def core(sentence, adapter, owner, name, fault):
    """An `Unseen` in which `name` of `owner` is `fault` while its suite runs."""

    made = unseen(sentence, adapter, broken=while_it_runs(owner, name, fault))
    title = getattr(fault, "__func__", fault).__name__
    return replace(made, name=title)


def part(sentence, suite):
    return Unseen(suite.__name__.removesuffix("Suite"), sentence, suite)


UNSEEN = [
    unseen("biases are those that config.json tells of", BiasesThatConfigsSay),
    unseen("what was fused is remembered", FusedOnce),
    unseen("experts are fused in float32, and nothing says so", FusedInFloat32),
    unseen("layers past the last one are superfluous", DeeperLayersIgnored),
    unseen("a Llama has windows if its config.json has the key", StrayWindowBelieved),
    unseen("whether the head is tied is looked for in the text's config alone", TiedOutsideTheText),
    unseen("layer types are remembered by depth and window", WindowsRememberedByDepth),
    unseen("experts are in the order of their names", ExpertsByTheirNames),
    core(
        "rows of the same tokens are given out again",
        Granite, EmbeddingRows, "lookup", rows_given_out_again,
    ),
    core(
        "of several tokens that end a text the first does",
        LlamaAdapter, loader, "read_generation_config", first_stop_token_alone,
    ),
    core(
        "files are known by size and modification time",
        LlamaAdapter, FileState, "of", classmethod(modification_time_alone),
    ),
    core(
        "a model is known by its weights alone",
        LlamaAdapter, loader, "identity", identity_of_weights_alone,
    ),
    core(
        "forks share a recurrent state",
        Qwen3NextAdapter, StateStore, "fork", states_shared_by_forks,
    ),
    core(
        "nothing is hidden of keys that are one more than the window",
        Qwen3, exact, "_causal_mask", mask_from_two_past_the_window,
    ),
    core(
        "a text must not fill all positions",
        LlamaAdapter, limits, "check_length", last_position_refused,
    ),
    core(
        "a model holds its caches",
        LlamaAdapter, StreamedModel, "new_cache", caches_held_by_the_model,
    ),
    part("what a pass began with is not held", UndoNotPinnedSuite),
    part("the handle of a directory is not closed", DirectoryLeftOpenSuite),
    part("all threads read through one buffer", OneBounceBufferSuite),
    part("handles stay where opening fails", HandlesOfAFailedOpeningSuite),
    part("tensors of one shape are decoded into one buffer", PlanesIntoBuffersSuite),
    part("a drafter writes to the text", SpecialTokensHiddenSuite),
    part("the experts of most tokens come first", HottestExpertsFirstSuite),
    part("powers are summed up as they are", SumsOfPowersSuite),
]  # fmt: skip
