"""Why no installed adapter opens a model, by what its config.json says and what transformers knows.

Names no distribution, model type or version that a config.json could choose. transformers is
imported only when somebody asks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from ollm_core.contracts.model import Config
from ollm_core.files.untrusted_json import show

GENERIC = "ollm-adapter-transformers"
"""The distribution whose adapter opens the types of transformers that no other claims."""

SERVED: Mapping[str, str] = MappingProxyType(
    {
        "chatglm": "of GLM-4, take the files of an in-tree type: zai-org/glm-4-9b-chat-hf (glm) or "
        "zai-org/GLM-4-9B-0414 (glm4); ChatGLM 1 to 3 have none",
        "baichuan": "no in-tree type reads its files; a 7B model converted to type llama (W_pack "
        "split into q, k and v, Baichuan 2's head normalised) runs, 13B (ALiBi) does not",
        "internlm": "its layers are those of type llama: a copy whose config.json says model_type "
        "llama, attention_bias true, is read by that type",
        "internlm2": "convert it to type llama with tools/convert2llama.py of InternLM/InternLM; "
        "InternLM 3 is in-tree (internlm3)",
        "kimi_k2": "its architecture is the in-tree type deepseek_v3: take a copy in bf16 whose "
        "config.json says so",
        "phi-msft": "take the files of the in-tree type phi: microsoft/phi-2 as it is now",
        "qwen": "Qwen 1 is not in-tree; Qwen1.5 and later are (qwen2, qwen3)",
    }
)
"""By a model_type that transformers does not have: which in-tree type serves its users, and how."""


def why_unclaimed(config: Config) -> tuple[str, str]:
    """The reason in one line, and what can be done about it, for a config.json that no installed
    adapter claims.
    """
    nobody = f"no adapter opens model_type {show(config.get('model_type'))}"
    return why_not_decoder(config) or (
        nobody,
        f"pip install {GENERIC} for the types of transformers, or the adapter of its family; "
        "`ollm plugins` shows the installed ones",
    )


def why_not_decoder(config: Config) -> tuple[str, str] | None:
    """As `why_unclaimed`, for a model that is no decoder of the installed transformers; else
    None.
    """
    stated = config.get("model_type")
    nobody = f"no adapter opens model_type {show(stated)}"
    if not isinstance(stated, str):
        return f"{nobody}: it must name the model's family", "fetch the model's config.json again"
    # The types of transformers come without torch's models, but not without torch.
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as installed
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    causal = stated in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if stated not in CONFIG_MAPPING:
        if config.get("auto_map") or stated in SERVED:
            reason = f"{nobody}: it needs Python code from its repository, which oLLM never runs"
            return reason, SERVED.get(stated, "take a model whose type transformers has itself")
        reason = f"{nobody}: transformers {installed}, installed here, does not know it"
        newer = _newer(config.get("transformers_version"), installed)
        return reason, (
            f"its config.json is of transformers {newer}: pip install -U transformers"
            if newer
            else "a newer transformers may: pip install -U transformers"
        )
    if config.get("is_encoder_decoder") is True or (
        stated in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not causal
    ):
        return f"{nobody}: it is an encoder-decoder", "oLLM runs models that are decoders alone"
    if not causal and stated not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return f"{nobody}: it does not generate text", "give a causal language model"
    return None


def _newer(stated: object, installed: str) -> str:
    """The version that a config.json states, if that is one, and newer than the installed."""
    if not isinstance(stated, str) or not (match := re.match(r"\d{1,4}\.\d{1,4}", stated)):
        return ""
    numbers = [tuple(map(int, text.split(".")[:2])) for text in (match[0], installed)]
    return match[0] if numbers[0] > numbers[1] else ""
