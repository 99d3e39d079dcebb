"""Makes the tokenizer of a GGUF file, with transformers, and checks it against the file.

How text is split before its pieces are merged is a name in the file (`tokenizer.ggml.pre`), and
what it stands for is in llama.cpp's code. Versions of transformers know other ones of these names,
and take what they do not know for GPT-2's; so what a name means is written down here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, pre_tokenizers

from ollm_core.convert.gguf.header import GGUFHeader
from ollm_core.errors import UnsupportedError
from ollm_core.files.untrusted_json import parse_object, show

KEYS = re.compile(
    r"tokenizer\.(ggml\.(model|pre|tokens|scores|token_type|merges|add_(bos|eos)_token"
    r"|add_space_prefix|(bos|eos|unknown|padding|eot|eom)_token_id)|chat_template"
    # Not for text: counts, ids that no template uses by themselves, templates beside the default.
    r"|ggml\.(token_type_count|remove_extra_whitespaces|(seperator|separator|cls|mask)_token_id"
    r"|(prefix|suffix|middle|fim_[a-z]+)_token_id|add_sep_token)"
    r"|chat_templates|chat_template\..*|huggingface\.json)"
)
"""Those that are used, and those of which no token depends."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
)
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_GPT4O = (
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_SPLITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(("default", "gpt-2"), (_GPT2,))
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", _GPT2))
    | dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), (_LLAMA3,))
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,))
    | {"qwen35": (_QWEN35,), "tekken": (_TEKKEN,)}
    | dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,))
)
"""By its name, what cuts text, one after the other."""
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
"""Where a piece that is a token is taken whole, whatever its merges would make of it."""

_SPECIAL = MappingProxyType({"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"})
"""What the file and transformers call the tokens with a meaning of their own."""


def correct_tokenizer(header: GGUFHeader, tokenizer: Any) -> None:
    """Make the tokenizer name its special tokens, and a byte-level one cut text, as the file says.
    Raises UnsupportedError where what it says is not known.
    """
    for name, attribute in _SPECIAL.items():
        stated = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(stated) is int and 0 <= stated < _num_tokens(header):
            setattr(tokenizer, f"{attribute}_token", tokenizer.convert_ids_to_tokens(stated))
    kind = header.metadata.get("tokenizer.ggml.model")
    for name in ("add_bos_token", "add_eos_token"):
        unstated = kind == "llama" and name == "add_bos_token"  # so llama.cpp has it
        adds = header.metadata.get(f"tokenizer.ggml.{name}", unstated or None)
        if type(adds) is bool:
            setattr(tokenizer, name, adds)
    if kind != "gpt2":
        return
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise UnsupportedError(
            f"{header.path}: tokenizer.ggml.pre is {show(pre)}, need {', '.join(sorted(_SPLITS))}",
            hint="use a safetensors checkpoint of the model",
        )
    backend = tokenizer.backend_tokenizer
    splits = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in _SPLITS[pre]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    backend.model.ignore_merges = pre in _WHOLE_WORDS


def check_tokenizer(header: GGUFHeader, tokenizer: Any) -> None:
    """Raises UnsupportedError for what the file says of tokens and the tokenizer does otherwise."""
    missing = sorted({*range(_num_tokens(header))} - {*tokenizer.get_vocab().values()})
    if missing:
        _refuse(header, f"ggml.tokens[{missing[0]}]", _tokens(header)[missing[0]], None)
    for name, attribute in _SPECIAL.items():
        _compare(header, f"{name}_token_id", getattr(tokenizer, f"{attribute}_token_id"))
    found = tokenizer("a").input_ids
    _compare(header, "add_bos_token", found[:1] == [tokenizer.bos_token_id])
    _compare(header, "add_eos_token", found[-1:] == [tokenizer.eos_token_id])
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and tokenizer.chat_template != template:
        _refuse(header, "chat_template", template, tokenizer.chat_template)
    if header.metadata.get("tokenizer.ggml.model") == "llama":
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
        spaced = bool(first) and first[0].startswith("\u2581")
        _compare(header, "add_space_prefix", spaced)


def drop_foreign_tokens(header: GGUFHeader, file: Path) -> None:
    """Take out of a tokenizer.json the tokens behind those of the file, for which the model has no
    row: transformers' classes add the special tokens of other models.
    """
    state = parse_object(file.read_bytes())
    added = [one for one in state["added_tokens"] if one["id"] < _num_tokens(header)]
    file.write_text(json.dumps({**state, "added_tokens": added}, ensure_ascii=False, indent=2))


def _tokens(header: GGUFHeader) -> tuple[object, ...]:
    found = header.metadata.get("tokenizer.ggml.tokens", ())
    return found if isinstance(found, tuple) else ()


def _num_tokens(header: GGUFHeader) -> int:
    return len(_tokens(header))


def stopping_tokens(header: GGUFHeader, stated: int | list[int] | None) -> int | list[int] | None:
    """Ids that end a text: those `stated`, and those of the ends of turns and messages."""
    ids = [stated] if isinstance(stated, int) else list(stated or ())
    for name in ("eot", "eom"):
        found = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(found) is int and found not in ids:
            ids.append(found)
    return ids[0] if len(ids) == 1 else ids or None


def _compare(header: GGUFHeader, key: str, has: object) -> None:
    stated = header.metadata.get(f"tokenizer.ggml.{key}")
    if stated is not None and stated != has:
        _refuse(header, f"ggml.{key}", stated, has)


def _refuse(header: GGUFHeader, key: str, stated: object, has: object) -> None:
    raise UnsupportedError(
        f"{header.path}: tokenizer.{key} is {show(stated)}, the tokenizer that transformers makes "
        f"of it has {show(has)}",
        hint="use a safetensors checkpoint of the model",
    )
