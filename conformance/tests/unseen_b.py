"""Faults that were written without knowing any check. For tests only."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from types import MappingProxyType

import torch
from broken import unseen
from families import Gemma2, GptOss, Granite, Qwen3
from transformers import GenerationConfig

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import StateShape
from ollm_core.engine import layer_call


# Hurts: a Qwen3 of 36 layers with windows whose config.json leaves max_window_layers out: layers 24
# to 27, which see all tokens, have lost the early ones of a long prompt, and the run ends in an
# error.
class WindowsBeginEarlier(Qwen3):
    defaults = MappingProxyType({**Qwen3.defaults, "max_window_layers": 24})


# Hurts: a Gemma 2 saved by transformers 5 with layer_types of its own, for instance all full: the
# layers that are taken to have windows drop keys that are still wanted.
class ListedTypesNotRead(Gemma2):
    def layer_types(self, config):
        return super().layer_types({**config, "layer_types": None})


# Hurts: a Qwen3-Next with decoder_sparse_step 2, in which every second layer is dense: its good
# checkpoint is refused for experts that it lacks.
class SparseStepNotRead(Qwen3NextAdapter):
    def is_dense(self, config, layer_idx):
        return super().is_dense({**config, "decoder_sparse_step": 1}, layer_idx)


# Hurts: a checkpoint whose projections have biases, with a config.json that does not say so: it
# opens and answers without them in place of being refused.
class StrayBiasesIgnored(LlamaAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith(".bias") or super().ignores(config, tensor)


# Hurts: a Llama with biases in attention and none in the MLP: its checkpoint is refused.
class OneFlagForAllBiases(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        return super().layer_parameters(
            {**config, "mlp_bias": config.get("attention_bias")}, layer_idx
        )


# Hurts: every published Qwen3-Next, which is in bfloat16: its state of the recurrence is float32,
# and the first prompt ends in an error of the store.
class StateInTheModelsDtype(Qwen3NextAdapter):
    def recurrent_states(self, config):
        return [StateShape(state.shape) for state in super().recurrent_states(config)]


_READ = """architectures attention_bias bos_token_id dtype eos_token_id head_dim hidden_act
hidden_size initializer_range intermediate_size mlp_bias model_type num_attention_heads
num_hidden_layers num_key_value_heads pad_token_id pretraining_tp quantization_config rms_norm_eps
rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype use_cache vocab_size"""


# Hurts: Llama 3.1 with its 131,072 positions: a prompt of 3,000 tokens is refused, for the key is
# dropped and transformers then assumes 2,048.
class PositionsLeftOut(LlamaAdapter):
    def text_config(self, config):
        return {key: value for key, value in config.items() if key in _READ.split()}


# Hurts: a gpt-oss trained with windows of 1,024 tokens: what is let go of is still to be read, and
# going on after a longer prompt ends in an error.
class WindowAsPublished(GptOss):
    def caches(self, config):
        return [
            replace(kind, window=128) if kind.kind == "sliding" else kind
            for kind in super().caches(config)
        ]


# Hurts: `ollm models` and the plan of Llama 3.2 1B by id: a head that is the embedding is counted
# once more, and the number of parameters told is a fifth too high.
class TiedHeadCountedTwice(LlamaAdapter):
    def catalog(self):
        return tuple(
            replace(one, num_parameters=one.num_parameters + self._head(one.config))
            for one in super().catalog()
        )

    @staticmethod
    def _head(config):
        tied = config.get("tie_word_embeddings")
        return config["vocab_size"] * config["hidden_size"] if tied else 0


# Hurts: beam search with 3 beams that change places: the second row is a fork of what the first one
# has just become, and its text goes on from another beam's keys.
def beams_change_places_one_by_one(*args, **options):
    model = ollm.load(*args, **options)
    new_cache = model.new_cache

    def made(*args, **options):
        cache = new_cache(*args, **options)

        def reorder_cache(beam_idx):
            for row, source in enumerate(beam_idx.tolist()):
                if row != source:
                    forked = cache.store.fork(cache.rows[source])
                    cache.store.release(cache.rows[row])
                    cache.rows[row], cache.kept[row] = forked, cache.kept[source]

        cache.reorder_cache = reorder_cache
        return cache

    model.new_cache = made
    return model


# Hurts: texts padded on the right, scored and then gone on with from the cache, and masks with
# holes: padding is taken for tokens wherever no row begins with it.
def mask_read_where_rows_begin(*args, **options):
    model = ollm.load(*args, **options)
    forward = model.forward

    @functools.wraps(forward)
    def called(input_ids=None, attention_mask=None, **others):
        if isinstance(attention_mask, torch.Tensor) and bool(attention_mask[:, 0].all()):
            attention_mask = None
        return forward(input_ids, attention_mask, **others)

    model.forward = called
    return model


# Hurts: a loss summed over several batches with num_items_in_batch, as transformers' Trainer does:
# each batch gives its own mean, and the sum is too large.
def items_of_all_batches_not_counted(*args, **options):
    model = ollm.load(*args, **options)
    forward = model.forward

    @functools.wraps(forward)
    def called(*args, num_items_in_batch=None, **others):
        return forward(*args, **others)

    model.forward = called
    return model


# Hurts: sampling with a seed: each step draws one number more, so that the text is another one than
# that of transformers with the same seed.
def passes_draw_a_number(*args, **options):
    model = ollm.load(*args, **options)
    run = model.engine.run

    def drawing(store, work):
        torch.rand(1)
        return run(store, work)

    model.engine.run = drawing
    return model


# Hurts: drafts with Qwen3-Next: after one that is rejected the convolution still has its last
# inputs from the rejected tokens, and the text is another one.
def convolution_stays_ahead(*args, **options):
    model = ollm.load(*args, **options)
    new_cache = model.new_cache

    def made(*args, **options):
        cache = new_cache(*args, **options)
        states = cache.store._states
        truncate = states.truncate

        def forgetting(sequence, num_tokens):
            layers = states._sequences[sequence].layers.values()
            latest = [
                layer.at[layer.num_tokens][0] if layer.num_tokens in layer.at else None
                for layer in layers
            ]
            truncate(sequence, num_tokens)
            for layer, convolution in zip(layers, latest, strict=True):
                if convolution is not None and num_tokens in layer.at:
                    layer.at[num_tokens][0].copy_(convolution)

        states.truncate = forgetting
        return cache

    model.new_cache = made
    return model


# Hurts: a server that closes its model and still refers to a cache: the text of its user stays on
# the disk, and the memory of the KV is not given back, until the cache is gone too.
def caches_left_open(*args, **options):
    model = ollm.load(*args, **options)
    new_cache = model.new_cache

    def made(*args, **options):
        cache = new_cache(*args, **options)
        model._belongings.caches.clear()
        return cache

    model.new_cache = made
    return model


# Hurts: a batch of 64 texts with KV on disk in little host memory: the unfinished block of each
# layer and row is allocated and not accounted, and the process holds more than it may.
def tails_not_accounted(*args, **options):
    model = ollm.load(*args, **options)
    account = model.accounts.host
    reserve, release = account.reserve, account.release

    def reserving(kind, num_bytes):
        reserve(kind, 0 if kind == "kv tails" else num_bytes)

    def releasing(kind, num_bytes):
        release(kind, 0 if kind == "kv tails" else num_bytes)

    account.reserve, account.release = reserving, releasing
    return model


# Hurts: a long prompt in chunks through a mixture of experts: outputs are added in another order
# than that of transformers, and the last bits of its logits differ.
def busiest_expert_first(*args, **options):
    model = ollm.load(*args, **options)

    def sort_of(mixture):
        serve = mixture._serve

        def serving(chunks, offload, fetch):
            if len(chunks) == 1:
                serve(chunks, offload, fetch)
                return
            counts = torch.stack([chunk.starts.diff() for chunk in chunks]).sum(0)
            busiest = counts.argsort(descending=True, stable=True).tolist()
            for one in busiest[: int(counts.count_nonzero())]:
                with fetch({one: int(counts[one])}) as experts:
                    for number, parameters in experts:
                        with mixture.bound(parameters):
                            for chunk in chunks:
                                begin, end = chunk.starts[number : number + 2].tolist()
                                if begin < end:
                                    mixture.add(chunk, begin, end, offload)
                        del parameters

        mixture._serve = serving

    for mixture in model.engine._skeleton.mixtures.values():
        sort_of(mixture)
    return model


# Hurts: Llama 3 Instruct, whose generation_config.json ends texts at three tokens where an older
# config.json has one: an answer goes on past its end.
def ends_by_config_alone(*args, **options):
    model = ollm.load(*args, **options)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.use_cache = True
    return model


# Hurts: a model and a fine-tune of it that share a kv_dir: the one goes on from keys of the other,
# because their configs are equal.
def kept_by_config_alone(*args, **options):
    model = ollm.load(*args, **options)
    opener = model._open_store
    name = hashlib.sha256(model.config.to_json_string().encode()).hexdigest()
    opener._request = replace(opener._request, fingerprint=lambda: name)
    return model


# Hurts: decoding a long text with Granite, whose scores are multiplied by a number of its own:
# block-wise attention of one token takes one over the root of the head's size.
def usual_scale_of_one_token(*args, **options):
    model = ollm.load(*args, **options)
    run, find = model.engine.run, layer_call.find_attention

    def found(name, device):
        attend = find(name, device)

        def attention(module, query, view, *, scaling, **others):
            if query.shape[2] == 1:
                scaling = query.shape[3] ** -0.5
            return attend(module, query, view, scaling=scaling, **others)

        return attend if name == "exact" else attention

    def running(store, work):
        layer_call.find_attention = found
        try:
            return run(store, work)
        finally:
            layer_call.find_attention = find

    model.engine.run = running
    return model


UNSEEN = [
    unseen("The default of max_window_layers is 24 where it is 28.", WindowsBeginEarlier),
    unseen("Layer types that config.json lists are not read.", ListedTypesNotRead),
    unseen("decoder_sparse_step is not read.", SparseStepNotRead),
    unseen("Biases that no parameter uses are ignored.", StrayBiasesIgnored),
    unseen("The MLP has biases if attention has.", OneFlagForAllBiases),
    unseen("The recurrent state is declared in the model's dtype.", StateInTheModelsDtype),
    unseen("The number of positions is left out of the text config.", PositionsLeftOut),
    unseen("The window is that of the published models.", WindowAsPublished),
    unseen("The catalog counts a tied head once more.", TiedHeadCountedTwice),
    unseen(
        "Beams change places one after another, each seeing those before it moved.",
        LlamaAdapter,
        load=beams_change_places_one_by_one,
    ),
    unseen(
        "A mask is not read unless some row begins with padding.",
        LlamaAdapter,
        load=mask_read_where_rows_begin,
    ),
    unseen(
        "num_items_in_batch changes no loss.",
        LlamaAdapter,
        load=items_of_all_batches_not_counted,
    ),
    unseen("A pass draws from the global generator.", LlamaAdapter, load=passes_draw_a_number),
    unseen(
        "Going back does not restore the convolution's part of a state.",
        Qwen3NextAdapter,
        load=convolution_stays_ahead,
    ),
    unseen("Closing a model leaves its caches open.", LlamaAdapter, load=caches_left_open),
    unseen("Tails of KV on disk are not accounted.", LlamaAdapter, load=tails_not_accounted),
    unseen(
        "With several chunks, experts are added by how many tokens want them.",
        Qwen3NextAdapter,
        load=busiest_expert_first,
    ),
    unseen(
        "generation_config.json is not read when a text is to end.",
        LlamaAdapter,
        load=ends_by_config_alone,
    ),
    unseen(
        "Kept KV is found by the config and not by the weights.",
        LlamaAdapter,
        load=kept_by_config_alone,
    ),
    unseen(
        "Block-wise attention of one token has the usual scale.",
        Granite,
        load=usual_scale_of_one_token,
    ),
]
