"""The skeleton of a model whose surroundings of the layers are left to its own forward."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ollm_core.attention.select import EAGER_NAME, register_attention
from ollm_core.contracts.kv import CacheKind
from ollm_core.contracts.model import Capability, Config, Layout
from ollm_core.errors import ConfigError, UnsupportedError, one_line
from ollm_core.model.blockwise_probe import Blockwise, probe_blockwise
from ollm_core.model.follow_forward import follow_forward
from ollm_core.model.moe import Mixture
from ollm_core.model.outside_layers import OutsideLayers
from ollm_core.model.own_forward import OwnForward
from ollm_core.model.skeleton import (
    Skeleton,
    Slots,
    check_paths,
    empty_model,
    refuse_kernels,
)
from ollm_core.products.products import CpuProducts

_LAID_OUT = "the past of a layer is laid out for transformers' own attention, as"


class OwnSkeleton(Skeleton):
    """See Skeleton. Layers, norms, embeddings of positions, the head and what else there is stay in
    the model, whose forward is followed.
    """

    own: OwnForward

    def __init__(
        self,
        config: Config,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        products: CpuProducts | None = None,
        model: Any = None,
    ) -> None:
        """`products` multiply in place of torch, inside layers and the head; `model` is that of
        `empty_model`, if there is one already. Raises ConfigError if transformers cannot build a
        model from `config`, UnsupportedError for one whose forward cannot be followed.
        """
        self.recurrent = frozenset()
        self.products = products
        self.outside = OutsideLayers()
        self.mixtures: Mapping[int, Mixture] = {}
        register_attention()
        model = model or empty_model(config, dtype, EAGER_NAME)
        self.config = model.config.get_text_config(decoder=True)
        check_paths(model, layout, ("embedding", "layers", "head"))
        _give_buffers(model)
        self.layers: Sequence[nn.Module] = list(model.get_submodule(layout.layers))
        self.rotary_types = [None] * len(self.layers)
        places = dict(_places(model))
        self.num_parameters = sum(one.numel() for one in model.parameters())
        self.shapes = {name: tuple(owner[leaf].shape) for name, (owner, leaf) in places.items()}
        if products:
            products.expect(max(shape[-1] for shape in self.shapes.values() if len(shape) > 1))
        plan = model._get_dtype_plan(dtype)
        self.kept_dtypes = {
            name: kept
            for name, (owner, leaf) in places.items()
            if (kept := _kept_dtype(name, owner[leaf].dtype, plan)) != dtype
        }
        self.routed = {
            i: Mixture(layer, layout, products)
            for i, layer in enumerate(self.layers)
            if layout.experts and layout.experts in dict(layer.named_modules())
        }
        prefixes = [f"{layout.layers}.{i}." for i in range(len(self.layers))]
        experts = f".{layout.experts}." if layout.experts else "\0"
        self._slots = [
            Slots(
                layer,
                [
                    places[name]
                    for name in places
                    if name.startswith(prefix)
                    and not (i in self.routed and name.startswith(prefix[:-1] + experts))
                ],
            )
            for i, (layer, prefix) in enumerate(zip(self.layers, prefixes, strict=True))
        ]
        inside = (f"{layout.layers}.", f"{layout.head}.", f"{layout.embedding}.weight")
        outer = [name for name in places if not name.startswith(inside)]
        self.outer = tuple(outer)
        """Names of the parameters outside layers, embedding and head."""
        self._outer = Slots(model, [places[name] for name in outer])
        head = [name for name in places if name.startswith(f"{layout.head}.")]
        self._head = Slots(model, [places[name] for name in head])
        buffers = {
            f"{path}.{name}": (module._buffers, name, value)
            for path, module in model.named_modules()
            for name, value in module._buffers.items()
            if value is not None and not value.is_meta
        }
        self._buffers = list(buffers.values())
        self._device = device
        self.own = OwnForward(model, layout, self.layers)
        self._place_buffers(torch.device("meta"))
        mixtures = list(self.routed.values())
        self.own.facts = follow_forward(self.own, dtype, mixtures)
        if any(kind.states for kind in self.kinds):
            refuse_kernels()
        self._buffers = [
            (holder, name, value.to(self.own.facts.converted.get(path, value.dtype)).to(device))
            for path, (holder, name, value) in buffers.items()
        ]
        self._place_buffers(device)

    @property
    def kinds(self) -> tuple[CacheKind, ...]:
        """What each layer remembers."""
        return tuple(memory.kind for memory in self.own.facts.memories)

    @functools.cached_property
    def blockwise(self) -> Blockwise:
        """Whether its layers can attend block by block, looked at when it is first asked for."""
        with self.on_meta():
            mixtures = list(self.routed.values())
            return probe_blockwise(self.own, self.layers, mixtures, self.max_positions)

    @property
    def grows(self) -> bool:
        return self.blockwise.grows

    @property
    def limits(self) -> Mapping[str, Capability]:
        """What the model cannot do."""
        limits: dict[str, Capability] = {}
        if self.blockwise.refusal:
            reason = f"{_LAID_OUT} {self.blockwise.refusal}"
            limits["blockwise-attention"] = Capability("unsupported", reason)
        if not self.own.facts.continues:
            reason = (
                "in transformers its layers begin anew with each call of several tokens: "
                "the only chunk_size is 1"
            )
            limits["chunked-prefill"] = Capability("unsupported", reason)
        return limits

    @property
    def hidden_size(self) -> int:
        return self.own.facts.width

    def bound_head(self, parameters: Sequence[Tensor], rows: int) -> Slots:
        """The head with `parameters` in place, for calls with up to `rows` tokens, in a `with`."""
        self._head.fill(self.multiplied(parameters, rows))
        return self._head

    def traced_head(self, rows: int) -> Slots:
        """The head as `bound_head` makes it, with parameters without data."""
        return self.bound_head(self._head.empty, rows)

    def bind_norm(self, parameters: Sequence[Tensor]) -> None:
        """Give everything outside layers, embedding and head its parameters until `close`."""
        self._outer.fill(parameters)

    @contextmanager
    def on_meta(self) -> Iterator[None]:
        outer = [holder[leaf] for holder, leaf in self._outer.places]
        self._outer.__exit__()
        self._place_buffers(torch.device("meta"))
        try:
            yield
        finally:
            for (holder, leaf), value in zip(self._outer.places, outer, strict=True):
                holder[leaf] = value
            self._place_buffers(self._device)

    def chunk_forward(self, layer_idx: int) -> Any:
        return None

    @property
    def buffer_bytes(self) -> int:
        own: int = sum(value.nbytes for _, _, value in self._buffers)
        return own + (self.products.buffer_bytes if self.products else 0)

    def close(self) -> None:
        if self.products:
            self.products.close()
        self._outer.__exit__()
        self._place_buffers(torch.device("meta"))
        self._buffers = []

    def _place_buffers(self, device: torch.device) -> None:
        """Buffers are kept on the device alone; without data, they need none."""
        for holder, name, value in self._buffers:
            holder[name] = (
                value if value.device == device else torch.empty_like(value, device=device)
            )
        self.own.device = device


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    """Where each parameter is, and each buffer that a checkpoint holds, by name."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, value in module._parameters.items():
            if value is not None:
                yield prefix + leaf, (module._parameters, leaf)
        for leaf, value in module._buffers.items():
            if value is not None and leaf not in module._non_persistent_buffers_set:
                yield prefix + leaf, (module._buffers, leaf)


