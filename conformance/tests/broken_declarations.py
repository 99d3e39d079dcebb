"""Adapters that drop tensors in silence, or say the wrong thing of a checkpoint that is not there:
each in one way, a few lines on a good one.
"""

from __future__ import annotations

import re
from dataclasses import replace

from broken import broken_adapter
from families import Qwen3Moe

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import StoredForm


class IgnoresScales(LlamaAdapter):
    def ignores(self, config, tensor):
        return "scale" in tensor


class IgnoresBiases(LlamaAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith(".bias")


class IgnoresNorms(LlamaAdapter):
    def ignores(self, config, tensor):
        return "norm" in tensor


class IgnoresInverses(LlamaAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith("_inv")


class IgnoresGptq(LlamaAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))


class IgnoresStackParts(GptOssAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith(("_blocks", "_scales"))


class IgnoresFurtherLayers(LlamaAdapter):
    def ignores(self, config, tensor):
        found = re.match(r"model\.layers\.(\d+)\.", tensor)
        return bool(found) and int(found[1]) >= config["num_hidden_layers"]


class IgnoresFurtherExperts(Qwen3Moe):
    def ignores(self, config, tensor):
        return re.search(r"\.experts\.\d+\.", tensor) is not None


class IgnoresSharedExperts(Qwen3Moe):
    def ignores(self, config, tensor):
        return ".shared_expert" in tensor


class IgnoresWhatIsOutside(LlamaAdapter):
    def ignores(self, config, tensor):
        return not tensor.startswith("model.layers.")


class IgnoresAttentionExtras(LlamaAdapter):
    def ignores(self, config, tensor):
        return ".self_attn." in tensor


class MlpBiasesNever(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        return super().layer_parameters({**config, "mlp_bias": False}, layer_idx)

    def ignores(self, config, tensor):
        return tensor.endswith("_proj.bias")

    def tiny_config(self):
        return {**super().tiny_config(), "mlp_bias": False}


class AttentionBiasesAlways(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        return super().layer_parameters({**config, "attention_bias": True}, layer_idx)


class BiasesIgnoredWithoutFlag(LlamaAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith("_proj.bias") and not config.get("attention_bias")


class BiasesAsFound(LlamaAdapter):
    """Believes the tensors, not the config."""

    def weights(self, config, tensor_names):
        names = frozenset(tensor_names)
        found = any(name.endswith("q_proj.bias") for name in names)
        return super().weights({**config, "attention_bias": found}, names)


class MissingBiasesForgiven(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = frozenset(tensor_names)
        biases = {n for n in self._parameter_names(config, self.layout(config)) if "bias" in n}
        plan = super().weights(config, names | biases)
        kept = {n: s for n, s in plan.parameters.items() if names.issuperset(s.tensors)}
        return replace(plan, parameters=kept)

    def tiny_config(self):
        return {**super().tiny_config(), "attention_bias": False, "mlp_bias": False}


class HeadIgnored(LlamaAdapter):
    """Takes every head for a tied one."""

    def weights(self, config, tensor_names):
        return super().weights({**config, "tie_word_embeddings": True}, tensor_names)

    def tiny_config(self):
        return {**super().tiny_config(), "tie_word_embeddings": True}


class OtherDtypeTold(LlamaAdapter):
    def tensors(self, config, shapes, dtype):
        return super().tensors(config, shapes, "BF16")


class NormsToldInFloat32(LlamaAdapter):
    def tensors(self, config, shapes, dtype):
        told = super().tensors(config, shapes, dtype)
        return {
            n: ("F32", shape) if len(shape) == 1 else (kind, shape)
            for n, (kind, shape) in told.items()
        }


class BiasesNotTold(LlamaAdapter):
    def tensors(self, config, shapes, dtype):
        told = super().tensors(config, shapes, dtype)
        return {name: form for name, form in told.items() if not name.endswith(".bias")}


class TiedHeadTold(LlamaAdapter):
    def tensors(self, config, shapes, dtype):
        return super().tensors({**config, "tie_word_embeddings": False}, shapes, dtype)


class HeadNeverTold(LlamaAdapter):
    def tensors(self, config, shapes, dtype):
        return super().tensors({**config, "tie_word_embeddings": True}, shapes, dtype)


class IgnoredTold(Qwen3NextAdapter):
    def tensors(self, config, shapes, dtype):
        told = super().tensors(config, shapes, dtype)
        return {**told, "mtp.fc.weight": (dtype, (64, 128))}


class StacksToldFlat(GptOssAdapter):
    """All experts of a stack side by side: nothing then tells that it is packed."""

    def tensors(self, config, shapes, dtype):
        told = super().tensors(config, shapes, dtype)
        return {n: (kind, _flat(n, shape)) for n, (kind, shape) in told.items()}


def _flat(name, shape):
    return (shape[0] * shape[1], *shape[2:]) if name.endswith("_up_proj") else shape


class StacksToldTurned(GptOssAdapter):
    """The form of each matrix of a stack is told as it is packed, outputs first."""

    def experts(self, config, parameter):
        return [_with_turned_form(source, config) for source in super().experts(config, parameter)]


def _with_turned_form(source, config):
    if not source.tensors[0].endswith("down_proj"):
        return source
    shape = config["hidden_size"], config["intermediate_size"]
    return replace(source, stored=(StoredForm("BF16", shape),))


class ProjectionTurned(LlamaAdapter):
    """Tells matrices as other frameworks store them."""

    def tensors(self, config, shapes, dtype):
        told = super().tensors(config, shapes, dtype)
        return {
            name: (kind, shape[::-1]) if "down_proj" in name else (kind, shape)
            for name, (kind, shape) in told.items()
        }


class BytesAsIfPlain(GptOssAdapter):
    def catalog(self):
        return [replace(e, weight_bytes=2 * e.num_parameters) for e in super().catalog()]


class BytesOfTheWholeRepository(Qwen3NextAdapter):
    """Counts the tensors that are ignored, and does not say so."""

    def catalog(self):
        return [replace(entry, ignored_bytes=0) for entry in super().catalog()]


class TiedHeadCounted(LlamaAdapter):
    def catalog(self):
        for entry in super().catalog():
            config = entry.config
            table = 2 * config["vocab_size"] * config["hidden_size"]
            tied = config.get("tie_word_embeddings")
            yield replace(entry, weight_bytes=entry.weight_bytes + table * bool(tied))


class RoundedBytes(LlamaAdapter):
    """As a model card tells them."""

    def catalog(self):
        return [
            replace(entry, weight_bytes=round(entry.weight_bytes, -7))
            for entry in super().catalog()
        ]


SWALLOWED, FLAGS = "weights.swallowed", "weights.flags"
TENSORS, BYTES = "declaration.stored-tensors", "declaration.stored-bytes"
BROKEN_DECLARATIONS = [
    broken_adapter(SWALLOWED, "Whatever is called a scale is ignored.", IgnoresScales),
    broken_adapter(SWALLOWED, "Every bias that is not used is ignored.", IgnoresBiases),
    broken_adapter(SWALLOWED, "Every norm that is not used is ignored.", IgnoresNorms),
    broken_adapter(SWALLOWED, "All names in `_inv` are ignored, not inv_freq.", IgnoresInverses),
    broken_adapter(SWALLOWED, "What a GPTQ checkpoint holds is ignored.", IgnoresGptq),
    broken_adapter(SWALLOWED, "Packed parts of any parameter are ignored.", IgnoresStackParts),
    broken_adapter(SWALLOWED, "Layers beyond the last are ignored.", IgnoresFurtherLayers),
    broken_adapter(SWALLOWED, "Experts beyond the last are ignored.", IgnoresFurtherExperts),
    broken_adapter(SWALLOWED, "A shared expert is ignored.", IgnoresSharedExperts),
    broken_adapter(SWALLOWED, "All outside the layers is ignored.", IgnoresWhatIsOutside),
    broken_adapter(SWALLOWED, "What attention has beside is ignored.", IgnoresAttentionExtras),
    broken_adapter(FLAGS, "Biases of the MLP are never loaded.", MlpBiasesNever),
    broken_adapter(FLAGS, "Biases of attention are always wanted.", AttentionBiasesAlways),
    broken_adapter(FLAGS, "Without the flag, biases are ignored.", BiasesIgnoredWithoutFlag),
    broken_adapter(FLAGS, "Biases are as found, whatever the config says.", BiasesAsFound),
    broken_adapter(FLAGS, "Biases that are missing are forgiven.", MissingBiasesForgiven),
    broken_adapter(FLAGS, "An untied head is ignored.", HeadIgnored),
    broken_adapter(TENSORS, "Always told in bfloat16.", OtherDtypeTold),
    broken_adapter(TENSORS, "Norms are told in float32.", NormsToldInFloat32),
    broken_adapter(TENSORS, "Biases are not told.", BiasesNotTold),
    broken_adapter(TENSORS, "A tied head is told too.", TiedHeadTold),
    broken_adapter(TENSORS, "A head of its own is not told.", HeadNeverTold),
    broken_adapter(TENSORS, "Tensors that are ignored are told.", IgnoredTold),
    broken_adapter(TENSORS, "Packed experts are told as one matrix.", StacksToldFlat),
    broken_adapter(TENSORS, "Experts are told with outputs first, as packed.", StacksToldTurned),
    broken_adapter(TENSORS, "A matrix is told on its side.", ProjectionTurned),
    broken_adapter(BYTES, "Packed experts count as plain ones.", BytesAsIfPlain),
    broken_adapter(BYTES, "Ignored tensors count as used.", BytesOfTheWholeRepository),
    broken_adapter(BYTES, "A tied head counts twice.", TiedHeadCounted),
    broken_adapter(BYTES, "Bytes are rounded.", RoundedBytes),
]
