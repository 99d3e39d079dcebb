"""Looks at a config before anything is built: what is refused, and which part is the language
model's.
"""

from __future__ import annotations

import inspect
from typing import Any

from ollm_core import Config, ConfigError, UnsupportedError

_NUMBERS = ("Infinity", "-Infinity", "NaN")
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def check_config(config: Config) -> None:
    """Raises UnsupportedError for a model that is no decoder, or whose frequencies depend on the
    length. What transformers does not know core has refused. The decoder of an encoder-decoder that
    was saved as a causal model says that it is no encoder-decoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    stated = config.get("is_encoder_decoder")
    if stated or (stated is None and _is_encoder_decoder(str(model_type))):
        raise UnsupportedError(
            f"model_type {model_type!a} is an encoder-decoder, need a decoder alone",
            hint="oLLM runs causal language models",
        )
    _check_rope(dict(_text_part(config) or config))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _text_part(config):
        raise UnsupportedError(
            f"model_type {model_type!a} is no causal language model in transformers",
            hint="oLLM runs causal language models",
        )
    for part in (config, _text_part(config) or {}):
        _check_cache(str(part.get("model_type")))


def _check_cache(model_type: str) -> None:
    """Raises UnsupportedError for a model whose forward is not given transformers' cache."""
    kind = _class_of(model_type)
    if kind is not None and not {"past_key_values", "cache_params"} & _parameters(kind.forward):
        raise UnsupportedError(
            f"{kind.__name__} takes no cache of transformers: what it knows of earlier tokens, if "
            "anything, is kept elsewhere",
            hint="a model is run with transformers' own cache; this one is not made so",
        )


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _class_of(model_type: str) -> Any:
    """transformers' causal language model of a type; None if it has none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return None if name is None else getattr(transformers, name)


_DEPTH = 4
"""Of the parts of a config in which rotary embeddings are looked for."""


def is_composite(config: Config) -> bool:
    """Whether the language model is a part of a larger one."""
    return _text_part(config) is not None or _is_class_of_part(str(config.get("model_type")))


def _is_class_of_part(model_type: str) -> bool:
    """Whether transformers' causal language model of a type is made of a part of its config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = _class_of(model_type)
    return kind is not None and kind.config_class in CONFIG_MAPPING[model_type].sub_configs.values()


def language_config(config: Config) -> Config:
    """The part of a config that is a causal language model's by itself; else all of it."""
    found: Config = with_numbers(dict(_text_part(config) or config))
    return found


def with_numbers(value: Any) -> Any:
    """A part of config.json with the numbers that JSON does not have, which transformers writes as
    objects.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in _NUMBERS:
            return float(value["__float__"])
        return {key: with_numbers(one) for key, one in value.items()}
    return [with_numbers(one) for one in value] if isinstance(value, list) else value


def _text_part(config: Config) -> Config | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in _TEXT_PARTS:
        part: Any = config.get(name)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ConfigError(f"{name} of config.json is {part!a:.80}, need an object")
        if part.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
            return {**part, **tied}  # as transformers' class of the whole model goes by it
    return None


def _check_rope(value: Any, depth: int = 0) -> None:
    """Raises UnsupportedError for frequencies that depend on the length."""
    if not isinstance(value, dict) or depth > _DEPTH:
        return
    rope_type = value.get("rope_type", value.get("type"))
    if rope_type in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"rope type {rope_type} is not supported: its frequencies depend on the longest "
            "position so far, so a prompt in chunks would give another result",
            hint="use a model with fixed frequencies: default, linear, llama3 or yarn",
        )
    for one in value.values():
        _check_rope(one, depth + 1)


def _is_encoder_decoder(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return bool(getattr(CONFIG_MAPPING[model_type](), "is_encoder_decoder", False))
    except Exception:  # noqa: BLE001 - a config class may want arguments
        return False
