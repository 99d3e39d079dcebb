"""Mixtures of experts that are wrong in one way: adapters, and opened models."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from broken import broken_adapter
from families import GptOss, Qwen3Moe

import ollm
from ollm_core import ParameterSource


class SinksDropped(GptOss):
    def source(self, config, parameter):
        if parameter.endswith("sinks"):
            return ParameterSource((parameter,), lambda tensor: tensor * 0 - 100)
        return super().source(config, parameter)


class ExpertsOutOfOrder(GptOss):
    def source(self, config, parameter):
        if parameter.endswith("experts.down_proj"):
            return ParameterSource((parameter,), lambda tensor: tensor.flip(0))
        return super().source(config, parameter)


class FewerExperts(GptOss):
    def text_config(self, config):
        return {**config, "num_experts_per_tok": 1, "experts_per_token": 1}


class GateAndUpNotInterleaved(GptOss):
    def source(self, config, parameter):
        if parameter.endswith("experts.gate_up_proj"):
            return ParameterSource((parameter,), _halves)
        return super().source(config, parameter)


class RouterBiasDropped(GptOss):
    def source(self, config, parameter):
        if parameter.endswith("router.bias"):
            return ParameterSource((parameter,), lambda tensor: tensor * 0)
        return super().source(config, parameter)


class RouterNotNormalised(Qwen3Moe):
    def text_config(self, config):
        return {**config, "norm_topk_prob": False}


class ExpertsShifted(Qwen3Moe):
    def experts(self, config, parameter):
        sources = super().experts(config, parameter)
        return [*sources[1:], *sources[:1]]


class ExpertHalvesSwapped(Qwen3Moe):
    @staticmethod
    def fused(gate, up):
        return Qwen3Moe.fused(up, gate)


class ExpertTransposed(Qwen3Moe):
    """The tiny experts are not square: what does not fit is refused when it is read."""

    def experts(self, config, parameter):
        sources = super().experts(config, parameter)
        if parameter.endswith("down_proj"):
            return [replace(source, transform=lambda t: t.t().contiguous()) for source in sources]
        return sources


class ExpertsWhole(Qwen3Moe):
    """All experts of a layer are declared as one parameter, with no slices."""

    def experts(self, config, parameter):
        return ()


def _halves(tensor):
    """Even columns first, then odd ones, as most other families have them."""
    return tensor.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).contiguous()


def experts_read_twice(*args, **options):
    model = ollm.load(*args, **options)
    real = model.weights.experts

    @contextlib.contextmanager
    def experts(layer_idx, expert_ids):
        wanted = sorted(expert_ids)
        with real(layer_idx, wanted) as found:
            for _ in found:
                pass
        with real(layer_idx, wanted) as found:
            yield found

    model.weights.experts = experts
    return model


def all_experts_read(*args, **options):
    model = ollm.load(*args, **options)
    real = model.weights.experts

    @contextlib.contextmanager
    def experts(layer_idx, expert_ids):
        wanted = set(expert_ids)
        with real(layer_idx, range(12)) as found:
            yield (one for one in found if one[0] in wanted)

    model.weights.experts = experts
    return model


def experts_never_kept(*args, **options):
    model = ollm.load(*args, **options)
    store = model.weights._experts
    real = store.place
    store.place = lambda device_bytes, host_bytes: real(store.least_bytes, store.least_bytes)
    return model


def _broken_experts(check, sentence, load):
    return broken_adapter(check, sentence, Qwen3Moe, load=load)


BROKEN_EXPERTS = [
    broken_adapter("weights.values", "Attention sinks are dropped.", SinksDropped),
    broken_adapter("weights.values", "Experts are out of order.", ExpertsOutOfOrder),
    broken_adapter("exact.resident", "Fewer experts are asked than there should be.", FewerExperts),
    broken_adapter(
        "weights.values", "Gate and up columns are not interleaved.", GateAndUpNotInterleaved
    ),
    broken_adapter("weights.values", "The router loses its bias.", RouterBiasDropped),
    broken_adapter("exact.resident", "The router is not normalised.", RouterNotNormalised),
    broken_adapter("weights.values", "Every expert is the next one.", ExpertsShifted),
    broken_adapter("weights.values", "An expert's two halves are swapped.", ExpertHalvesSwapped),
    broken_adapter("exact.resident", "Experts are transposed.", ExpertTransposed),
    broken_adapter("weights.every-tensor-once", "Experts' slices are not declared.", ExpertsWhole),
    _broken_experts("experts.routed-only", "Experts are read twice.", experts_read_twice),
    _broken_experts("experts.routed-only", "All experts are read.", all_experts_read),
    _broken_experts("experts.kept", "Experts are read again in each pass.", experts_never_kept),
]
