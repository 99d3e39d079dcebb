"""Checks that the model which transformers made of a GGUF file is the one in the file.

transformers passes over keys and tensors that it does not know, and fills parameters that it misses
with random numbers. So what counts is not what it reads but what came of it: each key must show in
the config, each parameter must have come from the file, and all numbers of the file must be in the
model. What is left over is named, and the file refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ollm_core.convert.gguf import rope
from ollm_core.convert.gguf.header import GGUFHeader, Value
from ollm_core.convert.gguf.tokenizer import KEYS as TOKENIZER_KEYS
from ollm_core.errors import InputError, UnsupportedError
from ollm_core.files.untrusted_json import show

_HINT = "use a safetensors checkpoint of the model"
_SHOWN = 3

_NOT_COMPUTED = re.compile(
    r"general\.(?!type$).*"  # name, author, licence, how it was quantised, alignment
    r"|(quantize|mradermacher)\..*"  # notes of programs that quantise
    r"|split\.(no|count|tensors\.count)"  # see _check_whole
    r"|[^.]+\.(vocab_size|context_length|attention\.causal)"  # see _check_sizes; a limit; true
)
"""Keys of which nothing that the model computes depends."""

_SAME: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size",),
        "attention.head_count": ("num_attention_heads",),
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("v_head_dim", "head_dim"),
        "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
        "attention.sliding_window": ("sliding_window",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
        "attention.scale": ("attention_multiplier",),
        "embedding_scale": ("embedding_multiplier",),
        "residual_scale": ("residual_multiplier",),
        "expert_count": ("num_experts", "num_local_experts"),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
        "expert_weights_norm": ("norm_topk_prob",),
        "expert_weights_scale": ("routed_scaling_factor",),
        "ssm.conv_kernel": ("linear_conv_kernel_dim",),
        "ssm.state_size": ("linear_key_head_dim",),
        "ssm.group_count": ("linear_num_key_heads",),
        "ssm.time_step_rank": ("linear_num_value_heads",),
    }
)
"""Keys behind the architecture's name, and the keys of config.json of which the first that is there
must say the same.
"""

_MADE: Mapping[str, Callable[[Mapping[str, Any], GGUFHeader], object]] = MappingProxyType(
    {
        "block_count": lambda config, header: (
            config.get("num_hidden_layers", 0) + _num_extra_layers(header)
        ),
        "nextn_predict_layers": lambda _, header: header.of_model("nextn_predict_layers"),
        "ssm.inner_size": lambda config, _: (
            config.get("linear_value_head_dim", 0) * config.get("linear_num_value_heads", 0)
        ),
        "full_attention_interval": lambda config, _: _interval(config),
        "rope.dimension_sections": lambda config, header: _sections(config, header),
    }
)
"""The same for keys whose value config.json says in another form."""

_MUST_BE_STATED = (
    "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping", "expert_count", "expert_used_count",
)  # fmt: skip
"""What a config must not have by the default of its class alone."""


def check_keys(header: GGUFHeader) -> None:
    """Raises InputError without an architecture; UnsupportedError for a key that is neither held
    against the model later, nor one of which nothing depends, for a part of a model, and for what
    is none.
    """
    if not header.architecture:
        raise InputError(f"{header.path}: lacks general.architecture", hint="fetch the file again")
    _check_whole(header)
    prefix = f"{header.architecture}."
    known = {*_SAME, *_MADE, *rope.KEYS}
    unknown = [
        key
        for key in header.metadata
        if not (
            (key.startswith(prefix) and key.removeprefix(prefix) in known)
            or _NOT_COMPUTED.fullmatch(key)
            or TOKENIZER_KEYS.fullmatch(key)
            or key == "general.type"
        )
    ]
    if unknown:
        raise UnsupportedError(
            f"{header.path}: nothing is known to do with {_named(unknown)}", hint=_HINT
        )


def _check_whole(header: GGUFHeader) -> None:
    kind, parts = header.metadata.get("general.type", "model"), header.metadata.get("split.count")
    if kind != "model":
        raise UnsupportedError(
            f"{header.path}: general.type is {show(kind)}, need 'model'",
            hint="an adapter or a projector is no model; give the file of the model itself",
        )
    if parts not in (None, 0, 1):
        raise UnsupportedError(
            f"{header.path}: is one of {show(parts)} parts of a model",
            hint="join them by `llama-gguf-split --merge`",
        )


def check_config(header: GGUFHeader, model: PreTrainedModel) -> None:
    """Raises UnsupportedError for a key of the file that is not in the model's config, and for what
    the config has and the file does not state.
    """
    config = model.config.get_text_config().to_dict()
    for key in (*_SAME, *_MADE):
        stated, has = header.of_model(key), _has(key, config, header)
        if stated is not None and not _agree(stated, has):
            raise UnsupportedError(
                f"{header.path}: {header.architecture}.{key} is {show(stated)}, the model that "
                f"transformers makes of it has {show(has)}",
                hint=_HINT,
            )
        if stated is None and key in _MUST_BE_STATED and has:
            raise UnsupportedError(
                f"{header.path}: lacks {header.architecture}.{key}, and the model that "
                f"transformers makes of it has {show(has)}",
                hint=_HINT,
            )
    _check_sizes(header, config)


def _check_sizes(header: GGUFHeader, config: Mapping[str, Any]) -> None:
    rows, tokens = config.get("vocab_size"), header.metadata.get("tokenizer.ggml.tokens")
    if header.of_model("vocab_size") not in (None, rows):
        raise UnsupportedError(
            f"{header.path}: {header.architecture}.vocab_size is "
            f"{show(header.of_model('vocab_size'))}, the model has {rows}",
            hint=_HINT,
        )
    if isinstance(tokens, tuple) and isinstance(rows, int) and len(tokens) > rows:
        raise InputError(f"{header.path}: {len(tokens)} tokens, the model has {rows}")


def check_tensors(
    header: GGUFHeader, model: PreTrainedModel, loading_info: Mapping[str, Iterable[object]]
) -> None:
    """Raises InputError for a parameter that the file does not fill or gives another shape,
    UnsupportedError for tensors of the file that are not in the model. `loading_info` is that of
    `from_pretrained`.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False).state_dict()
    state = model.state_dict()
    other = [name for name, value in state.items() if value.shape != empty[name].shape]
    for what, found in {**loading_info, "other_shapes": other}.items():
        if names := sorted(map(str, found)):
            raise InputError(
                f"{header.path}: {what.replace('_', ' ')}: {_named(names)}",
                hint="the file is not whole, or transformers does not know its form; " + _HINT,
            )
    values = {value.data_ptr(): value.numel() for value in state.values()}
    taken = [name for name in header.tensors if _is_taken(header, name)]
    in_file = sum(header.tensors[name].num_elements for name in taken)
    in_model = sum(values.values())
    if in_file != in_model:
        raise UnsupportedError(
            f"{header.path}: its tensors have {in_file} numbers, the model that transformers makes "
            f"of it has {in_model}; not in it: {_named(_unplaced(header, model, taken))}",
            hint=_HINT,
        )


