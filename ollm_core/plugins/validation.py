"""Checks the declarations of adapters: each mistake that an author makes is one sentence with its
fix. Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ollm_core.contracts.adapter import ADAPTER_API, ModelAdapter
from ollm_core.contracts.kv import CacheKind
from ollm_core.contracts.model import Capability, CatalogEntry, Config, Layout
from ollm_core.contracts.tensors import WeightPlan
from ollm_core.errors import ConfigError, OllmError, PluginError, one_line

_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.:-]{0,95}", re.ASCII)

CAPABILITIES: Mapping[str, str] = MappingProxyType(
    {
        "batch": "several sequences in one weight pass",
        "chunked-prefill": "a prompt in chunks, bit for bit as transformers gives it so",
        "kv-device": "KV cache on the device",
        "kv-host": "KV cache in host memory",
        "kv-disk": "KV cache on disk, found again by the next process",
        "blockwise-attention": "attention over KV blocks, merged by log-sum-exp",
        "truncate": "dropping the last tokens of a sequence",
        "drafts": "checking several drafted tokens in one weight pass",
    }
)
"""Every ability that an adapter can declare, and what it means. What is not declared is full."""


def check_adapter(adapter: ModelAdapter) -> tuple[tuple[CatalogEntry, ...], str]:
    """The catalog of `adapter`, and a warning or nothing. Raises PluginError for a declaration that
    cannot be used.
    """
    name = adapter_name(adapter)
    for attribute in ("model_types", "quantizations"):
        _check_words(name, attribute, getattr(adapter, attribute, None))
    models = _catalog(adapter, name)
    if warning := _check_api(name, adapter.adapter_api):
        return models, warning
    declared = adapter.capabilities
    if not isinstance(declared, Mapping):
        raise PluginError(
            f"adapter {name}: capabilities must be a mapping, got {told(declared)}",
            hint="an attribute with a dict, or a @property that returns one",
        )
    for key, value in declared.items():
        check_capability(name, key)
        if not isinstance(value, Capability):
            raise PluginError(
                f"adapter {name}: capabilities[{key!r}] must be a Capability, got {told(value)}",
                hint='capabilities must be Capability objects: Capability("unsupported", "why")',
            )
    return models, ""


def adapter_name(adapter: ModelAdapter) -> str:
    """Its name. Raises PluginError for one that has none."""
    name: object = getattr(adapter, "name", None)
    if not isinstance(name, str) or not name:
        raise PluginError(
            f"adapter {type(adapter).__name__}: name must be a string, got {told(name)}",
            hint='give the class a name, for instance name = "llama"',
        )
    return name


def check_capability(adapter: str, name: object) -> None:
    """Raises PluginError, with what there is and what may be meant, for a `name` that is none."""
    if name in CAPABILITIES:
        return
    close = difflib.get_close_matches(str(name), CAPABILITIES, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise PluginError(
        f"adapter {adapter} declares unknown capabilities: {ascii(name)[:80]}",
        hint=f"{meant}there are {', '.join(CAPABILITIES)}",
    )


def check_entries(source: str, found: object) -> tuple[CatalogEntry, ...]:
    """The models that `source` gives. Raises PluginError, naming it, for what is none."""
    if not isinstance(found, Iterable):
        raise PluginError(
            f"{source} must return CatalogEntry objects, got {told(found)}",
            hint="return a tuple of them",
        )
    models = tuple(found)
    for number, model in enumerate(models):
        if not isinstance(model, CatalogEntry):
            raise PluginError(
                f"{source} must give CatalogEntry objects, entry {number} is {told(model)}",
                hint="make each with catalog_entry(id, repo, config, ...) of ollm_core",
            )
        for alias in (model.id, *model.aliases):
            if not isinstance(alias, str) or not _MODEL_NAME.fullmatch(alias):
                raise PluginError(
                    f"{source}: id or alias {told(alias)} of {told(model.id)} cannot be a name",
                    hint="names are of letters, digits and . _ : -, with no / and no space",
                )
    return models


def text_config_of(adapter: ModelAdapter, config: Config) -> Config:
    """`text_config(config)`. Raises PluginError for what is none, as all below, and for any error
    of the adapter that is no OllmError.
    """
    found = _asked(adapter, "text_config", config)
    if not isinstance(found, Mapping):
        raise _wrong(
            adapter, "text_config", "a part of config.json, or all of it", found, "return config"
        )
    return found


def layout_of(adapter: ModelAdapter, config: Config) -> Layout:
    """`layout(config)`."""
    found = _asked(adapter, "layout", config)
    if not isinstance(found, Layout):
        fix = "return replace(super().layout(config), ...), with `replace` of dataclasses"
        raise _wrong(adapter, "layout", "a Layout", found, fix)
    return found


def plan_of(adapter: ModelAdapter, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
    """`weights(config, tensor_names)`."""
    found = _asked(adapter, "weights", config, tensor_names)
    if not isinstance(found, WeightPlan):
        fix = "return super().weights(config, tensor_names), or a WeightPlan of your own"
        raise _wrong(adapter, "weights", "a WeightPlan", found, fix)
    return found


def kinds_of(adapter: ModelAdapter, config: Config, layout: Layout) -> tuple[CacheKind, ...]:
    """`caches(config)`, which must go with `layout`. Raises ConfigError where they differ."""
    found = _asked(adapter, "caches", config)
    if not isinstance(found, Sequence) or not all(isinstance(one, CacheKind) for one in found):
        fix = "return one CacheKind for each layer"
        raise _wrong(adapter, "caches", "a sequence of CacheKind objects", found, fix)
    if len(found) != layout.num_layers:
        raise ConfigError(
            f"adapter {adapter.name} gives {len(found)} caches, expected {layout.num_layers}",
            hint="caches() must return one CacheKind for each layer of layout()",
        )
    mixers = layout.mixers or ("full",) * layout.num_layers
    if len(mixers) != layout.num_layers:
        raise ConfigError(
            f"adapter {adapter.name}: layout() gives {len(mixers)} mixers for "
            f"{layout.num_layers} layers",
            hint="layout() must have one of `mixers` for each layer, or none",
        )
    for layer_idx, (kind, mixer) in enumerate(zip(found, mixers, strict=True)):
        _check_kind(adapter.name, layer_idx, kind, mixer)
    return tuple(found)


def told(value: object) -> str:
    """A value of an author's code in a message: what it is, and what it says, cut short."""
    if value is None:
        return "None"
    return f"the {type(value).__name__} {ascii(value)[:80]}"


