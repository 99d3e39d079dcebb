"""Why no adapter opens a model: one line by what is known, and what to do."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ollm_core.plugins.unclaimed import GENERIC, SERVED, why_unclaimed

REMOTE = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}


@pytest.mark.parametrize(
    ("config", "reason", "hint"),
    [
        ({"model_type": "qwen2"}, "no adapter opens model_type 'qwen2'", f"pip install {GENERIC}"),
        ({"model_type": "t5"}, "it is an encoder-decoder", "decoders alone"),
        ({"model_type": "bert", "is_encoder_decoder": True}, "it is an encoder-decoder", "alone"),
        ({"model_type": "clip"}, "it does not generate text", "causal language model"),
        (
            {"model_type": "x", "auto_map": REMOTE},
            "it needs Python code from its repository, which oLLM never runs",
            "whose type transformers has itself",
        ),
        ({"model_type": "qwen2", "auto_map": REMOTE}, "model_type 'qwen2'", GENERIC),
        ({"model_type": "x"}, "installed here, does not know it", "a newer transformers may"),
        (
            {"model_type": "x", "transformers_version": "999.1.0.dev0; rm"},
            "does not know it",
            "its config.json is of transformers 999.1: pip install -U transformers",
        ),
        (
            {"model_type": "x", "transformers_version": "4.1.0"},
            "does not know it",
            "a newer transformers may",
        ),
        ({}, "model_type None: it must name the model's family", "fetch the model's config.json"),
        (
            {"model_type": "chatglm", "auto_map": REMOTE},
            "never runs",
            "zai-org/GLM-4-9B-0414 (g",
        ),
        ({"model_type": "baichuan"}, "never runs", "converted to type llama"),
        ({"model_type": "internlm2"}, "never runs", "tools/convert2llama.py"),
        ({"model_type": "internlm"}, "never runs", "attention_bias true"),
        ({"model_type": "kimi_k2"}, "never runs", "deepseek_v3"),
    ],
)
def test_reasons(config, reason, hint):
    """What the config says decides, before what it might need."""
    told, help_ = why_unclaimed(config)
    assert reason in told
    assert hint in help_
    assert "\n" not in told + help_


def test_the_types_that_serve_are_there():
    """Whom the hints send to an in-tree type finds it, and none of them is in-tree itself."""
    assert not [name for name in SERVED if name in CONFIG_MAPPING]
    for name in ("glm", "glm4", "llama", "internlm3", "deepseek_v3", "phi", "qwen2", "qwen3"):
        assert name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        assert any(name in hint for hint in SERVED.values())