def _kept_dtype(name: str, dtype: torch.dtype, plan: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype in which transformers loads a parameter: as it plans for it, else the model's."""
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", r".*"), name):
            return kept
    return dtype


def _give_buffers(model: Any) -> None:
    """Values for the buffers that are in no checkpoint, as transformers initialises them when it
    loads a model: on the CPU, whose powers and quotients are those of any device there. Raises
    ConfigError if it cannot, UnsupportedError for one that is left without.
    """
    given = [
        (path, name, module)
        for path, module in model.named_modules()
        for name, value in module._buffers.items()
        if value is not None and value.is_meta and name in module._non_persistent_buffers_set
    ]
    for _, name, module in given:
        like = module._buffers[name]
        unset = float("nan") if like.dtype.is_floating_point else like.dtype != torch.bool and -1
        module._buffers[name] = torch.full_like(like, unset, device="cpu")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # some draw numbers
            model.initialize_weights()  # of a parent, too, which may set those of its layers
    except Exception as error:
        raise ConfigError(
            f"transformers cannot initialise a {model.config.model_type} model of config.json: "
            f"{one_line(error)}"
        ) from error
    for path, name, module in given:
        value = module._buffers[name]
        if value.is_meta or (value.dtype.is_floating_point and bool(value.isnan().any())):
            raise UnsupportedError(
                f"{type(model).__name__} has the buffer {path}.{name}, which is in no checkpoint "
                "and which nothing makes",
                hint="its numbers cannot be known",
            )
