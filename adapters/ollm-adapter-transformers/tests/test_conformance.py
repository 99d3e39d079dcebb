"""The conformance suite on architectures that differ, each a tiny model of the walk.

Mistral runs every check of the core level, others those of `QUICK`, and some none; all of theirs
run by `make soak`.
"""

import json

from tiny import tiny_config

from ollm_adapter_transformers import TransformersAdapter
from ollm_conformance import AdapterConformance

WHOLE = ("mistral",)
"""Types that run every check."""
OTHERS = (
    "bloom", "cohere2", "deepseek_v3", "falcon", "falcon_h1", "falcon_mamba", "gemma2",
    "gemma3n_text", "gpt_neox", "gpt_oss", "granite", "granitemoehybrid", "jamba", "lfm2",
    "llama4_text", "mamba2", "mixtral", "nemotron_h", "olmo2", "phi3", "qwen2_moe",
    "qwen4_exp_text", "starcoder2", "zaya",
)  # fmt: skip
SLOW = ("bart", "glm", "recurrent_gemma", "xlstm")
"""Types of which `make soak` runs every check, and CI none: `test_types` has them."""
QUICK = frozenset(
    {
        "caches.kinds", "caches.tiers", "declaration.pure", "exact.decode", "memory.host",
        "memory.plan", "weights.every-tensor-once", "weights.missing-tensor", "weights.scratch",
        "weights.swallowed",
    }
)  # fmt: skip
"""Exact, in every tier, with the tensors that transformers has, and within the plan to the byte."""
SPARED = frozenset(
    {
        "test_decode[float16]", "test_plan[device-False-bfloat16]", "test_plan[disk-True-bfloat16]",
        "test_plan[device-True-bfloat16]", "test_tiers[device-float32]",
        "test_tiers[host-bfloat16]", "test_tiers[host-float32]",
    }
)  # fmt: skip
"""Of these checks, what differs from the rest by code that no type has a part in."""


_EACH_CHUNK = "a layer that is run whole asks for its experts in each chunk"
_PADDING = "in transformers padding on the left changes what it says of a text; here it does not"
_NUMBERS = "it reads what JSON has no number for as transformers writes it"
_NO_KEYS = "without keys and values nothing is kept on disk: states stay in memory"
_OWN_CACHE = "it looks at the cache that transformers makes for any model, which is another"
_ENCODER = "transformers' cache has a layer for each that the encoder would have"
EXPECTED = {
    "bart": {
        "configs.many-layers": "the number of its layers is called otherwise",
        "configs.unstated": _ENCODER,
        "exact.arguments": _PADDING,
    },
    "deepseek_v3": {
        "experts.many": "11 experts are not in two groups",
        "experts.routed-only": _EACH_CHUNK,
    },
    "gpt_oss": {"experts.routed-only": _EACH_CHUNK, "weights.read-once": _EACH_CHUNK},
    "granitemoehybrid": {
        "configs.unstated": _NUMBERS,
        "experts.routed-only": _EACH_CHUNK,
        "weights.read-once": _EACH_CHUNK,
    },
    "mixtral": {
        "experts.routed-only": _EACH_CHUNK,
        "weights.read-once": _EACH_CHUNK,
    },
    "falcon_h1": {"configs.unstated": _NUMBERS},
    "recurrent_gemma": {"exact.arguments": _PADDING},
    "xlstm": {
        "caches.damaged": _NO_KEYS,
        "caches.large-tokens": _NO_KEYS,
        "caches.other-dtype": _NO_KEYS,
        "caches.reopen": _NO_KEYS,
        "configs.many-layers": _OWN_CACHE,
        "configs.unstated": "a number of layers and one of blocks that contradict each other",
        "exact.arguments": _PADDING,
        "walk.damage": _NO_KEYS,
        "walk.rows": _NO_KEYS,
    },
    "qwen4_exp_text": {
        "caches.kinds": "its index is kept as one more head",
        "experts.many": "its index is kept as one more head",
        "experts.routed-only": _EACH_CHUNK,
    },
}
"""What fails, and why, by type."""
CASES = {
    "recurrent_gemma": {
        "test_plan[device-True-bfloat16]": "beside windows it fills layers without keys with some",
    },
    "xlstm": {
        "test_bytes[device]": "states are not counted beside keys and values",
        "test_bytes[host]": "states are not counted beside keys and values",
        "test_tied_head[True]": "transformers' class has a head of its own, whatever is said",
    },
}
"""The same of single cases of a check."""


CHANGES = {
    "bart": {
        "tie_word_embeddings": False,  # else it says its last token again
        "decoder_ffn_dim": 384,  # a layer should take more than logits
        "forced_eos_token_id": None,  # `generate` would end with it
    },
    "xlstm": {"ffn_proj_factor": 24.0},  # the same
}
"""What a type has otherwise here, for what the suite's prompts and sizes are made for."""


def suite_config(model_type):
    """The tiny config of a type as config.json has it, with room for the suite's prompts, which is
    stated even where there is no end to it. What JSON has no number for is left to transformers, as
    what would say once more how many layers there are.
    """
    tiny = tiny_config(model_type)
    config = json.loads(tiny.to_json_string(use_diff=False))
    for key in ("transformers_version", "architectures", "num_blocks"):
        config.pop(key, None)
    if not hasattr(tiny.get_text_config(), "max_position_embeddings"):
        config["max_position_embeddings"] = 2048
    for key in ("max_position_embeddings", "n_positions"):
        if key in config:
            config[key] = 2048
    config |= CHANGES.get(model_type, {})
    return {key: value for key, value in config.items() if "__float__" not in json.dumps(value)}


class OfType(AdapterConformance):
    """The suite on one architecture."""

    __test__ = False
    adapter = TransformersAdapter

    @classmethod
    def subject_name(cls, config):
        return f"transformers {cls.tiny_config['model_type']}"


def of_type(model_type):
    """A test class."""
    name = "Test" + model_type.title().replace("_", "")
    members = {"__test__": True, "tiny_config": suite_config(model_type), "__module__": __name__}
    members["expected_failures"] = EXPECTED.get(model_type, {})
    return type(name, (OfType,), members)


globals().update({made.__name__: made for made in map(of_type, (*WHOLE, *OTHERS, *SLOW))})
