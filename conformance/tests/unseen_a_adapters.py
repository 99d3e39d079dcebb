"""Adapters of the first round of unseen mutants (unseen_a.py), each with one fault."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from families import GptOss, Granite, Qwen3, Qwen3Moe

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import CheckpointError, DecoderAdapter, ParameterSource


# Hurts: a Llama config that was made from Mistral's and still says sliding_window: a prompt longer
# than that and a block ends in a KVStoreError.
class BelievesWindows(LlamaAdapter):
    def layer_types(self, config):
        return DecoderAdapter.layer_types(self, {**config, "layer_types": None})


# Hurts: a tied checkpoint that was saved with lm_head.weight alone does not open.
class WantsTheEmbeddingsName(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = frozenset(tensor_names)
        if "model.embed_tokens.weight" not in names:
            raise CheckpointError("the checkpoint lacks tensor model.embed_tokens.weight")
        return super().weights(config, names)


# Hurts: a model with biases whose config.json does not say attention_bias answers without them.
class DropsBiases(LlamaAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith(".bias")


# Hurts: a config.json that was cut to fewer layers than the checkpoint has, or is of the smaller
# model, is half used and answers nonsense.
class DropsFurtherLayers(Granite):
    def ignores(self, config, tensor):
        prefix, _, rest = tensor.partition("model.layers.")
        number = rest.partition(".")[0]
        return not prefix and number.isdigit() and int(number) >= config["num_hidden_layers"]


# Hurts: gpt-oss-20b and 120b, whose stacks are not square, are refused when they are opened from
# disk. The tiny one's are square.
class TakesPackedStacksForSquare(GptOssAdapter):
    def experts(self, config, parameter):
        found = super().experts(config, parameter)
        if not parameter.endswith(".gate_up_proj"):
            return found
        shape = 2 * config["intermediate_size"], config["hidden_size"]
        return [replace(source, transform=lambda one: one.reshape(shape)) for source in found]


# Hurts: a model with windows of 8,192 tokens, after 4,352: what its attention asks for is gone.
class ClampsWindows(GptOss):
    def caches(self, config):
        kinds = super().caches(config)
        return [replace(k, window=k.window and min(k.window, 4096)) for k in kinds]


# Hurts: longrope frequencies depend on the longest position: a prompt in chunks, and an answer that
# crosses the original length, are not what one forward gives.
class LetsLongropeIn(LlamaAdapter):
    def layout(self, config):
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            config = {**config, "rope_scaling": None, "rope_parameters": None}
        return super().layout(config)


# Hurts: `ollm list-models` and whoever makes room for a download: 42 GB for a model of 13.8 GB.
class ListsPackedAsHalves(GptOssAdapter):
    def catalog(self):
        return [replace(e, weight_bytes=2 * e.num_parameters) for e in super().catalog()]


# Hurts: a base model whose config.json says "eos_token_id": null stops at token 2, which is
# transformers' default for a Llama that says nothing.
class LeavesNullsOut(LlamaAdapter):
    def text_config(self, config):
        return {key: value for key, value in config.items() if value is not None}


# Hurts: checkpoints from before transformers 4.43, {"type": "linear", "factor": 4.0}: every token
# after the first is turned by wrong angles.
class KnowsNoOldRope(LlamaAdapter):
    def text_config(self, config):
        rope = config.get("rope_scaling")
        if isinstance(rope, dict) and "rope_type" not in rope:
            return {**config, "rope_scaling": None}
        return config


# Hurts: any run in bfloat16 or float16, as Qwen3-Next is published: the state does not fit its
# declaration, or the plan is too low.
class StatesInHalf(Qwen3NextAdapter):
    def recurrent_states(self, config):
        return [replace(state, float32=False) for state in super().recurrent_states(config)]


# Hurts: a model with attention_bias and without mlp_bias does not open.
class OneFlagForBiases(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        flags = {"mlp_bias": config.get("attention_bias")}
        return super().layer_parameters({**config, **flags}, layer_idx)


# Hurts: Llama 1 and 2 7B, whose first config.json has no num_key_value_heads: 32 heads, not 8.
class EightHeadsUnlessSaid(LlamaAdapter):
    defaults = MappingProxyType({"num_key_value_heads": 8})


def _by_float(weight):
    return weight.float().to(weight.dtype)


# Hurts: in bfloat16 each down_proj is there twice more, in float32, which no account and no plan
# has: the device runs out of memory inside the stated budget.
class CopiesInFloat(Granite):
    def source(self, config, parameter):
        transform = _by_float if parameter.endswith("down_proj.weight") else None
        return ParameterSource((parameter,), transform)


# Hurts: Qwen3 models that list windows for their last layers only.
class LetsWindowsAlternate(Qwen3):
    def layer_types(self, config):
        found = super().layer_types(config)
        if "sliding_attention" not in found:
            return found
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(len(found))]


# Hurts: a published config with a sliding_window that use_sliding_window turns off, fewer
# max_window_layers than layers and no layer_types: a prompt longer than that fails.
class TurnsWindowsOn(Qwen3):
    def layer_types(self, config):
        return super().layer_types({**config, "use_sliding_window": True})


# Hurts: `ollm plan config.json` of Llama 3.2 1B says 3.0 GB of weights, there are 2.5.
class PlansTheTiedHead(LlamaAdapter):
    def tensors(self, config, shapes, dtype):
        found = dict(super().tensors(config, shapes, dtype))
        if config.get("tie_word_embeddings"):
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        return found


# Hurts: an untied checkpoint whose last file was not fetched answers nonsense, and should be
# refused.
class TiesWhatIsLost(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = frozenset(tensor_names)
        tied = config.get("tie_word_embeddings") or "lm_head.weight" not in names
        return super().weights({**config, "tie_word_embeddings": tied}, names)


# Hurts: whoever opens a second model in the same process, with as many layers and other windows or
# heads: an error, or a plan that is not its own.
class RemembersKinds(GptOss):
    seen: dict = {}  # noqa: RUF012 - that is what is wrong

    def caches(self, config):
        kinds = super().caches(config)
        return self.seen.setdefault(len(kinds), kinds)


# Hurts: Qwen3-MoE in its published form, which says num_experts, where those are not 128.
class KnowsOneKeyOfExperts(Qwen3Moe):
    def experts(self, config, parameter):
        return super().experts({"num_local_experts": 128, **config}, parameter)
