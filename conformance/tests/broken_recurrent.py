"""Recurrent layers that go wrong in one way each: adapters a few lines on the good Qwen3-Next one,
and stores of states.
"""

from __future__ import annotations

from dataclasses import replace

from broken import broken_adapter
from broken_caches import with_cache

from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_adapter_qwen3_next.hybrid import mixer
from ollm_core import CacheKind, ParameterSource


class StateTooNarrow(Qwen3NextAdapter):
    def recurrent_states(self, config):
        convolution, recurrent = super().recurrent_states(config)
        channels, width = convolution.shape
        return replace(convolution, shape=(channels, width - 1)), recurrent


class StateRounded(Qwen3NextAdapter):
    def recurrent_states(self, config):
        return [replace(state, float32=False) for state in super().recurrent_states(config)]


class StateWithKeys(Qwen3NextAdapter):
    """Layers of linear attention are said to have keys and values."""

    def caches(self, config):
        return [CacheKind("full", 2, 32)] * config["num_hidden_layers"]


class MixerForgets(Qwen3NextAdapter):
    """A layer of linear attention starts anew in every chunk."""

    def layout(self, config):
        return replace(super().layout(config), mixer=forgetting)


class ConvolutionReversed(Qwen3NextAdapter):
    def source(self, config, parameter):
        if parameter.endswith("conv1d.weight"):
            return ParameterSource((parameter,), lambda tensor: tensor.flip(-1))
        return super().source(config, parameter)


class SharedExpertIgnored(Qwen3NextAdapter):
    """Its gate is left out of what a layer holds."""

    def router_parameters(self):
        return [name for name in super().router_parameters() if "shared_expert_gate" not in name]

    def ignores(self, config, tensor):
        return "shared_expert_gate" in tensor


class EveryLayerLinear(Qwen3NextAdapter):
    """One layer of full attention is taken for one of linear attention."""

    def layer_types(self, config):
        return ["linear_attention", *super().layer_types(config)[1:-1], "linear_attention"]


def forgetting(layer, hidden, **options):
    cache = options["past_key_values"]
    if "linear_attn" in dict(layer.named_children()):
        cached = cache.layers[layer.linear_attn.layer_idx]
        cached.has_previous_state[0] = False
        cached.is_recurrent_states_initialized[0] = False
        cached.recurrent_states[0] = None
    return mixer(layer, hidden, **options)


@with_cache
def state_of_a_rejected_draft(cache):
    """Keys and values are cut, the state is not."""
    states = cache.store._states
    real = states.truncate

    def truncate(sequence, num_tokens):
        last = {i: states.state(i, sequence) for i in states.shapes}
        real(sequence, num_tokens)
        for layer_idx in states.shapes:
            for place, value in zip(
                states.state(layer_idx, sequence) or (), last[layer_idx] or (), strict=False
            ):
                place.copy_(value)

    states.truncate = truncate


@with_cache
def state_shared_by_forks(cache):
    """A fork has the tensors of its source, which are written again."""
    states = cache.store._states
    real = states.fork

    def fork(sequence, forked, num_tokens):
        real(sequence, forked, num_tokens)
        source, found = (states._sequences[one].layers for one in (sequence, forked))
        for layer_idx in states.shapes:
            found[layer_idx].at = source[layer_idx].at

    states.fork = fork


@with_cache
def state_of_the_first_row(cache):
    """Every row goes on from the state of the first one."""
    states = cache.store._states
    real = states.state
    states.state = lambda layer_idx, sequence: real(layer_idx, min(states._sequences))


@with_cache
def state_in_float16(cache):
    """States lose bits from one pass to the next."""
    states = cache.store._states
    real = states.put_state
    states.put_state = lambda layer_idx, sequence, num_new, state: real(
        layer_idx, sequence, num_new, [value.half().to(value.dtype) for value in state]
    )


def _store(check, sentence, load):
    return broken_adapter(check, sentence, Qwen3NextAdapter, load=load)


BROKEN_RECURRENT = [
    broken_adapter("caches.kinds", "A state is one token too narrow.", StateTooNarrow),
    broken_adapter("caches.kinds", "The state is rounded to the model's dtype.", StateRounded),
    broken_adapter("caches.kinds", "A layer with a state is said to have keys.", StateWithKeys),
    broken_adapter("exact.resident", "Chunks forget the state.", MixerForgets),
    broken_adapter("weights.values", "The convolution runs backwards.", ConvolutionReversed),
    broken_adapter(
        "weights.every-tensor-once", "The shared expert has no gate.", SharedExpertIgnored
    ),
    broken_adapter("exact.resident", "A layer is of the wrong kind.", EveryLayerLinear),
    _store("drafts.verify", "The state of a rejected draft stays.", state_of_a_rejected_draft),
    _store("caches.fork", "Forks write into one state.", state_shared_by_forks),
    _store("batches.ragged", "All rows have the state of the first.", state_of_the_first_row),
    _store("exact.decode", "States are rounded between passes.", state_in_float16),
]
