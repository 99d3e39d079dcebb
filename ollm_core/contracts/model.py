"""Data that an adapter declares about a model: frozen, free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Config = Mapping[str, Any]
"""A model's config.json as parsed: the one form that every declaration reads."""
Support = Literal["full", "unsupported", "not-implemented"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts sit in the transformers module tree (dotted module paths), and each layer's
    mixer kind.
    """

    num_layers: int
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    rotary_axes: int = 0
    """Where the rotary module takes positions [axes, R, T], as for images, in place of [R, T]: how
    many axes. Text has the same position on each.
    """
    mixers: tuple[str, ...] = ()
    """One of "full", "sliding", "recurrent" per layer; empty means all "full"."""
    experts: str = ""
    """Path inside a layer of the module that holds the routed experts, for instance `mlp.experts`;
    empty for a dense model. A layer without that module is dense. The module is called with the
    tokens' states, chosen experts and their weights, and adds up the experts in their order.
    """
    mixer: Callable[..., Tensor] | None = None
    """A layer with routed experts is run in two halves. `mixer(layer, hidden, **options)`, with the
    options of the layer itself, returns the hidden states as `mlp` takes them. None:
    `input_layernorm`, `self_attn` and the residual.
    """
    mlp: Callable[[nn.Module, Tensor], Tensor] | None = None
    """`mlp(layer, hidden)` does the rest of the layer, and may do it twice up to the experts. None:
    `post_attention_layernorm`, `mlp` and the residual.
    """
    own_forward: bool = False
    """Whether everything around the layers, and what each layer is called with, is left to the
    model's own forward, which is followed when a model is opened. Then `norm`, `rotary`, `mixers`
    and the halves of a layer are not asked for, and caches are those that transformers makes.
    """


@dataclass(frozen=True, slots=True)
class Capability:
    """One declared ability: supported in full, or not, with the adapter's own reason."""

    support: Support = "full"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.support != "full" and not self.reason:
            raise ValueError(f"a capability that is {self.support!r} needs a reason")


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that an adapter knows: enough to list it, fetch it and plan it offline."""

    id: str
    repo: str
    """Hub repository, `owner/name`."""
    num_parameters: int
    """0 if it is not known without asking the hub."""
    weight_bytes: int
    """Bytes of all checkpoint tensors; 0 if they are not known without asking the hub."""
    config: Config = field(repr=False)
    """The content of config.json; empty if it is not known without asking the hub."""
    chat: bool = True
    license: str = ""
    ignored_bytes: int = 0
    """Of `weight_bytes`, those of tensors that the adapter ignores."""
    aliases: tuple[str, ...] = ()
    """Other names, as users of other programs type them: `llama3.1:8b`. The first is shown."""
