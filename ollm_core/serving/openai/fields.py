"""The fields of chats and of completions: those of a row of a batch, and those of a server's
bodies, which have more.
"""

from __future__ import annotations

from collections.abc import Mapping

from ollm_core.serving.openai.limits import (
    MAX_ANSWERS,
    MAX_LOGPROBS,
    MAX_SHORT_CHARS,
    MAX_TEXTS,
    MAX_TOOLS,
    TIERS,
    TOOL_NAME,
    WORD,
)
from ollm_core.serving.openai.messages import THOUGHTS
from ollm_core.serving.openai.schemas import (
    ANYTHING,
    OBJECT,
    SWITCH,
    TEXT,
    Field,
    Fields,
    Schema,
    any_of,
    ignored,
    list_of,
    nullable,
    object_of,
    one_of,
    only,
    text,
    whole,
)
from ollm_core.serving.request import MAX_SEED, MAX_STOPS

_EMPTY = one_of(None, [], {})
SHORT = text(1, MAX_SHORT_CHARS)
_PART = object_of({"type": one_of("text"), "text": TEXT}, ["type", "text"])
CONTENT = any_of(TEXT, list_of(_PART))
_IDS = list_of(whole(0))


def _message(properties: Mapping[str, Schema], required: list[str]) -> Schema:
    return object_of(properties, ["role", *required], _EMPTY)


_CALL = object_of(
    {
        "id": nullable(SHORT),
        "type": one_of("function", None),
        "function": object_of(
            {"name": SHORT, "arguments": any_of(TEXT, OBJECT), "index": ANYTHING},
            ["name", "arguments"],
        ),
        "index": ANYTHING,
    },
    ["function"],
)
_CALLS = list_of(_CALL, 1)
_SPOKEN = one_of("system", "developer", "user", "function")


def message(more: Mapping[str, Schema]) -> Schema:
    """One message; `more` are fields of what a function gave."""
    gave = {"role": one_of("tool"), "content": CONTENT, "tool_call_id": nullable(SHORT), **more}
    assistant = {
        "role": one_of("assistant"), **dict.fromkeys(THOUGHTS, nullable(TEXT)),
    }  # fmt: skip
    return any_of(
        _message({"role": _SPOKEN, "content": CONTENT}, ["content"]),
        _message(
            {
                **assistant,
                "content": CONTENT,
                "tool_calls": any_of(_CALLS, one_of([], None)),
            },
            ["content"],
        ),
        _message(
            {**assistant, "content": nullable(CONTENT), "tool_calls": _CALLS},
            ["tool_calls"],
        ),
        _message(gave, ["content"]),
    )


FUNCTION: Mapping[str, Schema] = {
    "name": text(1, pattern=TOOL_NAME),
    "description": nullable(TEXT),
    "parameters": nullable(OBJECT),
    "strict": nullable(SWITCH),
}
TOOL = object_of(
    {"type": one_of("function"), "function": object_of(FUNCTION, ["name"])}, ["function"]
)
TOOL_WORDS = one_of("none", "auto", "required")
_NAMED = object_of(
    {
        "type": one_of("function"),
        "function": object_of({"name": TEXT}, ["name"], more=True),
    },
    ["type", "function"],
    more=True,
)
FORMATS = any_of(
    object_of({"type": one_of("text")}, ["type"]),
    object_of({"type": one_of("json_object")}, ["type"], more=True),
    object_of(
        {
            "type": one_of("json_schema"),
            "json_schema": object_of({"schema": OBJECT}, ["schema"], more=True),
        },
        ["type", "json_schema"],
        more=True,
    ),
)
_STREAM_OPTIONS = object_of(
    {
        "include_usage": nullable(SWITCH),
        "include_obfuscation": nullable(SWITCH),
        "continuous_usage_stats": one_of(False, None),
    }
)
TEMPERATURE: Schema = {"type": "number", "minimum": 0}
TOP_P: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
STOP = any_of(text(1), list_of(text(1), 0, MAX_STOPS))
SEED = whole(-MAX_SEED, MAX_SEED)
SAMPLING: Mapping[str, Schema] = {
    "temperature": TEMPERATURE,
    "top_p": TOP_P,
    "top_k": whole(-1),
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "stop": STOP,
    "seed": SEED,
}
_SAMPLED: Fields = {
    **{name: Field(schema) for name, schema in SAMPLING.items()},
    "n": Field(whole(1, MAX_ANSWERS)),
    "stop_token_ids": Field(_IDS),
    "min_tokens": Field(whole(0)),
    "ignore_eos": Field(SWITCH),
    "include_stop_str_in_output": Field(SWITCH),
    "presence_penalty": only(0),
    "frequency_penalty": only(0),
    "length_penalty": only(1),
    "logit_bias": only({}),
    "stream": only(False),
    "best_of": only(1),
    "use_beam_search": only(False),
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": only(True),
    "bad_words": only([]),
    **ignored(
        "model", "user", "metadata", "store", "service_tier", "safety_identifier", "priority",
        "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "prediction",
        "stream_options", "request_id",
    ),
}  # fmt: skip
_KWARGS: Schema = {
    "type": "object",
    "additionalProperties": any_of(SWITCH, {"type": "integer"}, text(1, pattern=WORD)),
}
_ONE_PROMPT = any_of(TEXT, _IDS, list_of(TEXT, 1, 1), list_of(_IDS, 1, 1))
ROWS: Mapping[str, Fields] = {
    "chat": {
        "messages": Field(list_of(message({"name": nullable(SHORT)}), 1), required=True),
        "tools": Field(list_of(TOOL, 0, MAX_TOOLS)),
        "tool_choice": Field(any_of(TOOL_WORDS, _NAMED)),
        "max_tokens": Field(whole(1)),
        "max_completion_tokens": Field(whole(1)),
        "logprobs": Field(SWITCH),
        "top_logprobs": Field(whole(0, MAX_LOGPROBS)),
        "reasoning_effort": Field(_KWARGS["additionalProperties"]),
        "chat_template_kwargs": Field(_KWARGS),
        "functions": only([]),
        "function_call": only("none", "auto"),
        "response_format": only({"type": "text"}),
        "modalities": only(["text"]),
        "add_generation_prompt": only(True),
        "continue_final_message": only(False),
        "add_special_tokens": only(False),
        **_SAMPLED,
    },
    "completion": {
        "prompt": Field(_ONE_PROMPT, required=True),
        "max_tokens": Field(whole(1)),
        "logprobs": Field(whole(0, MAX_LOGPROBS)),
        "echo": only(False),
        "suffix": only(""),
        "add_special_tokens": only(True),
        **_SAMPLED,
    },
}
"""Of a row, by its kind."""
_SERVED: Fields = {
    "stream": Field(SWITCH),
    "stream_options": Field(_STREAM_OPTIONS),
    "service_tier": Field(one_of(*TIERS)),
}
SERVED: Mapping[str, Fields] = {
    "chat": {
        **ROWS["chat"],
        **_SERVED,
        "store": Field(SWITCH),
        "response_format": Field(FORMATS),
    },
    "completion": {
        **ROWS["completion"],
        **_SERVED,
        "prompt": Field(
            any_of(TEXT, list_of(whole(0), 1), list_of(any_of(TEXT, _IDS), 1, MAX_TEXTS)),
            required=True,
        ),
        "max_tokens": Field(whole(0)),
        "echo": Field(SWITCH),
    },
}
"""Of a server's body."""
