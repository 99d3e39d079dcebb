"""Faults that were written without knowing any check. For tests only."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from broken import Unseen, unseen
from families import GptOss, Qwen3
from unseen_c_parts import (
    ChecksumsOfWhatWasCut,
    EndOfFileIsEndOfRead,
    NothingToCutNothingDone,
    OnePlaceForAllThreads,
    TestAttentionOfEqualRows,
    TestClampsTheTextItself,
    TestIntegersBesideNotTold,
    kv_store,
    source,
)

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3MoeAdapter, Qwen3NextAdapter, Qwen35Adapter
from ollm_conformance import AdapterConformance
from ollm_core import read_size
from ollm_core.drafting import candidates
from ollm_core.generate import causal_lm, hooks, padding
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.planning.cost_model import Estimate
from ollm_core.weights.streamer import TieredStreamer


def in_core(sentence, adapter, replaced):
    """A core in which `replaced(monkeypatch)` has put something else, with a good adapter."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def broken_core(cls):
        with pytest.MonkeyPatch.context() as patch:
            replaced(patch)
            yield

    name = "".join(word.capitalize() for word in replaced.__name__.split("_"))
    suite = type(
        f"Test{name}",
        (AdapterConformance,),
        {"adapter": adapter, "broken_core": broken_core},
    )
    return Unseen(name, sentence, suite)


# Hurts: a Llama 2 stretched to 16k tokens, whose config.json has {"type": "linear", "factor": 4.0}
# as they were written before 2024: its positions are not scaled, and every token is wrong.
class RopeByItsNewNameAlone(LlamaAdapter):
    def text_config(self, config):
        rope = config.get("rope_scaling")
        if isinstance(rope, dict) and "rope_type" not in rope:
            return {**config, "rope_scaling": None}
        return config


# Hurts: Qwen3-Next 80B as published, whose config.json lists no layer_types: the layer of full
# attention is looked for at the start of each four, and the good checkpoint is refused.
class IntervalCountedFromItsStart(Qwen3NextAdapter):
    def layer_types(self, config):
        if config.get("layer_types") is not None:
            return super().layer_types(config)
        interval = read_size({"full_attention_interval": 4, **config}, "full_attention_interval")
        return tuple(
            "linear_attention" if i % interval else "full_attention"
            for i in range(read_size(config, "num_hidden_layers", 10_000))
        )


# Hurts: the small Qwen3.5, whose config.json says beside text_config that the head is tied: the
# good checkpoint is refused for a head that it lacks.
class TextConfigWithoutTheWhole(Qwen35Adapter):
    def text_config(self, config):
        return config.get("text_config", config)


# Hurts: every published Qwen3-Next: its file has the layer that predicts a further token, and is
# refused as one of another model.
class FurtherTokenIsForeign(Qwen3NextAdapter):
    def ignores(self, config, tensor):
        return False


# Hurts: every Qwen3-MoE with more than ten experts: the router's expert 2 is computed with the
# weights of expert 10, and all text is wrong.
class ExpertsInTheOrderOfTheirNames(Qwen3MoeAdapter):
    def experts(self, config, parameter):
        return sorted(super().experts(config, parameter), key=lambda one: one.tensors[0])