def _is_taken(header: GGUFHeader, name: str) -> bool:
    """Whether a tensor must be in the model: not those that became rope parameters, nor the layers
    that draft tokens, which transformers leaves out of every checkpoint.
    """
    if name == rope.FREQS:
        return False
    extra, layer = _num_extra_layers(header), re.match(r"blk\.(\d{1,9})\.", name)
    num_layers = header.of_model("block_count")
    if extra and layer and isinstance(num_layers, int):
        return int(layer[1]) < num_layers - extra
    return True


def _unplaced(header: GGUFHeader, model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of `names` that the table of llama.cpp gives no parameter of the model, for a message;
    all if it knows the architecture not.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((a for a, name in MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    if arch is None:
        return list(names)
    table = get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    placed = set()
    for parameter in model.state_dict():
        name, _, leaf = parameter.rpartition(".")
        placed.add(f"{table.get_name(name)}.{leaf}")
    return [name for name in names if name not in placed] or list(names)


def _num_extra_layers(header: GGUFHeader) -> int:
    found = header.of_model("nextn_predict_layers")
    return found if isinstance(found, int) else 0


def _has(key: str, config: Mapping[str, Any], header: GGUFHeader) -> object:
    """What config.json says in place of `key`."""
    if key in _MADE:
        return _MADE[key](config, header)
    found = [config[name] for name in _SAME[key] if config.get(name) is not None]
    if found or key not in ("attention.key_length", "attention.value_length"):
        return found[0] if found else None
    heads = config.get("num_attention_heads")
    return config.get("hidden_size", 0) // heads if isinstance(heads, int) and heads else None


def _interval(config: Mapping[str, Any]) -> object:
    """Every how many layers one has full attention, if they come so."""
    types = config.get("layer_types") or ()
    full = [i for i, one in enumerate(types) if one == "full_attention"]
    interval = full[0] + 1 if full else 0
    regular = [i for i in range(len(types)) if interval and (i + 1) % interval == 0]
    return interval if regular == full else None


def _sections(config: Mapping[str, Any], header: GGUFHeader) -> object:
    """The sections of the rotary axes, with zeros behind them as in the file."""
    stated, ropes = header.of_model("rope.dimension_sections"), config.get("rope_parameters")
    found = ropes.get("mrope_section") if isinstance(ropes, Mapping) else None
    if not isinstance(found, list) or not isinstance(stated, tuple):
        return found
    return (*found, *(0 for _ in stated[len(found) :]))


def _agree(stated: Value, has: object) -> bool:
    if isinstance(stated, float) and isinstance(has, int | float):
        return abs(stated - has) <= 1e-6 * abs(stated)  # the file has it in float32
    return bool(stated == has)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(show, names[:_SHOWN])) + more
