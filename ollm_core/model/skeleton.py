"""The transformers model without weights: every layer on the meta device, parameters bound just
before use.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ollm_core.attention.select import ATTENTION_NAME, register_attention
from ollm_core.contracts.model import Config, Layout
from ollm_core.errors import ConfigError, PluginError, UnsupportedError
from ollm_core.model.moe import Mixture
from ollm_core.model.outside_layers import OutsideLayers, watch_outside
from ollm_core.model.own_forward import OwnForward
from ollm_core.plugins.decoder import bad_config
from ollm_core.products.products import CpuProducts
from ollm_core.products.weight import ProductWeight

_ANY_LENGTH = 1 << 20
_RECURRENT_KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}


class Slots(AbstractContextManager[nn.Module]):
    """Where the parameters of a module are kept: their owners' dictionaries. What they are filled
    with stays until the end of a `with` block.
    """

    def __init__(
        self, module: nn.Module, places: Sequence[tuple[dict[str, Any], str]] | None = None
    ) -> None:
        """They are empty while they hold what they hold now. `places`: by default all of the
        module.
        """
        self._module = module
        self._places: list[tuple[dict[str, Any], str]] = list(places or ())
        if places is None:
            self._places = [
                (owner._parameters, leaf)
                for owner in module.modules()
                for leaf, value in owner._parameters.items()
                if value is not None
            ]
        self._empty: list[Tensor] = [holder[leaf] for holder, leaf in self._places]

    def fill(self, parameters: Sequence[Tensor]) -> None:
        """Put `parameters` in, in the order of `named_parameters`.

        Like those of transformers they could be trained, though none is: torch chooses the kernel
        of some products by that, and with the kernel the last bits.
        """
        for (holder, leaf), value in zip(self._places, parameters, strict=True):
            kind = type(value)  # isinstance asks Python code, at each of them
            if kind is nn.Parameter:
                holder[leaf] = value.requires_grad_()
            else:
                holder[leaf] = value if kind is ProductWeight else nn.Parameter(value)

    @property
    def places(self) -> Sequence[tuple[dict[str, Any], str]]:
        """The dictionaries, and the keys in them."""
        return self._places

    @property
    def empty(self) -> Sequence[Tensor]:
        """What they hold while they are empty."""
        return self._empty

    def __enter__(self) -> nn.Module:
        return self._module

    def __exit__(self, *_: object) -> None:
        for (holder, leaf), value in zip(self._places, self._empty, strict=True):
            holder[leaf] = value


class Skeleton:
    """Layers, final norm and rotary embedding of one model, callable once their parameters are
    bound.
    """

    own: OwnForward | None = None
    """What follows the model's own forward, where the layout leaves it that."""
    kept_dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    """Parameters that are not in the dtype to compute in, by name."""
    outer: tuple[str, ...] = ()
    """Names of what is bound with the norm, where it is more than that."""
    routed: Mapping[int, Mixture] = MappingProxyType({})
    """Layers with routed experts that are called whole."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        products: CpuProducts | None = None,
    ) -> None:
        """`products` multiply in place of torch. However its weights are stored, the model is a
        plain one. Raises ConfigError if transformers cannot build a model from `config`,
        UnsupportedError if it would compute recurrent layers by another package.
        """
        self.recurrent = frozenset(
            i for i, mixer in enumerate(layout.mixers) if mixer == "recurrent"
        )
        """Layers with a state in place of keys and values."""
        self.products = products
        if self.recurrent:
            refuse_kernels()
        register_attention()
        model = empty_model(config, dtype, ATTENTION_NAME)
        self.config: PreTrainedConfig = model.config
        check_paths(model, layout)
        self.num_parameters = sum(one.numel() for one in model.parameters())
        self.shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        if products:
            products.expect(max(shape[-1] for shape in self.shapes.values() if len(shape) > 1))
        self.layers: Sequence[nn.Module] = list(model.get_submodule(layout.layers))
        self.norm = model.get_submodule(layout.norm)
        self.meta_rotary = model.get_submodule(layout.rotary)
        # Rotary frequencies are in no checkpoint: a fresh module computes them. On the CPU, as
        # transformers does for any device: a GPU's powers and quotients have other last bits.
        with torch.device("meta" if device.type == "meta" else "cpu"):
            self.rotary: nn.Module = type(self.meta_rotary)(self.config).to(device)
        self._rotary_axes = layout.rotary_axes
        self.rotary_types = _rotary_types(self.rotary, self.config, len(self.layers))
        self.mixtures: Mapping[int, Mixture] = dict(_mixtures(self.layers, layout, products))
        """Layers with routed experts, which are run in two halves."""
        self._slots = [Slots(layer) for layer in self.layers]
        self.outside: OutsideLayers = watch_outside(model, layout, self.rotary_types)
        """What the family computes between embedding, layers, norm and head."""

    @property
    def grows(self) -> bool:
        """Whether what is computed beside block-wise attention takes more for a longer past."""
        return False

    def embeddings(
        self, rotary: nn.Module, layer_idx: int, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines [R, T, D] for a layer. `rotary` is `self.rotary` or
        `self.meta_rotary`.
        """
        kind = self.rotary_types[layer_idx]
        if self._rotary_axes:
            positions = positions.expand(self._rotary_axes, -1, -1)
        found: tuple[Tensor, Tensor] = (
            rotary(hidden, positions) if kind is None else rotary(hidden, positions, kind)
        )
        return found

    def bound(
        self, layer_idx: int, parameters: Sequence[Tensor], rows: int
    ) -> AbstractContextManager[nn.Module]:
        """The layer with `parameters` in place, for calls with up to `rows` tokens; afterwards it
        is on the meta device again.
        """
        slots = self._slots[layer_idx]
        slots.fill(self.multiplied(parameters, rows))
        return slots

    def traced(self, layer_idx: int, rows: int) -> AbstractContextManager[nn.Module]:
        """The layer as `bound` makes it, with parameters without data."""
        return self.bound(layer_idx, self._slots[layer_idx].empty, rows)

    def multiplied(self, parameters: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
        """`parameters`, for products with up to `rows` rows."""
        return self.products.bind(parameters, rows) if self.products else parameters

    def on_meta(self) -> AbstractContextManager[None]:
        """In the `with`, a model that is run by its own forward has no data, for tracing."""
        raise NotImplementedError

    def bound_head(
        self, parameters: Sequence[Tensor], rows: int
    ) -> AbstractContextManager[nn.Module]:
        """The head with `parameters` in place; for a model that is run by its own forward."""
        raise NotImplementedError

    def traced_head(self, rows: int) -> AbstractContextManager[nn.Module]:
        """The same with parameters without data."""
        raise NotImplementedError

    def chunk_forward(self, layer_idx: int) -> Callable[..., Tensor]:
        """What is run chunk by chunk: the layer, or its mixer if it has routed experts."""
        mixture = self.mixtures.get(layer_idx)
        return mixture.mixer if mixture else self.layers[layer_idx]

    def bind_norm(self, parameters: Sequence[Tensor]) -> None:
        """Give the final norm its parameters until `close`."""
        Slots(self.norm).fill(parameters)

    @property
    def hidden_size(self) -> int:
        """Numbers in the hidden state of one token, between layers."""
        return int(self.config.hidden_size)

    @property
    def max_positions(self) -> int:
        """The most tokens that a sequence may have."""
        stated = getattr(self.config, "max_position_embeddings", None)
        return stated if isinstance(stated, int) else _ANY_LENGTH

    @property
    def buffer_bytes(self) -> int:
        """Bytes on the device beside parameters: the rotary frequencies, and what products need
        at all times.
        """
        rotary = sum(buffer.nbytes for buffer in self.rotary.buffers())
        return rotary + (self.products.buffer_bytes if self.products else 0)

    def close(self) -> None:
        """Hold nothing on the device any more, nor the constants of operations outside layers."""
        self.rotary = self.meta_rotary
        if self.products:
            self.products.close()
        self.outside = OutsideLayers()
        self.bind_norm([torch.empty_like(p, device="meta") for p in self.norm.parameters()])


def _rotary_types(rotary: nn.Module, config: PreTrainedConfig, num_layers: int) -> list[str | None]:
    """What each layer passes to `rotary` beside states and positions: its type, where the module
    wants one. Raises UnsupportedError if it wants anything else.
    """
    _, _, *others = inspect.signature(rotary.forward).parameters.values()
    wanted = [other.name for other in others if other.default is inspect.Parameter.empty]
    if not wanted:
        return [None] * num_layers
    types: list[str | None] = list(getattr(config, "layer_types", None) or ())
    if wanted != ["layer_type"] or len(types) != num_layers:
        raise UnsupportedError(
            f"{type(rotary).__name__} wants {', '.join(wanted)} for each layer, "
            f"which config.json does not give",
            hint="rotary embeddings may depend on layer_types, and on nothing else",
        )
    return types


def empty_model(config: Config, dtype: torch.dtype, attention: str = "eager") -> Any:
    """transformers' causal language model of a text config on the meta device, in `dtype`. Raises
    ConfigError if it cannot build one.
    """
    _check_counts(config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        made = AutoConfig.for_model(**copy.deepcopy(plain))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                made,
                dtype=dtype,
                attn_implementation=attention,
                experts_implementation="eager",  # the others give other last bits
                trust_remote_code=False,
            )
    except Exception as error:
        raise ConfigError(
            f"transformers cannot build a {config.get('model_type')} model from config.json: "
            f"{' '.join(str(error).split())}"
        ) from error
    return model.eval()


_MOST = 1 << 40
"""The largest number of a config.json that is taken for one."""
_MOST_MODULES = 1 << 16
"""The most layers, or experts that each are a module: beyond, building a model never ends."""


def _check_counts(value: object, key: str = "config.json") -> None:
    """Raises ConfigError for a number that is none of a model, before one is built of it."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            _check_counts(one, str(name))
    elif isinstance(value, (list, tuple)):
        for one in value:
            _check_counts(one, key)
    elif type(value) is int:
        counted = re.search(r"layers?$|^depth$|(^|_)num_blocks$|experts$", key)
        most = _MOST_MODULES if counted else _MOST
        if abs(value) > most:
            raise bad_config(key, value, f"an integer up to {most}")


_PARTS = "embedding", "layers", "norm", "head", "rotary"


def check_paths(model: nn.Module, layout: Layout, parts: Sequence[str] = _PARTS) -> None:
    """Raises PluginError for a path of the layout that leads nowhere."""
    for part in parts:
        path = getattr(layout, part)
        try:
            model.get_submodule(path)
        except AttributeError as error:
            known = [name for name, _ in model.named_modules() if ".0" not in name]
            close = difflib.get_close_matches(path, known, n=1)
            raise PluginError(
                f"layout().{part} is {path!a}, and transformers' {type(model).__name__} has no "
                "such module",
                hint=f"did you mean {close[0]!a}?" if close else f"there are {', '.join(known)}",
            ) from error


def refuse_kernels() -> None:
    """Packages that transformers takes for recurrent layers as soon as they are there. They give
    other bits than its own code, only on a GPU, and cannot be traced for a plan.
    """
    for package, distribution in _RECURRENT_KERNELS.items():
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:  # a mere directory has none
            raise UnsupportedError(
                f"{distribution} is installed, and transformers computes recurrent layers with it: "
                "what they give and hold is then not known",
                hint=f"pip uninstall {distribution}, or use an environment without it",
            )


def _mixtures(
    layers: Sequence[nn.Module], layout: Layout, products: CpuProducts | None
) -> Iterator[tuple[int, Mixture]]:
    for layer_idx, layer in enumerate(layers):
        if layout.experts and layout.experts in dict(layer.named_modules()):
            yield layer_idx, Mixture(layer, layout, products)