# Hurts: a Llama 8B downloaded without its last shard's head: it opens, and speaks with the
# embedding for a head in place of being refused.
class HeadIsTheEmbeddingWhereMissing(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = frozenset(tensor_names)
        if "lm_head.weight" not in names:
            config = {**config, "tie_word_embeddings": True}
        return super().weights(config, names)


# Hurts: `ollm plan` of gpt-oss 120B, whose config.json states no dtype: attention, embedding and
# head are taken to be twice as large as they are, and a run that fits is said not to.
class UnstatedIsFloat32(GptOssAdapter):
    unstated_dtype = "float32"


# Hurts: a Qwen3 with sliding_window 4096 and use_sliding_window false, as many are published: its
# upper layers forget, and a prompt of more than 4,096 tokens gets other text or an error.
class FlagOfWindowsNotRead(Qwen3):
    def layer_types(self, config):
        if config.get("layer_types") is not None:
            return super().layer_types(config)
        return super().layer_types({**config, "use_sliding_window": True})


# Hurts: the same question asked twice with kv_dir: all of it is found, no token is left to compute
# the next one from, and the second run ends in an error.
def whole_prompts_are_restored(patch):
    start = StreamedModel._start

    def start_from_all(self, cache, tokens, num_logits):
        restore = cache.restore
        cache.restore = lambda _: restore(tokens)
        try:
            return start(self, cache, tokens, num_logits)
        finally:
            del cache.restore

    patch.setattr(StreamedModel, "_start", start_from_all)


# Hurts: two prompts read once and then continued three ways each: rows 2 to 5 go on from the other
# prompt's keys.
def rows_repeated_as_a_whole(patch):
    def batch_repeat_interleave(self, repeats):
        self._pick(list(range(len(self.rows))) * repeats)

    patch.setattr(SequenceCache, "batch_repeat_interleave", batch_repeat_interleave)


# Hurts: a batch from a tokenizer that pads on the right, as Llama's does by default: the shorter
# rows go on from padding, whose logits are zero: token 0, and then other text.
def padded_ends_not_refused(patch):
    for module in (padding, hooks):
        patch.setattr(module, "refuse_padded_end", lambda kept: None)


# Hurts: a text with drafts that a stop string or a criterion of the caller's should end: where its
# end was guessed in the middle of a draft, it goes on beyond. (transformers cuts at end tokens.)
def only_a_whole_draft_is_looked_at_for_the_end(patch):
    def whole(self, input_ids, draft):
        drafted = torch.cat([input_ids, draft.to(input_ids.device)[None]], dim=1)
        return drafted[:, :-1] if bool(self._stopping_criteria(drafted, None).any()) else drafted

    patch.setattr(candidates.DraftCandidates, "_before_end", whole)


# Hurts: a server that resets one cache for each conversation: the keys of all earlier ones stay in
# memory, until nothing fits.
def reset_cache_keeps_its_sequences(patch):
    def reset(self):
        self.rows.clear()
        self.kept = []

    patch.setattr(SequenceCache, "reset", reset)


# Hurts: a model directory that is written to by another download while it is used: text is made of
# both models' weights, without an error.
def files_looked_at_once(*args, **options):
    model = ollm.load(*args, **options)
    model.engine._check_files = functools.cache(model.engine._check_files)
    return model


# Hurts: `ollm plan` of gpt-oss at 128k tokens: layers with a window count as if they kept all, and
# the plan tells nearly twice the KV and the time for it.
def windows_left_out_of_the_plan(patch):
    patch.setattr(Estimate, "_span", staticmethod(lambda kind, num_tokens: num_tokens))


# Hurts: a chat that grows turn by turn past the model's positions: it is not refused, and its text
# is garbage from there on.
def only_new_tokens_are_counted(patch):
    check = causal_lm.check_tokens

    def without_past(batch, config):
        check(replace(batch, starts=(0,) * len(batch.starts)), config)

    patch.setattr(causal_lm, "check_tokens", without_past)


# Hurts: a long prompt after short ones, in a budget: layers that were kept should have made room
# for it and stay, and the process takes more than it may.
def kept_layers_never_go(patch):
    fit = TieredStreamer.fit

    def fit_more(self, device_bytes, host_bytes):
        had = dict(self._device_units)
        fit(self, device_bytes, host_bytes)
        self._device_units |= had

    patch.setattr(TieredStreamer, "fit", fit_more)


UNSEEN = [
    unseen("a rope that is named by the older key is dropped", RopeByItsNewNameAlone),
    unseen("full attention comes first in each interval", IntervalCountedFromItsStart),
    unseen("what config.json says of a tied head is lost", TextConfigWithoutTheWhole),
    unseen("the tensors of mtp are foreign", FurtherTokenIsForeign),
    unseen("experts are sorted by name, 10 before 2", ExpertsInTheOrderOfTheirNames),
    unseen("a head that is missing is tied", HeadIsTheEmbeddingWhereMissing),
    unseen("what states no dtype is planned as float32", UnstatedIsFloat32),
    unseen("use_sliding_window is not read", FlagOfWindowsNotRead),
    in_core(
        "all of a prompt is taken from what is kept",
        LlamaAdapter,
        whole_prompts_are_restored,
    ),
    in_core("rows are tiled, not each repeated", LlamaAdapter, rows_repeated_as_a_whole),
    in_core("rows that end in padding are taken", LlamaAdapter, padded_ends_not_refused),
    in_core(
        "a draft is not cut at an end in its middle",
        LlamaAdapter,
        only_a_whole_draft_is_looked_at_for_the_end,
    ),
    in_core("reset() frees nothing", LlamaAdapter, reset_cache_keeps_its_sequences),
    unseen(
        "files that change are noticed after the first pass only",
        LlamaAdapter,
        load=files_looked_at_once,
    ),
    in_core("the plan knows no windows", GptOss, windows_left_out_of_the_plan),
    in_core("past tokens do not count for positions", LlamaAdapter, only_new_tokens_are_counted),
    kv_store("a cut to the present length does nothing", NothingToCutNothingDone),
    kv_store("checksums stay when a sequence is cut", ChecksumsOfWhatWasCut),
    source("a file that ends early is read without an error", EndOfFileIsEndOfRead),
    source("threads share a file's position", OnePlaceForAllThreads),
    Unseen(
        "IntegersBesideNotTold",
        "decode holds six times what it gives, and says nothing",
        TestIntegersBesideNotTold,
    ),
    Unseen("ClampsTheTextItself", "the drafter changes the text in place", TestClampsTheTextItself),
    in_core("resident layers stay when the budget shrinks", LlamaAdapter, kept_layers_never_go),
    Unseen(
        "attention_of_equal_rows", "all rows begin where the first does", TestAttentionOfEqualRows
    ),
]
