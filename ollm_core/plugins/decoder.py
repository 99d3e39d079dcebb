"""DecoderAdapter, the base of most adapters: a decoder whose checkpoint uses the parameter names of
its transformers model. A family says what one layer holds; sizes, rotary embeddings, tied heads,
windows and damaged files are dealt with here. No torch is needed.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.kv import CacheKind, StateShape
from ollm_core.contracts.model import CatalogEntry, Config, Layout
from ollm_core.contracts.tensors import DTYPE_BYTES, TORCH_NAMES, ParameterSource, WeightPlan
from ollm_core.errors import CheckpointError, ConfigError, PluginError, UnsupportedError
from ollm_core.plugins.infer import infer_tensors
from ollm_core.plugins.validation import told
from ollm_core.values import DTYPES

_MAX_SIZE = 1 << 31
_MAX_LAYERS = 10_000
_MIXERS = MappingProxyType(
    {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "recurrent"}
)
_DTYPE_BYTES = MappingProxyType(
    {dtype: DTYPE_BYTES[name] for name, dtype in TORCH_NAMES.items() if dtype in DTYPES}
)


class DecoderAdapter(ModelAdapter):
    """A decoder-only family. To be given: `name`, `model_types`, `layer_parameters`, `tiny_config`,
    and `catalog` where models are known by id. The rest has defaults, to be overridden as needed.

    `config` is always the text config with `defaults` filled in, where a method here is called by
    another one here.
    """

    defaults: Config = MappingProxyType({})
    """What the config class of transformers assumes for keys that config.json may lack, where that
    is not None or False: for instance `{"tie_word_embeddings": True, "head_dim": 256}`.
    """
    sizes: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size")
    """Keys that must hold a positive integer, beside those for layers and heads."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """Rotary embeddings with fixed frequencies that the model has."""
    norm_parameters: tuple[str, ...] = ("weight",)
    """Parameters of the final norm."""

    @abstractmethod
    def layer_parameters(self, config: Config, layer_idx: int) -> Iterable[str]:
        """Names of the parameters of one decoder layer, without the layer's own path: for instance
        `self_attn.q_proj.weight`.
        """

    def source(self, config: Config, parameter: str) -> ParameterSource:
        """Which tensors make `parameter` (its full name). Default: the one of the same name.

        A checkpoint that renames, fuses or splits tensors overrides this.
        """
        return ParameterSource((parameter,))

    def experts(self, config: Config, parameter: str) -> Sequence[ParameterSource]:
        """Which tensors make each routed expert's slice of `parameter` (its full name): a tensor
        for each, or a row of one. Default: none, it is a parameter like others.
        """
        return ()

    def ignores(self, config: Config, tensor: str) -> bool:
        """Whether a tensor that no parameter uses is known to be superfluous. Frequencies of rotary
        embeddings and the head of a tied model always are.
        """
        return False

    def layer_types(self, config: Config) -> Sequence[str]:
        """`full_attention`, `sliding_attention` or `linear_attention` for each layer, as
        transformers derives them.

        Default: the config's `layer_types`; without those, `sliding_window` holds from layer
        `max_window_layers` on, unless `use_sliding_window` is false. Raises ConfigError.
        """
        num_layers = read_size(config, "num_hidden_layers", _MAX_LAYERS)
        listed = config.get("layer_types")
        if listed is not None:
            if not isinstance(listed, (list, tuple)) or len(listed) != num_layers:
                raise bad_config("layer_types", listed, f"a list of {num_layers} names")
            return tuple(listed)
        first = num_layers
        if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
            first = config.get("max_window_layers") or 0
            if type(first) is not int or first < 0:
                raise bad_config("max_window_layers", first, "an integer from 0")
        return tuple(
            "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
        )

    def recurrent_states(self, config: Config) -> Sequence[StateShape]:
        """What a layer of linear attention remembers of one sequence, see `CacheKind.states`.
        Default: nothing, the family has no such layers.
        """
        return ()

    def layout(self, config: Config) -> Layout:
        """transformers' usual tree; another one by `replace(super().layout(config), norm=...)`.

        Raises ConfigError for sizes that make no model, UnsupportedError for a rope or layer type.
        """
        config = self._complete(config)
        for key in self.sizes:
            read_size(config, key)
        heads, kv_heads, _ = head_sizes(config)
        if heads % kv_heads:
            raise bad_config("num_attention_heads", heads, f"a multiple of {kv_heads} KV heads")
        self._check_rope(config)
        mixers = tuple(self._mixers(config))
        return Layout(len(mixers), mixers=mixers if {*mixers} != {"full"} else ())

    def weights(self, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
        """Every parameter from its `source`, a tied head from the embedding's.

        Raises CheckpointError if a tensor is missing or foreign.
        """
        config = self._complete(config)
        layout = self.layout(config)
        embedding, head = f"{layout.embedding}.weight", f"{layout.head}.weight"
        names = list(self._parameter_names(config, layout))
        experts = {name: self._experts(config, name) for name in names}
        experts = {name: slices for name, slices in experts.items() if slices}
        parameters = {name: self._source(config, name) for name in names if name not in experts}
        unused_head: tuple[str, ...] = ()
        present = frozenset(tensor_names)
        if config.get("tie_word_embeddings"):
            unused_head = parameters[head].tensors
            if present.issuperset(unused_head) and not present & {*parameters[embedding].tensors}:
                parameters[embedding] = parameters[head]  # stored under the head's name alone
            parameters[head] = parameters[embedding]
        plan = WeightPlan(parameters, experts=experts)
        used = {tensor for source in plan.sources() for tensor in source.tensors}
        ignored = frozenset(
            tensor
            for tensor in present - used
            if tensor in unused_head
            or tensor.endswith(".rotary_emb.inv_freq")
            or self.ignores(config, tensor)
        )
        self._check_tensors(missing=used - present, foreign=present - used - ignored)
        return replace(plan, ignored=ignored)

    def tensors(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> Mapping[str, tuple[str, tuple[int, ...]]] | None:
        """The tensors of every parameter, as its source says or as they can be told.

        Raises ConfigError for a parameter that the model does not have, UnsupportedError for one
        whose tensors cannot be told.
        """
        config = self._complete(config)
        layout = self.layout(config)
        embedding, head = f"{layout.embedding}.weight", f"{layout.head}.weight"
        tried: dict[object, tuple[int, ...] | None] = {}
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in self._parameter_names(config, layout):
            if name == head and config.get("tie_word_embeddings"):
                name = embedding
            if name not in shapes:
                raise ConfigError(
                    f"adapter {self.name} declares parameter {name}, which the model of "
                    "config.json does not have",
                    hint="config.json is of another model, or layer_parameters(), norm_parameters "
                    f"or layout() of adapter {self.name} is wrong",
                )
            shape = shapes[name]
            slices = self._experts(config, name)
            parts = [(one, shape[1:]) for one in slices] or [(self._source(config, name), shape)]
            for source, part in parts:
                found.update(infer_tensors(source, part, dtype, shape[0], tried))
        return found

    def caches(self, config: Config) -> Sequence[CacheKind]:
        """Every layer remembers all tokens, or those of its window, or a state."""
        config = self._complete(config)
        _, kv_heads, head_dim = head_sizes(config)
        mixers = list(self._mixers(config))
        kinds = {"full": CacheKind("full", kv_heads, head_dim)}
        if "sliding" in mixers:
            window = read_size(config, "sliding_window")
            kinds["sliding"] = CacheKind("sliding", kv_heads, head_dim, window)
        if "recurrent" in mixers:
            states = tuple(self.recurrent_states(config))
            kinds["recurrent"] = CacheKind("recurrent", states=states)
        return tuple(kinds[mixer] for mixer in mixers)

    def _complete(self, config: Config) -> Config:
        return {**self.defaults, **config}

    def _parameter_names(self, config: Config, layout: Layout) -> Iterator[str]:
        yield f"{layout.embedding}.weight"
        for i in range(layout.num_layers):
            path = f"{layout.layers}.{i}."
            for leaf in self._layer_leaves(config, i, path):
                yield path + leaf
        for leaf in self.norm_parameters:
            yield f"{layout.norm}.{leaf}"
        yield f"{layout.head}.weight"

    def _layer_leaves(self, config: Config, layer_idx: int, path: str) -> Iterable[str]:
        """`layer_parameters`. Raises PluginError for what are no names inside the layer at
        `path`.
        """
        found: object = self.layer_parameters(config, layer_idx)
        what = f"adapter {self.name}: layer_parameters() of layer {layer_idx}"
        if isinstance(found, str) or not isinstance(found, Iterable):
            raise PluginError(
                f"{what} must give names, got {told(found)}",
                hint="yield each name, or return a tuple of them, of one too: ('norm.weight',)",
            )
        leaves = tuple(found)
        for leaf in leaves:
            if not isinstance(leaf, str) or leaf.startswith(path):
                raise PluginError(
                    f"{what} must give names inside the layer, got {told(leaf)}",
                    hint=f"leave out {path!a}: it is put before each name",
                )
        if twice := [leaf for leaf, count in Counter(leaves).items() if count > 1]:
            raise PluginError(
                f"{what} gives {twice[0]!a} more than once", hint="give each parameter once"
            )
        return leaves

    def _source(self, config: Config, parameter: str) -> ParameterSource:
        """`source`. Raises PluginError for what is none."""
        found: object = self.source(config, parameter)
        if not isinstance(found, ParameterSource):
            raise PluginError(
                f"adapter {self.name}: source() of {parameter} must return a ParameterSource, "
                f"got {told(found)}",
                hint="return ParameterSource((name,)), or super().source(config, parameter)",
            )
        return found

    def _experts(self, config: Config, parameter: str) -> tuple[ParameterSource, ...]:
        """`experts`. Raises PluginError for what are none."""
        found: object = self.experts(config, parameter)
        if isinstance(found, Iterable):
            slices = tuple(found)
            if all(isinstance(one, ParameterSource) for one in slices):
                return slices
        raise PluginError(
            f"adapter {self.name}: experts() of {parameter} must return ParameterSource objects, "
            f"got {told(found)}",
            hint="return one for each expert, and () for a parameter that is none of theirs",
        )

    def _mixers(self, config: Config) -> Iterator[str]:
        known = [
            one for one in _MIXERS if one != "linear_attention" or self.recurrent_states(config)
        ]
        for i, layer_type in enumerate(self.layer_types(config)):
            if layer_type not in known:
                raise UnsupportedError(
                    f"adapter {self.name} does not support layer {i} of type "
                    f"{ascii(layer_type)[:80]}",
                    hint=f"it knows {' and '.join(known)}",
                )
            if layer_type == "sliding_attention":
                read_size(config, "sliding_window")
            yield _MIXERS[layer_type]

    def _check_rope(self, config: Config) -> None:
        """transformers 4 writes `rope_scaling`, which wins over the `rope_parameters` that 5
        writes. Either may hold one set of parameters for each layer type.
        """
        ropes: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(ropes, Mapping):
            raise bad_config("rope_scaling", ropes, "an object")
        for rope in [one for one in ropes.values() if isinstance(one, Mapping)] or [ropes]:
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            if rope_type in ("dynamic", "longrope"):
                raise UnsupportedError(
                    f"rope type {rope_type} is not supported: its frequencies depend on the "
                    "longest position so far, so a prompt in chunks would give another result",
                    hint=f"use a model with one of {', '.join(self.rope_types)}",
                )
            if rope_type not in self.rope_types:
                raise bad_config("rope_type", rope_type, f"one of {', '.join(self.rope_types)}")

    def _check_tensors(self, *, missing: Iterable[str], foreign: Iterable[str]) -> None:
        lacks, has = sorted(missing), sorted(foreign)
        also = f"which no {self.name} model has ({len(has)} such in all)"
        if lacks:
            raise CheckpointError(
                f"the checkpoint lacks tensor {lacks[0]} ({len(lacks)} are missing in all)"
                + (f" and has {has[0]!a}, {also}" if has else ""),
                hint="config.json and the checkpoint are of different models, or layout(), "
                f"layer_parameters(), source(), experts() or defaults of adapter {self.name} are "
                "wrong",
            )
        if has:
            raise CheckpointError(
                f"the checkpoint has tensor {has[0]!a}, {also}",
                hint="quantised checkpoints and LoRA files are not supported; for its author: "
                f"layer_parameters(), source() and experts() of adapter {self.name} name what is "
                "used, ignores() what is not",
            )


def head_sizes(config: Config) -> tuple[int, int, int]:
    """Query heads, key-value heads and head dimension, where the last two may be absent or null.

    Raises ConfigError.
    """
    heads = read_size(config, "num_attention_heads")
    kv_heads = heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = read_size(config, "num_key_value_heads")
    if config.get("head_dim") is not None:
        return heads, kv_heads, read_size(config, "head_dim")
    hidden = read_size(config, "hidden_size")
    if hidden % heads:
        raise bad_config("hidden_size", hidden, f"a multiple of num_attention_heads = {heads}")
    return heads, kv_heads, hidden // heads


def read_size(config: Config, key: str, largest: int = _MAX_SIZE) -> int:
    """The size at `key`. Raises ConfigError unless it is an integer from 1 to `largest`."""
    value = config.get(key)
    if type(value) is not int or not 0 < value <= largest:  # a bool is an int, but not a size
        raise bad_config(key, value, f"an integer from 1 to {largest}")
    return value


def bad_config(key: str, value: object, expected: str) -> ConfigError:
    """The error for a value of config.json that cannot be, in one line."""
    return ConfigError(
        f"config.json: {key} must be {expected}, got {ascii(value)[:80]}",
        hint="fetch the model's config.json again",
    )


def catalog_entry(
    model_id: str,
    repo: str,
    config: Config,
    *,
    num_parameters: int,
    license: str,
    chat: bool = True,
    weight_bytes: int | None = None,
    ignored_bytes: int = 0,
    aliases: Sequence[str] = (),
) -> CatalogEntry:
    """A known model: its id, hub repository, the content of its config.json, and its size.

    `num_parameters` counts a tied head once, as the checkpoint does. `weight_bytes` are those of
    all its tensors; None: every parameter is stored in the config's dtype. `ignored_bytes` are,
    of these, those of tensors that the adapter ignores. `aliases` are other names of the model. The
    config is copied, so that what transformers does to it stays with that caller.
    """
    if weight_bytes is None:
        dtype = str(config.get("dtype") or config.get("torch_dtype"))
        if dtype not in _DTYPE_BYTES:
            raise bad_config("dtype", dtype, f"one of {', '.join(_DTYPE_BYTES)}")
        weight_bytes = num_parameters * _DTYPE_BYTES[dtype]
    whole = copy.deepcopy(dict(config))
    return CatalogEntry(
        model_id,
        repo,
        num_parameters,
        weight_bytes,
        whole,
        chat,
        license,
        ignored_bytes,
        tuple(aliases),
    )