def _check_words(name: str, attribute: str, value: object) -> None:
    if isinstance(value, tuple) and all(isinstance(word, str) for word in value):
        return
    words = [value] if isinstance(value, str) else value
    mended = tuple(words) if isinstance(words, (list, set, frozenset)) else (name,)
    raise PluginError(
        f"adapter {name}: {attribute} must be a tuple of strings, got {told(value)}",
        hint=f"{attribute} = {ascii(mended)[:80]}",
    )


def _catalog(adapter: ModelAdapter, name: str) -> tuple[CatalogEntry, ...]:
    found: object = adapter.catalog()
    if not isinstance(found, Iterable):
        raise _wrong(adapter, "catalog", "CatalogEntry objects", found, "return a tuple of them")
    return check_entries(f"adapter {name}: catalog()", found)


def _check_api(name: str, api: str) -> str:
    """A warning for a newer minor, else nothing. Raises PluginError for another major."""
    major, minor = _api_version(name, api)
    core_major, core_minor = _api_version(name, ADAPTER_API)
    if major != core_major:
        raise PluginError(
            f"adapter {name} speaks adapter API {api}, this core {ADAPTER_API}",
            hint="install versions of the adapter and of ollm-core that belong together",
        )
    if minor > core_minor:
        return f"adapter {name} speaks adapter API {api}, newer than this core's {ADAPTER_API}"
    return ""


def _api_version(name: str, text: object) -> tuple[int, int]:
    if not isinstance(text, str) or not (match := re.fullmatch(r"(\d{1,6})\.(\d{1,6})", text)):
        raise PluginError(
            f"adapter {name}: adapter_api must look like {ADAPTER_API!r}, got {told(text)}",
            hint="leave it out: ModelAdapter has the right one",
        )
    return int(match[1]), int(match[2])


def _asked(adapter: ModelAdapter, method: str, *arguments: object) -> Any:
    """What a method of the adapter returns. Raises PluginError in place of what is no OllmError."""
    call: Callable[..., object] = getattr(adapter, method)
    try:
        return call(*arguments)
    except OllmError:
        raise
    except Exception as error:
        raise PluginError(
            f"adapter {adapter.name}: {method}() raised {one_line(error)}",
            hint="this is a fault of the adapter; where config.json may be wrong, it should raise "
            "ConfigError",
        ) from error


def _wrong(
    adapter: ModelAdapter, method: str, expected: str, found: object, fix: str
) -> PluginError:
    return PluginError(
        f"adapter {adapter.name}: {method}() must return {expected}, got {told(found)}", hint=fix
    )


def _check_kind(name: str, layer_idx: int, kind: CacheKind, mixer: str) -> None:
    if {kind.kind == "recurrent", mixer == "recurrent", bool(kind.states)} == {True, False}:
        raise ConfigError(
            f"adapter {name} says of layer {layer_idx} that it is recurrent, and yet not",
            hint="layout(), caches() and the states of a cache kind must agree",
        )
    if kind.kind == "sliding" and (kind.window is None or kind.window < 2):
        raise ConfigError(
            f"layer {layer_idx} has a sliding window of {kind.window} tokens, expected at least 2",
            hint="`sliding_window` of config.json, or caches() of the adapter, is wrong",
        )
    if kind.kind == "full" and kind.window is not None:
        raise ConfigError(
            f"layer {layer_idx} keeps all tokens, and yet has a window",
            hint=f"caches() of adapter {name}: a window is for CacheKind('sliding', ...)",
        )
