"""Faults in what requests and callers may ask for, and in families that a stranger might bring.
For tests only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from broken import unseen, while_it_runs
from families import Qwen3Moe
from unseen_d import core, part
from unseen_h_parts import (
    ExpertsAsOftenAsAskedSuite,
    KnownByFileNameSuite,
    TurnsInPlaceSuite,
    ZeroFreesNothingSuite,
)

from ollm_adapter_llama import LlamaAdapter
from ollm_core import DecoderAdapter
from ollm_core.generate import arguments
from ollm_core.generate.hooks import GenerationHooks
from ollm_core.kv.disk.borrowed import common
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.serving import admission, sampler
from ollm_core.serving.answer import Answer
from ollm_core.serving.live import RequestedText
from ollm_core.serving.prefixes import Prefixes
from ollm_core.serving.sampler import Sampler
from ollm_core.serving.scheduler import Scheduler
from ollm_core.serving.texts import GeneratedText, ScoredText


# Hurts: a request for the most likely token by top_k=1: chance chooses among all.
def top_k_of_one_is_none(sampling, *args, make=sampler._processors):
    return make(replace(sampling, top_k=0) if sampling.top_k == 1 else sampling, *args)


# Hurts: a sampling function of the user's in a request that says temperature 0.
def greedy_comes_before_choose(self, token_ids, scores, choose=Sampler._choose):
    if self._sampling.temperature == 0:
        return int(scores.argmax())
    return choose(self, token_ids, scores)


# Hurts: a request with two stop texts that come in one piece: text between them is told.
def first_listed_stop_ends(self, new):
    if not new or not self._stops:
        return new
    text = self._held + new
    for stop, is_part in self._stops.items():
        at = text.find(stop)
        if at >= 0:
            self._held, self.stopped_by = "", stop
            return text[: at + len(stop) * is_part]
    most = max(map(len, self._stops)) - 1
    for length in range(min(most, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in self._stops):
            self._held = text[-length:]
            return text[:-length]
    self._held = ""
    return text


# Hurts: a request that goes on after the model's own end, but not after a token of its own.
def no_end_at_all(self, *args, init=GeneratedText.__init__):
    init(self, *args)
    if self._sampling.ignore_eos:
        self._ends = set()


# Hurts: a text that is to be the same each time, by seed 0.
def seed_zero_is_none(self, sampling, *args, init=Sampler.__init__):
    init(self, sampling if sampling.seed else replace(sampling, seed=None), *args)


# Hurts: a request that wants to know how likely its prompt is, and no other tokens.
def zero_of_the_prompt_is_none(
    self, request, index, order, sampling, *args, init=GeneratedText.__init__
):
    if not sampling.prompt_logprobs:
        sampling = replace(sampling, prompt_logprobs=None)
    init(self, request, index, order, sampling, *args)


# Hurts: a client that hangs up on a request for three answers: two are made to their end.
def first_answer_is_cancelled(self, request_id):
    for text in [*self._texts.get(request_id, ())][:1]:
        text.dropped = True


# Hurts: a draft that says more than the answer: what comes after a stop text is told.
def drafts_go_on_after_the_end(self, logits):
    events = []
    if self._told is not None:
        events.append(self._told.event(self.request.request_id))
        self._told, logits = None, logits[-1:]
    for row, guess in zip(logits, [*self.draft, None], strict=True):
        events.append(self._next(row))
        if self.token_ids[-1] != guess:
            break
        self.num_stored += 1
    self.draft = []
    return events


# Hurts: a score of a text whose prompt was read before: the first token has none.
def scores_find_one_more(self):
    return self._told.first + 1


# Hurts: whoever asks that nothing of a text is kept.
def all_is_kept(self):
    return True


# Hurts: a server in days: beginnings that gave way stay in the store.
def what_gave_way_stays(self, one):
    self._kept.remove(one)


# Hurts: a caller with positions of his own: they are not looked at, and nothing is said.
POSITIONS_ARE_TAKEN = {**arguments.FINE, "position_ids": (lambda *_: True, "")}


# Hurts: a question that joins another one on the same document: where they part inside a block, it
# goes on from the other's words.
def beginnings_are_whole_parts(one, prompt):
    if one.sequence is None:
        return 0
    alike = common(one.prompt, prompt)
    if alike >= 64:
        alike = min(-(-alike // 64) * 64, len(prompt))
    return min(alike, one.num_stored)


_prepare = GenerationHooks.prepare_inputs_for_generation


# Hurts: the second turn of a chat with drafts: what its cache has is given once more.
@functools.wraps(_prepare, assigned=())
def turns_are_given_whole(
    self, input_ids, next_sequence_length=None, past_key_values=None, *args, **kwargs
):
    if next_sequence_length is None and past_key_values is not None:
        next_sequence_length = input_ids.shape[1]
    return _prepare(self, input_ids, next_sequence_length, past_key_values, *args, **kwargs)


_find, _keep = PrefixCachingStore.find, PrefixCachingStore.keep


# Hurts: Llama 3, whose vocabulary has 128,256 tokens: another prompt's keys are taken.
def found_by_16_bits(self, token_ids):
    return _find(self, token_ids % (1 << 16))


def kept_in_16_bits(self, sequence, start, token_ids):
    _keep(self, sequence, start, token_ids % (1 << 16))


# Hurts: a Llama with linear scaling, as those that were made for 32k positions from Llama 2.
class LinearIsUnknown(LlamaAdapter):
    rope_types = ("default", "llama3")


# Hurts: a mixture with experts in every second layer.
class StepsCountFromZero(Qwen3Moe):
    def layer_parameters(self, config, layer_idx):
        step = config.get("decoder_sparse_step") or 1
        moved = layer_idx + 1 if step > 1 else layer_idx
        return super().layer_parameters(config, moved % config["num_hidden_layers"])


# Hurts: a checkpoint with a scale beside each weight: it is opened, and each weight is another one.
class ScalesAreIgnored(LlamaAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith("_scale") or super().ignores(config, tensor)


# Hurts: two models at once, of which one drafts for the other.
class RemembersTheLastModel(LlamaAdapter):
    _seen: Mapping = MappingProxyType({})

    def for_model(self, config):
        self._seen = dict(config)
        return self

    def layer_parameters(self, config, layer_idx):
        return super().layer_parameters({**config, **self._flags}, layer_idx)

    @property
    def _flags(self):
        return {key: self._seen[key] for key in ("attention_bias", "mlp_bias") if key in self._seen}


class Glm4(DecoderAdapter):
    """Good: four norms, gate and up in one projection, a part of each head rotated."""

    name = "glm4"
    model_types = ("glm4",)
    defaults: Mapping = MappingProxyType(
        {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": False}
    )

    def layer_parameters(self, config, layer_idx):
        for norm in ("input", "post_attention"):
            yield f"{norm}_layernorm.weight"
        yield from ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{leaf}.weight"
            if config.get("attention_bias") and leaf != "o_proj":
                yield f"self_attn.{leaf}.bias"
        yield from ("mlp.gate_up_proj.weight", "mlp.down_proj.weight")

    def tiny_config(self):
        config = {**LlamaAdapter().tiny_config(), "model_type": "glm4"}
        dropped = ("mlp_bias", "rope_scaling", "pretraining_tp")
        return {
            **{key: value for key, value in config.items() if key not in dropped},
            "architectures": ["Glm4ForCausalLM"],
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "pad_token_id": 0,
        }


# Hurts: every GLM 4 with biases but the author's own kind: the output has none, and is asked for.
class ABiasOfTheOutput(Glm4):
    def layer_parameters(self, config, layer_idx):
        yield from super().layer_parameters(config, layer_idx)
        if config.get("attention_bias"):
            yield "self_attn.o_proj.bias"

    def tiny_config(self):
        return {**super().tiny_config(), "attention_bias": False}


def asked(sentence, owner, name, fault):
    """A fault of core that an adapter for Llama is run with."""
    return core(sentence, LlamaAdapter, owner, name, fault)


def a_property(sentence, owner, name, fault):
    """The same of a property."""
    made = unseen(sentence, LlamaAdapter, broken=while_it_runs(owner, name, property(fault)))
    return replace(made, name=fault.__name__)


_positions = unseen(
    "position_ids are not looked at",
    LlamaAdapter,
    broken=while_it_runs(arguments, "FINE", POSITIONS_ARE_TAKEN),
)
_bits = unseen(
    "kept tokens are known by 16 bits",
    LlamaAdapter,
    broken=while_it_runs(PrefixCachingStore, "find", found_by_16_bits),
    also_broken=while_it_runs(PrefixCachingStore, "keep", kept_in_16_bits),
)

UNSEEN = [
    asked("a top_k of 1 is none", sampler, "_processors", top_k_of_one_is_none),
    asked("temperature 0 comes before choose", Sampler, "_choose", greedy_comes_before_choose),
    asked("the first listed stop text ends", Answer, "_certain", first_listed_stop_ends),
    asked("ignore_eos ignores all ends", GeneratedText, "__init__", no_end_at_all),
    asked("seed 0 is no seed", Sampler, "__init__", seed_zero_is_none),
    asked("prompt_logprobs of 0 are none", GeneratedText, "__init__", zero_of_the_prompt_is_none),
    asked("one of n answers is cancelled", Scheduler, "cancel", first_answer_is_cancelled),
    asked("a draft goes on after the end", GeneratedText, "take", drafts_go_on_after_the_end),
    a_property("a score begins too late", ScoredText, "num_to_find", scores_find_one_more),
    a_property("keep is not looked at", RequestedText, "kept", all_is_kept),
    asked("beginnings that gave way stay", Prefixes, "_drop", what_gave_way_stays),
    replace(_positions, name="positions_are_taken"),
    asked("beginnings are whole parts", admission, "_held", beginnings_are_whole_parts),
    asked(
        "the second turn with drafts is given whole",
        GenerationHooks, "prepare_inputs_for_generation", turns_are_given_whole,
    ),
    replace(_bits, name="kept_in_16_bits"),
    unseen("linear scaling is refused", LinearIsUnknown),
    unseen("steps of sparse layers count from 0", StepsCountFromZero),
    unseen("scales are ignored", ScalesAreIgnored),
    unseen("the last model is remembered", RemembersTheLastModel),
    unseen("the output of a GLM has a bias", ABiasOfTheOutput),
    part("stored bytes are turned in place", TurnsInPlaceSuite),
    part("a text of no tokens frees nothing", ZeroFreesNothingSuite),
    part("files are known by their names", KnownByFileNameSuite),
    part("experts come as often as they are asked for", ExpertsAsOftenAsAskedSuite),
]  # fmt: skip
