"""Checks generation_config.json: every field by a table, and nothing else.

transformers keeps whatever the file has, and finds out in the middle of `generate`. Here a field of
a wrong kind is refused when the model is opened. What no model here could honour is left out:
caches and compilation, which are the engine's, watermarks, and decoding that transformers has moved
to code on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ollm_core.checkpoint.safetensors import read_small
from ollm_core.errors import ConfigError
from ollm_core.files.untrusted_json import parse_object, show

FILE = "generation_config.json"
MAX_BYTES = 1 << 20
MAX_STOP_STRINGS = 64
MAX_CHARS = 256

RUN_FIELDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""What a checkpoint says of a run whose length and sampling the user has chosen: where its texts
end, and which tokens it must not or should not say. transformers' greedy decoding obeys the same.
"""


Check = Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _is_number(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and math.isfinite(value))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_CHARS


def _is_list(check: Check, length: int | None = None) -> Check:
    """Whether it is a list, of `length` values that all pass `check`."""
    return lambda value: (
        isinstance(value, list) and length in (None, len(value)) and all(map(check, value))
    )


_is_ids = _is_list(_is_int)
_FIELDS: Sequence[tuple[str, Check, str]] = (
    (
        "an integer",
        _is_int,
        "max_length max_new_tokens min_length min_new_tokens num_beams top_k no_repeat_ngram_size "
        "encoder_no_repeat_ngram_size num_return_sequences pad_token_id num_assistant_tokens "
        "prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit "
        "assistant_lookbehind target_lookbehind forced_bos_token_id",
    ),
    (
        "a number",
        _is_number,
        "max_time temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff length_penalty "
        "encoder_repetition_penalty guidance_scale assistant_confidence_threshold "
        "assistant_ensemble_weight",
    ),
    (
        "a number above 0",
        lambda value: _is_number(value) and value > 0,
        "repetition_penalty",
    ),
    (
        "true or false",
        _is_bool,
        "do_sample renormalize_logits remove_invalid_values token_healing output_attentions "
        "output_hidden_states output_scores output_logits return_dict_in_generate is_assistant",
    ),
    (
        "true, false or text",
        lambda value: _is_bool(value) or _is_text(value),
        "early_stopping",
    ),
    (
        "a token id or a list of them",
        lambda value: _is_int(value) or _is_ids(value),
        "bos_token_id eos_token_id decoder_start_token_id forced_eos_token_id",
    ),
    (
        "a list of token ids",
        _is_ids,
        "suppress_tokens begin_suppress_tokens",
    ),
    (
        "a list of lists of token ids",
        _is_list(lambda one: _is_ids(one) and one != [] and min(one) >= 0),
        "bad_words_ids",
    ),
    (
        "a list of token ids with a number each",
        _is_list(lambda one: _is_list(bool, 2)(one) and _is_ids(one[0]) and _is_number(one[1])),
        "sequence_bias",
    ),
    (
        "a list of two numbers",
        _is_list(_is_number, 2),
        "exponential_decay_length_penalty",
    ),
    (
        f"text, or a list of at most {MAX_STOP_STRINGS}, of 1 to {MAX_CHARS} characters",
        lambda value: (
            _is_text(value) or (_is_list(_is_text)(value) and len(value) <= MAX_STOP_STRINGS)
        ),
        "stop_strings",
    ),
    (
        "text",
        _is_text,
        "num_assistant_tokens_schedule",
    ),
)
"""What a value must be, whether it is, and transformers' fields of that kind. Each may be null."""


def read_generation_config(
    directory: Path, model_config: Mapping[str, Any]
) -> GenerationConfig | None:
    """What the file in `directory` says, or None if there is none: then transformers goes by
    `model_config`, the fields of config.json.

    Raises ConfigError, naming file and field, for one that is not of its kind.
    """
    path = directory / FILE
    if not path.exists():
        _checked(directory / "config.json", {name: model_config.get(name) for name in RUN_FIELDS})
        return None
    try:
        said = parse_object(read_small(path, MAX_BYTES, ConfigError))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    config = GenerationConfig()
    for name, value in _checked(path, said).items():
        # What does not go together is for `generate` to say, which may be told otherwise.
        setattr(config, name, value)
    return config


def for_run(config: GenerationConfig) -> GenerationConfig:
    """`RUN_FIELDS` of `config`, and nothing else of it."""
    said = {name: getattr(config, name) for name in RUN_FIELDS}
    return GenerationConfig(**{n: v for n, v in said.items() if v != []}, use_cache=True)


def _checked(path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `_FIELDS` that are there."""
    fields = {}
    for kind, check, names in _FIELDS:
        for name in names.split():
            value = said.get(name)
            if value is None or value == []:
                continue
            if not check(value):
                raise ConfigError(f"{path}: `{name}` must be {kind}, got {show(value)}")
            fields[name] = float(value) if kind.startswith("a number") else value
    return fields
